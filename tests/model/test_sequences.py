"""A sweep of sequences of operations on any small model, beside a dense float64 model that
does the same.

The oracle holds a base and, for each adapter, factors of its own, which it trains by autograd
through dense weights. After each operation the outputs agree, no tensor of the base moved, and
buffers that a training forward moves are where the dense model's are; when the last adapter is
detached, they are bit for bit what they were before the first.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

import paramlora
from paramlora.checkpoint import merge as merge_states
from paramlora.model.attach import updates

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 3, padding=1), nn.Flatten()
    ),
    "norm": lambda: nn.BatchNorm1d(4),
    "averaging norm": lambda: nn.BatchNorm1d(4, momentum=None, affine=False),
    "instances": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "counts": lambda: Counts(),
    "attention": lambda: Attention(),
    "read": lambda: Read(),
}
TARGETS = {  # the tensors that an entry names in each kind of layer
    "linear": ["weight"],
    "conv": ["1.weight"],
    "norm": [],
    "averaging norm": [],
    "instances": [],
    "counts": [],
    "attention": ["inner.in_proj_weight", "inner.out_proj.weight"],
    "read": ["matrix"],
}
NAMES = st.sampled_from(["a", "b", "c"])
STRENGTHS = st.sampled_from([0.0, 1.0, 0.5, -1.5])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.matrix


class Counts(nn.Module):
    """Follows its inputs in buffers, and divides by what it found."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("size", torch.ones(4))

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.size.lerp_(x.detach().abs().mean(0), 0.1)
        return x / self.size.clone()


