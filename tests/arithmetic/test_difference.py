"""From one checkpoint to another, against what was merged and against dense singular values."""

import itertools
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora.arithmetic import between
from paramlora.arithmetic.difference import Side
from paramlora.errors import AdapterError, FileError, ParamloraWarning
from paramlora.formats import base_of
from paramlora.update.value import Adapter, Update
from tests.arithmetic.layers import Tied, model

CONFIG = {
    "fc": {"r": 4, "scale": 0.5},
    **{name: {"r": 3} for name in ("conv", "one", "emb", "experts.w1")},
}


def trained():
    """A state dict, its merged one, and the products that lie between them."""
    net = model()
    base = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    paramlora.attach(net, CONFIG)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    adapter = paramlora.adapter_of(net)
    return base, paramlora.merge(net).state_dict(), adapter


def side(state, name):
    return Side(state, state.__getitem__, name)


def found(base, tuned, *args, **kwargs):
    return between(side(base, "base"), side(tuned, "tuned"), *args, **kwargs)


def dense(update):
    product = update.scale * (update.lora_B.double() @ update.lora_A.double())
    return (product.mT if update.layout == "transposed" else product).reshape(update.shape)


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 1 - 1e-9}])
def test_what_was_merged_comes_back(options):
    base, tuned, adapter = trained()
    done = found(base, tuned, known=base_of(model()), **options)
    assert done.adapter.updates.keys() == adapter.updates.keys()
    for path, update in adapter.updates.items():
        mine = done.adapter.updates[path]
        assert (dense(mine) - dense(update)).norm() <= 1e-5 * dense(update).norm(), path
        assert (mine.layout, mine.kind, mine.shape) == (update.layout, update.kind, update.shape)
    assert done.error < 1e-5
    net = model()
    paramlora.merge(paramlora.attach_adapter(net, done.adapter))  # and knows its base
    assert all((net.state_dict()[key] - tuned[key]).abs().max() < 1e-5 for key in tuned)


def test_without_a_model_the_names_tell_stacks_from_convolutions():
    base, tuned, adapter = trained()
    done = found(base, tuned, 4)
    layouts = {path: update.layout for path, update in done.adapter.updates.items()}
    assert layouts.pop("experts.w1") == "stack" and set(layouts.values()) == {"matrix"}
    for path, update in adapter.updates.items():
        assert (dense(done.adapter.updates[path]) - dense(update)).norm() <= 1e-5 * dense(
            update
        ).norm()
    merged = paramlora.checkpoint.merge(base, done.adapter)
    assert all((merged[key] - tuned[key]).abs().max() < 1e-5 for key in tuned)
    net = paramlora.attach_adapter(model(), done.adapter)
    assert (net["emb"].weight - tuned["emb.weight"]).abs().max() < 1e-5  # the other way round


def test_the_error_is_of_the_difference_itself():
    torch.manual_seed(1)
    base = {"w": torch.randn(60, 200), "v": torch.randn(200, 160)}
    change = {key: torch.randn_like(tensor) for key, tensor in base.items()}
    tuned = {key: tensor + change[key] for key, tensor in base.items()}
    done = found(base, tuned, 10)
    for key in base:
        exact = (tuned[key] - base[key]).double()
        rest = (exact - dense(done.adapter.updates[key])).norm() / exact.norm()
        assert done.errors[key] == pytest.approx(float(rest), rel=1e-4)
        best = torch.linalg.svdvals(exact)[10:].norm() / exact.norm()
        assert float(best) <= rest < 1.01 * best


def test_a_share_of_energy_is_reached():
    torch.manual_seed(1)
    falling = torch.diag(0.9 ** torch.arange(400.0))
    basis = torch.linalg.qr(torch.randn(400, 400))[0]
    base = {"w": torch.randn(400, 400)}
    tuned = {"w": base["w"] + basis @ falling @ basis.T}
    for energy in (0.5, 0.99, 1 - 1e-6):
        done = found(base, tuned, energy=energy)
        r = done.adapter.updates["w"].r
        shares = (falling.diag().double() ** 2).cumsum(0) / falling.square().sum()
        assert r == 1 + int((shares < energy).sum())
        # the values' squares are those of float32
        assert done.errors["w"] ** 2 <= 1 - energy + 4 * 2.0**-24


def test_sixteen_bits_and_eight():
    base, tuned, _ = trained()
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        narrow = [
            {key: t.to(dtype) for key, t in state.items() if t.dim() > 1} for state in (base, tuned)
        ]
        done = found(*narrow, 12)
        exact = narrow[1]["fc.weight"].double() - narrow[0]["fc.weight"].double()
        rest = (exact - dense(done.adapter.updates["fc"])).norm() / exact.norm()
        assert done.errors["fc"] == pytest.approx(float(rest), rel=1e-3)


