"""Matching the entries of a configuration to the tensors of a model. Changes nothing."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from paramlora.config import FROM_WEIGHT, ConfigLike, LoRAConfig, TargetConfig, as_config
from paramlora.errors import ConfigError, TargetError, closest, counted, listed, warn
from paramlora.model.classes import is_hf_conv1d, is_linear, is_of
from paramlora.model.match import Names
from paramlora.model.presets import PRESETS, Place, spelled_group
from paramlora.model.quantised import is_quantised, shape_of
from paramlora.model.ties import holders
from paramlora.update.attached import AttachedUpdate, elements
from paramlora.update.casts import is_storage
from paramlora.update.compat import ANY_CONVOLUTION, ANY_TRANSPOSED
from paramlora.update.geometry import FLOATS, Layout, matrix_shape
from paramlora.update.kinds import kind_of
from paramlora.update.names import BRANCHES

_TRANSPOSED = (nn.Embedding, nn.EmbeddingBag, *ANY_TRANSPOSED)
# compiled, checkpointed and sharded layers have the user's layer under one of these names
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPER = re.compile("|".join(_WRAPPED))
# their weights have more than two dimensions, and are one matrix all the same
_FLAT = (*ANY_CONVOLUTION, nn.Bilinear)
_NO_ENTRY = TargetConfig("", 1)
_LISTED = 12  # names in a message
# any other name, or expression, is narrower
_BROADEST = {"all-linear": -3, "attention": -1}  # and between them "type:"


@dataclass(frozen=True)
class Target:
    """One tensor to adapt: its owner's path, its name there, and the entry that claims it.

    `kind` says what formats name apart: ``"linear"`` (transformers' ``Conv1D`` too, whose layout is
    transposed), ``"convolution"``, ``"embedding"``, ``"parameter"`` (a tensor of another name than
    ``weight``), ``"weight"`` (of a class outside torch), else the name of torch's class.
    """

    module: str
    tensor: str
    entry: TargetConfig
    shape: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    kind: str = "linear"
    groups: int = 1

    @property
    def path(self) -> str:
        """The key's stem in files: the module path, with the tensor's name unless ``weight``."""
        return stem(self.module, self.tensor)

    @property
    def parameters(self) -> int:
        """Elements of ``lora_A`` and ``lora_B`` together, of the tensor trained whole, or of what
        another kind of update trains."""
        return elements(kind_of(self.entry), self.entry, self.shape, self.layout)


def targets(model: nn.Module, config: ConfigLike, strict: bool = False) -> list[Target]:
    """What `attach` would adapt, in the order in which it does; nothing is changed.

    Args:
        model: any module.
        config: a `LoRAConfig`, a dict, or a path to JSON.
        strict: an entry that matches nothing is an error instead of a warning.

    Raises:
        ConfigError: the configuration is wrong.
        TargetError: nothing matches, two entries claim one tensor, an entry names a container,
            a rank is more than the matrix holds, or a weight is not of real numbers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> [(t.path, t.shape, t.parameters) for t in targets(model, {"*": {"r": 2}})]
        [('0', (3, 4), 14), ('1', (2, 3), 10)]
    """
    parsed = as_config(config)
    check_model(model)
    return chosen_targets(unwrapped(model), parsed, strict)


def chosen_targets(model: nn.Module, parsed: LoRAConfig, strict: bool) -> list[Target]:
    """The `targets` of a model that is unwrapped and checked already."""
    places = Places(model, parsed.exclude)
    found = {entry.name: _matches(places, entry) for entry in parsed.entries}
    _report_empty(places, parsed, found, strict)
    places.report_unused(parsed, strict)
    chosen = _most_specific(parsed, found)
    _check_thin(chosen)
    return [_checked(model, target, chosen) for target in chosen]


def targets_at(model: nn.Module, entries: Mapping[str, TargetConfig]) -> list[Target]:
    """The targets at exact paths, as `Target.path` spells them, in the model's order.

    Raises:
        TargetError: a path that the model lacks, or a rank, scale or kind that does not fit.
    """
    chosen = [
        replace(target, entry=entries[target.path])
        for target in (*_all(model, _tensors), *_all(model, buffers_of))
        if target.path in entries
    ]
    # what no update of the entry's kind can have counts as missing
    found = {t.path for t in chosen if len(t.shape) >= 2 or kind_of(t.entry).vectors}
    missing = sorted(entries.keys() - found)
    if missing:
        text = f'"{missing[0]}" matches nothing.{closest_in(model, missing[0])}'
        text += f" So do {listed(missing[1:])}." if missing[1:] else ""
        raise TargetError(f"the adapter does not fit {type(model).__name__}: {text}")
    return [_checked(model, target, chosen) for target in chosen]


def adaptable(model: nn.Module) -> Iterator[Target]:
    """Every tensor that a low-rank update fits, with an entry that says nothing yet."""
    return (target for target in _all(model, _tensors) if len(target.shape) >= 2)


def vectors(model: nn.Module) -> Iterator[Target]:
    """Every parameter of one dimension, such as a bias or a norm's weight."""
    return (target for target in _all(model, _tensors) if len(target.shape) == 1)


