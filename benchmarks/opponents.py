"""The ways to compute an adapted layer, each written from its mathematics or its library.

Every way gets the same frozen layer's tensors and the same factors. The formulas of loralib,
minLoRA, RunLoRA and of the original wrapper hold their factors in the weight's type: with float32
factors on a bfloat16 weight they raise. The dense way holds float32 masters.
"""

import copy
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import paramlora
from benchmarks.machine import device, version
from benchmarks.reference import SCALE
from benchmarks.runlora import BestOrder
from benchmarks.zoo import Block
from paramlora.evaluate import functional

Formula = Callable[["Adapted", Tensor], Tensor]


class Way(NamedTuple):
    """A layer under test: what to call, the factors whose gradients are wanted, and whether C++
    takes its steps."""

    call: nn.Module
    A: Optional[nn.Parameter] = None
    B: Optional[nn.Parameter] = None
    native: bool = False


NATIVE = "paramlora native"  # where `paramlora build` was run


@cache
def _library() -> Any:
    functional._started = False
    functional.start_cpp()
    if functional._native is None:
        raise RuntimeError("no library in C++ here: run `paramlora build`")
    return functional._native


def take_steps(native: bool) -> None:
    """From now on have C++ take the steps of paramlora's layers and launch its kernels, or
    Python alone."""
    found = _library() if native else None
    functional._started, functional._native = True, found
    launch = _launch()
    if launch is not None:
        launch.of.__call__ = launch.by_cpp if native else launch.by_python


class _Launch(NamedTuple):
    of: Any
    by_cpp: Any
    by_python: Any


@cache
def _launch() -> Optional[_Launch]:
    """The launch of kernels, as it is and as where no library was built; None without a card."""
    if not torch.cuda.is_available():
        return None
    from paramlora.cuda.launch import Launch

    by_cpp = Launch.__call__

    def by_python(self: Any, *given: Any) -> None:
        self.by_driver, held = None, self.by_driver
        by_cpp(self, *given)
        self.by_driver = self.by_driver or held

    return _Launch(Launch, by_cpp, by_python)


class Bound(torch.autograd.Function):
    """The least that training an update in Python takes: an autograd function for each layer that
    keeps its input and reserves the factors' gradients. It computes no update at all."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        ctx.save_for_backward(x, weight, A, B)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        _, weight, A, B = ctx.saved_tensors
        return dy @ weight, None, None, torch.empty_like(A), torch.empty_like(B)


def bound(m: "Adapted", x: Tensor) -> Tensor:
    return Bound.apply(x, m.layer.weight, m.layer.bias, m.A, m.B)


def twin(layer: nn.Module) -> nn.Module:
    """A second layer on the same tensors."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})


class Adapted(nn.Module):
    """A frozen layer beside its factors, evaluated by a formula."""

    def __init__(
        self, layer: nn.Module, A: Tensor, B: Tensor, formula: Formula, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer, self.formula = layer, formula
        self.A, self.B = nn.Parameter(A.to(dtype, copy=True)), nn.Parameter(B.to(dtype, copy=True))
        scale = torch.tensor(SCALE, device=A.device)  # a parameter in the original
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)

    def with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """The layer's own forward with another weight."""
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return functional_call(self.layer, {"weight": weight}, (x,))

    def shaped(self, product: Tensor) -> Tensor:
        """``B·A`` in the shape of the weight; an embedding stores ``[in, out]``."""
        product = product.T if isinstance(self.layer, nn.Embedding) else product
        return product.reshape(self.layer.weight.shape)


def dense(m: Adapted, x: Tensor) -> Tensor:
    """The definition through autograd, in the fewest launches: ``W + scale·B·A`` in one."""
    weight = m.layer.weight
    A, B = m.A.to(weight.dtype), m.B.to(weight.dtype)
    if isinstance(m.layer, nn.Linear):
        return m.with_weight(torch.addmm(weight, B, A, alpha=SCALE), x)
    return m.with_weight(weight + SCALE * m.shaped(B @ A), x)


def original(m: Adapted, x: Tensor) -> Tensor:
    """The wrapper that this project descends from: ``(scale·B)·A`` added to the weight."""
    return m.with_weight(m.layer.weight + m.shaped(m.scale * m.B @ m.A), x)


def loralib(m: Adapted, x: Tensor) -> Tensor:
    """Hu et al. 2021 (arXiv:2106.09685): a parallel branch, but a dense sum for convolutions."""
    if isinstance(m.layer, nn.Linear):
        return m.layer(x) + (x @ m.A.T @ m.B.T) * SCALE
    if isinstance(m.layer, nn.Embedding):
        if type(m.layer) is not nn.Embedding:  # a forward of its own, which its layer has not
            raise TypeError(f"loralib has no {type(m.layer).__name__}")
        return m.layer(x) + (F.embedding(x, m.A.T) @ m.B.T) * SCALE
    return m.with_weight(m.layer.weight + m.shaped(m.B @ m.A) * SCALE, x)


