"""What a pickle of ``torch.save`` would do, told from its opcodes without doing any of it.

torch's own unpickler calls only what it knows, and still makes tensors of memory that nobody wrote
(``torch.FloatTensor(6, 6)``, a tensor larger than its storage) and values that grow without end.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, BinaryIO, Optional

import torch

_MOST_STEPS = 1 << 22  # a checkpoint of a hundred thousand tensors takes two and a half million
# of numbers beyond 64 bits and of tuples many can be made of one hash, so that a dictionary of them
# takes a time that grows with the square of their number
_MOST_RARE = 10_000
# bytes of an element, by the classes that torch.save names its storages by
_SIZES = {
    "torch.storage.UntypedStorage": 1,
    **{
        f"torch.{device}{kind}Storage": size
        for device in ("", "cuda.")
        for size, kinds in {
            1: "Char Byte Bool QInt8 QUInt8 QUInt4x2 QUInt2x4",
            2: "Half BFloat16 Short",
            4: "Float Int QInt32",
            8: "Double Long ComplexFloat",
            16: "ComplexDouble",
        }.items()
        for kind in kinds.split()
    },
}
_DTYPES = {f"torch.{n}": v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
_KINDS = [n for n, v in vars(torch).items() if isinstance(v, (torch.qscheme, torch.layout))]
_TENSORS = [f"torch._utils._rebuild_{n}" for n in "tensor tensor_v2 tensor_v3 qtensor".split()]
_BY_TYPE = "torch._tensor._rebuild_from_type_v2"
# what torch's own weights_only unpickler calls, but for arrays of NumPy and subclasses
_CALLS = {
    *_TENSORS,
    _BY_TYPE,
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "builtins.complex",
    "_codecs.encode",
}
_NAMES = {
    *_DTYPES,
    *_SIZES,
    *(f"torch.{n}" for n in _KINDS),
    "torch.Tensor",
}  # the last is the type of one with attributes
_PUTS = {"BINPUT", "LONG_BINPUT"}
_GETS = {"BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# of protocol 2, which torch.save writes; an opcode of a later one is refused in `_act`
_VALUES = set(
    "NONE NEWFALSE NEWTRUE EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING LONG1".split()
)


class Unsafe(Exception):
    """Names that no file of tensors needs."""

    def __init__(self, *names: str) -> None:
        self.names = sorted(names)
        super().__init__(", ".join(self.names))


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Made:
    """Stands for what a call would give, by the name of what is called."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors, as a file tells of them before it holds them."""

    key: str
    nbytes: int
    itemsize: int


@dataclass
class Told:
    """What was found: the storages by key, and what the pickle gives, where that is plain."""

    storages: dict[str, Storage] = field(default_factory=dict)
    value: Any = None


def told(pickled: BinaryIO, steps: Optional[Iterator[int]] = None) -> Told:
    """Follow one pickle, and check every call and every tensor in it.

    Args:
        pickled: where it begins.
        steps: counts them, together with those of the file's other pickles.

    Raises:
        Unsafe: it needs what is no part of a tensor.
        Exception: whatever a pickle that torch did not write leads to.
    """
    machine, steps = _Machine(), steps or count()
    # genops runs nothing: it only splits bytes into opcodes and their arguments
    for (op, argument, _), step in zip(pickletools.genops(pickled), steps):
        if step > _MOST_STEPS:
            raise ValueError("it has more values than any real file")
        machine.step(op.name, argument)
    # at the end, so that all names stand in one message
    if machine.unsafe:
        raise Unsafe(*machine.unsafe)
    return machine.told


