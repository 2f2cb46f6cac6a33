"""A sweep of every module of torch that holds buffers, in training beside an adapter: `detach` puts
them back.

And modules of others' kinds: counts with dimensions, buffers that are in no state dict, that their
module replaces, that hold no number, or that lie sparse.
"""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import paramlora

PLANE, VOLUME = (6, 4, 5, 5), (6, 4, 5, 5, 5)
PER_CHANNEL = quantization.MovingAveragePerChannelMinMaxObserver
OF_TORCH = {  # by class: one that holds buffers, and what it is called with
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(4), (6, 4)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(4, momentum=None), PLANE),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(4, affine=False), VOLUME),
    nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(4), (6, 4)),  # alone it needs no group, when even
    nn.InstanceNorm1d: (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (6, 4, 5)),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(4, track_running_stats=True), PLANE),
    nn.InstanceNorm3d: (lambda: nn.InstanceNorm3d(4, track_running_stats=True), VOLUME),
    nn.FractionalMaxPool2d: (
        lambda: nn.FractionalMaxPool2d(2, 2, _random_samples=torch.rand(6, 4, 2)),
        PLANE,
    ),
    nn.FractionalMaxPool3d: (
        lambda: nn.FractionalMaxPool3d(2, 2, _random_samples=torch.rand(6, 4, 3)),
        VOLUME,
    ),
}


class Moves(nn.Module):
    """A module whose forward, in training, moves what `move` says."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=not name.startswith("unsaved"))

    def forward(self, x):
        if self.training:
            self.move(x.detach())
        return x


class Counts(Moves):
    def __init__(self):
        super().__init__(used=torch.zeros(4, dtype=torch.long), seen=torch.zeros(4).bool())

    def move(self, x):
        self.used += x.reshape(-1, 4).gt(0).sum(0)
        self.seen |= x.reshape(-1, 4).gt(0).any(0)


class Unsaved(Moves):
    def __init__(self):
        super().__init__(unsaved=torch.zeros(4), unsaved_ids=torch.arange(4)[None])

    def move(self, x):
        self.unsaved.lerp_(x.reshape(-1, 4).mean(0), 0.5)
        self.unsaved_ids += 1


class Replaced(Moves):
    """A queue whose memory is the caller's own, as Transformer-XL has it."""

    def __init__(self):
        super().__init__(memory=torch.zeros(6, 4), unsaved=torch.zeros(4))

    def move(self, x):
        self.memory = x
        self.unsaved = 0.9 * self.unsaved + x.mean(0)


class Strange(Moves):
    def __init__(self):
        super().__init__(
            none=torch.full((3,), float("nan")),
            turned=torch.zeros(2, dtype=torch.complex64),
            sparse=torch.eye(3).to_sparse(),
            signed=torch.tensor([0.0, -0.0]),
            narrow=torch.zeros(4).to(torch.float8_e4m3fn),
        )

    def move(self, x):
        self.turned += 1j
        self.signed.neg_()


OF_OTHERS = {kind.__name__: kind for kind in (Counts, Unsaved, Replaced, Strange)} | {
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
    "MinMaxObserver": quantization.MinMaxObserver,
    "HistogramObserver": quantization.HistogramObserver,
    "FakeQuantize": quantization.FakeQuantize,
    "FakeQuantize, by channel": lambda: quantization.FakeQuantize(
        PER_CHANNEL, qscheme=torch.per_channel_affine, ch_axis=1
    ),
}
CASES = {kind.__name__: case for kind, case in OF_TORCH.items()} | {
    name: (make, (6, 4)) for name, make in OF_OTHERS.items()
}
STILL = {"FractionalMaxPool2d", "FractionalMaxPool3d", "orthogonal", "weight_norm", "pruned"}


def test_every_module_of_torch_that_holds_buffers_is_here():
    """Beside the lazy ones, which become these, and the losses, whose weights are given."""
    there = [kind for kind in vars(nn).values() if inspect.isclass(kind)]
    found = {
        kind
        for kind in there
        if issubclass(kind, nn.Module)
        and any(
            "register_buffer(" in inspect.getsource(one)
            for one in kind.__mro__
            if one not in (nn.Module, object)
        )
        and not issubclass(kind, nn.modules.lazy.LazyModuleMixin)
        and kind.__module__ != nn.modules.loss.__name__
    }
    assert found == {*OF_TORCH}