class MinLoRA(nn.Module):
    """minLoRA: a plain torch parametrization, the scale applied to the dense product."""

    def __init__(self, A: Tensor, B: Tensor, transposed: bool) -> None:
        super().__init__()
        self.A, self.B, self.transposed = (
            nn.Parameter(A.clone()),
            nn.Parameter(B.clone()),
            transposed,
        )

    def forward(self, weight: Tensor) -> Tensor:
        product = torch.mm(self.B, self.A)
        product = product.T if self.transposed else product
        return weight + product.reshape(weight.shape) * SCALE


def frozen_way(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
    return Way(twin(layer))


def formula_way(formula: Formula, masters: bool = False) -> Callable[..., Way]:
    def build(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
        dtype = torch.float32 if masters else layer.weight.dtype
        module = Adapted(twin(layer), A, B, formula, dtype)
        return Way(module, module.A, module.B)

    return build


def minlora_way(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
    module, dtype = twin(layer), layer.weight.dtype
    low = MinLoRA(A.to(dtype), B.to(dtype), isinstance(layer, nn.Embedding))
    parametrize.register_parametrization(module, "weight", low)
    return Way(module, low.A, low.B)


def runlora_way(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
    if not isinstance(layer, nn.Linear):
        raise NotImplementedError("RunLoRA has linear layers only")
    module = BestOrder(twin(layer), A, B)
    return Way(module, module.A, module.B)


def peft_way(masters: bool = True) -> Callable[..., Way]:
    def build(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
        model = adapt_peft(nn.Sequential(twin(layer)), ["0"], len(A), masters)
        params = dict(model.named_parameters())
        (a,) = (p for name, p in params.items() if "lora_A" in name or "embedding_A" in name)
        (b,) = (p for name, p in params.items() if "lora_B" in name or "embedding_B" in name)
        with torch.no_grad():
            a.copy_(A.reshape(a.shape)), b.copy_(B.reshape(b.shape))
        return Way(model.base_model.model[0], a, b)

    return build


def paramlora_way(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
    model = paramlora.attach(nn.Sequential(twin(layer)), {"0": {"r": len(A), "scale": SCALE}})
    scale = torch.tensor(SCALE)
    state = {"0.lora_A": A, "0.lora_B": B, "0.lora_scale": scale}
    paramlora.load_adapter_state_dict(model, state)
    params = dict(model.named_parameters())
    (a,) = (p for name, p in params.items() if name.endswith("lora_A"))
    (b,) = (p for name, p in params.items() if name.endswith("lora_B"))
    return Way(model[0], a, b)


def native_way(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
    take_steps(True)  # refused here where it cannot be
    return paramlora_way(layer, A, B)._replace(native=True)


def lycoris_way(how: "Lycoris") -> Callable[..., Way]:
    """LyCORIS's own module on the layer: the weight rebuilt, or (bypass) a branch beside it."""

    def build(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
        module = lycoris_module(twin(layer), len(A), how)
        module.register_forward_pre_hook(how.choose)
        down, up = module.lora_down.weight, module.lora_up.weight
        with torch.no_grad():
            down.copy_(A.reshape(down.shape)), up.copy_(B.reshape(up.shape))
        return Way(module, down, up)

    return build


def lycoris_module(layer: nn.Module, r: int, how: "Lycoris") -> nn.Module:
    """A ``LoConModule`` of scale `SCALE`."""
    from lycoris import LoConModule

    weight = layer.weight
    module = LoConModule("layer", layer, 1.0, r, r * SCALE, bypass_mode=how.bypass)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return module.to(weight.device, wide if how.masters else weight.dtype)


class Lycoris(NamedTuple):
    """LyCORIS's own switches: a branch or the weight rebuilt, float32 factors or the weight's type,
    and ``LYCORIS_KERNEL_BACKEND``, which it reads at each call: its kernels, or torch's."""

    bypass: bool
    masters: bool
    kernels: str

    def choose(self, *_: object) -> None:
        """Before a forward of this way."""
        os.environ["LYCORIS_KERNEL_BACKEND"] = self.kernels

    def told(self) -> str:
        from lycoris.kernels.dispatch import resolve_backend

        on_card = device().type == "cuda"
        backend = resolve_backend(self.kernels, device()) if on_card else "torch"
        return (
            f"{version('lycoris-lora')}, LoConModule(bypass_mode={self.bypass}), factors "
            f"{'float32' if self.masters else 'of the weight'}, kernels {self.kernels} ({backend})"
        )


def switches(ways: Iterable[str]) -> dict[str, str]:
    """What chooses between an opponent's own ways to compute, for those of `ways` that have it."""
    chosen = {way: LYCORIS[way].told() for way in ways if way in LYCORIS}
    functions = f"{version('unsloth')}, LoRA_QKV, LoRA_W and LoRA_MLP, in place; peft's factors, "
    kinds = {"unsloth": "float32", "unsloth bf16": "of the weight's type"}
    return chosen | {way: functions + kinds[way] for way in ways if way in UNSLOTH}


def compiled(build: Callable[..., Way]) -> Callable[..., Way]:
    def build_compiled(layer: nn.Module, A: Tensor, B: Tensor) -> Way:
        way = build(layer, A, B)
        return way._replace(call=torch.compile(way.call, dynamic=False))

    return build_compiled


LYCORIS = {
    f"LyCORIS{' bypass' * bypass}{' unfused' * (kernels == 'torch')}{' bf16' * (not masters)}": (
        Lycoris(bypass, masters, kernels)
    )
    for bypass in (False, True)
    for kernels in ("auto", "torch")
    for masters in (True, False)
}
UNSLOTH = ("unsloth", "unsloth bf16")  # of the Llama blocks alone, where it is installed
WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], Way]] = {
    "frozen": frozen_way,
    "dense": formula_way(dense, masters=True),
    "peft": peft_way(),
    "peft bf16": peft_way(masters=False),
    "loralib": formula_way(loralib),
    "minLoRA": minlora_way,
    "original": formula_way(original),
    "RunLoRA": runlora_way,
    **{name: lycoris_way(how) for name, how in LYCORIS.items()},
    "paramlora": paramlora_way,
    "peft compiled": compiled(peft_way()),
    "paramlora compiled": compiled(paramlora_way),
}
ON_REQUEST = {NATIVE: native_way}


def adapt(way: str, model: nn.Module, entries: list[str], r: int) -> nn.Module:
    """A whole model adapted one way in place.

    Args:
        way: ``frozen``, ``dense``, ``original``, ``loralib``, ``peft``, ``peft bf16``,
            one of `LYCORIS` or `UNSLOTH`, ``paramlora``, `NATIVE`, or ``bound``, which none can
            be below.
        entries: paths of the layers to adapt, or their last components.
        r: rank.
    """
    if way in ("paramlora", NATIVE):
        return paramlora.attach(model, {entry: {"r": r, "scale": SCALE} for entry in entries})
    if way.startswith("peft"):
        return adapt_peft(model, entries, r, masters=way == "peft")
    if way in UNSLOTH:
        return adapt_unsloth(model, entries, r, masters=way == "unsloth")
    model.requires_grad_(False)
    if way in LYCORIS:
        _apply_lycoris(model, entries, r, LYCORIS[way])
    formulas = {"dense": dense, "original": original, "loralib": loralib, "bound": bound}
    if way in formulas:
        _wrap(model, entries, r, formulas[way])
    return model


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) by the path that the layer had before it was adapted, whatever the way."""
    sides: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
    for name, parameter in model.named_parameters():
        found = re.fullmatch(
            r"(?:base_model\.model\.)?(.*?)(?:\.parametrizations\.weight\.0|\.lora_branches\.0)?"
            r"(?:\.(?:lora_)?([AB])(?:\.default\.weight)?|\.lycoris\.lora_(down|up)\.weight)",
            name,
        )
        if found:
            sides[(found[2] or found[3]) in ("B", "up")][found[1]] = parameter
    return {path: (A, sides[1][path]) for path, A in sides[0].items()}


def adapt_peft(model: nn.Module, entries: list[str], r: int, masters: bool) -> nn.Module:
    """peft's model; `masters` is its default, float32 factors on a 16-bit weight."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r * SCALE, target_modules=entries)
    return get_peft_model(model, config, autocast_adapter_dtype=masters)


def adapt_unsloth(model: nn.Module, entries: list[str], r: int, masters: bool) -> nn.Module:
    """peft's model, its Llama blocks by unsloth's own autograd functions, as unsloth patches them.

    `import unsloth` also patches peft, transformers and torch's settings for the whole process, and
    writes copies of modules into a folder.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
    import unsloth  # noqa: F401, isort: skip  (its kernels refuse to be imported before it)
    from unsloth.kernels import fast_lora

    adapted = adapt_peft(model, entries, r, masters)
    blocks = [block for block in adapted.modules() if isinstance(block, Block)]
    if not blocks:
        raise NotImplementedError("unsloth's functions are of blocks with q, k, v, gate and up")
    for block in blocks:
        block.qkv = partial(fast_lora.apply_lora_qkv, block)
        block.out = partial(fast_lora.apply_lora_o, block)
        block.mlp = partial(fast_lora.apply_lora_mlp_swiglu, block)
    return adapted


def _apply_lycoris(model: nn.Module, entries: list[str], r: int, how: Lycoris) -> None:
    model.register_forward_pre_hook(how.choose)
    for _, layer in _chosen(model, entries):
        module = lycoris_module(layer, r, how)
        module.apply_to()
        layer.lycoris = module  # beside the weights, so that the model holds the factors


def _chosen(model: nn.Module, entries: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in list(model.named_modules()):
        if any(path == e or path.endswith("." + e) for e in entries):
            yield path, layer


def _wrap(model: nn.Module, entries: list[str], r: int, formula: Formula) -> None:
    for path, layer in _chosen(model, entries):
        weight = layer.weight
        low = weight.dtype.itemsize <= 2
        A = torch.randn(r, weight[0].numel(), device=weight.device) / r
        dtype = torch.float32 if low and formula in (dense, bound) else weight.dtype
        wrapped = Adapted(layer, A, A.new_zeros(len(weight), r), formula, dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
