"""What one model class must do once everything in it is adapted, against the dense reference."""

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import paramlora
from benchmarks import dense, tiny, tiny_inputs
from benchmarks.dense import SCALE, Factors, Place

# relative errors; an update left out gives 0.01 to 1. Models compute parts of themselves in
# float32 even where all their tensors are float64, so that the last roundings differ
LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3}
Row = dict[str, Any]


@dataclass
class Result:
    """Outputs and gradients of one step."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Differs(Exception):
    """The adapted model does not do what the reference does."""


@dataclass
class Subject:
    """A plain model, its inputs, and the adapted and the dense model made of it."""

    plain: nn.Module
    inputs: dict[str, Any]
    places: list[Place]
    factors: Factors
    adapted: nn.Module
    reference: nn.Module
    limit: float

    def config(self) -> dict[str, Any]:
        return entries(self.places)


def entries(places: list[Place]) -> dict[str, Any]:
    """One entry for each tensor, by the whole paths of all its holders."""
    config = {}
    for place in places:
        ends = "" if place.tensor == "weight" else f".{place.tensor}"
        paths = "|".join(_escaped(path + ends) for path in place.paths)
        config[f"re:({paths})"] = {"r": place.rank, "scale": SCALE}
    return config


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def call(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The floating outputs, seeded, so that dropout falls alike; buffers stay as they were."""
    with held(model):
        seed()
        return dense.tensors_of(model(**inputs))


def seed() -> None:
    """Torch's, and those that models draw masks from."""
    torch.default_generator.manual_seed(3)  # torch.manual_seed also notes a stack for CUDA
    numpy.random.seed(3)
    random.seed(3)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Running statistics, and whatever else a call counts, are put back."""
    before = [(b, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def step(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Forward, and backward of a fixed random sum of all outputs."""
    model.zero_grad(set_to_none=True)
    with held(model):
        seed()
        return _backward(dense.tensors_of(model(**inputs)))


def _backward(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    told = [o for o in outputs if o.requires_grad]
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in told]
    if told:
        torch.autograd.backward(told, weights)
    return [o.detach() for o in outputs]


def of_adapted(model: nn.Module, inputs: dict[str, Any]) -> Result:
    return Result(step(model, inputs), factor_gradients(model))


def factor_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the factors, by their names in files."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            stem, _, tensor = name.rpartition(".")
            owner, _, rest = stem.rpartition(".parametrizations.")
            weight = rest.split(".")[0]
            parts = [owner] if weight == "weight" else [owner, weight]
            found[".".join([*(p for p in parts if p), tensor])] = parameter.grad.clone()
    return found


