"""A sweep of what a hostile file can cost: little time, little memory, one sentence, and nothing
else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import paramlora
from paramlora import FileError, files
from tests.files import hostile_files, resident
from tests.files.fuzzed import FUZZ, json_values, tried

SCRIPT = Path(hostile_files.__file__)
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


def test_an_adapter_of_many_holes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("paramlora.files.safetensors.installed", lambda: 100)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.lora_A": torch.ones(1, 40), "a.lora_B": torch.ones(3, 1)}, path)
    with pytest.raises(FileError, match="its tensors take 172 bytes, and this machine has 100"):
        files.read_adapter(path)


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
    for name, verb, said, megabytes in found:
        assert said is not None, f"{verb} of {name} was accepted"
        assert how or "the rest are holes" in said, said
        assert megabytes < 64, (name, verb, megabytes)
