"""cloneofsimo's files, whose factors stand in the order of the layers."""

import pytest
import torch
from torch import nn

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm, self.to_out = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.attn = nn.Linear(6, 6), CrossAttention()


@pytest.mark.parametrize("kind", ["list", "keys"])
def test_cloneofsimo_goes_by_the_order_of_layers(kind):
    net = nn.Sequential(Block(), Block())
    base, names = formats.base_of(net), ["0.attn.to_q", "0.attn.to_out", "1.attn.to_q"]
    names += ["1.attn.to_out"]
    ups = [torch.randn(base[n].shape[0], 2).half() for n in names]
    downs = [torch.randn(2, base[n].shape[1]).half() for n in names]
    if kind == "list":
        flat = [tensor for pair in zip(ups, downs) for tensor in pair]
        content = Content({str(i): tensor for i, tensor in enumerate(flat)})
    else:
        state = {f"unet:{i}:up": up for i, up in enumerate(ups)}
        state |= {f"unet:{i}:down": down for i, down in enumerate(downs)}
        content = Content(state, {"unet": '["CrossAttention", "GEGLU"]', "unet:0:rank": "2"})
    assert formats.detect(content) == "cloneofsimo"
    found = formats.read(content, base)
    assert list(found.updates) == names
    assert all(torch.equal(found.updates[n].lora_A, down) for n, down in zip(names, downs))
    with pytest.raises(FileError, match="4 updates, and the model has 2 inside"):
        formats.read(content, formats.base_of(nn.Sequential(Block())))
