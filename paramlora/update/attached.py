"""What every update is: named, switched on and off, and moved to and from a file."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.config import KINDS as CONFIGURED
from paramlora.config import KindKeys, TargetConfig
from paramlora.errors import AdapterError, FileError
from paramlora.update.casts import NotOffloaded, without_storage
from paramlora.update.choice import ONLY, UNSPLIT, Choice
from paramlora.update.compat import (
    current_backward,
    next_number,
    number_of_forward,
    strength_changes,
)
from paramlora.update.geometry import FLOATS, Layout, matrix_shape
from paramlora.update.kinds import KINDS, Part, not_said
from paramlora.update.sharded import gathered, is_sharded
from paramlora.update.sum import Term, folded
from paramlora.update.summand import Summand
from paramlora.update.value import KindUpdate, Value

# runs of rows of one matrix, each with where it lies in another
Moved = Sequence[tuple[slice, slice]]
_STORED = (*FLOATS, torch.int64)  # types of tensors in an adapter's file
_REMEMBERED = 64  # changes of strength that a checkpointed forward may lie behind its backward


class Switch:
    """How strongly an update acts: one value, which is never changed but replaced as a whole.

    So nothing can disagree with it: not after a change that was stopped, in a child process or in
    another thread, and a gradient still finds what its forward read.

    Args:
        strength: as `set_adapters` gave it.
        gain: what acts, as a tensor, which compiled code reads: another number compiles nothing.
        muted: the blocks of `disable_adapters` that are open; any makes the gain zero.
        past: earlier gains and rows, each with the first sequence number of autograd that it did
            not see.
        rows: which rows of the batch it acts on, inside of `route`; None: on all.
        routes: the blocks of `route` that are open, each with its rows; those of the last act.
    """

    # not a tuple, nor frozen: torch.compile would guard all of it, where it reads one attribute
    __slots__ = (
        "strength",
        "gain",
        "muted",
        "past",
        "acts",
        "fully",
        "effective",
        "rows",
        "routes",
    )

    def __init__(
        self,
        strength: float,
        gain: Tensor,
        muted: frozenset[object] = frozenset(),
        past: "tuple[_Past, ...]" = (),
        rows: Optional[Choice] = None,
        routes: "Routes" = (),
    ) -> None:
        self.strength, self.gain, self.muted, self.past = strength, gain, muted, past
        # the innermost open block of `route` decides
        self.rows, self.routes = routes[-1][1] if routes else rows, routes
        # the only branches in compiled code
        # a bool of Python: compiled code has a branch for each, and none for the strengths between
        self.acts = strength != 0 and not muted
        self.fully = strength == 1 and not muted
        self.effective = 0.0 if muted else strength  # what acts now, as a number

    def changed(self, strength: float, muted: frozenset[object], gains: "Gains") -> "Switch":
        """A switch of another strength to put in this one's place, which it remembers."""
        new = 0.0 if muted else strength
        past = self.past
        # a change that leaves the same gain, as of a muted one, is no other forward's
        if new != self.effective:
            strength_changes()
            past = self._remembering()
        gain = gains.at(new, self.gain.device, self.gain.dtype)
        return Switch(strength, gain, muted, past, self.rows, self.routes)

    def routed(self, routes: "Routes") -> "Switch":
        """A switch as strong on other rows, which remembers this one."""
        strength_changes()
        past = self._remembering()
        return Switch(self.strength, self.gain, self.muted, past, routes=routes)

    def born(self) -> "Switch":
        """A switch that was off until now: what is computed again of an earlier forward is computed
        without the update."""
        return Switch(self.strength, self.gain, self.muted, ((next_number(), 0.0, None),))

    def _remembering(self) -> "tuple[_Past, ...]":
        # the oldest one falls out; `at` refuses what lies before the rest
        return (*self.past[1 - _REMEMBERED :], (next_number(), self.effective, self.rows))

    def at(self, sequence: int) -> "Switch":
        """The switch as it was when a forward drew its sequence number of autograd."""
        for until, effective, rows in self.past:
            # the first entry whose forward had not seen the change that ended it
            if sequence < until:
                # entries before the oldest one fell out: what that forward had is not known
                if len(self.past) == _REMEMBERED and until == self.past[0][0]:
                    raise AdapterError(_FORGOTTEN)
                return Switch(effective, torch.full_like(self.gain, effective), rows=rows)
        return self

    def seen(self, adapter: str) -> "Switch":
        """The switch as rows of one adapter see it, where a layer is called with those alone."""
        only = ONLY.adapter
        if only == UNSPLIT:
            return self
        # rows of its own: as if it were alone
        if only == adapter:
            return Switch(self.strength, self.gain, self.muted)
        return Switch(0.0, torch.zeros_like(self.gain))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switch":
        """The switch of a copy: nobody will close the blocks of `disable_adapters` there."""
        # muted, the tensor is zero, and the copy's must be the strength's
        gain = torch.full_like(self.gain, self.strength) if self.muted else self.gain.clone()
        return Switch(self.strength, gain)