def held(model):
    return {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}


def bits(tensor):
    return (tensor.to_dense() if tensor.is_sparse else tensor).reshape(-1).view(torch.uint8)


def alike(one, other):
    return one.shape == other.shape and torch.equal(bits(one), bits(other))


def net(case):
    torch.manual_seed(0)
    make, shape = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning, UserWarning))
        middle = make()
    return nn.ModuleDict({"middle": middle, "head": nn.Linear(shape[-1], 3)}), shape


def step(model, x):
    middle = model["middle"](x)
    model["head"](torch.zeros(x.shape) + middle.sum()).sum().backward()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_a_training_forward_moves_is_put_back(case):
    model, shape = net(case)
    step(model, torch.randn(shape))  # a lazily made buffer is made
    before, state = held(model), list(model.state_dict())
    paramlora.attach(model, {"head": {"r": 2}})
    inputs = [torch.randn(shape) for _ in range(3)]
    given = [x.clone() for x in inputs]
    for x in inputs:
        step(model, x)
    moved = [name for name, (_, value) in before.items() if not alike(value_at(model, name), value)]
    assert bool(moved) != (case in STILL)
    for one in (copy.deepcopy(model), model):
        paramlora.detach(one)
        assert list(one.state_dict()) == state
        for name, (_, value) in before.items():
            assert alike(value_at(one, name), value), name
    assert all(torch.equal(x, same) for x, same in zip(inputs, given))
    kept = {name for name, (buffer, _) in before.items() if value_at(model, name) is buffer}
    assert case == "Replaced" or kept == set(before)


def value_at(model, name):
    return dict(model.named_buffers())[name]


class Rotary(Moves):
    """Angles for the longest sequence so far, and that length beside them."""

    def __init__(self):
        super().__init__(unsaved=torch.ones(4))
        self.length = 4

    def move(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.unsaved = self.unsaved * 4 / len(x)


def test_a_cache_stays_with_the_length_that_it_belongs_to():
    model = nn.Sequential(Rotary(), nn.Linear(4, 3))
    paramlora.attach(model, {"1": {"r": 2}})
    model(torch.randn(8, 4))
    paramlora.detach(model)
    assert model[0].length == 8 and torch.equal(model[0].unsaved, torch.full((4,), 0.5))


def test_a_buffer_that_was_resized_stays():
    model = nn.Sequential(Moves(bias=torch.ones(4)), nn.Linear(4, 3)).eval()
    paramlora.attach(model, {"1": {"r": 2}})
    model[0].bias = torch.ones(6)
    paramlora.detach(model)
    assert len(model[0].bias) == 6


def test_a_checkpoint_says_what_whole_numbers_are():
    model = nn.Sequential(Counts(), nn.Linear(4, 3))
    other = {k: v + 1 if k == "0.used" else v for k, v in model.state_dict().items()}
    paramlora.attach(model, {"1": {"r": 2}})
    model.load_state_dict(other)
    model(torch.randn(6, 4))
    paramlora.detach(model)
    assert torch.equal(model[0].used, other["0.used"])


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.float16), ids=str)
def test_large_tables_that_are_no_weights_are_put_back(dtype):
    table = torch.arange(2**17).reshape(2**9, 2**8).remainder(2).to(dtype)  # of indices, a mask
    model = nn.Sequential(nn.Linear(4, 3), Moves(table=table.clone()))
    paramlora.attach(model, {"0": {"r": 2}})
    model[1].table.copy_(1 - table.long())
    paramlora.detach(model)
    assert torch.equal(model[1].table, table)


def test_packed_weights_are_not_copied():
    packed = torch.zeros(2**9, 2**8, dtype=torch.int32)  # of a quantiser
    model = nn.Sequential(nn.Linear(4, 3), Moves(qweight=packed))
    paramlora.attach(model, {"0": {"r": 2}})
    ours = [v for v in vars(model[1]).values() if hasattr(v, "buffers") and not callable(v.buffers)]
    assert not ours
    paramlora.detach(model)
    assert model[1].qweight is packed


def test_parametrizations_hold_theirs_under_an_update():
    torch.manual_seed(0)
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    model.register_buffer("used", torch.zeros(4, dtype=torch.long))
    paramlora.attach(model, {"weight": {"r": 2}})
    model.used += 1
    paramlora.detach(model)
    assert parametrize.is_parametrized(model, "weight") and not model.used.any()