def of_dense(model: nn.Module, inputs: dict[str, Any], places: list[Place], f: Factors) -> Result:
    outputs = step(model, inputs)
    return Result(outputs, dense.gradients(model, places, f))


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of an output; where it is zero, of the largest output."""
    if [t.shape for t in got] != [t.shape for t in want]:
        shapes = [[tuple(t.shape) for t in one] for one in (got, want)]
        raise Differs(f"outputs of shapes {shapes[0]} where the reference has {shapes[1]}")
    scale = max((t.double().norm().item() for t in want), default=1.0) or 1.0
    worst = 0.0
    for ours, theirs in zip(got, want):
        ours, theirs = ours.detach().double(), theirs.detach().double()
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        off = torch.where(same, 0.0, ours - theirs).norm().item()
        size = torch.where(theirs.isfinite(), theirs, 0.0).norm().item()
        worst = max(worst, off / max(size, 1e-6 * scale))
        if off != off:
            return float("inf")
    return worst


def gradients_apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    zero = {n for n, t in want.items() if not t.any()}
    missing = set(want) - set(got) - zero
    extra = {n for n in set(got) - set(want) if got[n].any()}
    if missing or extra:
        name = sorted(missing or extra)[0]
        raise Differs(f"{'no' if missing else 'a'} gradient of {name} ({len(missing or extra)})")
    scale = max((t.double().norm().item() for t in want.values()), default=1.0) or 1.0
    worst = 0.0
    for name in set(want) & set(got):
        off = (got[name].double() - want[name].double()).norm().item()
        worst = max(worst, off / max(want[name].double().norm().item(), 1e-4 * scale))
        if off != off:
            return float("inf")
    return worst


def same(got: Result, want: Result, limit: float) -> float:
    """The larger error of outputs and gradients."""
    error = max(apart(got.outputs, want.outputs), gradients_apart(got.gradients, want.gradients))
    if not error <= limit:
        outputs = apart(got.outputs, want.outputs)
        raise Differs(f"outputs {outputs:.1e}, with gradients {error:.1e} apart")
    return error


def compared(s: "Subject", got: Result, want: Result, train: bool) -> float:
    """As `same`. A model that computes parts of itself in float32 may turn the last rounding of a
    float64 weight into more than the limit; there, into no more than ten such roundings."""
    try:
        return same(got, want, s.limit)
    except Differs:
        if s.limit > LIMITS[torch.float64]:
            raise
        return same(got, want, max(s.limit, 10 * rounding(s, want, train)))


def rounding(s: "Subject", want: Result, train: bool) -> float:
    """How far the reference itself moves where each of its dense weights is rounded once more."""
    model = copy.deepcopy(s.reference).train(train)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps * sign)
    got = of_dense(model, s.inputs, s.places, s.factors)
    return max(apart(got.outputs, want.outputs), gradients_apart(got.gradients, want.gradients))


def attached(plain: nn.Module, places: list[Place], factors: Factors) -> nn.Module:
    """The adapted model with these factors."""
    model = paramlora.attach(copy.deepcopy(plain), entries(places))
    state = paramlora.adapter_state_dict(model)
    told = {
        f"{stem}.lora_{side}": f
        for stem, (A, B) in factors.items()
        for side, f in zip("AB", (A, B))
    }
    wanted = {k for k in state if k.endswith(("lora_A", "lora_B"))}
    if wanted != set(told):
        name = sorted(wanted ^ set(told))[0]
        raise Differs(f"adapted tensors: {name} ({len(wanted ^ set(told))})")
    paramlora.load_adapter_state_dict(model, {**state, **told})
    return model


def subject(plain: nn.Module, inputs: dict[str, Any]) -> Subject:
    found = dense.places(plain)
    factors = dense.drawn(plain, found)
    reference = dense.summed(plain, found, factors)
    dtype = next(plain.parameters()).dtype
    adapted = attached(plain, found, factors)
    # torch folds a product's dimensions, which rounds otherwise, where its weight trains
    plain.requires_grad_(False)
    return Subject(plain, inputs, found, factors, adapted, reference, LIMITS[dtype])


def in_mode(s: Subject, train: bool) -> float:
    """Outputs and gradients. In float32 one rounding can turn relu's gradient into another: where
    the outputs agree, a model that computes in it alone is compared in double precision."""
    try:
        return at_a_step(s, train)
    except Differs:
        if s.limit == LIMITS[torch.float64]:
            raise
        outputs_match(s, s.adapted)
        wide = doubled(s)
        with Doubled():
            return at_a_step(wide, train)


class Doubled(TorchFunctionMode):
    """Inside of it, code that asks for float32 by name gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def doubled(s: Subject) -> Subject:
    """Copies in double precision; the reference's sums are formed in it too."""
    plain, adapted = (copy.deepcopy(model).double() for model in (s.plain, s.adapted))
    factors = {stem: (A.double(), B.double()) for stem, (A, B) in s.factors.items()}
    inputs = tree_map(lambda v: v.double() if tiny_inputs.is_real(v) else v, s.inputs)
    reference = dense.summed(plain, s.places, factors)
    return Subject(plain, inputs, s.places, factors, adapted, reference, LIMITS[torch.float64])


