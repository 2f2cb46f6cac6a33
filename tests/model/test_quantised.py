"""Soft updates of quantised layers, against the dequantised weight plus the low-rank term."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora import AdapterError, TargetError
from paramlora.model.attach import updates
from paramlora.model.quantised import dense

pytestmark = pytest.mark.filterwarnings("ignore")  # what torchao and bitsandbytes say on a CPU


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def plain():
    torch.manual_seed(0)
    return nn.Linear(64, 128).to(torch.bfloat16)


def torchao(device, config, *options, **named):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain()).to(device)
    quantization.quantize_(model, getattr(quantization, config)(*options, **named))
    return model[0], model[0].weight.dequantize()


def torchao_int8(device="cpu"):
    return torchao(device, "Int8WeightOnlyConfig")


def torchao_int4(device="cpu"):
    granularity = pytest.importorskip("torchao.quantization").PerGroup(32)
    layer, weight = torchao(device, "IntxWeightOnlyConfig", torch.int4, granularity)
    assert len(weight[0, :32].unique()) <= 16  # four bits, whose tensor of int8 holds them
    return layer, weight


def torchao_nf4(device="cpu"):
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = plain().to(device)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 1), requires_grad=False)
    return layer, layer.weight.get_original_weight()


def bitsandbytes_nf4(device="cpu"):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict(plain().state_dict())
    layer = layer.to(device)
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer, whole.to(torch.bfloat16)


def bitsandbytes_int8(device="cpu"):
    bnb = pytest.importorskip("bitsandbytes")
    source = plain()
    layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    layer = layer.to(device)
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    # its own arithmetic also rounds the input to 8 bits; the weight is within a step of the source
    return layer, source.weight.detach().to(device)


KINDS = {
    "torchao int8": (torchao_int8, 0.01),
    "torchao int4": (torchao_int4, 0.01),
    "torchao nf4": (torchao_nf4, 0.01),
    "bitsandbytes nf4": (bitsandbytes_nf4, 0.01),
    "bitsandbytes int8": (bitsandbytes_int8, 0.03),
}


def close(got, want, share):
    assert (got.double() - want.double()).norm() < share * want.double().norm()


@pytest.mark.parametrize("kind", KINDS)
@DEVICES
def test_a_quantised_layer(kind, device, tmp_path):
    build, share = KINDS[kind]
    layer, weight = build(device)
    bias, x = layer.bias.detach(), torch.randn(8, 64, device=device).to(torch.bfloat16)
    base = layer(x)
    model = nn.Sequential(layer)
    stored = type(layer.weight)
    with pytest.raises(TargetError, match='0.weight, which is quantised: .*Use "hard": 0'):
        paramlora.attach(model, {"0": {"r": 4}})
    paramlora.attach(model, {"0": {"r": 4, "scale": 2, "hard": 0}})
    assert torch.equal(model(x), base)
    ((_, _, low),) = updates(model)
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
    other = nn.Sequential(build(device)[0])
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_layer_without_bias_becomes_dense_in_the_models_type(kind, dtype, monkeypatch):
    """As in a Llama, where nothing at an int8 layer of bitsandbytes tells its type."""
    if kind == "torchao nf4" and dtype != torch.bfloat16:
        pytest.skip("torchao's NF4 stands for bfloat16 alone")
    torch.manual_seed(0)
    norm, source = nn.RMSNorm(64).to(dtype), nn.Linear(64, 128).to(dtype)
    if kind.startswith("bitsandbytes"):
        bnb = pytest.importorskip("bitsandbytes")
        options = dict(quant_type="nf4", compute_dtype=dtype) if "nf4" in kind else {}
        cls = bnb.nn.Linear4bit if options else bnb.nn.Linear8bitLt
        options = options or dict(has_fp16_weights=False)
        layer = cls(64, 128, bias=False, **options)
        layer.load_state_dict({"weight": source.weight})
        layer = layer.to("cpu")
    else:
        source.bias = None
        monkeypatch.setitem(globals(), "plain", lambda: source)
        layer = KINDS[kind][0]()[0]
    model = paramlora.attach(nn.Sequential(norm, layer), {"1": {"r": 4, "hard": 0}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.2)
    x = torch.randn(8, 64).to(dtype)
    want = model(x)
    paramlora.merge(model, dequantize=True)
    assert type(model[1]) is nn.Linear and model[1].weight.dtype == dtype
    close(model(x), want, 0.03)


def test_a_layer_that_bitsandbytes_reordered_for_its_cpu():
    """As its forward does in eval mode, on a CPU with instructions for bfloat16."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layer, weight = bitsandbytes_nf4()
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 4, "hard": 0}})
    packed = layer.weight
    packed.data, packed.quant_state = functional._convert_weight_packed_for_cpu(
        packed.data, packed.quant_state
    )
    before = packed.data.clone(), packed.quant_state.absmax.clone()
    close(dense(layer, packed), weight, 0.003)  # the scales are bfloat16 now
    assert torch.equal(packed.data, before[0]) and packed.quant_state.packing_format_for_cpu
    assert torch.equal(packed.quant_state.absmax, before[1])
    paramlora.merge(model, dequantize=True)
    close(model[0].weight, weight, 0.005)


