"""Sums of adapters, against float64 and against what peft makes of the same adapters."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import paramlora
from paramlora.arithmetic import combine, resize
from paramlora.errors import AdapterError, ParamloraWarning
from paramlora.update.value import Adapter, KindUpdate, Update
from tests.arithmetic.sums import exact, far, one, total, update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_joins_ranks_of_any_scales(dtype):
    pairs = [
        (one(2, 1, 0.7, dtype=dtype), 0.3),
        (one(3, 2, 13.0, dtype=dtype), -1.7),
        (one(1, 3, 1e-5, dtype=dtype), 1.0),
    ]
    found = combine(pairs).adapter.updates["q"]
    assert found.r == 6
    # each entry of the sum is off by no more than the rounding of B does: an ulp of float32
    sizes = sum(
        abs(w * a.updates["q"].scale)
        * (a.updates["q"].lora_B.double().abs() @ a.updates["q"].lora_A.double().abs())
        for a, w in pairs
    )
    # in float64 the nine sums and products of the reference round as much, each
    ulp = 1.01 * 2.0**-24 if dtype != torch.float64 else 9 * 2.0**-53
    assert ((exact(found) - total(*pairs)).abs() <= ulp * sizes).all()


def test_where_the_scales_agree_no_bit_is_lost():
    first, second = one(2, 1, 0.7, dtype=torch.bfloat16), one(3, 2, 1.4, dtype=torch.bfloat16)
    found = combine([first, (second, 0.5)]).adapter.updates["q"]
    assert found.lora_A.dtype == found.lora_B.dtype == torch.bfloat16 and found.scale == 0.7
    assert torch.equal(found.lora_A, torch.cat([a.updates["q"].lora_A for a in (first, second)]))
    assert torch.equal(found.lora_B, torch.cat([a.updates["q"].lora_B for a in (first, second)], 1))


@pytest.mark.parametrize("shared", ["lora_A", "lora_B"])
def test_equal_factors_are_had_once(shared):
    first, second = one(3, 1, 0.7), one(3, 2, 0.4)
    same = {shared: getattr(first.updates["q"], shared)}
    second = Adapter({"q": replace(second.updates["q"], **same)})
    pairs = [(first, 1.0), (second, -0.6)]
    found = combine(pairs).adapter.updates["q"]
    assert found.r == 3 and far(found, total(*pairs)) < 1e-7


def test_an_adapter_added_to_itself_keeps_its_rank():
    first = one(2, 1)
    found = combine([first, first, (first, 0.5)]).adapter.updates["q"]
    assert found.r == 2 and far(found, total((first, 2.5))) < 1e-7


def test_a_rank_above_the_matrix_is_not_had():
    pairs = [(one(4, seed, 0.1 * seed + 0.2, shape=(5, 7)), 1.0) for seed in range(3)]
    found = combine(pairs).adapter.updates["q"]
    assert found.r == 5 and far(found, total(*pairs)) < 1e-6
    net = nn.ModuleDict({"q": nn.Linear(7, 5)})
    paramlora.attach_adapter(net, Adapter({"q": found}))  # which refuses ranks above it


@pytest.mark.parametrize("how", ["exact", "svd"])
def test_stacks_and_convolutions_and_tied_layers(how):
    stack = Update(torch.randn(3, 2, 5), torch.randn(3, 6, 2), 0.5, (3, 6, 5), "stack")
    other = Update(torch.randn(3, 2, 5), torch.randn(3, 6, 2), 2.0, (3, 6, 5), "stack")
    conv, tied = update(2, 5, shape=(8, 3, 3, 3)), update(2, 6)
    first = Adapter({"s": stack, "c": conv, "t": tied, "u": tied})
    second = Adapter({"s": other, "c": update(1, 7, shape=(8, 3, 3, 3)), "t": conv2(), "u": None})
    second = Adapter({**second.updates, "u": second.updates["t"]})
    rank = 4 if how == "svd" else None
    found = combine([(first, 0.3), (second, 0.9)], how, rank).adapter.updates
    for path in "sct":
        assert far(found[path], total((first, 0.3), (second, 0.9), path=path)) < 1e-6
        assert found[path].shape == first.updates[path].shape
    assert found["t"] is found["u"]


def conv2():
    return update(2, 9)


def ties(deltas, density):
    """By the paper's three steps, an entry at a time."""
    trimmed = []
    for delta in deltas:
        order = sorted(range(delta.numel()), key=lambda k: -abs(delta.flatten()[k].item()))
        kept = set(order[: int(density * delta.numel())])
        trimmed.append([v if k in kept else 0.0 for k, v in enumerate(delta.flatten().tolist())])
    out = []
    for entries in zip(*trimmed):
        sign = 1 if sum(entries) > 0 else -1
        agree = [v for v in entries if v * sign > 0]
        out.append(sum(agree) / max(1, len(agree)))
    return torch.tensor(out, dtype=torch.float64).view(deltas[0].shape)