def test_vectors_are_named_or_kept():
    base, tuned, _ = trained()
    tuned = {**tuned, "norm.weight": tuned["norm.weight"] + 1, "fc.bias": tuned["fc.bias"] + 1}
    with pytest.warns(ParamloraWarning, match="2 tensors .* left out: fc.bias, norm. Keep"):
        assert not found(base, tuned, 4).adapter.whole
    done = found(base, tuned, 4, whole=True)
    assert torch.equal(done.adapter.whole["norm"], tuned["norm.weight"])
    merged = paramlora.checkpoint.merge(base, done.adapter)
    assert torch.equal(merged["fc.bias"], tuned["fc.bias"])


def test_what_is_excluded_is_left_out():
    base, tuned, _ = trained()
    tuned = {**tuned, "emb.weight": torch.zeros(60, 8), "new": torch.zeros(3)}
    done = found(base, tuned, 4, exclude=["emb", "new", "experts.*"])
    assert done.adapter.updates.keys() == {"fc", "conv", "one"}


def changed(**tensors):
    return {**{key: tensor.clone() for key, tensor in model().state_dict().items()}, **tensors}


def test_two_tensors_are_in_memory_at_a_time():
    """Of checkpoints of any size."""
    torch.manual_seed(0)
    base = {f"{n}.weight": torch.randn(20, 16) for n in range(5)}
    held, most = [], 0

    def read(state, shift):
        def one(key):
            nonlocal most
            memory = (state[key] + shift).numpy().copy()  # which its tensor keeps alive
            held.append(weakref.ref(memory))
            most = max(most, sum(one() is not None for one in held))
            return torch.from_numpy(memory)

        return one

    sides = (Side(base, read(base, shift), name) for shift, name in ((0, "base"), (1, "tuned")))
    assert len(between(*sides, 1).adapter.updates) == 5
    assert most == 2


