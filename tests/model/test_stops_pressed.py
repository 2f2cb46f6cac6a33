"""A sweep of Ctrl-C wherever Python answers it, and a second time too: as before or as after."""

import _signal
import contextlib
import copy
import dis
import functools
import gc
import os
import signal
import sys

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model import undo
from tests.model.stopping import PACKAGE, picture

WITHIN = (undo.__file__, contextlib.__file__)  # what puts back, and what calls it
NEVER = 10**9


@functools.cache
def moments(code):
    """Where CPython answers signals: where a function begins, a call ends or a loop goes back."""
    found, called = set(), False
    for one in dis.get_instructions(code):
        if called or one.opname == "RESUME" or "JUMP_BACKWARD" in one.opname:
            found.add(one.offset)
        called = one.opname.startswith("CALL")
    return found


def press(frame):
    signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)


class Second:
    """Presses at a moment in `WITHIN`; counts them from when it is told to."""

    def __init__(self, at, counts):
        self.left, self.counts, self.seen, self.line = at, counts, [], None

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in WITHIN:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.opcode

    def opcode(self, frame, event, _):
        if event == "opcode" and self.counts and frame.f_lasti in moments(frame.f_code):
            self.seen.append((frame.f_code, frame.f_lasti))
            self.left -= 1
            if self.left == -1:
                self.line = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                press(frame)
        return self.opcode


class First:
    """Presses where a function of the package is called or has called one of C."""

    def __init__(self, at, second):
        self.left, self.count, self.second = at, 0, second

    def __call__(self, frame, event, _):
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.left, self.count = self.left - 1, self.count + 1
            if self.left == -1:
                self.second.counts = True
                press(frame)


def pressed(act, first=None, second=NEVER):
    """What came of a call in which Ctrl-C is pressed, once or twice."""
    two = Second(second, first is None)
    one = First(NEVER if first is None else first, two)
    tracer = sys.gettrace()
    gc.disable()
    sys.settrace(two)
    sys.setprofile(one)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
        sys.settrace(tracer)
        gc.enable()
    return one, two


@pytest.fixture(autouse=True)
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def two_layers():
    torch.manual_seed(0)
    model = paramlora.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"*": {"r": 1}})
    with torch.no_grad():
        for p in paramlora.trainable_parameters(model):
            p.normal_()
    return model


def switched_off(model):
    with paramlora.disable_adapters(model):
        pass


def attached(model):
    torch.manual_seed(1)
    paramlora.attach(model, {"*": {"r": 1}}, "other")


ACTS = {
    "attach": attached,
    "merge": paramlora.merge,
    "detach": paramlora.detach,
    "set_adapters": lambda m: paramlora.set_adapters(m, {"default": 0.5}),
    "disable_adapters": switched_off,
}


def run(act, start, *presses):
    """A copy of a model after such a call, how many calls it made, and the second press."""
    model = copy.deepcopy(start)
    one, two = pressed(lambda: act(model), *presses)
    return model, one.count, two


@pytest.mark.skipif(os.name != "posix", reason="presses Ctrl-C as POSIX has it")
@pytest.mark.parametrize("name, twice", [(name, True) for name in ACTS] + [("merge", False)])
def test_ctrl_c_leaves_a_model_as_before_or_as_after(name, twice):
    act, start, harm, first = ACTS[name], two_layers(), [], None
    act(copy.deepcopy(start))
    model, calls, two = run(act, start)
    before, after = picture(start), picture(model)
    if twice:  # the first time while it changes the model, where most is to be put back or ended
        tries = {at: run(act, start, at)[2] for at in range(calls // 10, calls, calls // 10)}
        first, two = max(tries.items(), key=lambda one: len(one[1].seen))
    for second in sorted({moment: at for at, moment in enumerate(two.seen)}.values()):
        model, _, found = run(act, start, first, second)
        now = picture(model)
        sound = found.line and (now == before or now == after)
        if sound and (name != "attach" or now == before):
            act(model)
            sound = picture(model) == after
        harm += [] if sound else [found.line]
    assert two.seen and harm == []


class Switches:
    """Presses when handlers of signals were put in place or back, so often since the begin."""

    def __init__(self, *at):
        self.left, self.count = list(at), 0

    def __call__(self, frame, event, what):
        if event == "c_return" and what is _signal.signal:
            self.count += 1
            if self.count in self.left:
                press(frame)


def handlers_after(*presses):
    """Those that are in place after a block in which no signal disturbs, and how many moves."""
    switches = Switches(*presses)
    sys.setprofile(switches)
    try:
        with undo.undisturbed():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGUSR1)], switches.count


@pytest.mark.skipif(os.name != "posix", reason="presses Ctrl-C as POSIX has it")
def test_no_press_leaves_a_handler_of_ours():
    def own(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, own)
    try:
        sound, count = handlers_after()
        assert sound == [signal.default_int_handler, own] and count >= 4
        for first in range(1, count + 1):
            for second in range(first + 1, count + 2):
                assert handlers_after(first, second)[0] == sound, (first, second)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGUSR1, own)
                assert not undo._Waiting.is_open
    finally:
        signal.signal(signal.SIGUSR1, before)


class Inside:
    """Presses at a call in `WITHIN`, or when one of C ends there; counts them from the begin."""

    def __init__(self, at, second):
        self.at, self.count, self.second = at, 0, second

    def __call__(self, frame, event, _):
        if event in ("call", "c_return") and frame.f_code.co_filename in WITHIN:
            self.count += 1
            if self.count == self.at:
                self.second.counts = True
                press(frame)


def left_after(first=NEVER, second=NEVER):
    """How many blocks of `surely_left` are open after two presses, and when they could come."""
    entered = []

    def leave(kept):
        if kept:
            kept.pop()
            entered.pop()

    def enter(kept):
        kept.append(1)
        entered.append(1)

    two = Second(second, False)
    one, tracer = Inside(first, two), sys.gettrace()
    sys.settrace(two)
    sys.setprofile(one)
    try:
        with undo.surely_left(enter, leave):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
        sys.settrace(tracer)
    return len(entered), one.count, len(two.seen)


@pytest.mark.skipif(os.name != "posix", reason="presses Ctrl-C as POSIX has it")
def test_two_presses_leave_no_block_open():
    still, count, _ = left_after()
    assert still == 0 and count > 30
    places = [count * n // 12 for n in range(1, 13)]
    for first in places:
        later = left_after(first)[2]
        seconds = range(0, later, max(1, later // 40))
        assert [second for second in seconds if left_after(first, second)[0]] == [], first


@pytest.mark.parametrize("presses", [1, 3, 4, 20])
def test_presses_before_signals_wait_leave_no_block_open(presses, monkeypatch):
    """Each when leaving has begun, and before it has signals wait."""
    left, waits, open_ = presses, undo.undisturbed, []

    @contextlib.contextmanager
    def late():
        nonlocal left
        if open_ and left:
            left -= 1
            raise KeyboardInterrupt
        with waits():
            yield

    monkeypatch.setattr(undo, "undisturbed", late)
    with pytest.raises(KeyboardInterrupt):
        with undo.surely_left(
            lambda kept: (kept.append(1), open_.append(1)),
            lambda kept: (kept.clear(), open_.clear()),
        ):
            pass
    assert left == 0 and open_ == []
