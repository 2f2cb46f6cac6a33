"""A sweep of files that no tool wrote: an error that says so, never another one, never much
memory."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paramlora import formats
from paramlora.errors import ParamloraError
from paramlora.formats import Content, Options, Slot
from paramlora.update.value import Adapter

STEMS = (
    "a a.b lora_unet_a_b lora_te1_a transformer.h.0.attn.qkv base_model.model.a "
    "base_model.model.ex base_model.model.ex.base_layer base_model.model.m "
    "base_model.model.m.base_layer.out_proj "
    "unet.a.b unet:0 unet:1 block.attn.processor "
    "model.layers.0.self_attn.qkv_proj layers.0.self_attn.k_proj lora_unet_layers_0_mlp_up_proj "
    "model.layers.0.mlp.experts.0.gate_proj base_model.model.model.layers.0.mlp.experts "
    "module._orig_mod.layers.0.block_sparse_moe.experts.1.w3 layers.0.mlp.experts.gate_up_proj"
).split()
LEAVES = (
    "lora_A lora_B lora_A.weight lora_B.weight lora_scale lora_embedding_A lora_embedding_B alpha "
    "lora_down.weight lora_up.weight lora_mid.weight hada_w1_a hada_w1_b hada_w2_a hada_w2_b "
    "hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 diff "
    "lora_a.weight lora_b.weight lora.down.weight lora.up.weight to_q_lora.down.weight "
    "to_q_lora.up.weight base_layer.weight dora_scale weight"
).split()
SHAPES = st.lists(st.integers(1, 4), min_size=2, max_size=2) | st.lists(
    st.integers(0, 4), max_size=5
)
DTYPES = st.just(torch.float32) | st.sampled_from([torch.float16, torch.int64, torch.float8_e4m3fn])
BASE = {
    "a": Slot((4, 3), "matrix", "linear", 1),
    "a.b": Slot((4, 2, 3, 3), "matrix", "convolution", 2),
    "ex.w": Slot((2, 4, 3), "stack", "parameter", 1),
    "ex.v": Slot((4, 3), "matrix", "parameter", 1),
    "m.in_proj_weight": Slot((6, 2), "matrix", "parameter", 1),
    "m.out_proj": Slot((2, 2), "matrix", "linear", 1),
    "transformer.h.0.attn.qkv": Slot((8, 4), "matrix", "linear", 1),
    "block.attn.to_q": Slot((4, 4), "matrix", "linear", 1, ("Net", "Attention", "Linear")),
    "model.layers.0.self_attn.q_proj": Slot((2, 3), "matrix", "linear", 1),
    "model.layers.0.self_attn.k_proj": Slot((1, 3), "matrix", "linear", 1),
    "model.layers.0.self_attn.v_proj": Slot((1, 3), "matrix", "linear", 1),
    "model.layers.0.mlp.gate_up_proj": Slot((4, 3)),
    "model.layers.0.mlp.experts.gate_up_proj": Slot((2, 4, 3)),
    "layers.1.mlp.experts.gate_up_proj": Slot((4, 2, 4), "stack", "parameter", 1, (), True),
    "layers.2.mlp.experts.0.gate_proj": Slot((2, 3), "matrix", "linear", 1),
    "layers.2.mlp.experts.0.up_proj": Slot((2, 0)),
    "layers.3.mlp.experts.gate_up_proj": Slot((1 << 40, 0, 0)),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.sampled_from(["", "a", "["]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab[."), inner),
    max_leaves=4,
)
CONFIG = st.dictionaries(
    st.sampled_from(
        "peft_type r lora_alpha rank_pattern alpha_pattern target_modules target_parameters "
        "use_rslora fan_in_fan_out lora_r lora_query lora_key paramlora_scales "
        "exclude_modules".split()
    ),
    JSON | st.just("LORA") | st.sampled_from([["ex.w", "ex.v"], ["mlp.experts.gate_up_proj"]]),
)


def tensor(shape, dtype):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


STATE = st.dictionaries(
    st.builds("{}.{}".format, st.sampled_from(STEMS), st.sampled_from(LEAVES))
    | st.builds("unet:{}:{}".format, st.integers(0, 1), st.sampled_from(["up", "down"]))
    | st.integers(0, 3).map(str),
    st.builds(tensor, SHAPES, DTYPES),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(STATE, CONFIG, st.booleans(), st.sampled_from([None, 2.0]), st.sampled_from([None, 1]))
def test_any_tensors_are_read_or_refused(state, config, known, alpha, rank):
    options = Options(strict=False, alpha=alpha, rank=rank, split=1 if known else 3)
    for name in (None, *formats.READERS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = Content(state, {}, config)
                found = formats.read(content, BASE if known else None, options, name)
            except ParamloraError:
                continue
        assert isinstance(found, Adapter)
        assert all(update.r >= 1 for update in found.updates.values())


@pytest.mark.parametrize(
    "parts",
    [
        {"hada_w1_a": (9**6, 1), "hada_w1_b": (1, 9**6)}
        | {"hada_w2_a": (9**6, 1), "hada_w2_b": (1, 9**6)},
        {"lokr_w1": (999, 999), "lokr_w2": (999, 999)},
        {"lokr_w1_a": (9**6, 1), "lokr_w1_b": (1, 9**6), "lokr_w2": (1, 1)},
    ],
)
@pytest.mark.parametrize("base", [None, {"a": Slot((4, 3), "matrix", "linear", 1)}])
def test_a_small_file_does_not_become_a_large_weight(parts, base):
    state = {f"lora_unet_a.{leaf}": torch.ones(shape) for leaf, shape in parts.items()}
    with pytest.raises(ParamloraError, match="a dense weight of"):
        formats.read(Content(state), base)
