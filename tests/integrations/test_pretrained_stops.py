"""A sweep of every line: what stops a resize or a tie of a model of transformers leaves it as
before it or as after it."""

import pytest
import torch
from torch import nn

from paramlora import AdapterError
from tests.integrations.test_pretrained import CASES, attached, gpt2, llama
from tests.model.stopping import PACKAGE, check_stops, picture

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
BOTH = (PACKAGE, transformers.modeling_utils.__file__)  # whose lines run while updates are aside


def resized(model):
    torch.manual_seed(1)  # the new rows are drawn
    model.resize_token_embeddings(23)


def test_a_resize_stopped_at_every_line():
    check_stops("resize", attached(*CASES["gpt2 tied"]), resized, BOTH)


def test_a_resize_of_other_kinds_stopped_at_every_line():
    config = {"embed_tokens": {"rows": [0, 3], "kind": "rows"}, "q_proj": {"r": 2, "hard": 0}}
    start = attached(llama, {**config, "lm_head": {"r": 2, "init": "pissa"}})
    check_stops("resize", start, resized, BOTH)


def test_a_resize_that_is_refused_half_way_leaves_the_model_as_it_was():
    model = attached(llama, {"lm_head": {"r": 2}, "embed_tokens": {"rows": [0, 3]}})
    before = picture(model)
    with pytest.raises(AdapterError, match='"default": it trains row 3, and 2 would be left'):
        model.resize_token_embeddings(2)
    assert picture(model) == before


def test_a_tie_stopped_at_every_line():
    def untied():
        model = gpt2()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
        return model

    start = attached(untied, {"lm_head": {"r": 2}, "c_attn": {"r": 2, "hard": 0}})
    check_stops("tie", start, lambda model: model.tie_weights(), BOTH)
