"""A sweep of every line: what stops an operation there leaves a model as before it or as after it,
bit for bit."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import paramlora
from paramlora.model.attach import adapter_names, updates
from tests.model.stopping import PACKAGE, bits_of, check_stops, moments, picture, stopped


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def quantised():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False)
    return layer.to("cpu")


HARD, SOFT = {"r": 2}, {"r": 2, "hard": 0}
KINDS = {  # (model, configurations)
    "linear": (lambda: nn.Linear(4, 3), [{"weight": HARD}]),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), [{"0": HARD}]),
    "tied": (Tied, [{"re:embedding|head": HARD}]),
    "rnn": (lambda: nn.LSTM(4, 3), [{"re:.*": HARD}]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        [{"in_proj_weight": HARD, "out_proj": HARD}],
    ),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), [{"0": HARD}]),
    "soft": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Conv1d(4, 4, 3)), [{"*": SOFT}]),
    "whole": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(),
        [{"0": {"whole": 1}, "1": HARD}],
    ),
    "two adapters": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)),
        [{"*": HARD}, {"0": {"r": 1}, "1": {"r": 1, "hard": 0}}],
    ),
    "quantised": (lambda: nn.Sequential(quantised(), nn.Linear(64, 3)), [{"0": SOFT, "1": HARD}]),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3)),
        [{"*": HARD}],
    ),
}
OPERATIONS = ("attach", "detach", "merge", "load_adapter", "set_adapters")


class Later(nn.Module):
    """A layer for each kind of update that is no product of two matrices, and experts."""

    def __init__(self):
        super().__init__()
        self.rows, self.dora, self.loha = nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.lokr, self.experts = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, tokens):
        x = self.lokr(self.loha(self.dora(self.rows(tokens))))
        return torch.einsum("bi,eoi->beo", x, self.experts)


LATER = {
    "rows": {"kind": "rows", "rows": [0, 3]},
    "dora": {"r": 2, "kind": "dora"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 2, "kind": "lokr"},
    "experts": HARD,
}
KINDS["later"] = (Later, [LATER])
KINDS["difference"] = (
    lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
    [{"re:0|1|0.bias": {"kind": "difference"}}],
)


def made(kind, attached):
    torch.manual_seed(0)
    model, configs = KINDS[kind][0](), KINDS[kind][1]
    for name, config in zip("ab", configs if attached else configs[:-1]):
        paramlora.attach(model, config, name)
    fill(model)
    return model, configs


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, update in updates(model):
            for p in update.parameters():
                p.normal_()


def operation(name, kind, folder):
    """(a model before it, what does it to a model)"""
    if name == "attach":
        model, configs = made(kind, False)
        last, adapter = configs[-1], "ab"[len(configs) - 1]

        def attach(m):
            torch.manual_seed(2)
            paramlora.attach(m, last, adapter)

        return model, attach
    model, configs = made(kind, True)
    if name == "load_adapter":
        adapter = "ab"[len(configs) - 1]
        paramlora.save_adapter(model, folder / "adapter.safetensors", adapter)
        before, _ = made(kind, False)

        def load(m):
            paramlora.load_adapter(m, folder / "adapter.safetensors")

        return before, load
    if name == "set_adapters":
        return model, lambda m: paramlora.set_adapters(m, {"a": 0.5})
    if name == "merge":
        return model, lambda m: paramlora.merge(m, dequantize=kind == "quantised")
    return model, paramlora.detach


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_stopped_at_every_line(name, kind, tmp_path):
    check_stops(name, *operation(name, kind, tmp_path))


def two_adapters(make, config):
    """Attached twice, every number another one."""
    torch.manual_seed(0)
    model = make()
    for name in "ab":
        paramlora.attach(model, config, name)
    fill(model)
    return model


BLOCKS = {
    "route": lambda model: paramlora.route(model, ["b", None]),
    "disable_adapters": paramlora.disable_adapters,
}
ROUTED = {  # (model, configuration, input)
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {"0": HARD}, (torch.ones(2, 4),)),
    "soft": (lambda: nn.Sequential(nn.Linear(4, 3)), {"0": SOFT}, (torch.ones(2, 4),)),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        {"in_proj_weight": HARD, "out_proj": HARD},
        (torch.ones(2, 3, 4),) * 3,
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        {"linear1": HARD},
        (torch.ones(2, 3, 4),),
    ),
}


@pytest.mark.parametrize(
    "block, kind", [*(("route", kind) for kind in ROUTED), ("disable_adapters", "linear")]
)
def test_a_block_that_is_stopped_at_any_line_is_left(block, kind):
    make, config, inputs = ROUTED[kind]
    start = two_adapters(make, config)

    def act(model):
        with torch.no_grad(), BLOCKS[block](model):
            given = model(*inputs)
        return [*map(bits_of, given if isinstance(given, tuple) else (given,))]

    before, found = picture(start), []
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    moments(lambda: act(first))  # fills the caches
    times = moments(lambda: found.append(act(second)))
    assert len(times) > 20
    for line in times:
        model = copy.deepcopy(start)
        assert stopped(line, lambda model=model: act(model))
        assert picture(model) == before, f"line {line}"
        assert act(model) == found[0], f"another result after line {line}"


def into(model, folder, kind):
    """What loads the adapter of another model of that kind into this one's."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, _, update in updates(other):
            for p in update.parameters():
                p.normal_()
    path = folder / "other.safetensors"
    paramlora.save_adapter(other, path, "a")
    return lambda m: paramlora.load_adapter(m, path, into="a")


