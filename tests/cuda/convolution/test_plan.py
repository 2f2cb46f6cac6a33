"""16-bit convolutions on CUDA, against float64 and against each other."""

import pytest
import torch

from paramlora.cuda import operands as served
from paramlora.evaluate.convolution import convolution
from tests.cuda.convolutions import compare_convolutions, convolved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
joining = pytest.importorskip("paramlora.cuda.convolution.plan", reason="needs Triton")


CONVOLUTIONS = [  # input's batch and sizes, weight, rank, stride, padding, dilation; served
    ((8, 64, 64), (320, 320, 3, 3), 8, 1, 1, 1, True),
    ((2, 8, 8), (640, 320, 3, 3), 32, 2, 1, 1, True),
    ((2, 17, 9), (20, 33, 3, 3), 4, 1, 2, 2, True),
    ((3, 12, 11), (8, 16, 3, 1), 9, (2, 3), (1, 0), 1, True),
    ((2, 8, 8), (7, 300, 2, 2), 64, 2, 0, 1, True),
    ((2, 6, 7), (9, 16, 3, 3), 16, 1, 1, 1, True),  # no channel is left for the bias
    ((3, 40), (7, 4, 5), 3, 2, 2, 1, True),
    ((2, 5, 6, 4), (6, 5, 2, 3, 4), 2, 1, (0, 1, 1), 1, True),
    ((2, 9, 9), (20, 33, 3, 3), 4, 1, 2, 1, False),  # a middle that meets the padding
    ((2, 9, 9), (20, 33, 3, 3), 100, 1, 1, 1, False),  # a wide rank
]


@pytest.mark.parametrize("formats", ("", "x", "w", "y", "xwy", "e"), ids="last:{}".format)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_a_convolution_and_its_gradients(case, dtype, formats):
    """In every memory format of x, the weight and dy, which may also be expanded."""
    *case, taken = case
    leaves, where, seed = convolved(*case, dtype, formats)
    assert (joining.forward(served.Operands(*leaves), where) is not None) == taken
    compare_convolutions(leaves, where, seed, 1, taken)


ONE = ((4, 32, 32), (64, 48, 1, 1), 8, 1, 0, 1, True)  # position of the kernel


@pytest.mark.parametrize("rates", ((0.25,), (0.25, 0.5)), ids=str)
@pytest.mark.parametrize("formats", ("", "xwy", "e"), ids="last:{}".format)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", [*CONVOLUTIONS[1:], ONE], ids=str)
def test_a_convolution_that_drops_inputs_and_its_gradients(case, dtype, formats, rates):
    leaves, where, seed = convolved(*case[:-1], dtype, formats)
    one = case[-1] and dtype == torch.bfloat16
    compare_convolutions(leaves, where, seed, 1, one, rates)


@pytest.mark.parametrize("inner", (320, 1))
def test_a_convolution_keeps_a_small_update(inner):
    torch.manual_seed(0)
    weight = torch.randn(320, inner, 3, 3, device="cuda", dtype=torch.bfloat16) / 3 / inner**0.5
    a, b = torch.randn(8, 9 * inner, device="cuda"), torch.randn(320, 8, device="cuda")
    groups = 320 // inner
    b *= 1e-3 * weight.double().norm() / (b @ a).norm()
    x = torch.randn(8, 320, 32, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    one, where = torch.ones((), device="cuda"), ((1, 1), (1, 1), (1, 1))
    y = convolution(x, weight, None, a, b, one, *where, groups)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    delta, wide = (b @ a).double().reshape(weight.shape), x.detach().double().requires_grad_()
    for mine, of in (
        (y, lambda t: t),
        (dx, lambda t: torch.autograd.grad(t, wide, dy.double())[0]),
    ):
        base, update = (
            of(torch.nn.functional.conv2d(wide, w, None, *where, groups)).detach()
            for w in (weight.double(), delta)
        )
        kept = ((mine.double() - base) * update).sum() / update.square().sum()
        assert 0.98 < kept < 1.02, kept


def test_a_captured_convolution_is_the_eager_one():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
    a, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((8, 576), (64, 8)))
    scale, dy = torch.ones((), device="cuda"), torch.randn_like(x)

    def step():
        y = convolution(x, weight, None, a, b, scale, (1, 1), (1, 1), (1, 1), 1)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for one, two in zip(eager, captured):
            assert torch.equal(one, two)
