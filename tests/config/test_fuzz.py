"""A sweep of any JSON: it is a configuration or one sentence that says why not, also where it meets
a model."""

import json
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import paramlora
from paramlora import ConfigError, LoRAConfig, ParamloraError
from paramlora.config import ALLOWED, KINDS

NAMES = [
    *(
        "type:Linear",
        "type:",
        "type:torch.nn.Linear",
        "type:a.b",
        "type:Linear\n",
        "type:型",
        "type:*",
    ),
    *(
        "attention",
        "all-linear",
        "re:.*",
        "re:(",
        "re:(a|a)*b",
        "re:(?i)A",
        "*",
        "*.*",
        "",
        ".",
        "0",
    ),
    *("q_proj", "attn.q_proj", "exclude", "trainable_model", "weight", "\x00", "type:sys.modules"),
]
KEYS = [*ALLOWED, *(key for keys in KINDS.values() for key in keys.own), "rnk", ""]
scalars = st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.sampled_from(NAMES)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=5,
)
entries = st.just({"r": 1}) | st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
excludes = st.lists(st.sampled_from(NAMES), max_size=3) | values
configs = st.fixed_dictionaries(
    {},
    optional={name: entries | values for name in NAMES if name != "exclude"}
    | {"exclude": excludes},
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)


def told(error):
    """A message is one line of an ordinary length that ends as a sentence or a question."""
    text = str(error)
    assert text.isprintable() and len(text) <= 1000 and text.rstrip().endswith((".", "?")), text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configs)
def test_any_value_is_a_configuration_or_one_sentence(data):
    try:
        config = LoRAConfig.from_dict(data)
    except ConfigError as error:
        return told(error)
    again = LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    model = nn.ModuleDict({"attn": Attention(), "0": nn.Linear(2, 2)})
    before = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = paramlora.targets(model, config)
        except ParamloraError as error:
            told(error)
        else:
            assert found and all(one.path is not None for one in found)
    assert list(model.state_dict()) == before
