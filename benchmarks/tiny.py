"""Model classes of transformers and diffusers, built tiny from their own configurations.

Nothing here knows one architecture: a configuration's numbers are made small by their names
(`SIZES`), then the model is built with random weights. `WAYS` are tried in turn until a model
can be called (see `benchmarks.tiny_inputs`).
"""

import copy
import functools
import inspect
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import nn

VOCABULARY, WIDTH, IMAGE, HEADS, HEAD_SIZE = 128, 64, 32, 4, 16
MOST = 60_000_000  # parameters of a model that is still called tiny: half a gigabyte each copy
FIRST_TOKEN = 100  # special tokens stand above those that inputs hold


def _most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# the first pattern that matches a whole name gives the number
_FIXED = r"chunk_size_feed_forward|.*type_vocab_size|.*stride.*|.*padding.*|.*spatial_merge_size"
_IMAGES = r"(pretrain_)?image_size|img_size|.*_image_size|input_size|sample_(size|width|height)"
_WINDOWS = r"sliding_window.*|.*attention_window|block_size|.*chunk_size|index_topk|sample_frames"
_EXPERTS = r"(n_routed|num_local|moe_num|num|n)_experts"
_QUERIES = r"num_queries|num_query_tokens|num_(denoising|proposals)|two_stage_num_proposals"
_CHOSEN = r"moe_k|.*num_experts_per_tok|.*topk.*|.*top_k.*|n_groups?|.*experts_per_tok.*"
_LAYERS = (
    r".*(num|n)_(\w+_)?(layers?|blocks)|(\w+_)?(layers|depth)|n_layer|num_\w+_per_stage"
    r"|layers_per_block|mmdit_layers|.*layers_per_block"
)
_CHANNELS = r"base_(dim|channels)|(model_)?channels|ch|(en|de)coder_dim|n_filters"
_GROUPS = 32  # of group norms that models fix
_SHAPES: list[tuple[str, Callable[[int], int]]] = [
    (r".*(num_(key_value|kv)|kv_n|n_kv|kv)_?heads.*", _most(2)),
    (r"qk_rope_head_dim|rotary_dim|.*rope_head_dim", _most(8)),
    (r".*head_dim|d_kv|dim_head|kv_channels|.*head_size", _most(HEAD_SIZE)),
    (r".*lora_rank|.*_rank|.*lora_dim", _most(16)),
    (r".*heads?|n_head|nheads", _most(HEADS)),
    (r"upsample_groups", _most(WIDTH)),
    (r"norm_num_groups|norm_groups|num_groups", _most(8)),
    (_CHANNELS, _most(16)),
    (
        r".*(intermediate|ffn|feed_?forward|mlp|inner)_(size|dim|hidden_size).*|d_ff|n_inner"
        r"|\w+_ffn_dim|dim_feedforward|ff_dim|mlp_hidden|ffn_hidden_size",
        _most(2 * WIDTH),
    ),
    (
        r".*hidden_size|.*d_model|n_embd|(\w+_)?dim|.*embed_dim|.*hidden_dim|.*embedding_(size|dim)"
        r"|.*projection_(dim|size)|(\w+_)?out(put)?_(dim|size)|.*_embd|.*_width|width|.*channels"
        r"|.*proj_dim|.*emb_dim|.*attention_size|in_text_dim2|cross_attention_dim_t5",
        _most(WIDTH),
    ),
]
SIZES: list[tuple[str, Callable[[int], int]]] = [
    (_FIXED, int),
    (r"first_k_dense_replace|num_dense_layers", _most(1)),  # layers before the first with experts
    (r".*vocab(ulary)?_size.*|codebook_size|num_embeddings|n_vocab|vq_.*_size", _most(VOCABULARY)),
    (_IMAGES, _most(IMAGE)),
    (_LAYERS, _most(2)),
    (
        r".*max.*position.*|n_positions|n_ctx|.*max_seq.*|context_length|.*max_length|text_len.*",
        _most(128),
    ),
    (_WINDOWS, _most(16)),
    (_EXPERTS, _most(4)),
    (_CHOSEN, _most(2)),
    (_QUERIES, _most(10)),
    *_SHAPES,
]
# what is made small: all; all, widths by stage in proportion to the first, and channels no fewer
# than the 32 groups that some models fix for their norms; all but widths; how many layers; nothing
WAYS = ("named", "even", "wide", "layers", "own")
_KEPT = {
    "wide": "|".join(pattern for pattern, _ in _SHAPES),
    "layers": "|".join([_IMAGES, _WINDOWS, _EXPERTS, _CHOSEN, *(p for p, _ in _SHAPES)]),
    "own": ".*",
}
_BY_LAYER = re.compile("layer|types|sparse|pattern|rope|window|block|mlp")
_TOKEN = re.compile(r".*token_?(id|index|ids)|.*_token_ids?")
_DEPTHS = re.compile("depth|layers|num_blocks|repeats")
_NO_SIZE = re.compile(
    "kernel|stride|rate|index|scale|ratio|dilation|padding|pool|patch|indices|mult"
)
_SECTIONS = re.compile(r"axes_dims?(_rope)?|rope_axes_dim|rope_dim_list")
# where the default is None
NEEDED = {"prediction_length": 8, "context_length": 8, "vocab_size": VOCABULARY}
NEEDED |= {"num_experts_per_tok": 2}
NEEDED_ARGUMENTS = {"in_channels": 16, "sample_size": 16, "patch_size": 2}