def test_ties_by_hand_and_by_peft():
    adapters = [one(3, seed, 0.3 + seed) for seed in range(3)]
    weights = [1.0, 0.4, -0.8]
    deltas = [w * exact(a.updates["q"]) for a, w in zip(adapters, weights)]
    done = combine(list(zip(adapters, weights)), "ties", 9, density=0.4)
    assert far(done.adapter.updates["q"], ties(deltas, 0.4)) < 1e-5 and done.error < 1e-5
    utils = pytest.importorskip("peft.utils.merge_utils")
    theirs = utils.ties(deltas, torch.ones(3), 0.4)
    assert far(done.adapter.updates["q"], theirs) < 1e-5


def test_ties_at_a_lower_rank_states_its_error():
    adapters = [one(3, seed) for seed in range(2)]
    done = combine(adapters, "ties", 4, density=0.5)
    dense = ties([exact(a.updates["q"]) for a in adapters], 0.5)
    assert done.adapter.updates["q"].r == 4
    assert done.errors["q"] == pytest.approx(far(done.adapter.updates["q"], dense), rel=1e-3)


def test_dare_keeps_a_share_and_the_mean():
    big = [one(4, seed, shape=(300, 200)) for seed in range(2)]
    done = combine([big[0]], "dare", 200, density=0.25, seed=3)
    found, before = exact(done.adapter.updates["q"]), exact(big[0].updates["q"])
    kept = found.abs() > 2 * before.abs()
    assert torch.allclose(found[kept], 4 * before[kept], rtol=1e-3, atol=1e-4)
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.01)  # 6 deviations: 0.0106
    again = combine([big[0]], "dare", 200, density=0.25, seed=3).adapter.updates["q"]
    assert torch.equal(again.lora_A, done.adapter.updates["q"].lora_A)
    other = combine([big[0]], "dare", 200, density=0.25, seed=4).adapter.updates["q"]
    assert not torch.equal(other.lora_A, again.lora_A)
    all_of_it = combine([(big[0], 0.3), big[1]], "dare", 8, density=1.0).adapter.updates["q"]
    assert far(all_of_it, total((big[0], 0.3), (big[1], 1.0))) < 1e-5


def peft_model(alpha, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 12))
    both = peft.LoraConfig(
        r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, **options
    )
    model = peft.get_peft_model(net, both, "x")
    model.add_adapter("y", both)
    return model


def ours_of(model, name):
    layer = model.base_model.model[0]
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return Adapter({"0": Update(a.clone(), b.clone(), layer.scaling[name], (12, 9))})


