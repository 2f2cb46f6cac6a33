"""litgpt's fused projections, by the formula of its LoRAQKVLinear."""

import pytest
import torch

from paramlora import formats
from paramlora.formats import Content, Slot
from paramlora.update.value import Adapter, Update


@pytest.mark.parametrize("on", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_the_fused_projection_of_litgpt(on):
    """Queries of 8 and keys and values of 4 rows, by the formula of its LoRAQKVLinear."""
    torch.manual_seed(0)
    sizes, r, path = (8, 4, 4), 2, "transformer.h.0.attn"
    trained = [s for s, here in zip(sizes, on) if here]
    a, b = torch.randn(r * len(trained), 6), torch.randn(sum(trained), r)
    config = dict(zip(("lora_query", "lora_key", "lora_value"), map(bool, on)))
    state = {f"{path}.qkv.lora_A": a, f"{path}.qkv.lora_B": b}
    base = {
        f"{path}.qkv": Slot((16, 6), "matrix", "linear", 1),
        f"{path}.proj": Slot((6, 8), "matrix", "linear", 1),
    }
    content = Content(state, {}, {**config, "lora_alpha": 6, "lora_r": r})
    assert formats.detect(content) == "litgpt"
    update = formats.read(content, base).updates[f"{path}.qkv"]
    want, row, block = torch.zeros(16, 6), 0, 0
    for start, size, here in zip((0, 8, 12), sizes, on):
        if here:
            part = b[row : row + size] @ a[block * r : block * r + r]
            want[start : start + size] = 3 * part
            row, block = row + size, block + 1
    torch.testing.assert_close(update.delta(), want)


def test_a_fused_projection_is_written_for_litgpt():
    torch.manual_seed(0)
    path = "transformer.h.0.attn.qkv"
    base = {path: Slot((18, 6), "matrix", "linear", 1)}
    plain = Adapter({path: Update(torch.randn(2, 6), torch.randn(18, 2), 0.7, (18, 6))})
    content = formats.write(plain, "litgpt", base)
    assert content.config["lora_r"] == 2
    back = formats.read(content, base).updates[path]
    torch.testing.assert_close(back.delta(), plain.updates[path].delta())
    again = formats.write(Adapter({path: back}), "litgpt", base)  # now of three blocks
    assert again.state.keys() == content.state.keys()
    for key, tensor in content.state.items():
        assert torch.equal(again.state[key], tensor)