def tensor_paths(model: nn.Module) -> set[str]:
    """The path of every tensor, of any number of dimensions, as adapters' files spell it."""
    return {target.path for target in (*_all(model, _tensors), *_all(model, buffers_of))}


def _all(model: nn.Module, places: Callable[[nn.Module], Iterator[Place]]) -> Iterator[Target]:
    for path, module, name, tensor in places(unwrapped(model)):
        yield _target(path, module, name, tensor, _NO_ENTRY)


def _checked(model: nn.Module, target: Target, chosen: list[Target]) -> Target:
    why = kind_of(target.entry).check_site(target.entry, target.shape, target.layout)
    if why and not _follows(model, target, chosen):
        raise TargetError(f'"{target.entry.name}" matches {target.path or "weight"}, {why}')
    _check_rank(target)
    _check_scale(target)
    if kind_of(target.entry).beside:
        _check_soft(target, model.get_submodule(target.module))
    return target


def _follows(model: nn.Module, target: Target, chosen: list[Target]) -> bool:
    """Whether a tied tensor gets the update of another layer, which is made by that one's sides:
    one entry has chosen all who hold it, and this is not the first."""

    def held(one: Target) -> torch.Tensor:
        owner = model.get_submodule(one.module)
        own = owner._parameters.get(one.tensor, owner._buffers.get(one.tensor))
        return shown(owner, one.tensor) if own is None else own

    tensor = held(target)
    group = [one for one in chosen if one.entry == target.entry and held(one) is tensor]
    return group[:1] != [target] and len(group) == holders(model)[id(tensor)]


def _target(
    path: str, module: nn.Module, name: str, tensor: torch.Tensor, entry: TargetConfig
) -> Target:
    layout = _layout(module, name, tensor) if tensor.dim() > 1 else "matrix"
    kind = _kind(module, name)
    groups = module.groups if isinstance(module, ANY_CONVOLUTION) else 1
    shape = shape_of(module, tensor)
    return Target(path, name, entry, shape, layout, tensor.dtype, kind, groups)


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module, got a {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        # a lazy layer's weight gets its shape at the first call
        if is_lazy(parameter):
            raise TargetError(
                f"{name} has no shape yet. Call the model once on an example, and then attach."
            )
        if parameter.is_inference():
            raise TargetError(
                f"{name} was made under torch.inference_mode(), where nothing can be trained. "
                "Build the model outside, or under torch.no_grad()."
            )


def stem(module: str, tensor: str) -> str:
    """The key's stem in files of a tensor of the module at a path."""
    return own_path(module if tensor == "weight" else f"{module}.{tensor}" if module else tensor)


def own_path(path: str) -> str:
    """The path without the names that torch's wrappers put into it."""
    if _WRAPPER.search(path) is None:
        return path
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside ``torch.compile``'s or ``DistributedDataParallel``'s."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        "_orig_mod" in model._modules
    ):
        # both wrappers hold the model as their only child
        model = next(iter(model.children()))
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(module path, module, tensor name, base tensor) of every parameter, each owner once."""
    for path, module in model.named_modules():
        # an update's own tensors are no targets
        if not {"parametrizations", BRANCHES}.isdisjoint(path.split(".")):
            continue
        first: dict[int, str] = {}
        for name, tensor in module._parameters.items():
            if tensor is not None and first.setdefault(id(tensor), name) == name:
                yield path, module, name, tensor
        # not get: a scripted layer's modules have none
        if "parametrizations" in module._modules:
            lists = module._modules["parametrizations"]
            for name in lists if isinstance(lists, nn.ModuleDict) else ():
                yield path, module, name, shown(module, name)


def buffers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(module path, module, name, tensor) of every buffer in a state dict, each owner once."""
    for path, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if not scripted and {"parametrizations", BRANCHES}.isdisjoint(path.split(".")):
            # a buffer outside of state dicts is a cache, and no file could hold it
            for name, tensor in module._buffers.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield path, module, name, tensor


