"""ComfyUI's names: ``diffusion_model.`` and ``text_encoders.``, then the published checkpoint's.

Read from ComfyUI by commit: comfy/lora.py at 17358c8f (``model_lora_keys_unet``: a denoiser's names
are those of its published checkpoint, and of a U-Net diffusers' too, mangled behind ``lora_unet_``;
``model_lora_keys_clip``: transformers' names behind ``text_encoders.`` and the model's own),
comfy/weight_adapter/lora.py at 6f98b150 (``lora_A.weight``, ``lora_B.weight``, ``alpha``; any shape
that flattens to ``[out, r]`` and ``[r, in]``), comfy/weight_adapter/base.py of v0.3.77
(``weight_decompose``: a magnitude of each output is divided by the norm of the base alone),
comfy/supported_models.py (HunyuanVideo's ``process_unet_state_dict``, the one that renames).
"""

import re
from dataclasses import replace
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats import diffusers
from paramlora.formats.base import Base, Slot, fit, original_of, places_of
from paramlora.formats.content import Content, Options
from paramlora.formats.factors import (
    check_told,
    kernels,
    with_low_ranks,
    without_differences,
)
from paramlora.formats.format import Format, Prefix
from paramlora.formats.kohya import alpha_tensor, without_products
from paramlora.formats.loaders import stem
from paramlora.formats.names.levels import CHECKPOINTS, DENOISER, MANGLED, in_checkpoint
from paramlora.formats.pipeline import PARTS, part_told
from paramlora.formats.scale import alpha_of, scales_metadata
from paramlora.update.value import Adapter, Update

_DENOISER = "diffusion_model"
PREFIXES = (_DENOISER, *(one for one in CHECKPOINTS if one.startswith("text_encoders.")))
# of Stability's checkpoints, what ComfyUI calls the text encoder there
_ENCODERS = {
    "cond_stage_model.transformer": "clip_l",
    "cond_stage_model.model": "clip_h",
    "conditioner.embedders.0.transformer": "clip_l",
    "conditioner.embedders.0.model": "clip_g",  # of SDXL's refiner, which has no other
    "conditioner.embedders.1.model": "clip_g",
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
}
_OPEN_CLIP_H = 1024  # its width; CLIP-L has 768, and CLIP-G 1280
# of HunyuanVideo, which its own names tell: what ComfyUI has for them
_HUNYUAN = "txt_in.individual_token_refiner."
_RENAMED = {
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
}
_CLIP = re.compile(r"(?:text_model\.)?((?:encoder\.layers|embeddings|final_layer_norm)\b.*)", re.S)
_LANGUAGE = re.compile(r"(?:model\.|language_model\.)*((?:layers\.[0-9]+|embed_tokens)\b.*)", re.S)
_T5 = re.compile(r"encoder\.block\.(?P<block>[0-9]{1,9})\.layer\.0\.SelfAttention\.(?P<rest>.+)")


def write(adapter: Adapter, base: Optional[Base] = None, prefix: Optional[str] = None) -> Content:
    """An adapter as "Load LoRA" takes it, whole.

    Args:
        adapter: of one model, or of a pipeline's, whose names are then in front of the paths.
        base: the names and shapes of the model or pipeline, under which the published names are
            known. Without it a U-Net's names stay diffusers', which ComfyUI knows behind
            ``lora_unet_``.
        prefix: ComfyUI's name of the model where that is a text encoder, such as
            ``"text_encoders.clip_l.transformer"``.

    Raises:
        FileError: a model whose names in ComfyUI nothing tells; a layer that is no Linear or
            convolution, or an update that ComfyUI computes in another way, named.
    """
    if prefix is not None and prefix not in PREFIXES:
        raise FileError(
            f'"{prefix}" is no model in ComfyUI, which would load nothing of it. Prefixes: '
            f"{', '.join(PREFIXES)}."
        )
    if base is None:
        adapter = _renamed(adapter, prefix)
    else:
        adapter = without_differences(fit(adapter, names_of(base, prefix), Options(), "adapter"))
    adapter, products = without_products(adapter, "ComfyUI's")
    adapter, magnitudes = with_low_ranks(adapter)
    state: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        _check(name, update, magnitudes.get(name))
        down, up = kernels(update)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = _own(down), _own(up)
        if name in magnitudes:
            state[f"{name}.dora_scale"] = _own(magnitudes[name])
    for name, value in products.items():
        state |= {f"{name}.{leaf}": _own(tensor) for leaf, tensor in value.held.items()}
    scales = {n: v.listed() for n, v in {**adapter.updates, **products}.items()}
    for name, (r, scale) in scales.items():
        like = next(tensor for key, tensor in state.items() if key.startswith(f"{name}."))
        state[f"{name}.alpha"] = alpha_tensor(alpha_of(scale, r), like.dtype)
    exact = scales_metadata({name: (scale, r) for name, (r, scale) in scales.items()})
    return Content(state, {"format": "pt", **exact})


