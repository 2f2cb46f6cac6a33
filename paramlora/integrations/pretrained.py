"""What models of transformers and diffusers do with their own tensors, told of the updates.

`attach` has these called in the place of the models' methods of the same names
(see `paramlora.model.methods`). Each gets the model, the class's own method, and its arguments.
"""

import functools
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import save
from torch import Tensor, nn

from paramlora import formats
from paramlora.checkpoint.keys import Key
from paramlora.errors import AdapterError, FileError, warn
from paramlora.files.atomic import new_file
from paramlora.files.native import write_native
from paramlora.files.safetensors import SafeFile
from paramlora.formats import Content, base_of
from paramlora.model.attach import adapter_names, updates
from paramlora.model.branch import add_branch, remove_branches
from paramlora.model.layer_class import holds_updates, parametrized, shared
from paramlora.model.methods import library
from paramlora.model.undo import unchanged_on_error
from paramlora.model.values import adapter_of
from paramlora.update.attached import AttachedUpdate, answer
from paramlora.update.names import BRANCHES
from paramlora.update.sharded import is_sharded, writes

_Own = Callable[..., Any]
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # how a Trainer of transformers names its folders
_MARK = "paramlora_beside"  # in the metadata of the adapters that we write beside a base


def save_pretrained(model: nn.Module, own: _Own, *args: Any, **kwargs: Any) -> Any:
    """Write the base under its own names, and the adapters in files beside it.

    One adapter at strength 1 is written as the library's own tools read it: for transformers as
    PEFT's folder, with which ``from_pretrained`` gives the outputs of the attached model where
    peft is installed. Others are written as the native files, and a warning says what to call.
    In a ``checkpoint-7`` of transformers' Trainer the updates also stand in the weights' file,
    under the keys of the attached model's state dict: all that a Trainer reads to resume.

    Raises:
        AdapterError: what would write, or upload, the base without the adapter.
        FileError: the folder holds somebody else's adapter, which would be loaded onto this base.
    """
    # by name, whether the caller gave an argument by its place or not
    call = inspect.signature(own).bind(model, *args, **kwargs)
    told = call.arguments
    _check_whole(model, told)
    folder, beside = Path(told["save_directory"]), _beside(model)
    writes_here = told.get("is_main_process", True) and (not _sharded(model) or writes())
    # an older adapter first, or an error in between would leave it beside another base
    if writes_here:
        _clear(folder)
    resumes = library(model) == "transformers" and bool(_CHECKPOINT.fullmatch(folder.name))
    if resumes and "save_original_format" in call.signature.parameters:
        told.setdefault("save_original_format", False)  # a Trainer looks for the model's own names
    if told.get("state_dict") is not None:
        told["state_dict"] = _base_state(model, told["state_dict"], resumes)
    # the first parameter is self: the library then sees the base's class and its own keys
    told[next(iter(call.signature.parameters))] = _stand_in(model, resumes)
    result = own(*call.args, **call.kwargs)
    if writes_here:
        for one in beside:
            one.write(folder)
        _warn_not_loaded(model, folder, beside)
    return result