@pytest.mark.parametrize(
    ("options", "kind", "off"),
    [
        ({}, "linear", 0.1),  # the cross terms B1·A2
        ({"use_rslora": True}, "cat", 0.5),  # the scale once more: √r
        ({"use_rslora": True}, "svd", 0.3),
    ],
)
def test_where_peft_is_off_the_sum_here_is_exact(options, kind, off):
    model = peft_model(3, **options)
    more = {"svd_rank": 4} if kind == "svd" else {}
    model.add_weighted_adapter(["x", "y"], [0.7, 0.4], "sum", combination_type=kind, **more)
    theirs = model.base_model.model[0].get_delta_weight("sum").detach().double()
    pairs = [(ours_of(model, "x"), 0.7), (ours_of(model, "y"), 0.4)]
    expected = total(*pairs, path="0")
    assert float((theirs - expected).norm() / expected.norm()) > off
    assert far(combine(pairs).adapter.updates["0"], expected) < 1e-7
    assert far(combine(pairs, "svd", 4).adapter.updates["0"], expected) < 1e-6


def test_linear_is_what_peft_means_by_it():
    model = peft_model(3)
    model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "sum", combination_type="linear")
    theirs = model.base_model.model[0].get_delta_weight("sum").detach().double()
    pairs = [(ours_of(model, "x"), 0.7), (ours_of(model, "y"), -0.4)]
    assert far(combine(pairs, "linear").adapter.updates["0"], theirs) < 1e-6


def test_a_layer_of_one_adapter_is_kept_and_named():
    first, second = one(2, 1), one(2, 2, path="v")
    with pytest.warns(ParamloraWarning, match="only some of the adapters update 2 layers: q, v"):
        found = combine([first, (second, 0.5)]).adapter
    assert far(found.updates["v"], total((second, 0.5), path="v")) < 1e-7
    with pytest.raises(AdapterError, match=r"q, v. Leave out strict \(--strict\)"):
        combine([first, second], strict=True)


def test_what_is_said_of_each_layer_goes_with_it():
    first = Adapter({"q": update(2, 1)}, "style", {"a": "1", "b": "2"}, base={"q": "0001"})
    second = Adapter({"q": update(2, 2)}, "style", {"a": "1", "b": "3"}, base={"q": "0001"})
    found = combine([first, second]).adapter
    assert (found.name, found.metadata, found.base) == ("style", {"a": "1"}, {"q": "0001"})
    with pytest.warns(ParamloraWarning, match='"style" was trained on another base .* q differ'):
        combine([first, replace(second, base={"q": "0002"})])


def test_whole_tensors_add_where_one_alone_has_its_own():
    first = Adapter({"q": update(2, 1)}, whole={"norm": torch.ones(3)})
    second = one(2, 2)
    assert combine([first, (second, 0.5)]).adapter.whole["norm"].sum() == 3
    for pairs in ([(first, 0.5), second], [first, first]):
        with pytest.raises(AdapterError, match="norm: trained whole .* merge them into"):
            combine(pairs)


NAN = Adapter({"q": replace(update(2, 1), lora_A=torch.full((2, 9), float("nan")))})
NAN_WHOLE = Adapter({}, whole={"norm": torch.tensor([float("nan")])})


