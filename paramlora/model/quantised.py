"""Layers whose stored weight is quantised: how to tell, and the dense weight it stands for.

torchao's tensors (int8, int4, NF4) and the parameters of bitsandbytes (NF4, FP4, int8) are known by
what they carry, so neither library is imported before one of its tensors is met.
"""

import copy
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramlora.update.compat import is_wrapper
from paramlora.update.sharded import is_sharded


def is_quantised(tensor: Tensor) -> bool:
    """Whether the tensor only stands for a weight."""
    if is_wrapper(tensor):
        # a DTensor is such a subclass too
        packed = _dequantises(tensor) or hasattr(tensor, "qdata")  # as torchao names what it holds
        return packed and not is_sharded(tensor)
    # bitsandbytes: 4 bits have a state, 8 bits the scales of their rows
    return hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")


def _dequantises(tensor: Tensor) -> bool:
    return getattr(type(tensor), "dequantize", Tensor.dequantize) is not Tensor.dequantize


def shape_of(module: nn.Module, tensor: Tensor) -> tuple[int, ...]:
    """The weight's shape, also where four bits are packed in another."""
    if hasattr(tensor, "quant_state"):  # bytes, two numbers in each, in a flat tensor
        return module.out_features, module.in_features  # type: ignore[return-value]
    return tuple(tensor.shape)


@torch.no_grad()
def dense(module: nn.Module, tensor: Any) -> Tensor:
    """The weight that a quantised tensor stands for; any other tensor itself."""
    if not is_quantised(tensor):
        return tensor  # type: ignore[no-any-return]
    if hasattr(tensor, "get_original_weight"):  # torchao's NF4
        return tensor.get_original_weight()  # type: ignore[no-any-return]
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(*_in_order(tensor))
        return values.reshape(shape_of(module, tensor))
    if hasattr(tensor, "SCB"):
        state: Any = module.state  # which takes the scales at the first call
        rows = tensor.SCB if tensor.SCB is not None else state.SCB
        # CUDA layouts keep the numbers there instead
        values = tensor.data if tensor.data.dtype == torch.int8 else state.CB
        bias: Any = module.bias
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        # int8 is ±127 by rows, with one scale each
        wide: Tensor = values.float() * rows.float()[:, None] / 127
        return wide.to(dtype)
    if not _dequantises(tensor):  # laid out for torch's int4 product, which is all it can do
        one = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return F.linear(one, tensor).t().contiguous()  # [out, in]
    return tensor.dequantize()  # type: ignore[no-any-return]


def _in_order(tensor: Any) -> tuple[Tensor, Any]:
    """Four-bit data and scales as they were quantised: a layer that was evaluated on a CPU with
    16-bit instructions holds them in that CPU's order, its scales no longer quantised."""
    state = tensor.quant_state
    # the first evaluation repacked it in place
    if not getattr(state, "packing_format_for_cpu", False):
        return tensor.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # the state's own flags are read by the inverse; the layer's state must stay
    own = copy.copy(state)
    own.original_nested = False  # else the scales would be quantised once more
    data, own = _convert_weight_packed_for_cpu_inverse(tensor.data, own)
    own.absmax = state.absmax.T.reshape(-1).float()  # [out · in / block]
    return data, own


def make_dense(module: nn.Module, name: str, usual: Optional[torch.dtype]) -> None:
    """Store the dense weight instead; a layer of bitsandbytes becomes the Linear that it is.

    Its type is the bias's or the one that the layer computes in, else `usual`: bitsandbytes' int8
    weights do not tell what they were.
    """
    stored, bias = module._parameters[name], module._parameters.get("bias")
    weight, dtype = dense(module, stored), getattr(module, "compute_dtype", None)
    if bias is not None:
        dtype = bias.dtype
    elif hasattr(stored, "SCB"):
        dtype = usual
    module._parameters[name] = nn.Parameter(weight.detach().to(dtype, copy=True), False)
    vars(module).pop("extra_repr", None)  # torchao's, which cannot be pickled
    if type(module).__module__.startswith("bitsandbytes."):
        module.__class__ = nn.Linear
        for attribute in set(vars(module)) - set(vars(nn.Linear(1, 1))):
            delattr(module, attribute)


def tell_transformers(model: nn.Module, packed: list[nn.Module]) -> None:
    """Have a model of transformers remember which of its layers are dense now.

    Its configuration says that they are quantised, and it would be saved so and loaded as such.
    """
    for owner in model.modules():
        quantizer: Any = vars(owner).get("hf_quantizer")
        if quantizer is None:
            continue
        if not any(is_quantised(p) for p in owner.parameters()):
            quantizer.remove_quantization_config(owner)
            continue
        here = [path for path, module in owner.named_modules() if any(module is m for m in packed)]
        kept = [*(getattr(quantizer, "modules_to_not_convert", None) or ()), *here]
        config: Any = owner.config
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):  # of bitsandbytes, others
            if hasattr(config.quantization_config, name):
                setattr(config.quantization_config, name, kept)
