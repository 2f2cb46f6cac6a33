"""A sweep of sums in every type: those in float64, rounded once, within units in the last place."""

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


NARROW = ("bfloat16", "float16")
THIRD = 2459 / 8192  # 12 bits, which types of 16 do not hold, and the square of which float32 does
READ = {  # layers that read their weight, or rows of it, with an entry
    "recurrent": (lambda: nn.LSTM(6, 5), "weight_ih_l0", {"r": 2, "scale": THIRD}),
    "dora": (lambda: nn.ConvTranspose1d(6, 5, 3), "weight", {"r": 2, "kind": "dora"}),
    "loha": (lambda: nn.Linear(6, 5), "weight", {"r": 2, "kind": "loha", "scale": THIRD}),
    "lokr": (lambda: nn.Bilinear(6, 4, 5), "weight", {"r": 1, "kind": "lokr"}),
    "whole": (lambda: nn.Linear(6, 5), "weight", {"whole": 1}),
    "rows": (lambda: nn.Embedding(6, 5), "weight", {"rows": [1, 4]}),
}


def told(update, base, scale):
    """What an update makes of a base, in float64, from its tensors."""
    part = {name: tensor.detach().double() for name, tensor in update.plain().items()}
    return made_of(part, base, scale, update.layout)


def made_of(part, base, scale, layout):
    """The same of an update's tensors by name."""
    if "lora_whole" in part:
        return part["lora_whole"]
    if "lora_rows" in part:
        return base.index_copy(0, part["lora_ids"].long(), part["lora_rows"])
    if "lora_A" in part:
        change = part["lora_B"] @ part["lora_A"]
    elif "hada_w1_a" in part:
        left, right = (part[f"hada_w{i}_a"] @ part[f"hada_w{i}_b"] for i in (1, 2))
        change = left * right
    else:
        second = part.get("lokr_w2")
        second = part["lokr_w2_a"] @ part["lokr_w2_b"] if second is None else second.flatten(1)
        change = torch.kron(part["lokr_w1"], second)
    change = scale * (change.T if layout == "transposed" else change)
    total = base + change.reshape(base.shape)
    if "lora_magnitude" in part:
        # a constant, which has no gradient (arXiv:2402.09353, section 4.3)
        dims = [i for i, size in enumerate(part["lora_magnitude"].shape) if size == 1]
        norm = total.detach().square().sum(dims, keepdim=True).sqrt()
        total = part["lora_magnitude"] * total / norm
    return total


@pytest.mark.parametrize("strength", (1.0, THIRD))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("kind", READ)
def test_narrow_tensors_of_an_update_round_nothing_else(kind, narrow, dtype, strength):
    """What is read is what is merged, live and of states: only the update's own tensors are
    narrow, neither its sum with the base, nor its strength and its factor."""
    torch.manual_seed(0)
    make, name, entry = READ[kind]
    layer = make().to(dtype)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    paramlora.attach(layer, {name: {**entry, "adapter_dtype": narrow}})
    ((_, _, update),) = updates(layer)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    paramlora.set_adapters(layer, {"default": strength})
    read, value = getattr(layer, name).detach(), paramlora.adapter_of(layer)
    merged = paramlora.checkpoint.merge(state, (value, strength))[name]
    base = state[name].double()
    want = base + strength * (told(update, base, entry.get("scale", 1.0)) - base)
    paramlora.merge(layer)
    for got in (read, merged, getattr(layer, name).detach()):
        assert units(got, want, base) <= 8


@pytest.mark.parametrize("strength", (-1.0, 2.0))
@pytest.mark.parametrize("adapters", (1, 3))
def test_a_tensor_trained_whole_beyond_its_base_overflows_no_merge(strength, adapters):
    """Beyond the whole way there the base itself grows: 2·40000 is none of float16."""
    layer = nn.Linear(2, 2).half()
    nn.init.constant_(layer.weight, 40000.0)
    for i in range(adapters):
        paramlora.attach(layer, {"weight": {"whole": 1}}, f"a{i}")
    with torch.no_grad():
        for _, _, update in updates(layer):
            update.lora_whole.fill_(0.0 if strength < 0 else 50000.0)
    if adapters == 1:
        paramlora.set_adapters(layer, {"a0": strength})
    elif strength < 0:  # three of the whole way: W + 3·(0 - W)
        paramlora.set_adapters(layer, dict.fromkeys(("a0", "a1", "a2"), 1.0))
    if adapters == 1 and strength == 2.0:  # 40000 + 2·10000
        paramlora.merge(layer)
        assert (layer.weight == 60000).all()
        return
    with pytest.raises(paramlora.AdapterError, match="the sum is beyond 65504"):
        paramlora.merge(layer)


@pytest.mark.parametrize("kind", ("lora", "soft", "dora", "loha", "lokr"))
@pytest.mark.parametrize("scale", (1e5, 1e-8, 0.3))
def test_a_factor_keeps_its_digits_in_narrow_updates(kind, scale, tmp_path):
    entry = {"r": 1, "scale": scale, "adapter_dtype": "float16"}
    entry |= {"hard": 0} if kind == "soft" else {} if kind == "lora" else {"kind": kind}
    for cast in (False, True):
        model = nn.Sequential(nn.Linear(6, 5))
        plain = copy.deepcopy(model)
        config = {key: value for key, value in entry.items() if key != "adapter_dtype" or not cast}
        paramlora.attach(model, {"0": config})
        ((_, _, update),) = updates(model.half() if cast else model)
        assert update.lora_scale == torch.tensor(scale)
        x = torch.randn(2, 6).to(model[0].bias.dtype)
        assert model(x).isfinite().all()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    ((_, _, update),) = updates(paramlora.load_adapter(plain, tmp_path / "a.safetensors"))
    assert update.lora_scale == torch.tensor(scale)