@pytest.mark.parametrize("kind", ("torchao int8", "torchao int4", "bitsandbytes nf4"))
@DEVICES
def test_starting_from_a_quantised_weight(kind, device):
    layer, weight = KINDS[kind][0](device)
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 4, "hard": 0, "init": "pissa"}})
    ((_, _, low),) = updates(model)
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    close((low.lora_B @ low.lora_A).detach(), (u[:, :4] * s[:4]) @ v[:4], 0.01)


def two_layers(kind, device, **options):
    """Two adapted quantised layers, and a function of (x, factors) that says it in float64."""
    built = [KINDS[kind][0](device) for _ in range(2)]
    model = nn.Sequential(built[0][0], nn.Unflatten(-1, (2, 64)), nn.Tanh(), built[1][0])
    paramlora.attach(model, {"re:[03]": {"r": 4, "hard": 0, "scale": 2, **options}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_A, std=0.2)
        nn.init.normal_(low.lora_B, std=0.2)

    def wide(x, factors, strength):
        for (layer, weight), (a, b) in zip(built, zip(factors[::2], factors[1::2])):
            if x.shape[-1] != 64:
                x = torch.tanh(x.unflatten(-1, (2, 64)))
            x = F.linear(x, weight.double() + 2 * strength * b @ a, layer.bias.double())
        return x

    return model, wide


@pytest.mark.parametrize("kind", KINDS)
@DEVICES
def test_quantised_layers_compile_whole_whatever_the_strength(kind, device):
    torch.compiler.reset()
    counters.clear()
    model, wide = two_layers(kind, device)
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(8, 64, device=device).to(torch.bfloat16).requires_grad_()
    factors = [x, *paramlora.trainable_parameters(model)]
    model(x)  # bitsandbytes' int8 layers move their scales at the first call
    for strength in (1.0, -0.5):
        paramlora.set_adapters(model, {"default": strength})
        y = compiled(x)
        seed = torch.randn_like(y)
        got = torch.autograd.grad(y, factors, seed)
        leaves = [t.detach().double().requires_grad_() for t in factors]
        want = wide(leaves[0], leaves[1:], strength)
        close(y, want, 0.03)
        for own, grad in zip(got, torch.autograd.grad(want, leaves, seed.double())):
            close(own, grad, 0.04)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", (False, True))
@DEVICES
def test_checkpointing_quantised_layers_changes_no_bit(kind, reentrant, device):
    model, _ = two_layers(kind, device, dropout=0.25)
    x = torch.randn(8, 64, device=device).to(torch.bfloat16).requires_grad_(reentrant)

    def gradients(call):
        model.zero_grad()
        torch.manual_seed(1)
        y = call(model, x)
        y.float().square().sum().backward()
        return [y, *(p.grad for p in paramlora.trainable_parameters(model))]

    want = gradients(lambda m, x: m(x))
    got = gradients(lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert len(got) == 5 and all(g.norm() > 0 for g in got)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert not torch.equal(model(x), want[0])  # another mask


def quantised_llama(bits, folder, device):
    """A Llama that transformers loads from `folder` in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = transformers.LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2)
    cls = transformers.LlamaForCausalLM
    cls(config).to(torch.bfloat16).save_pretrained(folder)
    four = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = dict(load_in_4bit=True, **four) if bits == 4 else dict(load_in_8bit=True)
    how = transformers.BitsAndBytesConfig(**options)
    where = dict(dtype=torch.bfloat16, device_map=device)
    return cls.from_pretrained(folder, quantization_config=how, **where)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("some", (False, True))
@DEVICES
def test_a_model_that_transformers_quantised_is_saved_dense_and_loads(bits, some, device, tmp_path):
    """Merged whole it is a plain model; merged in part, the rest stays quantised."""

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(16, device=device).reshape(2, 8)).logits

    model = quantised_llama(bits, tmp_path / "base", device)
    layers = "(q|o|up)_proj" if some else "(q|k|v|o|gate|up|down)_proj"
    paramlora.attach(model, {f"re:.*{layers}": {"r": 4, "hard": 0}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.1)
    want = logits(model)
    paramlora.merge(model, dequantize=True)
    close(logits(model), want, 0.03)
    model.save_pretrained(tmp_path / "merged")
    how = dict(dtype=torch.bfloat16, device_map=device)
    other = type(model).from_pretrained(tmp_path / "merged", **how)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert hasattr(other.config, "quantization_config") is some
    close(logits(other), logits(model), 0.01)


@DEVICES
def test_transformers_trainer_takes_a_quantised_model(device, tmp_path):
    """It knows peft's adapters alone, and is told by the attribute that the documents name."""
    model = quantised_llama(4, tmp_path / "base", device)
    paramlora.attach(model, {"re:.*_proj": {"r": 4, "hard": 0}})
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(32).reshape(4, 8)]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)
    model.is_quantized = False
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = Trainer(model=model, args=arguments, train_dataset=rows)
    run.train()
    losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    assert all(low.lora_B.any() for _, _, low in updates(model))


