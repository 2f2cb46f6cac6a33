"""What a hostile file can cost: little time, little memory, one sentence, and nothing else."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramlora
from paramlora import Adapter, ConfigError, FileError, ParamloraWarning, Update, files, formats
from paramlora.config.reading import open_regular, parse_json
from paramlora.errors import closest, shown, spelled
from paramlora.files import opcodes, torch_save
from paramlora.files.adapters import convert, opened
from paramlora.files.checkpoint import Stored
from paramlora.files.safetensors import SafeFile
from paramlora.model.match import Names, Unbounded
from tests.files import hostile_files, resident

SCRIPT = Path(hostile_files.__file__)
ADAPTER = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1), shape=(3, 4), kind="linear")})
MOST_SECONDS, MOST_MEGABYTES = 10, 1024

REFUSED = {
    "fifo": "a pipe, and only regular files are read",
    "zero": "a device, and only regular files are read",
    "listening": "a socket, and only regular files are read",
    "fifo_as_index": "a pipe, and only regular files are read",
    "fifo_as_shard": "a pipe, and only regular files are read",
    "fifo_as_config": "a pipe, and only regular files are read",
    "zero_as_config": "a device, and only regular files are read",
    "zero_as_index": "a device, and only regular files are read",
    "fifo_as_hyperparameters": "a pipe, and only regular files are read",
    "index_of_values": "more values, or is nested deeper, than any real file",
    "config_of_values": "more values, or is nested deeper, than any real file",
    "header_of_99_mb": "a header of 99,000,010 bytes",
    "header_of_48_mb": "more values, or is nested deeper, than any real file",
    "header_of_strings": "more escaped characters than any real file",
    "header_of_tensors": "more values, or is nested deeper, than any real file",
    "metadata_of_values": "more values, or is nested deeper, than any real file",
    "a_name_twice": '"19999" stands twice',
    "shapes_of_many_digits": 'the "shapes" in its metadata are damaged',
    "shared_lists": "hold more, or deeper, than any real file",
    "shared_lists_without_tensors": "hold more, or deeper, than any real file",
    "deep_lists": "hold more, or deeper, than any real file",
    "a_list_in_itself": "hold more, or deeper, than any real file",
    "a_long_name_of_many": "hold more, or deeper, than any real file",
    "many_views": "its tensors take 3,000,000,000 bytes, and share the",
    "many_values": "more values than any real file",
    "codecs": "needs _codecs.encode",
    "numbers_of_one_hash": "more tuples as keys, or long numbers, than any real file",
    "a_sparse_adapter": "and the rest are holes, as a download leaves that has not ended",
    "deep_metadata": "nested too deeply",
    "deep_config": "nested too deeply",
    "huge_alpha": "lora_alpha of a: a whole number beyond any float is not a number",
    "huge_alpha_pattern": "lora_alpha of a: a whole number beyond any float is not a number",
    "huge_hyperparameters": "a whole number beyond any float is not a number",
    "hyperparameters_of_lists": "1,200,000 bytes, more than any real file of its kind",
    "shapes_that_lie": r"a.lora_A: shape \[1, 4\] does not fit \[1, 245\], of the weight",
    "groups_without_end": r"do not fit the shape \[3, 4\] in its metadata",
    "dense_of_another_size": "is more than the model's layer has. Not formed",
    "product_of_another_layout": "is more than any layer has. Not formed",
    "halves_of_a_product": "is more than any layer has. Not formed",
    "a_copy_of_another_size": r"of \[5, 4\] beside an update of \[300000, 300000\]",
    "huge_scale": '"scale" must be finite',
    "shapes_beyond_any": "has an offset or a shape that no tensor has",
    "nested_tensors": "needs torch._utils._rebuild_nested_tensor",
    "nested_jagged_tensors": "needs torch|is no dense tensor",
    "sparse_and_quantised": "is no dense tensor",
    "parentheses_in_an_old_file": "is nested too deeply",
    "patterns_of_an_old_file": "no entry of its configuration names",
    "one_pattern_of_an_old_file": "no entry of its configuration names",
    "a_long_name_of_an_old_file": "its tensors do not match its metadata",
    "unwritten_memory": "not a whole file of torch.save|needs torch",
}
BASES = {  # of checkpoints, not adapters
    "fifo_as_index": "merge of",
    "zero_as_index": "merge of",
    "fifo_as_shard": "merge of",
    "index_of_values": "merge of",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of every action on every file, in a process of its own."""
    place = tmp_path_factory.mktemp("files")
    child(place, "build", 1)
    lines = child(place, "read", 2).splitlines()
    return [json.loads(line) for line in lines]


