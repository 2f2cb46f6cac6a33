"""LoKr's own formula and shapes, against Kronecker products written out block by block."""

import pytest
import torch

from paramlora.config import LoRAConfig
from paramlora.update.lokr import Lokr, factors, kron, low_rank, rank_of_product, split

FORMS = {
    "second of low rank": {"r": 1},
    "both of low rank": {"r": 1, "decompose_both": True},
    "second whole": {"r": 1, "full_matrix": True},
    "of given sizes": {"r": 1, "sizes": [[2, 6], [5, 2]]},
    "of a factor": {"r": 1, "factor": 2},
}


def sizes(shape, layout="matrix", **entry):
    entry = LoRAConfig.from_dict({"a": {"kind": "lokr", **entry}}).entries[0]
    return Lokr.sizes(entry, shape, layout)


def filled(shapes):
    torch.manual_seed(0)
    return {name: torch.randn(size, dtype=torch.float64) for name, size in shapes.items()}


def blocks(first, second):
    """Each element of the first times all of the second, in its place."""
    return torch.cat([torch.cat([one * second for one in row], 1) for row in first])


@pytest.mark.parametrize("name", FORMS)
def test_the_change_is_a_block_for_each_element_of_the_first(name):
    parts = filled(sizes((12, 10), **FORMS[name]))
    first = parts.get("lokr_w1")
    first = parts["lokr_w1_a"] @ parts["lokr_w1_b"] if first is None else first
    second = parts.get("lokr_w2")
    second = parts["lokr_w2_a"] @ parts["lokr_w2_b"] if second is None else second
    want = blocks(first, second)
    assert want.shape == (12, 10)
    torch.testing.assert_close(Lokr.change(parts), want)
    torch.testing.assert_close(kron(*factors(parts)), want)
    a, b = low_rank(parts)
    torch.testing.assert_close(b @ a, want)
    assert len(a) == rank_of_product(parts) == torch.linalg.matrix_rank(want)


@pytest.mark.parametrize("tucker", [False, True])
def test_a_convolutions_kernel_is_the_seconds(tucker):
    parts = filled(sizes((12, 6, 2, 3), r=1, tucker=tucker))
    assert ("lokr_t2" in parts) == tucker
    change = Lokr.change(parts).reshape(12, 6, 2, 3)
    for y in range(2):
        for x in range(3):
            if tucker:
                middle = parts["lokr_t2"][:, :, y, x]
                second = parts["lokr_w2_a"].t() @ middle @ parts["lokr_w2_b"]
            else:
                second = parts["lokr_w2_a"] @ parts["lokr_w2_b"].reshape(1, -1, 2, 3)[..., y, x]
            torch.testing.assert_close(change[:, :, y, x], blocks(parts["lokr_w1"], second))


@pytest.mark.parametrize("name", FORMS)
def test_its_options_are_told_by_what_it_holds(name):
    held = filled(sizes((12, 10), **FORMS[name]))
    told = dict(Lokr.options_of(held))
    again = sizes((12, 10), r=Lokr.rank_of(held), **told)
    assert again == {key: tuple(tensor.shape) for key, tensor in held.items()}


def test_a_rank_that_saves_nothing_makes_the_second_whole():
    # of 12 and 10 the second is of 4 and 5: half of the larger is 2.5
    assert "lokr_w2_a" in sizes((12, 10), r=2) and "lokr_w2" in sizes((12, 10), r=3)


@pytest.mark.parametrize("size", [1, 12, 127, 128, 250])
@pytest.mark.parametrize("factor", [-1, 2, 4, 8, 16])
def test_two_numbers_whose_product_is_a_side(size, factor):
    small, large = split(size, factor)
    assert small <= large and small * large == size
    divisors = [n for n in range(1, size + 1) if size % n == 0 and n * n <= size]
    if factor < 0:
        assert small == max(divisors)
    elif size % factor == 0:
        assert factor in (small, large)
    else:
        assert small == max(n for n in divisors if n <= factor)


def test_it_starts_at_nothing():
    torch.manual_seed(0)
    for options in FORMS.values():
        parts = {n: torch.ones(size) for n, size in sizes((12, 10), **options).items()}
        for name, own in parts.items():
            Lokr.start(name, own)
            bound = own[0].numel() ** -0.5
            assert name in ("lokr_w2", "lokr_w2_b") or own.any() and own.abs().max() <= bound
        assert not Lokr.change(parts).any()