class _Machine:
    """The stack of an unpickler, with stand-ins for everything that is not plain."""

    def __init__(self) -> None:
        self.told = Told()
        self.unsafe: set[str] = set()
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._calls = _CALLS | _trusted()
        self._rare = 0

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says to the stand-ins."""
        if name in _VALUES:
            self._count_rare(name == "LONG1" and abs(argument) >= 2**63)
            self._stack.append(argument)
        elif name == "EMPTY_LIST":
            self._stack.append([])
        elif name in _PUTS:
            self._memo[argument] = self._stack[-1]
        elif name in _GETS:
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            # as in Python's unpickler, what follows goes on a stack of its own until it is taken
            self._marks.append(self._stack)
            self._stack = []
        elif name in _TUPLES:
            start = len(self._stack) - _TUPLES[name]
            self._stack[start:] = [tuple(self._stack[start:])]
        elif name == "GLOBAL":
            self._stack.append(self._named(argument))
        else:
            self._act(name)

    def _act(self, name: str) -> None:
        if name == "TUPLE":
            inside = tuple(self._popped())
            self._stack.append(inside)
        elif name in ("APPENDS", "SETITEMS"):
            self._keep(self._popped())
        elif name in ("APPEND", "SETITEM"):
            start = len(self._stack) - 1 - (name == "SETITEM")
            items, self._stack[start:] = self._stack[start:], []
            self._keep(items)
        # a call, or an object made of a class: neither happens, a stand-in takes its place
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self._stack.pop(), self._stack.pop()
            self._stack.append(self._called(function, arguments))
        elif name == "BUILD":
            self._stack.pop()
            _check_built(self._stack[-1])
        elif name == "BINPERSID":
            # torch names a storage by a tuple, which its own unpickler looks up in the file
            self._stack.append(self._storage(self._stack.pop()))
        elif name == "STOP":
            self.told.value = self._stack.pop()
        elif name != "PROTO":
            raise ValueError(f"{name} is no operation of torch.save")

    def _popped(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _keep(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):  # such as the keys of a legacy file's storages
            self._stack[-1].extend(items)
        else:
            # nothing asks what a dictionary holds, so only its costly keys are counted
            self._count_rare(sum(isinstance(key, tuple) for key in items[::2]))

    def _count_rare(self, count: int) -> None:
        self._rare += count
        if self._rare > _MOST_RARE:
            raise ValueError("it has more tuples as keys, or long numbers, than any real file")

    def _named(self, argument: str) -> _Global:
        # "module name" in the pickle; protocol 2 spells Python 3's builtins as Python 2 did
        name = argument.replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        if name not in self._calls and name not in _NAMES:
            self.unsafe.add(name.removeprefix("builtins."))
        return _Global(name)

    def _called(self, function: Any, arguments: Any) -> Any:
        name = function.name
        # (function, type, arguments, state): only what the function makes is to be checked
        if name == _BY_TYPE:
            return self._called(arguments[0], arguments[2])
        # protocol 2 has no bytes: Python writes them as text encoded in latin1
        latin = name != "_codecs.encode" or (isinstance(arguments[0], str) and _is_latin(arguments))
        if name not in self._calls or not latin:
            self.unsafe.add(name)
        elif name in _TENSORS:
            _check_inside(name, arguments)
        # a size is needed itself, as the shape of a tensor
        return arguments[0] if name == "torch.Size" and arguments else _Made(name)

    def _storage(self, identity: tuple[Any, ...]) -> Any:
        if identity[0] != "storage":  # a class with its source, whose name is told already
            return identity[1]
        # between the key and the count stands the device, which `load` overrides with the CPU
        kind, key, _, count = identity[1:5]
        size = _SIZES[kind.name]
        first = Storage(str(key), _count(count) * size, size)
        # as in torch, who names a storage first tells its size, and others get that one
        storage = self.told.storages.setdefault(first.key, first)
        # files from before torch 1.6 may share a storage in parts: (key, start, length)
        view = identity[5] if len(identity) > 5 else None
        if view is None:
            return storage
        start, length = _count(view[1]) * size, _count(view[2]) * size
        if start + length > storage.nbytes:
            raise ValueError("a part of a storage lies outside of it")
        return Storage(storage.key, length, storage.itemsize)


def _trusted() -> set[str]:
    """What the user told torch to be safe."""
    named = (one if isinstance(one, tuple) else (one, "") for one in _safe_globals())
    return {name or f"{one.__module__}.{one.__qualname__}" for one, name in named}


def _safe_globals() -> list[Any]:
    return torch.serialization.get_safe_globals()


def _is_latin(arguments: tuple[Any, ...]) -> bool:
    """Whether text becomes bytes one by one; other codecs could make them more each time."""
    return bool(arguments[1] == "latin1")


def _count(number: Any) -> int:
    # by type: a bool is an int to Python
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError("a storage or a tensor of no size")
    return number


def _check_built(made: Any) -> None:
    """Refuse a state set on anything but an OrderedDict, where a module's state dict keeps its
    `_metadata`, and what the user told torch to trust: on a tensor it could give any memory."""
    plain = isinstance(made, _Made) and made.name not in _CALLS - {"collections.OrderedDict"}
    if not plain:
        raise ValueError("it changes a tensor after making it")


def _check_inside(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a tensor that reaches out of its storage, for which torch would make that larger."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage of the file")
    itemsize = storage.itemsize
    if name.endswith("_v3"):
        itemsize = _DTYPES[arguments[6].name].itemsize
    # the place of the last element; a negative stride is refused by `_count`
    last = sum((_count(n) - 1) * _count(s) for n, s in zip(size, stride))
    reach = _count(offset) + last + 1 if 0 not in size else 0
    if len(size) != len(stride) or reach * itemsize > storage.nbytes:
        raise ValueError("a tensor reaches out of its storage")
