"""Any pickle is told without doing any of it: tensors of the file, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramlora import FileError
from paramlora.files import opcodes
from paramlora.files.adapters import opened
from tests.files import hostile_files
from tests.files.fuzzed import FUZZ, MARK, names, plain, sides, tried


def test_the_pickles_of_an_old_file_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(opcodes, "_MOST_STEPS", 1_000)
    path = tmp_path / "a.pt"
    one = b"\x80\x02](" + b"N" * 400 + b"e."
    for count, text in ((2, "pickle exhausted|whole file"), (3, "more values than any real file")):
        path.write_bytes(one * count)
        with pytest.raises(FileError, match=text):
            opened(path)


kinds = st.sampled_from("torch.FloatStorage torch.storage.UntypedStorage torch.LongStorage".split())
storages = st.builds(
    hostile_files.Stored, st.sampled_from("012"), st.sampled_from([0, 1, 3, 12, 2**40, -1]), kinds
)
tensors = st.builds(
    hostile_files.tensor,
    sides,
    storages,
    st.sampled_from([0, 0, 0, 1, 12, -1, 2**62]),
    st.sampled_from(["", "_v2", "_v2", "_v3"]),
    st.just((hostile_files.Global("torch.float32"),)),
)
functions = st.sampled_from(sorted(opcodes._CALLS | opcodes._NAMES | {"os.system", "torch.rand"}))


def nested(inside):
    few = st.lists(inside, max_size=3)
    many = few | few.map(tuple) | st.dictionaries(names, inside, max_size=3)
    calls = st.builds(
        hostile_files.Call, functions, few.map(tuple), st.sampled_from([b"R", b"\x81"])
    )
    return many | calls | st.builds(hostile_files.Built, inside, inside)


values = st.recursive(plain | tensors | storages | functions.map(hostile_files.Global), nested)


@given(content=st.dictionaries(names, values | tensors, min_size=1, max_size=4), old=st.booleans())
@FUZZ
def test_any_pickle_gives_tensors_of_the_file_or_is_refused(content, old, tmp_path):
    path = tmp_path / "any.pt"
    stored = {key: MARK * 12 for key in "012"}
    if old:
        value = hostile_files.with_views(content)
        path.write_bytes(hostile_files.legacy(value, stored, stored.values()))
    else:
        path.write_bytes(hostile_files.zipped(hostile_files.pickled(content), stored))
    found = tried(lambda: opened(path).state) or {}
    for tensor in found.values():
        inside = tensor.untyped_storage()
        assert bytes(inside) == (MARK * 12)[: len(inside)]
