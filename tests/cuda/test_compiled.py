"""The 16-bit CUDA kernels compile for devices that are not here, and fit them; see `compiled`.

How many blocks one multiprocessor then holds is computed by `benchmarks.tune.Limits`.
"""

import pytest

from benchmarks.tune import LIMITS, NEVER_RUN
from tests.cuda.started import printed

pytest.importorskip("triton")


EVERY = ((9, 0),)
A_FEW = {card.capability for card in NEVER_RUN.values()} - set(EVERY)


def compiled(capability, folder, *few):
    """What a block of each kernel takes: bytes of shared memory, warps, registers of a thread."""
    major, minor = capability
    return printed("compiled", f"{major}{minor}", *few, TRITON_CACHE_DIR=str(folder))


def resident(capability, taken):
    """Blocks that one multiprocessor holds at once, by kernel."""
    return {name: LIMITS[capability].resident(*of) for name, of in taken.items()}


@pytest.mark.parametrize("capability", EVERY, ids=str)
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    taken = compiled(capability, tmp_path)
    assert len(taken) > 30
    assert not [name for name, blocks in resident(capability, taken).items() if blocks < 1]


@pytest.mark.parametrize("capability", sorted(A_FEW), ids=str)
def test_kernels_of_each_operation_compile_for_cards_that_never_ran(capability, tmp_path):
    taken = compiled(capability, tmp_path, "few")
    assert len(taken) > 9
    assert not [name for name, blocks in resident(capability, taken).items() if blocks < 1]