class Sequences(RuleBasedStateMachine):
    """The model, and an oracle: ``base``, and ``held[adapter][tensor] = (A, B, scale)``."""

    def __init__(self):
        super().__init__()
        self.model = None

    @rule(
        kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2),
        seed=st.integers(0, 9),
        training=st.booleans(),
    )
    @precondition(lambda self: self.model is None)
    def make(self, kinds, seed, training):
        kinds = [*kinds, "linear"]
        torch.manual_seed(seed)
        self.plain = nn.Sequential(*[LAYERS[kind]() for kind in kinds]).double()
        self.plain.train(training)  # of these only those with buffers differ
        self.model = copy.deepcopy(self.plain)
        self.names = [f"{i}.{tail}" for i, kind in enumerate(kinds) for tail in TARGETS[kind]]
        self.base = {k: v.clone() for k, v in self.plain.state_dict().items()}
        # in the base's dictionary too, so that a forward of the dense model moves them there
        self.buffers = {k: self.base[k] for k, _ in self.plain.named_buffers()}
        self.before = self.copied()
        self.held, self.strengths = {}, {}
        self.x = torch.randn(3, 4, dtype=torch.float64)

    ready = precondition(lambda self: self.model is not None and self.names)
    worn = precondition(lambda self: self.model is not None and self.held)

    @ready
    @rule(name=NAMES, data=st.data(), soft=st.booleans(), scale=st.sampled_from([1, 0.25, -2]))
    def attach(self, name, data, soft, scale):
        chosen = data.draw(st.lists(st.sampled_from(self.names), min_size=1, unique=True))
        config = {n: {"r": 2, "scale": scale, "hard": self._hard(n, soft)} for n in chosen}
        if name in self.held:
            with pytest.raises(paramlora.AdapterError, match="attached already"):
                paramlora.attach(self.model, config, name)
            return
        if not self.held:
            self.before = self.copied()
        paramlora.attach(self.model, config, name)
        with torch.no_grad():
            for _, _, update in updates(self.model):
                if update.adapter == name:
                    update.lora_B.normal_(std=0.3)
        self._take(name)
        self.strengths[name] = 1.0

    def copied(self):
        """The model's own buffers, to the last bit."""
        stored = self.stored()
        return {k: stored[k].clone() for k in self.buffers}

    def put_back(self):
        """Where no adapter is left, what moved since the first is what it was."""
        if not self.held:
            stored = self.stored()
            for key, value in self.before.items():
                assert torch.equal(stored[key], value), key
                self.buffers[key].copy_(value)

    def _hard(self, tensor, soft):
        """Soft where that was drawn and the layer is one that a soft update serves."""
        owner = self.plain.get_submodule(tensor.rpartition(".")[0])
        return int(not soft or type(owner) not in (nn.Linear, nn.Conv1d))

    def _take(self, name):
        """The oracle's own copy of an adapter's factors."""
        state = paramlora.adapter_state_dict(self.model, name)
        stems = {key.rpartition(".")[0] for key in state}
        self.held[name] = {}
        for stem in stems:
            a, b, scale = (state[f"{stem}.lora_{p}"].clone() for p in ("A", "B", "scale"))
            full = stem if stem in self.base else f"{stem}.weight"
            self.held[name][full] = (a.requires_grad_(), b.requires_grad_(), scale)

    def weights(self):
        out = dict(self.base)
        for name, held in self.held.items():
            for tensor, (a, b, scale) in held.items():
                delta = self.strengths[name] * scale * (b @ a)
                out[tensor] = out[tensor] + delta.reshape(out[tensor].shape)
        return out

    def want(self):
        return functional_call(self.plain, self.weights(), (self.x,))

    @worn
    @rule(rate=st.sampled_from([0.001, 0.01]))
    def train(self, rate):
        if not any(self.strengths.values()):
            return  # then nothing has a gradient
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.zero_grad()
        self.model(self.x).tanh().mean().backward()  # bounded: nothing runs away
        leaves = [f for held in self.held.values() for a, b, _ in held.values() for f in (a, b)]
        grads = torch.autograd.grad(self.want().tanh().mean(), leaves, allow_unused=True)
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
            for leaf, grad in zip(leaves, grads):
                if grad is not None:
                    leaf -= rate * grad

    @worn
    @rule(data=st.data())
    def set_strengths(self, data):
        chosen = data.draw(st.dictionaries(st.sampled_from(sorted(self.held)), STRENGTHS))
        paramlora.set_adapters(self.model, chosen)
        self.strengths = {name: chosen.get(name, 0.0) for name in self.held}

    @worn
    @rule()
    def disable(self):
        with paramlora.disable_adapters(self.model), torch.no_grad():
            want = functional_call(self.plain, self.base, (self.x,))
            torch.testing.assert_close(self.model(self.x), want, rtol=1e-12, atol=1e-12)

    @worn
    @rule(data=st.data())
    def detach(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        paramlora.detach(self.model, name)
        del self.held[name], self.strengths[name]
        self.put_back()

    @worn
    @rule(data=st.data())
    def merge(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        with torch.no_grad():
            for tensor, (a, b, scale) in self.held[name].items():
                delta = self.strengths[name] * scale * (b @ a)
                self.base[tensor] = self.base[tensor] + delta.reshape(self.base[tensor].shape)
        paramlora.merge(self.model, name)
        moved = set(self.held[name])
        del self.held[name], self.strengths[name]
        for tensor in moved:  # to the last bits of float64, and from here on exactly
            got = self.stored()[tensor]
            torch.testing.assert_close(got, self.base[tensor], rtol=1e-13, atol=1e-13)
            self.base[tensor] = got.clone()

    @worn
    @rule(data=st.data())
    def merge_a_state_dict(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        merged = merge_states(self.base, paramlora.adapter_of(self.model, name))
        for tensor, (a, b, scale) in self.held[name].items():
            want = self.base[tensor] + (scale * (b @ a)).detach().reshape(self.base[tensor].shape)
            torch.testing.assert_close(merged[tensor], want, rtol=1e-12, atol=1e-12)

    @worn
    @rule(data=st.data())
    def save_and_load(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            paramlora.save_adapter(self.model, path, name)
            paramlora.detach(self.model, name)
            held = self.held.pop(name)
            self.put_back()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*keep running statistics")
                paramlora.load_adapter(self.model, path)
        self.strengths[name] = 1.0
        self.held[name] = held

    @worn
    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)

    @worn
    @rule()
    def state_dict(self):
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(state)
        self.model.load_state_dict(self.base)
        self.before = self.copied()  # a base that is loaded is what the model was

    def stored(self):
        """The base's tensors, as the model holds them under whatever structure."""
        found = {}
        for key, value in self.model.state_dict().items():
            if ".lora_" not in key:
                name = key.replace("parametrizations.", "").replace(".original", "")
                found[name] = value
        return found

    @invariant()
    def the_outputs_agree_and_the_base_never_moves(self):
        if self.model is None:
            return
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.x), self.want(), rtol=1e-9, atol=1e-9)
        stored = self.stored()
        assert stored.keys() == self.base.keys()
        for key, value in stored.items():
            if key in self.buffers and self.plain.training:  # by what is alike
                torch.testing.assert_close(value, self.base[key], rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(value, self.base[key]), key


Sequences.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    database=None,
    derandomize=True,  # a run that differs each time would hide which change broke it
    suppress_health_check=list(HealthCheck),
)
told = pytest.mark.filterwarnings("ignore:.*(keep running statistics|hold buffers that moved)")
TestSequences = told(Sequences.TestCase)
