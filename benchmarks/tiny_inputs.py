"""Inputs of a model, from the names of its arguments and its configuration."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tiny import configs_of

BATCH, WORDS, PATCHES = 2, 8, 16
MOST = 12  # combinations of values that are tried for one choice of arguments
Inputs = dict[str, Any]
# tried beside what a model needs, in this order
MAIN = (
    *("input_ids", "pixel_values", "input_features", "input_values", "pixel_values_videos"),
    *("past_values", "inputs_embeds", "hidden_states"),
)
BESIDE = (
    *("decoder_input_ids", "bbox", "img_ids", "txt_ids", "guidance", "pooled_projections"),
    *("encoder_hidden_states", "timestep", "input_features_mask", "future_values"),
    *("future_time_features", "qformer_input_ids"),
)


def tries(model: nn.Module, dtype: torch.dtype) -> Iterator[Inputs]:
    """Arguments to call a model with, the likeliest first."""
    seen: list[list[str]] = []
    for names in _choices(model):
        if not names or names in seen:
            continue
        seen.append(names)
        pools = [candidates(name, model.config, names) for name in names]
        for chosen in itertools.islice(itertools.product(*pools), MOST):
            made = {name: make() for name, make in zip(names, chosen)}
            yield {n: v.to(dtype) if _is_real(v) else v for n, v in made.items()}


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _choices(model: nn.Module) -> Iterator[list[str]]:
    """Which arguments to give: those needed, the main one, pairs of inputs."""
    taken = inspect.signature(model.forward).parameters
    needed = [
        name
        for name, one in taken.items()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", None)
    first = [*needed, *([main] if isinstance(main, str) else [])]
    pairs = [["input_ids", other] for other in MAIN[1:5]]
    for names in (first, [*first, *BESIDE], [*first, "decoder_input_ids"], *pairs):
        yield list(dict.fromkeys(n for n in names if n in taken))
    for name in MAIN:
        yield [n for n in dict.fromkeys((*needed, name)) if n in taken]


def of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these numbers in a configuration or those inside of it."""
    for part in configs_of(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def tokens() -> Tensor:
    """Word numbers that are no special tokens."""
    return torch.arange(BATCH * WORDS).reshape(BATCH, WORDS) % 80 + 5


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def given(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def ones(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(*shape, dtype=torch.long)


Pool = list[Callable[[], Any]]


def candidates(name: str, config: Any, names: list[str]) -> Pool:
    """Values for an argument of this name, the likeliest first; none for an unknown one."""
    if name in ("pixel_values", "hidden_states", "sample") and "grid_thw" in names:
        return _flat_patches(config)
    make = _BY_NAME.get(name)
    return make(config) if make is not None else []


def _flat_patches(config: Any) -> Pool:
    channels, size = _first(of(config, "num_channels", "in_channels", default=3)), config.patch_size
    frames = getattr(config, "temporal_patch_size", 1)
    rows = BATCH * PATCHES
    return [
        noise(rows, channels * frames * size**2),
        noise(rows, channels * size**2),
        noise(rows, channels, size, size),
        noise(1, rows, channels, size, size),
        noise(rows, _width(config)),
    ]


def _width(config: Any) -> int:
    return int(_first(of(config, "hidden_size", "d_model", "embed_dim", "dim", default=64)))


def _words(config: Any) -> Pool:
    books = of(config, "num_codebooks", "num_code_groups", default=4)
    return [
        given(tokens()),
        given(torch.stack([tokens()] * books, 1)),
        given(torch.stack([tokens()] * books, -1)),
    ]


def _side(config: Any) -> tuple[int, int]:
    size = of(config, "image_size", "img_size", "input_size", default=32)
    size = (size["height"], size["width"]) if isinstance(size, dict) else size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _images(config: Any) -> Pool:
    channels = _first(of(config, "num_channels", "in_channels", "in_chans", default=3))
    frames = of(config, "num_frames", default=2)
    h, w = _side(config)
    return [
        noise(BATCH, channels, h, w),
        noise(BATCH, frames, channels, h, w),
        noise(BATCH, 3, h, w),
        noise(BATCH, channels, 64, 64),
        noise(BATCH, 1, channels, h, w),
        noise(BATCH, frames, h, w, channels),
        noise(BATCH, channels, 128, 128),
    ]


def _mels(config: Any) -> int:
    names = ("num_mel_bins", "feature_size", "input_dim", "n_mels", "feat_dim", "mel_bins")
    return int(_first(of(config, *names, default=80)))


def _sounds(config: Any) -> Pool:
    mels, longest = _mels(config), of(config, "max_length", default=64)
    return [
        noise(BATCH, 1600),
        noise(BATCH, 1, 1600),
        noise(BATCH, 20, mels),
        noise(BATCH, longest, mels),
        noise(BATCH, 1, 64, mels),
        noise(BATCH, 1920),
        noise(BATCH, 1, 1920),
    ]


def _spectra(config: Any) -> Pool:
    mels, longest = _mels(config), of(config, "max_source_positions", default=32)
    return [
        noise(BATCH, mels, 2 * longest),
        noise(BATCH, 40, mels),
        noise(BATCH, mels, 64),
        noise(BATCH, 1, 1024, 64),
        noise(BATCH, 80, 128),
    ]


def _past(config: Any) -> int:
    lags = of(config, "lags_sequence", default=[0])
    return int(of(config, "context_length", default=32)) + max(lags or [0])


def _series(config: Any) -> Pool:
    channels = of(config, "num_input_channels", default=1)
    length = of(config, "context_length", "prediction_length", default=32)
    return [noise(BATCH, _past(config)), noise(BATCH, length, channels), noise(BATCH, 128)]


def _features(config: Any) -> Pool:
    """Hidden states of transformers, and what diffusers' models call so."""
    width, channels = _width(config), _first(of(config, "in_channels", default=4))
    if not hasattr(config, "sample_size") and not hasattr(config, "in_channels"):
        shapes: list[tuple[int, ...]] = [(WORDS, width), (width, WORDS), (width, 8, 8)]
        return [*(noise(BATCH, *shape) for shape in shapes), noise(BATCH * WORDS, width)]
    return [
        noise(BATCH, channels, 8, 8),
        noise(BATCH, PATCHES, channels),
        noise(BATCH, channels, 2, 8, 8),
        noise(BATCH, 2, channels, 8, 8),
        noise(BATCH, channels, PATCHES),
        noise(BATCH, WORDS, width),
    ]


def _samples(config: Any) -> Pool:
    channels = _first(of(config, "in_channels", "audio_channels", "latent_channels", default=3))
    size = _first(of(config, "sample_size", default=16))
    size = min(size, 32)
    return [
        noise(BATCH, channels, size, size),
        noise(BATCH, channels, 2, size, size),
        noise(BATCH, channels, 5, 16, 16),
        noise(BATCH, 2, channels, size, size),
        noise(BATCH, channels, 256),
        noise(BATCH, 3, 32, 32),
    ]


def _conditions(config: Any) -> Pool:
    names = ("cross_attention_dim", "joint_attention_dim", "text_embed_dim", "text_dim")
    names += ("caption_channels", "encoder_hid_dim", "in_text_dim", "text_hidden_dim")
    width = _first(of(config, *names, default=64))
    return [noise(BATCH, 5, int(width))]


def _one(*values: Callable[[Any], Callable[[], Any]]) -> Callable[[Any], Pool]:
    return lambda config: [value(config) for value in values]


_BY_NAME: dict[str, Callable[[Any], Pool]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "task_inputs", "qformer_input_ids"), _words),
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "pixel_values_images"), _images),
    "input_values": _sounds,
    **dict.fromkeys(("input_features", "spectrogram", "audio_features"), _spectra),
    "past_values": _series,
    "past_observed_mask": _one(lambda c: ones(BATCH, _past(c))),
    "past_time_features": _one(
        lambda c: noise(BATCH, _past(c), of(c, "num_time_features", default=0) or 0)
    ),
    "future_values": _one(lambda c: noise(BATCH, of(c, "prediction_length", default=8))),
    "future_time_features": _one(
        lambda c: noise(
            BATCH,
            of(c, "prediction_length", default=8),
            of(c, "num_time_features", default=0) or 0,
        )
    ),
    "hidden_states": _features,
    "sample": _samples,
    "x": _samples,
    "z": _samples,
    "encoder_hidden_states": _conditions,
    "controlnet_cond": _one(lambda c: noise(BATCH, 3, 128, 128)),
    "timestep": _one(
        lambda c: given(torch.tensor([3, 700])), lambda c: given(torch.tensor([0.3, 0.7]))
    ),
    "codebook_idx": _one(lambda c: lambda: 1),
    "t": _one(lambda c: given(torch.tensor([0.3, 0.7]))),
    "guidance": _one(lambda c: given(torch.tensor([1.0, 3.0]))),
    "conditioning_scale": _one(lambda c: given(torch.tensor(1.0))),
    "pooled_projections": _one(
        lambda c: noise(BATCH, of(c, "pooled_projection_dim", default=64)),
    ),
    "encoder_attention_mask": _one(lambda c: ones(BATCH, 5)),
    "img_ids": _one(lambda c: given(torch.zeros(PATCHES, 3))),
    "txt_ids": _one(lambda c: given(torch.zeros(5, 3))),
    "inputs_embeds": _one(lambda c: noise(BATCH, WORDS, _width(c))),
    "attention_mask": _one(lambda c: ones(BATCH, WORDS)),
    "input_features_mask": _one(lambda c: ones(BATCH, 40), lambda c: ones(BATCH, 64)),
    "bbox": _one(lambda c: given(torch.tensor([1, 2, 3, 4]).expand(BATCH, WORDS, 4))),
    **dict.fromkeys(
        ("grid_thw", "image_grid_thw"), _one(lambda c: given(torch.tensor([[1, 4, 4]] * BATCH)))
    ),
}