def names_of(base: Base, prefix: Optional[str] = None) -> Base:
    """A base's weights under the names that ComfyUI has for them.

    Raises:
        FileError: a text encoder of a name that nothing tells.

    Example:
        >>> list(names_of({f"blocks.0.attn1.to_{n}": Slot((4, 6)) for n in "qkv"}))[0]
        'diffusion_model.blocks.0.self_attn.q'
    """
    found: dict[str, Slot] = {}
    for level, own in _models(base).items():
        # a prefix is for a model by itself; in a pipeline every level tells its own
        start = prefix if prefix is not None and not level else _model(level, own)
        names = _as_published(own) if start == _DENOISER else _as_transformers(own)
        found |= {f"{start}.{name}": slot for name, slot in names.items()}
    return found


def _renamed(adapter: Adapter, prefix: Optional[str]) -> Adapter:
    """An adapter under ComfyUI's names, as far as they follow from its own without its model."""
    names: dict[str, str] = {}
    shapes = {path: Slot(_shape(value)) for path, value in adapter.values().items()}
    for level, own in _models(shapes).items():
        start = prefix if prefix is not None and not level else _model(level, own)
        part = level if level in PARTS else part_told(own)
        for rest in own:
            path = f"{level}.{rest}" if level else rest
            if path.startswith((*(f"{one}." for one in PREFIXES), *_FLAT)):
                names[path] = path  # ComfyUI's already
            elif start == _DENOISER and part == "unet" and not rest.startswith(_ORIGINAL):
                names[path] = f"lora_unet_{rest.replace('.', '_')}"
            elif start == _DENOISER and part in DENOISER and level not in CHECKPOINTS:
                raise FileError(
                    f"{path}: ComfyUI has this model under the names of its published checkpoint. "
                    "Give the model (--model), or its checkpoint as base."
                )
            else:
                names[path] = f"{start}.{rest if start == _DENOISER else _in_transformers(rest)}"
    return replace(
        adapter,
        updates={names[path]: one for path, one in adapter.updates.items()},
        others={names[path]: one for path, one in adapter.others.items()},
    )


_FLAT = tuple(f"{level}_" for level in MANGLED)
_ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.")


def _shape(value: Any) -> tuple[int, ...]:
    if value.shape is not None:
        return tuple(value.shape)
    return (value.lora_B.shape[0], value.lora_A.shape[1]) if isinstance(value, Update) else ()


def _models(base: Base) -> dict[str, dict[str, Slot]]:
    """The weights of each model, by the level that stands in front of its names; of none ``""``."""
    found: dict[str, dict[str, Slot]] = {}
    for path, slot in base.items():
        component, rest = in_checkpoint(path)
        level = path.removesuffix(f".{rest}") if component else path.partition(".")[0]
        known = bool(component) or level in PARTS
        found.setdefault(level if known else "", {})[rest if component else path] = slot
    return {
        level: own if level in CHECKPOINTS else {_behind(level, p): s for p, s in own.items()}
        for level, own in found.items()
    }


def _behind(level: str, path: str) -> str:
    return path.removeprefix(f"{level}.") if level else path


