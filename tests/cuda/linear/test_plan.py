"""The kernels of a linear layer: every way to divide the work, against float64 and against each
other."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from paramlora.cuda.operands import Drop, Operands
from paramlora.evaluate import functional
from paramlora.evaluate.convolution import convolution
from paramlora.evaluate.dropout import Drops, masked
from tests.cuda.graphs import recorded
from tests.evaluate.layers import dense, gradients, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
fused = pytest.importorskip("paramlora.cuda.linear.plan", reason="needs Triton")
launch = pytest.importorskip("paramlora.cuda.launch", reason="needs Triton")
WANTED = (0, 2, 3, 4, 5)
SMALL = [  # the thin product in the same grid
    (8192, 512, 1024, 16), (1000, 317, 211, 5), (129, 40, 24, 3), (1, 64, 64, 1), (1, 1, 1, 1),
    (77, 768, 1280, 64), (513, 2056, 2064, 17), (1024, 4096, 4096, 16), (64, 4096, 4096, 8),
    (600, 256, 512, 128), (70, 40, 24, 65),
]  # fmt: skip
LARGE = [  # in a grid of its own, beside which the tiles start
    (8192, 4096, 2048, 16), (9000, 2051, 2049, 5), (8200, 4104, 1032, 64), (32768, 1280, 1280, 8),
    (4096, 4096, 2048, 128), (8200, 1029, 1040, 100), (300, 512, 256, 256), (1000, 317, 211, 129),
    (40000, 320, 2720, 8), (16400, 1283, 1640, 20),
]  # fmt: skip
WIDE = [(8192, 4096, 2048, 256), (70, 317, 211, 300)]  # by cuBLAS


def run(values, seed, which=WANTED, **options):
    return gradients(functional.linear, values, which, seed, **options)


def case(shape, dtype=torch.bfloat16):
    torch.manual_seed(0)
    tokens, fan_in, out, r = shape
    values = tensors((tokens,), fan_in, out, r, "cuda", dtype)
    return values, torch.randn(tokens, out, device="cuda").to(dtype)


@pytest.mark.parametrize("shape", SMALL + LARGE + WIDE, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_ragged_shapes_and_every_rank(shape, dtype):
    values, seed = case(shape, dtype)
    fused._FORWARDS.clear()
    y, got = run(values, seed)
    (plan,) = fused._FORWARDS.values()
    assert (plan.single is not None, plan.tiles.early) == (shape in SMALL, shape in LARGE)
    again, twice = run(values, seed)
    want_y, want = gradients(dense, [v.double() for v in values], WANTED, seed.double())
    eps = torch.finfo(dtype).eps
    assert (y.double() - want_y).norm() < 2 * eps * want_y.norm()
    for i in WANTED:
        assert torch.equal(got[i], twice[i]), "not deterministic"
        near = 2 * eps * want[i].norm() + (eps * shape[0] ** 0.5 if i in (2, 5) else 0)
        assert (got[i].double() - want[i]).norm() <= near * (4 if i == 5 else 1), i
    assert torch.equal(y, again)


@pytest.mark.parametrize("shape", [s for s in SMALL + LARGE if s[3] <= 64], ids=str)
@pytest.mark.parametrize("way", ("eager", "captured", "input", "factors"))
def test_dropout_has_torchs_own_mask_in_every_shape(shape, way):
    """The output and all gradients under it, at each launch the same: what a compiler has warp
    groups multiply before it was written is wrong at some of them only."""
    (x, weight, bias, a, b, scale), dy = case(shape)
    of, drop = Operands(x, weight, bias, a, b, scale), Drop((0.3,), torch.tensor(5, device="cuda"))
    wanted = (way != "factors", way != "input")

    def step():
        y, kept = fused.forward(of, 1.5, False, drop)
        return y, *fused.backward(dy, of, kept, 1.5, True, wanted, False, drop)

    got, *again = (step() for _ in range(8))
    if way == "captured":
        graph, got = recorded(step)
        graph.replay(), graph.replay()
    else:
        same = (p is q or torch.equal(p, q) for other in again for p, q in zip(got, other))
        assert all(same), "not deterministic"
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    seen = masked(torch.ones_like(x), Drops((0.3,), (len(a),), drop.seed), 0) * wide[0]
    base = wide[0] @ weight.double().T + bias.double()
    added = 1.5 * scale.double() * seen @ wide[1].T @ wide[2].T
    want = (base + added, *torch.autograd.grad(base + added, wide, dy.double(), retain_graph=True))
    # of a single element the base and what is added to it may cancel, which no rounding knows of
    size = (added.norm(), torch.autograd.grad(added, wide[0], dy.double())[0].norm(), 0, 0)
    for one, two, more in zip(got, want, size, strict=True):
        assert one is None or (one.double() - two).norm() <= 2**-8 * (2 * two.norm() + more)


@pytest.mark.parametrize(
    "shape", (SMALL[0], SMALL[1], SMALL[9], *LARGE[:2], *LARGE[4:], WIDE[1]), ids=str
)
@pytest.mark.parametrize("which", ((0,), (3, 4), (0, 4)), ids=("input", "factors", "input and B"))
def test_some_of_the_gradients_alone(shape, which):
    values, seed = case(shape)
    _, want = run(values, seed)
    _, got = run(values, seed, which)
    for i in which:
        # the thin product in a grid of its own may round a last bit otherwise
        assert (got[i].double() - want[i].double()).norm() <= 1e-4 * want[i].double().norm()


@pytest.mark.parametrize("shape", (SMALL[0], SMALL[7], LARGE[0]), ids=str)
def test_a_second_backward_through_the_same_graph(shape):
    (x, weight, bias, a, b, scale), seed = case(shape)
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    y = functional.linear(leaves[0], weight, bias, *leaves[1:], scale)
    first = torch.autograd.grad(y, leaves, seed, retain_graph=True)
    second = torch.autograd.grad(y, leaves, -2 * seed)
    for one, two in zip(first, second):
        assert one.abs().max() > 0 and torch.equal(-2 * one, two)


@pytest.mark.parametrize(
    "shape", (SMALL[0], SMALL[7], (512, 320, 320, 8), LARGE[0], SMALL[9], LARGE[6]), ids=str
)
def test_a_cuda_graph_holds_the_step_and_replays_it(shape):
    (x, weight, bias, a, b, scale), seed = case(shape)
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]

    def step():
        y = functional.linear(leaves[0], weight, bias, *leaves[1:], scale)
        return y, *torch.autograd.grad(y, leaves, seed)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # after which what only a graph leaves to cuBLAS must find it started
    graph, held = recorded(step)
    for factor in (1.0, 0.5, -3.0):
        with torch.no_grad():
            leaves[0].copy_(x * factor), leaves[2].copy_(b * factor)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(held, step()):
            assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()


@pytest.mark.parametrize(
    "shape", (SMALL[0], (1024, 1280, 1280, 8), LARGE[0], *LARGE[3:7], SMALL[9]), ids=str
)
def test_no_race_among_programs_or_streams(shape):
    """Programs that read what others have not written yet would read NaN, which every freed block
    holds here, or what another input left."""
    cases = []
    for factor in (1.0, -2.0, 0.5):
        (x, *others), seed = case(shape)
        values = (x * factor, *others)
        cases.append((values, seed, *run(values, seed)))
    torch.cuda.synchronize()
    size, free = sum(v.numel() for v in cases[0][0]) * 8, torch.cuda.mem_get_info()[0]
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn in range(48):
        values, seed, want_y, want = cases[turn % 3]
        with torch.cuda.stream(streams[turn // 3 % 3]):
            blocks = [torch.full((size // 2**k,), torch.nan, device="cuda") for k in range(3, 16)]
            del blocks
            y, got = run(values, seed)
            right = [torch.equal(y, want_y), *(torch.equal(got[i], want[i]) for i in WANTED)]
        results.append(right)
    assert free > 8 * size
    assert all(map(all, results)), results
    torch.cuda.synchronize()
    assert not any(count.item() for count in launch._TICKETS.values()), "tickets left undrawn"


def test_a_layer_of_no_rows_and_wrong_operands():
    (x, weight, bias, a, b, scale), _ = case((16, 64, 48, 4))
    leaves = [t.requires_grad_() for t in (x[:0].clone(), a, b)]
    y = functional.linear(leaves[0], weight, bias, *leaves[1:], scale)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.shape == (0, 48) and [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(g.abs().sum() == 0 for g in grads)
    for wrong in (x.repeat(1, 2), x[:, :32], x[:, :63]):
        with pytest.raises(RuntimeError, match="shape|size|mat1"):
            functional.linear(wrong, weight, bias, a, b, scale)
    for at in (1, 2, 3, 4):
        values = [x, weight, bias, a, b, scale]
        values[at] = values[at].detach().cpu()
        with pytest.raises(RuntimeError, match="device"):
            functional.linear(*values)


def test_a_weight_that_moves_between_forward_and_backward():
    (x, weight, bias, a, b, scale), seed = case((64, 48, 32, 4))
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = functional.linear(leaves[0], weight, bias, *leaves[1:], scale)
    weight.data = weight.data.cpu()
    with pytest.raises(ValueError, match=r"belong together .*\[32, 48\] on cpu.*forward again"):
        torch.autograd.grad(y, leaves, seed)


LAYOUTS = {
    "padded rows": lambda x, w, bias, a, b: (x.repeat(1, 2)[:, : x.shape[1]], w, bias, a, b),
    "transposed weight": lambda x, w, bias, a, b: (x, w.t().contiguous().t(), bias, a, b),
    "transposed input": lambda x, w, bias, a, b: (x.t().contiguous().t(), w, bias, a, b),
    "spread bias": lambda x, w, bias, a, b: (x, w, bias.repeat_interleave(2)[::2], a, b),
    "wide bias": lambda x, w, bias, a, b: (x, w, bias.float(), a, b),
    "narrow factors": lambda x, w, bias, a, b: (x, w, bias, a.to(x.dtype), b.to(x.dtype)),
    "transposed factors": lambda x, w, bias, a, b: (
        x, w, bias, a.t().contiguous().t(), b.t().contiguous().t()
    ),
    "odd addresses": lambda x, w, bias, a, b: (
        torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape), w, bias, a, b
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((300, 320, 256, 8), (9000, 2048, 2048, 16)), ids=str)
def test_operands_lie_in_memory_as_they_like(shape, layout):
    (*values, scale), seed = case(shape)
    values = (*LAYOUTS[layout](*values), scale)
    y, got = run_as_they_lie(functional.linear, values, seed)
    wide = [v.detach().double() for v in values]
    want_y, want = gradients(dense, wide, (0, 3, 4), seed.double())
    assert (y.double() - want_y).norm() < 8e-3 * want_y.norm()
    for i, mine in zip((0, 3, 4), got):
        assert mine.dtype == values[i].dtype
        assert (mine.double() - want[i]).norm() <= 16e-3 * want[i].norm(), i


def run_as_they_lie(call, values, seed):
    """Output and gradients of x, A and B without a copy that would straighten them."""
    leaves = [v.detach().requires_grad_(i in (0, 3, 4)) for i, v in enumerate(values)]
    y = call(*leaves)
    return y.detach(), torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4)], seed)


@pytest.mark.parametrize(
    "x",
    (torch.rand(1, 7).t(), torch.rand(3, 1, 7).mT, torch.rand(7, 1, 1)),  # sums of one sign
)
def test_a_single_input_of_any_stride(x):
    x = x.cuda().bfloat16()
    (_, weight, bias, a, b, scale), _ = case((7, 1, 48, 4))
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = functional.linear(leaves[0], weight, bias, *leaves[1:], scale)
    got = torch.autograd.grad(y, leaves, torch.ones((), device="cuda", dtype=y.dtype).expand_as(y))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want_y = dense(wide[0], weight.double(), bias.double(), *wide[1:], scale.double())
    want = torch.autograd.grad(want_y.sum(), wide)
    assert (y.double() - want_y).norm() < 8e-3 * want_y.norm()
    for mine, true in zip(got, want):
        assert mine.shape == true.shape and (mine.double() - true).norm() <= 0.02 * true.norm()


def test_a_backward_outside_the_graph_that_holds_its_forward():
    (x, weight, bias, a, b, scale), seed = case((512, 320, 320, 8))
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]

    def forward():
        return functional.linear(leaves[0], weight, bias, *leaves[1:], scale)

    with torch.cuda.stream(torch.cuda.Stream()):
        want = torch.autograd.grad(forward(), leaves, seed)
    graph, y = recorded(forward)
    graph.replay()
    got = torch.autograd.grad(y, leaves, seed)
    torch.cuda.synchronize()
    for one, two in zip(got, want):
        assert (one.double() - two.double()).norm() <= 4e-3 * two.double().norm()


FORMATS = {
    "NCHW": torch.contiguous_format,
    "NHWC": torch.channels_last,
}


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("dy_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(4, 320, 32, 32, 640, 8), (3, 33, 7, 7, 20, 100), (1, 64, 5, 9, 48, 3)], ids=str
)
def test_a_convolution_of_kernel_1_reads_every_memory_format(shape, x_format, dy_format):
    torch.manual_seed(0)
    n, fan_in, height, width, out, r = shape
    layer = torch.nn.Conv2d(fan_in, out, 1).to("cuda", torch.bfloat16)
    a = torch.randn(r, fan_in, device="cuda") / fan_in**0.5
    b = torch.randn(out, r, device="cuda") / r**0.5
    x = torch.randn(n, fan_in, height, width, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(n, out, height, width, device="cuda", dtype=torch.bfloat16)
    x, dy = (t.to(memory_format=FORMATS[f]) for t, f in ((x, x_format), (dy, dy_format)))
    want_leaves = [t.double().requires_grad_() for t in (x, a, b, layer.bias)]
    total = layer.weight.double() + 0.7 * (want_leaves[2] @ want_leaves[1])[..., None, None]
    want_y = torch.nn.functional.conv2d(want_leaves[0], total, want_leaves[3])
    want = torch.autograd.grad(want_y, want_leaves, dy.double())
    leaves = [t.detach().requires_grad_() for t in (x, a, b, layer.bias)]
    y = convolution(
        leaves[0], layer.weight, leaves[3], leaves[1], leaves[2], torch.tensor(0.7, device="cuda"),
        (1, 1), (0, 0), (1, 1), 1,
    )  # fmt: skip
    got = torch.autograd.grad(y, leaves, dy)
    assert y.shape == dy.shape and y.is_contiguous(memory_format=FORMATS[x_format])
    assert (y.double() - want_y).norm() < 8e-3 * want_y.norm()
    for mine, true in zip(got, want):
        assert (mine.double() - true).norm() <= 0.016 * true.norm()


def test_a_convolution_of_kernel_1_keeps_a_small_update():
    torch.manual_seed(0)
    weight = torch.randn(320, 320, 1, 1, device="cuda", dtype=torch.bfloat16) / 320**0.5
    a, b = torch.randn(8, 320, device="cuda"), torch.randn(320, 8, device="cuda")
    b *= 1e-3 * weight.double().norm() / (b @ a).norm()
    x = torch.randn(8, 320, 64, 64, device="cuda", dtype=torch.bfloat16)
    y = convolution(x, weight, None, a, b, torch.ones((), device="cuda"), (1, 1), (0, 0), (1, 1), 1)
    base = torch.nn.functional.conv2d(x.double(), weight.double())
    update = torch.nn.functional.conv2d(x.double(), (b @ a).double()[..., None, None])
    kept = ((y.double() - base) * update).sum() / update.square().sum()
    assert 0.99 < kept < 1.01, kept


@pytest.mark.parametrize("kernel", ((), (1, 1), (3, 3)), ids=str)
def test_make_fx_is_shown_what_the_kernels_compute(kernel):
    """Of a linear layer and of convolutions: a launch would be missing in its graph."""
    torch.manual_seed(0)
    shape, size = (16, 16, *kernel), torch.Size(kernel).numel()
    weight = torch.randn(shape, device="cuda").bfloat16()
    a, b = torch.randn(4, 16 * size, device="cuda"), torch.randn(16, 4, device="cuda")
    x, other = (
        torch.randn(5, 16, *(9 for _ in kernel), device="cuda").bfloat16() for _ in range(2)
    )

    def call(x, scale):
        if kernel:
            return convolution(x, weight, None, a, b, scale, (1, 1), (0, 0), (1, 1), 1)
        return functional.linear(x, weight, None, a, b, scale)

    scale = torch.ones((), device="cuda")
    graph = make_fx(call)(x, scale)
    for value in (scale, 0 * scale):
        got, want = graph(other, value), call(other, value)
        assert (got - want).norm() <= 0.01 * want.norm()
