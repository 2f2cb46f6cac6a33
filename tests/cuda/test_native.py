"""A linear layer's step in C++: its numbers are Python's, whatever it is given, and what it does
not serve is left to Python."""

import re
import shutil
import sys
import warnings

import pytest
import torch

from paramlora.cuda.native import library
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


def test_both_sides_number_what_changes_alike():
    source = library._SOURCE.read_text(encoding="utf-8")
    told = re.search(r"enum Slot \{(.*?)\};", source, re.DOTALL)[1]
    names = [n for n in re.findall(r"\w+", told.replace("STREAM = ADDRESSES", "STREAM"))]
    assert [n for n in names if n not in ("ADDRESSES", "SLOTS")] == [s.name for s in native.Slot]
    assert [s.value for s in native.Slot] == list(range(len(native.Slot)))
    assert names.index("ADDRESSES") == native.Slot.STREAM  # after which no address comes


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("PARAMLORA_NATIVE", raising=False)
    return tmp_path


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
