"""Where an update's tensors lie whose weight is sharded, in a group of one process."""

import pytest
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramlora
from paramlora.errors import TargetError
from paramlora.model.attach import updates

ALL, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)


def sharded(layer, mesh, place):
    weight = distribute_tensor(layer.weight.detach(), mesh, [place])
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "make, place, a, b",
    [  # A is [r, in] and B [out, r]: each is split where its own side of the weight is
        (lambda: nn.Linear(4, 6), ROWS, ALL, Shard(0)),
        (lambda: nn.Linear(4, 6), COLUMNS, Shard(1), ALL),
        (lambda: nn.Linear(4, 6), ALL, ALL, ALL),
        (lambda: nn.Embedding(6, 4), ROWS, Shard(1), ALL),  # its rows are the inputs
        (lambda: nn.Embedding(6, 4), COLUMNS, ALL, Shard(0)),
        (lambda: nn.Conv2d(4, 6, 3), ROWS, ALL, Shard(0)),
    ],
)
def test_each_factor_lies_along_its_side_of_the_weight(make, place, a, b, one_process):
    model = sharded(make(), one_process, place)
    paramlora.attach(model, {"0": {"r": 2, "trainable_scale": 1}})
    ((*_, update),) = updates(model)
    assert update.lora_A.placements == (a,) and update.lora_B.placements == (b,)
    assert update.lora_scale.placements == (ALL,)


def test_a_magnitude_lies_as_the_outputs_it_is_of(one_process):
    for place, lies in ((ROWS, Shard(0)), (COLUMNS, ALL)):
        model = sharded(nn.Linear(4, 6), one_process, place)
        paramlora.attach(model, {"0": {"r": 2, "kind": "dora"}})
        ((*_, update),) = updates(model)
        magnitude = next(p for name, p in update.named_parameters() if "magnitude" in name)
        assert magnitude.placements == (lies,)


def test_a_split_that_no_factor_follows_is_refused(one_process):
    model = sharded(nn.Conv2d(4, 6, 3), one_process, Shard(2))
    with pytest.raises(TargetError, match=r"0 of shape \[6, 4, 3, 3\] is laid out as"):
        paramlora.attach(model, {"0": {"r": 2}})
    layer = nn.Linear(4, 6)
    weight = DTensor.from_local(layer.weight.detach(), one_process, [Partial()])
    layer.weight = nn.Parameter(weight)
    with pytest.raises(TargetError, match="which no layout of A and B matches"):
        paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