def _check_whole(model: nn.Module, told: Mapping[str, Any]) -> None:
    """Refuse to save what would leave an adapter out."""
    for name in ("push_to_hub", "distributed_checkpoint"):
        if told.get(name):
            raise AdapterError(
                f"save_pretrained({name}=True) does not know the attached adapter. Save to a "
                "folder first, or call model.push_to_hub(repo_id)."
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(
            f"{type(model).__name__} holds an adapter of peft's beside ours, and one folder cannot "
            "hold both. Save ours with save_adapter, then detach it and save peft's."
        )


def _sharded(model: nn.Module) -> bool:
    return any(is_sharded(p) for _, _, update in updates(model) for p in update.parameters())


@dataclass(frozen=True)
class _Beside:
    """An adapter to write beside its base: in another tool's form, or as the native file."""

    adapter: Any
    strength: float
    file: str
    config: str = ""
    content: Optional[Content] = None

    def write(self, folder: Path) -> None:
        if self.content is None:
            write_native(replace(self.adapter, metadata={_MARK: "1"}), folder / self.file)
            return
        # safetensors refuses tensors that share memory
        state = {k: v.detach().clone().contiguous() for k, v in self.content.state.items()}
        with new_file(folder / self.file) as file:
            file.write(save(state, {**self.content.metadata, _MARK: "1"}))
        if self.config:  # last, since it is what makes from_pretrained look for the adapter
            with new_file(folder / self.config) as file:
                file.write(json.dumps(self.content.config, indent=2).encode() + b"\n")


def _beside(model: nn.Module) -> list[_Beside]:
    names = adapter_names(model)
    adapters = {name: adapter_of(model, name) for name in names}
    strength = {update.adapter: update.strength for _, _, update in updates(model)}
    reader, read = _reads(model), _read_beside()
    # from_pretrained attaches one adapter of peft's, at strength 1
    if len(names) == 1 and strength[names[0]] == 1 and reader in read:
        form, adapter = read[reader], adapters[names[0]]
        try:
            content = formats.write(adapter, form.name, base_of(model), **form.beside[reader])
        except FileError:  # something that only the native file holds
            pass
        else:
            return [_Beside(adapter, 1.0, form.weights[0], form.config, content)]
    files = {name: _file_name(name, index) for index, name in enumerate(names)}
    return [_Beside(adapters[name], strength[name], files[name]) for name in names]


def _read_beside() -> dict[str, formats.Format]:
    """The format that a library reads beside a base, by the library's name."""
    return {library: form for form in formats.FORMATS.values() for library in form.beside}


def _reads(model: Any) -> str:
    """The library whose form of adapters the model's class reads beside a base."""
    found = library(model)
    # Wav2Vec2's method of that name reads something else, and from_pretrained would call it
    other = found == "transformers" and "integrations.peft" not in model.load_adapter.__module__
    return "" if other else found


def _file_name(adapter: str, index: int) -> str:
    if adapter == "default":
        return "adapter.safetensors"
    known = adapter if re.fullmatch(r"\w[\w.-]{0,99}", adapter, re.ASCII) else str(index)
    return f"adapter-{known}.safetensors"


def _clear(folder: Path) -> None:
    """Remove the adapters that an earlier save put there, which are of another base.

    Raises:
        FileError: one that somebody else put there, which would be loaded onto this base.
    """
    configs = {form.weights[0]: form.config for form in _read_beside().values()}
    old = [folder / file for file in configs if (folder / file).is_file()]
    for path in [*old, *folder.glob("adapter.safetensors"), *folder.glob("adapter-*.safetensors")]:
        if not _is_ours(path):
            if path in old:
                raise FileError(
                    f"{path}: an adapter that was not saved with this model, and would be loaded "
                    "onto it. Save to another folder, or move it away."
                )
            continue
        # the configuration first: from_pretrained looks for an adapter by that alone
        if configs.get(path.name):
            path.with_name(configs[path.name]).unlink(missing_ok=True)
        path.unlink()


def _is_ours(path: Path) -> bool:
    try:
        file = SafeFile(path)
    except FileError:
        return False
    try:
        return _MARK in file.metadata
    finally:
        file.close()


def _warn_not_loaded(model: nn.Module, folder: Path, beside: list[_Beside]) -> None:
    form = "" if beside[0].content is None else library(model)
    if form == "transformers" and importlib.util.find_spec("peft") is not None:
        return
    calls = [f'paramlora.load_adapter(model, "{folder / one.file}")' for one in beside]
    if any(one.strength != 1 for one in beside):
        strengths = {one.adapter.name: one.strength for one in beside}
        calls.append(f"paramlora.set_adapters(model, {json.dumps(strengths)})")
    warn(f"{folder}: from_pretrained loads the base alone; then call {', '.join(calls)}.")


def _stand_in(model: nn.Module, resumes: bool) -> nn.Module:
    """An object that shares everything with `model`, but has its base's class and state dict."""
    # torch gives a parametrized module a class of its own; the library writes the class's name
    cls = type(model).__bases__[0] if parametrized(model) else type(model)
    other: nn.Module = object.__new__(cls)
    other.__dict__.update(model.__dict__)
    # ours, which would call itself again
    other.__dict__.pop("save_pretrained", None)

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return _base_state(model, model.state_dict(*args, **kwargs), resumes)

    other.__dict__["state_dict"] = functools.wraps(nn.Module.state_dict)(state_dict)
    return other


def _base_state(model: nn.Module, state: Mapping[str, Any], with_updates: bool) -> dict[str, Any]:
    """A state dict of `model` under the base's names, with or without the updates' tensors."""
    lists = {
        f"{path}.{name}" if path else name: plist
        for path, module in model.named_modules()
        for name, plist in parametrized(module).items()
    }
    out: dict[str, Any] = {}
    first: dict[Any, str] = {}  # tied tensors share an update, which a file holds once
    for key, value in state.items():
        parts = Key.parse(key)
        if parts.of_update:
            if with_updates and value.numel() and first.setdefault(_memory(value), key) == key:
                out[key] = value
        else:
            out[_without_ours(parts, lists.get(parts.weight, ()))] = value
    return out


def _memory(tensor: Tensor) -> Any:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))