def shrunk(name: str, value: int, way: str) -> int:
    """The small number for a configuration's `value` of this name."""
    if value <= 0 or re.fullmatch(_KEPT.get(way, "$"), name):
        return value
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            return (
                max(small(value), min(value, _GROUPS)) if _is_grouped(name, way) else small(value)
            )
    return value


def _is_grouped(name: str, way: str) -> bool:
    """Whether a norm of groups, whose number is fixed, may follow these channels."""
    return way == "even" and re.fullmatch(_CHANNELS, name) is not None


def shrunk_list(name: str, values: list[int], way: str) -> list[int]:
    """Numbers by stage: one layer each, few heads, an eighth of the sizes."""
    if _DEPTHS.search(name) and way != "own":
        return [min(v, 1) for v in values]
    if way not in ("named", "even") or _NO_SIZE.search(name):
        return values
    if _SECTIONS.fullmatch(name):  # of a rotary embedding, which add up to a head's size
        rest = HEAD_SIZE // len(values) // 2 * 2
        return [HEAD_SIZE - rest * (len(values) - 1)] + [rest] * (len(values) - 1)
    if "head" in name:
        return [min(v, 2) for v in values]
    if "image" in name or name == "sample_size":
        return [min(v, IMAGE) for v in values]
    if re.search("size|dim|channel|width", name) and max(values) > 16:
        if way == "even":  # the first as a single width of that size, the others in proportion
            first = next(v for v in values if v > 8)
            return [v if v <= 8 else max(8, v * min(first, WIDTH) // first) for v in values]
        return [v if v <= 8 else max(8, v // 64 * 8) for v in values]
    return values


def configs_of(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from configs_of(value)


def shrink(config: Any, way: str) -> Any:
    """Make a configuration of transformers small in place, with those inside it."""
    tokens: dict[int, int] = {}
    for part in configs_of(config):
        depth = getattr(part, "num_hidden_layers", None)
        kinds = [] if way == "own" else layer_kinds(part, depth)
        for name, value in list(vars(part).items()):
            if not name.startswith("_"):
                new = _smaller(part, name, value, way, (kinds, depth), tokens)
                if new is not value:
                    setattr(part, name, new)
        if way == "named":
            _mend(part)
        if "use_cache" in vars(part):
            part.use_cache = False
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # the others know no double precision
    return config


def _smaller(
    part: Any,
    name: str,
    value: Any,
    way: str,
    layers: tuple[list[int], Any],
    tokens: dict[int, int],
) -> Any:
    """A small value for one of a configuration's."""
    kinds, depth = layers
    if _TOKEN.fullmatch(name):
        return _token(value, tokens)
    if name == "rope_parameters" and isinstance(value, dict) and way == "named":
        return _rotary(part, value)
    if _is_int(value):
        whole = bool(kinds) and value == depth and bool(re.fullmatch(_LAYERS, name))
        return len(kinds) if whole else shrunk(name, value, way)
    if isinstance(value, (list, tuple)) and value:
        if kinds and len(value) == depth and _BY_LAYER.search(name):
            return type(value)(value[i] for i in kinds)
        if all(map(_is_int, value)):
            return type(value)(shrunk_list(name, list(value), way))
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def layer_kinds(part: Any, depth: Any) -> list[int]:
    """The layers to keep: the first of each kind, in order, two at least."""
    types = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None)
    if not _is_int(depth) or depth < 2:
        return []
    if "backbone_out_indices" in vars(part):  # of which each names a layer of its own
        return list(range(min(depth, len(part.backbone_out_indices or [0, 0]))))
    if not isinstance(types, (list, tuple)) or len(types) != depth:
        return [0, 1]
    first = sorted(types.index(kind) for kind in set(types))[:4]
    return first if len(first) > 1 else [0, 1]


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """Special tokens, inside of the small vocabulary, each its own."""
    if isinstance(value, (list, tuple)):
        return [_token(v, tokens) for v in value]
    if not _is_int(value) or value < FIRST_TOKEN:
        return value
    return tokens.setdefault(value, FIRST_TOKEN + len(tokens))


def _mend(part: Any) -> None:
    """Numbers that follow from others."""
    held = vars(part)
    heads, width = held.get("num_attention_heads"), held.get("hidden_size")
    if held.get("kv_lora_rank") and _is_int(heads):
        part.num_key_value_heads = heads  # of latent attention, where each head has its own key
    if held.get("qk_rope_head_dim") and held.get("head_dim"):
        part.head_dim = part.qk_rope_head_dim
    if held.get("qk_nope_head_dim") and held.get("qk_head_dim"):
        part.qk_head_dim = part.qk_nope_head_dim + part.qk_rope_head_dim
    if "head_dim" in held and held["head_dim"] is None and _is_int(heads) and _is_int(width):
        part.head_dim = width // heads
    if "num_key_value_heads" in held and held["num_key_value_heads"] is None and _is_int(heads):
        part.num_key_value_heads = heads
    mamba = [("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")]
    mamba += [("num_heads", "head_dim")] if "state_size" in held else []
    for count, size in mamba:
        if _is_int(held.get(count)) and size in held and _is_int(width):
            setattr(part, size, held.get("mamba_expand", 2) * width // held[count])
    if "backbone_out_indices" in held and held["backbone_out_indices"]:
        part.backbone_out_indices = list(range(len(part.backbone_out_indices)))
    layers = held.get("num_hidden_layers")
    if held.get("stage_names") and _is_int(layers) and len(held["stage_names"]) > layers + 1:
        part.stage_names = ["stem", *(f"stage{i + 1}" for i in range(layers))]
        part._out_features, part._out_indices = part.stage_names[-1:], [layers]
    for name, value in NEEDED.items():
        if name in held and held[name] is None:
            setattr(part, name, value)


def _rotary(part: Any, value: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding that add up to half of the small head."""
    if not any(isinstance(v, (int, float)) for v in value.values()):
        return value  # one for each kind of layer
    share = value.get("partial_rotary_factor") or getattr(part, "partial_rotary_factor", None) or 1
    heads, width = getattr(part, "num_attention_heads", HEADS), getattr(part, "hidden_size", WIDTH)
    own = getattr(part, "head_dim", None)
    size = min(own, HEAD_SIZE) if own else min(width, WIDTH) // min(heads, HEADS)
    half = int(size * share) // 2
    count = len(value.get("mrope_section", "hwt"))
    rest = half // count
    return {**value, "mrope_section": [half - rest * (count - 1)] + [rest] * (count - 1)}


# what a configuration lacks that its own model reads, by name, the first that matches
LACKED: list[tuple[str, Any]] = [
    (r"mlp_layer_types", ["dense", "sparse"]),
    (r"layer_types", ["full_attention", "full_attention"]),
    (r"initializer_range", 0.02),
    (r"rope_theta", 10000.0),
    (r".*vocab_size", VOCABULARY),
    (r".*(num_key_value_heads|compress_ratio|n_groups?|topk_group|patch_size.*)", 1),
    (r".*(dim|size|channels|features)", WIDTH),
    (r".*(heads|experts|budget)", HEADS),
    (r".*(top_?k|per_tok|depth|layers|num_\w+)", 2),
]
_LACKS = re.compile(r"'(\w+)' object has no attribute '(\w+)'")


def lacked_by(config: Any, error: Exception) -> Optional[tuple[Any, str]]:
    """The part of a configuration and the number in it whose want made building it fail: the
    attribute that the error names, or one that is None where the innermost line reads it."""
    told = _LACKS.search(str(error))
    parts = list(configs_of(config))
    for part in parts:
        if told and type(part).__name__ == told[1] and not told[2].startswith("_"):
            return part, told[2]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        read = re.findall(r"config\.(\w+)", linecache.getline(frame.f_code.co_filename, line))
        for part in parts:
            unset = [name for name in read if vars(part).get(name, "") is None]
            if unset:
                return part, unset[0]
    return None


def size_of(cls: type[nn.Module], arguments: dict[str, Any]) -> int:
    """Parameters of the model; its configuration is given what the model reads and it lacks, as
    errors say, a few times."""
    for _ in range(8):
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in cls(**copy.deepcopy(arguments)).parameters())
        except (AttributeError, TypeError) as error:
            lacks = lacked_by(arguments["config"], error) if "config" in arguments else None
            guess = [v for pattern, v in LACKED if lacks and re.fullmatch(pattern, lacks[1])]
            if lacks is None or not guess:
                raise
            setattr(*lacks, guess[0])
    raise ValueError("a configuration that lacks more than can be guessed")


def built(
    cls: type[nn.Module], way: str, dtype: torch.dtype, own: Optional[dict[str, Any]] = None
) -> nn.Module:
    """A model of a class, seeded, of `dtype` and in eval mode.

    Args:
        cls, way, dtype: what is built.
        own: what its configuration says otherwise than the way makes it, dots leading inside.

    Raises:
        ValueError: it has more than `MOST` parameters.
    """
    arguments = _arguments(cls, way, own or {})
    size = size_of(cls, arguments)
    if size > MOST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return cls(**arguments).to(dtype).eval()


def _arguments(cls: type[nn.Module], way: str, own: dict[str, Any]) -> dict[str, Any]:
    """What the class is called with: a configuration, or in diffusers its numbers."""
    if getattr(cls, "config_class", None) is not None:
        config = shrink(cls.config_class(), way)
        for name, value in own.items():
            *inside, last = name.split(".")
            setattr(functools.reduce(getattr, inside, config), last, value)
        return {"config": config}
    found = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        value = parameter.default
        if _TOKEN.fullmatch(name):
            found[name] = _token(value, {})
        elif _is_int(value):
            found[name] = shrunk(name, value, way)
        elif value is None and name in NEEDED_ARGUMENTS and way != "own":
            found[name] = NEEDED_ARGUMENTS[name]
        elif isinstance(value, (list, tuple)) and value and all(map(_is_int, value)):
            found[name] = type(value)(shrunk_list(name, list(value), way))
    return found | own
