"""torchtune's files, by its formula; and formats of one rank and scale."""

import pytest
import torch

from paramlora import formats
from paramlora.arithmetic.resize import resize
from paramlora.errors import FileError
from paramlora.formats import Content
from tests.formats.linears import adapter, read


def test_torchtune_by_its_formula():
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    state = {"block.a.lora_a.weight": a, "block.a.lora_b.weight": b}
    config = {"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["a"]}
    torch.testing.assert_close(read(Content(state, {}, config)).updates["block.a"].scale, 2.5)
    with pytest.raises(FileError, match="the scale is in adapter_config.json, which is missing"):
        read(Content(state))
    with pytest.raises(FileError, match="DoRA, which rescales .*: block.a.magnitude"):
        read(Content({**state, "block.a.magnitude": torch.ones(4)}, {}, config))


@pytest.mark.parametrize("name", ["litgpt", "torchtune"])
def test_formats_of_one_rank_and_scale_name_the_layer_that_differs(name):
    with pytest.raises(FileError, match="head: r = 3 and scale 0.7, while block.a has 2"):
        formats.write(adapter(ranks=(2, 2, 3)), name)
    with pytest.raises(FileError, match="block.b: r = 2 and scale 2, while block.a has 2 and 0.7"):
        formats.write(adapter(scales=(0.7, 2.0, 0.7)), name)


@pytest.mark.parametrize("name", ["litgpt", "torchtune"])
def test_the_way_out_of_several_ranks_or_scales_leads_out(name):
    scales = adapter(scales=(0.7, 2.0, 0.7))
    with pytest.raises(FileError, match=r"Fold scales .*--fold-scale\), or keep"):
        formats.write(scales, name)
    formats.write(scales, name, fold_scale=True)
    ranks = adapter(ranks=(2, 2, 3))
    for fold in (False, True):  # which makes no rank another
        with pytest.raises(FileError, match=r"Cut all to rank 2 \(paramlora resize\), or keep"):
            formats.write(ranks, name, fold_scale=fold)
    formats.write(resize(ranks, 2).adapter, name, fold_scale=True)
