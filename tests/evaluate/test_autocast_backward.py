"""A sweep over autograd functions: each one's backward gives the same bits wherever it is called:
outside of autocast, and inside of that of either type, which would cast its products."""

import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ["a", "b", None, "a"]


def functions():
    """The package's autograd functions, by their place."""
    found, top = {}, Path(paramlora.__file__).parent
    for file in top.rglob("*.py"):
        if "autograd.Function" in file.read_text(encoding="utf-8"):
            name = ".".join(("paramlora", *file.relative_to(top).with_suffix("").parts))
            for one in vars(importlib.import_module(name)).values():
                if isinstance(one, type) and issubclass(one, torch.autograd.Function):
                    found[f"{one.__module__}.{one.__name__}"] = one
    return found


class Stack(nn.Module):
    """Experts of one's own, told the tokens' rows where these choose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 24, 32) / 6)

    def forward(self, x):
        counts = torch.tensor([len(x) // 2, len(x) - len(x) // 2])
        return paramlora.expert_linear(self, "weight", x, counts)


class Known(nn.Module):
    """A layer of one's own, of which the tensor alone is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 32) / 6)

    def forward(self, x):
        return x @ self.weight.t()


def experts():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            config = MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=2)
            config._experts_implementation = "eager"
            self.experts = MixtralExperts(config)
            for p in self.experts.parameters():
                nn.init.normal_(p, std=0.2)

        def forward(self, x):
            index = torch.arange(len(x) * x.shape[1])[:, None] % 2
            flat = self.experts(x.flatten(0, 1), index, x.new_ones(index.shape))
            return flat.view(x.shape)

    return Block()


LOW, DORA = {"r": 3, "scale": 0.7}, {"r": 3, "scale": 0.7, "kind": "dora"}
LOKR, SOFT = {"r": 2, "kind": "lokr"}, {"r": 3, "hard": 0}
DROPS = {**LOW, "dropout": 0.25}
VECTORS, IMAGES = (4, 9, 32), (4, 16, 7, 7)


def linear():
    return nn.Linear(32, 24)


class Own(nn.Linear):
    """Whose output a soft update is added to, as nobody knows what else it computes."""


def image(**more):
    return nn.Conv2d(16, 24, 3, padding=1, **more)


def few():
    return nn.Conv2d(64, 96, 3)


class Padded(nn.Embedding):
    """Looks up what it makes of the sizes of its input, padding among it."""

    def __init__(self):
        super().__init__(9, 24, padding_idx=0)

    def forward(self, x):
        return super().forward(torch.arange(x.shape[0]) % 9)


CALLS = {  # a layer, its input's shape, what is attached, and each row's adapter
    "linear": (linear, VECTORS, LOW, None),
    "large": (lambda: nn.Linear(256, 256), (600, 256), LOW, None),
    "soft": (linear, VECTORS, SOFT, None),
    "soft, of one's own": (lambda: Own(32, 24), VECTORS, SOFT, None),
    "dropping": (linear, VECTORS, DROPS, None),
    "soft, dropping": (linear, VECTORS, {**SOFT, "dropout": 0.25}, None),
    "dora": (linear, VECTORS, DORA, None),
    "dora, dropping": (linear, VECTORS, {**DORA, "dropout": 0.25}, None),
    "lokr": (linear, VECTORS, LOKR, None),
    "large lokr": (lambda: nn.Linear(512, 256), (4, 512), LOKR, None),
    "convolution": (image, IMAGES, LOW, None),
    "dropping convolution": (image, IMAGES, DROPS, None),
    "few positions": (few, (4, 64, 4, 4), LOW, None),
    "groups": (lambda: image(groups=4), IMAGES, LOW, None),
    "large convolution": (lambda: nn.Conv2d(64, 64, 3), (2, 64, 20, 20), LOW, None),
    "soft, transposed": (lambda: nn.ConvTranspose1d(16, 24, 3), (4, 16, 7), SOFT, None),
    "soft convolution": (image, IMAGES, SOFT, None),
    "dora of a convolution": (image, IMAGES, DORA, None),
    "stack": (Stack, (40, 32), LOW, None),
    "known": (Known, VECTORS, LOW, None),
    "known, checkpointed": (Known, VECTORS, LOW, None),
    "known dora": (Known, VECTORS, DORA, None),
    "padded embedding": (Padded, (40, 32), LOW, None),
    "routed": (linear, VECTORS, LOW, ROWS),
    "routed, dropping": (linear, VECTORS, DROPS, ROWS),
    "routed convolution": (image, IMAGES, LOW, ROWS),
    "routed experts": (experts, VECTORS, LOW, ROWS),
}
# by kernels of CUDA alone, and without a backward
UNREACHED = {
    "paramlora.evaluate.convolution._Depthwise",
    "paramlora.evaluate.dropout._Masked",
    "paramlora.evaluate.functional._Embedding",
    "paramlora.evaluate.routed._InPlace",
    "paramlora.update.compat._Refused",
}


def result(name, dtype, autocast):
    """What a layer gives, perhaps under autocast."""
    make, shape, entry, rows = CALLS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype).requires_grad_(False)
    path = "0.experts.down_proj" if "experts" in name else "0" if "hard" in entry else "0.weight"
    for adapter in ("a", "b") if rows else ("a",):
        paramlora.attach(model, {path: entry}, adapter)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    x = torch.randn(shape).to(dtype).requires_grad_()
    routed = paramlora.route(model, rows) if rows else contextlib.nullcontext()
    with routed, within(autocast):
        if name.endswith("checkpointed"):
            return checkpoint(model, x, use_reentrant=False)
        return model(x)


def within(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def reached(y):
    """By node of the package's functions what a backward gives it."""
    found = {}
    for node in nodes_of(y):
        node.register_prehook(lambda given, node=node: found.update({node: given}))
    y.backward(torch.randn_like(y), retain_graph=True)
    return found


def nodes_of(y):
    """The nodes of the package's functions behind an output."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [other for other, _ in node.next_functions]
    own = (n for n in seen if getattr(type(n), "_forward_cls", None) in FUNCTIONS.values())
    return list(own)


FUNCTIONS = functions()
KINDS = [(dtype, None) for dtype in DTYPES] + [(torch.float32, dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(("dtype", "autocast"), KINDS)
def test_a_backward_is_the_same_inside_of_autocast(dtype, autocast):
    wrong = {}
    for name in CALLS:
        for node, given in reached(result(name, dtype, autocast)).items():
            with torch.no_grad():
                plain = node.apply(*given)
                for narrow in DTYPES[1:]:
                    with within(narrow):
                        inside = node.apply(*given)
                    if not same(plain, inside):
                        wrong.setdefault(type(node)._forward_cls.__qualname__, set()).add(name)
    assert not wrong


def same(one, other):
    one, other = (g if isinstance(g, tuple) else (g,) for g in (one, other))
    return all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def test_every_function_is_reached():
    """A new one needs a call above, or is known here to be of CUDA's, and then leaves autocast."""
    found = {
        f"{cls.__module__}.{cls.__name__}"
        for dtype in DTYPES
        for name in CALLS
        for cls in {type(node)._forward_cls for node in nodes_of(result(name, dtype, None))}
    }
    assert FUNCTIONS.keys() - found == UNREACHED
    for name in UNREACHED - {"paramlora.update.compat._Refused"}:
        assert FUNCTIONS[name].backward.__wrapped__
