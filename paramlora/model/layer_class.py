"""The class of an adapted layer: one for each base type, whatever the number of layers."""

import copyreg
import sys
import threading
from copy import deepcopy
from functools import cache, partial, wraps
from inspect import signature
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.parametrize import ParametrizationList

from paramlora.errors import AdapterError
from paramlora.model.asked import asks_the_base
from paramlora.model.experts import expert_forward_of
from paramlora.model.forwards import below, ending_in, forward_of
from paramlora.model.recomputed import AGAIN, counted
from paramlora.model.sums import read
from paramlora.update.attached import AttachedUpdate, applied
from paramlora.update.lowrank import value_of
from paramlora.update.names import BRANCHES


def parametrized(module: nn.Module) -> Any:
    """Torch's lists of parametrizations by tensor name, empty when there are none."""
    # not getattr: a wrapper may answer for the layer inside it; not get: a scripted one has none
    held = module._modules["parametrizations"] if "parametrizations" in module._modules else None
    return held if isinstance(held, nn.ModuleDict) else {}


def holds_updates(module: nn.Module) -> bool:
    """Whether an update of ours acts on a tensor of `module` or of one inside it."""
    return any(
        BRANCHES in m._modules or any(adapted_by(m, name) for name in parametrized(m))
        for m in module.modules()
    )


def is_ours(plist: Any) -> bool:
    """Whether a list of parametrizations has none but our updates, which keep type and shape."""
    return plist.is_tensor and all(isinstance(update, AttachedUpdate) for update in plist)


def adapted_by(module: nn.Module, name: str) -> list[str]:
    """The adapters with an update in torch's list of parametrizations of one tensor."""
    # a replica of DataParallel is given its attributes after it is made
    lists = parametrized(module) if "_modules" in vars(module) else {}
    held = lists[name] if name in lists else ()
    return [update.adapter for update in held if isinstance(update, AttachedUpdate)]


class Updates(ParametrizationList):
    """Torch's list of parametrizations, where one that computes the tensor from several cannot
    follow ours, which give one: torch would take it, and every call of the layer would fail."""

    def forward(self) -> Tensor:
        """The tensor as torch's list computes it; where several adapters train it whole, their
        sum."""
        # one that comes from several originals is torch's to put together
        if len(self) < 2 or not self.is_tensor:
            return super().forward()
        return applied(list(self), self.original)

    def append(self, module: nn.Module) -> "Updates":
        if not isinstance(module, AttachedUpdate) and (reason := _cannot_follow(module)):
            name = type(module).__name__.lstrip("_")
            raise AdapterError(f"{name} {reason}. Register it first, then attach.")
        super().append(module)
        return self


