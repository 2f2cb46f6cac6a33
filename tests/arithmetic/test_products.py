"""Products of two thin factors: the nearest of a rank, without the dense matrix."""

import pytest
import torch

from paramlora.arithmetic import combine
from paramlora.arithmetic.products import nearest
from paramlora.update.value import Adapter, Update
from tests.arithmetic.sums import far, one, total


def test_the_random_numbers_are_the_same_each_time():
    matrix = torch.randn(300, 400)
    torch.manual_seed(7)
    first = nearest(matrix, 5)
    torch.manual_seed(8)
    assert torch.equal(first.left, nearest(matrix, 5).left)


def test_svd_is_the_nearest_of_its_rank():
    pairs = [(one(4, 1), 1.0), (one(5, 2, 0.2), -0.5)]
    done = combine(pairs, "svd", 3)
    expected = total(*pairs)
    u, s, v = torch.linalg.svd(expected)
    nearest = u[:, :3] * s[:3] @ v[:3]
    assert far(done.adapter.updates["q"], nearest) < 1e-6
    assert done.errors["q"] == pytest.approx(float((expected - nearest).norm() / expected.norm()))
    assert done.error == done.errors["q"]


def test_svd_forms_no_dense_matrix():
    """Of a matrix whose dense form would take 8 TB."""
    a = torch.randn(2, 1 << 20)
    b = torch.randn(1 << 20, 2)
    huge = Adapter({"q": Update(a, b)})
    found = combine([huge, (huge, 0.5)], "svd", 1).adapter.updates["q"]
    core = (found.lora_B.mT.double() @ b.double()) @ (a.double() @ found.lora_A.mT.double())
    values = torch.linalg.svdvals(
        torch.linalg.qr(b.double())[1] @ torch.linalg.qr(a.double().mT)[1].mT
    )
    assert float(core) == pytest.approx(1.5 * float(values[0]) ** 2, rel=1e-5)
