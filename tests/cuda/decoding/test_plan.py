"""Few rows, each with an update of its own, on CUDA against float64."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")


import paramlora
from paramlora.model.attach import updates

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("kind", ["bfloat16", None])
@pytest.mark.parametrize("count", [1, 7, 64, 128])
def test_decoding_on_cuda(count, kind):
    torch.manual_seed(0)
    layer = nn.Linear(1000, 776, device="cuda", dtype=torch.bfloat16)
    weight, bias = layer.weight.double(), layer.bias.double()
    some, rows = [f"a{i}" for i in range(5)], [None, "a3", "a0", "a4", "a3", "a1", "a2"]
    for i, name in enumerate(some):
        r = 16 if count < 64 else 4 * i + 3
        entry = {"r": r, "scale": 0.5 + i} | ({"adapter_dtype": kind} if kind else {})
        paramlora.attach(layer, {"weight": entry}, name)
    own = {u.adapter: u for _, _, u in updates(layer)}
    for update in own.values():
        update.lora_B.data.normal_(std=0.05)
    rows = [rows[i % 7] for i in range(count)]
    x = torch.randn(count, 1000, device="cuda").bfloat16()
    deltas = {n: u.scaling.double() * u.lora_B.double() @ u.lora_A.double() for n, u in own.items()}
    want = x.double() @ weight.t() + bias
    for i, name in enumerate(rows):
        want[i] += x[i].double() @ deltas[name].t() if name else 0
    with torch.no_grad(), paramlora.route(layer, rows):
        y = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = layer(x)
        graph.replay()
    assert (y.double() - want).norm() < 2**-8 * want.norm()
    assert torch.equal(y, again)
