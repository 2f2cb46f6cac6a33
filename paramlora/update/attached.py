"""What every update is: named, switched on and off, and moved to and from a file."""

from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.config import TargetConfig
from paramlora.errors import AdapterError
from paramlora.update.casts import NotOffloaded, without_storage
from paramlora.update.choice import ONLY, UNSPLIT, Choice
from paramlora.update.compat import (
    current_backward,
    current_node,
    next_number,
    number_of,
    strength_changes,
)
from paramlora.update.sum import Term

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
    """

    # not a tuple, nor frozen: torch.compile would guard all of it, where it reads one attribute
    __slots__ = ("strength", "gain", "muted", "past", "acts", "fully", "rows")

    def __init__(
        self,
        strength: float,
        gain: Tensor,
        muted: frozenset[object] = frozenset(),
        past: "tuple[_Past, ...]" = (),
        rows: Optional[Choice] = None,
    ) -> None:
        self.strength, self.gain, self.muted, self.past = strength, gain, muted, past
        self.rows = rows
        # the only branches in compiled code
        self.acts = strength != 0 and not muted
        self.fully = strength == 1 and not muted

    @property
    def effective(self) -> float:
        """What acts now."""
        return 0.0 if self.muted else self.strength

    def changed(self, strength: float, muted: frozenset[object], gains: "Gains") -> "Switch":
        """Another value in its place, which remembers this one."""
        new = 0.0 if muted else strength
        past = self.past
        if new != self.effective:
            strength_changes()
            past = self._remembering()
        gain = gains.at(new, self.gain.device, self.gain.dtype)
        return Switch(strength, gain, muted, past, self.rows)

    def routed(self, rows: Optional[Choice]) -> "Switch":
        """As strong on other rows, which remembers this one."""
        strength_changes()
        return Switch(self.strength, self.gain, self.muted, self._remembering(), rows)

    def _remembering(self) -> "tuple[_Past, ...]":
        return (*self.past[1 - _REMEMBERED :], (next_number(), self.effective, self.rows))

    def at(self, sequence: int) -> "Switch":
        """As it was when the forward drew a sequence number of autograd."""
        for until, effective, rows in self.past:
            if sequence < until:
                if len(self.past) == _REMEMBERED and until == self.past[0][0]:
                    raise AdapterError(_FORGOTTEN)
                return Switch(effective, torch.full_like(self.gain, effective), rows=rows)
        return self

    def seen(self, adapter: str) -> "Switch":
        """As rows of one adapter see it, where a layer is called with those alone."""
        only = ONLY.adapter
        if only == UNSPLIT:
            return self
        if only == adapter:
            return Switch(self.strength, self.gain, self.muted)
        return Switch(0.0, torch.zeros_like(self.gain))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switch":
        """Of a model: nobody will close the blocks of `disable_adapters` that are open for it."""
        gain = torch.full_like(self.gain, self.strength) if self.muted else self.gain.clone()
        return Switch(self.strength, gain)


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


@torch.inference_mode(False)
def _number(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A single number that autograd may read, wherever it is made."""
    return torch.full((), value, device=device, dtype=dtype)


class AttachedUpdate(nn.Module):
    """An update of one tensor: what every kind of it must tell, and its strength, which changes
    without compiling anything again.

    A kind says what it makes of a weight (`forward`), and the same as a `term` of a merge; what a
    file holds of it (`plain`, `load_plain`) and its `value` there; what its parameters are to an
    optimizer (`groups`); and what a table shows (`described`). `merge`, `save_adapter` and the
    others ask these by `answer`, and nothing else: what a kind does not say is refused.

    Args:
        adapter: the name under which the update is switched and saved.
        device, dtype: of its tensors. The gain is in float32 at least, which holds any strength.
    """

    alone: ClassVar[bool] = False  # whether its tensor can have no other update
    beside: ClassVar[bool] = False  # whether it adds to the layer's output, after every rule
    adapter: str
    switch: Switch
    stored: bool = False  # whether the weight is in a type that only stores it (see `casts`)
    written_by_reader: bool = False  # such as an embedding with max_norm, set by attach
    served: bool = False  # whether its layer rounds twice, see `rounding`
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
        if not (is_compiling() or not own.past or current_backward() == -1):
            node = current_node()
            own = own if node is None else own.at(number_of(node))
        return own if own.rows is None else own.seen(self.adapter)

    def now(self) -> Switch:
        """The same for who cannot tell the rows of a batch apart.

        Raises:
            AdapterError: it acts on some of them.
        """
        own = self.current()
        if own.rows is not None:
            raise AdapterError(
                f'adapter "{self.adapter}" acts on some rows of the batch here, and what read its '
                "tensor wants one for all of them. Call it outside of paramlora.route, or under "
                "checkpointing call backward inside of it."
            )
        return own

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
        lazy = any(t.is_meta for t in self._tensors())
        super()._apply(without_storage(self, fn), recurse)  # type: ignore[no-untyped-call]
        first, old = next(self._tensors()), self.switch
        gain = Gains().at(old.effective, first.device, _wide(first.dtype))
        self.keep(switch=Switch(old.strength, gain, old.muted, old.past, old.rows))
        if lazy and not first.is_meta:
            self.reset_parameters()
        return self

    def _tensors(self) -> Any:
        return (
            t for held in (self._parameters, self._buffers) for t in held.values() if t is not None
        )

    def reset_parameters(self) -> None:
        """Start anew, where a model from the meta device has been given its memory."""
        raise NotImplementedError

    def term(self) -> Term:
        """What it does to a weight, for the sum of a merge."""
        raise NotImplementedError

    def check_mergeable(self, path: str) -> None:
        """Refuse what no weight of the layer's shape could do."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters, by the name of their optimizer's group."""
        raise NotImplementedError

    def described(self) -> tuple[int, float, str]:
        """Its rank (0 where it has none), its factor and its kind, for `summary`."""
        raise NotImplementedError

    def value(self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int) -> Any:
        """It as a value, free of the model: an `Update`, or a tensor to have instead.

        Args:
            shape, kind, groups: of its layer, see `Target`.
        """
        raise NotImplementedError

    def plain(self) -> dict[str, Tensor]:
        """What a file holds, by the end of its key; live tensors where they are stored so."""
        raise NotImplementedError

    def load_plain(self, state: dict[str, Tensor]) -> None:
        """Take the values of a file, bit for bit those that `plain` gave it."""
        raise NotImplementedError


def answer(update: AttachedUpdate, question: str, *arguments: Any) -> Any:
    """What an update tells, where its kind says it of the weight that it computes.

    A class that computes another weight than the one that it inherits from, and says nothing of
    it, would else be merged or saved as what it is not.

    Raises:
        AdapterError: it does not say so.
    """
    order = type(update).__mro__
    told, computed = (
        next(index for index, cls in enumerate(order) if name in vars(cls))
        for name in (question, "forward")
    )
    if order[told] is AttachedUpdate or told > computed:
        raise AdapterError(
            f'adapter "{update.adapter}": an update of the kind {type(update).__name__} computes a '
            f'weight of its own and does not say its "{question}", so it cannot be merged, saved, '
            f"shown or grouped. Give the class a method {question}, or detach it."
        )
    return getattr(update, question)(*arguments)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
