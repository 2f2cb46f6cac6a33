"""Files that others made: regular ones, and JSON as Python parses it."""

import os

import pytest

import paramlora
from paramlora import ConfigError
from paramlora.config.reading import open_regular, parse_json


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
