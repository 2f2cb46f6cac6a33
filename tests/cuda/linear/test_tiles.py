"""How a product's grid is divided: where rows lie, and how many blocks cover them."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from paramlora.cuda.device import Card
from paramlora.cuda.launches import Launches
from paramlora.cuda.linear.tiles import (
    Rows,
    Tiles,
    gradients,
    groups_of,
    is_even,
    projection,
    rows_of,
    tiling,
)

LAID = {
    "contiguous": torch.arange(24).view(2, 3, 4),
    "rows of a wider one": torch.arange(48).view(2, 3, 8)[..., :4],
    "some of each batch": torch.arange(40).view(2, 5, 4)[:, :3],
    "turned batches": torch.arange(24).view(3, 2, 4).transpose(0, 1),
    "one row": torch.arange(4).view(1, 1, 4),
    "a matrix": torch.arange(20).view(5, 4),
}


@pytest.mark.parametrize("name", LAID)
def test_rows_lie_where_they_are_told(name):
    """Each element is found at its place among the numbers, which are their own addresses."""
    t = LAID[name]
    rows = rows_of(tuple(t.shape), t.stride(), image=False)
    assert rows is not None and rows.M == t.shape[:-1].numel()
    flat, start = t.reshape(-1, t.shape[-1]), int(t.flatten()[0])
    for m, k in itertools.product(range(rows.M), range(t.shape[-1])):
        place = m // rows.period * rows.batch + m % rows.period * rows.row + k * rows.column
        assert int(flat[m, k]) - start == place
    batch, row, column = rows.places(rows.period)
    assert (row, column) == (rows.row, rows.column)
    assert batch == (rows.period * rows.row if rows.flat else rows.batch)


def test_what_only_a_copy_has_has_no_rows():
    columns = torch.arange(24).view(4, 6).t()
    repeated = torch.arange(4).expand(3, 4)
    four = torch.arange(120).view(2, 3, 4, 5).transpose(0, 1)[:, :1, ::2]
    assert rows_of(tuple(columns.shape), columns.stride(), False) is None
    assert rows_of(tuple(repeated.shape), repeated.stride(), False) is None
    assert rows_of(tuple(four.shape), four.stride(), False) is not None
    image = torch.arange(24).view(2, 4, 3).transpose(1, 2)  # channels first, as rows of positions
    assert rows_of(tuple(image.shape), image.stride(), False) is None
    assert rows_of(tuple(image.shape), image.stride(), True) == Rows(6, 3, 12, 1, 3)


@pytest.mark.parametrize("card", [Card((9, 0), 132), Card((8, 0), 108)])
@pytest.mark.parametrize("how", [Launches.TOGETHER, Launches.APART])
@pytest.mark.parametrize("sizes", [(70, 48, 64), (4096, 4096, 4096), (513, 512, 512), (1, 8, 8)])
def test_a_grid_has_a_block_for_every_element(sizes, how, card):
    M, N, K = sizes
    left, out = Rows(M, M, M * K, K, 1), Rows(M, M, M * N, N, 1)
    tiles = Tiles(left, out, M, (1, K), sizes, 8, card, False, how, True)
    used = tiles.tiling
    assert used == tiling(M, N, K, card.processors, card.hopper, how is Launches.TOGETHER, True)
    columns = -(-N // used.BN) + (how is Launches.TOGETHER)  # and one of the thin product
    assert tiles.grid == -(-M // used.BM) * columns
    assert tiles.grid // columns * used.BM >= M and tiles.grid // columns * used.BM - M < used.BM
    assert bool(tiles.layouts) == used.tma and (card.hopper or not used.tma)
    numbers = tiles.numbers("x", "y")
    assert (numbers["M"], numbers["N"], numbers["K"]) == sizes
    strides = {name: n for name, n in numbers.items() if name.startswith("stride_")}
    of_x, of_y = ({f"stride_{m}b": M * n, f"stride_{m}m": n} for m, n in (("x", K), ("y", N)))
    ones = {"stride_xk": 1, "stride_wk": 1, "stride_yn": 1}
    assert strides == {**of_x, **of_y, **ones, "stride_wn": K}


def test_a_block_is_a_power_of_two_in_every_choice():
    for M, size, aligned, local, alone in itertools.product(
        (1, 512, 513, 8192, 16384), (64, 640, 2048), *[(True, False)] * 3
    ):
        chosen = tiling(M, size, size, 132, aligned, local, alone)
        for side in chosen[:3]:
            assert side & (side - 1) == 0 and 16 <= side <= 256
        for R, drop in itertools.product((16, 64, 128, 256), (True, False)):
            depth, stages, warps = gradients(chosen, R, drop)
            assert depth in (32, 64, 128) and stages <= chosen.stages and warps in (4, 8)
            assert projection(M, R, True, drop)[0] in (
                (16, 32) if drop and R <= 64 else (16, 32, 64, 128)
            )


def test_a_batch_ends_with_a_block_or_is_all_there_is():
    assert is_even(7, 7) and is_even(256, 1024)
    assert not is_even(7, 14) and not is_even(192, 384)


def test_groups_share_out_the_rows_and_none_is_empty():
    for units, blocks, programs in itertools.product(range(1, 300), (1, 3, 40), (58, 132)):
        groups, each = groups_of(units, blocks, programs)
        assert (groups - 1) * each < units <= groups * each
        assert groups <= -(-units // 4)
        assert groups <= -(-programs // blocks)