def from_state(model, *_):
    state = paramlora.adapter_state_dict(model, "a")
    other = {key: value.clone().mul_(2) for key, value in state.items()}
    return lambda m: paramlora.load_adapter_state_dict(m, other, "a")


def reported(*_):
    return lambda m: paramlora.merge(m, report=True)


def at_random(model, *_):
    return lambda m: paramlora.merge(m, seed=1)


def with_room(*_):
    def attach(m):
        torch.manual_seed(2)
        paramlora.attach(m, {"0": HARD}, "c", max_rank=3)

    return attach


def presets(*_):
    def attach(m):
        torch.manual_seed(2)
        config = {"attention": HARD, "all-linear": SOFT, "exclude": ["linear2"]}
        paramlora.attach(m, config, "c")

    return attach


def begin(*_):
    return paramlora.enable_input_grads


def end(model, *_):
    paramlora.enable_input_grads(model)
    return paramlora.disable_input_grads


LATER_OPERATIONS = {
    "attach with room": with_room,
    "attach presets": presets,
    "detach one": lambda *_: lambda m: "a" in adapter_names(m) and paramlora.detach(m, "a"),
    "merge one": lambda *_: lambda m: "a" in adapter_names(m) and paramlora.merge(m, "a"),
    "rounding": lambda *_: lambda m: paramlora.rounding(m, "as served"),
    "input grads": begin,
    "input grads off": end,
    "load into": into,
    "load a state": from_state,
    "merge reported": reported,
    "merge at random": at_random,
}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("attach with room", "two adapters"),
        ("attach presets", "encoder"),
        ("detach one", "two adapters"),
        ("merge one", "two adapters"),
        ("rounding", "two adapters"),
        ("input grads", "later"),
        ("input grads off", "later"),
        ("load into", "two adapters"),
        ("load into", "later"),
        ("load into", "difference"),
        ("load a state", "whole"),
        ("merge reported", "tied"),
        ("merge at random", "tied"),
    ],
)
def test_later_operations_stopped_at_every_line(name, kind, tmp_path):
    start = ROUTED["encoder"][0]() if kind == "encoder" else made(kind, True)[0]
    start = start.bfloat16() if name.startswith("merge") and kind != "whole" else start
    check_stops(name, start, LATER_OPERATIONS[name](start, tmp_path, kind))


