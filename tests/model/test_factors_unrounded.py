"""A sweep over layers and ways: what multiplies an update is rounded to 16 bits nowhere before it
does: on a base of zeros an adapter's scale, strength, magnitude and dropout's factor stand in the
output and in every gradient, whose share of the float64 definition is 1 however much single numbers
are rounded."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates

# in 16 bits each is 0.25 to 0.38 of an `eps` off, and so is the product of the first two
SCALE, STRENGTH, RATE = 0.296, 0.592, 0.15
DTYPES = (torch.bfloat16, torch.float16)
ROWS = ["a", "b", None, "a", "b", "a"]


class Stack(nn.Module):
    """Experts of one's own, of which each gets as many rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 96, 64))

    def forward(self, x):
        flat = x.reshape(3, -1, 64)
        if not hasattr(self, "parametrizations"):
            return (flat @ self.weight.mT).flatten(0, 1)
        counts = torch.full((3,), flat.shape[1])
        return paramlora.expert_linear(self, "weight", flat.flatten(0, 1), counts)


class Known(nn.Module):
    """A layer of one's own, of which the tensor alone is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(96, 64))

    def forward(self, x):
        return x @ self.weight.t()


class Experts(nn.Module):
    """transformers' experts, which each token's place chooses."""

    def __init__(self):
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, x):
        place = torch.arange(x.shape[0] * x.shape[1]) % x.shape[1]
        index = torch.stack([place % 4, (place + 1 + place % 3) % 4], 1)
        weights = torch.tensor([0.75, 0.25], dtype=x.dtype).expand(len(index), 2)
        return self.experts(x.reshape(-1, 64), index, weights).view(x.shape)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(96, 64)


LAYERS = {  # with the input's shape
    "linear": (lambda: nn.Linear(64, 96), (6, 20, 64)),
    "vectors": (lambda: nn.Linear(64, 96), (66, 64)),
    "Conv1D": (conv1d, (6, 20, 64)),
    "convolution": (lambda: nn.Conv2d(16, 48, 3, padding=1), (6, 16, 6, 6)),
    "strided": (lambda: nn.Conv1d(32, 48, 5, 2), (6, 32, 43)),
    "kernel 1": (lambda: nn.Conv2d(64, 192, 1), (6, 64, 7, 7)),
    "groups": (lambda: nn.Conv1d(32, 48, 9, groups=2), (6, 32, 30)),
    "few positions": (lambda: nn.Conv1d(128, 192, 3), (6, 128, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(32, 48, 3, stride=2), (6, 32, 20)),
    "embedding": (lambda: nn.Embedding(50, 96), None),
    "stack": (Stack, (3, 40, 64)),
    "experts": (Experts, (6, 20, 64)),
    "known": (Known, (6, 20, 64)),
    # of one number each, so that an output tells what was dropped
    "numbers": (lambda: nn.Linear(1, 96), (6, 40, 1)),
    "a channel": (lambda: nn.Conv1d(1, 96, 1), (6, 1, 40)),
}
KINDS = {
    "hard": {"r": 4, "scale": SCALE},
    "soft": {"r": 4, "scale": SCALE, "hard": 0},
    "dora": {"r": 4, "scale": SCALE, "kind": "dora"},
    "loha": {"r": 2, "scale": SCALE, "kind": "loha"},
    "lokr": {"r": 4, "scale": SCALE, "kind": "lokr"},
    "whole": {"whole": 1},
    "rows": {"kind": "rows", "rows": list(range(0, 40, 2))},
    "difference": {"kind": "difference"},
}
LOW = ("hard", "hard, 16 bits")  # the latter with factors of 16 bits
OF_LINEAR = ("soft", "soft, 16 bits", "dora", "dora, 16 bits", "loha", "loha, 16 bits")
OF_LINEAR += ("lokr", "lokr, 16 bits", "whole", "whole, 16 bits", "rows", "difference")
OTHERS = {  # those whose computation is another on such a layer than on any other
    "linear": OF_LINEAR,
    "Conv1D": ("soft", "dora"),
    "convolution": ("soft", "soft, 16 bits", "dora"),
    "transposed": ("soft",),
    "embedding": ("dora", "rows"),
    "known": ("dora",),
    "numbers": ("soft", "dora"),
    "a channel": ("soft", "dora"),
}


def drawn(shape):
    """Numbers of either sign and of nearly one size: of normal ones a few large or small ones make
    most of a sum, and the rounding of those few would be as much as what a lost factor is off."""
    return torch.empty(shape).uniform_(0.5, 1) * (torch.randint(2, shape) * 2 - 1)


def delta(update, parts, shape):
    """What an update adds to a weight of zeros, in float64 by its formula."""
    kind, value = update.method, next(iter(parts.values()))
    if kind in ("whole", "difference"):
        return STRENGTH * value
    if kind == "rows":
        at = torch.tensor(KINDS["rows"]["rows"])
        return torch.zeros(shape).double().index_copy(0, at, STRENGTH * value)
    if kind == "loha":
        one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        return STRENGTH * SCALE * one * two
    if kind == "lokr":
        return (
            STRENGTH * SCALE * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        )
    change = SCALE * parts["lora_B"] @ parts["lora_A"]
    change = (change.t() if update.layout == "transposed" else change).reshape(shape)
    if kind == "dora":
        dims = [dim for dim, size in enumerate(parts["lora_magnitude"].shape) if size == 1]
        norm = torch.linalg.vector_norm(change.detach(), dim=dims, keepdim=True)
        change = parts["lora_magnitude"] * change / norm
    return STRENGTH * change


def built(name, kind, dtype, adapters, **more):
    """The plain layer in float64, the path of its tensor of zeros, and the same adapted; all
    numbers are of the narrow type."""
    torch.manual_seed(0)
    plain, (kind, _, narrow) = nn.Sequential(LAYERS[name][0]()), kind.partition(", ")
    path = "0.experts.down_proj" if name == "experts" else "0.weight"
    plain.get_parameter(path).data.zero_()
    if getattr(plain[0], "bias", None) is not None:
        plain[0].bias.data.zero_()
    model, entry = copy.deepcopy(plain).to(dtype).requires_grad_(False), {**KINDS[kind], **more}
    if "r" in entry and 1 in plain.get_parameter(path).shape[1:]:
        entry["r"] = 1
    for adapter in adapters:
        paramlora.attach(model, {"0" if kind == "soft" else path: entry}, adapter)
    for _, _, update in updates(model):
        for own in update.parameters():
            own.data.copy_(drawn(own.shape).to(dtype))
        if narrow:
            update.cast(dtype)
    paramlora.set_adapters(model, dict.fromkeys(adapters, STRENGTH))
    return plain.to(dtype).double(), path, model


class Lossy(TorchDispatchMode):
    """Collects the operations that round a single number to 16 bits before it multiplies: casts of
    it, and operations with tensors of 16 bits, in whose type CUDA takes it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.itemsize == 2:
            for t in tensors:
                single = t.dim() == 0 and t.itemsize > 2
                if single and not torch.equal(t.to(out.dtype).to(t.dtype), t):
                    self.found.append((str(func), float(t)))
        return out


