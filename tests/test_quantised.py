"""Soft updates of quantised layers, against the dequantised weight plus the low-rank term."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora import AdapterError, TargetError
from paramlora.attach import lowranks

pytestmark = pytest.mark.filterwarnings("ignore")  # what torchao and bitsandbytes say on a CPU


def plain():
    torch.manual_seed(0)
    return nn.Linear(64, 128).to(torch.bfloat16)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0], model[0].weight.dequantize()


def torchao_nf4():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = plain()
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 1), requires_grad=False)
    return layer, layer.weight.get_original_weight()


def bitsandbytes_nf4():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict(plain().state_dict())
    layer = layer.to("cpu")
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer, whole.to(torch.bfloat16)


def bitsandbytes_int8():
    bnb = pytest.importorskip("bitsandbytes")
    source = plain()
    layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    layer = layer.to("cpu")
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    # its own arithmetic also rounds the input to 8 bits; the weight is within a step of the source
    return layer, source.weight.detach()


KINDS = {
    "torchao int8": (torchao_int8, 0.01),
    "torchao nf4": (torchao_nf4, 0.01),
    "bitsandbytes nf4": (bitsandbytes_nf4, 0.01),
    "bitsandbytes int8": (bitsandbytes_int8, 0.03),
}


def close(got, want, share):
    assert (got.double() - want.double()).norm() < share * want.double().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer(kind, tmp_path):
    build, share = KINDS[kind]
    layer, weight = build()
    bias, x = layer.bias.detach(), torch.randn(8, 64).to(torch.bfloat16)
    base = layer(x)
    model = nn.Sequential(layer)
    stored = type(layer.weight)
    with pytest.raises(TargetError, match='0.weight, which is quantised: .*Use "hard": 0'):
        paramlora.attach(model, {"0": {"r": 4}})
    paramlora.attach(model, {"0": {"r": 4, "scale": 2, "hard": 0}})
    assert torch.equal(model(x), base)
    ((_, _, low),) = lowranks(model)
    assert low.lora_A.shape == (4, 64) and low.lora_B.shape == (128, 4)
    assert low.lora_A.dtype == torch.float32
    nn.init.normal_(low.lora_B, std=0.2)

    x.requires_grad_()
    got = model(x)
    assert got.dtype == torch.bfloat16
    seed = torch.randn_like(got)
    got.backward(seed)
    wide = x.detach().double().requires_grad_()
    a, b = (t.detach().double().requires_grad_() for t in (low.lora_A, low.lora_B))
    want = F.linear(wide, weight.double() + 2 * b @ a, bias.double())
    want.backward(seed.double())
    close(got, want, share)
    close(got - base, want - F.linear(wide, weight.double(), bias.double()), 3 * share)
    for own, grad in ((x.grad, wide.grad), (low.lora_A.grad, a.grad), (low.lora_B.grad, b.grad)):
        close(own, grad, share)

    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = nn.Sequential(build()[0])
    paramlora.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), got)
    with pytest.raises(AdapterError, match=r"0\.weight is quantised and cannot.*dequantize=True"):
        paramlora.merge(model)
    assert torch.equal(model(x), got)
    paramlora.merge(model, dequantize=True)
    assert type(model[0]) is nn.Linear and type(model[0].weight) is nn.Parameter
    assert type(paramlora.detach(other)[0].weight) is stored
    close(model[0].weight, weight.double() + 2 * b @ a, share)
    close(pickle.loads(pickle.dumps(model))(x), want, share)


@pytest.mark.parametrize("kind", ("torchao int8", "bitsandbytes nf4"))
def test_starting_from_a_quantised_weight(kind):
    layer, weight = KINDS[kind][0]()
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 4, "hard": 0, "init": "pissa"}})
    ((_, _, low),) = lowranks(model)
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    close((low.lora_B @ low.lora_A).detach(), (u[:, :4] * s[:4]) @ v[:4], 0.01)


def test_a_quantised_weight_is_not_trained_whole():
    layer, _ = torchao_int8()
    with pytest.raises(TargetError, match='"0.weight" .*cannot train'):
        paramlora.attach(nn.Sequential(layer), {"0.weight": {"whole": 1}})


def test_a_refused_merge_leaves_the_quantised_layer_packed():
    packed, _ = torchao_nf4()
    model = nn.ModuleDict({"packed": packed, "bound": nn.Linear(6, 4)}).eval()
    nn.utils.parametrizations.spectral_norm(model["bound"])
    paramlora.attach(model, {"packed": {"r": 2, "hard": 0}, "bound": {"r": 2}})
    for _, _, low in lowranks(model):
        nn.init.normal_(low.lora_B)
    weight = packed.weight
    with pytest.raises(AdapterError, match="under SpectralNorm, which cannot hold"):
        paramlora.merge(model, dequantize=True)
    assert packed.weight is weight and len(list(lowranks(model))) == 2
