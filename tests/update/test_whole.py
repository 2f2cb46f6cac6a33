"""Several tasks on one base, each with a head of its own that is trained whole."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import paramlora
from paramlora import AdapterError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TASK = {"body": {"r": 2, "scale": 0.5}, "head": {"whole": True}}
HEAD = ("head.weight", "head.bias")
X = torch.linspace(-1, 1, 24).reshape(6, 4).double()
WANTED = {"a": X[:, :2] ** 2, "b": X[:, 1:3].cos()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def net():
    torch.manual_seed(0)
    return Net().double()


def attached(names="ab"):
    model = net()
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        paramlora.attach(model, TASK, name)
    return model


def train(model, name, steps=5):
    paramlora.set_adapters(model, {name: 1.0})
    optimizer = torch.optim.Adam(paramlora.trainable_parameters(model, name), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - WANTED[name]).square().mean().backward()
        optimizer.step()
    return model


def trained():
    return train(train(attached(), "a"), "b")


def reference(name, model, steps=5):
    """The task's tensors, trained by themselves on a plain model: what adapting should give.

    Args:
        model: attached and untrained, which tells where the factors start.
    """
    plain = net()
    state = paramlora.adapter_state_dict(model, name)
    low = [state[f"body.lora_{side}"].clone().requires_grad_() for side in "AB"]
    head = [plain.get_parameter(one).detach().clone().requires_grad_() for one in HEAD]

    def tensors():
        body = plain.body.weight.detach() + 0.5 * low[1] @ low[0]
        return {"body.weight": body, **dict(zip(HEAD, head))}

    optimizer = torch.optim.Adam([*low, *head], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        y = functional_call(plain, tensors(), (X,))
        (y - WANTED[name]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return {**plain.state_dict(), **{key: t.detach() for key, t in tensors().items()}}


def out(state):
    with torch.no_grad():
        return functional_call(net(), state, (X,))


def test_each_task_trains_as_if_it_were_alone():
    fresh = attached()
    want = {name: reference(name, fresh) for name in "ab"}
    model = trained()
    for name in "aba":
        paramlora.set_adapters(model, {name: 1.0})
        torch.testing.assert_close(model(X), out(want[name]), **EXACT)
        for key in HEAD:
            got = getattr(model.head, key[5:])
            torch.testing.assert_close(got, want[name][key], **EXACT)
    with paramlora.disable_adapters(model):
        assert torch.equal(model(X), net()(X))
    base = paramlora.detach(model).state_dict()
    assert all(torch.equal(value, base[key]) for key, value in net().state_dict().items())


def test_attaching_a_second_head_changes_nothing():
    model = train(attached("a"), "a")
    before = model(X)
    paramlora.attach(model, TASK, "b")
    torch.testing.assert_close(model(X), before, **EXACT)
    assert torch.equal(model.head.parametrizations.weight[1].lora_whole, net().head.weight)


def test_each_task_has_its_file(tmp_path):
    model = trained()
    for name in "ab":
        paramlora.save_adapter(model, tmp_path / f"{name}.safetensors", name)
    for order in ("ab", "ba"):
        again = net()
        for name in order:
            paramlora.load_adapter(again, tmp_path / f"{name}.safetensors")
        for name in "ab":
            for one in (model, again):
                paramlora.set_adapters(one, {name: 1.0})
            assert torch.equal(again(X), model(X))
            assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("name", "ab")
def test_each_task_merges_to_a_plain_model(name, tmp_path):
    want = reference(name, attached())
    model = trained()
    paramlora.set_adapters(model, {name: 1.0})
    head = model.head.weight.detach().clone()
    paramlora.save_adapter(model, tmp_path / "one.safetensors", name)
    torch.save(net().state_dict(), tmp_path / "base.pt")
    merged = paramlora.merge(model)
    assert type(merged.head) is nn.Linear and torch.equal(merged.head.weight, head)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, want[key], **EXACT)
    paramlora.files.merge(tmp_path / "base.pt", [tmp_path / "one.safetensors"], tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt")
    assert all(torch.equal(state[key], value) for key, value in merged.state_dict().items())


def test_one_task_is_merged_and_the_other_stays():
    model = trained()
    paramlora.set_adapters(model, {"a": 1.0})
    want = model(X).detach()
    paramlora.merge(model, "a")
    assert {row.adapter for row in paramlora.summary(model).rows} == {"b"}
    assert torch.equal(model.head.parametrizations.weight.original, model.head.weight)
    torch.testing.assert_close(model(X), want, **EXACT)
    alone = trained()
    paramlora.set_adapters(alone, {"b": 1.0})
    head = alone.head.weight.detach().clone()
    paramlora.set_adapters(model, {"b": 1.0})
    assert torch.equal(model.head.weight, head)  # its own, whatever the base is now


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("how", [(0.5, 0.5), (1.0, 1.0), (1.0, -0.25), (0.0, 0.75)])
def test_several_that_act_are_summed_and_merged_so(names, how):
    model, base = trained(), net().head.weight.detach()
    if names == "ba":
        model = train(train(attached("ba"), "a"), "b")
    own = {p.adapter: p.lora_whole.detach() for p in model.head.parametrizations.weight}
    paramlora.set_adapters(model, dict(zip("ab", how)))
    want = base + sum(s * (own[name] - base) for name, s in zip("ab", how))
    torch.testing.assert_close(model.head.weight, want, **EXACT)
    y = model(X).detach()
    model.zero_grad()
    model.head.weight.sum().backward()
    for update in model.head.parametrizations.weight:
        strength = dict(zip("ab", how))[update.adapter]
        told = torch.zeros(2, 5) if update.lora_whole.grad is None else update.lora_whole.grad
        torch.testing.assert_close(told, torch.full((2, 5), strength).double(), check_dtype=False)
    paramlora.merge(model)
    torch.testing.assert_close(model.head.weight.detach(), want, **EXACT)
    torch.testing.assert_close(model(X), y, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_every_type_one_that_acts_is_itself_and_the_base_stays(dtype):
    model = attached().to(dtype)
    plists = [model.head.parametrizations[name] for name in ("weight", "bias")]
    base = [plist.original.detach().clone() for plist in plists]
    with torch.no_grad():
        for plist, number in itertools.product(plists, (0, 1)):
            plist[number].lora_whole.add_(torch.randn_like(plist[number].lora_whole))
    for number, name in enumerate("ab"):
        paramlora.set_adapters(model, {name: 1.0})
        for plist, shown in zip(plists, (model.head.weight, model.head.bias)):
            assert torch.equal(shown, plist[number].lora_whole.to(dtype))
    assert all(torch.equal(plist.original, was) for plist, was in zip(plists, base))
    own = [plists[0][number].lora_whole.detach().double() for number in (0, 1)]
    paramlora.set_adapters(model, {"a": 0.5, "b": 2.0})
    want = base[0].double() + 0.5 * (own[0] - base[0].double()) + 2 * (own[1] - base[0].double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model.head.weight.double(), want, rtol=eps, atol=4 * eps)
    paramlora.merge(model)
    torch.testing.assert_close(model.head.weight.double(), want, rtol=eps, atol=4 * eps)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()


@pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_statistics_are_each_adapters_own(order):
    """Two adapters see other data, and each has the statistics of a plain model that saw it."""
    model, data = normed(), {"a": X, "b": 3 * X.flip(0) + 1}
    for name in "ab":
        paramlora.attach(model, {"1": {"whole": True}}, name)
    plain = {name: normed() for name in "ab"}
    for name in order * 2:
        paramlora.set_adapters(model, {name: 1.0})
        assert torch.equal(model(data[name]), plain[name](data[name]))
    model.eval()
    for name in order:
        paramlora.set_adapters(model, {name: 1.0})
        for key in ("running_mean", "running_var"):
            assert torch.equal(getattr(model[1], key), getattr(plain[name][1], key))
        assert torch.equal(model(X), plain[name].eval()(X))
    base = paramlora.detach(model).state_dict()
    assert all(torch.equal(value, base[key]) for key, value in normed().state_dict().items())


def test_each_row_of_a_batch_has_its_own_head():
    model, want = trained(), {}
    for name in "ab":
        paramlora.set_adapters(model, {name: 1.0})
        want[name] = model(X).detach()
    paramlora.set_adapters(model, {"a": 1.0, "b": 1.0})
    rows = ["a", "b", "b", "a", None, "b"]
    with paramlora.route(model, rows):
        got = model(X).detach()
    with paramlora.disable_adapters(model):
        want[None] = model(X).detach()
    for row, name in enumerate(rows):
        torch.testing.assert_close(got[row], want[name][row], **EXACT)


def test_another_kind_of_update_beside_a_head_is_refused_as_before():
    model = attached("a")
    before = [type(m) for m in model.modules()]
    told = (
        'head, which adapter "a" adapts already: a tensor trained whole has no update beside it but'
    )
    with pytest.raises(AdapterError, match=told):
        paramlora.attach(model, {"head": {"r": 1}}, "b")
    assert [type(m) for m in model.modules()] == before
    under = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    paramlora.attach(under, {"0.weight": {"whole": True}}, "a")
    with pytest.raises(
        AdapterError, match='"a" adapts already: under WeightNorm one adapter alone'
    ):
        paramlora.attach(under, {"0.weight": {"whole": True}}, "b")


def test_copies_and_torchs_own_removal_know_them():
    model = trained()
    paramlora.set_adapters(model, {"b": 1.0})
    twin, want = copy.deepcopy(model), model(X).detach()
    paramlora.set_adapters(model, {"a": 1.0})
    torch.testing.assert_close(twin(X), want, rtol=0, atol=0)
    for name in ("weight", "bias"):
        nn.utils.parametrize.remove_parametrizations(twin.head, name)
    torch.testing.assert_close(twin(X), want, rtol=0, atol=0)
    assert type(twin.head) is nn.Linear


def test_a_switch_compiles_nothing_again():
    model = trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in "ab":
        paramlora.set_adapters(model, {name: 1.0})
        torch.testing.assert_close(compiled(X), model(X), **EXACT)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in "ab":
            paramlora.set_adapters(model, {name: 1.0})
            torch.testing.assert_close(compiled(X), model(X), **EXACT)


def test_files_are_summed_as_the_live_model_is(tmp_path):
    model = trained()
    for name in "ab":
        paramlora.save_adapter(model, tmp_path / f"{name}.safetensors", name)
    paramlora.set_adapters(model, {"a": 1.0, "b": 1.0})
    attached_state = {key: value.clone() for key, value in model.state_dict().items()}
    want = paramlora.merge(model).state_dict()
    both = [paramlora.files.read_adapter(tmp_path / f"{name}.safetensors") for name in "ab"]
    for got in (
        paramlora.checkpoint.merge(net().state_dict(), *both),
        paramlora.checkpoint.merge(attached_state),
    ):
        assert got.keys() == want.keys()
        assert all(torch.equal(value, want[key]) for key, value in got.items())
    with pytest.raises(AdapterError, match="trained whole by one adapter, and changed by another"):
        low = paramlora.adapter_of(paramlora.attach(net(), {"head": {"r": 1}}))
        paramlora.checkpoint.merge(net().state_dict(), both[0], low)
