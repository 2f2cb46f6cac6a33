"""A table's rows with a low-rank update: in Triton's interpreter, and on CUDA against float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from paramlora.evaluate import functional
from tests.cuda.started import printed

pytest.importorskip("triton")
EPS = 2**-10  # of float16


@pytest.fixture(scope="module")
def results():
    return printed("interpreted_embedding", TRITON_INTERPRET="1")


def test_rows_are_rounded_once_in_one_launch(results):
    assert len(results["rows"]) == 8 and results["launched"] == ["add"] * 8
    assert all(max(of["y"], of["u"]) < EPS for of in results["rows"].values()), results["rows"]


def test_a_gradient_is_the_same_in_any_order(results):
    assert len(results["gradients"]) == 8 * 4
    for name, of in results["gradients"].items():
        # of float32's sums, and one rounding of 16-bit factors, which hold no smaller numbers
        bound = 2e-6 if "narrow" not in name else EPS if "tiny" not in name else 1
        assert of["same"] and of["a"] <= bound, name


def test_what_is_not_finite_stays_where_it_is(results):
    assert len(results["not finite"]) == 3
    for of in results["not finite"].values():
        assert of["same"] and of["some"] and of["a"] < EPS


TABLES = [  # indices, the table, the rank
    ((16, 512), 50000, 1024, 16),
    ((600,), 500, 256, 8),
    ((3, 70), 50, 317, 5),
    ((1,), 1, 1, 1),
    ((4, 300), 30, 76, 64),
    ((5000,), 3, 64, 128),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("padding", (None, 0), ids=str)
@pytest.mark.parametrize("factors", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_a_frozen_table_on_cuda(case, factors, padding):
    torch.manual_seed(0)
    shape, num, dim, r = case
    ids, weight = torch.randint(num, shape, device="cuda"), torch.randn(num, dim, device="cuda")
    a, b = torch.randn(r, num, device="cuda"), torch.randn(dim, r, device="cuda") / r**0.5
    leaves = [a.to(factors), b.to(factors), torch.tensor(0.7, device="cuda")]
    leaves, weight = [t.requires_grad_() for t in leaves], weight.bfloat16()
    dy = torch.randn(*shape, dim, device="cuda").bfloat16()

    def step():
        y = functional.embedding(ids, weight, *leaves, padding, -1.5)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    first = step()
    for _ in range(8):
        assert all(map(torch.equal, first, step())), "not deterministic"
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = (weight.double() - 1.5 * wide[2] * (wide[1] @ wide[0]).t())[ids]
    kept = dy.double() if padding is None else dy.double() * (ids != padding)[..., None]
    want = torch.autograd.grad(true, wide, kept)
    eps = torch.finfo(torch.bfloat16).eps
    update = (true - weight.double()[ids]).norm()
    assert (first[0].double() - true).norm() <= eps / 2 * true.norm() + eps * update
    for mine, real in zip(first[1:3], want):
        assert (mine.double() - real).norm() <= 2 * eps * real.norm()
    terms = sum((w * g).norm() for w, g in zip(wide, want[:2]))
    assert (first[3].double() - want[2]).abs() <= 4 * eps * terms / 0.7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_index_that_is_not_there_is_told_by_torch():
    """In a process of its own, which an assertion on the device ends."""
    script = """
import torch
from paramlora.evaluate import functional
w, ids = torch.zeros(9, 16, device="cuda").bfloat16(), torch.tensor([3, 9], device="cuda")
a, b = torch.ones(4, 9, device="cuda"), torch.ones(16, 4, device="cuda")
functional.embedding(ids, w, a, b, torch.ones((), device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "Assertion" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_else_may_be_asked_of_a_frozen_table_on_cuda():
    """Gradients of gradients, many at once, one alone, and of a spread output."""
    torch.manual_seed(0)
    ids, weight = torch.randint(50, (70,), device="cuda"), torch.randn(50, 64, device="cuda")
    a, b = torch.randn(4, 50, device="cuda"), torch.randn(64, 4, device="cuda")
    leaves, scale = [a.requires_grad_(), b.requires_grad_()], torch.tensor(0.7, device="cuda")
    weight = weight.bfloat16()

    def ours(ids=ids):
        return functional.embedding(ids, weight, *leaves, scale)

    def plain():
        low = leaves[0].double().t()[ids] @ b.double().t()
        return F.embedding(ids, weight.double()) + 0.7 * low

    def close(got, want):
        for mine, real in zip(got, want):
            assert (mine.double() - real.double()).norm() <= 2**-6 * real.double().norm()

    y, true = ours(), plain()
    ones = torch.ones((), device="cuda").bfloat16().expand_as(y)
    close(torch.autograd.grad(y, leaves, ones), torch.autograd.grad(true, leaves, ones.double()))
    for one in leaves:
        got = torch.autograd.grad(ours(), [one], ones)
        close(got, torch.autograd.grad(plain(), [one], ones.double()))
    many = torch.randn(3, *y.shape, device="cuda").bfloat16()
    got = torch.autograd.grad(ours(), leaves, many, is_grads_batched=True)
    close(got, torch.autograd.grad(plain(), leaves, many.double(), is_grads_batched=True))

    def second(y):
        first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves)

    close(second(ours()), second(plain()))
