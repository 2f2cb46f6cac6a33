"""Updates of weights that lie on several processes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import paramlora


@pytest.mark.parametrize(
    "entry",
    [
        {"r": 2},
        {"r": 2, "kind": "dora"},
        {"r": 2, "kind": "loha"},
        {"r": 1, "kind": "lokr"},
        {"rows": [3, 1]},
    ],
    ids=lambda entry: entry.get("kind", next(iter(entry))),
)
def test_layers_that_are_sharded_each_by_itself(entry, one_process, tmp_path):
    """``fully_shard`` of a layer puts its own class in front of the adapted one's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Unflatten(1, (8, 1)))
    model.append(nn.Conv1d(8, 5, 1)).double()
    paramlora.attach(model, dict.fromkeys("013", entry))
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.normal_()
    tokens = torch.arange(9)
    want = model(tokens)
    want.square().sum().backward()
    grads = [p.grad for p in paramlora.trainable_parameters(model)]
    sharded = copy.deepcopy(model)
    sharded.zero_grad()
    for layer in (*sharded, sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    y = sharded(tokens)
    assert torch.equal(y, want)
    y.square().sum().backward()
    for one, grad in zip(paramlora.trainable_parameters(sharded), grads, strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), grad)
    paramlora.save_adapter(sharded, tmp_path / "a.safetensors")
    paramlora.save_adapter(model, tmp_path / "b.safetensors")
    held = [load_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert all(torch.equal(tensor, held[1][key]) for key, tensor in held[0].items())
    if "rows" in entry:
        with pytest.raises(paramlora.AdapterError, match=r"rows of 0 lie on several .* Save the"):
            paramlora.merge(sharded)
        return
    merged = [p.full_tensor() for p in paramlora.merge(sharded).parameters()]
    for one, other in zip(merged, paramlora.merge(model).parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "entry", ({"r": 2, "kind": "loha"}, {"r": 1, "kind": "lokr"}, {"rows": [1]})
)
def test_what_has_no_parts_is_refused_on_sharded_weights(entry, one_process):
    layer = nn.Linear(4, 6)
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(paramlora.TargetError, match="lies on several processes, .* no parts to"):
        paramlora.attach(layer, {"weight": entry})
