"""A model's own dense reference: the plain model, each adapted tensor overwritten by the sum.

Written from equation 3 of Hu et al. 2021 (arXiv:2106.09685) and torch's shapes alone: nothing of
the package is called. The gradients of ``A`` and ``B`` follow from that of the whole tensor.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SCALE = 1.5
TRANSPOSED = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)
PLAIN = (nn.Linear, nn.modules.conv._ConvNd)
RANK = 2


@dataclass(frozen=True)
class Place:
    """A tensor to adapt: all of its holders' paths, and how its matrices lie."""

    paths: tuple[str, ...]
    tensor: str
    layer: str  # the class of the first holder
    lies: str  # "matrix", "transposed" or "stack"
    shape: tuple[int, ...]

    @property
    def stem(self) -> str:
        """How adapters' files spell it."""
        parts = [self.paths[0]] + ([] if self.tensor == "weight" else [self.tensor])
        return ".".join(p for p in parts if p)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        first, rest = self.shape[0], self.shape[1:].numel()  # type: ignore[attr-defined]
        if self.lies == "stack":
            return self.shape[-2], self.shape[-1]
        return (rest, first) if self.lies == "transposed" else (first, rest)

    @property
    def rank(self) -> int:
        return min(RANK, *self.sides)

    def shaped(self, product: Tensor) -> Tensor:
        """``B·A`` in the tensor's own shape."""
        product = product.mT if self.lies == "transposed" else product
        return product.reshape(self.shape)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The other way: a tensor of the weight's shape as ``[.., out, in]``."""
        if self.lies == "stack":
            return tensor
        flat = tensor.reshape(self.shape[0], -1)
        return flat.mT if self.lies == "transposed" else flat


def places(model: nn.Module) -> list[Place]:
    """Every Linear, convolution, embedding, ``Conv1D`` and stack of experts, ties as one."""
    found: dict[int, Place] = {}
    alive = []  # what weight norm computes is nobody's, and its number would be another's next
    for path, module in model.named_modules():
        for name, lies in _tensors(module):
            tensor = getattr(module, name)
            alive.append(tensor)
            if id(tensor) in found:
                old = found[id(tensor)]
                found[id(tensor)] = Place((*old.paths, path), name, old.layer, old.lies, old.shape)
            else:
                kind = type(module).__name__
                found[id(tensor)] = Place((path,), name, kind, lies, tensor.shape)
    return list(found.values())


def described(model: nn.Module, place: Place) -> str:
    """What kind of layer holds a tensor, whatever its class is called."""
    layer, *others = (model.get_submodule(path) for path in place.paths)
    told = [_family(layer)] if place.lies != "stack" else ["stack"]
    if isinstance(layer, nn.modules.conv._ConvNd):
        single = layer.groups in (layer.in_channels, layer.out_channels)
        told += ["single channels" if single else "groups"] if layer.groups > 1 else []
        told += ["a kernel of 1"] if set(layer.kernel_size) == {1} else []
        told += ["padded"] if layer.padding_mode != "zeros" or layer.padding == "same" else []
    if parametrize.is_parametrized(layer, place.tensor):
        told.append("parametrized")
    return ", ".join([*told, *sorted({f"tied to {_family(one)}" for one in others})])


def _family(layer: nn.Module) -> str:
    """The class of torch's that a layer is, and whether it is called another way."""
    kinds = (c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    known: Any = next(c for c in kinds if not c.__name__.startswith("Parametrized"))
    name = type(layer).__name__ if known is nn.Module else known.__name__
    same = known is nn.Module or type(layer).forward is known.forward
    return name if same else f"{name} called another way"


def _tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, TRANSPOSED) or type(module).__name__ == "Conv1D":
        yield "weight", "transposed"
    elif isinstance(module, PLAIN):
        yield "weight", "matrix"
    elif "Expert" in type(module).__name__:
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() == 3:
                yield name, "stack"


Factors = dict[str, tuple[Tensor, Tensor]]  # (A, B) by stem


def drawn(model: nn.Module, found: list[Place]) -> Factors:
    """Random factors whose product is about a third of the weight, so that none can be missed."""
    made = {}
    generator = torch.Generator().manual_seed(7)
    for place in found:
        weight = getattr(model.get_submodule(place.paths[0]), place.tensor)
        out, fan_in = place.sides
        lead = weight.shape[:-2] if place.lies == "stack" else ()
        size = weight.detach().float().std().item() if weight.numel() > 1 else 0.0
        size = size if 1e-4 < size < 10 else 0.02
        A = torch.randn(*lead, place.rank, fan_in, generator=generator, dtype=torch.float64)
        B = torch.randn(*lead, out, place.rank, generator=generator, dtype=torch.float64)
        kept = (A, B * (0.3 * size / place.rank**0.5))
        made[place.stem] = tuple(t.to(weight.dtype) for t in kept)
    return made  # type: ignore[return-value]


def summed(model: nn.Module, found: list[Place], factors: Factors) -> nn.Module:
    """A copy of the plain model that holds ``W + scale·B·A``; only those tensors train."""
    dense = copy.deepcopy(model).requires_grad_(False)
    for place in found:
        A, B = factors[place.stem]
        holders = [dense.get_submodule(path) for path in place.paths]
        weight = getattr(holders[0], place.tensor).detach()
        total = weight + place.shaped(SCALE * (B.double() @ A.double())).to(weight.dtype)
        trained = nn.Parameter(total)
        for module in holders:
            _put(module, place.tensor, trained)
    return dense


def _put(module: nn.Module, name: str, trained: nn.Parameter) -> None:
    """Hold it instead, also where weight norm computed the tensor; who else held it keeps that."""
    if parametrize.is_parametrized(module, name):
        # not by torch's removal, which takes the property from the class, that copies share
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
    vars(module).pop(name, None)
    module._buffers.pop(name, None)
    module._parameters[name] = trained


def gradients(dense: nn.Module, found: list[Place], factors: Factors) -> dict[str, Tensor]:
    """``∂/∂A = scale·Bᵀ·G`` and ``∂/∂B = scale·G·Aᵀ`` where ``G`` is the whole tensor's."""
    wanted = {}
    for place in found:
        whole = getattr(dense.get_submodule(place.paths[0]), place.tensor).grad
        if whole is not None:
            A, B = factors[place.stem]
            G = place.matrix(whole)
            wanted[f"{place.stem}.lora_A"] = SCALE * B.mT @ G
            wanted[f"{place.stem}.lora_B"] = SCALE * G @ A.mT
    return wanted


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating tensor in what a model gives, caches left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [t for v in output.values() for t in tensors_of(v)]
    if isinstance(output, (list, tuple)):
        return [t for v in output for t in tensors_of(v)]
    if hasattr(output, "__dataclass_fields__"):
        return [t for v in vars(output).values() for t in tensors_of(v)]
    return []
