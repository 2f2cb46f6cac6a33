"""The private names of torch that the package uses, each with what stands in for it.

Only this file knows them, and a test holds that. Each is chosen once, at import: torch's own
function itself where there is one, so that a small layer pays no Python call for the choice, else a
public way to the same answer, which is slower. Where torch tells nothing publicly, the stand-in
gives the answer that is right though it costs more. `tests/update/test_compat.py` hides each name
in turn.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from paramlora.errors import warn


def _private(path: str) -> Any:
    """What a private name of torch stands for, or None where this torch has no such name."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# --- autograd functions, and what they cannot be called in ---------------------------------------


class _Refused(torch.autograd.Function):
    """Has no `setup_context`, which torch demands wherever a transform of torch.func is at work."""

    @staticmethod
    def forward(ctx: Any, number: int) -> int:
        return number


def _refuses() -> bool:
    """Whether torch refuses such an autograd function here."""
    try:
        _Refused.apply(0)  # type: ignore[no-untyped-call]
    # an autograd function without `setup_context` raises under a transform
    except RuntimeError:
        return True
    return False


# whether a transform of torch.func is at work; asked in every forward of every layer
transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active") or _refuses


def _dual_level_open() -> bool:
    """Whether forward mode is at work: torch then refuses another level."""
    try:
        with forward_ad.dual_level():
            return False
    except RuntimeError:
        return True


def _transformed() -> bool:
    """Whether torch.func or forward mode is at work, which no autograd function here serves."""
    return transforms_active() or forward_ad._current_level >= 0


def _transformed_by_trial() -> bool:
    """`_transformed` of a torch that does not tell its level of forward mode."""
    return transforms_active() or _dual_level_open()


# the level is a number that torch replaces, so it cannot be bound: reading it takes a function
transformed: Callable[[], bool] = (
    _transformed
    if _private("autograd.forward_ad._current_level") is not None
    else _transformed_by_trial
)

# leaves all transforms for a while; a torch without it refuses there what would change a model
outside_transforms: Callable[[], AbstractContextManager[Any]] = (
    _private("_functorch.pyfunctorch.temporarily_clear_interpreter_stack") or nullcontext
)

# a tensor of a transform that has ended, whose memory nobody can read
_left_over: Any = _private("_C._functorch.is_functorch_wrapped_tensor")


