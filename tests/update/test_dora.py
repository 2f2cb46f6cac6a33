"""DoRA against its definition in float64, written out here, and against peft and LyCORIS."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import files
from paramlora.evaluate.dropout import drops_for, masked
from paramlora.model.attach import updates


def of_transformers(out, fan_in):
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(out, fan_in)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.w1)


def ids(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 9


LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), lambda: torch.randn(4, 5), (1,)),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2),
        lambda: torch.randn(2, 4, 7),
        (1, 2),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, stride=2), lambda: torch.randn(2, 3, 7, 7), (1, 2, 3)),
    "pointwise": (lambda: nn.Conv2d(3, 6, 1), lambda: torch.randn(2, 3, 4, 4), (1, 2, 3)),
    "reflected": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 5, 5),
        (1, 2, 3),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), lambda: torch.randn(2, 4, 3, 3), (0, 2, 3)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: ids(4, 3), (0,)),
    "padded": (lambda: nn.Embedding(9, 6, padding_idx=2), lambda: ids(4, 3), (0,)),
    "hf": (lambda: of_transformers(6, 5), lambda: torch.randn(4, 5), (0,)),
    "experts": (Experts, lambda: torch.randn(4, 4), (2,)),
}
TENSOR = {"experts": "w1"}


def attached(name, **entry):
    """(layer with a trained DoRA, the layer from before, its input, the dimensions of the norm)."""
    torch.manual_seed(0)
    make, example, dims = LAYERS[name]
    layer, x = make().double(), example()
    x = x.double() if x.is_floating_point() else x
    before, tensor = copy.deepcopy(layer), TENSOR.get(name, "weight")
    paramlora.attach(layer, {tensor: {"r": 2, "scale": 0.7, "kind": "dora", **entry}})
    return layer, before, x, dims


def train(layer):
    ((_, _, update),) = updates(layer)
    with torch.no_grad():
        update.lora_B.normal_()
        update.lora_magnitude.mul_(1 + torch.rand_like(update.lora_magnitude))
    return update


def dense(before, update, dims, strength=1.0, tensor="weight", wanted=()):
    """The definition: (the weight, the leaves that it is made of)."""
    weight = getattr(before, tensor).detach()
    a, b, m = (
        getattr(update, n).detach().clone().requires_grad_()
        for n in ("lora_A", "lora_B", "lora_magnitude")
    )
    delta = update.lora_scale.detach() * b @ a
    delta = delta.T if update.layout == "transposed" else delta
    total = weight + delta.reshape(weight.shape)
    norm = total.detach().square().sum(dims, keepdim=True).sqrt()
    return weight + strength * (m * total / norm - weight), (a, b, m)


@pytest.mark.parametrize("name", LAYERS)
def test_it_starts_as_the_layer_was(name):
    layer, before, x, dims = attached(name)
    assert torch.equal(layer(x), before(x))
    ((_, _, update),) = updates(layer)
    weight = getattr(before, TENSOR.get(name, "weight"))
    assert torch.equal(
        update.lora_magnitude, torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    )


@pytest.mark.parametrize("strength", (1.0, 0.4))
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_definition(name, strength):
    layer, before, x, dims = attached(name)
    update, tensor = train(layer), TENSOR.get(name, "weight")
    paramlora.set_adapters(layer, {"default": strength})
    weight, leaves = dense(before, update, dims, strength, tensor)
    x = x.requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    want = torch.func.functional_call(before, {tensor: weight}, (x,))
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    more = [x] if x.is_floating_point() else []
    ours = [update.lora_A, update.lora_B, update.lora_magnitude]
    got = torch.autograd.grad(y, [*ours, *more], dy)
    expected = torch.autograd.grad(want, [*leaves, *more], dy)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(getattr(layer, tensor), weight, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strength", (1.0, 0.4))
@pytest.mark.parametrize("name", LAYERS)
def test_it_merges_live_and_on_files(name, strength, tmp_path):
    layer, before, x, dims = attached(name)
    update, tensor = train(layer), TENSOR.get(name, "weight")
    paramlora.set_adapters(layer, {"default": strength})
    want = dense(before, update, dims, strength, tensor)[0].detach()
    save_file(before.state_dict(), tmp_path / "base.safetensors")
    paramlora.save_adapter(layer, tmp_path / "a.safetensors")
    pair = (tmp_path / "a.safetensors", strength)
    files.merge(tmp_path / "base.safetensors", [pair], tmp_path / "out.safetensors")
    streamed = load_file(tmp_path / "out.safetensors")[tensor]
    live = getattr(paramlora.merge(layer), tensor)
    torch.testing.assert_close(live, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(live, streamed)


def test_the_sum_of_a_large_weight_is_formed_in_blocks(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(300_000, 3).double()
    before = copy.deepcopy(layer)
    update = train(paramlora.attach(layer, {"weight": {"r": 1, "kind": "dora"}}))
    want = dense(before, update, (1,))[0].detach()
    torch.testing.assert_close(paramlora.merge(layer).weight, want, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_stays():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1].detach())
    with torch.no_grad():
        layer.weight[1] = 0
    before = layer.weight.clone()
    paramlora.attach(layer, {"weight": {"r": 2, "kind": "dora"}})
    x = torch.randn(2, 4)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.weight, before)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ("linear", "conv2d", "hf"))
def test_dropout_drops_the_branchs_input_only(name):
    layer, before, x, dims = attached(name, dropout=0.5)
    update = train(layer)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = masked(x, drops_for(x, (0.5,), (1,)), 0) / 0.5
    weight, (a, b, m) = dense(before, update, dims)
    base = before.weight.detach()
    delta = update.lora_scale * b @ a
    delta = (delta.T if update.layout == "transposed" else delta).reshape(base.shape)
    norm = (base + delta).square().sum(dims, keepdim=True).sqrt()
    plain, zero = copy.deepcopy(before), copy.deepcopy(before)
    bias = {"bias": torch.zeros_like(before.bias)}
    call = torch.func.functional_call
    factor = (
        (m / norm).reshape(-1, *[1] * (y.dim() - 2)) if name == "conv2d" else (m / norm).flatten()
    )
    without = call(plain, {"weight": base, **bias}, (x,)) + call(
        zero, {"weight": delta, **bias}, (dropped,)
    )
    shown = before.bias.reshape(-1, *[1] * (y.dim() - 2)) if name == "conv2d" else before.bias
    torch.testing.assert_close(y, without * factor + shown, rtol=1e-11, atol=1e-11)
    layer.eval()
    torch.testing.assert_close(layer(x), call(before, {"weight": weight}, (x,)))


def test_dropout_elsewhere_is_refused():
    with pytest.raises(paramlora.TargetError, match='"dropout" cannot act at'):
        attached("experts", dropout=0.1)


def test_a_soft_one_is_refused():
    with pytest.raises(paramlora.ConfigError, match='which no parallel branch adds. Remove "hard"'):
        paramlora.attach(nn.Linear(4, 3), {"weight": {"r": 1, "kind": "dora", "hard": 0}})


def test_several_adapters_act_one_after_the_other():
    layer, before, x, dims = attached("linear")
    first = train(layer)
    weight = dense(before, first, dims)[0].detach()
    paramlora.attach(layer, {"weight": {"r": 2, "kind": "dora"}}, adapter="second")
    second = list(updates(layer))[1][2]
    torch.testing.assert_close(second.lora_magnitude, weight.norm(dim=1, keepdim=True))
    with torch.no_grad():
        second.lora_B.normal_()
    middle = copy.deepcopy(before)
    middle.weight = nn.Parameter(weight)
    want = dense(middle, second, dims)[0]
    torch.testing.assert_close(layer(x), x @ want.T + before.bias)
    torch.testing.assert_close(paramlora.merge(layer).weight, want.detach())


def test_the_scale_trains():
    layer, before, x, dims = attached("linear", trainable_scale=True)
    update = train(layer)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), [update.lora_scale])
    scale = update.lora_scale.detach().clone().requires_grad_()
    total = before.weight.detach() + scale * (update.lora_B @ update.lora_A).detach()
    weight = update.lora_magnitude.detach() * total / total.detach().norm(dim=1, keepdim=True)
    (want,) = torch.autograd.grad((x @ weight.T + before.bias.detach()).square().sum(), [scale])
    torch.testing.assert_close(grad, want)
    names = [g["name"] for g in paramlora.parameter_groups(layer, 1e-3)]
    assert names == ["lora_A", "lora_B", "lora_scale", "lora_magnitude"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("linear", "conv2d", "embedding"))
def test_sixteen_bits_are_near(name, dtype):
    torch.manual_seed(0)
    make, example, dims = LAYERS[name]
    layer, x = make().to(dtype), example()
    x = x.to(dtype) if x.is_floating_point() else x
    before = copy.deepcopy(layer)
    paramlora.attach(layer, {"weight": {"r": 2, "kind": "dora"}})
    assert torch.equal(layer.weight, before.weight)
    # a bias is added after the rescaling, where the layer itself adds it before it rounds
    torch.testing.assert_close(layer(x), before(x), rtol=0, atol=2 * torch.finfo(dtype).eps)
    update = train(layer)
    assert update.lora_magnitude.dtype == torch.float32
    layer64 = copy.deepcopy(before).double()
    weight = dense(layer64, copy.deepcopy(update).double(), dims)[0]
    x64 = x.double() if x.is_floating_point() else x
    want = torch.func.functional_call(layer64, {"weight": weight}, (x64,))
    error = (layer(x).double() - want).abs().max() / want.abs().max()
    assert error < 3 * torch.finfo(dtype).eps


def test_autocast_leaves_the_norm_alone():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    before = copy.deepcopy(layer)
    update = train(paramlora.attach(layer, {"weight": {"r": 4, "kind": "dora"}}))
    x = torch.randn(8, 64)
    want = dense(before, update, (1,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.weight, paramlora.merge(copy.deepcopy(layer)).weight)
    assert y.dtype == torch.bfloat16
    error = (y - (x @ want.T + before.bias)).abs().max() / y.abs().max()
    assert error < 3 * torch.finfo(torch.bfloat16).eps


def test_it_compiles_whole():
    torch.compiler.reset()  # what other tests compiled counts against the limit
    layer, before, x, dims = attached("linear")
    train(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    y = compiled(x).square().sum()
    ((_, _, update),) = updates(layer)
    own = [update.lora_A, update.lora_B, update.lora_magnitude]
    got, want = torch.autograd.grad(y, own), torch.autograd.grad(layer(x).square().sum(), own)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", (True, False))
def test_it_is_checkpointed(reentrant):
    layer, _, x, _ = attached("linear")
    update = train(layer)
    own = [update.lora_A, update.lora_B, update.lora_magnitude]
    x = x.requires_grad_()
    layer(x).square().sum().backward()
    want = [p.grad.clone() for p in own]
    for p in own:
        p.grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(own, want))


def test_tied_layers_share_it():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)}
    ).double()
    model.head.weight = model.embed.weight
    before = model.embed.weight.detach().clone()
    paramlora.attach(model, {"re:embed|head": {"r": 2, "kind": "dora"}})
    update = train(model)
    holder = nn.Module()
    holder.weight = nn.Parameter(before)
    want = dense(holder, update, (0,))[0]
    x, tokens = torch.randn(3, 6).double(), ids(4)
    torch.testing.assert_close(model.head(x), x @ want.T)
    torch.testing.assert_close(model.embed(tokens), want[tokens])
    paramlora.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.head.weight.detach(), want.detach())


@pytest.mark.parametrize("init", ("pissa", "olora", "orthogonal"))
def test_a_start_from_the_weight(init, tmp_path):
    layer, before, x, dims = attached("linear", init=init)
    torch.testing.assert_close(layer(x), before(x))
    update = train(layer)
    paramlora.save_adapter(layer, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(copy.deepcopy(before), tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), layer(x))
    state = paramlora.checkpoint.merge(layer.state_dict())
    torch.testing.assert_close(state["weight"], paramlora.merge(layer).weight)
    assert update.r == 2


def test_from_the_meta_device_it_starts_at_the_first_read():
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
    paramlora.attach(layer, {"weight": {"r": 2, "kind": "dora"}})
    layer.to_empty(device="cpu")
    weight = torch.randn(3, 4)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(3)})
    with pytest.raises(paramlora.AdapterError, match="no value before its layer is first read"):
        paramlora.merge(layer)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.testing.assert_close(paramlora.merge(layer).weight.detach(), weight)


def test_a_dry_run_counts_the_magnitude():
    layer, *_ = attached("conv2d")
    (row,) = paramlora.summary(layer).rows
    (target,) = paramlora.targets(LAYERS["conv2d"][0](), {"weight": {"r": 2, "kind": "dora"}})
    assert row.kind == "dora" and row.parameters == target.parameters == 2 * (27 + 6) + 6
