"""What stops a resize or a tie of a model of transformers leaves it as before it or as after it."""

import pytest
import torch
from stopping import PACKAGE, check_stops
from test_pretrained import CASES, attached, gpt2
from torch import nn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
BOTH = (PACKAGE, transformers.modeling_utils.__file__)  # whose lines run while updates are aside


def resized(model):
    torch.manual_seed(1)  # the new rows are drawn
    model.resize_token_embeddings(23)


@pytest.mark.parametrize("case", ["gpt2 tied", "t5 tied"])
def test_a_resize_stopped_at_every_line(case):
    check_stops("resize", attached(*CASES[case]), resized, BOTH)


def test_a_resize_of_rows_stopped_at_every_line():
    config = {"wte": {"rows": [0, 3], "kind": "rows"}, "c_attn": {"r": 2, "hard": 0}}
    check_stops("resize", attached(gpt2, config), resized, BOTH)


def test_a_tie_stopped_at_every_line():
    def untied():
        model = gpt2()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
        return model

    start = attached(untied, {"lm_head": {"r": 2}, "c_attn": {"r": 2, "hard": 0}})
    check_stops("tie", start, lambda model: model.tie_weights(), BOTH)