def _cannot_follow(rule: nn.Module) -> str:
    """Why a parametrization would fail at every call of a layer that has another one before it;
    empty where it works."""
    # what torch calls with one tensor may have further arguments only with defaults
    taken = signature(rule.forward).parameters.values()
    needed = [p for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        return f"computes a tensor from {len(needed)} others, which an adapted tensor has not"
    # torch's orthogonal takes its base from the weight, which torch shows the first rule alone
    if rule._buffers.get("base", rule) is None:
        return (
            "starts from the weight, which torch shows the first parametrization alone "
            "(with use_trivialization=False it does not)"
        )
    return ""


class Gone(ParametrizationList):
    """A list that was taken off, for whoever remembers it as the place of the tensor: torch's
    `fully_shard` puts the gathered tensor there for each call, and the sharded one after it."""

    def __getattr__(self, name: str) -> Any:
        if name != "original":
            return super().__getattr__(name)
        layer, tensor = vars(self)["now"]
        return getattr(layer, tensor)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "original":
            return super().__setattr__(name, value)
        layer, tensor = vars(self)["now"]
        setattr(layer, tensor, value)


class Shared(type):
    """Lets one class serve many layers: torch deletes the property of the layer that it
    removes, from the class, where the other layers still need it. Anything else that is set on
    the class, such as another forward, holds for all layers of it."""

    def __delattr__(cls, name: str) -> None:
        # torch deletes a layer's property from its class, see `remove_parametrizations`
        if not _is_ours(cls.__dict__.get(name)):
            super().__delattr__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if _is_ours(cls.__dict__.get(name)):
            # as `register_parametrization` injects, when somebody registers over our list
            if isinstance(value, property):  # torch's, which reads the lists of one layer only
                return
            raise AdapterError(
                f"{cls.__name__}.{name} is what shows the adapted tensor of each layer of this "
                "class, and cannot be replaced. Set it on one layer after detach or merge."
            )
        # torch's property is of one layer; ours reads the instance, as the class serves many
        ours = _tensor_property(name) if isinstance(value, property) else value
        super().__setattr__(name, ours)


class _Shown(property):
    """The property by which an adapted layer shows a tensor: its type tells ours from torch's."""


def _is_ours(value: Any) -> bool:
    return isinstance(value, _Shown)


def shared(base: type, names: frozenset[str]) -> type:
    """One class for all adapted layers of a base type, so that compilation sees one type; another
    while somebody's function stands in the place of the type's forward."""
    # the forward is part of the key: a patched one must not be shadowed by a class made before
    return _shared(base, names, getattr(base, "forward", None))


@cache
def _shared(base: type, names: frozenset[str], forward: Any) -> type:
    body: dict[str, Any] = {name: _tensor_property(name) for name in names}
    body.update(
        __copy__=shallow_copy,
        __deepcopy__=deep_copy,
        __getstate__=refuse_pickling,
        __setattr__=_set(base),
        __delattr__=_delete(base),
        register_parameter=_register(base, "register_parameter"),
        register_buffer=_register(base, "register_buffer"),
        _load_from_state_dict=_load(base),
    )
    if issubclass(base, nn.RNNBase):
        body.update({name: _of_each_thread(name) for name in _READ})
    bases: tuple[type, ...] = (base,)
    fast = expert_forward_of(base)
    # of a layer with other tensors adapted no fast forward is known
    if fast is None and "weight" in names and names <= {"weight", "bias"}:
        fast, behind = forward_of(base), ending_in(base)
        bases = bases if behind is None else (base, behind)
    if fast is not None:
        body["forward"] = fast
    cls: type = _meta(type(base))(f"Parametrized{base.__name__}", bases, body)
    return cls


@cache
def _meta(of_base: type) -> Any:
    """`Shared`, together with a metaclass that the base brings, such as ``ABCMeta``."""
    # a class can have but one metaclass, which must descend from all of its bases' own
    return Shared if of_base is type else type("Shared", (Shared, of_base), {})


def _tensor_property(name: str) -> property:
    def get(self: nn.Module) -> Optional[Tensor]:
        # by the dictionary: `nn.Module.__getattr__` would come back here on an AttributeError
        lists = self.__dict__["_modules"].get("parametrizations")
        if lists is not None and name in lists:
            plist = lists[name]
            if is_compiling():  # which finds equal sums by itself
                return value_of(plist)
            if asks_the_base(sys._getframe(1), name) and is_ours(plist):
                return plist.original  # type: ignore[no-any-return]
            # AGAIN marks a layer under reentrant checkpointing, see `input_grads`
            return counted(plist, read(plist, AGAIN in self.__dict__))
        # a layer of this class with that tensor unadapted, or a replica, which has plain attributes
        for held in (self._parameters, self._buffers, self.__dict__):
            if name in held:
                return held[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def put(self: nn.Module, value: Tensor) -> None:
        if name in parametrized(self):
            # torch's own way for an assignment, which refuses what our updates cannot invert
            parametrized(self)[name].right_inverse(value)
        else:  # of a layer that has this class for another tensor's sake
            self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name} that can be deleted")
        del self.__dict__[name]

    return _Shown(get, put, delete)


# what an RNN keeps of its weights: those that its next product takes, and by which it knows them
_READ = ("_flat_weights", "_flat_weight_refs")


class _Threads(threading.local):
    """What each thread has read of the weights of RNNs."""

    def __init__(self) -> None:
        self.read: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


_THREADS = _Threads()


def _of_each_thread(name: str) -> property:
    """What a call of an RNN puts on its layer, for that call's thread: torch reads the weights of
    each call anew where they are sums, and another thread's are of other rows, or without
    gradients."""

    def get(self: nn.Module) -> Any:
        # one thread traces, and its own variables are nothing that compiled code has
        if is_compiling():
            return self.__dict__[name]
        own = _THREADS.read.get(self, {})
        if name in own:
            return own[name]
        held = self.__dict__[name]
        # of another thread: dead references, so that torch reads the weights again
        return [_nothing] * len(held) if name == "_flat_weight_refs" else held

    def put(self: nn.Module, value: Any) -> None:
        # also on the layer, for those who look there: torch once the last update is off
        self.__dict__[name] = value
        if not is_compiling():
            _THREADS.read.setdefault(self, {})[name] = value

    return property(get, put)


def _nothing() -> None:
    """What a weak reference gives whose object is gone."""


def _set(base: type) -> Any:
    """Assigning an attribute, where an adapted tensor is refused."""

    def set_(self: nn.Module, name: str, value: Any) -> None:
        # a buffer that its layer replaces is let through, to the update that is trained in its
        # stead
        if _put_whole(self, name, value):
            return
        _check_free(self, name, "assigned")
        if name == "qconfig" and value is not None:  # how torch marks a layer that it will convert
            raise AdapterError(
                f"{_name(self)} has an adapter, and torch's quantisation does not know adapted "
                "layers. Call merge(model) first."
            )
        base.__setattr__(self, name, value)  # type: ignore[call-arg, arg-type]

    return set_


def _put_whole(layer: nn.Module, name: str, value: Any) -> bool:
    """Give a buffer that is trained whole what its layer puts in its place."""
    # a replica of DataParallel is given its attributes after it is made
    lists = parametrized(layer) if "_modules" in vars(layer) else {}
    plist: Any = lists[name] if name in lists else ()
    if len(plist) != 1 or not isinstance(plist[0], AttachedUpdate):
        return False
    return isinstance(value, Tensor) and plist[0].assigned(value)


def _delete(base: type) -> Any:
    """Deleting an attribute, where an adapted tensor is refused."""

    def delete(self: nn.Module, name: str) -> None:
        _check_free(self, name, "deleted")
        base.__delattr__(self, name)  # type: ignore[call-arg, arg-type]

    return delete


def _register(base: type, method: str) -> Any:
    """Registering a tensor, where an adapted one is refused, and what `prune` makes of it."""

    @wraps(getattr(base, method))  # torch reads its signature where a buffer is assigned
    def register(self: nn.Module, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        _check_free(self, name, "registered again")
        # `prune` registers the sum that it read, a plain Tensor, as "weight_orig"
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            _check_free(self, name.removesuffix("_orig"), "pruned")
        getattr(base, method)(self, name, value, *args, **kwargs)

    return register


def _check_free(layer: nn.Module, name: str, what: str) -> None:
    adapters = adapted_by(layer, name)
    if adapters:
        raise AdapterError(
            f'{name} of {_name(layer)} cannot be {what}: adapter "{adapters[0]}" is attached to '
            f"it. Merge or detach first, or write the base, parametrizations.{name}.original."
        )


def _name(layer: nn.Module) -> str:
    """The name of the class that the layer has without updates."""
    name: str = below(type(layer)).__name__
    return name


def shallow_copy(self: nn.Module) -> nn.Module:
    """What ``copy.copy`` gives of any module: another one that holds the same tensors."""
    copy = type(self).__new__(type(self))
    copy.__dict__.update(self.__dict__)
    for slot in copyreg._slotnames(type(self)):  # type: ignore[attr-defined]
        if hasattr(self, slot):
            setattr(copy, slot, getattr(self, slot))
    return copy


def deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copy = type(self).__new__(type(self))
    memo[id(self)] = copy
    # an RNN also holds its weights in a list, where the adapted ones are no leaves
    # weak references cannot be copied deeply; `refresh` makes them anew
    state = {k: v for k, v in self.__dict__.items() if not k.startswith("_flat_weight_refs")}
    flat = state.pop("_flat_weights", None)
    copy.__dict__.update(deepcopy(state, memo))
    for slot in copyreg._slotnames(type(self)):  # type: ignore[attr-defined]
        if hasattr(self, slot):
            setattr(copy, slot, deepcopy(getattr(self, slot), memo))
    if flat is not None:
        refresh(copy)
    return copy


def refresh(module: nn.Module) -> None:
    """Have an RNN read its weights again; other layers hold no second reference."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def refuse_pickling(self: nn.Module) -> None:
    raise AdapterError(
        f"a model with an adapter attached cannot be pickled (at {type(self).__name__}). Save the "
        "adapter with save_adapter(model, path), or merge(model) first and then torch.save(model)."
    )


def _load(base: type) -> Any:
    """Accept a base checkpoint under its original names; updates that were trained then keep their
    values, and one that changes nothing yet starts as that base."""

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, plist in parametrized(self).items():
            stem = f"{prefix}parametrizations.{name}."
            if plist.is_tensor and prefix + name in state:
                state[stem + "original"] = state.pop(prefix + name)
            own = {
                f"{stem}{index}.{key}": value
                for index, update in enumerate(plist)
                if isinstance(update, AttachedUpdate)
                for key, value in update.state_dict().items()
            }
            # something is there of this tensor, but no update: a base checkpoint, by either name
            if not own.keys() & state.keys() and any(k.startswith(stem) for k in state):
                # by its own values torch finds nothing missing under `strict`
                state.update(own)
                for index, update in enumerate(plist):
                    if isinstance(update, AttachedUpdate):
                        update.begins_anew(partial(_before, plist, index))
        base._load_from_state_dict(self, state, prefix, *args)  # type: ignore[attr-defined]
        # BatchNorm adds a counter that an old state lacks, by the name that it had
        added = {prefix + name for name in parametrized(self)}
        args[3][:] = [key for key in args[3] if key not in added]  # torch's unexpected keys

    return load


@torch.no_grad()
def _before(plist: ParametrizationList, index: int) -> Tensor:
    """What the parametrization at a place in torch's list is applied to."""
    rules = list(plist)[:index]
    if plist.is_tensor:
        value = plist.original
    else:  # the first one makes one tensor of several, as weight norm does
        first, *rules = rules
        value = first(*(getattr(plist, f"original{i}") for i in range(plist.ntensors)))
    for rule in rules:
        value = rule(value)
    found: Tensor = value.detach()
    return found
