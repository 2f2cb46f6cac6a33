"""Inputs of a model, from the names of its arguments and its configuration."""

import inspect
import itertools
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from benchmarks.tiny import configs_of

BATCH, WORDS, PATCHES = 2, 8, 16
MOST = 16  # combinations of values that are tried for one choice of arguments
CHOICES = 24  # of arguments, for one model
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


def tries(model: nn.Module, dtype: torch.dtype, asked: list[list[str]]) -> Iterator[Inputs]:
    """Arguments to call a model with, the likeliest first; `asked` is where the caller puts those
    that an error asked for (see `asked_for`), which come next."""
    seen: list[list[str]] = []
    choices = [names for names in _choices(model) if names]
    while choices and len(seen) < CHOICES:
        names = choices.pop(0)
        if names in seen:
            continue
        seen.append(names)
        for chosen in _combined([candidates(name, model.config, names) for name in names]):
            made = {name: make() for name, make in zip(names, chosen)}
            yield {n: v.to(dtype) if is_real(v) else v for n, v in made.items()}
        choices = asked + choices
        asked.clear()


def _combined(pools: "list[Pool]") -> "list[tuple[Callable[[], Any], ...]]":
    """One value of each pool, those near the front of all pools first."""
    places = itertools.product(*(range(len(pool)) for pool in pools))
    first = itertools.islice(sorted(itertools.islice(places, 4096), key=sum), MOST)
    return [tuple(pool[i] for pool, i in zip(pools, at)) for at in first]


def resized(error: Exception, inputs: Inputs) -> Optional[Inputs]:
    """The inputs with the size that an error wants in place of the one that it names, if any."""
    for pattern in _SIZES_IN_ERRORS:
        told = re.search(pattern, str(error))
        if told and told["got"] != told["want"]:
            sizes = int(told["got"]), int(told["want"])
            new = {name: _with_size(value, *sizes) for name, value in inputs.items()}
            return new if any(new[name] is not inputs[name] for name in inputs) else None
    return None


_SIZES_IN_ERRORS = (
    r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<want>\d+)x\d+\)",
    r"to have (?P<want>\d+) channels, but got (?P<got>\d+) channels",
    r"expected input with shape \[\*, (?P<want>\d+)\], but got input of size\[.*?(?P<got>\d+)\]",
    r"size of tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<want>\d+)\)",
    r"Expected size (?P<want>\d+) but got size (?P<got>\d+)",
    r"length (?P<got>\d+) is not a multiple of (?P<want>\d+)",
)


def _with_size(value: Any, got: int, want: int) -> Any:
    """A tensor whose last size of `got` is `want`; anything else as it is."""
    if not isinstance(value, Tensor) or got not in value.shape:
        return value
    at = value.dim() - 1 - list(value.shape)[::-1].index(got)
    shape = [*value.shape[:at], want, *value.shape[at + 1 :]]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return made.to(value.dtype) if value.is_floating_point() else torch.ones_like(made).long()


def asked_for(model: nn.Module, error: Exception, names: list[str]) -> list[list[str]]:
    """`names` with the arguments that a failed call lacked: those that the error's text names, else
    one that is None where the innermost line reads it. None where it lacked nothing known."""
    known = [
        name
        for name in inspect.signature(model.forward).parameters
        if name not in names and candidates(name, model.config, [*names, name])
    ]
    said = set(re.findall(r"\w+", str(error)))
    found = [name for name in known if name in said]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if found:
            break
        lines = (linecache.getline(frame.f_code.co_filename, line + i) for i in range(4))
        read = set(re.findall(r"\w+", " ".join(lines)))
        unset = [n for n in known if n in read and frame.f_locals.get(n, n) is None]
        found = unset[:1]
    return [[*names, *found]] if found else []


def is_real(value: Any) -> bool:
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
    if make is None:
        make = next((pool for pattern, pool in _BY_PATTERN if re.fullmatch(pattern, name)), None)
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
    if getattr(config, "backbone_config", None) is not None:
        # an image, of which 32nds are left: a batch norm of two numbers multiplies every rounding
        return [noise(BATCH, 3, 128, 128)]
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
# of names that the table above lacks, the first that matches
_BY_PATTERN: list[tuple[str, Callable[[Any], Pool]]] = [
    (r".*(past_key_values|inference_session|labels|inputs_embeds).*", lambda config: []),
    (r"\w*time_?steps?", _BY_NAME["timestep"]),
    (r".*(original|target|image)_sizes?|crop_coords", _one(lambda c: noise(BATCH, 2))),
    (r".*input_ids|.*_codes?|codes", _words),
    (r".*input_values", lambda config: _sounds(config)[2:] + _sounds(config)[:2]),
    (r".*pixel_values.*|.*images?|prompt_masks", _images),
    (r".*mask", _one(lambda c: ones(BATCH, WORDS), lambda c: ones(BATCH, 5))),
    (r".*lengths?", _one(lambda c: given(torch.tensor([40, 40])))),
    (r".*(input_)?features", _spectra),
    (
        r"position_ids|.*_ids|indicator|.*_(index|indices)|ids_\w+",
        _one(
            lambda c: given(torch.arange(WORDS).expand(BATCH, WORDS)),
            lambda c: given(torch.zeros(BATCH, 5).long()),
            lambda c: given(torch.zeros(WORDS, 3)),
        ),
    ),
    (r"state|pooled\w*|\w*vector|speaker_\w+", _one(lambda c: noise(BATCH, _width(c)))),
    (r"class_labels", _one(lambda c: given(torch.tensor([1, 2])))),
    (r".*(embeds|embeddings?|hidden_states|latents|feats)", _features),
]