def at_a_step(s: Subject, train: bool) -> float:
    for model in (s.adapted, s.reference):
        model.train(train)
    try:
        want = of_dense(s.reference, s.inputs, s.places, s.factors)
        return compared(s, of_adapted(s.adapted, s.inputs), want, train)
    finally:
        for model in (s.adapted, s.reference):
            model.eval()


def own_steps(s: Subject, train: bool) -> float:
    """Whether the plain model takes a step on these inputs at all, the same each time."""
    model = copy.deepcopy(s.reference).train(train)
    first, again = (of_dense(model, s.inputs, s.places, s.factors) for _ in range(2))
    return same(first, again, s.limit)


@torch.no_grad()
def shows(s: Subject) -> bool:
    """Whether the update changes what the model gives for these inputs, be it only how much."""
    got, plain = call(s.reference, s.inputs), call(s.plain, s.inputs)
    return [t.shape for t in got] != [t.shape for t in plain] or apart(got, plain) > 1e-4


@torch.no_grad()
def outputs_match(s: Subject, model: nn.Module) -> float:
    error = apart(call(model.eval(), s.inputs), call(s.reference, s.inputs))
    if not error <= s.limit:
        raise Differs(f"outputs {error:.1e} apart")
    return error


@torch.no_grad()
def base_again(s: Subject) -> float:
    """Switched off, the base's outputs bit for bit."""
    with paramlora.disable_adapters(s.adapted):
        got = call(s.adapted, s.inputs)
    if any(not torch.equal(a, b) for a, b in zip(got, call(s.plain, s.inputs))):
        raise Differs("switched off it is not the base bit for bit")
    return 0.0


def saved_and_loaded(s: Subject) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        paramlora.save_adapter(s.adapted, path)
        back = paramlora.load_adapter(copy.deepcopy(s.plain), path)
    ours, theirs = (paramlora.adapter_state_dict(m) for m in (s.adapted, back))
    if list(ours) != list(theirs) or any(not torch.equal(ours[k], theirs[k]) for k in ours):
        raise Differs("other factors came back")
    return outputs_match(s, back)


def detached(s: Subject) -> float:
    """Taken off: tensors bit for bit, their order, classes and names as before."""
    model = paramlora.detach(copy.deepcopy(s.adapted))
    for what, of in DETACHED.items():
        if of(model) != of(s.plain):
            raise Differs(f"detached: other {what}")
    ours, plain = model.state_dict(), s.plain.state_dict()
    if any(not torch.equal(ours[k], plain[k]) for k in plain):
        raise Differs("detached: other values")
    return 0.0


DETACHED: dict[str, Callable[[nn.Module], Any]] = {
    "keys": lambda m: list(m.state_dict()),
    "classes": lambda m: [type(x) for x in m.modules()],
    "order of parameters": lambda m: [n for n, _ in m.named_parameters()],
    "ties": lambda m: [n for n, _ in m.named_parameters(remove_duplicate=False)],
}


