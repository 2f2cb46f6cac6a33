"""A sweep of adapters of different kinds on one tensor, against their definitions in float64, and
what `docs/kinds.md` says of each kind: checkpointing, and quantised weights."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora import files
from paramlora.model.attach import updates

ENTRIES = {
    "lora": {"r": 2, "scale": 0.9},
    "dora": {"r": 2, "scale": 0.7, "kind": "dora"},
    "loha": {"r": 2, "scale": 0.7, "kind": "loha"},
    "lokr": {"r": 1, "scale": 0.7, "kind": "lokr"},
    "rows": {"rows": [4, 1]},
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(3, 6).double()),
    "embedding": (lambda: nn.Embedding(6, 8), lambda: torch.arange(6)),
}


def dense(kind, weight, update, strength):
    """What one update makes of a weight, in every index."""
    held = {name: tensor.detach() for name, tensor in update.plain().items()}
    if kind == "rows":
        new = weight.clone()
        new[held["lora_ids"]] = held["lora_rows"]
        return weight + strength * (new - weight)
    if kind == "loha":
        change = held["hada_w1_a"] @ held["hada_w1_b"] * (held["hada_w2_a"] @ held["hada_w2_b"])
    elif kind == "lokr":
        change = torch.kron(held["lokr_w1"], held["lokr_w2_a"] @ held["lokr_w2_b"])
    else:
        change = held["lora_B"] @ held["lora_A"]
    total = weight + held["lora_scale"] * (change.T if update.layout == "transposed" else change)
    if kind == "dora":
        dim = 0 if update.layout == "transposed" else 1
        total = held["lora_magnitude"] * total / total.norm(dim=dim, keepdim=True)
    return weight + strength * (total - weight)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kinds", itertools.product(ENTRIES, ENTRIES), ids="-".join)
def test_two_adapters_of_any_kinds(kinds, name, tmp_path):
    torch.manual_seed(0)
    make, example = LAYERS[name]
    layer, x = make().double(), example()
    before, strengths = copy.deepcopy(layer), {"first": 0.4, "second": 1.0}
    for kind, adapter in zip(kinds, strengths):
        paramlora.attach(layer, {"weight": ENTRIES[kind]}, adapter)
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(layer):
            parameter.normal_()
    paramlora.set_adapters(layer, strengths)
    want = before.weight.detach()
    for kind, (_, _, update) in zip(kinds, updates(layer), strict=True):
        want = dense(kind, want, update, strengths[update.adapter])
    torch.testing.assert_close(layer.weight.detach(), want)
    torch.testing.assert_close(layer(x), torch.func.functional_call(before, {"weight": want}, (x,)))
    save_file(before.state_dict(), tmp_path / "base.safetensors")
    pairs = []
    for adapter, strength in strengths.items():
        pairs.append((tmp_path / f"{adapter}.safetensors", strength))
        paramlora.save_adapter(layer, pairs[-1][0], adapter)
    files.merge(tmp_path / "base.safetensors", pairs, tmp_path / "out.safetensors")
    merged = paramlora.merge(layer).weight.detach()
    torch.testing.assert_close(merged, want)
    assert torch.equal(merged, load_file(tmp_path / "out.safetensors")["weight"])


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("kind", ("loha", "lokr", "rows"))
def test_each_kind_is_checkpointed(kind, reentrant):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(3, 6, requires_grad=True)
    paramlora.attach(layer, {"weight": ENTRIES[kind]})
    own = list(paramlora.trainable_parameters(layer))
    with torch.no_grad():
        for parameter in own:
            parameter.normal_()
    want = torch.autograd.grad(layer(x).square().sum(), own)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(own, want, strict=True))


@pytest.mark.filterwarnings("ignore")  # what torchao says on a CPU
@pytest.mark.parametrize("kind", ("dora", "loha", "lokr", "rows"))
def test_a_weight_of_its_own_is_refused_on_a_quantised_one(kind):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32).to(torch.bfloat16))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    state = model.state_dict()
    way = '"r" and no "rows"' if kind == "rows" else 'and no "kind"'
    with pytest.raises(paramlora.TargetError, match=f'is quantised: .* "hard": 0.* {way}'):
        paramlora.attach(model, {"0": ENTRIES[kind]})
    assert model.state_dict().keys() == state.keys() and type(model[0]) is nn.Linear
