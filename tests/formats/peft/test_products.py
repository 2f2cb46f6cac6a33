"""peft's LoHa and LoKr folders, read as what they are."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import formats
from paramlora.files import convert, merge

CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=["0", "3"], init_weights=False),
    "loha tucker": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=["0", "3"], use_effective_conv2d=True, init_weights=False
    ),
    "loha by name": lambda: peft.LoHaConfig(
        r=3,
        alpha=2,
        target_modules=["0", "3"],
        rank_pattern={"3": 2},
        alpha_pattern={"3": 5},
        init_weights=False,
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["0", "3"], init_weights=False),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["0", "3"], decompose_both=True, init_weights=False
    ),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["0", "3"], use_effective_conv2d=True, init_weights=False
    ),
}


def test_a_conv1d_of_lokr_as_peft_multiplies_it(tmp_path):
    torch.manual_seed(0)
    base, x = (
        nn.Sequential(nn.Conv1d(6, 8, 3), nn.Flatten()).double(),
        torch.randn(2, 6, 5).double(),
    )
    config = peft.LoKrConfig(r=8, alpha=3, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert (theirs(x) - base(x)).abs().max() > 0.01
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("without_model", (False, True))
@pytest.mark.parametrize("kind", (peft.LoHaConfig, peft.LoKrConfig))
def test_kernels_of_a_conv1d_apart_as_peft_pads_them(kind, without_model, tmp_path):
    """``use_effective_conv2d``: peft gives the kernel a second size, of 1."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(16, 32, 3)).double(), torch.randn(2, 16, 6).double()
    config = kind(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    found = tmp_path / "theirs"
    if without_model:
        found = tmp_path / "a.safetensors"
        convert(tmp_path / "theirs", found, "native")
    ours = paramlora.load_adapter(copy.deepcopy(base), found)
    assert (theirs(x) - base(x)).abs().max() > 0.01
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", [found], tmp_path / "out.safetensors")
    merged = paramlora.merge(ours)
    torch.testing.assert_close(merged(x), theirs(x))
    assert torch.equal(load_file(tmp_path / "out.safetensors")["0.weight"], merged[0].weight)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 40))


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_act_here_and_merge(name, tmp_path):
    base, x = net(), torch.randn(2, 4, 5, 5)
    theirs = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name]()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    kind = name.split()[0]
    assert [row.kind for row in paramlora.summary(ours).rows] == [kind, kind]
    with torch.no_grad():
        want = theirs(x)
        assert (want - base(x)).abs().max() > 1e-3
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(paramlora.merge(ours)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ("peft", "kohya", "diffusers", "comfyui", "torchtune"))
def test_an_embedding_is_called_so_where_it_is_refused(to):
    """Of all the layers' names it alone begins with a vowel."""
    model = nn.Sequential(nn.Embedding(10, 8))
    entry = {"r": 2} if to in ("diffusers", "torchtune") else {"r": 2, "kind": "loha"}
    adapter = paramlora.adapter_of(paramlora.attach(model, {"0": entry}))
    with pytest.raises(paramlora.FileError, match="an embedding"):
        formats.write(adapter, to, formats.base_of(model))