def stored(net, how, path):
    """A model's checkpoint as others have it: with both names of a tensor, or with one."""
    state = net.state_dict()
    without = {"wte": "wte.weight", "lm_head": "lm_head.weight"}.get(how)
    if how == "model":
        return net
    if how == "torch.save":
        torch.save(state, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    if how == "safetensors":  # each tensor by itself
        save_file({k: t.clone() for k, t in state.items()}, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    return {key: tensor.clone() for key, tensor in state.items() if key != without}


WAYS = ("model", "torch.save", "safetensors", "wte", "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("one", "other"), [*itertools.product(WAYS, WAYS)])
def test_tied_tensors_have_one_update(one, other, told, dtype, tmp_path):
    if {one, other} <= {"wte", "lm_head"}:
        return  # nothing tells that there are two
    net, trained = Tied().to(dtype), Tied().to(dtype)
    config = {"re:wte|lm_head": {"r": 3}, "fc": {"r": 2}, "re:norm|last": {"whole": True}}
    paramlora.attach(trained, config)
    with torch.no_grad():
        for p in paramlora.trainable_parameters(trained):
            p.normal_()
    paramlora.merge(trained)
    base, tuned = stored(net, one, tmp_path / "base"), stored(trained, other, tmp_path / "tuned")
    known = base_of(Tied()) if told else None
    done = paramlora.difference(base, tuned, energy=1 - 1e-9, whole=True, known=known)
    updates = done.adapter.updates
    assert updates.keys() == {"wte", "lm_head", "fc"} and updates["wte"] is updates["lm_head"]
    assert done.adapter.whole["norm"] is done.adapter.whole["last"]
    fresh = paramlora.attach_adapter(Tied().to(dtype), done.adapter)
    assert fresh.wte.parametrizations.weight[0] is fresh.lm_head.parametrizations.weight[0]
    paramlora.merge(fresh)
    assert fresh.wte.weight is fresh.lm_head.weight
    want = trained.state_dict()
    for key, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, want[key], rtol=1e-5, atol=1e-5)


def test_one_name_excludes_what_it_names():
    base, tuned, _ = trained()
    assert "conv" not in found(base, tuned, 4, exclude="conv").adapter.updates


def test_the_rank_of_a_stack_is_that_of_its_matrices():
    """Two matrices of rank 6 hold 6, and twenty of them no more."""
    for count in (2, 20):
        base = {"w1": torch.zeros(count, 8, 6)}
        tuned = {"w1": torch.randn(count, 8, 6)}
        assert found(base, tuned, 6).error < 1e-6
        with pytest.raises(AdapterError, match="12 is more than any layer holds; the most is 6"):
            found(base, tuned, 12)


@pytest.mark.parametrize(
    ("tuned", "options", "error", "told"),
    [
        ({}, {"rank": 4}, AdapterError, "tuned: no tensor differs from the base's"),
        ({"fc.weight": torch.zeros(200, 300)}, {"rank": 201}, AdapterError,
         "rank \\(--rank\\) 201 is more than any layer holds; the most is 200"),
        ({"fc.weight": torch.zeros(200, 301)}, {"rank": 4}, FileError,
         r"fc.weight: \[200, 300\] in base, and \[200, 301\] in tuned. Leave it out by exclude"),
        ({"more": torch.zeros(2)}, {"rank": 4}, FileError, r"base: lacks more of tuned.*--exclude"),
        ({"fc.weight": torch.full((200, 300), torch.inf)}, {"rank": 4}, AdapterError,
         "fc.weight: holds numbers that are not finite in tuned. Exclude it"),
        ({"fc.bias": torch.full((200,), torch.nan)}, {"rank": 4, "whole": True}, AdapterError,
         "fc.bias: holds numbers that are not finite in tuned. Exclude it"),
        ({"fc.weight": torch.zeros(200, 300, device="meta")}, {"rank": 4}, FileError,
         "fc.weight: on the meta device in tuned, without numbers to subtract. Give a checkpoint"),
        ({"fc.weight": torch.zeros(200, 300).to_sparse()}, {"rank": 4}, FileError,
         "fc.weight: of the layout torch.sparse_coo in tuned, without numbers"),
        ({}, {}, AdapterError, "give a rank or an energy"),
        ({}, {"rank": 4, "exclude": ["fcc"]}, AdapterError, '"fcc" names no layer. Closest: "fc"'),
        ({"fc.bias": torch.zeros(200)}, {"rank": 4}, AdapterError,
         r"no tensor differs from the base's but vectors, which whole \(--whole\) keeps"),
    ],
)  # fmt: skip
def test_what_has_no_difference_is_told(tuned, options, error, told):
    with pytest.raises(error, match=told):
        found(changed(), changed(**tuned), **options)


def test_a_merged_adapter_of_full_rank_is_found_too():
    base = {"w": torch.zeros(6, 5)}
    adapter = Adapter({"w": Update(torch.randn(5, 5), torch.randn(6, 5), 1.0, (6, 5))})
    tuned = paramlora.checkpoint.merge(base, adapter)
    assert found(base, tuned, 5).error < 1e-6


def in_eight_bits(weight, name, shape, dtype=torch.float8_e4m3fn):
    """(the stored weight, its scale, and in float64 what the two stand for)."""
    scale = weight.abs().amax(1, keepdim=True) if shape[0] > 1 else weight.abs().max()
    scale = (scale / 200).reshape(shape)
    stored = (weight / (scale.reshape(-1, 1) if scale.numel() > 1 else scale)).to(dtype)
    wide = stored.double() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale).double()
    marked = {"scaled_fp8": torch.zeros(2).to(dtype)} if name == "scale_weight" else {}
    return {"w.weight": stored, f"w.{name}": scale, **marked}, wide


@pytest.mark.parametrize("name", ("scale_weight", "weight_scale"))
@pytest.mark.parametrize("shape", ([], [1], [1, 1], [20], [20, 1]), ids=str)
@pytest.mark.parametrize("which", ("both", "base", "tuned", "the scale alone"))
def test_weights_of_eight_bits_are_what_their_scales_make_of_them(name, shape, which):
    shape = shape or [1]
    first, second = torch.randn(20, 16), 3 * torch.randn(20, 16)
    plain = {"w.weight": first}, {"w.weight": second}
    narrow = [in_eight_bits(one, name, shape) for one in (first, second)]
    states = [state for state, _ in narrow]
    values = [value for _, value in narrow]
    if which == "the scale alone":  # the same bits stand for another weight
        states[1] = {**states[0], f"w.{name}": 2 * states[0][f"w.{name}"]}
        values[1] = 2 * values[0]
    elif which != "both":
        other = 0 if which == "tuned" else 1
        states[other], values[other] = plain[other], plain[other]["w.weight"].double()
    done = found(*states, 16, whole=True)
    change = values[1] - values[0]
    assert done.adapter.updates.keys() == {"w"} and not done.adapter.whole
    assert (dense(done.adapter.updates["w"]) - change).norm() <= 1e-5 * change.norm()


def test_scales_of_blocks_are_told():
    state = {"w.weight": torch.zeros(4, 6).to(torch.float8_e4m3fn)}
    state["w.weight_scale_inv"] = torch.ones(2, 3)
    other = {**state, "w.weight": torch.ones(4, 6).to(torch.float8_e4m3fn)}
    with pytest.raises(AdapterError, match="no scales of the rows of w.weight.* Give the checkp"):
        found(state, other, 2)
    assert found({**state, "v": torch.zeros(3, 3)}, {**other, "v": torch.ones(3, 3)}, 2,
                 exclude=["w"]).adapter.updates.keys() == {"v"}  # fmt: skip