def test_int4_in_the_layout_of_its_product_is_known_as_quantised():
    tensor = pytest.importorskip("torchao.quantization").Int4TilePackedTo4dTensor
    data = torch.zeros(16, 1, 32, 4, dtype=torch.int32)
    scales = torch.ones(32, 128, 2, dtype=torch.bfloat16)
    layer = nn.Linear(1024, 128, bias=False)
    packed = tensor(data, scales, [1, 32], torch.Size([128, 1024]))
    layer.weight = nn.Parameter(packed, requires_grad=False)
    model = nn.Sequential(layer)
    with pytest.raises(TargetError, match="0.weight, which is quantised"):
        paramlora.attach(model, {"0": {"r": 2}})
    paramlora.attach(model, {"0": {"r": 2, "hard": 0}})
    ((_, _, low),) = updates(model)
    assert low.lora_A.shape == (2, 1024) and low.lora_B.shape == (128, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_int4_in_the_layout_of_its_product():
    """Its input has no gradient in torch, so the layer is a model's first."""
    source = plain().weight.detach().cuda()
    config = dict(group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain()).to("cuda")
    quantization.quantize_(model, quantization.Int4WeightOnlyConfig(**config))
    layer, bias = model[0], model[0].bias.detach().double()
    weight = dense(layer, layer.weight)
    assert 0 < (weight - source).norm() < 0.1 * source.norm()  # half of a step of 1/15
    paramlora.attach(model, {"0": {"r": 4, "scale": 2, "hard": 0}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.2)
    x = torch.randn(8, 64, device="cuda").to(torch.bfloat16)
    y = model(x)
    seed = torch.randn_like(y)
    y.backward(seed)
    a, b = (t.detach().double().requires_grad_() for t in (low.lora_A, low.lora_B))
    want = F.linear(x.double(), weight.double() + 2 * b @ a, bias)
    want.backward(seed.double())
    for own, ref in ((y, want), (low.lora_A.grad, a.grad), (low.lora_B.grad, b.grad)):
        close(own, ref, 0.01)
    paramlora.merge(model, dequantize=True)
    close(model[0].weight, weight.double() + 2 * b @ a, 0.01)
    close(model(x), want, 0.01)


def test_a_quantised_weight_is_not_trained_whole():
    layer, _ = torchao_int8()
    with pytest.raises(TargetError, match='"0.weight" .*cannot train'):
        paramlora.attach(nn.Sequential(layer), {"0.weight": {"whole": 1}})


def test_a_refused_merge_leaves_the_quantised_layer_packed():
    packed, _ = torchao_nf4()
    model = nn.ModuleDict({"packed": packed, "bound": nn.Linear(6, 4)}).eval()
    nn.utils.parametrizations.spectral_norm(model["bound"])
    paramlora.attach(model, {"packed": {"r": 2, "hard": 0}, "bound": {"r": 2}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    weight = packed.weight
    with pytest.raises(AdapterError, match="under SpectralNorm, which cannot hold"):
        paramlora.merge(model, dequantize=True)
    assert packed.weight is weight and len(list(updates(model))) == 2
