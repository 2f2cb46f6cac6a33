"""The known layers' operations against float64: values, every gradient, and what they cost."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import paramlora
from paramlora.cuda import operands as served
from paramlora.evaluate import choose, functional
from paramlora.model.attach import updates
from tests.evaluate.layers import CUDA, WHICH, dense, gradients, tensors

pytestmark = pytest.mark.usefixtures("needs_its_device")


SHAPES = [((6,), 5, 7, 3), ((2, 3), 5, 7, 1), ((40,), 5, 7, 3), ((), 5, 7, 2), ((0,), 5, 7, 2)]


@pytest.mark.parametrize("tokens, fan_in, out, r", SHAPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("strength", (1.0, -0.5))
def test_linear_and_only_the_wanted_gradients(tokens, fan_in, out, r, which, strength):
    values = tensors(tokens, fan_in, out, r)
    seed = torch.randn(*tokens, out).double()
    y, got = gradients(lambda *v: functional.linear(*v, strength), values, which, seed)
    want_y, want = gradients(lambda *v: dense(*v, strength), values, which, seed)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    assert [g is not None for g in got] == [i in which for i in range(6)]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tiny", (0, choose.CARDS["cpu"].tiny))
@pytest.mark.parametrize("tokens", (3, 50))
def test_linear_and_its_gradient_can_be_differentiated_again(tokens, tiny, monkeypatch):
    monkeypatch.setattr(choose, "_CPU", choose.Thresholds(tiny=tiny))
    values = [v.requires_grad_() for v in tensors((tokens,), 4, 5, 2)]
    assert torch.autograd.gradcheck(functional.linear, values)
    assert torch.autograd.gradgradcheck(functional.linear, values)


@pytest.mark.parametrize("tokens, fan_in, out", ((60, 160, 120), (300, 160, 120)))
@pytest.mark.parametrize("which", WHICH)
def test_linear_beyond_tiny_sizes(tokens, fan_in, out, which):
    assert not choose.tiny(tokens * fan_in, (out, fan_in), 3, choose.CARDS["cpu"].tiny)
    values = tensors((tokens,), fan_in, out, 3)
    seed = torch.randn(tokens, out).double()
    y, got = gradients(functional.linear, values, which, seed)
    want_y, want = gradients(dense, values, which, seed)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    assert [g is not None for g in got] == [i in which for i in range(6)]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_weights_of_any_strides_and_inputs_of_any_strides():
    x, weight, bias, a, b, scale = tensors((8,), 6, 4, 2)
    want = dense(x, weight, bias, a, b, scale)
    strided = x.t().contiguous().t()
    transposed = weight.t().contiguous().t()
    got = functional.linear(strided, transposed, bias, a, b, scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaf = strided.clone().requires_grad_()
    functional.linear(leaf, transposed, bias, a, b, scale).sum().backward()  # dY is expanded
    ones = torch.ones(8, 4).double()
    torch.testing.assert_close(leaf.grad, ones @ (weight + scale * b @ a))


@pytest.mark.parametrize("tokens", (2, 70))
@pytest.mark.parametrize("call", ("linear", "convolution", "embedding"))
def test_the_scale_is_never_held_for_a_constant(call, tokens):
    layer, x = {
        "linear": (nn.Linear(160, 120), torch.randn(tokens, 160)),
        "convolution": (nn.Conv2d(8, 12, 3), torch.randn(tokens, 8, 9, 9)),
        "embedding": (nn.Embedding(30, 12), torch.randint(30, (tokens,))),
    }[call]
    model = paramlora.attach(nn.Sequential(layer.double()), {"0": {"r": 2}})
    (_, _, update), x = next(updates(model)), x.double() if call != "embedding" else x
    nn.init.normal_(update.lora_B)
    first = model(x)
    update.lora_scale.fill_(0.25)
    torch.testing.assert_close(model(x), first + 0.75 * (detached(model, x) - first))
    update.lora_scale.fill_(1.0)
    torch.testing.assert_close(model(x), first)


def detached(model, x):
    with paramlora.disable_adapters(model):
        return model(x)


@pytest.mark.parametrize("layer, x", ((nn.Linear(4, 5), (3, 4)), (nn.Conv1d(4, 5, 3), (2, 4, 8))))
def test_the_scale_is_derived_by_in_forward_mode(layer, x):
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}}).double()
    (_, _, update) = next(updates(model))
    nn.init.normal_(update.lora_B)
    x = torch.randn(x).double()
    with torch.autograd.forward_ad.dual_level():
        scale = torch.autograd.forward_ad.make_dual(update.lora_scale, torch.tensor(1.0).double())
        update.lora_scale = scale
        got = torch.autograd.forward_ad.unpack_dual(model(x)).tangent
        update.lora_scale = torch.autograd.forward_ad.unpack_dual(scale).primal
    torch.testing.assert_close(got, model(x) - detached(model, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the sizes, which it may hold
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tracing itself
def test_a_trace_follows_the_scale():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 5)), {"0": {"r": 2}})
    (_, _, update), x = next(updates(model)), torch.randn(3, 4)
    nn.init.normal_(update.lora_B)
    traced = torch.jit.trace(model, x)
    update.lora_scale.fill_(0.25)
    torch.testing.assert_close(traced(x), model(x))


def test_a_graph_of_operations_takes_the_scale_as_an_input():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 5)), {"0": {"r": 2}})
    (_, _, update), x = next(updates(model)), torch.randn(3, 4)
    nn.init.normal_(update.lora_B)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graph = make_fx(lambda state, x: torch.func.functional_call(model, state, (x,)))(state, x)
    update.lora_scale.fill_(0.25)
    torch.testing.assert_close(graph(state, x), model(x))


def saved(call):
    """The tensors that autograd keeps, by address."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("tokens, rank_kept", ((20, True), (400, False)))
