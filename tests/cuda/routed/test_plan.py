"""The kernels of rows that take different updates: in Triton's interpreter, compiled, and on CUDA
against float64."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")


import paramlora
from paramlora.model.attach import updates
from tests.cuda.started import printed

EPS = 2**-10  # of float16
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_rows_are_right_to_one_rounding():
    results = printed("interpreted_routed", TRITON_INTERPRET="1")
    assert results.pop("spoiled") == [0, False]
    assert results.pop("beside") == [[True] * 5] * 3
    steps = {name: ran for name, (off, ran) in results.pop("in place").items() if off < EPS}
    changed, left = results.pop("changes")
    assert len(changed) == 11 and left
    assert not {name: off for name, off in changed.items() if not off < EPS}
    every = ["pack", "project", "product", "project", "product", "gradients"]
    assert list(steps.values()) == [every] * 3
    few = results.pop("few")
    assert all(off < EPS and reached for off, reached in results.pop("few, spoiled"))
    assert len(few) == 4 and all(ran == ["partial", "finish"] for _, ran in few.values())
    assert not {name: off for name, (off, _) in few.items() if off > EPS}
    assert len(results) == 7
    for name, (errors, ran) in results.items():
        assert max(errors.values()) < EPS, name
        assert ran[:5] == ["project", "product", "project", "product", "gradients"], name


ROWS = {  # the adapter of each row, and what comes after the rows
    "sequences": (["a", "b", None, "a", "c"], (200, 320)),
    "tokens": ([None, "a", "c", "b"] * 40, (320,)),
    "one adapter": (["b"] * 3, (64, 320)),
}


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_layer_on_cuda(name, bias):
    torch.manual_seed(0)
    rows, shape = ROWS[name]
    layer = nn.Linear(320, 512, bias, device="cuda", dtype=torch.bfloat16)
    weight = layer.weight.double()
    shift = layer.bias.double() if bias else 0
    for adapter, r in {"a": 16, "b": 3, "c": 5}.items():
        paramlora.attach(layer, {"weight": {"r": r, "scale": 0.5}}, adapter)
    own = {u.adapter: (u.lora_A, u.lora_B) for _, _, u in updates(layer)}
    for _, b in own.values():
        b.data.normal_(std=1e-3)
    x = torch.randn(len(rows), *shape, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(*x.shape[:-1], 512, device="cuda").bfloat16()
    with paramlora.route(layer, rows):
        y = layer(x)
    used = [t for n, pair in own.items() if n in rows for t in pair]
    got = torch.autograd.grad(y, [x, *used], dy)
    wide = {n: [t.detach().double().requires_grad_() for t in p] for n, p in own.items()}
    leaf = x.detach().double().requires_grad_()

    def exact(strength):
        return torch.stack(
            [
                leaf[i] @ (weight + (strength * 0.5 * wide[n][1] @ wide[n][0] if n else 0)).t()
                + shift
                for i, n in enumerate(rows)
            ]
        )

    true = exact(1)
    leaves = [leaf, *(t for n, pair in wide.items() if n in rows for t in pair)]
    want = torch.autograd.grad(true, leaves, dy.double(), retain_graph=True)
    for mine, real in zip((y, *got), (true, *want)):
        assert (mine.double() - real).norm() < 2**-6 * real.norm()
    base = exact(0)
    (base_x,) = torch.autograd.grad(base, leaf, dy.double())
    for mine, real, plain in ((y, true, base), (got[0], want[0], base_x)):
        term = real - plain
        kept = ((mine.double() - plain) * term).sum() / term.square().sum()
        assert 0.97 < kept < 1.03


@pytest.mark.gpu
@ON_CUDA
def test_a_convolution_keeps_a_small_update_on_cuda():
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 64, 24, 24, device="cuda").bfloat16()
    weight, bias = layer.weight.double(), layer.bias.double()
    paramlora.attach(layer, {"weight": {"r": 4}}, "a")
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_()
    update.lora_B.data *= 1e-3 * weight.norm() / (update.lora_B @ update.lora_A).norm()
    delta = (update.lora_B @ update.lora_A).double().view_as(weight)
    with torch.no_grad(), paramlora.route(layer, ["a", None, "a", "a"]):
        y = layer(x).double()[[0, 2, 3]]
    given = x.double()[[0, 2, 3]]
    term = nn.functional.conv2d(given, delta, padding=1)
    plain = nn.functional.conv2d(given, weight, bias, padding=1)
    assert 0.97 < ((y - plain) * term).sum() / term.square().sum() < 1.03
