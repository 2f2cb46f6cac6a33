"""Changes that are all or nothing: what waits, what is put back, and what is surely left."""

import os
import signal
import sys

import pytest
import torch
from torch import nn

from paramlora.model.undo import surely_left, to_the_end, unchanged_on_error, undisturbed


@pytest.fixture
def heard():
    """The signals that came, by a handler that only notes them."""
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    yield came
    signal.signal(signal.SIGINT, before)


def press(times=1):
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def test_signals_wait_for_the_outermost_block_and_come_once(heard):
    own = signal.getsignal(signal.SIGINT)
    with undisturbed():
        with undisturbed():
            press(3)
        assert heard == []
    assert heard == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is own
    press()
    assert len(heard) == 2


def test_a_stop_that_waited_is_raised_behind_the_block():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():
            press()
            done.append("all of it")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_module_is_as_it_was_whatever_stops_the_change(error):
    layer, other = nn.LSTM(2, 2), []
    names, hooks, weight = list(vars(layer)), layer._forward_hooks, layer.weight_ih_l0
    flat = list(layer._flat_weights)
    frozen = layer.bias_ih_l0

    class Changed(nn.LSTM):
        pass

    with pytest.raises(error):
        with unchanged_on_error([layer, layer], [frozen], lambda: other.append("put back")):
            layer.__class__ = Changed
            layer.extra = 1
            layer.weight_ih_l0 = nn.Parameter(torch.zeros(8, 2))
            layer.register_forward_hook(lambda *_: None)
            layer.register_buffer("more", torch.ones(1))
            layer._flat_weights.clear()
            frozen.requires_grad_(False)
            raise error
    assert type(layer) is nn.LSTM and list(vars(layer)) == names and other == ["put back"]
    assert layer.weight_ih_l0 is weight and layer._forward_hooks is hooks and not hooks
    assert all(a is b for a, b in zip(layer._flat_weights, flat, strict=True))
    assert not layer._buffers and frozen.requires_grad


def test_a_change_that_ends_stays():
    layer = nn.Linear(2, 2)
    with unchanged_on_error([layer], layer.parameters()):
        layer.extra = 1
        layer.weight.requires_grad_(False)
    assert layer.extra == 1 and not layer.weight.requires_grad


def test_an_act_is_done_again_after_each_stop_and_an_error_that_repeats_ends_it():
    calls = []

    def stopped_twice():
        calls.append(len(calls))
        if len(calls) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_the_end(stopped_twice)
    assert calls == [0, 1, 2]

    def failing():
        calls.append("failed")
        raise ValueError("again")

    with pytest.raises(ValueError, match="again"):
        to_the_end(failing)
    assert calls[3:] == ["failed"] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="raises a signal at a line")
@pytest.mark.parametrize("where", ["in the block", "while it leaves", "nowhere"])
def test_what_was_entered_is_left_once_wherever_a_stop_comes(where):
    seen = []

    def leave(kept):
        if where == "while it leaves" and not seen.count("stopped"):
            seen.append("stopped")
            raise KeyboardInterrupt
        if kept:
            seen.append(f"left {kept.pop()}")

    def run():
        with surely_left(lambda kept: kept.append(os.getpid()), leave):
            seen.append("inside")
            if where == "in the block":
                raise KeyboardInterrupt

    if where == "nowhere":
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    assert [one for one in seen if one != "stopped"] == ["inside", f"left {os.getpid()}"]
