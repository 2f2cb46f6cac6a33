"""PEFT's files: what peft writes acts here."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import paramlora
from paramlora import FileError, formats
from tests.formats import foreign
from tests.formats.peft.folders import PLAIN, attention, close, opened

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kinds", [PLAIN, ["hf", "linear"]])
def test_what_peft_writes_acts_here(tmp_path, kinds, rslora):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=kinds,
        rank_pattern={"^linear": 4, "conv2": 1},
        alpha_pattern={"conv[12]": 5.5, "linear": 7},
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out="hf" in kinds,
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "b")
    base = formats.base_of(foreign.model())
    adapter = formats.read(opened(tmp_path / "b"), base)
    root = 2 if rslora else 4
    assert adapter.updates["linear"].scale == 7 / root
    ours = foreign.dense(foreign.model(), adapter)
    close(ours(foreign.TOKENS), theirs(foreign.TOKENS))
    attached = paramlora.model.values.attach_adapter(foreign.model(), adapter)
    close(attached(foreign.TOKENS), theirs(foreign.TOKENS))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_what_peft_trains_whole_comes_along(tmp_path, bias):
    """A head in ``modules_to_save``, and biases."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["linear", "conv2"],
        modules_to_save=["not_linear"],
        bias=bias,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "b")
    model = paramlora.load_adapter(foreign.model(), tmp_path / "b")
    close(model(foreign.TOKENS), theirs(foreign.TOKENS))
    content = opened(tmp_path / "b")
    whole = formats.read(content, formats.base_of(foreign.model())).whole
    assert {"not_linear", "not_linear.bias"} <= set(whole)
    assert ("linear.bias" in whole) == (bias != "none") and ("conv1.bias" in whole) == (
        bias == "all"
    )


@pytest.mark.parametrize("version", [None, "0.21.2", "0.22.0"])
def test_what_peft_writes_of_attention(tmp_path, version):
    """As it acts in the peft that trained it, whose forward adds the output projection twice."""
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(attention(), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "b")
    content, x = opened(tmp_path / "b"), torch.randn(2, 5, 8).double()
    content.config.pop("peft_version", None)
    content.config.update({} if version is None else {"peft_version": version})
    for base in (None, formats.base_of(attention())):
        with expected(version != "0.22.0", r"adds twice: attn.out_proj. It is read with twice"):
            adapter = formats.read(content, base)
        assert set(adapter.updates) == {"attn.in_proj_weight", "attn.out_proj"}
        inside = adapter.updates["attn.in_proj_weight"]
        layer = theirs.base_model.model.attn
        close(2.5 * inside.lora_B @ inside.lora_A, layer.get_delta_weight("default"))
        assert adapter.updates["attn.out_proj"].scale == (2.5 if version == "0.22.0" else 5.0)
    if version != "0.22.0":
        model = paramlora.model.values.attach_adapter(attention(), adapter)
        close(model(x), theirs(x))


def expected(told, text):
    return pytest.warns(paramlora.ParamloraWarning, match=text) if told else nullcontext()


def of_another_rank(folder, **told):
    """A folder of peft's, whose configuration is changed afterwards."""
    net = nn.Sequential(nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(net, config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    return nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize(
    "told, wrong",
    [({"r": 3}, "2, not 3"), ({"rank_pattern": {"0": 1}}, "2, not 1"), ({"r": "2"}, "2, not '2'")],
)
def test_a_rank_that_is_not_that_of_the_tensors_is_refused_as_by_peft(told, wrong, tmp_path):
    net = of_another_rank(tmp_path, **told)
    with pytest.raises((RuntimeError, TypeError)):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    says = (
        rf"adapter_model.*of another rank than its configuration tells: 0 \({wrong}\). Mend its r"
    )
    with pytest.raises(FileError, match=says):
        paramlora.load_adapter(net, tmp_path)
    with pytest.warns(paramlora.ParamloraWarning, match=says):
        paramlora.load_adapter(net, tmp_path, strict=False)
    assert net[0].parametrizations.weight[0].lora_scale == 1.5


def test_an_alpha_that_is_none_is_refused_with_the_file(tmp_path):
    net = of_another_rank(tmp_path, lora_alpha="x")
    with pytest.raises(FileError, match="adapter_model.safetensors: lora_alpha of 0: 'x' is not"):
        paramlora.load_adapter(net, tmp_path)