@pytest.mark.parametrize(
    ("adapters", "how", "options", "told"),
    [
        ([], "exact", {}, "nothing to add. Give an adapter whose weight is not 0"),
        ([(one(2, 1), 0)], "exact", {}, "nothing to add"),
        ([(one(2, 1), float("nan"))], "exact", {}, "its weight nan is no finite number. Give one"),
        ([(one(2, 1), "0.7")], "exact", {}, "its weight '0.7' is no finite number"),
        ([[one(2, 1), "0.7"]], "exact", {}, "its weight '0.7' is no finite number"),
        ([(one(2, 1), 10**400)], "exact", {}, "its weight .* is no finite number"),
        ([one(2, 1)], "ties", {"rank": 1, "density": "0.5"}, "is a share.* got '0.5'"),
        ([one(2, 1)], "ties", {"rank": 1, "density": float("nan")}, "is a share.* got nan"),
        ([(one(2, 1), 0.7, 1)], "exact", {}, "and its weight, got 3 values"),
        (one(2, 1), "exact", {}, "expected a list of adapters, got one alone"),
        ("a.safetensors", "exact", {}, "expected a list of adapters, got one alone"),
        ([(one(2, 1, scale=1e10), 1e300)], "exact", {}, r'q: its scale 1e\+10 in "default" times'),
        ([NAN_WHOLE], "exact", {}, 'norm: in "default" it is not finite. Give the adapter from'),
        ([one(2, 1), one(2, 1, shape=(12, 8))], "exact", {}, r"q: .*\[12, 9\].* \[12, 8\]"),
        ([one(2, 1), one(2, 1, shape=(12, 3, 3))], "exact", {}, "Only adapters of one model add"),
        ([NAN], "exact", {}, "q: .*not finite. Give the adapter from before"),
        ([one(2, 1, scale=float("inf"))], "exact", {}, "not finite"),
        ([one(2, 1, up_kernel="same")], "exact", {}, 'of a kind .*"same".*does not add'),
        ([one(2, 1)], "sum", {}, 'how \\(--how\\) "sum" is not known. Known: exact, svd'),
        ([one(2, 1)], "svd", {}, '"svd" gives a sum of a lower rank: give a rank'),
        ([one(2, 1)], "svd", {"rank": 10}, "10 is more than any layer holds.* 9, of \"q\""),
        ([one(2, 1)], "svd", {"rank": 0}, "\\(--rank\\) must be .* at least 1, got 0"),
        ([one(2, 1)], "svd", {"rank": 2.0}, "rank .* must be a whole number .* got 2.0"),
        ([one(2, 1)], "exact", {"rank": 1}, 'has the rank that it has.* or use "svd"'),
        ([one(2, 1)], "ties", {"rank": 1}, "give a density"),
        ([one(2, 1)], "dare", {"rank": 1, "density": 0.0}, "\\(--density\\) is a share.* got 0.0"),
        ([one(2, 1)], "exact", {"density": 0.5}, "keeps all entries"),
        ([one(2, 1), one(3, 1)], "linear", {}, 'one rank, and these have 2, 3. Use "exact"'),
    ],
)  # fmt: skip
def test_what_does_not_add_is_told_in_a_sentence(adapters, how, options, told):
    with pytest.raises(AdapterError, match=told):
        combine(adapters, how, **options)


def test_other_kinds_are_named_and_never_left_out():
    net = nn.ModuleDict({"q": nn.Linear(9, 12), "v": nn.Linear(9, 12)})
    paramlora.attach(net, {"q": {"r": 2}, "v": {"r": 2, "kind": "dora"}})
    adapter = paramlora.adapter_of(net)
    for call in (lambda: combine([adapter, adapter]), lambda: resize(adapter, 1)):
        with pytest.raises(AdapterError, match=r"v: .* of a kind \(dora\) .* does not add"):
            call()


def differences(name, seed):
    """Whole differences of a matrix, a bias and a norm, beside a low-rank update."""
    torch.manual_seed(seed)
    shapes = {"q": (12, 9), "q.bias": (12,), "norm": (9,)}
    others = {
        path: KindUpdate("difference", {"lora_diff": torch.randn(shape)}, shape=shape)
        for path, shape in shapes.items()
    }
    conv = Update(torch.randn(2, 27), torch.randn(4, 2), 0.5, (4, 3, 3, 3))
    return Adapter({"conv": conv}, name, others=others)


@pytest.mark.parametrize("how, options", [("exact", {}), ("svd", {"rank": 2})])
def test_whole_differences_add(how, options):
    first, second = differences("one", 0), differences("two", 1)
    found = combine([(first, 0.7), (second, -2.0)], how, **options)
    assert {*found.adapter.others} == {"q", "q.bias", "norm"}
    for path, value in found.adapter.others.items():
        one, two = (a.others[path].held["lora_diff"].double() for a in (first, second))
        want, got = 0.7 * one - 2.0 * two, value.held["lora_diff"]
        assert got.dtype == torch.float32 and torch.equal(got, want.float())
        assert found.errors[path] == 0


