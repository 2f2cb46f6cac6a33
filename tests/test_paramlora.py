"""The package itself: its public names, and what importing it brings in."""

import subprocess
import sys

import pytest

import paramlora


def test_the_package_shows_its_public_names_alone():
    assert dir(paramlora) == sorted(paramlora.__all__)
    assert all(hasattr(paramlora, name) for name in dir(paramlora))
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        paramlora.atach  # noqa: B018


def test_exported_names_exist_once():
    assert len(set(paramlora.__all__)) == len(paramlora.__all__)
    assert all(getattr(paramlora, name, None) is not None for name in paramlora.__all__)


IMPORT = """
import sys
import torch
before = set(sys.modules)
import paramlora
assert not [name for name in sys.modules if name.startswith("paramlora.model")]
paramlora.attach
print("\\n".join(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
print(*(name for name in sys.modules if name.startswith("paramlora.")), sep="\\n")
"""


def test_importing_brings_in_no_heavy_library():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
    )
    added = set(done.stdout.split())
    assert {"paramlora", "paramlora.model.attach"} <= added
    later = (
        "formats interchange checkpoint native launch tiles fused joined kernels cli demo".split()
    )
    assert not added & {f"paramlora.{name}" for name in later}
    heavy = "typer rich matplotlib sklearn scipy pandas transformers diffusers peft tensorflow"
    assert not added & set(heavy.split())