READERS = {
    "parameter_groups": lambda m, _: paramlora.parameter_groups(m, 1e-3, lr_ratio=16),
    "trainable_parameters": lambda m, _: paramlora.trainable_parameters(m, "a"),
    "summary": lambda m, _: str(paramlora.summary(m)),
    "targets": lambda m, _: paramlora.targets(m, {"all-linear": HARD}),
    "adapter_of": lambda m, _: paramlora.adapter_of(m, "a"),
    "adapter_state_dict": lambda m, _: paramlora.adapter_state_dict(m, "a"),
    "tensors_for": lambda m, _: paramlora.tensors_for(m, "peft", "a"),
    "save_adapter": lambda m, place: paramlora.save_adapter(m, place / "x.safetensors", "a"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_only_reads_changes_nothing_where_it_is_stopped(name, tmp_path):
    kind = "two adapters" if name == "tensors_for" else "later"
    model, _ = made(kind, True)
    before = picture(model)
    moments(lambda: READERS[name](model, tmp_path))  # fills the caches
    times = moments(lambda: READERS[name](model, tmp_path))
    assert len(times) > 10
    for line in times:
        assert stopped(line, lambda: READERS[name](model, tmp_path))
        assert picture(model) == before, f"line {line} of {name}"


SIGNALLED = """
    import copy, os, signal, sys, threading, time, random
    import torch, paramlora
    from torch import nn
    def start_of(name):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(40)])
        if name != "attach":
            paramlora.attach(model, {"*": {"r": 2}})
            with torch.no_grad():
                for m in model:
                    m.parametrizations.weight[0].lora_B.normal_()
        return model
    def attach(m):
        torch.manual_seed(1)
        paramlora.attach(m, {"*": {"r": 2}})
    path = sys.argv[1]
    def load_into(m):
        paramlora.load_adapter(m, path, into="default")
    def save_other(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for m in other:
                m.parametrizations.weight[0].lora_A.normal_()
        paramlora.save_adapter(other, path)
    acts = {"attach": attach, "load_into": load_into, "merge": paramlora.merge}
    acts |= {"detach": paramlora.detach}
    def bits(m):
        found = [(k, v.clone()) for k, v in m.state_dict().items()]
        lists = [x for x in m.modules() if isinstance(x, nn.utils.parametrize.ParametrizationList)]
        return found + [("strength", x[0].gain.clone()) for x in lists]
    def same(a, b):
        return [k for k, _ in a] == [k for k, _ in b] and all(
            torch.equal(v, w) for (_, v), (_, w) in zip(a, b))
    armed = False
    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    def hits_of(name, presses):
        global armed
        random.seed(0)
        model, act = start_of(name), acts[name]
        if name == "load_into":
            save_other(model)
        before, done = bits(model), copy.deepcopy(model)
        act(copy.deepcopy(model))  # which takes longer than all that come later
        start = time.perf_counter(); act(done); took = time.perf_counter() - start
        after, hits = bits(done), 0
        for _ in range(40):
            one = copy.deepcopy(model)
            delays = [random.random() * took / times for times in range(1, presses + 1)]
            def kill():
                for delay in delays:
                    time.sleep(delay)
                    os.kill(os.getpid(), signal.SIGINT)
            killer = threading.Thread(target=kill)
            try:
                killer.start()
                armed = True
                act(one)
                armed = False
            except KeyboardInterrupt:
                armed, hits = False, hits + 1
            killer.join()
            now = bits(one)
            assert same(now, before) or same(now, after), name + ": half done"
            if name != "attach" or same(now, before):
                act(one)
            assert same(bits(one), after), name + ": not the same when repeated"
        return hits
    for given in sys.argv[2:]:
        name, _, presses = given.partition(":")
        print(hits_of(name, int(presses)))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_signals_at_random_times_of_every_kind(tmp_path):
    script = Path(__file__).with_name("signalled.py")
    quantised = ["quantised"] if find_spec("bitsandbytes") else []
    done = subprocess.run(
        [sys.executable, script, "5", "0", tmp_path, *quantised],
        env={**os.environ, "PYTHONPATH": str(Path(PACKAGE).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert [*found] == [*OPERATIONS]
    for name, hits in found.items():
        assert len(hits) == len(KINDS) - (not quantised) and sum(hits.values()) > 3, (name, hits)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_signals_at_random_times(tmp_path):
    """One, and three one after the other."""
    env = {**os.environ, "PYTHONPATH": str(Path(PACKAGE).parent)}
    place, presses = tmp_path / "adapter.safetensors", ["merge:1"]
    presses += [f"{name}:3" for name in ("merge", "detach", "attach", "load_into")]
    command = [sys.executable, "-c", textwrap.dedent(SIGNALLED), str(place), *presses]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    hits = [*map(int, done.stdout.split())]
    assert len(hits) == len(presses) and min(hits) > 5, dict(zip(presses, hits))
    assert signal.getsignal(signal.SIGINT) is not None