def child(place, what, seed):
    root = str(SCRIPT.parents[2])
    more = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(
        [sys.executable, SCRIPT, what, place],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def test_every_file_is_read_or_refused(found):
    assert {line["case"] for line in found} == set(hostile_files.CASES)
    harmed = [line for line in found if line["kind"] in ("fault", "slow")]
    assert harmed == []


def test_no_file_takes_long_nor_much_memory(found):
    slowest = max(found, key=lambda line: line["seconds"])
    assert slowest["seconds"] < MOST_SECONDS, slowest
    largest = max(found, key=lambda line: line["peak"])
    assert largest["peak"] < MOST_MEGABYTES, largest


def test_every_message_is_one_line_that_a_terminal_can_print(found):
    bad = [line for line in found if not line["text"].isprintable() or len(line["text"]) >= 1000]
    assert bad == []


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_sentence(found, case):
    wanted = BASES.get(case)
    acts = ("load", "merge of") if case in ("fifo", "zero", "listening") else (wanted or "load",)
    lines = [line for line in found if line["case"] == case and line["act"] in acts]
    assert lines
    for line in lines:
        assert line["kind"] == "refused" and re.search(REFUSED[case], line["text"]), line


def test_the_command_line_exits_with_2(found):
    codes = {line["kind"] for line in found if line["act"] == "command"}
    assert codes == {"done", "refused"}
    without = {"dense_of_another_size", *BASES, *hostile_files.FEW}  # the size is the model's
    for case in REFUSED.keys() - without:
        kinds = {n["kind"] for n in found if n["case"] == case and n["act"] == "command"}
        assert kinds == {"refused"}, case


def test_sound_files_of_the_same_making_are_read(found):
    lines = [n for n in found if n["case"] == "written_memory" and n["act"] == "command"]
    assert [line["kind"] for line in lines] == ["done", "done"]


# patterns


def test_two_thousand_patterns_on_as_many_names_are_what_python_matches():
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(500) for x in "qkvo"]
    plain = {re.escape(name): i for i, name in enumerate(names)}
    assert Names(names).first(plain) == {name: i for i, name in enumerate(names)}
    assert Names(names).first([f"^{name}" for name in plain]) == plain_numbers(names)
    assert Names(names).first(names) == plain_numbers(names)
    mixed = [rf".*\.{i}\.(self_attn|mlp)\.[qk]_proj" for i in range(500)]
    found = Names(names).first(mixed)
    assert found == {f"model.layers.{i}.self_attn.{x}_proj": i for i in range(500) for x in "qk"}


def plain_numbers(names):
    return {name: number for number, name in enumerate(names)}


ATOMS = r"a b . \. [ab] [^a] \d \w (a|b) (?:ab|a) (?=a) (?!b) \b ^ $ (a*) (ab)* \Z \W".split()
OFTEN = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}", "{2,}", "+?"]


def test_any_pattern_matches_what_python_matches():
    draw = torch.Generator().manual_seed(0)

    def one(of):
        return of[int(torch.randint(len(of), (), generator=draw))]

    letters = ["", *"ab.1_", "\n"]
    names = ["".join(one(letters) for _ in range(5)) for _ in range(80)]
    for _ in range(800):
        pattern = "".join(one(ATOMS) + one(OFTEN) for _ in range(one(range(1, 6))))
        pattern = one([pattern, f"{pattern}|{one(ATOMS)}b", f"({pattern})*"])
        if re.search(r"[*+?}]\+", pattern):
            continue  # a part that gives nothing back, since Python 3.11
        try:
            whole, end = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            continue
        some = [name for name in names if "\n" not in name]
        assert Names(names).matching(pattern) == {n for n in some if whole.fullmatch(n)}, pattern
        assert set(Names(names).first([pattern])) == {n for n in some if end.match(n)}, pattern


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|aa)*", "(.*a){20}", "((a?){100}){100}", "(a*b?)*"]
)
def test_a_pattern_that_would_take_for_ever_is_matched(pattern):
    names = Names(["a" * 9_000, "a" * 9_000 + "c"])
    assert names.matching(pattern) == {"a" * 9_000}


@pytest.mark.parametrize(
    "pattern, why",
    [
        (r"(a)\1", "groupref"),
        ("(?<=a)b", "assert"),
        ("(?i)a", "flags"),
        ("(" * 3_000 + ")" * 3_000, "nested too deeply"),
        ("a" * 20_001, "20,001 characters"),
    ],
    ids=["back", "behind", "flags", "deep", "long"],
)
def test_a_pattern_that_needs_more_is_refused(pattern, why):
    with pytest.raises(Unbounded, match=why):
        Names(["a"]).matching(pattern)


