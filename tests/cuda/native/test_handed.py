"""What the driver is handed of a launch, and what is left to Python."""

from enum import IntEnum
from types import SimpleNamespace

import pytest

from paramlora.cuda.native import driver
from paramlora.cuda.native.handed import Described, handed


class Place(IntEnum):
    X = 0
    STRENGTH = 1
    BLOCK = 2


def kernel_of(changed=None, **about):
    """A kernel as Triton tells it: a matrix for the memory engine, an address, numbers of 32 and 64
    bits, one that is 1 and so compiled in, a constant; and the driver's sizes of its parameters."""
    kinds = ["tensordesc<bf16[8, 16]>", "*bf16", "fp32", "i32", "i64", "constexpr", "constexpr"]
    load = {"swizzle": 1, "block_size": [8, 16], "fp4_padded": False}
    plain = dict(num_warps=4, num_ctas=1, shared=96, launch_pdl=False, tensordesc_meta=[load])
    plain |= dict(launch_cooperative_grid=False, global_scratch_size=0, profile_scratch_size=0)
    metadata = SimpleNamespace(**{**plain, **about})
    source = SimpleNamespace(signature=dict(enumerate(changed or kinds)))
    return SimpleNamespace(function=5, src=source, metadata=metadata), load


SIZES = [128, 4, 4, 8, 8, 8, 4, 4, 8, 8, 8]
MATRIX = Described(Place.X, ([40, 32], [48, 1], [8, 16]))
GIVEN = (MATRIX, Place.X, Place.STRENGTH, -7, 2**40, 1, 64)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(driver, "sizes_of", lambda kernel: {5: SIZES}[kernel])


def test_a_launch_is_told_as_the_driver_takes_it(counted):
    told = handed(kernel_of()[0], 9, GIVEN, Place.BLOCK)
    fixed = [(-1, n) for n in (40, 32, 48, 1)]
    numbers = [(-1, 2**64 - 7), (-1, 2**40)]
    assert told.parameters == [
        *((2, 0), *fixed, (0, 0), (1, 0), *numbers, (-1, 0), (-1, 0))
    ]  # fmt: skip
    assert told.blocks == [(0, 1, (8, 16), (40, 32), 96, 9)]
    assert told[:6] == (5, 9, 128, 96, False, Place.BLOCK)
    early = handed(kernel_of(launch_pdl=True)[0], 9, GIVEN, Place.BLOCK)
    assert early == told._replace(early=True)


@pytest.mark.parametrize(
    "more",
    [
        {"launch_cooperative_grid": True},
        {"num_ctas": 2},
        {"global_scratch_size": 8},
        {"profile_scratch_size": 8},
        {"tensordesc_meta": None},
    ],
    ids=str,
)
def test_a_launch_that_needs_more_is_left_to_python(more, counted):
    assert handed(kernel_of(**more)[0], 9, GIVEN, Place.BLOCK) is None


def test_another_triton_is_left_to_python(counted, monkeypatch):
    kernel, load = kernel_of()
    assert handed(kernel, 9, GIVEN[:-1], Place.BLOCK) is None
    for kind in ("u8", "fp64", "tensordesc<bf16[8, 16]>"):
        other, _ = kernel_of(
            ["tensordesc<bf16[8, 16]>", "*bf16", "fp32", kind, "i64", *2 * ["i32"]]
        )
        assert handed(other, 9, GIVEN, Place.BLOCK) is None
    constant, _ = kernel_of(
        ["tensordesc<bf16[8, 16]>", "*bf16", "constexpr", "i32", "i64", *2 * ["constexpr"]]
    )
    assert handed(constant, 9, GIVEN, Place.BLOCK) is None  # a number that changes
    load["fp4_padded"] = True
    assert handed(kernel, 9, GIVEN, Place.BLOCK) is None
    del kernel.metadata.num_ctas
    assert handed(kernel, 9, GIVEN, Place.BLOCK) is None


@pytest.mark.parametrize("sizes", [SIZES[:-1], [*SIZES, 8], [64, *SIZES[1:]]], ids=str)
def test_parameters_that_the_driver_counts_otherwise_are_left_to_python(sizes, monkeypatch):
    monkeypatch.setattr(driver, "sizes_of", lambda kernel: sizes)
    assert handed(kernel_of()[0], 9, GIVEN, Place.BLOCK) is None
