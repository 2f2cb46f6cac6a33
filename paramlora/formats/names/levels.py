"""What stands in front of a module's path and is no part of it, and which model it tells."""

from collections.abc import Iterator, Mapping

DENOISER = ("unet", "transformer", "prior", "decoder")
_FIRST, _SECOND, _THIRD = ("text_encoder",), ("text_encoder_2",), ("text_encoder_3",)

# where checkpoints of several models have each, and the components of a pipeline that it can be
CHECKPOINTS: dict[str, tuple[str, ...]] = {
    # Stability's
    "model.diffusion_model": DENOISER,
    "cond_stage_model.transformer": _FIRST,
    "cond_stage_model.model": _FIRST,
    "conditioner.embedders.0.transformer": _FIRST,
    "conditioner.embedders.0.model": _FIRST,
    "conditioner.embedders.1.model": _SECOND,
    # ComfyUI's
    "diffusion_model": DENOISER,
    "text_encoders.clip_l.transformer": _FIRST,
    "text_encoders.clip_h.transformer": _FIRST,
    "text_encoders.clip_g.transformer": _SECOND,
    "text_encoders.t5xxl.transformer": ("text_encoder_2", "text_encoder_3", "text_encoder"),
    "text_encoders.umt5xxl.transformer": _FIRST,
    "text_encoders.qwen25_7b.transformer": _FIRST,
    "text_encoders.qwen3_4b.transformer": _FIRST,
    "text_encoders.gemma2_2b.transformer": _FIRST,
    "text_encoders.llama.transformer": _FIRST,
}
# every level, and the same of it; none where it tells nothing
LEVELS: dict[str, tuple[str, ...]] = {
    "_orig_mod": (),  # torch.compile
    "module": (),  # DistributedDataParallel
    "_fsdp_wrapped_module": (),
    "_checkpoint_wrapped_module": (),
    "base_model.model": (),  # peft
    "base_model": (),
    "state_dict": (),
    "model": (),
    "text_model": (),  # of CLIP, which transformers 5 has left out
    "language_model": (),  # beside a vision tower, above and below other levels as versions go
    "unet": ("unet",),
    "transformer": ("transformer",),
    "transformer_2": ("transformer_2",),
    "prior": ("prior",),
    "decoder": ("decoder",),
    "text_encoder": _FIRST,
    "text_encoder_2": _SECOND,
    "text_encoder_3": _THIRD,
    "text_encoders": (),
    **CHECKPOINTS,
}
# in front of a path with ``_`` for ``.``: kohya's, LyCORIS' and OneTrainer's
MANGLED: dict[str, tuple[str, ...]] = {
    "lora_unet": DENOISER,
    "lora_te": _FIRST,
    "lora_te1": _FIRST,
    "lora_te2": _SECOND,
    "lora_te3": ("text_encoder_3", "text_encoder_2"),  # T5, which is Flux' second
    "lora_transformer": ("transformer",),
    "lora_prior_unet": ("prior",),
    "lora_prior_te": _FIRST,
    "lycoris": ("unet", "transformer"),
}
# between the modules of a path, wherever a wrapper stands
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MOST, _LONGEST = 8, 2048  # levels in front of one path, and characters of one that has any

_Levels = dict[str, dict[str, tuple[str, ...]]]


def _by_start(levels: Mapping[str, tuple[str, ...]], mark: str) -> _Levels:
    """The levels by what stands before their first `mark`: of most paths none needs a look."""
    found: _Levels = {}
    for level, told in levels.items():
        found.setdefault(level.partition(mark)[0], {})[level] = told
    return found


_DOTTED = _by_start({f"{level}.": told for level, told in LEVELS.items()}, ".")
_FLAT = _by_start(
    {f"{level.replace('.', '_')}_": told for level, told in {**LEVELS, **MANGLED}.items()}, "_"
)


def shorter(path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A dotted path without ever more of its levels, the longest first, and the components that
    those can mean.

    Example:
        >>> [path for path, _ in shorter("base_model.model.text_model.q")]
        ['base_model.model.text_model.q', 'model.text_model.q', 'text_model.q', 'q']
    """
    yield from _shorter(path, _DOTTED, ".")


def flat(path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What `shorter` gives, of a path that is mangled, wholly or in part.

    Example:
        >>> list(flat("lora_te2_text_model_layers_0.q"))[1:]
        [('text_model_layers_0_q', ('text_encoder_2',)), ('layers_0_q', ('text_encoder_2',))]
    """
    for rest, components in _shorter(path.replace(".", "_"), _FLAT, "_"):
        yield rest, components
        if rest.startswith("_"):  # ``lora_unet__blocks``
            yield rest.lstrip("_"), components


def in_checkpoint(path: str) -> tuple[str, str]:
    """(component, path in it) of a checkpoint of several models; no component of any other.

    Example:
        >>> in_checkpoint("conditioner.embedders.1.model.ln_final"), in_checkpoint("unet.a")
        (('text_encoder_2', 'ln_final'), ('', 'unet.a'))
    """
    for level in sorted(CHECKPOINTS, key=len, reverse=True):
        if path.startswith(f"{level}."):
            return CHECKPOINTS[level][0], path[len(level) + 1 :]
    return "", path


def belongs(path: str, component: str) -> bool:
    """Whether a file's path can be of this component.

    Example:
        >>> belongs("lora_te2_a", "text_encoder_2"), belongs("text_encoder_2.a", "text_encoder")
        (True, False)
    """
    return any(component in told for _, told in (*shorter(path), *flat(path)))


def _shorter(path: str, levels: _Levels, mark: str) -> list[tuple[str, tuple[str, ...]]]:
    found: dict[str, tuple[str, ...]] = {path: ()}
    fresh = [path] if len(path) <= _LONGEST else []
    for _ in range(_MOST):
        # level by level, as any may stand in front of any other
        fresh = [long for long in fresh if long.partition(mark)[0] in levels]
        if not fresh:
            break
        after = {
            long[len(level) :]: found[long] or told
            for long in fresh
            for level, told in _in_front(long, levels[long.partition(mark)[0]])
        }
        fresh = [rest for rest in after if rest not in found]
        found |= {rest: after[rest] for rest in fresh}
    return sorted(found.items(), key=lambda one: -len(one[0])) if len(found) > 1 else [(path, ())]


def _in_front(
    path: str, levels: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, tuple[str, ...]]]:
    """The levels that a path begins with; of a component only the longest, as no other is meant."""
    known = [one for one in levels.items() if path.startswith(one[0]) and len(path) > len(one[0])]
    longest = max(known, key=lambda one: len(one[0]), default=None)
    return [longest] if longest is not None and longest[1] else known