def test_a_pattern_of_the_users_own_may_be_any():
    model = torch.nn.ModuleDict({"aa": torch.nn.Linear(4, 3)})
    paramlora.attach(model, {r"re:(a)\1": {"r": 1}})
    with pytest.raises(ConfigError, match="nested or repeated too deeply"):
        paramlora.attach(model, {"re:" + "(" * 3_000 + ")" * 3_000: {"r": 1}})


# messages


def test_names_are_shown_escaped_and_shortened():
    text = shown("\x1b[31m\n\r\u202e\ud800" + "x" * 300_000 + " y" * 300_000)
    assert text.isprintable() and len(text) < 1000 and "\\x1b[31m\\n\\r" in text
    error = FileError(f"{'n' * 300_000}\n: bad")
    assert str(error).endswith("\\n: bad") and len(str(error)) < 1000
    assert str(ParamloraWarning("a\x1b")) == "a\\x1b"
    assert shown("plain text, öäü") == "plain text, öäü"


VALUES = [10**5000, -(10**5000), [[[[[[[[10**5000]]]]]]]], "x" * 10**6]


@pytest.mark.parametrize("value", VALUES, ids=["long", "negative", "deep", "text"])
def test_values_are_spelled_however_long(value):
    assert len(spelled(value)) < 300
    with pytest.raises(ConfigError) as caught:
        paramlora.LoRAConfig.from_dict({"a": {"r": value, "hard": value}})
    assert len(str(caught.value)) < 1000


def test_the_closest_of_many_names_takes_no_long_time():
    assert closest("a" * 300_000, ["a"]) == []
    assert closest("to_qq", ["x" * 300_000, "to_q"]) == ["to_q"]


# files


def test_json_is_parsed_as_python_does():
    assert parse_json('{"a": [1, {"b": "\\n"}]}') == {"a": [1, {"b": "\n"}]}
    with pytest.raises(ValueError, match='"a" stands twice'):
        parse_json('{"a": 1, "b": 2, "a": 3}')


def test_a_link_to_a_regular_file_is_one(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"1"


def test_a_configuration_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "lora.json")
    with pytest.raises(ConfigError, match="lora.json: a pipe, and only regular files are read"):
        paramlora.LoRAConfig.from_file(tmp_path / "lora.json")


def base(folder):
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"a.weight": torch.ones(3, 4)}, folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def test_only_files_of_the_folder_itself_are_copied(tmp_path):
    folder, secret = base(tmp_path / "base"), tmp_path / "secret"
    secret.write_text("secret")
    (folder / "tokenizer.json").symlink_to(secret)
    (folder / "same.json").symlink_to("config.json")
    os.mkfifo(folder / "pipe")
    with pytest.warns(ParamloraWarning, match="links to elsewhere: tokenizer.json. Copy those"):
        files.merge(folder, [ADAPTER], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "same.json",
    }
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def cached(tmp_path):
    """A folder as the Hugging Face cache lays it out."""
    folder, blobs = base(tmp_path / "models--a" / "snapshots" / "1"), tmp_path / "models--a/blobs"
    blobs.mkdir()
    (folder / "config.json").rename(blobs / "123")
    (folder / "config.json").symlink_to("../../blobs/123")
    return folder, blobs