def test_a_whole_difference_beyond_float32_is_held_wider():
    one = differences("one", 0)
    found = combine([(one, 1e39)]).adapter.others["q"].held["lora_diff"]
    assert torch.equal(found, 1e39 * one.others["q"].held["lora_diff"].double())


def test_a_scale_of_zero_loses_nothing():
    for done in (combine([one(2, 1, 0.0), one(2, 2, 0.0)], "svd", 1), resize(one(2, 1, 0.0), 1)):
        assert done.error == 0 and not exact(done.adapter.updates["q"]).any()


def test_a_product_adds_to_a_whole_difference():
    net = nn.ModuleDict({"q": nn.Linear(9, 12)})
    paramlora.attach(net, {"q": {"r": 2, "alpha": 3}}, "low")
    nn.init.normal_(net["q"].parametrizations.weight[0].lora_B)
    low, whole = paramlora.adapter_of(net, "low"), differences("one", 0)
    with pytest.warns(paramlora.ParamloraWarning, match="only some of the adapters update"):
        found = combine([(low, 0.5), whole]).adapter
    update = low.updates["q"]
    want = 0.5 * 1.5 * update.lora_B.double() @ update.lora_A.double()
    want += whole.others["q"].held["lora_diff"].double()
    assert torch.equal(found.others["q"].held["lora_diff"], want.float())
    assert torch.equal(found.updates["conv"].delta(), whole.updates["conv"].delta())


def test_differences_are_told_where_they_cannot_be_what_is_asked():
    one = differences("one", 0)
    for how, options in {
        "ties": {"rank": 1, "density": 0.5}, "dare": {"rank": 1, "density": 0.5}, "linear": {},
    }.items():  # fmt: skip
        with pytest.raises(AdapterError, match=f'whole differences, which "{how}" does not add'):
            combine([one, one], how, **options)
    with pytest.warns(paramlora.ParamloraWarning, match="3 whole differences without a rank, kept"):
        cut = resize(one, 1)
    assert cut.adapter.updates["conv"].r == 1 and cut.adapter.others == one.others
    other = differences("two", 1)
    other.others["q"].held["lora_diff"] = torch.zeros(3, 3)
    with pytest.raises(AdapterError, match=r'q: "one" .* of \[12, 9\] and "two" one of \[3, 3\]'):
        combine([one, other])
    other.others["q"].held["lora_diff"] = torch.full((12, 9), float("nan"))
    with pytest.raises(AdapterError, match='q: in "two" it is not finite'):
        combine([one, other])


@pytest.mark.parametrize("weight", [1e38, 1e39, 1e100, 1e-44, 1e-100])
@pytest.mark.parametrize("how", ["exact", "svd", "ties", "dare"])
def test_a_product_beyond_float32_is_held_wider(how, weight):
    options = {"ties": {"rank": 9, "density": 1.0}, "dare": {"rank": 9, "density": 1.0}}
    first = one(2, 1)
    found = combine([(first, weight)], how, **{"svd": {"rank": 2}, **options}.get(how, {}))
    want = weight * exact(first.updates["q"])
    # not the norm, whose squares are beyond a double too
    assert (exact(found.adapter.updates["q"]) - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_products_that_memory_does_not_hold_are_not_formed(how, monkeypatch):
    adapter = one(1, 1)
    module = sys.modules[combine.__module__]  # which the function hides
    monkeypatch.setattr(module, "installed", lambda: 12 * 9 * 8 * 4 - 1)
    text = f'q: "{how}" forms the products, which take 3,456 bytes, and this machine has 3,455 of'
    with pytest.raises(AdapterError, match=f'{text}.*Use "exact"'):
        combine([adapter, adapter], how, 1, density=0.5)
    combine([adapter, adapter], "svd", 1)
