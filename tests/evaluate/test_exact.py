"""A sweep of every layer against a dense float64 W + scale·B·A that is written here
independently."""

import copy
import itertools
import pickle
from io import BytesIO

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import paramlora
from paramlora.model.attach import updates


def randomise(model):
    for _, _, lowrank in updates(model):
        nn.init.normal_(lowrank.lora_B, std=0.3)


def dense(model, base_state):
    """The base state dict with W + scale·B·A computed by hand, by parameter name."""
    out = {k: v.clone() for k, v in base_state.items()}
    for name, module in model.named_modules():
        for tensor in getattr(module, "parametrizations", {}):
            (low,) = module.parametrizations[tensor]
            key = f"{name}.{tensor}" if name else tensor
            flat = torch.einsum("...or,...ri->...oi", low.lora_B, low.lora_A).detach()
            shape = out[key].shape
            names = str(type(module).__mro__)
            if any(n in names for n in ("Embedding", "ConvTranspose", "pytorch_utils.Conv1D")):
                flat = flat.T
            out[key] = out[key] + low.lora_scale.item() * flat.reshape(shape)
    return out


CONVS = [
    (dim, dict(kernel_size=k, stride=s, dilation=d, groups=g, padding=1, padding_mode=m))
    for dim, k, s, d, g, m in itertools.product(
        (1, 2, 3), (1, 3), (1, 2), (1, 2), (1, 2, 4), ("zeros", "circular", "reflect")
    )
]


def conv(dim, options):
    return getattr(nn, f"Conv{dim}d")(4, 8, **options), torch.randn(2, 4, *[6] * dim)


def check(layer, entry, *inputs, call=lambda m, *x: m(*x)):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": layer}).double()
    inputs = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    base = {k: v.clone() for k, v in model.state_dict().items()}
    before = call(model.layer, *inputs)
    classes = [type(m) for m in model.modules()]
    paramlora.attach(model, {entry: {"r": 1, "scale": 1.7, "trainable_scale": 1}})
    torch.testing.assert_close(call(model.layer, *inputs), before, rtol=1e-15, atol=1e-15)
    with paramlora.disable_adapters(model):
        assert torch.equal(call(model.layer, *inputs), before)
    randomise(model)
    expected = dense(model, base)
    reference = copy.deepcopy(layer_like(model, base))
    reference.load_state_dict(expected)
    got, want = call(model.layer, *inputs), call(reference.layer, *inputs)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    check_gradients(model, base, reference, got, want, inputs)
    paramlora.merge(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(base)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


def layer_like(model, base):
    plain = copy.deepcopy(model)
    paramlora.detach(plain)
    assert all(torch.equal(v, base[k]) for k, v in plain.state_dict().items())
    return plain.requires_grad_(True)


def check_gradients(model, base, reference, got, want, inputs):
    seed = torch.randn_like(want)
    floats = [x for x in inputs if x.is_floating_point()]
    expect = torch.autograd.grad(want, floats, seed, retain_graph=True) if floats else ()
    actual = torch.autograd.grad(got, floats, seed, retain_graph=True) if floats else ()
    torch.testing.assert_close(actual, expect, rtol=1e-9, atol=1e-9)
    want.backward(seed)
    got.backward(seed)
    for path, module in model.named_modules():
        for tensor in getattr(module, "parametrizations", {}):
            (low,) = module.parametrizations[tensor]
            g = dict(reference.named_parameters())[f"{path}.{tensor}"].grad
            transposed = low.layout == "transposed"
            g = g.reshape(g.shape[0], -1).T if transposed else g.reshape(*low_shape(low))
            s, a, b = low.lora_scale.detach(), low.lora_A.detach(), low.lora_B.detach()
            close = dict(rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(low.lora_A.grad, s * b.mT @ g, **close)
            torch.testing.assert_close(low.lora_B.grad, s * g @ a.mT, **close)
            torch.testing.assert_close(low.lora_scale.grad, (g * (b @ a)).sum(), **close)


def low_shape(low):
    return (*low.lora_B.shape[:-1], low.lora_A.shape[-1])


@pytest.mark.parametrize("dim, options", CONVS)
def test_convolution(dim, options):
    layer, x = conv(dim, options)
    check(layer, "layer", x)


@pytest.mark.parametrize("dim", (1, 2, 3))
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding="same"),
        dict(kernel_size=2, padding="same", dilation=3),  # one more on one side
        dict(kernel_size=3, padding="same", padding_mode="circular", groups=2),
        dict(kernel_size=3, padding="valid", groups=4),
        dict(kernel_size=3, padding=2, padding_mode="replicate", stride=2, dilation=2),
    ],
)
def test_convolution_with_other_paddings(dim, options):
    layer, x = conv(dim, options)
    check(layer, "layer", x)


def test_convolution_of_uneven_sides():
    options = dict(kernel_size=(3, 2), stride=(1, 2), dilation=(2, 1), padding=(0, 1), bias=False)
    check(nn.Conv2d(4, 8, **options), "layer", torch.randn(2, 4, 6, 7))
    check(nn.Conv2d(4, 8, **options), "layer", torch.randn(4, 6, 7))  # not batched


@pytest.mark.parametrize("shape", ((5,), (2, 5), (2, 3, 4, 5)))
def test_linear_on_inputs_of_any_rank(shape):
    check(nn.Linear(5, 7, bias=False), "layer", torch.randn(shape))


def test_transformers_conv1d():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    check(conv1d(7, 5), "layer", torch.randn(2, 3, 5))


