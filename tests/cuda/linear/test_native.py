"""A linear layer's step in C++: its numbers are Python's, whatever it is given, and what it does
not serve is left to Python."""

import re
import shutil
import sys
import warnings
from enum import IntEnum
from types import SimpleNamespace

import pytest
import torch

from paramlora.cuda.native import driver, library
from paramlora.cuda.native.handed import Described, handed
from paramlora.errors import ParamloraError, ParamloraWarning
from paramlora.evaluate import functional
from tests.cuda.started import printed

native = pytest.importorskip("paramlora.cuda.linear.native", reason="needs Triton")
compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
# the interpreter cuts off what bfloat16 would round: of the factors, of the thin product, of y
CUT = 2**-6


@pytest.fixture(scope="module")
def results():
    library.build()
    return printed("interpreted_native", TRITON_INTERPRET="1", PARAMLORA_NATIVE="1")


@compiled
def test_every_layer_has_pythons_numbers_and_float64s(results):
    layers = results["layers"]
    assert len(layers) == 17
    for name, told in layers.items():
        assert told["same"] and told["launches"] == ["forward", "backward"], name
        assert told["left to Python"] == 0 and max(told["errors"]) < CUT, (name, told)


@compiled
def test_whatever_comes_between_gives_pythons_numbers(results):
    """Hooks, threads, checkpoints, gradients of gradients, contexts: served, or left to Python, as
    each is told beside it."""
    assert len(results["events"]) == 20
    for name, told in results["events"].items():
        launches, left = told["as planned"]
        assert told["same"], name
        assert (sorted(told["launches"]), told["left to Python"]) == (sorted(launches), left), name


@compiled
def test_what_is_wrong_is_said_as_python_says_it(results):
    assert results["errors"]["cpp"] == results["errors"]["python"]
    assert [text.split(":")[0] for text in results["errors"]["cpp"]] == [
        *("RuntimeError", "ValueError", "RuntimeError", "RuntimeError")
    ]


@compiled
def test_any_launch_has_what_triton_would_hand_over(results):
    alone = results["alone"]
    assert len(alone) > 20 and all(alone.values()), alone
    assert {name.split(", ")[1] for name in alone} == {"0", "3"}  # matrices that are described


def test_both_sides_number_what_changes_alike():
    source = library._SOURCE.read_text(encoding="utf-8")
    told = re.search(r"enum Slot \{(.*?)\};", source, re.DOTALL)[1]
    names = re.findall(r"\w+", told)
    assert names == [*(slot.name for slot in native.Slot), "SLOTS"]
    assert [s.value for s in native.Slot] == list(range(len(native.Slot)))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("PARAMLORA_NATIVE", raising=False)
    library.loaded.cache_clear()
    yield tmp_path
    library.loaded.cache_clear()


def test_nothing_is_compiled_or_said_unasked(empty):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.loaded() is None and native.start(None) is None
    assert not any(empty.iterdir())


@pytest.mark.parametrize(
    "compiler, said", [("no-such-c++ -x", "no C++ compiler: no-such-c"), ("false", "false ended")]
)
def test_a_compiler_that_fails_is_told_and_leaves_nothing(compiler, said, empty, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ParamloraError, match=re.escape(said)):
        library.build()
    assert not [path for path in empty.rglob("*") if path.is_file()]


def test_what_cannot_be_loaded_is_told_once_and_python_goes_on(empty):
    library.place().parent.mkdir(parents=True)
    library.place().write_bytes(b"no library")
    with pytest.warns(ParamloraWarning, match="cannot be loaded .*numbers are the same"):
        assert library.loaded() is None


def test_the_environment_turns_it_off(empty, monkeypatch):
    library.place().parent.mkdir(parents=True)
    library.place().write_bytes(b"no library")
    monkeypatch.setenv("PARAMLORA_NATIVE", "0")
    assert library.loaded() is None


def test_another_torch_or_source_has_another_place(empty, monkeypatch, tmp_path):
    before = library.place()
    monkeypatch.setattr(torch, "__version__", "2.0")
    other = library.place()
    changed = tmp_path / "linear.cpp"
    changed.write_bytes(library._SOURCE.read_bytes() + b" ")
    monkeypatch.setattr(library, "_SOURCE", changed)
    assert len({before, other, library.place()}) == 3


def test_it_is_not_even_looked_for_without_a_kernel():
    assert "paramlora.cuda.linear.native" in sys.modules  # by this file alone
    if not torch.cuda.is_available():
        assert functional._native is None and not functional._started


# --- what the driver is handed: `native.handed` ---------------------------------------------------


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