def _applied(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    """``function.apply(x, *rest)`` without its preparations for torch.func's transforms, a third of
    its time, where there is none and no tensor is left over from one."""
    if transforms_active():
        return function.apply(x, *rest)  # type: ignore[no-any-return,no-untyped-call]
    try:
        # past `Function.apply`, to what it calls in the end
        return super(torch.autograd.Function, function).apply(x, *rest)  # type: ignore[misc,no-any-return]
    except RuntimeError:  # the address of one left over cannot be read
        # only a RuntimeError of such a tensor means what is handled here
        if not any(isinstance(t, Tensor) and _left_over(t) for t in (x, *rest)):
            raise
        return function.apply(x, *rest)  # type: ignore[no-any-return,no-untyped-call]


def _applied_as_ever(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    """``function.apply(x, *rest)``, preparations and all."""
    return function.apply(x, *rest)  # type: ignore[no-any-return,no-untyped-call]


applied: Callable[..., Tensor] = (
    _applied if _left_over and _private("_C._FunctionBase.apply") else _applied_as_ever
)


def _has_no_memory(t: Tensor) -> bool:
    """Whether a tensor only wraps others, as one of many gradients does."""
    try:
        # a batched tensor has no storage of its own
        t.data_ptr()
    except RuntimeError:
        return True
    return False


# whether it stands for many gradients (`is_grads_batched`), which no kernel can be given
is_batched: Callable[[Tensor], bool] = (
    _private("_C._functorch.is_legacy_batchedtensor") or _has_no_memory
)

# --- what follows torch's operations -------------------------------------------------------------

_dispatch_mode: Any = _private("_C._get_dispatch_mode")
_PROXY: Any = _private("_C._TorchDispatchModeKey.PROXY")


def _recorded() -> bool:
    """Whether torch's operations are being recorded by `make_fx`, which does not see a launch."""
    return _dispatch_mode(_PROXY) is not None


def _recorded_publicly() -> bool:
    """`_recorded` by the module of `make_fx`, which takes a second to import, so that it is asked
    only where somebody has imported it: nobody else records."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


recorded: Callable[[], bool] = _recorded if _dispatch_mode and _PROXY else _recorded_publicly


# whether `torch.jit.trace` is at work; the public name asks whether it is a script first
traced: Callable[[], bool] = _private("_C._is_tracing") or torch.jit.is_tracing  # type: ignore[attr-defined]


def _is_wrapper(tensor: object) -> bool:
    """Whether a tensor's class has the methods by which compilers take it apart."""
    if not isinstance(tensor, Tensor) or type(tensor) is Tensor:
        return False
    return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")


# whether a tensor is made of others, such as a quantised one
is_wrapper: Callable[[object], bool] = (
    _private("utils._python_dispatch.is_traceable_wrapper_subclass") or _is_wrapper
)

# --- the compiler --------------------------------------------------------------------------------


def _reads(file: str, name: str) -> bool:
    """Whether a file of torch mentions a name; one that is there without its source does not."""
    # a torch of compiled files alone has no source to look into
    path = Path(torch.__file__).parent / file
    return path.is_file() and name in path.read_text(encoding="utf-8")


def _marked(function: Any) -> Any:
    """What `torch.compiler.assume_constant_result` does, without its import of the compiler."""
    function._dynamo_marked_constant = True
    return function


# A decorator: compiled code holds what the function returned when it was compiled. Were it traced
# instead, a dictionary that it fills meanwhile would have everything compiled a second time.
constant_result: Callable[[Any], Any] = (
    _marked
    if _reads("_dynamo/decorators.py", "_dynamo_marked_constant")
    else torch.compiler.assume_constant_result
)

# --- a backward that computes a checkpointed forward again ---------------------------------------


_TOLD = "_C._current_autograd_node", "autograd.graph.Node._sequence_nr"
_tells = all(_private(name) is not None for name in _TOLD)


def _nothing_runs() -> None:
    """No node: torch has no public way to ask for the one whose backward runs."""
    return None


# the node of autograd whose backward runs in this thread, None outside
current_node: Callable[[], Any] = _private(_TOLD[0]) if _tells else _nothing_runs


def _task_of_node() -> int:
    """-1 where no node's backward runs, which is all that is asked of the number."""
    return -1 if current_node() is None else 0


# the number of the backward that runs in this thread, -1 outside; quicker than `current_node`
current_backward: Callable[[], int] = _private("_C._current_graph_task_id") or _task_of_node


def _number_of_next_node() -> int:
    """The number after that of a node which is made for it."""
    # a node needs gradients to be on, and no inference mode, whatever the caller's
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return number_of(node) + 1 if _tells else 0


# the number that autograd will give the next operation of this thread
next_number: Callable[[], int] = _private("_C._autograd._get_sequence_nr") or _number_of_next_node


def number_of(node: Any) -> int:
    """The number that autograd gave the operation whose backward a node is."""
    number: int = node._sequence_nr()
    return number


# the code that every backward of a Python function is run by
_RUNS_ONE = torch.autograd.function.BackwardCFunction.apply.__code__
_enclosing = threading.local()  # its `told`: (the backward last asked for, the number found)


def number_of_forward(task: int) -> int:
    """The number that autograd gave the operation of a forward which is computed again.

    That of the node whose backward runs. But a reentrant checkpoint computes its segment again as a
    graph of its own, of later numbers, and runs a backward of that inside of its own: there it is
    the outermost node, which the model's forward made.

    Args:
        task: the number of the backward that runs, of `current_backward`.
    """
    node = current_node()
    if node is None:
        return next_number()
    told: tuple[int, Optional[int]] = getattr(_enclosing, "told", (0, None))
    if told[0] != task or task == 0:  # which may be several, where torch does not number them
        outer = _outermost()
        # the same node: no reentrant one is around it
        inside = outer is not None and number_of(outer) != number_of(node)
        told = _enclosing.told = task, number_of(outer) if inside else None
    return number_of(node) if told[1] is None else told[1]


def _outermost() -> Any:
    """The first node written in Python whose backward runs in this thread, None outside of any."""
    # frames from here out: the last one found is the outermost
    frame, found = sys._getframe(), None
    while frame is not None:
        if frame.f_code is _RUNS_ONE:
            found = frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _silent() -> None:
    """Nothing to say: a forward that is computed again finds the strengths that it had."""


def _warn_of_strengths() -> None:
    """Say that a forward that is computed again cannot find the strengths that it had."""
    warn(
        f"torch {torch.__version__} does not tell which forward a backward computes again: with "
        "activation checkpointing, call backward before the strengths of adapters change, or its "
        "gradients are those of the new strengths."
    )


# called where a strength changes
strength_changes: Callable[[], None] = _silent if _tells else _warn_of_strengths

# --- who keeps what autograd saves ---------------------------------------------------------------

_top_hooks: Any = _private("_C._autograd._top_saved_tensors_default_hooks")


def _keeps_saved() -> bool:
    """Whether something takes the tensors that autograd saves here, as checkpointing does."""
    return _top_hooks(True) is not None


def _perhaps_kept() -> bool:
    """True: torch has no public way to ask."""
    return True


keeps_saved: Callable[[], bool] = _keeps_saved if _top_hooks else _perhaps_kept

# --- torch's own block that computes parametrizations once ---------------------------------------


def _cached_by_torch() -> Optional[dict[Any, Any]]:
    """What ``parametrize.cached()`` holds, None outside of such a block."""
    # a module's variable that torch replaces: read anew each time
    return parametrize._cache if parametrize._cache_enabled else None


def _nothing_cached() -> Optional[dict[Any, Any]]:
    """None: torch has no public way to ask whether such a block is open."""
    return None


cached_by_torch: Callable[[], Optional[dict[Any, Any]]] = (
    _cached_by_torch
    if _private("nn.utils.parametrize._cache_enabled") is not None
    and _private("nn.utils.parametrize._cache") is not None
    else _nothing_cached
)

# --- what a device finds wrong ------------------------------------------------------------------


def _asserted(sound: Tensor, message: str) -> None:
    """Raise what torch raises where a tensor of one truth is false; waits for its device."""
    if not sound:
        raise RuntimeError(message)


# ``asserted(sound, message)``: on a device nobody waits for it, and a later call there fails
asserted: Callable[[Tensor, str], None] = _private("_assert_async") or _asserted

# --- products ------------------------------------------------------------------------------------

# of each group's rows with its own matrix; None where this torch has none, which costs a loop
grouped_product: Any = getattr(torch.nn.functional, "grouped_mm", None) or _private("_grouped_mm")

# --- an output that may be changed in place ------------------------------------------------------


def _reshaped_copy(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy in other dimensions, which is no view of what an autograd function gives."""
    return y.reshape(shape).clone()


# in other dimensions, and for autograd no view, which it refuses to write into where an autograd
# function gave it
reshaped: Callable[[Tensor, Sequence[int]], Tensor] = (
    _private("ops.aten._unsafe_view.default") or _reshaped_copy
)

# --- what torch's layers of a kind have in common ------------------------------------------------


_Layer = TypeVar("_Layer", bound=nn.Module)


def _family(path: str, *public: type[_Layer]) -> tuple[type[_Layer], ...]:
    """The private class that layers derive from, which other libraries' layers may do too, or all
    public ones."""
    found = _private(path)
    return public if found is None else (found,)


ANY_TRANSPOSED = _family(
    "nn.modules.conv._ConvTransposeNd",
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
ANY_CONVOLUTION = _family(  # those too
    "nn.modules.conv._ConvNd",
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
ANY_INSTANCE_NORM = _family(
    "nn.modules.instancenorm._InstanceNorm",
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d,
)
ANY_DROPOUT = _family(
    "nn.modules.dropout._DropoutNd",
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# --- hooks ---------------------------------------------------------------------------------------


def every_module_hooks() -> Any:
    """The forward hooks that all modules have, by ``register_module_forward_hook``."""
    return _private("nn.modules.module._global_forward_hooks")


# --- the device ----------------------------------------------------------------------------------

# asked at every launch, where Python takes longer than the device
cuda_device: Callable[[], int] = _private("_C._cuda_getDevice") or torch.cuda.current_device


def _stream_of(device: int) -> int:
    """The address of the stream that work is put on."""
    return torch.cuda.current_stream(device).cuda_stream


cuda_stream: Callable[[int], int] = _private("_C._cuda_getCurrentRawStream") or _stream_of


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any content on the current device."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


# the same past the dispatcher, which takes longer than the allocation; compiled code does so too
cuda_empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = (
    _private("_C._dynamo.guards._empty_strided_cuda") or _empty
)


# --- many tensors at once ------------------------------------------------------------------------


def _copied_each(owns: list[Tensor], values: list[Tensor]) -> None:
    for own, value in zip(owns, values):
        own.copy_(value)


# values into tensors of their shapes: on a device a few kernels for thousands of them
copied: Callable[[list[Tensor], list[Tensor]], Any] = _private("_foreach_copy_") or _copied_each