def test_only_the_input_and_the_rank_are_kept_for_backward(tokens, rank_kept):
    model = nn.Sequential(nn.Linear(256, 384))
    paramlora.attach(model, {"0": {"r": 4}})
    x = torch.randn(tokens, 256, requires_grad=True)
    there = {p.data_ptr() for p in (x, *model.parameters(), *model.buffers())}
    kept = saved(lambda: model(x))
    extra = [tuple(t.shape) for pointer, t in kept.items() if pointer not in there]
    assert extra == ([(tokens, 4)] if rank_kept else [])


@pytest.mark.parametrize("name", ("linear", "conv"))
@pytest.mark.parametrize("count", (1, 2, 3))
def test_several_adapters_are_one_call_and_switching_is_exact(name, count, monkeypatch):
    layer = nn.Linear(5, 7) if name == "linear" else nn.Conv2d(5, 7, 3, padding=1)
    x = torch.randn(2, 5).double() if name == "linear" else torch.randn(2, 5, 4, 4).double()
    model = nn.ModuleDict({"layer": layer}).double()
    plain = copy.deepcopy(model)
    for i in range(count):
        config = {"layer": {"r": i + 1, "scale": 0.5 + i, "trainable_scale": 1}}
        paramlora.attach(model, config, f"a{i}")
    paramlora.set_adapters(model, {f"a{i}": 1.0 - 0.7 * i for i in range(count)})
    weight = plain.layer.weight.detach().clone().requires_grad_()
    terms = []
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
        a, b, s = (
            t.detach().clone().requires_grad_() for t in (low.lora_A, low.lora_B, low.lora_scale)
        )
        terms.append((low, a, b, s))
    total = weight + sum(low.strength * s * (b @ a).reshape(weight.shape) for low, a, b, s in terms)
    want = torch.func.functional_call(plain.layer, {"weight": total}, (x,))
    monkeypatch.setattr(type(model.layer), "weight", property(lambda self: 1 / 0))  # never formed
    got = model.layer(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    seed = torch.randn_like(want)
    got.backward(seed)
    want.backward(seed)
    for low, a, b, s in terms:
        mine = low.lora_A.grad, low.lora_B.grad, low.lora_scale.grad
        torch.testing.assert_close(mine, (a.grad, b.grad, s.grad), rtol=1e-10, atol=1e-10)
    with paramlora.disable_adapters(model):
        assert torch.equal(model.layer(x), plain.layer(x))


def kept_share(y, base, true):
    """How much of the true update is in y: its projection, in float64."""
    true = true.double()
    return (((y.double() - base.double()) * true).sum() / (true * true).sum()).item()


@pytest.mark.parametrize("device", ("cpu", CUDA))
@pytest.mark.parametrize("size, least", ((1e-2, 0.999), (1e-3, 0.99), (1e-4, 0.95)))
@pytest.mark.parametrize("bias", (0.0, 8.0))
def test_a_small_update_reaches_a_bfloat16_output_and_its_input_gradient(device, size, least, bias):
    x, weight, _, a, b, scale = tensors((2048,), 512, 384, 8, device, torch.bfloat16)
    delta = scale.double() * b.double() @ a.double()
    b = b * (size * weight.double().norm() / delta.norm()).float()
    # a bias on bfloat16's grid, as any is; the update is far smaller than its rounding step
    shift = torch.full((384,), bias, device=device).bfloat16()
    leaf = x.clone().requires_grad_()
    y = functional.linear(leaf, weight, shift, a, b, scale)
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = [t.double() for t in (x, weight, a, b, scale, dy)]
    X, W, A, B, S, D = wide
    base, true = X @ W.t() + bias, S * (X @ A.t()) @ B.t()
    # rounding is noise on the projection: four deviations of it, which a large bias makes wide
    error = ((base + true).bfloat16().double() - base - true).std() / true.norm()
    near = 1 - least + 4 * error.item()
    assert kept_share(y, base, true) == pytest.approx(1, abs=near)
    assert kept_share(leaf.grad, D @ W, S * (D @ B) @ A) == pytest.approx(1, abs=1 - least)
    rounded = X @ (W + S * B @ A).bfloat16().double().t() + bias  # what the dense sum does
    if size < 1e-2:
        assert kept_share(rounded, base, true) < 0.7


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("device", ("cpu", CUDA))
@pytest.mark.parametrize("trainable_scale", (0, 1))
def test_sixteen_bits_keep_their_type_and_the_factors_theirs(dtype, device, trainable_scale):
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).to(device, dtype)
    plain = copy.deepcopy(model).double()
    paramlora.attach(model, {"re:[01]": {"r": 4, "trainable_scale": trainable_scale}})
    for path, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.3)
        layer = plain[int(path)]
        total = low.lora_scale.double() * low.lora_B.double() @ low.lora_A.double()
        layer.weight.data += total.detach()
    x = torch.randn(96, 64, device=device, dtype=dtype)
    y = model(x)
    want = plain(x.double())
    assert y.dtype == dtype
    assert (y.double() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()
    y.float().square().mean().backward()
    want.square().mean().backward()
    for path, _, low in updates(model):
        g = plain[int(path)].weight.grad
        s, a, b = (t.detach().double() for t in (low.lora_scale, low.lora_A, low.lora_B))
        for mine, true in ((low.lora_A.grad, s * b.t() @ g), (low.lora_B.grad, s * g @ a.t())):
            assert mine.dtype == torch.float32
            assert (mine.double() - true).norm() < 8 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("device", ("cpu", CUDA))
def test_autocast_runs_in_sixteen_bits_and_casts_nothing_up(device):
    model = nn.Sequential(nn.Linear(64, 48), nn.Conv1d(48, 16, 1)).to(device)
    paramlora.attach(model, {"re:[01]": {"r": 4}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.3)
    x = torch.randn(48, 64, device=device, requires_grad=True)
    want = copy.deepcopy(model).double()(x.double())
    with torch.autocast(device, torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() < 0.02 * want.norm()
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(low.lora_A.grad.dtype == torch.float32 for _, _, low in updates(model))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("padding_idx", (None, 2))
@pytest.mark.parametrize("device", ("cpu", CUDA))
def test_an_embedding_under_autocast_keeps_its_type(dtype, padding_idx, device):
    model = nn.Sequential(nn.Embedding(40, 24, padding_idx=padding_idx)).to(device, dtype)
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"0": {"r": 4}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.3)
    rows = torch.randint(40, (3, 50), device=device)
    want = plain[0].weight.double() + (low.lora_B.double() @ low.lora_A.double()).t()
    with torch.autocast(device, torch.bfloat16):
        y = model(rows)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (y.double() - want[rows]).norm() < 2 * eps * want[rows].norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("device", ("cpu", CUDA))
def test_the_row_without_a_gradient_may_be_counted_from_the_end(dtype, device):
    weight, a, b = torch.randn(9, 4), torch.randn(2, 9), torch.randn(4, 2)
    leaves = [t.to(device).requires_grad_() for t in (weight.to(dtype), a, b)]
    rows, scale = torch.tensor([8, 3, 8], device=device), torch.tensor(0.5, device=device)
    found = [
        torch.autograd.grad(functional.embedding(rows, *leaves, scale, row).sum(), leaves)
        for row in (8, -1)
    ]
    assert all(g.norm() > 0 and torch.equal(g, h) for g, h in zip(*found))
    assert not found[1][0][8].any() and not found[1][1][:, 8].any()
    with pytest.raises((AssertionError, RuntimeError), match="num_embeddings|[Pp]adding_idx"):
        functional.embedding(rows, *leaves, scale, -10)


@pytest.mark.parametrize("step, near", ((2**31 - 4, True), (2**31 - 2, False)))
def test_factors_that_32_bits_do_not_reach_have_no_kernel(step, near):
    weight, a, b, scale = (torch.empty(s, device="meta") for s in ((3, 4), (2, 4), (3, 2), ()))
    assert served.factors_fit(weight, a.as_strided((2, 4), (step, 1)), b, scale) == near
    assert served.factors_fit(weight, a, b.as_strided((3, 2), (1, step)), scale) == near


class Address(torch.autograd.Function):
    """What the kernels read: a tensor left over from a transform hides it."""

    @staticmethod
    def forward(ctx, x, seen):
        seen.append(x.data_ptr())
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy, None


def test_an_input_left_over_from_a_transform():
    x, left, seen = torch.randn(3, requires_grad=True), [], []
    torch.func.grad(lambda t: (left.append(t * 1), t.sum())[1])(x.detach())
    for one in (x, left[0]):
        assert torch.equal(functional.applied(Address, one, seen), 2 * x)
    assert seen[0] == x.data_ptr() and seen[1] not in (0, seen[0])
    (grad,) = torch.autograd.grad(functional.applied(Address, x, seen).sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.0))