def merged(s: Subject) -> float:
    """Merged, and through the library's own files."""
    model = paramlora.merge(copy.deepcopy(s.adapted))
    error = outputs_match(s, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = loaded(s, folder)
    return max(error, outputs_match(s, back))


def loaded(s: Subject, folder: str) -> nn.Module:
    dtype = next(s.plain.parameters()).dtype
    back = type(s.plain).from_pretrained(folder, torch_dtype=dtype).to(dtype)
    for mine, its in zip(tiny.configs_of(s.plain.config), tiny.configs_of(back.config)):
        for name in ("_experts_implementation", "_attn_implementation"):
            if hasattr(mine, name):
                setattr(its, name, getattr(mine, name))
    return back


def own_files(s: Subject) -> float:
    """Whether the plain model itself survives its library's files."""
    with tempfile.TemporaryDirectory() as folder:
        s.reference.save_pretrained(folder)
        back = loaded(s, folder)
    return outputs_match(s, back)


def checkpoints(model: nn.Module, reentrant: bool) -> nn.Module:
    """A copy in training that computes its activations again."""
    model = copy.deepcopy(model).train()
    if hasattr(model, "gradient_checkpointing_enable"):
        how = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    else:
        own = torch.utils.checkpoint.checkpoint
        model.enable_gradient_checkpointing(
            lambda module, *args: own(module, *args, use_reentrant=reentrant)
        )
    return model


def checkpointed(s: Subject, reentrant: bool) -> float:
    s.reference.train()
    try:
        want = of_dense(s.reference, s.inputs, s.places, s.factors)
    finally:
        s.reference.eval()
    model = checkpoints(s.adapted, reentrant)
    if reentrant:
        paramlora.enable_input_grads(model)
    return compared(s, of_adapted(model, s.inputs), want, True)


def own_checkpointing(s: Subject, reentrant: bool) -> float:
    """The dense reference itself under its checkpointing."""
    s.reference.train()
    try:
        want = of_dense(s.reference, s.inputs, s.places, s.factors)
    finally:
        s.reference.eval()
    model = checkpoints(s.reference, reentrant)
    return same(of_dense(model, s.inputs, s.places, s.factors), want, s.limit)


class Own(Exception):
    """What the plain model, or peft, cannot do itself."""


def read_by_peft(s: Subject) -> float:
    import peft

    from paramlora import formats
    from paramlora.files import adapters

    base = copy.deepcopy(s.plain)
    with tempfile.TemporaryDirectory() as folder:
        native, out = Path(folder, "adapter.safetensors"), Path(folder, "peft")
        paramlora.save_adapter(s.adapted, native)
        adapters.convert(native, out, "peft", formats.base_of(base))
        config = peft.PeftConfig.from_pretrained(out)
        try:
            model = peft.PeftModel.from_pretrained(base, out, autocast_adapter_dtype=False)
        except Exception as error:
            raise Own(told(error)) from error
    try:
        return outputs_match(s, model)
    except Exception:
        own_peft(s, model, config)
        raise


def own_peft(s: Subject, model: nn.Module, config: Any) -> None:
    """Raise if peft's own adapter on these layers cannot be called, is lost by peft's own file, or
    is used otherwise: its layers hold every update, and where the outputs still differ, its model
    does not use them or adds them elsewhere, such as behind the norm of an embedding."""
    held = (_holds(model, p, s.factors[p.stem]) for p in s.places if p.lies != "stack")
    if not all(held):
        lost = lost_by_peft(s, config)
        if lost:
            raise Own(f"peft loses what it is given: {lost[0]} ({len(lost)})")
        return  # our file is at fault
    try:
        with torch.no_grad():
            got = call(model.eval(), s.inputs)
    except Exception as error:
        raise Own(told(error)) from error
    raise Own(f"peft holds each update, and its outputs are {_off(s, got):.1e} apart")


@torch.no_grad()
def lost_by_peft(s: Subject, config: Any) -> list[str]:
    """What peft does not adapt of what this configuration names, or the tensors that come back as
    others from a file of peft's own."""
    import peft

    generator = torch.Generator().manual_seed(7)
    how = {"autocast_adapter_dtype": False}
    model = peft.get_peft_model(copy.deepcopy(s.plain), copy.deepcopy(config), **how)
    held = [(name, p) for name, p in model.named_parameters() if ".lora_" in name]
    for _, p in held:
        p.copy_(torch.randn(p.shape, generator=generator).to(p.dtype))
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name, _ in held}
    if not adapted >= set(config.target_modules):
        return sorted(set(config.target_modules) - adapted)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(s.plain), folder, **how)
    there = dict(back.named_parameters())
    names = (n for n, p in model.named_parameters() if not torch.equal(p, there[n]))
    return [name.removeprefix("base_model.model.") for name in names]


@torch.no_grad()
def _off(s: Subject, got: list[Tensor]) -> float:
    return apart(got, call(s.reference, s.inputs))