Routes = tuple[tuple[object, Choice], ...]
_Past = tuple[int, float, Optional[Choice]]
_FORGOTTEN = (
    f"the strengths of the adapters changed more than {_REMEMBERED - 1} times between a "
    "checkpointed forward and its backward, which computes it again. Call backward sooner."
)


class Gains:
    """One tensor for all updates of a type and device that get one strength."""

    def __init__(self) -> None:
        self._made: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}

    def at(self, value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor with `value` on a device."""
        key = (value, device, dtype)
        if key not in self._made:
            self._made[key] = _number(value, device, dtype)
        return self._made[key]


# without this a strength that is set under inference mode could not be used in training
@torch.inference_mode(False)
def _number(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A single number that autograd may read, wherever it is made."""
    return torch.full((), value, device=device, dtype=dtype)


@dataclass(frozen=True)
class Site:
    """Where an update is attached.

    Args:
        layer: the module that holds the tensor.
        path: of the tensor, for messages.
        weight: memory of the tensor's shape, on its device and in its type; its values may be
            those that a quantised layer packs.
        layout: where the input and output sides lie in it.
        shown: gives the tensor as it is before the update: a parameter, a buffer, what another
            parametrization computes.
        dense: gives the same as plain numbers, on every process, where it is quantised or sharded.
        read: gives plain numbers too, of what earlier updates of the tensor make of it now.
    """

    layer: nn.Module
    path: str
    weight: Tensor
    layout: Layout
    shown: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Told:
    """What a file tells of the weight that it updates; the fields are those of `Update`."""

    shape: Optional[tuple[int, ...]] = None
    layout: Optional[Layout] = None
    groups: int = 1
    kind: Optional[str] = None


def switches_of(updates: "Sequence[AttachedUpdate]") -> "list[Switch]":
    """`AttachedUpdate.current` of each, asked once where it is that of all: of dozens of adapters
    the questions take longer than a small product."""
    # inside of a backward each update may have another past
    if not is_compiling() and ONLY.adapter == UNSPLIT and current_backward() == -1:
        return [update.switch for update in updates]
    return [update.current() for update in updates]


class AttachedUpdate(nn.Module):
    """An update of one tensor: what every kind of it must tell, and its strength, which changes
    without compiling anything again.

    A kind says what it makes of a weight (`forward`), and the same as a term of a merge, live or on
    a file (`term_of`); its name in a configuration (`method`); and its tensors, with what each of
    them runs along (`parts`): by these they are saved, loaded, sharded, resized and grouped for an
    optimizer. `merge`, `save_adapter` and the others ask by `answer`, and nothing else: what a kind
    does not say is refused. `paramlora.update.kinds.register` makes it known by its name.

    Args:
        adapter: the name under which the update is switched and saved.
        device, dtype: of its tensors. The gain is in float32 at least, which holds any strength.
    """

    alone: ClassVar[bool] = False  # whether its tensor can have no other update, but of its kind
    adds: ClassVar[bool] = False  # whether what it adds does not depend on what it is added to
    beside: ClassVar[bool] = False  # whether it adds to the layer's output, after every rule
    # a class that has one of these of its own computes another weight than what it inherits from
    computes: ClassVar[tuple[str, ...]] = ("forward",)
    bounded: ClassVar[bool] = True  # whether its rank is at most what the weight's matrix holds
    tied: ClassVar[bool] = False  # whether all layers that hold a tied tensor get it
    vectors: ClassVar[bool] = False  # whether its tensor can have fewer than two dimensions
    made_sharded: ClassVar[bool] = False  # whether it is made of the weight, sharded as that is
    internal: ClassVar[bool] = (
        False  # whether a configuration asks for it by other keys than "kind"
    )
    heeds: ClassVar[tuple[str, ...]] = ()  # keys of an entry, beside those of rank and factor
    method: ClassVar[str]
    parts: ClassVar[Mapping[str, Part]] = {}  # the tensors of a file, by the end of their key
    hidden: ClassVar[Mapping[str, Part]] = {}  # what else a state dict of the model holds of it
    inside: ClassVar[bool] = False  # whether an entry means all that lies in what it names, too
    based: ClassVar[str] = ""  # the tensor whose first values are of the base, see `begin_as`
    unset: bool = False  # from the meta device: that tensor has no values before the first read
    layout: Layout = "matrix"
    r: int = 0
    dropout: float = 0.0  # on the input of a low-rank branch, set by attach
    adapter: str
    switch: Switch
    stored: bool = False  # whether the weight is in a type that only stores it (see `casts`)
    written_by_reader: bool = False  # such as an embedding with max_norm, set by attach
    rounds_twice: bool = False  # whether its layer does, as servers do, see `rounding`
    entry: Optional[TargetConfig] = None  # what asked for it, set by attach
    _hf_hook = NotOffloaded()

    def __init__(
        self,
        adapter: str,
        device: torch.device,
        dtype: torch.dtype,
        gains: Optional[Gains] = None,
    ) -> None:
        super().__init__()
        gain = (gains or Gains()).at(1.0, device, _wide(dtype))
        self.keep(adapter=adapter, switch=Switch(1.0, gain))

    def keep(self, **values: Any) -> None:
        """Set attributes that are neither tensors nor modules, which nn.Module would first look
        for: as long as it takes to make a tensor, and a model has thousands of updates."""
        self.__dict__.update(values)

    def current(self) -> Switch:
        """The switch that holds: inside of a backward, which computes a checkpointed forward
        again, that of the forward."""
        own = self.switch
        # cheapest first: outside of a backward `current_backward` is one call into C
        if not (is_compiling() or not own.past or (task := current_backward()) == -1):
            own = own.at(number_of_forward(task))
        return own if own.rows is None else own.seen(self.adapter)

    def now(self) -> Switch:
        """The switch that holds, for a reader that cannot tell the rows of a batch apart.

        Raises:
            AdapterError: it acts on some of them.
        """
        own = self.current()
        if own.rows is not None:
            raise self.of_some_rows()
        return own

    def of_some_rows(self) -> AdapterError:
        """The error of a reader of the tensor that wants one for all rows of a batch."""
        return AdapterError(
            f'adapter "{self.adapter}" acts on some rows of the batch here, and what read its '
            "tensor wants one for all of them. Call it outside of paramlora.route, once for each "
            "adapter (set_adapters), or detach the adapters from that tensor; under checkpointing "
            "call backward inside of it."
        )

    @property
    def acts(self) -> bool:
        """Whether the update changes anything."""
        return self.now().acts

    @property
    def fully(self) -> bool:
        """Whether it acts as it was trained."""
        return self.now().fully

    @property
    def gain(self) -> Tensor:
        """The strength as a tensor."""
        return self.now().gain

    @property
    def strength(self) -> float:
        """How strongly the update acts: 1 as trained, 0 not at all."""
        return self.current().effective

    @strength.setter
    def strength(self, value: float) -> None:
        self.keep(switch=self.switch.changed(value, self.switch.muted, Gains()))

    def _apply(self, fn: Any, recurse: bool = True) -> "AttachedUpdate":
        # `to_empty` gives memory without values
        lazy = any(t.is_meta for t in self._tensors())
        before = self._number()
        super()._apply(without_storage(self, fn), recurse)  # type: ignore[no-untyped-call]
        after: Any = getattr(self, "lora_scale", None)
        if before is not None and after.dtype.itemsize == 2:  # which would round it, or lose it
            after.data = before.to(after.device, torch.float32)
        first = next(self._tensors())
        self._move_switch(first)
        if lazy and not first.is_meta:
            self.reset_parameters()
        return self

    def _move_switch(self, like: Tensor) -> None:
        """Have the strength on the device of a tensor: it is no buffer, so nobody else moves it."""
        old = self.switch
        gain = Gains().at(old.effective, like.device, _wide(like.dtype))
        # nor the rows of the blocks of `route` that are open
        routes = tuple((block, rows.on(like.device)) for block, rows in old.routes)
        self.keep(switch=Switch(old.strength, gain, old.muted, old.past, routes=routes))

    def cast(self, dtype: torch.dtype) -> None:
        """Have its tensors in a type, but for its factor where that has 16 bits."""
        before = self._number()
        self.to(dtype)
        if before is not None and dtype.itemsize == 2:
            after: Any = getattr(self, "lora_scale", None)
            after.data = before

    def _number(self) -> Optional[Tensor]:
        """The factor as it is now, whatever the tensor that holds it is cast to. One that is
        trained is cast as every parameter: optimizers and sharding want one type."""
        return self._buffers.get("lora_scale")

    def _tensors(self) -> Any:
        return (
            t for held in (self._parameters, self._buffers) for t in held.values() if t is not None
        )

    def every_tensor(self) -> Iterator[Tensor]:
        """Its parameters and buffers, and those that a parametrization of its own holds."""
        # most updates hold no modules
        for one in self.modules() if self._modules else (self,):
            for held in (one._parameters, one._buffers):
                yield from (t for t in held.values() if t is not None)

    def reset_parameters(self) -> None:
        """Start anew, where a model from the meta device has been given its memory: a kind whose
        values are the base's at the first read, as the base has none either until it is loaded."""
        if not self.based:
            raise not_said(type(self), "reset_parameters")
        self.keep(unset=True)

    def begin_as(self, weight: Tensor) -> None:
        """Give the tensor that starts as the base tells its values of it."""
        raise not_said(type(self), "begin_as")

    def begins_anew(self, read: Callable[[], Tensor]) -> None:
        """While the base's own checkpoint loads: where the update changes nothing yet, it starts as
        that base, once the base is there.

        Args:
            read: gives what the update is applied to.
        """
        if self.based and not self.unset and self._is_idle(read()):
            self.keep(anew=read)

    @torch.no_grad()
    def _is_idle(self, weight: Tensor) -> bool:
        """Whether at full strength it leaves a weight as it is, but for what a norm rounds."""
        if weight.is_meta or is_sharded(weight) or weight.dtype not in (*FLOATS, torch.int64):
            return False
        one = torch.ones((), dtype=_wide(weight.dtype), device=weight.device)
        new = folded(weight, [self.term_of(self.plain(), one, self.layout)])
        own: Tensor = getattr(self, self.based)
        # on another device than where it started a norm has other last bits
        near = 16 * torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0
        return torch.allclose(new, weight, rtol=near, atol=0.0, equal_nan=True)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        waits = self.unset or "anew" in self.__dict__
        value = state.get(prefix + self.based) if waits else None
        # a base checkpoint is given the update's own values, see `layers`
        own = getattr(self, self.based).data_ptr() if waits else 0
        told = isinstance(value, Tensor) and value.data_ptr() != own
        super()._load_from_state_dict(state, prefix, *args)
        first, gain = next(self._tensors(), None), self.switch.gain
        # with `assign` its tensors are those of the state dict, wherever they lie
        if first is not None and (first.device, _wide(first.dtype)) != (gain.device, gain.dtype):
            self._move_switch(first)
        read = self.__dict__.pop("anew", None)
        if told:
            self.keep(unset=False)
        elif read is not None:
            # torch loads what holds this before what is in it: the base has its values
            self.begin_as(read())

    @classmethod
    def keys(cls) -> KindKeys:
        """What an entry that asks for it may say, where `paramlora.config.KINDS` does not tell:
        its rank and its factor, where it has them, and what else it `heeds`."""
        own_rank = cls.rank_of.__func__ is not AttachedUpdate.rank_of.__func__  # type: ignore[attr-defined]
        ranked = own_rank or "output" in cls.parts.values()
        rank = ("r",) if ranked else ()
        factor = ("scale", "trainable_scale") if "lora_scale" in cls.parts else ()
        by_rank = ("alpha", "rslora") if rank and factor else ()
        return KindKeys({}, ("adapter_dtype", *by_rank, "kind", *rank, *factor, *cls.heeds), ranked)

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "AttachedUpdate":
        """A new update of a tensor, as an entry of the configuration asks for it."""
        raise NotImplementedError

    @classmethod
    def check_site(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> str:
        """Why it cannot update a tensor of that shape; empty where it can."""
        return ""

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many elements its parameters have, but for its number."""
        return _elements_made(cls, entry, shape, layout)

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """What it does to a weight, for the sum of a merge.

        Args:
            parts: its tensors, live or of a file, in the type of an attached update's.
            gain: its strength.
            layout: where the input and output sides lie in the weight.
        """
        raise NotImplementedError

    def term(self) -> Term:
        """What it does to a weight now."""
        self.check_started()
        return self.term_of(self.plain(), self.gain, self.layout)

    def gathered_term(self) -> Term:
        """The same by tensors that every process has whole: all of them call this together."""
        self.check_started()
        parts = {name: gathered(tensor) for name, tensor in self.plain().items()}
        return self.term_of(parts, self.gain, self.layout)

    def lies_along(self) -> bool:
        """Whether its tensors are split as a sharded weight of its layer is, so that each process
        can form its own part of the sum; not of a buffer, nor where only the kind knows."""
        return all(
            part == "number" or part != "own" and is_sharded(getattr(self, name, None))
            for name, part in self.parts.items()
        )

    def check_started(self) -> None:
        """Refuse to read values that are not there yet.

        Raises:
            AdapterError: a tensor waits for its layer's first read, see `reset_parameters`.
        """
        if self.unset:
            raise AdapterError(
                f'adapter "{self.adapter}": its {self.based} came from the meta device and has no '
                "value before its layer is first read. Call the model once, then try again."
            )

    def at_most(self, largest: float) -> float:
        """What no element of a weight is changed by more than; infinite where that is not known.

        Args:
            largest: what no number of its tensors is above.
        """
        return math.inf

    def check_mergeable(self, path: str) -> None:
        """Refuse what no weight of the layer's shape could do."""

    @staticmethod
    def together(updates: "Sequence[Any]", weight: Tensor) -> Tensor:
        """What several of a kind that stands alone make of their tensor."""
        for update in updates:
            weight = update(weight)
        return weight

    def assigned(self, value: Tensor) -> bool:
        """Hold what its layer puts in the place of a buffer, and say whether it did."""
        return False

    def shares_its_sum(self) -> bool:
        """Whether its weight takes a product to form, which all readers of one call are to share,
        and a change of what it is formed of would be seen."""
        return False

    def summand(self) -> Optional[Summand]:
        """Its own part of the gradient of such a sum; None where only autograd knows it."""
        return None

    def rank_of_sum(self) -> int:
        """The rank of what it adds, `r` or more; 0 where it adds no product of two factors."""
        return 0

    def make_room(self, rank: int, shape: tuple[int, ...], layout: Layout) -> None:
        """Take tensors up to `rank`, or to the rank of a weight of that shape; a kind without ranks
        does not change."""

    def rank_dim(self, name: str) -> Optional[int]:
        """The dimension of one of its tensors in which ranks lie that may be filled with zeros;
        None where there is none."""
        return None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters, by the name of their optimizer's group: each its own."""
        held = {name: [one] for name, one in self._parameters.items() if one is not None}
        return {**held, **self.ruled()}

    def ruled(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of what computes its tensors, where a parametrization of theirs does."""
        lists = self._modules.get("parametrizations")
        # parameters of the rule, as what it computes is none
        return {name: list(one.parameters()) for name, one in lists.items()} if lists else {}  # type: ignore[operator]

    def described(self) -> tuple[int, float, str]:
        """Its rank (0 where it has none), its factor and its kind, for `summary`."""
        return self.r, self.factor()[1], self.title()

    @classmethod
    def title(cls) -> str:
        """Its kind, in a table."""
        return cls.method

    @classmethod
    def beside_instead(cls) -> str:
        """What an entry that asks for it has to leave out or to have, with ``"hard": 0``, for a
        branch beside the layer instead."""
        implied = CONFIGURED[cls.method].implied_by if cls.method in CONFIGURED else ""
        return f' with "r" and no "{implied}"' if implied else ' and no "kind"'

    def factor(self) -> tuple[bool, float]:
        """Whether it trains its factor, and that; 1 without one, no number on the meta device."""
        scale = getattr(self, "lora_scale", None)
        if scale is None:
            return False, 1.0
        value = math.nan if scale.is_meta else gathered(scale.detach()).item()
        return isinstance(scale, nn.Parameter), value

    def value(self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int) -> Value:
        """The update as a value, free of the model, and complete on every process.

        Args:
            shape, kind, groups: of its layer, see `Target`.
        """
        entry, trains = self.entry or TargetConfig("", self.r), self.factor()[0]
        held = {
            name: gathered(tensor.detach())
            for name, tensor in self.plain().items()
            if name != "lora_scale"
        }
        scale = entry.scale
        number: Optional[Tensor] = getattr(self, "lora_scale", None)
        if number is not None:
            scale = as_asked(gathered(number.detach()), entry.scale)
        return KindUpdate(
            *(self.method, held, scale, shape, self.layout, entry.options, trains),
            dropout=self.dropout,
            adapter_dtype=entry.adapter_dtype,
            kind=kind,
            groups=groups,
        )

    def plain(self) -> dict[str, Tensor]:
        """What a file holds, by the end of its key; live tensors where they are stored so.

        Raises:
            AdapterError: it holds more than that, see `check_told`.
        """
        self.check_told()
        return self.shown()

    def shown(self) -> dict[str, Tensor]:
        """The same for a forward, which nothing is lost by."""
        # a rule's tensors are computed; what a file holds is what it shows
        held = {name: getattr(self, name, None) for name in self.parts}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def check_told(self) -> None:
        """Refuse a tensor that the kind's `parts` do not tell: it would be lost in a file.

        Raises:
            AdapterError: a parameter, or a buffer that is no cache, of its own or inside of it; or
                one of its tensors is of a type that files do not hold.
        """
        told = {*self.parts, *self.hidden}
        # rules that somebody put on its tensors are in no file, as what they compute is
        state = self.state_dict(keep_vars=True)
        untold = [n for n in state if n not in told and not n.startswith("parametrizations.")]
        if untold:
            trained = isinstance(state[untold[0]], nn.Parameter)
            what = f"{'parameter' if trained else 'buffer'} {untold[0]}"
            raise AdapterError(
                f'adapter "{self.adapter}": {type(self).__name__} has a {what}, which its '
                '"parts" do not tell, so no file would hold it. Hold it as a tensor of its own '
                "and add it there, or make it a buffer with persistent=False if it can be lost."
            )
        wrong = [(n, one.dtype) for n, one in self.shown().items() if one.dtype not in _STORED]
        if wrong:
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORED)
            raise AdapterError(
                f'adapter "{self.adapter}": {type(self).__name__}\'s {wrong[0][0]} is of '
                f"{wrong[0][1]}, which no adapter's file holds. Keep it as one of {types}."
            )

    def takes(self, name: str, own: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether `taking` takes a tensor of a shape in the place of one of its own."""
        return tuple(own.shape) == shape

    def taking(self, state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What is left to be copied of a file's values, as `plain` gave them, and into which
        tensors."""
        self.keep(unset=False)
        return [(getattr(self, name), value) for name, value in state.items()]

    @classmethod
    def names(cls, present: Collection[str]) -> tuple[str, ...]:
        """The tensors that a file must have of it, where `present` are those that it has."""
        return tuple(cls.parts)

    @classmethod
    def rank_of(cls, held: Mapping[str, Tensor]) -> int:
        """The rank of an update with these tensors; 0 without one."""
        outer = (tensor for name, tensor in held.items() if cls.parts[name] == "output")
        return next((tensor.shape[-1] for tensor in outer), 0)

    @classmethod
    def options_of(cls, held: Mapping[str, Tensor]) -> tuple[tuple[str, Any], ...]:
        """The kind's own keys of an entry that makes such tensors."""
        return ()

    @classmethod
    def completed(
        cls, options: tuple[tuple[str, Any], ...], held: Mapping[str, Tensor]
    ) -> tuple[tuple[str, Any], ...]:
        """The kind's own keys with what its tensors tell and no rank does."""
        return options

    @classmethod
    def fits(cls, held: Mapping[str, Tensor], shape: tuple[int, ...], layout: Layout) -> bool:
        """Whether tensors are those of an update of a weight of a shape: each by its `Part`."""
        return len(shape) >= 2 and all(
            _fits(cls.parts[name], tuple(tensor.shape), cls.rank_of(held), shape, layout)
            for name, tensor in held.items()
        )

    @classmethod
    def relaid(cls, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its tensors where a layer stores the same matrix the other way round, ``[in, out]`` for
        ``[out, in]``; those that run along the matrix's sides alone stay."""
        return held

    @classmethod
    def outputs_of(cls, held: Mapping[str, Tensor]) -> int:
        """How many rows a matrix of these tensors has; 0 where only the kind would know."""
        outer = (tensor for name, tensor in held.items() if cls.parts[name] == "output")
        return next((tensor.shape[-2] for tensor in outer), 0)

    @classmethod
    def of_rows(
        cls, held: Mapping[str, Tensor], rows: Moved, out: int
    ) -> Optional[Mapping[str, Tensor]]:
        """Its tensors in a matrix of `out` rows that has some of its rows, and where it `adds` has
        the others unchanged; None where no update of its kind is that.

        Args:
            held: of a matrix, not of a stack.
            rows: of each run the rows that they are of its own, and of the other matrix.
            out: how many the other matrix has.
        """
        return None

    @classmethod
    def beside_each_other(
        cls, several: Sequence[Mapping[str, Tensor]]
    ) -> Optional[Mapping[str, Tensor]]:
        """The tensors of one update out of those that `of_rows` gave, no two of the same row; None
        where no update of its kind is that."""
        return several[0] if len(several) == 1 else None

    @classmethod
    def factors_of(cls, held: Mapping[str, Tensor]) -> Optional[tuple[Tensor, Tensor]]:
        """A and B whose product it adds, but for the scale; None where its kind has no such."""
        return None

    @classmethod
    def read_file(
        cls, where: str, parts: Mapping[str, Tensor], entry: TargetConfig, told: Told
    ) -> Value:
        """The value of an update in a native file.

        Raises:
            FileError: its tensors are none of such an update, or of another weight.
        """
        scale = parts.get("lora_scale")
        if scale is not None and scale.numel() != 1:
            raise FileError(f"{where} is no update: its scale is no number. Save it again.")
        value = KindUpdate(
            entry.kind,
            {name: tensor for name, tensor in parts.items() if name != "lora_scale"},
            entry.scale if scale is None else as_told(scale, entry.scale),
            told.shape,
            told.layout or cls.layout_of(parts),
            entry.options,
            entry.trainable_scale,
            entry.dropout,
            entry.adapter_dtype,
            told.kind,
            told.groups,
        )
        value.check_types(where, torch.float32)
        if told.shape is not None and value.fitted(told.shape) is None:
            raise FileError(_unfitting(where, value.held, told.shape))
        return value

    @classmethod
    def read_state(cls, where: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Value:
        """The value of an update in an attached model's state dict.

        Args:
            where: the tensor that it updates, for messages.
            parts: its own tensors.
            dtype: of the tensor.

        Raises:
            FileError: one of its tensors is missing, or of an impossible shape.
        """
        missing = [name for name in cls.names(parts) if name not in parts]
        if missing:
            raise FileError(lacking(where, missing))
        held = {name: parts[name] for name in parts if name in cls.parts and name != "lora_scale"}
        scale = parts.get("lora_scale")
        number = 1.0 if scale is None else float(scale)
        return KindUpdate(cls.method, held, number, None, cls.layout_of(parts))

    @classmethod
    def layout_of(cls, parts: Mapping[str, Tensor]) -> Layout:
        """The layout that its tensors tell."""
        if "lora_transposed" in parts:
            return "transposed"
        # a stack's input side has three dimensions, a matrix's two
        stacked = any(
            tensor.dim() == 3 and cls.parts.get(name) == "input" for name, tensor in parts.items()
        )
        return "stack" if stacked else "matrix"

    def before_resize(self, base: Tensor) -> None:
        """Keep what `resize` will need of a base that is about to be resized."""

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Take the size of its base, which has been resized: what is new is zero, as before
        training.

        Raises:
            AdapterError: its kind does not say what a new row starts as.
        """
        held = {name: getattr(self, name, None) for name in self.parts}
        for name, own in held.items():
            part = self.parts[name]
            # along each of the base's sides it may be of size 1 or the side's: anything else, and
            # what only the kind knows, must be told how to grow
            told = part != "weight" or own is None or _is_along(own.shape, base.shape)
            if part == "own" or not told:
                raise AdapterError(
                    f'adapter "{self.adapter}": {type(self).__name__} does not say what {name} '
                    "is on new rows or columns, so its tensor cannot be resized. Merge or detach "
                    "it first."
                )
        _, out, fan_in = matrix_shape(base.shape, self.layout)
        for name, own in held.items():
            if own is not None and self.parts[name] in ("input", "output"):
                dim, size = (-1, fan_in) if self.parts[name] == "input" else (-2, out)
                put_in_place(own, sized(own, dim, size))


def _is_along(own: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether each side of a tensor is of size 1 or that of a weight."""
    return len(own) == len(shape) and all(n in (1, size) for n, size in zip(own, shape))


def _fits(part: Part, own: tuple[int, ...], r: int, shape: tuple[int, ...], layout: Layout) -> bool:
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    if part == "weight":
        return _is_along(own, shape)
    known = {"input": (*lead, r, fan_in), "output": (*lead, out, r), "number": ()}
    return part in known and own == known[part]


def _unfitting(where: str, held: Mapping[str, Tensor], shape: tuple[int, ...]) -> str:
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in held.items())
    return f"{where}: {sizes} do not fit the shape {list(shape)} in its metadata. Save it again."


def lacking(where: str, missing: Collection[str]) -> str:
    """What is wrong with a state dict that has only some of an update's tensors."""
    return (
        f"{where}: an update is inside without its {', '.join(missing)}. Save the attached "
        "model's state dict again."
    )


def as_asked(scale: Tensor, asked: float) -> float:
    """The configuration's own number where it was not trained: 0.3, not float32's nearest."""
    # as the configuration spells it: a number that was cast compares equal to its cast
    same = scale.dtype.itemsize > 2 and torch.equal(scale, torch.full_like(scale, asked))
    return asked if same else scale.item()


def as_told(scale: Tensor, told: float) -> float:
    """A file's configuration's number where its tensor is the nearest to that."""
    # in the tensor's own type: 0.3 is told back as 0.3
    exact = float(torch.tensor(told, dtype=scale.dtype)) == float(scale)
    return told if exact else float(scale)


def in_rows(tensor: Tensor, rows: Moved, size: int, dim: int = 0) -> Tensor:
    """Zeros of a size along one dimension, with runs of a tensor's rows (the first of each pair)
    where the second says.

    Example:
        >>> in_rows(torch.tensor([1, 2, 3]), [(slice(1, 3), slice(0, 2))], 4).tolist()
        [2, 3, 0, 0]
    """
    shape = list(tensor.shape)
    shape[dim] = size
    out = tensor.new_zeros(shape)
    for here, there in rows:
        own = tensor.narrow(dim, here.start, here.stop - here.start)
        out.narrow(dim, there.start, there.stop - there.start).copy_(own)
    return out


def put_in_place(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor another size, if it has that not already."""
    if tensor.shape != value.shape:
        tensor.grad = None
        tensor.data = value


def sized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A tensor cut, or filled up with zeros, to a size along one dimension."""
    shape = list(tensor.shape)
    shape[dim] = size
    out, kept = tensor.new_zeros(shape), min(size, tensor.shape[dim])
    out.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return out


@torch.no_grad()
def check_computed(update: AttachedUpdate, weight: Tensor, path: str) -> None:
    """Refuse an update whose forward makes what is no weight of its layer, as torch does of a rule.

    Raises:
        AdapterError: another shape or type, or the weight itself with other values.
    """
    given = weight.detach().clone()
    version, value = given._version, update(given)
    told, named = f"a {type(value).__name__}", type(update).__name__
    if given._version != version:
        told = "the weight itself, written to"
    elif isinstance(value, Tensor) and value.shape != weight.shape:
        told = f"a tensor of shape {list(value.shape)}"
    elif isinstance(value, Tensor) and value.dtype != weight.dtype:
        told = f"a tensor of {value.dtype}"
    elif isinstance(value, Tensor):
        return
    raise AdapterError(
        f"{path or 'weight'}: {named} makes {told} of a weight of shape {list(weight.shape)} in "
        f"{weight.dtype}. Have its forward give another tensor of the weight's shape and type."
    )


def applied(updates: Sequence[nn.Module], weight: Tensor) -> Tensor:
    """What a tensor's parametrizations make of it: one after the other, but for those of a kind
    that stands alone, which come first, and together."""
    alone: list[nn.Module] = []
    for one in updates:  # a loop, since torch 2.11 compiles no takewhile
        if not (isinstance(one, AttachedUpdate) and one.alone):
            break
        alone.append(one)
    if alone:
        weight = alone[0].together(alone, weight)  # type: ignore[operator]
    for one in updates[len(alone) :]:
        weight = one(weight)
    return weight


@cache
def _unsaid(kind: Any, question: str) -> tuple[type, ...]:
    """Where a class inherits an answer from one that computes another weight than it does: the
    classes down from the one that computes its own; none of them where it answers itself."""
    told, computed = _first(kind, question), _first(kind, *kind.computes)
    # `told` further up than `computed`: the answer was given of another weight
    return kind.__mro__[: computed + 1] if told > computed else ()


def _first(kind: Any, *names: str) -> int:
    """Where in a class's order of methods one of these names is first said."""
    return next(at for at, cls in enumerate(kind.__mro__) if not vars(cls).keys().isdisjoint(names))


def most(update: AttachedUpdate, largest: float) -> float:
    """What an update tells as `at_most`, where it is of the weight that its class computes."""
    kind: Any = type(update)
    return math.inf if _unsaid(kind, "at_most") else update.at_most(largest)


def elements(
    kind: type[AttachedUpdate], entry: TargetConfig, shape: tuple[int, ...], layout: Layout
) -> int:
    """What a kind tells as `elements`, where it is of the weight that its class computes; else
    counted."""
    own: Any = kind
    if _unsaid(own, "elements"):
        return _elements_made(kind, entry, shape, layout)
    return kind.elements(entry, shape, layout)


def _elements_made(
    kind: type[AttachedUpdate], entry: TargetConfig, shape: tuple[int, ...], layout: Layout
) -> int:
    """How many elements the parameters of a kind have, but for its number: counted in one that is
    made on the meta device, for no memory."""
    weight = torch.empty(shape, device="meta")
    site = Site(nn.Module(), "", weight, layout, *[lambda: weight] * 3)
    # a start from the weight changes no shape, and there are no values to start from
    update = kind.attached_to(site, replace(entry, init="default"), "", None)
    return sum(own.numel() for name, own in update.named_parameters() if name != "lora_scale")


def shares_its_sum(update: AttachedUpdate) -> bool:
    """What an update tells as `shares_its_sum`, where it is of the weight that its class computes:
    another may draw numbers, and be another weight each time that it is computed."""
    kind: Any = type(update)
    return not _unsaid(kind, "shares_its_sum") and update.shares_its_sum()


def adds(update: AttachedUpdate) -> bool:
    """What an update tells as `adds`, where it is of the weight that its class computes."""
    return kind_adds(type(update))


def kind_adds(kind: Any) -> bool:
    """What a kind tells as `adds`, where it is of the weight that it computes."""
    return bool(kind.adds) and not _unsaid(kind, "adds")


def says(kind: type[AttachedUpdate], question: str) -> bool:
    """Whether what a kind tells as `question` is of the weight, or of the change, that it computes
    itself."""
    return _first(kind, question) <= _first(kind, *kind.computes, "change")


def answer(update: AttachedUpdate, question: str, *arguments: Any) -> Any:
    """What an update tells, where its kind says it of the weight that it computes.

    A class that computes another weight than the one that it inherits from, and says nothing of
    it, would else be merged or saved as what it is not. One that is registered says what its
    `parts` and `term_of` are, and by them the rest.

    Raises:
        AdapterError: it does not say so.
    """
    kind: Any = type(update)
    unsaid = _unsaid(kind, question)
    # registered kinds say by parts and `term_of` what the inherited answers are made from
    if unsaid and not any(cls in KINDS.values() for cls in unsaid):
        raise AdapterError(
            f'adapter "{update.adapter}": an update of the kind {type(update).__name__} computes a '
            f'weight of its own and does not say its "{question}", so it cannot be merged, saved, '
            f"shown or grouped. Register it with its parts and term_of, or give it a method "
            f"{question}, or detach it."
        )
    return getattr(update, question)(*arguments)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
