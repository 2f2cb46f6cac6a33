"""A sound file to damage, and what must become of it: refused, with nothing left behind."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings

import paramlora
from paramlora import Adapter, FileError, Update, files

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(3).bfloat16()}
ADAPTER = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1), shape=(3, 4))})
LONG_FUZZ = settings(max_examples=300, deadline=None, derandomize=True)
LONG_FUZZ = settings(LONG_FUZZ, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(path, text="", error=FileError):
    """Both opening and merging say the same, and leave nothing."""
    there = sorted(os.listdir(path.parent))
    with pytest.raises(error, match=text) as caught:
        files.merge(path, [ADAPTER], path.with_name(f"out{path.suffix}"))
    assert len(str(caught.value)) < 1000
    assert sorted(os.listdir(path.parent)) == there


def merged_or_refused(path):
    """A damaged file is refused, or still a whole file."""
    out = path.with_name(f"out{path.suffix}")
    try:
        files.merge(path, [ADAPTER], out)
    except paramlora.ParamloraError:
        assert not out.exists()
        return False
    out.unlink()
    return True


def safe_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFE = safetensors.torch.save(STATE, {"format": "pt"})
