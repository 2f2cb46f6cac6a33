"""What others do to an adapted layer: it works, or one sentence says what to do instead."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import fuse_modules, quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

import paramlora
from paramlora.model.attach import updates


def layer(kind=nn.Linear, *args, tensor="weight"):
    torch.manual_seed(0)
    model = kind(*(args or (4, 4))).double()
    paramlora.attach(model, {tensor: {"r": 2}}, "style")
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    return model


def picture(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, type(model), list(model._parameters), list(model._buffers), set(model.__dict__)


def check_same(before, model):
    after = picture(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())


def fresh():
    return nn.Parameter(torch.zeros(4, 4).double())


REFUSED = {
    "a parameter": (lambda m, n, v: setattr(m, n, nn.Parameter(v)), "cannot be assigned"),
    "a tensor": (setattr, "cannot be assigned"),
    "None": (lambda m, n, v: setattr(m, n, None), "cannot be assigned"),
    "delete": (lambda m, n, v: delattr(m, n), "cannot be deleted"),
    "register": (lambda m, n, v: m.register_parameter(n, nn.Parameter(v)), "registered again"),
    "register a buffer": (lambda m, n, v: m.register_buffer(n, v), "registered again"),
    "prune": (lambda m, n, v: prune.l1_unstructured(m, n, 0.5), "cannot be pruned"),
    "prune at random": (lambda m, n, v: prune.random_unstructured(m, n, 1), "cannot be pruned"),
    "prune a mask": (lambda m, n, v: prune.custom_from_mask(m, n, v), "cannot be pruned"),
}
KINDS = {
    nn.Linear: ("weight", (4, 4)),
    nn.Conv2d: ("weight", (4, 4, 1)),
    nn.Embedding: ("weight", (4, 4)),
    nn.LSTM: ("weight_ih_l0", (4, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_replacing_the_tensor_is_one_sentence(kind, name):
    (what, told), (tensor, args) = REFUSED[name], KINDS[kind]
    model = layer(kind, *args, tensor=tensor)
    before = picture(model)
    with pytest.raises(paramlora.AdapterError) as caught:
        what(model, tensor, torch.ones_like(getattr(model, tensor).detach()))
    text = str(caught.value)
    assert told in text and f"{tensor} of {kind.__name__} " in text and 'adapter "style"' in text
    assert "Merge or detach first" in text and "\n" not in text
    check_same(before, model)


def test_the_way_out_of_that_sentence():
    model = layer()
    ((_, _, low),) = updates(model)
    with torch.no_grad():
        model.parametrizations.weight.original.copy_(torch.eye(4))
    want = torch.eye(4).double() + low.lora_B @ low.lora_A
    torch.testing.assert_close(model.weight, want, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    model.weight = fresh()
    prune.l1_unstructured(model, "weight", 0.5)
    assert "weight_orig" in model._parameters


def test_other_attributes_are_set_as_ever():
    model = layer()
    model.bias = nn.Parameter(torch.ones(4).double())
    model.note, model.inner = 3, nn.Linear(1, 1)
    model.register_parameter("extra", fresh())
    model.register_buffer("kept", torch.ones(1))
    with pytest.raises(TypeError, match="cannot assign"):
        model.register_parameter("other", torch.ones(1))
    del model.note, model.inner, model.extra, model.kept
    prune.l1_unstructured(model, "bias", 0.5)
    assert "bias_orig" in model._parameters
    model.qconfig = None


def test_a_buffer_that_is_in_no_state_dict_is_assigned_as_ever():
    model = nn.Linear(3, 4)
    model.register_buffer("seen", torch.zeros(2), persistent=False)
    paramlora.attach(model, {"weight": {"r": 2}})
    model.seen = torch.ones(2)
    model.seen += 1
    assert torch.equal(model._buffers["seen"], torch.full((2,), 2.0))
    assert "seen" not in model.state_dict()


def test_a_tensor_under_somebodys_parametrization_alone_is_assigned_as_ever():
    model = layer()
    parametrize.register_parametrization(model, "bias", Twice())
    model.bias = torch.full((4,), 6.0).double()
    assert torch.equal(model.parametrizations.bias.original, torch.full((4,), 3.0).double())


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def test_weight_norm_after_attach_is_one_sentence():
    model = layer()
    before = picture(model)
    with pytest.raises(paramlora.AdapterError, match="WeightNorm computes a tensor from 2 others"):
        parametrizations.weight_norm(model)
    check_same(before, model)
    parametrizations.spectral_norm(model)
    model(torch.randn(2, 4).double())


def test_orthogonal_after_attach_is_one_sentence_or_works():
    model = layer()
    before = picture(model)
    with pytest.raises(paramlora.AdapterError, match="Orthogonal starts from the weight.* first"):
        parametrizations.orthogonal(model)
    check_same(before, model)
    parametrizations.orthogonal(model, use_trivialization=False)
    weight = model.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(4).double())
    first = parametrizations.orthogonal(nn.Linear(4, 4).double())
    paramlora.attach(first, {"weight": {"r": 2}})
    first(torch.randn(2, 4).double())


def test_torchaos_quantising_is_one_sentence():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(layer().float())
    with pytest.raises(paramlora.AdapterError, match="weight of Linear cannot be assigned"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    torchao.quantize_(paramlora.merge(model), torchao.Int8WeightOnlyConfig())


def test_quantising_is_one_sentence_and_works_after_merging():
    model = nn.Sequential(layer().float(), nn.ReLU())
    with pytest.raises(paramlora.AdapterError, match="Linear has an adapter, and torch's quantis"):
        quantize_dynamic(model, {nn.Linear})
    want = model(torch.eye(4))
    quantised = quantize_dynamic(paramlora.merge(model), {nn.Linear})
    assert (quantised(torch.eye(4)) - want).abs().max() < 0.1


def test_fusing_is_one_sentence_and_works_after_merging():
    model = nn.Sequential(layer(nn.Conv2d, 3, 4, 3), nn.BatchNorm2d(4).double()).eval()
    model[1].running_var.fill_(2.0)
    x = torch.randn(2, 3, 5, 5).double()
    want = model(x)
    with pytest.raises(paramlora.AdapterError, match="weight of Conv2d cannot be assigned"):
        fuse_modules(model, [["0", "1"]])
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(fuse_modules(paramlora.merge(model), [["0", "1"]])(x), want)


def test_a_forward_set_on_the_class_is_obeyed_and_taken_back():
    class Mine(nn.Linear):
        pass

    model, other = layer(Mine), layer(Mine)
    x = torch.randn(2, 4).double()
    want = model(x)
    type(model).forward = lambda self, x: F.linear(x, 2 * self.weight, self.bias) * 0 + 7
    assert torch.equal(model(x), torch.full((2, 4), 7.0).double())
    assert torch.equal(other(x), model(x))  # of the same class
    del type(model).forward
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    type(model).mark = 1
    assert other.mark == 1
    with pytest.raises(paramlora.AdapterError, match="ParametrizedMine.weight is what shows the"):
        type(model).weight = 3
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is Mine and other.weight.shape == (4, 4)


@pytest.mark.parametrize("kind", (nn.Linear, nn.Embedding, nn.LSTM))
def test_a_shallow_copy_shares_the_tensors(kind):
    model = layer(kind, tensor="weight_ih_l0" if kind is nn.LSTM else "weight")
    other = copy.copy(model)
    x = torch.arange(3) if kind is nn.Embedding else torch.randn(3, 4).double()
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    assert type(other) is type(model) and other is not model
    assert torch.equal(first(other(x)), first(model(x)))
    assert all(a is b for a, b in zip(other.parameters(), model.parameters()))


def test_a_layer_made_without_values_is_adapted():
    model = torch.nn.utils.skip_init(nn.Linear, 4, 4)
    nn.init.ones_(model.weight)
    paramlora.attach(model, {"weight": {"r": 2}})
    assert torch.equal(model.weight, torch.ones(4, 4))


@pytest.mark.parametrize("config", ({"weight": {"r": 2}}, {"weight": {"r": 2, "hard": 0}}))
def test_swapping_parameters_instead_of_their_data(config):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4))
    model = paramlora.attach(copy.deepcopy(plain), {"0": config["weight"]})
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
        model.load_state_dict(model.state_dict())
        x = torch.randn(2, 4).double()
        torch.testing.assert_close(model(x), plain.double()(x))
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Loaded(nn.Module):
    """Layers of each sort whose updates start from the base, one of them tied."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv, self.emb = nn.Linear(6, 5), nn.Conv2d(2, 3, 3), nn.Embedding(7, 6)
        self.bn, self.head = nn.BatchNorm1d(5), nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        nn.init.normal_(self.bn.running_mean), nn.init.uniform_(self.bn.weight, 1, 2)

    def forward(self, ids):
        h = self.emb(ids)
        image = h.reshape(-1, 2, 3, 1).expand(-1, 2, 3, 3)
        return self.normed(self.bn(self.lin(h))), self.conv(image), self.head(h)