@pytest.mark.parametrize("dim", (1, 2, 3))
@pytest.mark.parametrize("groups", (1, 2))
def test_transposed_convolution(dim, groups):
    layer = getattr(nn, f"ConvTranspose{dim}d")(4, 6, 3, stride=2, groups=groups)
    check(layer, "layer", torch.randn(2, 4, *[5] * dim))


def test_linear():
    check(nn.Linear(5, 7), "layer", torch.randn(3, 5))


def test_embeddings():
    check(nn.Embedding(9, 4, padding_idx=0), "layer", torch.tensor([[1, 2], [0, 8]]))
    check(nn.EmbeddingBag(9, 4), "layer", torch.tensor([[1, 2], [0, 8]]))


def test_bilinear():
    check(nn.Bilinear(3, 4, 5), "layer", torch.randn(2, 3), torch.randn(2, 4))


@pytest.mark.parametrize("cls", (nn.LSTM, nn.GRU, nn.RNN))
@pytest.mark.parametrize("name", ("weight_ih_l0", "weight_hh_l0"))
def test_recurrent(cls, name):
    check(cls(4, 3), f"layer.{name}", torch.randn(5, 2, 4), call=lambda m, x: m(x)[0])


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("entry", ("in_proj_weight", "out_proj"))
def test_attention(training, entry):
    layer = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    check(layer, entry, torch.randn(2, 3, 8), call=lambda m, x: m(x, x, x)[0])


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"))
def test_attention_of_unequal_widths(name, training):
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=6).train(training)
    inputs = torch.randn(3, 2, 8), torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    check(layer, name, *inputs, call=lambda m, q, k, v: m(q, k, v)[0])


def test_transformer_layer_in_eval():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    check(layer, "linear1", torch.randn(2, 3, 8))


def test_stack_of_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x):
            return torch.einsum("eoi,bi->ebo", self.w1, x)

    check(Experts(), "layer.w1", torch.randn(2, 4))


def test_torchs_own_removal_merges_one_and_leaves_the_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    paramlora.attach(model, {"re:[01]": {"r": 2}})
    randomise(model)
    wholes = [layer.weight.detach().clone() for layer in model]
    cls = type(model[1])
    assert type(model[0]) is cls
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=True)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, wholes[0])
    assert type(model[1]) is cls and torch.equal(model[1].weight, wholes[1])


def test_a_deep_copy_is_independent():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
    before = model[0].weight.detach().clone()
    twin = copy.deepcopy(model)
    randomise(twin)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(twin[0].weight, before)


def test_pickling_is_refused_while_attached_and_works_after_merge():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
    with pytest.raises(paramlora.AdapterError, match="cannot be pickled.*merge"):
        pickle.dumps(model)
    randomise(model)
    paramlora.merge(model)
    torch.save(model, file := BytesIO())
    assert b"paramlora" not in file.getvalue()


def test_a_base_checkpoint_loads_strictly_and_keeps_the_adapter():
    model = nn.Sequential(nn.Linear(4, 3))
    base = {k: v + 1 for k, v in model.state_dict().items()}
    paramlora.attach(model, {"0": {"r": 2}})
    randomise(model)
    a = model[0].parametrizations.weight[0].lora_A.clone()
    model.load_state_dict(base, strict=True)
    assert torch.equal(model[0].parametrizations.weight.original, base["0.weight"])
    assert torch.equal(model[0].parametrizations.weight[0].lora_A, a)
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({"0.bias": base["0.bias"]}, strict=True)


def test_switching_adapters_gives_the_base_and_the_weighted_sum():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    base = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": 2}}, adapter="a")
    paramlora.attach(model, {"0": {"r": 1, "scale": 3}}, adapter="b")
    randomise(model)
    a, b = model[0].parametrizations.weight
    with paramlora.disable_adapters(model):
        assert torch.equal(model[0].weight, base)
    paramlora.set_adapters(model, {"b": 0.5})
    want = base + 1.5 * b.lora_B @ b.lora_A
    torch.testing.assert_close(model[0].weight, want)
    paramlora.detach(model)
    assert torch.equal(model[0].weight, base) and type(model[0]) is nn.Linear


def test_factors_are_float32_on_a_16_bit_base():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)).bfloat16(), {"0": {"r": 2}})
    low = model[0].parametrizations.weight[0]
    assert low.lora_A.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16


def test_non_finite_values_are_refused_at_merge():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
    model[0].parametrizations.weight[0].lora_B.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match=r"0\.lora_B: not finite"):
        paramlora.merge(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_merging_one_holder_of_a_tied_weight_leaves_the_other():
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    base = embedding.weight.detach().clone()
    with pytest.warns(paramlora.ParamloraWarning, match="held as embedding.weight, head.weight"):
        paramlora.attach(model, {"head": {"r": 2}})
    randomise(model)
    update = head.parametrizations.weight[0]
    b, a = update.lora_B.detach().double(), update.lora_A.detach().double()
    whole = base.double() + update.lora_scale.detach().double() * b @ a
    paramlora.merge(model)
    assert torch.equal(embedding.weight, base)
    bound = torch.finfo(torch.float32).eps * (base.abs() + b.abs() @ a.abs())
    assert ((head.weight.double() - whole).abs() <= bound).all()


def test_compile_and_export_equal_the_dense_reference():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    paramlora.attach(model, {"0": {"r": 2}})
    randomise(model)
    weight, x = dense(model, base)["0.weight"], torch.randn(5, 4).double()
    want = torch.nn.functional.linear(x, weight, base["0.bias"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    exported = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close([compiled, exported], [want, want], rtol=1e-12, atol=1e-12)
    compiled.sum().backward()
    low = model[0].parametrizations.weight[0]
    g = torch.ones(5, 3).double().T @ x
    torch.testing.assert_close(low.lora_A.grad, low.lora_B.detach().T @ g)