def given(name, dtype):
    shape = LAYERS[name][1]
    return torch.randint(50, (6, 30)) if shape is None else drawn(shape).to(dtype)


def seen(x, y, name):
    """An input without what was dropped of it, which the outputs tell, scaled up."""
    kept = (y.detach() != 0).any(1 if name == "a channel" else -1)
    return x * kept.reshape(x.shape) / (1 - RATE)


def exact(plain, path, x, rows, sums):
    """The plain layer's output, of each row or of all with the sums of some adapters."""
    if rows is None:
        return functional_call(plain, {path: sum(sums.values())}, (x,))
    zero = torch.zeros_like(plain.get_parameter(path))
    each = [(sums.get(row, zero), x[i : i + 1]) for i, row in enumerate(rows)]
    return torch.cat([functional_call(plain, {path: own}, (one,)) for own, one in each])


def share(got, want):
    """The share of a true tensor that is in one, less 1."""
    got, want = got.detach().double(), want.detach()
    assert want.norm() > 0
    return float((got * want).sum() / want.square().sum()) - 1


def leaves_of(x, held):
    """The tensors of which a gradient is wanted; of few numbers each is rounded for itself."""
    return [x] * x.requires_grad + [p for _, own in held for p in own.values() if len(p) > 1]


def shares(name, kind, dtype, way):
    """The shares of the output, the input's gradient and those of all factors, and what `Lossy`
    found."""
    adapters, rows, entry, run = WAYS[way]
    rows = rows and rows * (11 if name == "vectors" else 1)
    plain, path, model = built(name, kind, dtype, adapters, **entry)
    x, dropping = given(name, dtype), way.startswith("dropping")
    if way.startswith("autocast"):
        model, x = model.float(), x.float() if x.is_floating_point() else x
    wide = x.double().requires_grad_() if x.is_floating_point() else x
    x = x.requires_grad_(wide.requires_grad)
    held = [(u, dict(u.named_parameters())) for _, _, u in updates(model)]
    with Lossy() as lossy:
        y = run(model.train(dropping), x, rows)
        dy = y.detach()  # by which no sum of a gradient cancels
        got = torch.autograd.grad(y, leaves_of(x, held), dy) if y.requires_grad else []
    true = [
        (u, {n: p.detach().double().requires_grad_() for n, p in own.items()}) for u, own in held
    ]
    shape = plain.get_parameter(path).shape
    sums = {u.adapter: delta(u, own, shape) for u, own in true}
    want = exact(plain, path, seen(wide, y, name) if dropping else wide, rows, sums)
    theirs = torch.autograd.grad(want, leaves_of(wide, true), dy.double())
    return [share(y, want), *map(share, got, theirs)], lossy.found