STARTS = {
    "dora": {"r": 1, "kind": "dora"},
    "pissa": {"r": 1, "kind": "dora", "init": "pissa"},
    "rows": {"rows": [0, 2]},
    "whole": {"whole": True},
    "lora": {"r": 1},
    "loha": {"r": 1, "kind": "loha"},
    "lokr": {"r": 1, "kind": "lokr"},
    "difference": {"kind": "difference"},
}
CHAINS = [
    *([kind] for kind in STARTS), ["lora", "dora"], ["dora", "dora"], ["rows", "dora"],
    ["whole", "whole"],
]  # fmt: skip
PLACES = ("lin", "conv", "emb", "re:emb|head", "bn", "normed")


def two_bases(dtype):
    torch.manual_seed(0)
    return Loaded().eval().to(dtype), Loaded().eval().to(dtype), torch.arange(7)


def chained(base, chain, place):
    model = copy.deepcopy(base)
    for number, kind in enumerate(chain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties and running statistics
            paramlora.attach(model, {place: STARTS[kind]}, f"a{number}")
    return model


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_update_that_changes_nothing_changes_nothing_of_a_base_loaded_later(chain, dtype):
    base, other, ids = two_bases(dtype)
    wanted = other(ids)
    for place, assign in itertools.product(PLACES, (False, True)):
        # vectors are trained whole alone, and under weight norm by one adapter alone
        if place == "bn" and chain[0] != "whole" or place == "normed" and chain[1:] == ["whole"]:
            continue
        model = chained(base, chain, place)
        model.load_state_dict(other.state_dict(), assign=assign)
        near = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        for mine in (model, paramlora.merge(copy.deepcopy(model))):
            for one, want in zip(mine.eval()(ids), wanted):
                torch.testing.assert_close(one, want, **near, msg=place)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("strength", (1.0, 0.0))
def test_an_update_that_was_trained_keeps_its_values_then(kind, strength):
    base, other, _ = two_bases(torch.float32)
    for place in PLACES[:3]:
        model = chained(base, [kind], place)
        with torch.no_grad():
            for parameter in paramlora.trainable_parameters(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        paramlora.set_adapters(model, {"a0": strength})
        held = {k: v.clone() for k, v in paramlora.adapter_state_dict(model, "a0").items()}
        model.load_state_dict(other.state_dict())
        for key, value in paramlora.adapter_state_dict(model, "a0").items():
            assert torch.equal(value, held[key]), (place, key)