def _without_ours(key: Key, plist: Any) -> str:
    """The key that a tensor of a parametrized layer has without our updates in its list."""
    # without ours the others close up: their places in the list become 0, 1, ...
    others = [index for index, one in enumerate(plist) if not isinstance(one, AttachedUpdate)]
    # only ours were there: the tensor has its plain name again
    if key.part.startswith("original") and not others:
        return key.weight
    return str(replace(key, index=others.index(key.index)) if key.index in others else key)


def tie_weights(model: nn.Module, own: _Own, *args: Any, **kwargs: Any) -> Any:
    """Tie the base's tensors, under the updates."""
    with _bare(model):
        return own(model, *args, **kwargs)


def resize_token_embeddings(model: nn.Module, own: _Own, *args: Any, **kwargs: Any) -> Any:
    """Resize the base's vocabulary; updates stay as they are on the rows that stay.

    Raises:
        AdapterError: an adapted embedding or head under somebody else's parametrization too, or
            one that is sharded.
    """
    for layer in _ends(model):
        for name, plist in parametrized(layer).items():
            theirs = [one for one in plist if not isinstance(one, AttachedUpdate)]
            if theirs or any(map(is_sharded, plist.parameters())):
                why = type(theirs[0]).__name__.lstrip("_") if theirs else "sharding"
                raise AdapterError(
                    f"{name} of {type(layer).__bases__[0].__name__} is under {why} beside its "
                    "adapter, so it cannot be resized. Resize first, then attach."
                )
    # which of them will be resized only the model knows
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for layer in dict.fromkeys((*_ends(model), *tables)):
        for plist in parametrized(layer).values():
            for update, base in _each_with_base(plist, plist.original):
                update.before_resize(base)
    with _bare(model):
        return own(model, *args, **kwargs)


@torch.no_grad()
def _each_with_base(held: Any, base: Tensor) -> "Iterator[tuple[AttachedUpdate, Tensor]]":
    """Updates, each with what those before it make of a base."""
    for update in held:
        if isinstance(update, AttachedUpdate):
            yield update, base
            if not (update.alone or update.beside):
                base = update(base)


