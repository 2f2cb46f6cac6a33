"""An entry's keys and values, as type checkers know them, are those that are parsed."""

from typing import get_args

import pytest

import paramlora
from paramlora import ConfigError, LoRAConfig
from paramlora.config import ALLOWED, DTYPES, INITS, KINDS
from paramlora.config.entry import Dtype, Init


@pytest.mark.parametrize("key, known", [("init", Init), ("adapter_dtype", Dtype)])
def test_its_choices_are_those_that_are_parsed(key, known):
    for choice in get_args(known):
        LoRAConfig.from_dict({"a": {"r": 2, key: choice}})
    with pytest.raises(ConfigError) as caught:
        LoRAConfig.from_dict({"a": {"r": 2, key: "another"}})
    assert all(choice in str(caught.value) for choice in get_args(known))


def test_an_entry_for_type_checkers_has_the_keys_that_are_read():
    own = {key for keys in KINDS.values() for key in keys.own}
    assert set(paramlora.Entry.__annotations__) == {*ALLOWED, *own}
    assert all(f"{key}" in paramlora.Entry.__doc__ for key in (*ALLOWED, *own))
    assert get_args(Dtype) == DTYPES and get_args(Init) == INITS
