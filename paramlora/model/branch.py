"""The soft update: a parallel low-rank branch that a forward hook adds to a layer's output."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.evaluate.convolution import (
    CONVOLUTIONS,
    each_group,
    kernels_of,
    pointwise_of,
)
from paramlora.evaluate.dropout import dropped_branch
from paramlora.evaluate.functional import cast_for_autocast, thin_pair, untold
from paramlora.model.forwards import (
    beside_rows,
    convolved_rows,
    dropped_rows,
    in_one_sum,
    in_one_sum_of_rows,
    of_rows,
    padded_input,
    rows_first,
    scaling_of_rows,
    sums_beside,
)
from paramlora.model.layer_class import deep_copy, refuse_pickling
from paramlora.update.attached import Gains, Site
from paramlora.update.choice import Choice
from paramlora.update.compat import ANY_CONVOLUTION, every_module_hooks, recorded
from paramlora.update.contexts import autocast_of
from paramlora.update.geometry import Layout, in_format_of, matrix_shape
from paramlora.update.init import initialise
from paramlora.update.kinds import register
from paramlora.update.lowrank import LowRank
from paramlora.update.names import BRANCHES
from paramlora.update.narrow import LINEAR, Stage, of_factor, wide
from paramlora.update.value import Value, refuse_two_kernels


@register
class Branch(LowRank):
    r"""``up(down(x))`` beside a linear layer or a convolution, Hu et al. 2021, equation 3.

    With a 1×1 ``up`` this equals the hard update on the same ``lora_A`` and ``lora_B``, groups
    included: ``down`` repeats ``lora_A`` for each group.

    Args:
        weight, r, scale, layout, trainable_scale, adapter, gains: as for `LowRank`.
        kernel: the kernel of ``up`` where it is the layer's own (``up_kernel: "same"``), else
            empty. Then ``lora_B`` is ``[out, r, *kernel]``, and for a transposed convolution
            ``lora_A`` is ``[r·prod(kernel), in]``.
    """

    def __init__(
        self,
        weight: Tensor,
        r: int,
        scale: float = 1.0,
        layout: Layout = "matrix",
        trainable_scale: bool = False,
        adapter: str = "default",
        gains: Optional[Gains] = None,
        kernel: tuple[int, ...] = (),
    ) -> None:
        super().__init__(weight, r, scale, layout, trainable_scale, adapter, gains)
        self.kernel = kernel
        if kernel:
            size = torch.Size(kernel).numel()
            out, fan_in = self.lora_B.shape[0], self.lora_A.shape[1]
            # a transposed layer's second kernel lies on A's side: its inputs come first
            if layout == "transposed":
                self.lora_A = nn.Parameter(self.lora_A.new_empty(r * size, fan_in).normal_() / r)
                # `lora_B` was made for all of a kernel's outputs
                out //= size
            self.lora_B = nn.Parameter(self.lora_B.new_zeros(out, r, *kernel))

    beside = True
    internal = True
    method = "soft"

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Branch":
        """A new branch of the entry's rank, with the kernel that it asks for."""
        options = (entry.r, entry.scale, site.layout, entry.trainable_scale, adapter, gains)
        kernel = kernel_of(site.layer, entry.up_kernel)
        update = cls(site.weight.detach(), *options, kernel=kernel)
        if entry.init != "default":
            initialise(update, site.dense(), entry.init)
        return update

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many both factors have; of two kernels the second lies on ``B``'s side, of a
        transposed layer on ``A``'s."""
        _, out, fan_in = matrix_shape(shape, layout)
        size = torch.Size(shape[2:]).numel() if entry.up_kernel == "same" else 1
        transposed = layout == "transposed"
        return entry.r * (out + fan_in * size if transposed else out * size + fan_in)

    def value(self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int) -> Value:
        """The value of a low-rank update, which also tells the kernel of ``up``."""
        update: Any = super().value(shape, kind, groups)
        return replace(update, up_kernel="same" if self.kernel else 1)  # type: ignore[no-any-return]

    __deepcopy__ = deep_copy
    __getstate__ = refuse_pickling

    def check_mergeable(self, path: str) -> None:
        if self.kernel:
            refuse_two_kernels(path, self.kernel)

    def rank_dim(self, name: str) -> Optional[int]:
        """Before the second kernel, where there is one."""
        return 1 if self.kernel and name.endswith("B") else super().rank_dim(name)

    def branch(self, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """The term to add to `output`, the layer's own answer to `x`."""
        a, b = self.factors()
        up = of_factor(b) * self.scaling
        if self.dropout and layer.training:
            how = partial(self.computed, layer, output)
            return dropped_branch(x, a, up, self.dropout, how)
        return self.computed(layer, output, x, a, up)

    def computed(self, layer: Any, output: Tensor, x: Tensor, a: Tensor, up: Tensor) -> Tensor:
        """The term of such factors, of any rank."""
        if not isinstance(layer, ANY_CONVOLUTION):  # transformers' Conv1D is none
            return thin_pair(x, a, up, LINEAR, LINEAR)
        x = in_format_of(x, output)
        if self.kernel:
            return self._two_kernels(layer, x, output, a, up)
        if self.layout == "transposed":
            return self._transposed(layer, x, output, a, up)
        first, second = kernels_of(a, up, layer.kernel_size, layer.groups)
        x, padding = padded_input(layer, x)
        one = Stage(layer.stride, padding, layer.dilation, layer.groups)
        return thin_pair(x, first, second, one, pointwise_of(len(padding), layer.groups))

    def _transposed(self, layer: Any, x: Tensor, output: Tensor, a: Tensor, up: Tensor) -> Tensor:
        groups, n = layer.groups, len(layer.kernel_size)
        # a transposed convolution's groups divide its inputs, which A runs along
        first = rearrange(a, "r (g i) -> (g r) i", g=groups)
        first = first.reshape(*first.shape, *[1] * n)
        # [r, out/groups, *kernel], repeated: each group has the same B
        second = rearrange(up, "(o k) r -> r o k", o=layer.out_channels // groups)
        second = each_group(second.reshape(*second.shape[:2], *layer.kernel_size), groups)
        # the output size may be the caller's choice, so the output is asked
        two = _stage_of(layer, x, output)
        return thin_pair(x, first, second, pointwise_of(n, groups), two)

    def _two_kernels(self, layer: Any, x: Tensor, output: Tensor, a: Tensor, up: Tensor) -> Tensor:
        """The layer's convolution to `r` channels, then one of its kernel; float16 in float32."""
        device = autocast_of(x)
        if device is not None:
            # autocast would round between both kernels
            (x,) = cast_for_autocast(device, x)
            with torch.autocast(device, enabled=False):
                return self._two_kernels(layer, x, output, a, up)
        x, dtype, n = wide(x), x.dtype, len(self.kernel)
        a, up = a.to(x.dtype), up.to(x.dtype)
        # the kernel lies on A's side: up-sample with it, then a plain convolution of B
        if self.layout == "transposed":
            first = rearrange(a, "(r k) i -> i r k", k=torch.Size(self.kernel).numel())
            first = first.reshape(*first.shape[:2], *self.kernel)
            hidden = _stage_of(layer, x, output)(x, first)
            y = _same_size(layer, hidden, each_group(up, layer.groups), n)
        else:
            first, _ = kernels_of(a, up, self.kernel, layer.groups)
            y = _same_size(layer, layer._conv_forward(x, first, None), up, n)
        return y.to(dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # a base checkpoint knows no branch: it then keeps its values
        if not any(key.startswith(prefix) for key in state):
            state.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state, prefix, *args)


def kernel_of(layer: nn.Module, up_kernel: Union[int, str]) -> tuple[int, ...]:
    """The kernel that ``up`` repeats, empty for a 1×1 one."""
    return tuple(layer.kernel_size) if up_kernel == "same" else ()  # type: ignore[arg-type]


def add_branch(layer: nn.Module, branch: nn.Module) -> None:
    """Put `branch` on the layer; the first one also registers the hook."""
    if BRANCHES not in layer._modules:
        layer.add_module(BRANCHES, nn.ModuleList())
        # `with_kwargs`: a layer may be called by keyword
        layer.register_forward_hook(_add_branches, with_kwargs=True)
    layer._modules[BRANCHES].append(branch)  # type: ignore[union-attr, operator]


def remove_branches(layer: nn.Module) -> None:
    """Take all branches and the hook off a layer."""
    del layer._modules[BRANCHES]
    # found by the function, because a deep copy shares no handle with its original
    for key in [k for k, hook in layer._forward_hooks.items() if hook is _add_branches]:
        del layer._forward_hooks[key]
        # torch keeps a second table for hooks that take keywords
        layer._forward_hooks_with_kwargs.pop(key, None)


def _add_branches(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    x = args[0] if args else _named_input(layer, kwargs)
    rows, updates = _rows_of(layer)
    if rows is not None:
        if updates and _rounds_first(layer, x, output, updates):
            return in_one_sum_of_rows(layer, x, layer.weight, updates, rows)
        return output + _of_rows(layer, x, output, updates, rows) if updates else output
    if updates and _rounds_first(layer, x, output, updates):
        dropping = layer.training and any(update.dropout for update in updates)
        # the output is thrown away: it is rounded already, see `_rounds_first`
        return in_one_sum(layer, x, (layer.weight, updates, dropping))
    for branch in layer._modules[BRANCHES]:
        if branch.acts:
            there = branch.factors()[0].device
            if x.device == there:
                output = output + branch.branch(layer, x, output)
            else:  # a device map moves the layer's input after this hook was given it
                output = output + branch.branch(layer, x.to(there), output).to(output.device)
    return output


def _rounds_first(layer: Any, x: Tensor, output: Tensor, updates: list[Any]) -> bool:
    """Whether `output` is a plain layer's on a CPU, rounded to 16 bits: a small update added to it
    would be lost, so that it is computed again, in the accumulator that the update shares."""
    weight, hooks = layer._parameters.get("weight"), layer._forward_hooks
    if not (output.is_cpu and output.dtype.itemsize == 2) or not sums_beside(layer):
        return False
    alike = {x.dtype, getattr(weight, "dtype", None)} == {output.dtype}
    kinds = {type(x), type(output)} <= {Tensor, nn.Parameter} and type(weight) is nn.Parameter
    # an instance's own forward may compute anything
    if not (alike and kinds) or untold() or recorded() or "forward" in layer.__dict__:
        return False
    # what a hook before ours made of the output would be lost
    first = next(iter(hooks.values())) is _add_branches and not every_module_hooks()
    of_images = isinstance(layer, ANY_CONVOLUTION)
    dims = not of_images or x.dim() == output.dim() == len(layer.kernel_size) + 2
    # two kernels are no sum of one, and as served the base is rounded on purpose
    if not (first and dims) or any(update.kernel or update.rounds_twice for update in updates):
        return False
    return all(update.factors()[0].is_cpu for update in updates)


def _rows_of(layer: Any) -> tuple[Optional[Choice], list[Any]]:
    """On which rows of the batch the branches act, and those that do."""
    now = [(branch, branch.current()) for branch in layer._modules[BRANCHES]]
    return now[0][1].rows, [branch for branch, switch in now if switch.acts]


def _of_rows(layer: Any, x: Tensor, output: Tensor, updates: list[Any], rows: Choice) -> Tensor:
    """What the branches add to a batch in which each row takes its own adapter's."""
    if not isinstance(layer, ANY_CONVOLUTION):
        return beside_rows(layer, x, updates, rows, updates[0].layout)
    x = rows_first(layer, x, 0, rows, len(layer.kernel_size) + 1)
    if not len(x):  # no convolution has no groups
        return torch.zeros_like(output)
    terms = []
    for kernel in dict.fromkeys(update.kernel for update in updates):
        alike = [update for update in updates if update.kernel == kernel]
        plain = not kernel and alike[0].layout == "matrix"
        if plain:
            terms.append(convolved_rows(layer, in_format_of(x, output), alike, rows))
        else:
            terms.append(_each_row(layer, x, output, alike, rows))
    return sum(terms[1:], terms[0])


def _each_row(layer: Any, x: Tensor, output: Tensor, updates: list[Any], rows: Choice) -> Tensor:
    """The term of branches that are no pair of a kernel and a 1×1 one, a row at a time to `vmap`,
    which makes one convolution of as many groups as there are rows."""
    x = dropped_rows(layer.training, x, updates, rows)
    there = of_rows(updates, rows)
    pairs = [(None, None) if one is None else one.factors() for one in there]
    down = _filled([a for a, _ in pairs])  # [adapters + 1, r, in]
    # ranks in front, so that `_filled` pads them in both factors
    up = of_factor(_filled([None if b is None else b.movedim(1, 0) for _, b in pairs]))
    scaling = scaling_of_rows(there, up)
    up = up * scaling.reshape(-1, *[1] * (up.dim() - 1))  # [adapters + 1, r, out, *kernel]

    def term(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # one row's output tells the size that the layer gave, for transposed ones
        alone: Tensor = updates[0].computed(layer, output[:1], x[None], a, b.movedim(0, 1))
        return alone[0]

    y: Tensor = torch.vmap(term, randomness="different")(x, down[rows.index], up[rows.index])
    return y


def _filled(factors: list[Optional[Tensor]]) -> Tensor:
    """All adapters' factors as one tensor, with zeros where there is less, and for the base."""
    held = [factor for factor in factors if factor is not None]
    zeros = held[0].new_zeros(max(len(one) for one in held), *held[0].shape[1:])
    full = [zeros if f is None else torch.cat([f, zeros[len(f) :]]) for f in (*factors, None)]
    return torch.stack(full)


def _named_input(layer: Any, named: dict[str, Any]) -> Any:
    """The layer's input where no argument has a place: its forward's first, by whatever name."""
    for name in inspect.signature(layer.forward).parameters:
        if name in named:
            return named[name]
    return next(value for value in named.values() if isinstance(value, Tensor))


def _stage_of(layer: Any, x: Tensor, output: Tensor) -> Stage:
    """The transposed convolution of a layer, with the output size that it had in this call."""
    extra = _output_padding(layer, x, output, len(layer.kernel_size))
    return Stage(layer.stride, layer.padding, layer.dilation, layer.groups, True, extra)


def _same_size(layer: Any, x: Tensor, up: Tensor, n: int) -> Tensor:
    """A convolution with the layer's kernel and dilation, stride 1, that keeps the size."""
    # what a kernel with its dilation takes off, put back on both sides
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
    pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return CONVOLUTIONS[n - 1](
        F.pad(x, pads, mode=mode), up, dilation=layer.dilation, groups=layer.groups
    )


def _output_padding(layer: Any, x: Tensor, output: Tensor, n: int) -> list[int]:
    """What the layer added at the far end, which a caller's ``output_size`` may decide."""
    return [
        output.shape[i - n]
        - (x.shape[i - n] - 1) * layer.stride[i]
        + 2 * layer.padding[i]
        - layer.dilation[i] * (layer.kernel_size[i] - 1)
        - 1
        for i in range(n)
    ]
