"""A sweep of low-rank embeddings' sizes in 16 bits, on a CPU and on CUDA, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from paramlora.evaluate import functional
from tests.cuda.graphs import recorded

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu])
DEVICES, LOW = ("cpu", CUDA), (torch.bfloat16, torch.float16)
TABLES = [  # the indices' shape, the table, the rank
    ((600,), 500, 256, 16), ((3, 70), 50, 317, 5), ((1,), 1, 1, 1), ((), 9, 40, 8),
    ((4, 12), 30, 76, 64), ((600,), 100, 32, 128), ((40,), 30, 64, 300),
]  # fmt: skip


@pytest.fixture(autouse=True)
def needs_its_device(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    torch.manual_seed(0)


def table(case, device, dtype):
    """Indices; weight, A, B and scale; the output's gradient."""
    shape, num, dim, r = case
    rows = torch.randint(num, shape, device=device)
    weight = torch.randn(num, dim, device=device).to(dtype)
    a, b = torch.randn(r, num, device=device), torch.randn(dim, r, device=device) / r**0.5
    seed = torch.randn(*shape, dim, device=device).to(dtype)
    return rows, [weight, a, b, torch.tensor(0.7, device=device)], seed


def looked_up(rows, values, seed, padding=None, strength=1.0):
    """Output and all gradients; of float64 by the dense sum."""
    leaves = [v.detach().requires_grad_() for v in values]
    if leaves[0].dtype == torch.float64:
        weight, a, b, scale = leaves
        y = (weight + strength * scale * (b @ a).t())[rows]
        seed = seed.double() if padding is None else seed * (rows != padding)[..., None].double()
    else:
        y = functional.embedding(rows, *leaves, padding, strength)
    return y.detach(), torch.autograd.grad(y, leaves, seed)


def check(rows, values, seed, padding=None, strength=1.0):
    y, got = looked_up(rows, values, seed, padding, strength)
    again, twice = looked_up(rows, values, seed, padding, strength)
    assert torch.equal(y, again) and all(map(torch.equal, got, twice)), "not deterministic"
    wide = [v.double() for v in values]
    true, want = looked_up(rows, wide, seed, padding, strength)
    eps = torch.finfo(y.dtype).eps
    assert y.dtype == values[0].dtype and y.shape == true.shape and y.is_contiguous()
    # one rounding of the sum, and one of each factor
    update = (true - wide[0][rows]).norm()
    assert (y.double() - true).norm() <= eps / 2 * true.norm() + eps * update
    own = values[0].detach().requires_grad_()
    F.embedding(rows, own, padding).backward(seed)
    assert torch.equal(got[0], own.grad)
    for i in (1, 2):
        assert got[i].dtype == values[i].dtype
        assert (got[i].double() - want[i]).norm() <= 2 * eps * want[i].norm(), i
    terms = ((wide[i] * want[i]).norm() for i in (1, 2))  # the scale's gradient is a sum of these
    assert (got[3].double() - want[3]).abs() <= 4 * eps * sum(terms) / 0.7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_an_embedding_of_every_size_and_rank(case, dtype, device):
    check(*table(case, device, dtype), strength=-1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", (TABLES[0], TABLES[1], TABLES[3]), ids=str)
def test_the_padding_row_is_rounded_once_and_gives_no_gradient(case, dtype, device):
    rows, values, seed = table(case, device, dtype)
    rows.view(-1)[::5] = 3
    check(rows, values, seed, 3)
    alone = torch.full_like(rows, 3)
    y, grads = looked_up(alone, values, seed, 3)
    assert torch.equal(y, looked_up(alone, values, seed)[0])
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("there", (True, False))
@pytest.mark.parametrize("device", DEVICES)
def test_no_gradient_of_padding_arrives_whoever_asks(there, device):
    rows, values, seed = table(TABLES[1], device, torch.float32)
    rows.view(-1)[::5] = 3 if there else 4
    leaves = [value.double().requires_grad_(i > 0) for i, value in enumerate(values)]
    seed = seed.double().masked_fill((rows == 3)[..., None], torch.nan)

    def plain(*leaves):
        weight, a, b, scale = leaves
        dense = weight + scale * (b @ a).t()
        return torch.where((rows == 3)[..., None], dense[rows].detach(), dense[rows])

    def ours(*leaves):
        return functional.embedding(rows, *leaves, 3)

    def asked(compute):
        return torch.autograd.grad(compute(*leaves), leaves[1:], seed)

    def second(compute):
        first = torch.autograd.grad(
            compute(*leaves), leaves[1:], torch.ones_like(seed), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves[1:])

    def many(compute):
        both = torch.stack([torch.ones_like(seed), seed.nan_to_num()])
        return torch.autograd.grad(compute(*leaves), leaves[1:], both, is_grads_batched=True)

    for ask in (asked, second, many):
        for got, want in zip(ask(ours), ask(plain)):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    shown = make_fx(ours)(*(leaf.detach() for leaf in leaves))
    torch.testing.assert_close(shown(*leaves), plain(*leaves), rtol=1e-9, atol=1e-9)


LAYOUTS = {
    "int32": lambda rows, *values: (rows.int(), *values),
    "spread indices": lambda rows, *values: (rows.repeat_interleave(2, -1)[..., ::2], *values),
    "columns": lambda rows, *values: (rows, *(v.t().contiguous().t() for v in values)),
    "spread": lambda rows, *values: (rows, *(v.repeat(1, 2)[:, : v.shape[1]] for v in values)),
    "narrow factors": lambda rows, *values: (rows, *(v.to(values[0].dtype) for v in values)),
    "odd addresses": lambda rows, *values: (
        rows, *(torch.cat([v.flatten(), v[0, :1]])[1:].view(v.shape) for v in values)
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operands_lie_in_memory_as_they_like(layout, device):
    rows, (*values, scale), seed = table(TABLES[1], device, torch.bfloat16)
    rows, *values = LAYOUTS[layout](rows, *values)
    check(rows, [*values, scale], seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", (None, 3))
@pytest.mark.parametrize("dtype", LOW)
def test_an_embedding_keeps_what_its_type_can_hold_of_a_small_update(dtype, padding, device):
    rows, (weight, a, b, scale), _ = table(((4096,), 2000, 512, 8), device, dtype)
    b *= 1e-3 * weight.double().norm() / (scale * b @ a).norm()
    base, update = weight.double()[rows], (scale * b @ a).double().t()[rows]

    def kept(y):
        return ((y.double() - base) * update).sum() / update.square().sum()

    y = functional.embedding(rows, weight, a, b, scale, padding)
    best = kept((base + update).to(dtype))
    assert abs(kept(y) - best) < 0.01 and best > (0.99 if dtype == torch.float16 else 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", (None, 3))
def test_a_cuda_graph_holds_an_embeddings_step_and_replays_it(padding):
    rows, values, seed = table(TABLES[0], "cuda", torch.bfloat16)
    leaves = [v.requires_grad_() for v in values[1:]]

    def step():
        y = functional.embedding(rows, values[0], *leaves, padding)
        return y, *torch.autograd.grad(y, leaves, seed)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    graph, held = recorded(step)
    for factor in (1.0, 0.5, -3.0):
        with torch.no_grad():
            rows.copy_(rows.flip(0)), leaves[1].mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, held, step()))
