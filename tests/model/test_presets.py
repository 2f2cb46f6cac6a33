"""The entries "attention" and "all-linear": which layers they mean, against other libraries'."""

import warnings

import pytest
import torch
from torch import nn

import paramlora
from paramlora import TargetError
from paramlora.model.presets import grouped
from tests.model.chosen import R, chosen


def test_a_layer_that_is_called_as_a_preset_is_meant_by_its_name():
    model = nn.ModuleDict({"attention": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert chosen(model, {"attention": R}) == {"attention": ["attention"]}
    with pytest.raises(TargetError, match="There are: head, up"):
        chosen(nn.ModuleDict({"head": nn.Linear(2, 2), "up": nn.Linear(2, 2)}), {"attention": R})


class SelfAttention(nn.Module):
    """One's own, with its projections as convolutions of single points."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv1d(4, 12, 1), nn.Conv1d(4, 4, 1)
        self.proj = nn.Conv1d(4, 4, 3)  # which sees its neighbours


def test_the_attention_of_ones_own_classes():
    model = nn.ModuleDict({"x": SelfAttention(), "out": nn.Linear(4, 4)})
    assert chosen(model, {"attention": R}) == {"attention": ["x.qkv", "x.out"]}
    assert chosen(SelfAttention(), {"attention": R}) == {"attention": ["qkv", "out"]}
    assert chosen(model, {"all-linear": R}) == {"all-linear": ["out"]}


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    wide = {**small, "hidden_size": 8, "intermediate_size": 12}
    made = {
        "LlamaForCausalLM": ("LlamaConfig", {**wide, "num_key_value_heads": 2}),
        "Phi3ForCausalLM": ("Phi3Config", {**wide, "num_key_value_heads": 2, "pad_token_id": 0}),
        "GPT2LMHeadModel": (
            "GPT2Config",
            {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 40},
        ),
        "GPTNeoXForCausalLM": ("GPTNeoXConfig", wide),
        "BertForSequenceClassification": ("BertConfig", wide),
        "ViTForImageClassification": ("ViTConfig", {**wide, "image_size": 8, "patch_size": 4}),
        "T5ForConditionalGeneration": (
            "T5Config",
            {
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 12,
                "num_layers": 2,
                "num_heads": 2,
                "vocab_size": 40,
            },
        ),
        "CLIPVisionModel": ("CLIPVisionConfig", {**wide, "image_size": 8, "patch_size": 4}),
    }
    config, options = made[name]
    options = {k: v for k, v in options.items() if not (k == "vocab_size" and "V" in name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, name)(getattr(transformers, config)(**options))


ATTENTION = {
    "LlamaForCausalLM": "q_proj, k_proj, v_proj, o_proj (2 layers each)",
    "Phi3ForCausalLM": "o_proj, qkv_proj (2 layers each)",
    "GPT2LMHeadModel": "c_attn, c_proj (2 layers each)",
    "GPTNeoXForCausalLM": "query_key_value, dense (2 layers each)",
    "BertForSequenceClassification": "query, key, value, dense (2 layers each)",
    "T5ForConditionalGeneration": "q, k, v, o (6 layers each)",
    "CLIPVisionModel": "k_proj, v_proj, q_proj, out_proj (2 layers each)",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_the_attention_of_transformers(name):
    (paths,) = chosen(transformers_model(name), {"attention": R}).values()
    assert grouped(paths) == ATTENTION[name]
    assert not any("mlp" in path or "intermediate" in path for path in paths)


def test_the_attention_of_a_vision_transformer_is_its_projections():
    """Whatever they are called in the release at hand: four square matrices in each layer."""
    found = paramlora.targets(transformers_model("ViTForImageClassification"), {"attention": R})
    assert len(found) == 8 and {t.shape for t in found} == {(8, 8)}


@pytest.mark.parametrize("name", [*ATTENTION, "ViTForImageClassification"])
def test_all_linear_is_pefts(name):
    peft = pytest.importorskip("peft")
    model = transformers_model(name)
    (ours,) = chosen(model, {"all-linear": R}).values()
    task = {"task_type": "SEQ_CLS"} if "Classification" in name else {}
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=1, **task))
    wrapped = peft.tuners.lora.LoraLayer
    at = [path for path, one in theirs.named_modules() if isinstance(one, wrapped)]
    assert sorted(ours) == sorted(path.removeprefix("base_model.model.") for path in at)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_all_linear_is_pefts_in_diffusers_too(name):
    peft = pytest.importorskip("peft")
    model = diffusers_model(name)
    (ours,) = chosen(model, {"all-linear": R}).values()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", r=1), model)
    wrapped = peft.tuners.lora.LoraLayer
    assert set(ours) == {path for path, one in model.named_modules() if isinstance(one, wrapped)}


def diffusers_model(name):
    diffusers = pytest.importorskip("diffusers")
    if name == "UNet2DConditionModel":
        return diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            cross_attention_dim=8,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    if name == "FluxTransformer2DModel":
        return diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        )
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


@pytest.mark.parametrize(
    "name, told",
    [
        ("UNet2DConditionModel", "to_q, to_k, to_v, to_out.0 (8 layers each)"),
        ("DiTTransformer2DModel", "to_q, to_k, to_v, to_out.0 (2 layers each)"),
        (
            "FluxTransformer2DModel",
            "to_q, to_k, to_v (2 layers each); to_out.0, add_q_proj, add_k_proj, add_v_proj, "
            "to_add_out (1 layer each)",
        ),
    ],
)
def test_the_attention_of_diffusers(name, told):
    (paths,) = chosen(diffusers_model(name), {"attention": R}).values()
    said = {part for part in grouped(paths).split("; ")}
    words = lambda parts: {frozenset(p.replace(",", "").split()) for p in parts}  # noqa: E731
    assert words(said) == words(told.split("; "))


def test_a_file_holds_what_was_chosen_under_the_layers_names(tmp_path):
    """Also where those are words that mean something else in a configuration."""

    def made():
        torch.manual_seed(0)
        names = ("exclude", "attention", "all-linear", "type:Linear")
        return nn.ModuleDict({name: nn.Linear(3, 3) for name in names}).double()

    model = paramlora.attach(made(), {"type:Linear": {"r": 2}, "exclude": ["re:type.*"]})
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.normal_()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    again = paramlora.load_adapter(made(), tmp_path / "a.safetensors")
    assert [row.path for row in paramlora.summary(again).rows] == list(made())[:3]
    for name, layer in made().items():
        assert torch.equal(again[name].weight, model[name].weight)
        assert torch.equal(again[name].weight, layer.weight) == (name == "type:Linear")