def _model(level: str, own: Base) -> str:
    """ComfyUI's name of the model that has these weights."""
    if level in PREFIXES:
        return level
    t5 = [match for path in own if (match := _T5.fullmatch(path))]
    if t5:  # mT5's every layer has positions of its own
        later = any(m["block"] != "0" and m["rest"] == "relative_attention_bias" for m in t5)
        return f"text_encoders.{'umt5xxl' if later else 't5xxl'}.transformer"
    text = level in _ENCODERS or (not level and part_told(own, own) == "text_encoder")
    if not text:
        return _DENOISER
    # a text encoder by itself: CLIP-L and CLIP-G have the same names of layers
    if level not in _ENCODERS:
        raise FileError(
            "a text encoder, of which ComfyUI knows several: give its name there as prefix "
            f"(--prefix): {', '.join(PREFIXES[1:])}."
        )
    # Stable Diffusion 2's only encoder is OpenCLIP's H, of the same name as 1's CLIP-L
    wide = any(slot.shape[1:] == (_OPEN_CLIP_H,) for path, slot in own.items() if "fc1" in path)
    name = "clip_h" if wide and level == "text_encoder" else _ENCODERS[level]
    return f"text_encoders.{name}.transformer"


def _as_published(own: Base) -> Base:
    """A denoiser's weights under the names of its checkpoint, as ComfyUI has loaded it."""
    names = original_of(own)
    if not any(name.startswith(_HUNYUAN) for name in names):
        return names
    return {_renamed_end(name): slot for name, slot in names.items()}


def _renamed_end(name: str) -> str:
    """A name of HunyuanVideo's checkpoint as ComfyUI has it, which renames some ends.

    Example:
        >>> _renamed_end("double_blocks.0.img_mlp.fc1"), _renamed_end("time_in.mlp.2")
        ('double_blocks.0.img_mlp.0', 'time_in.out_layer')
    """
    ends = (own for own in _RENAMED if name.endswith(own))
    end = next(ends, "")
    return name.removesuffix(end) + _RENAMED.get(end, "")


def _as_transformers(own: Base) -> Base:
    """A text encoder's weights under transformers' names, OpenCLIP's fused ones apart."""
    if not any(".resblocks." in f".{path}" for path in own):
        return {_in_transformers(path): slot for path, slot in own.items()}
    found = {}
    for name, there in places_of(own).others.items():
        if _CLIP.fullmatch(name):
            path = there.paths[0]
            _, held = next(iter(there.held.values()))
            # of a fused in_proj the share of this projection, by how many parts each has
            rows = own[path].shape[0] * len(there.rows[0]) // len(held[0])
            found[_in_transformers(name)] = replace(own[path], shape=(rows, *own[path].shape[1:]))
    return found


def _in_transformers(path: str) -> str:
    """A name with the level above it that ComfyUI's models have.

    Example:
        >>> _in_transformers("encoder.layers.0.mlp.fc1"), _in_transformers("layers.0.mlp.up_proj")
        ('text_model.encoder.layers.0.mlp.fc1', 'model.layers.0.mlp.up_proj')
    """
    for pattern, level in ((_CLIP, "text_model"), (_LANGUAGE, "model")):
        match = pattern.fullmatch(path)
        if match is not None:
            return f"{level}.{match[1]}"
    return path


def _check(name: str, update: Update, magnitude: Optional[Tensor]) -> None:
    check_told(name, update, "ComfyUI's format")
    assert update.shape is not None
    flat = update.layout == "matrix" and len(update.shape) in (2, 3, 4, 5)
    if not flat or update.up_kernel != 1 or update.kind not in (None, "linear", "convolution"):
        raise FileError(
            f"{name}: {with_article(update.kind or update.layout)} of shape "
            f"{list(update.shape)}; ComfyUI's format holds Linear and convolutions only. Keep "
            "the native format."
        )
    if magnitude is not None and magnitude.shape[0] == update.shape[0]:
        raise FileError(
            f"{name}: a DoRA of each output, which ComfyUI divides by another norm (that of the "
            "base alone). Merge it into the base instead."
        )


def _own(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def passed_over(content: Content, base: Base) -> list[str]:
    """The keys of a file that ComfyUI would not load onto this model."""
    stems = {key: stem(key) for key in content.state}
    # the prefix is not handed on to here, so it is found in the keys that it was written into
    given = (one for one in PREFIXES[1:] if any(name.startswith(one) for name in stems.values()))
    known = set(names_of(base, next(given, None)))
    return [key for key, name in stems.items() if name not in known]


FORMAT = Format(
    "comfyui",
    marks=(),
    like="diffusers",
    read=diffusers.read,
    write=write,
    passed_over=passed_over,
    kinds=("lora", "soft", "dora", "loha", "lokr"),
    prefix=Prefix("prefix", "ComfyUI's keys (diffusion_model)"),
)