@torch.no_grad()
def _holds(model: Any, place: Place, factors: tuple[Tensor, Tensor]) -> bool:
    """Whether one of peft's layers at the holders' paths has this update."""
    A, B = factors
    want = place.shaped(SCALE * B @ A)
    named = dict(model.base_model.model.named_modules())
    for path in place.paths:
        parent, _, name = path.rpartition(".")
        layer = named.get(f"{parent}.base_layer.{name}", named.get(path))  # inside of attention
        if hasattr(layer, "get_delta_weight"):
            got = _delta(layer).reshape(want.shape)
            if torch.allclose(got, want, rtol=1e-4, atol=1e-6):
                return True
    return False


def _delta(layer: Any) -> Tensor:
    """peft's update of a layer; of a convolution by the two that it calls, A of all channels, of
    which a group has but its own. Its own function for it (0.21.2) raises with groups, and for
    `Conv3d` with a kernel of one."""
    if not isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd):
        whole: Tensor = layer.get_delta_weight("default")
        return whole
    groups = layer.get_base_layer().groups
    A, B = (side["default"].weight.flatten(1) for side in (layer.lora_A, layer.lora_B))
    A, B = (side.reshape(groups, -1, side.shape[1]) for side in (A, B))
    return layer.scaling["default"] * (B @ A).unflatten(-1, (groups, -1)).sum(-2)


def reads(s: Subject) -> int:
    """Dense sums that one training step computes because code reads a tensor itself."""
    seen = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal seen
        seen += isinstance(module, ParametrizationList)

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        step(s.adapted, s.inputs)
    finally:
        hook.remove()
    return seen


def kept(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that a forward keeps for its backward, beside what lives anyway."""
    owned = [*model.parameters(), *model.buffers()]
    owned += [v for v in inputs.values() if isinstance(v, Tensor)]
    free = {t.untyped_storage().data_ptr() for t in owned}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(model, inputs)
    return sum(held.values())


def seconds(model: nn.Module, inputs: dict[str, Any]) -> float:
    start = time.perf_counter()
    step(model, inputs)
    return time.perf_counter() - start


def cost(s: Subject) -> Row:
    """Against training the same tensors themselves: time, bytes kept; and the sums at reads."""
    pairs = [(seconds(s.adapted, s.inputs), seconds(s.reference, s.inputs)) for _ in range(3)]
    ours, theirs = (min(side) for side in zip(*pairs))
    bytes_kept = kept(s.adapted, s.inputs), kept(s.reference, s.inputs)
    return {
        "reads": reads(s),
        "time": round(ours / theirs, 3),
        "kept": round(bytes_kept[0] / max(bytes_kept[1], 1), 3),
    }


def told(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:400]


def judged(check: Callable[[], float], own: Optional[Callable[[], float]] = None) -> Any:
    """The error, or why not; `own` says whether the plain model can do it at all."""
    try:
        return check()
    except Own as error:
        return f"own: {error}"
    except Exception as error:
        reason = told(error)
    if own is not None:
        try:
            own()
        except Exception as error:
            return f"own: {told(error)}"
    return reason


CHECKPOINTING = ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")


def checks(s: Subject, files: bool = True) -> Row:
    """An error's size where it holds, else a sentence; without `files` none of other libraries' and
    no checkpointing, which a class has as another of its configuration, that differs in its head.
    """
    row: Row = {
        "eval": judged(lambda: in_mode(s, False), lambda: own_steps(s, False)),
        "train": judged(lambda: in_mode(s, True), lambda: own_steps(s, True)),
        "off": judged(lambda: base_again(s)),
        "file": judged(lambda: saved_and_loaded(s)),
        "detached": judged(lambda: detached(s)),
    }
    if not files:
        return row
    row |= {
        "merged": judged(lambda: merged(s), lambda: own_files(s)),
        "peft": judged(lambda: read_by_peft(s)),
    }
    if any(getattr(s.plain, name, False) for name in CHECKPOINTING):
        for name, reentrant in (("checkpointed", False), ("reentrant", True)):
            row[name] = judged(
                lambda r=reentrant: checkpointed(s, r), lambda r=reentrant: own_checkpointing(s, r)
            )
    return row
