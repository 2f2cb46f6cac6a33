"""What any bytes may do to a reader: be read, or refused in one sentence, soon."""

import contextlib
import json
import signal
import struct
import warnings

import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import paramlora
from paramlora import Adapter, Update

LINEAR = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1), shape=(3, 4), kind="linear")})


def indexed(folder):
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"a.weight": torch.ones(3, 4)}, folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


# what is made by chance, of parts that mean something; a hang ends with the alarm's error

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
FUZZ = settings(FUZZ, suppress_health_check=[HealthCheck.function_scoped_fixture])
MARK = struct.pack("<f", 1.5)


class Late(BaseException):
    """No OSError, which a reader would take for a broken file."""


@contextlib.contextmanager
def no_longer_than(seconds):
    def late(number, frame):
        raise Late(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(action):
    """What an action gives, or None where it was refused; nothing else may come of it."""
    with no_longer_than(20), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except paramlora.ParamloraError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            return None


names = st.sampled_from(
    ["a.lora_A", "a.lora_B", "a.weight", "b", "\n", "a" * 300, "0", "state_dict"]
)
plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | names | st.floats()
sides = st.lists(st.sampled_from([0, 1, 3, 4, 12, -1, 2**40, 2**62]), max_size=3)


json_values = st.recursive(
    plain
    | st.sampled_from([10**400, -(10**4000), float("nan"), "(a+)+$", "re:(", "(a)\\1", "\x1b"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(names, inside, max_size=3),
    max_leaves=5,
)