def shown(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor of the shape that a parametrized one has; reading spectral norm would step it."""
    # not by attribute: that would compute the sum
    plist: Any = module._modules["parametrizations"][name]  # type: ignore[index]
    if all(isinstance(p, AttachedUpdate) for p in plist):
        return plist.original  # type: ignore[no-any-return]
    # a copy, whose power iteration may step
    return _computed(copy.deepcopy(plist))


def base_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor as it is without the updates that are attached."""
    parametrized = "parametrizations" in module._modules
    if parametrized and name in module._modules["parametrizations"]:  # type: ignore[operator]
        return shown(module, name)
    found: torch.Tensor = getattr(module, name)
    return found


@torch.no_grad()
def _computed(plist: Any) -> torch.Tensor:
    return plist()  # type: ignore[no-any-return]


class Places:
    """Every tensor of a model, found by what its path or its layer's path ends in.

    A file that was loaded has an entry for each layer: looking every one up among all paths would
    take a time that grows with the square of their number.

    Args:
        model: unwrapped.
        exclude: what no entry may mean, see `Places.meant`.
    """

    def __init__(self, model: nn.Module, exclude: tuple[str, ...] = ()) -> None:
        self.model = model
        tensors, buffers = list(_tensors(model)), list(buffers_of(model))
        self.every = [*tensors, *buffers]
        # of all tensors: an exclusion may name what another one leaves out
        self._out = {pattern: self._excluded(pattern) for pattern in exclude}
        self.all, self.buffers = self._left(tensors), self._left(buffers)
        self._by_end: dict[str, list[Place]] = {}
        for place in self.all:
            for path in _names(place):
                for end in _ends(own_path(path)):
                    found = self._by_end.setdefault(end, [])
                    if not found or found[-1] is not place:
                        found.append(place)

    def matching(self, pattern: str) -> list[Place]:
        """The tensors that an entry names, those of any size among them."""
        if pattern.startswith("type:"):
            return [one for one in self.all if is_of(pattern[5:], one[1])]
        if pattern.startswith("re:") or "*" in pattern.split("."):
            return [one for one in self.all if any(fits(pattern, name) for name in _names(one))]
        named = self._by_end.get(pattern, [])
        # a layer that is really called "attention" goes before the preset
        preset = PRESETS.get(pattern, _none) if not named else _none
        return named or preset(self.model, self.all)

    def named(self, pattern: str) -> set[str]:
        """The paths of the modules, also those that hold others, and tensors of a name."""
        if pattern.startswith("type:"):
            return {path for path, one in self.model.named_modules() if is_of(pattern[5:], one)}
        return {path for path in self._paths() if path and fits(pattern, path)}

    def meant(self, pattern: str) -> set[str]:
        """What a pattern names, found in bounded time, and what a preset means.

        Raises:
            ValueError: a regular expression that could take for ever, or is none.
        """
        # `re:` here may come from a file, unlike `fits`, which follows the user's own
        if pattern.startswith("re:"):
            return _bounded(pattern, self._paths())
        at = self.named(pattern)
        if at or pattern not in PRESETS:
            return at
        # of every tensor, not of those that earlier exclusions left
        meant = PRESETS[pattern](self.model, self.every)
        return {_full(path, name) for path, _, name, _ in meant}

    def _excluded(self, pattern: str) -> set[str]:
        try:
            return self.meant(pattern)
        except ValueError as error:
            raise ConfigError(f'"exclude": {error}. Give a plain name, or several.') from error

    def _left(self, places: list[Place]) -> list[Place]:
        """The places that are not excluded, nor lie in what is."""
        out = set().union(*self._out.values())
        return [
            one for one in places if not out or out.isdisjoint(holders_of(_full(one[0], one[2])))
        ]

    def hides(self, pattern: str) -> bool:
        """Whether a name would mean something, were nothing excluded."""
        return bool(self._out) and bool(Places(self.model).matching(pattern))

    def _paths(self) -> list[str]:
        """The path of every module and tensor, as the model spells it."""
        tensors = [_full(path, name) for path, _, name, _ in self.every]
        return [*(path for path, _ in self.model.named_modules()), *tensors]

    def report_unused(self, config: LoRAConfig, strict: bool) -> None:
        """Tell of what an "exclude" names in vain."""
        for pattern in [pattern for pattern, held in self._out.items() if not held]:
            text = f'"{pattern}" in "exclude" matches nothing.{closest_in(self.model, pattern)}'
            if strict:
                raise TargetError(f"{config.source}: {text} Remove it, or leave strict out.")
            warn(f"{config.source}: {text}")


def _bounded(pattern: str, paths: list[str]) -> set[str]:
    """The paths that a regular expression matches, found in bounded time."""
    names: dict[str, list[str]] = {}
    for path in filter(None, paths):
        names.setdefault(own_path(path), []).append(path)
    return {one for name in Names(names).matching(pattern[3:]) for one in names[name]}


def holders_of(path: str) -> list[str]:
    """A path and those of all modules that it lies in, the model's own among them."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _none(model: nn.Module, places: object) -> list[Place]:
    return []


def _full(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _ends(path: str) -> Iterator[str]:
    """A path, and each end of it that begins after a dot."""
    yield path
    while (dot := path.find(".")) >= 0:
        path = path[dot + 1 :]
        yield path


def _names(place: Place) -> list[str]:
    """The paths by which an entry may name a tensor: its own, and a weight's layer's."""
    path, _, name, _ = place
    full = f"{path}.{name}" if path else name
    return [full, path] if name == "weight" else [full]


def _matches(places: Places, entry: TargetConfig) -> list[Target]:
    if kind_of(entry).inside:
        return _inside(places, entry)
    out, passed = [], []
    for path, module, name, tensor in places.matching(entry.name):
        reason = _unfit(entry, module, tensor)
        if reason is None:
            out.append(_target(path, module, name, tensor, entry))
            continue
        told = f'"{entry.name}" matches {_full(path, name)}, {reason}'
        if not _broad(entry.name, tensor):
            raise TargetError(told)
        passed.append((tensor.dim(), told))
    if not out and not places.hides(entry.name):
        # of a weight it tells more than of the biases beside it
        why = max(passed, key=lambda one: one[0])[1] if passed else None
        _refuse_containers(places.model, entry, why)
    return out


def _unfit(entry: TargetConfig, module: nn.Module, tensor: torch.Tensor) -> Optional[str]:
    """Why a tensor cannot be adapted, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "which torch.jit compiled. Attach to the module that it was made from."
    # torch gives sparse gradients to the look-up table itself, not to a sum
    if entry.hard and getattr(module, "sparse", False) is True:
        return "whose gradients are sparse, which no update can take. Make the layer sparse=False."
    # of a branch the layer's own forward computes the base
    if entry.hard and is_quantised(tensor):
        way = kind_of(entry).beside_instead()
        return f'which is quantised: no sum can be stored there. Use "hard": 0{way}.'
    reason = None
    if tensor.dim() < 2:
        reason = f"of shape {list(tensor.shape)}: an update needs two or more dimensions"
    elif 0 in tensor.shape:
        reason = f"of shape {list(tensor.shape)}: it is empty"
    elif entry.hard and tensor.dtype not in FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        reason = f"of type {tensor.dtype}: a hard update needs one of {names}"
        if is_storage(tensor.dtype):
            return f'{reason}. Attach before the model is stored so, or use "hard": 0.'
    return reason and f"{reason}. Remove the entry."


def _inside(places: Places, entry: TargetConfig) -> list[Target]:
    """Every tensor that the entry names, or that lies anywhere in a module that it names."""
    out, named = [], places.named(entry.name)
    for path, module, name, tensor in places.all + places.buffers:
        if named.isdisjoint(holders_of(_full(path, name))):
            continue
        # BatchNorm's `num_batches_tracked`
        counts = not isinstance(tensor, nn.Parameter) and tensor.dtype == torch.int64
        if not (tensor.is_floating_point() or counts) or is_quantised(tensor):
            raise TargetError(
                f'"{entry.name}" ("{kind_of(entry).method}") matches {_full(path, name)}, of type '
                f"{tensor.dtype}, "
                "which cannot train. Name another, or adapt it with r."
            )
        out.append(_target(path, module, name, tensor, entry))
    return out


def _refuse_containers(model: nn.Module, entry: TargetConfig, why: Optional[str]) -> None:
    """Refuse an entry that names modules, and nothing to adapt; `why` is of a tensor in them."""
    for path, module in model.named_modules():
        if path and _means(entry.name, path, module):
            taken = [one for one in path.split(".") if one in ("parametrizations", BRANCHES)]
            if taken:
                raise TargetError(
                    f'"{entry.name}" matches {path}, but updates themselves stand under the name '
                    f'"{taken[0]}". Rename the layer.'
                )
            if why is not None:
                raise TargetError(why)
            names = (f"{at}.{n}" if at else n for at, _, n, t in _tensors(module) if t.dim() >= 2)
            inside = [f"{path}.{name}" for name in names]
            hint = f". Name what is inside it, for example {inside[0]}" if inside else ""
            every = f"{entry.name}.*"
            if any(fits(every, one) for one in inside):
                hint += f', or all of it: "{every}"'
            hint += "." if hint else ""
            # old-style hooks leave a plain tensor where the parameter was
            if isinstance(module.__dict__.get("weight"), torch.Tensor):
                hint = (
                    ", because a hook computes it anew before each call (torch.nn.utils."
                    "weight_norm, spectral_norm or prune). Use torch.nn.utils.parametrizations."
                )
            raise TargetError(
                f'"{entry.name}" matches {path}, a {type(module).__name__} '
                f"with no weight of its own to adapt{hint or '. Name a layer that has one.'}"
            )


def _means(pattern: str, path: str, module: nn.Module) -> bool:
    return is_of(pattern[5:], module) if pattern.startswith("type:") else fits(pattern, path)


def fits(pattern: str, path: str) -> bool:
    """Whole dotted components from the right; ``*`` is any one; ``re:`` matches the whole path."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], own_path(path)) is not None
    want, have = pattern.split("."), own_path(path).split(".")
    tail = have[-len(want) :]
    return len(tail) == len(want) and all(w in ("*", h) for w, h in zip(want, tail))


def as_pattern(name: str) -> str:
    """The regular expression of the paths that a name of an entry fits."""
    if name.startswith("re:"):
        return name[3:]
    parts = ("[^.]*" if part == "*" else re.escape(part) for part in name.split("."))
    return r"(?:.*\.)?" + r"\.".join(parts)


def _broad(pattern: str, tensor: torch.Tensor) -> bool:
    """Whether a pattern sweeps up a tensor that it does not name, such as a bias."""
    if pattern.startswith("type:"):
        return tensor.dim() < 2
    # a name's last component tells what it is after: "*" takes biases along
    return pattern.startswith("re:") or pattern.split(".")[-1] == "*"


def _layout(module: nn.Module, name: str, tensor: torch.Tensor) -> Layout:
    # of a class that flattens: a kernel's inputs lie behind its outputs
    if name == "weight" and isinstance(module, _FLAT) and not isinstance(module, _TRANSPOSED):
        return "matrix"
    if name == "weight" and (isinstance(module, _TRANSPOSED) or is_hf_conv1d(module)):
        return "transposed"
    # an unknown class with three dimensions or more holds matrices, as experts do
    return "stack" if tensor.dim() > 2 else "matrix"


def _kind(module: nn.Module, name: str) -> str:
    if name != "weight":
        return "parameter"
    if is_linear(module):
        return "linear"
    if isinstance(module, ANY_CONVOLUTION) and not isinstance(module, _TRANSPOSED):
        return "convolution"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # the nearest class of torch's own, below whatever inherits from it
    known = (
        c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")
    )
    name = next(known)
    return "weight" if name == "Module" else name


def _most_specific(config: LoRAConfig, found: dict[str, list[Target]]) -> list[Target]:
    claims: dict[tuple[str, str], list[Target]] = {}
    for entry in config.entries:
        for target in found[entry.name]:
            # by place, not by object: two layers may hold one tensor and take different entries
            claims.setdefault((target.module, target.tensor), []).append(target)
    return [_winner(group) for group in claims.values()]


def _winner(group: list[Target]) -> Target:
    if len(group) == 1:
        return group[0]
    best = max(specificity(t.entry.name) for t in group)
    top = [t for t in group if specificity(t.entry.name) == best]
    if len(top) > 1:
        names = " and ".join(f'"{t.entry.name}"' for t in top)
        raise TargetError(
            f"{top[0].module or 'the model'}.{top[0].tensor}: {names} claim it equally. "
            "Remove one, or make one path longer."
        )
    return top[0]


def specificity(name: str) -> int:
    """How narrow a name is: of those that mean one tensor, the entry of the highest counts."""
    if name in _BROADEST:
        return _BROADEST[name]
    if name.startswith("type:"):
        return -2
    return 0 if name.startswith("re:") else len(name.split("."))


def _report_empty(
    places: Places, config: LoRAConfig, found: dict[str, list[Target]], strict: bool
) -> None:
    empty = [name for name, matches in found.items() if not matches]
    if not empty:
        return
    told = {name: _why_nothing(places, name) for name in empty}
    text = " ".join(f'"{name}" matches nothing{why}' for name, why in told.items())
    # nothing at all: no entry is right, so that a warning would leave a plain model
    if len(empty) == len(found):
        count, model = sum(1 for _ in places.model.modules()), places.model
        inside = f"{type(model).__name__} ({counted(count, 'module')})"
        raise TargetError(f"nothing to adapt in {inside}: {text}")
    if strict:
        raise TargetError(f"{config.source}: {text} Remove it, or leave strict out.")
    warn(f"{config.source}: {text}")


def _why_nothing(places: Places, name: str) -> str:
    if places.hides(name):
        return ' but what "exclude" leaves out.'
    return f".{closest_in(places.model, name)}"


def closest_in(model: nn.Module, name: str) -> str:
    """What of the model's may have been meant by a name, or else what there is."""
    # the weight of a model that is one layer has no other name
    owners = [(path or name, one) for path, one, name, t in _tensors(model) if t.dim() >= 2]
    if name.startswith("type:"):
        start, last = "type:", name[5:].split(".")[-1]
        known = [_class_name(one) for one in dict.fromkeys(one for _, one in owners)]
    else:
        start, last = "", name.split(".")[-1]
        known = [path.split(".")[-1] for path, _ in owners]
    best = closest(last, sorted(set(known)))
    if not best:
        return _there(known)
    return f' Closest: "{start}{best[0]}" ({_layers(known.count(best[0]))}).'


def _class_name(module: nn.Module) -> str:
    """The name of a layer's class, without that of its updates."""
    names = (c.__name__ for c in type(module).__mro__)
    return next(name for name in names if not name.startswith("Parametrized"))


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _there(owners: list[str]) -> str:
    """What a model has to name, grouped by how often: ``query, key (2 layers each)``.

    Numbers, which are places in a sequence and no names, are left out where there are names.
    """
    by_count: dict[int, list[str]] = {}
    names = [name for name in owners if not name.isdigit()]
    for name, count in Counter(names or owners).items():
        by_count.setdefault(count, []).append(name)
    parts, left = [], _LISTED
    for count, names in by_count.items():
        shown = names[: max(left, 0)]
        left -= len(names)
        if shown:
            parts.append(spelled_group(shown, count))
    return f" There are: {'; '.join(parts)}{', and more' if left < 0 else ''}." if parts else ""


def _check_scale(target: Target) -> None:
    # a scale is a tensor in the factors' type, which is float32 at the narrowest
    most = torch.finfo(target.dtype if target.dtype == torch.float64 else torch.float32).max
    if abs(target.entry.scale) > most:
        raise TargetError(
            f'"{target.entry.name}": scale {target.entry.scale:g} is beyond {most:g}, the most '
            f"that {target.path or 'weight'} can be scaled by. Give a smaller one."
        )


def _most_rank(target: Target) -> int:
    _, out, fan_in = matrix_shape(target.shape, target.layout)
    # what is saved of it has both factors and those that they started from
    return min(out, fan_in) // 2 if target.entry.init in FROM_WEIGHT else min(out, fan_in)


def _check_thin(chosen: list[Target]) -> None:
    """Refuse several tensors that hold less than the rank of one entry, all of them at once."""
    bounded = [target for target in chosen if kind_of(target.entry).bounded]
    for entry in dict.fromkeys(target.entry for target in bounded):
        thin = [t for t in chosen if t.entry == entry and entry.r > _most_rank(t)]
        if len(thin) > 1:
            names = ", ".join(f"{t.path or 'weight'} ({_most_rank(t)})" for t in thin[:_LISTED])
            more = f" and {len(thin) - _LISTED} more" if len(thin) > _LISTED else ""
            raise TargetError(
                f'"{entry.name}": r = {entry.r} is more than {len(thin)} tensors hold, each with '
                f"the most that it does: {names}{more}. Give a smaller r, or those an entry of "
                "their own."
            )


def _check_rank(target: Target) -> None:
    if not kind_of(target.entry).bounded:
        return
    _, out, fan_in = matrix_shape(target.shape, target.layout)
    twice, most = target.entry.init in FROM_WEIGHT, _most_rank(target)
    if target.entry.r > most:
        also = f' ("init": "{target.entry.init}" is saved at twice its rank)' if twice else ""
        raise TargetError(
            f'"{target.entry.name}": r = {target.entry.r} is more than {target.path or "weight"} '
            f"holds: its matrix is {out}×{fan_in}{also}. Give r of at most {most}."
        )


def _check_soft(target: Target, module: nn.Module) -> None:
    where = f'"{target.entry.name}" ("hard": 0) matches {target.path or "the model"}'
    # its forward reads out_proj's weight, and a hook on it is never run
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(
            f'{where}, whose forward nn.MultiheadAttention never calls. Use "hard": 1.'
        )
    convolution = isinstance(module, ANY_CONVOLUTION)
    linear = is_linear(module)
    if target.tensor != "weight" or not (convolution or linear):
        raise TargetError(
            f"{where}, a {type(module).__name__}: a soft update serves Linear and convolutions. "
            'Use "hard": 1.'
        )
    if target.entry.up_kernel == "same" and not convolution:
        raise TargetError(
            f'{where}, a {type(module).__name__}, which has no kernel for "up_kernel": "same". '
            "Leave it out."
        )
