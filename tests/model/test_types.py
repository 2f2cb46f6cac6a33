"""Merging in every type: the sum in float64, rounded once, within units in the last place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import paramlora
from paramlora.model.attach import updates

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 4) * 0.1)


LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped conv": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: nn.Embedding(9, 5),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "rnn": lambda: nn.LSTM(4, 3),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "stack": Stack,
    "norm": lambda: nn.LayerNorm(7),
}
SOFT = ("linear", "conv", "grouped conv", "transposed conv")


def cases():
    for name in LAYERS:
        if name != "norm":
            yield name, {"r": 2, "scale": 0.7}
            yield name, {"r": 2, "trainable_scale": 1}
        if name in SOFT:
            yield name, {"r": 2, "scale": 0.7, "hard": 0}
        yield name, {"whole": 1}


def filled(model, size):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, update in updates(model):
            for name, p in update.named_parameters():
                noise = torch.randn(p.shape, dtype=torch.float64) * size
                p.copy_(noise if name in ("lora_A", "lora_B") else p + noise)


def sums(model, plain, strengths):
    """Each tensor's sum in float64, from the update's own numbers."""
    want = {name: p.detach().double() for name, p in plain.named_parameters()}
    for path, _, update in updates(model):
        name = path if path in want else f"{path}.weight" if path else "weight"
        base, strength = plain.get_parameter(name).detach().double(), strengths[update.adapter]
        if hasattr(update, "lora_whole"):
            want[name] = want[name] + strength * (update.lora_whole.detach().double() - base)
            continue
        a, b = (getattr(update, f"lora_{x}").detach().double() for x in "AB")
        delta = update.lora_scale.detach().double() * (b @ a)
        delta = delta.T if update.layout == "transposed" else delta
        want[name] = want[name] + strength * delta.reshape(base.shape)
    return want


def units(got, want, parts):
    """How far `got` is, in units in the last place of the largest number that was summed."""
    eps = torch.finfo(got.dtype).eps
    largest = torch.stack([want.abs(), parts.abs()]).amax(0).clamp(min=torch.finfo(got.dtype).tiny)
    return ((got.double() - want).abs() / (eps * largest)).max()


# one rounding is half a unit; float32 sums 64 and 32 bits wide themselves round a few times
MOST = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 0.51, torch.float16: 0.51}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name, entry", cases())
def test_a_merge_is_the_sum_rounded_once(name, entry, dtype):
    torch.manual_seed(0)
    plain = LAYERS[name]().to(dtype)
    model = copy.deepcopy(plain)
    config = {"re:.*" if "whole" in entry else "re:(.*weight.*|experts|matrix)": entry}
    paramlora.attach(model, config, "a")
    strengths = {"a": 0.5}
    if "whole" not in entry:
        paramlora.attach(model, config, "b")
        strengths["b"] = -2.0
    filled(model, 0.05)
    paramlora.set_adapters(model, strengths)
    want = sums(model, plain, strengths)
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    values = [(paramlora.adapter_of(model, adapter), s) for adapter, s in strengths.items()]
    from_states = paramlora.checkpoint.merge(state, *values)
    paramlora.merge(model)
    moved = 0
    for key, got in model.named_parameters():
        assert got.dtype == dtype
        assert (
            units(got.detach(), want[key], plain.get_parameter(key).detach().double())
            <= MOST[dtype]
        )
        moved += not torch.equal(got, plain.get_parameter(key))
        if "hard" not in entry:  # of soft ones a state dict is summed in the same order too
            assert torch.equal(from_states[key], got), key
    assert moved >= 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hard", (1, 0))
def test_an_update_of_half_a_unit_is_not_lost_before_the_rounding(dtype, hard):
    """Ten adapters that each change a weight by a tenth of a unit change it by one together."""
    model = nn.Linear(4, 4, bias=False).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    eps = torch.finfo(dtype).eps
    for i in range(10):
        paramlora.attach(model, {"weight": {"r": 1, "hard": hard}}, f"a{i}")
    with torch.no_grad():
        for _, _, update in updates(model):
            update.lora_A.fill_(1.0)
            update.lora_B.fill_(eps / 10)
    paramlora.merge(model)
    if dtype.itemsize == 2:  # summed in float32, which holds tenths of their units
        assert torch.equal(model.weight, torch.full_like(model.weight, 1 + eps))
    else:
        assert ((model.weight - (1 + eps)).abs() <= eps).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tied", (True, False))
def test_ties_merge_and_untie_alike_in_every_type(dtype, tied):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.table.weight

    model = Tied().to(dtype)
    plain = copy.deepcopy(model)
    if tied:
        paramlora.attach(model, {"re:table|head": {"r": 2}})
    else:
        with pytest.warns(paramlora.ParamloraWarning, match="one tensor is held as"):
            paramlora.attach(model, {"head": {"r": 2}})
    filled(model, 0.1)
    ((_, _, update),) = updates(model)
    delta = (update.lora_B.detach() @ update.lora_A.detach()).double()
    want = plain.head.weight.detach().double() + (delta.T if tied else delta)
    paramlora.merge(model)
    assert (
        units(model.head.weight.detach(), want, plain.head.weight.detach().double()) <= MOST[dtype]
    )
    assert (model.table.weight is model.head.weight) is tied
    assert tied or torch.equal(model.table.weight, plain.table.weight)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("over", (True, False), ids=("rule first", "update first"))
def test_sums_with_rules_of_others_in_every_type(dtype, over):
    """Weight norm below an update takes the sum into its factors; above it stays as it is."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).to(dtype)
    model = nn.ModuleDict({"layer": parametrizations.weight_norm(layer) if over else layer})
    paramlora.attach(model, {"layer": {"r": 2}})
    filled(model, 0.05)
    if not over:
        nn.utils.parametrize.register_parametrization(model.layer, "weight", Half())
    want = model.layer.weight.detach().double()
    paramlora.merge(model)
    near = 8 * torch.finfo(dtype).eps * want.abs().clamp(min=0.05)
    assert ((model.layer.weight.detach().double() - want).abs() <= near).all()


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, value):
        return value * 2


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_a_quantised_weight_made_dense_takes_the_sum_in_every_type(dtype):
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    dense = model[0].weight.dequantize().double()
    paramlora.attach(model, {"0": {"r": 2, "hard": 0}})
    filled(model, 0.05)
    ((_, _, update),) = updates(model)
    want = dense + (update.lora_B.detach() @ update.lora_A.detach()).double()
    paramlora.merge(model, dequantize=True)
    got = model[0].weight.detach()
    assert units(got, want, dense) <= MOST[got.dtype] and not torch.equal(got.double(), dense)