def set_input_embeddings(model: nn.Module, own: _Own, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Put other input embeddings in, where no update is lost with the old ones."""
    _check_kept(model, "get_input_embeddings", value)
    return own(model, value, *args, **kwargs)


def set_output_embeddings(
    model: nn.Module, own: _Own, value: Any, *args: Any, **kwargs: Any
) -> Any:
    """Put another head in, where no update is lost with the old one."""
    _check_kept(model, "get_output_embeddings", value)
    return own(model, value, *args, **kwargs)


def _check_kept(model: nn.Module, ask: str, value: Any) -> None:
    old = getattr(model, ask)()
    if isinstance(old, nn.Module) and old is not value and holds_updates(old):
        name = adapter_names(old)[0]
        raise AdapterError(
            f'{ask.replace("get", "set")} would lose what adapter "{name}" has learnt there. '
            "Merge or detach it first, or call model.resize_token_embeddings."
        )


def _ends(model: Any) -> list[nn.Module]:
    """The embeddings and the head of a model of transformers."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, ask)())
        except NotImplementedError:
            continue
    return [layer for layer in found if isinstance(layer, nn.Module)]


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers of `model` hold their base alone, as before `attach`.

    A tensor may get another shape in the block, and a layer another object in its place: the
    updates come back to what is there then. What stops the block leaves the model as it was.
    """
    held = [_Held.of(path, module) for path, module in model.named_modules() if _is_adapted(module)]
    with unchanged_on_error(model.modules(), model.parameters(), _sizes(model)):
        for one in held:
            one.take_off()
        yield
        _part(model, held)
        for one in held:
            one.put_back(model.get_submodule(one.path))


def _sizes(model: nn.Module) -> Callable[[], None]:
    """What puts back what a resize changes outside of the modules: the memory behind a tensor, such
    as the bias of a head, and the sizes that configurations tell."""
    # by reference: the old memory lives on until it is known that nothing failed
    memory = [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    told = [(vars(config), dict(vars(config))) for config in _configurations(model)]

    def put_back() -> None:
        for tensor, data in memory:
            if tensor.shape != data.shape:
                tensor.data = data
        for now, before in told:
            now.clear()
            now.update(before)

    return put_back


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of a model and of models inside of it, with the part that tells the
    vocabulary's size."""
    own: Any = [vars(module).get("config") for module in model.modules()]
    text = [config.get_text_config() for config in own if hasattr(config, "get_text_config")]
    return list({id(one): one for one in (*own, *text) if hasattr(one, "__dict__")}.values())


def _part(model: nn.Module, held: "list[_Held]") -> None:
    """Give each layer its own object again, with the same tensors, where one took the place of
    several: T5 has its resized embedding in the place of the others."""
    paths = {one.path: one.layer for one in held}
    for one in held:
        there = model.get_submodule(one.path)
        if there is not one.layer and any(there is layer for layer in paths.values()):
            one.layer.__dict__.update(
                {key: value for key, value in vars(there).items() if not key.startswith("_")}
            )
            one.layer._parameters.update(there._parameters)
            owner, _, name = one.path.rpartition(".")
            setattr(model.get_submodule(owner), name, one.layer)


def _is_adapted(module: nn.Module) -> bool:
    return BRANCHES in module._modules or bool(parametrized(module))


@dataclass(frozen=True)
class _Held:
    """The updates of one layer, while `_bare` has them aside."""

    path: str
    layer: nn.Module
    order: tuple[str, ...]  # of all its parametrized tensors
    lists: Mapping[str, Any]  # those with updates only
    branches: Any
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, path: str, layer: nn.Module) -> "_Held":
        lists = {
            name: plist
            for name, plist in parametrized(layer).items()
            # under somebody else's parametrization too the base's tensor stays where it is
            if all(isinstance(one, AttachedUpdate) for one in plist)
        }
        shapes = {name: plist.original.shape for name, plist in lists.items()}
        branches = layer._modules.get(BRANCHES)
        weight = layer._parameters.get("weight")
        if branches is not None and weight is not None:
            shapes["weight"] = weight.shape
        return cls(path, layer, tuple(parametrized(layer)), lists, branches, shapes)

    def take_off(self) -> None:
        for name, plist in self.lists.items():
            self.layer._parameters[name] = plist._parameters["original"]
            del parametrized(self.layer)._modules[name]
        self.layer._modules.pop(BRANCHES, None)

    def put_back(self, layer: nn.Module) -> None:
        if self.branches is not None:
            self._put_branches_back(layer)
        if layer is not self.layer and self.lists:
            layer._modules["parametrizations"] = self.layer._modules["parametrizations"]
        for name, plist in self.lists.items():
            if name in layer._parameters:
                plist._parameters["original"] = layer._parameters.pop(name)
            parametrized(layer)._modules[name] = plist
            self._fit(plist, name, plist._parameters["original"])
        # popped and put back in: a state dict has its tensors in this order
        for name in self.order:
            parametrized(layer)._modules[name] = parametrized(layer)._modules.pop(name)
        if layer is not self.layer and self.lists:
            # a parametrized tensor is a property of the class
            layer.__class__ = shared(type(layer), frozenset(self.lists))

    def _put_branches_back(self, layer: nn.Module) -> None:
        self.layer._modules[BRANCHES] = self.branches
        if layer is not self.layer:
            remove_branches(self.layer)
            for branch in self.branches:
                add_branch(layer, branch)
        self._fit(self.branches, "weight", layer._parameters.get("weight"))

    def _fit(self, held: Any, name: str, base: Optional[Tensor]) -> None:
        if base is not None and base.shape != self.shapes.get(name, base.shape):
            for update, before in _each_with_base(held, base):
                answer(update, "resize", before)
