"""SGLang's folder: vLLM's form of it at any rank, and what it does not load by its own name."""

import pytest
import torch

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats.vllm import MOST_RANK
from paramlora.update.value import Adapter, Update


def layer(r, scale, seed):
    torch.manual_seed(seed)
    return Update(torch.randn(r, 6), torch.randn(4, r), scale, (4, 6), kind="linear")


def test_every_factor_is_of_the_one_rank_and_the_products_stay():
    updates = {"q_proj": layer(1, 3.0, 0), "o_proj": layer(3, 0.5, 1)}
    content = formats.write(Adapter(updates), "sglang")
    config = content.config
    assert config["r"] == 3 and not config["rank_pattern"] and not config["alpha_pattern"]
    for path, update in updates.items():
        a, b = (content.state[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert len(a) == b.shape[1] == 3
        want = update.scale * update.lora_B.double() @ update.lora_A.double()
        torch.testing.assert_close(config["lora_alpha"] / 3 * b @ a, want, rtol=1e-6, atol=1e-6)


def test_its_rank_may_be_any_number():
    large = Adapter({"q_proj": layer(MOST_RANK + 1, 1.0, 0)})
    content = formats.write(large, "sglang")
    assert content.config["r"] == MOST_RANK + 1
    with pytest.raises(FileError, match=f"rank {MOST_RANK + 1} is above the {MOST_RANK}"):
        formats.write(large, "vllm")


def test_what_it_does_not_load_is_refused_under_its_name():
    with pytest.raises(FileError, match="lm_head: a head, which SGLang adapts only in models that"):
        formats.write(Adapter({"lm_head": layer(1, 1.0, 0)}), "sglang")
