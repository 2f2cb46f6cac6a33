"""The 16-bit CUDA kernels compile for devices that are not here, and fit them; see
`compiled_all`.

How many blocks one multiprocessor then holds is computed by `benchmarks.tune.Limits`.
"""

from importlib import import_module
from pathlib import Path

import pytest

import paramlora
from benchmarks.tune import LIMITS, NEVER_RUN
from tests.cuda.started import printed

triton = pytest.importorskip("triton")

NEVER = sorted({card.capability for card in NEVER_RUN.values()})


def kernels():
    """Every kernel that is launched, as folder.name."""
    folders = (
        path.parent.name for path in Path(paramlora.__file__).parent.glob("cuda/*/kernels.py")
    )
    for folder in folders:
        module = import_module(f"paramlora.cuda.{folder}.kernels")
        for name, found in vars(module).items():
            own = isinstance(found, triton.JITFunction) and found.fn.__module__ == module.__name__
            called = folder == "masks" and name != "mask"  # by other folders' kernels
            if own and not name.startswith("_") and not called:
                yield f"{folder}.{name}"


def compiled(capability, folder, *few):
    """What a block of each kernel takes: bytes of shared memory, warps, registers of a thread."""
    number = "".join(map(str, capability))
    return printed("compiled_all", number, *few, TRITON_CACHE_DIR=str(folder))


def resident(capability, taken):
    """Blocks that one multiprocessor holds at once, by kernel."""
    return {name: LIMITS[capability].resident(*of) for name, of in taken.items()}


def test_every_kernel_compiles_and_fits(tmp_path):
    taken = compiled((9, 0), tmp_path)
    assert len(taken) > 80
    assert {name.split()[0] for name in taken} == set(kernels())
    assert not [name for name, blocks in resident((9, 0), taken).items() if blocks < 1]


@pytest.mark.parametrize("capability", NEVER, ids=str)
def test_every_kernel_compiles_once_for_cards_that_never_ran(capability, tmp_path):
    taken = compiled(capability, tmp_path, "few")
    assert {name.split()[0] for name in taken} == set(kernels())
    assert not [name for name, blocks in resident(capability, taken).items() if blocks < 1]