def test_a_snapshot_of_the_hugging_face_cache_is_copied_whole(tmp_path):
    folder, _ = cached(tmp_path)
    files.merge(folder, [ADAPTER], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_blobs_that_are_elsewhere_are_not(tmp_path):
    folder, blobs = cached(tmp_path)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(ParamloraWarning, match="config.json"):
        files.merge(folder, [ADAPTER], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_room_for_files_beside_is_checked_first(tmp_path):
    folder = base(tmp_path / "base")
    with open(folder / "notes.txt", "wb") as file:
        file.truncate(2**42)
    with pytest.raises(FileError, match=r"needs 4,398,\d+,\d+,\d+ bytes.*Nothing was written"):
        files.merge(folder, [ADAPTER], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_an_adapter_of_many_holes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("paramlora.files.safetensors.installed", lambda: 100)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.lora_A": torch.ones(1, 40), "a.lora_B": torch.ones(3, 1)}, path)
    with pytest.raises(FileError, match="its tensors take 172 bytes, and this machine has 100"):
        files.read_adapter(path)


@pytest.mark.filterwarnings("ignore:.*no place for what is said beside")  # of the 20 keys
@pytest.mark.parametrize("to", [*formats.WRITERS, "native"])
def test_a_conversion_writes_the_same_bytes_each_time(to, tmp_path):
    names = [f"m{i}.attn.{x}" for i in range(9) for x in ("q", "k", "v")]
    scale = 0.7 if to != "loralib" else 1.0
    updates = {name: Update(torch.ones(2, 4), torch.ones(4, 2), scale, (4, 4)) for name in names}
    many = Adapter(updates, metadata={f"key{i}": "x" for i in range(20)})
    paramlora.files.native.write_native(many, tmp_path / "a.safetensors")
    written = []
    for number in range(4):
        out = tmp_path / f"{number}"
        convert(tmp_path / "a.safetensors", out, to)
        parts = sorted(out.iterdir()) if out.is_dir() else [out]
        written.append([part.read_bytes() for part in parts])
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize(
    "start", [b"c", b"V", b"X\xff\xff\xff\x6f", b"\x8e" + bytes([0, 0, 0, 64] + [0] * 4)]
)
def test_a_name_of_an_old_file_of_holes_is_not_read_to_its_end(start, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x80\x02" + start)
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with no_longer_than(5), pytest.raises(FileError, match="not a whole file of torch.save"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def ends_of_zip(length, start, wide=None, remark=b""):
    """A zip file's last bytes: what they tell of its list, and where the wide record of it is."""
    first = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, length, start, len(remark)) + remark
    if wide is None:
        return first
    second = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, start)
    return second + struct.pack("<4sLQL", b"PK\6\7", 0, wide, 1) + first


@pytest.mark.parametrize("length, wide", [(17 << 20, False), (17 << 20, True), (2**31, False)])
def test_a_long_list_of_records_is_not_read(length, wide, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(hostile_files.zipped(b"")[:100])
    os.truncate(path, 100 + length)
    with open(path, "ab") as file:
        file.write(ends_of_zip(length, 100, 100 + length if wide else None))
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=f"{length:,} bytes of a list of records, more than"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_list_of_records_that_not_all_readers_find_is_refused(tmp_path):
    path, whole = tmp_path / "a.pt", io.BytesIO()
    torch.save({"a.lora_A": torch.ones(1, 4), "a.lora_B": torch.ones(3, 1)}, whole)
    sound = whole.getvalue()
    wide, where, end = len(sound) - 98, len(sound) - 42, len(sound) - 22  # torch writes all three
    (start,) = struct.unpack_from("<Q", sound, wide + 48)

    def changed(kind, at, number, more=b""):
        content = bytearray(sound)
        struct.pack_into(kind, content, at, number)
        return bytes(content) + more

    path.write_bytes(changed("<Q", wide + 48, start))
    assert opened(path).state.keys() == {"a.lora_A", "a.lora_B"}
    for content in (
        changed("<Q", where + 8, wide - 56),
        changed("<Q", wide + 48, start + 1),
        changed("<H", end + 20, 1, b"a"),
        sound + sound[end:],
        sound[:where] + sound[end:],
        sound[:40],
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match="its list of records is not at its end"):
            opened(path)


def test_a_record_of_a_name_in_other_letters_is_the_one_that_torch_reads(tmp_path):
    path = tmp_path / "a.pt"
    parts = {"a.lora_A": hostile_files.tensor((4, 4)), "a.lora_B": hostile_files.tensor((4, 4))}
    bad = {**parts, "a.lora_A": hostile_files.Call("torch.FloatTensor", (6, 6))}
    good = hostile_files.zipped(hostile_files.pickled(parts))
    other = hostile_files.zipped(hostile_files.pickled(bad)).replace(b"data.pkl", b"DATA.PKL")
    path.write_bytes(other)
    with pytest.raises(FileError, match="needs torch.FloatTensor"):
        torch_save.load(path)
    with zipfile.ZipFile(io.BytesIO(other)) as archive, zipfile.ZipFile(path, "w") as both:
        both.writestr("archive/DATA.PKL", archive.read("archive/DATA.PKL"))
        with zipfile.ZipFile(io.BytesIO(good)) as sound:
            for record in sound.infolist():
                both.writestr(record, sound.read(record))
    with pytest.raises(FileError, match="compressed, doubled or larger"):
        opened(path)
    with zipfile.ZipFile(path, "w") as twice:
        for name in ("a/data.pkl", "b/data.pkl"):
            twice.writestr(name, hostile_files.pickled(parts))
    with pytest.raises(FileError, match="2 records of names and values, and one is to be there"):
        opened(path)


def test_the_pickles_of_an_old_file_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(opcodes, "_MOST_STEPS", 1_000)
    path = tmp_path / "a.pt"
    one = b"\x80\x02](" + b"N" * 400 + b"e."
    for count, text in ((2, "pickle exhausted|whole file"), (3, "more values than any real file")):
        path.write_bytes(one * count)
        with pytest.raises(FileError, match=text):
            opened(path)


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


json_values = st.recursive(
    plain
    | st.sampled_from([10**400, -(10**4000), float("nan"), "(a+)+$", "re:(", "(a)\\1", "\x1b"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(names, inside, max_size=3),
    max_leaves=5,
)
CONFIG = (
    "peft_type r lora_alpha rank_pattern alpha_pattern target_modules target_parameters bias "
    "exclude_modules modules_to_save use_rslora fan_in_fan_out init_lora_weights paramlora_scales"
).split()


@given(
    config=st.dictionaries(
        st.sampled_from(CONFIG), json_values | st.just(["a", "a.w"]), max_size=5
    ),
    lora=st.booleans(),
)
@FUZZ
def test_any_configuration_beside_is_read_or_refused(config, lora, tmp_path):
    place = tmp_path / "peft"
    shutil.rmtree(place, ignore_errors=True)
    told = {**config, "peft_type": "LORA"} if lora else config
    hostile_files.folder(place, told, {**hostile_files.pairs(["base_model.model.a"]), "a.b": (1,)})
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3)})
    tried(lambda: paramlora.load_adapter(model, place, strict=False))


@given(
    index=json_values | st.fixed_dictionaries({"weight_map": json_values, "metadata": json_values})
)
@FUZZ
def test_any_index_is_read_or_refused(index, tmp_path):
    place = tmp_path / "base"
    if not place.exists():
        base(place)
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    tried(lambda: files.merge(place, [ADAPTER], tmp_path / "out", dry_run=True))


@given(
    header=st.dictionaries(
        names | st.just("__metadata__"),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E8M0"]) | json_values,
                "shape": sides | json_values,
                "data_offsets": st.just([0, 4]) | json_values,
            }
        ),
        max_size=3,
    ),
    size=st.sampled_from([0, 4, 48]),
)
@FUZZ
def test_any_header_is_read_or_refused(header, size, tmp_path):
    path = tmp_path / "any.safetensors"
    path.write_bytes(hostile_files.raw(json.dumps(header), bytes(size)))
    tried(lambda: opened(path))
    tried(lambda: files.merge(path, [ADAPTER], tmp_path / "out.safetensors", dry_run=True))


@given(about=st.fixed_dictionaries({k: json_values for k in ("format", "adapter", "config")}))
@FUZZ
def test_any_metadata_is_read_or_refused(about, tmp_path):
    path = tmp_path / "any.safetensors"
    about = {**about, "format": 1, "config": {"a": about["config"], "re:.*": {"r": 1}}}
    tensors = {f"a.{part}": shape for part, shape in hostile_files.NATIVE_PARTS}
    path.write_bytes(hostile_files.safe(tensors, {"paramlora": json.dumps(about)}))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3)})
    tried(lambda: paramlora.load_adapter(model, path))


def test_a_small_file_of_torch_save_may_become_shorter_once_it_is_open(tmp_path):
    """Mapped, it would end the process at the first number that is gone."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1_000_000)}, path)
    with Stored(path) as stored:
        os.truncate(path, 1_000)
        assert torch.equal(stored.read("a"), torch.ones(1_000_000))
    with pytest.raises(FileError, match="its list of records is not at its end"):
        Stored(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1_000_000)}, path)
    file = SafeFile(path)
    try:
        os.truncate(path, 1_000)
        with pytest.raises(FileError, match="it became shorter while it was read"):
            file.read("a")
    finally:
        file.close()


@pytest.mark.skipif(not resident.COUNTED, reason="counts memory as Linux does")
@pytest.mark.parametrize("how", [["written"], []], ids=["written", "holes"])
def test_a_large_file_that_fits_nothing_is_refused_before_it_is_read(how, tmp_path):
    script = SCRIPT.with_name("large_files.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, *how],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 150
    for name, verb, said, seconds, megabytes in found:
        assert said is not None, f"{verb} of {name} was accepted"
        assert how or "the rest are holes" in said, said
        assert seconds < 5 and megabytes < 256, (name, verb, seconds, megabytes)
