"""What messages show of names and values, however many and long."""

import pytest

import paramlora
from paramlora import ConfigError, FileError, ParamloraWarning
from paramlora.errors import closest, counted, shown, spelled


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


def test_one_and_many():
    assert [counted(n, "update") for n in (0, 1, 2)] == ["0 updates", "1 update", "2 updates"]
