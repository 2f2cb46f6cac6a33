"""Which layers an entry means: by class, by a preset, and but for what is excluded."""

import json
import warnings

import pytest
import torch
from torch import nn

import paramlora
from paramlora import ConfigError, LoRAConfig, ParamloraWarning, TargetError
from paramlora.model.presets import grouped

R = {"r": 1}


def chosen(model, config, **options):
    """The paths that each entry gets."""
    out = {}
    for target in paramlora.targets(model, config, **options):
        out.setdefault(target.entry.name, []).append(target.path)
    return out


class Mine(nn.Module):
    """A layer of the user's own, with a matrix that has a name of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.table.t() + self.shift


class Narrow(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mine, self.up, self.norm = Mine(), Narrow(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.up(self.mine(self.norm(x + self.attn(x, x, x)[0])))


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Block(), "b": Block(), "head": nn.Linear(4, 2)}).double()


def test_a_class_means_it_and_those_that_derive_from_it():
    linears = [f"{at}.{name}" for at in "ab" for name in ("attn.out_proj", "up")] + ["head"]
    for name in ("type:Linear", "type:torch.nn.Linear", "type:torch.nn.modules.linear.Linear"):
        assert chosen(net(), {name: R}) == {name: linears}
    narrow = {"type:Narrow": ["a.up", "b.up"]}
    assert chosen(net(), {"type:Narrow": R}) == narrow
    assert chosen(net(), {f"type:{__name__}.Narrow": R}) == {
        f"type:{__name__}.Narrow": narrow["type:Narrow"]
    }
    assert chosen(net(), {"type:Mine": R}) == {"type:Mine": ["a.mine.table", "b.mine.table"]}
    inside = {"type:MultiheadAttention": ["a.attn.in_proj_weight", "b.attn.in_proj_weight"]}
    assert chosen(net(), {"type:MultiheadAttention": R}) == inside
    lstm = nn.LSTM(3, 2, num_layers=2)
    names = [f"weight_{side}_l{i}" for i in range(2) for side in ("ih", "hh")]
    assert chosen(lstm, {"type:LSTM": R}) == {"type:LSTM": names}
    assert chosen(nn.Linear(2, 2), {"type:Linear": R}) == {"type:Linear": [""]}


def test_a_class_is_found_under_an_update_too():
    model = paramlora.attach(net(), {"type:Linear": R})
    assert chosen(model, {"type:Linear": R}) == chosen(net(), {"type:Linear": R})


def test_a_class_trained_whole_takes_all_that_its_modules_hold():
    found = chosen(net(), {"type:LayerNorm": {"whole": 1}, "type:Mine": R})
    norms = [f"{at}.norm{end}" for at in "ab" for end in ("", ".bias")]
    assert found["type:LayerNorm"] == norms
    assert len(chosen(net(), {"type:Block": {"whole": 1}})["type:Block"]) == 20
    assert chosen(nn.LayerNorm(2), {"type:LayerNorm": {"whole": 1}}) == {
        "type:LayerNorm": ["", "bias"]
    }


def test_an_update_by_class_is_the_products_sum():
    """The adapted outputs against a plain model whose weights are the float64 sums."""
    model, plain = net(), net()
    paramlora.attach(model, {"type:Narrow": {"r": 2, "scale": 3.0}, "type:Mine": R})
    with torch.no_grad():
        for at in "ab":
            for path in ("up.weight", "mine.table"):
                owner, _, name = f"{at}.{path}".rpartition(".")
                update = model.get_submodule(owner).parametrizations[name][0]
                update.lora_B.normal_()
                scale = 3.0 if name == "weight" else 1.0
                plain.get_parameter(f"{at}.{path}").add_(scale * update.lora_B @ update.lora_A)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for at in "ab":
        torch.testing.assert_close(model[at](x), plain[at](x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["type:", "type:a b", "type:.Linear", "type:*", "type:Linear.", "type:re:x"]
)
def test_no_class_is_refused(name):
    with pytest.raises(
        ConfigError, match='"type:" takes the name of one class, such as "type:Linear"'
    ):
        LoRAConfig.from_dict({name: R})
    with pytest.raises(ConfigError, match='"type:" takes the name of one class'):
        LoRAConfig.from_dict({"up": R, "exclude": [name]})


def test_a_class_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(
        TargetError, match=r'"type:Liner" matches nothing. Closest: "type:Linear" \(1 lay'
    ):
        chosen(net(), {"type:Liner": R})
    with pytest.raises(
        TargetError, match=r"There are: MultiheadAttention, NonDyn.* \(2 layers each\)"
    ):
        chosen(net(), {"type:Zzz": R})
    with pytest.raises(
        TargetError, match=r'"type:Block" matches a, a Block with no weight of its own.*a\.attn'
    ):
        chosen(net(), {"type:Block": R})
    with pytest.raises(TargetError, match='"type:not.imported.Linear" matches nothing'):
        chosen(net(), {"type:not.imported.Linear": R})


def test_a_class_of_which_one_cannot_be_adapted_is_refused():
    model = net()
    model["b"].up = Narrow(4, 0)
    with pytest.raises(
        TargetError, match=r'"type:Narrow" matches b.up.weight, of shape \[0, 4\]: it is empty'
    ):
        chosen(model, {"type:Narrow": R})


def test_what_is_excluded_belongs_to_no_entry():
    linear = {"type:Linear": R}
    assert chosen(net(), {**linear, "exclude": ["head", "attn"]}) == {
        "type:Linear": ["a.up", "b.up"]
    }
    assert chosen(net(), {**linear, "exclude": ["a", "b.attn.*"]}) == {
        "type:Linear": ["b.up", "head"]
    }
    assert chosen(net(), {**linear, "exclude": ["re:.*attn", "type:Narrow"]}) == {
        "type:Linear": ["head"]
    }
    assert (
        chosen(net(), {**linear, "exclude": ["up.weight", "head"]})["type:Linear"][0]
        == "a.attn.out_proj"
    )
    whole = {"a": {"whole": 1}, "exclude": ["bias", "type:LayerNorm", "a.attn"]}
    assert chosen(net(), whole) == {"a": ["a.mine.table", "a.mine.shift", "a.up"]}
    assert chosen(net(), {**linear, "exclude": ["all-linear"], "mine.table": R}).keys() == {
        "mine.table"
    }


def test_an_exclude_is_read_written_and_compared():
    config = LoRAConfig.from_dict({"exclude": ["head", "head", "re:.*b"], "*": R})
    assert config.exclude == ("head", "re:.*b")
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != LoRAConfig.from_dict({"*": R})
    assert "exclude" not in LoRAConfig.from_dict({"*": R}).to_dict()
    layer = nn.ModuleDict({"exclude": nn.Linear(2, 2)})
    assert chosen(layer, {"exclude": R}) == {"exclude": ["exclude"]}  # a layer that is called so


@pytest.mark.parametrize("value", ["head", [], [1], [""], None, {"head": 1}, {}, 0, [["head"]]])
def test_another_exclude_is_refused(value):
    with pytest.raises(
        ConfigError, match=r'config: "exclude" must be a list of names such as \["lm_head"\], got'
    ):
        LoRAConfig.from_dict({"up": R, "exclude": value})


def test_an_exclude_that_names_nothing_or_everything_is_told():
    with pytest.warns(
        ParamloraWarning, match='"heat" in "exclude" matches nothing. Closest: "head"'
    ):
        chosen(net(), {"up": R, "exclude": ["heat"]})
    with pytest.raises(
        TargetError, match='"heat" in "exclude" matches nothing.*Remove it, or leave str'
    ):
        chosen(net(), {"up": R, "exclude": ["heat"]}, strict=True)
    with pytest.raises(TargetError, match='"head" matches nothing but what "exclude" leaves out'):
        chosen(net(), {"head": R, "exclude": ["head"]})
    with pytest.raises(
        TargetError, match='"type:Linear" matches nothing but what "exclude" leaves out'
    ):
        chosen(net(), {"type:Linear": R, "exclude": ["*"]})
    with pytest.raises(ConfigError, match=r'"re:\(" in "exclude": not a regular expression'):
        LoRAConfig.from_dict({"up": R, "exclude": ["re:("]})
    with pytest.raises(ConfigError, match='expected an object.*Did you mean "exclude"'):
        LoRAConfig.from_dict({"exclud": ["a"], "up": R})


def test_an_excludes_pattern_takes_bounded_time():
    """Python's own matcher would try for longer than the world is old."""
    model = nn.ModuleDict({"a" * 60: nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    left = {"type:Linear": ["b"]}
    assert chosen(model, {"type:Linear": R, "exclude": ["re:((a|a?)+)+"]}) == left
    with pytest.warns(ParamloraWarning, match="matches nothing"):
        both = chosen(model, {"type:Linear": R, "exclude": ["re:((a+)+)+c"]})
    assert len(both["type:Linear"]) == 2
    with pytest.raises(ConfigError, match='"exclude": .*bounded time.*Give a plain name'):
        chosen(model, {"type:Linear": R, "exclude": [r"re:(a)\1"]})


def test_the_narrowest_entry_counts():
    config = {
        "all-linear": R,
        "type:Narrow": R,
        "attention": R,
        r"re:a\.attn\.out_proj": R,
        "b.up": R,
    }
    assert chosen(net(), config) == {
        "all-linear": ["head"],
        "type:Narrow": ["a.up"],
        "attention": ["b.attn.out_proj", "a.attn.in_proj_weight", "b.attn.in_proj_weight"],
        r"re:a\.attn\.out_proj": ["a.attn.out_proj"],
        "b.up": ["b.up"],
    }
    with pytest.raises(TargetError, match='"type:Linear" and "type:Narrow" claim it equally'):
        chosen(net(), {"type:Linear": R, "type:Narrow": R})


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
