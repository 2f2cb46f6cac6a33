"""The compiled library: built on request, and left alone where that fails."""

import re
import warnings

import pytest
import torch

from paramlora.cuda.native import library
from paramlora.errors import ParamloraError, ParamloraWarning

steps = pytest.importorskip("paramlora.cuda.native.steps", reason="needs Triton")


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
        assert library.loaded() is None and steps.start(None, None) is None
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


@pytest.mark.parametrize("which", (0, 1))
def test_another_torch_or_source_has_another_place(which, empty, monkeypatch, tmp_path):
    before = library.place()
    monkeypatch.setattr(torch, "__version__", "2.0")
    other = library.place()
    sources = [*library._SOURCES]
    changed = tmp_path / sources[which].name
    changed.write_bytes(sources[which].read_bytes() + b" ")
    sources[which] = changed
    monkeypatch.setattr(library, "_SOURCES", tuple(sources))
    assert len({before, other, library.place()}) == 3