def called(model, x, rows):
    with paramlora.route(model, rows) if rows else contextlib.nullcontext():
        return model(x)


def checkpointed(model, x, rows):
    with paramlora.route(model, rows) if rows else contextlib.nullcontext():
        return checkpoint(model, x, use_reentrant=False)


def recorded(model, x, rows):
    with torch.no_grad():
        return make_fx(model)(x)(x)


def under_autocast(dtype):
    def run(model, x, rows):
        with torch.autocast("cpu", dtype):
            return model(x)

    return run


ONE, BOTH = ("a",), ("a", "b")
DROPS = {"dropout": RATE}
WAYS = {  # the adapters, each row's, what the entries have besides, and the call
    "alone": (ONE, None, {}, called),
    "several": (BOTH, None, {}, called),
    "routed": (BOTH, ROWS, {}, called),
    "in evaluation": (ONE, None, DROPS, called),
    "checkpointed": (ONE, None, {}, checkpointed),
    "routed and checkpointed": (BOTH, ROWS, {}, checkpointed),
    "recorded": (ONE, None, {}, recorded),
    **{f"autocast {dtype}": (ONE, None, {}, under_autocast(dtype)) for dtype in DTYPES},
    "dropping": (ONE, None, DROPS, called),
    "dropping, routed": (BOTH, ROWS, DROPS, called),
}
KNOWN = ("linear", "convolution", "embedding", "experts", "known")
LINES = ("numbers", "a channel")
SOME = ("hard", "soft", "dora")
APART = ("dora", "rows")  # of which several act one after the other
CASES = [
    *(("alone", name) for name in LAYERS if name not in LINES),
    *(("several", name) for name in LAYERS if name not in LINES),
    *(("routed", name) for name in LAYERS if name not in (*LINES, "stack", "known")),
    *((f"autocast {dtype}", name) for dtype in DTYPES for name in KNOWN),
    *((way, name) for way in ("checkpointed", "recorded") for name in KNOWN),
    *(("routed and checkpointed", name) for name in KNOWN[:4]),
    *(("in evaluation", name) for name in ("linear", "convolution", "experts")),
    *((way, name) for way in ("dropping", "dropping, routed") for name in LINES),
]


def kinds_of(way, name):
    """The kinds that a way computes otherwise than one before it."""
    kinds = (*LOW, *OTHERS.get(name, ()))
    if way == "several":
        return [kind for kind in kinds if kind.partition(",")[0] not in APART]
    if way in ("alone", "routed"):
        return kinds
    few = ("hard", "soft") if way in ("routed and checkpointed", "in evaluation") else SOME
    return [kind for kind in kinds if kind in few]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_no_factor_is_rounded(way, name):
    wrong = {}
    for kind in kinds_of(way, name):
        for dtype in DTYPES:
            if way.startswith("autocast") and not way.endswith(str(dtype)):
                continue
            found, lossy = shares(name, kind, dtype, way)
            off = [round(one / torch.finfo(dtype).eps, 3) for one in found]
            if lossy or max(map(abs, off)) > 0.2:
                wrong[kind, dtype] = off, lossy
    assert not wrong
