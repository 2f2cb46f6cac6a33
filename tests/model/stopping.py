"""Stops a call at every line of the package that it runs, and compares what is left of a model."""

import copy
import gc
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

PACKAGE = str(Path(paramlora.__file__).parent)
PLAIN = (int, float, str, bool, type(None))


def picture(model):
    """Everything that an operation might leave half changed, tensors by their bits."""
    modules = [
        (
            path,
            type(m),
            sorted(set(vars(m)) - {"_flat_weights"}),
            [(n, p.requires_grad) for n, p in m._parameters.items() if p is not None],
            list(m._buffers),
            [f.__name__ for f in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())],
            [n for n, _ in m.named_children()],
            {k: v for k, v in vars(m).items() if isinstance(v, PLAIN)},
            m.config.to_dict() if hasattr(getattr(m, "config", None), "to_dict") else None,
        )
        for path, m in model.named_modules()
    ]
    bits = {k: bits_of(v) for k, v in model.state_dict().items() if torch.is_tensor(v)}
    rnns = (m for m in model.modules() if isinstance(m, nn.RNNBase))
    flat = [[getattr(m, name) for name in m._flat_weights_names] for m in rnns]
    strengths = [(path, u.adapter, u.strength, u.gain.item()) for path, _, u in updates(model)]
    flat = [[*map(bits_of, tensors)] for tensors in flat]
    first = {}
    tied = [first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)]
    return modules, bits, flat, strengths, tied, gc.isenabled()


def bits_of(tensor):
    """A tensor as what Python compares at once: its type, its shape and its bytes."""
    flat = tensor.detach().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


class Stop(BaseException):
    pass


def inside(code, within):
    # that one has signals wait, raises nothing itself, and is tried by test_stops_pressed.py
    return code.co_filename.startswith(within) and code.co_name != "undisturbed"


class Lines:
    """Keeps the lines that Python runs inside of some folders."""

    def __init__(self, within):
        self.within, self.lines = within, []

    def __call__(self, frame, event, _):
        return self.line if inside(frame.f_code, self.within) else None

    def line(self, frame, event, _):
        if event == "line":
            self.lines.append((frame.f_code, frame.f_lineno))
        return self.line


def at(code, number, visit):
    """What raises when a line runs for the n-th time; it follows the line's function alone, since
    to follow each takes as long again as the call."""
    left = visit

    def called(frame, event, _):
        if frame.f_code is code:
            return line
        frame.f_trace_lines = False  # or Python gets ready to tell every line, and then does not
        return None

    def line(frame, event, _):
        nonlocal left
        if event == "line" and frame.f_lineno == number:
            left -= 1
            if left == 0:
                sys.settrace(None)  # what puts back runs at its own speed
                raise Stop
        return line

    return called


def moments(call, within=PACKAGE):
    """When to stop a call: the first time that each line runs, and its last."""
    trace = Lines(within)
    run(trace, call)
    times = {}
    for time, line in enumerate(trace.lines):
        times.setdefault(line, []).append(time)
    ends = {(found[i], *line, n) for line, found in times.items() for i, n in visits(found)}
    return [moment for _, *moment in sorted(ends, key=lambda end: end[0])]


def visits(found):
    """Places in a list of times, and which visits they are, from 1."""
    return ((0, 1), (-1, len(found)))


def stopped(moment, call):
    """Whether `call` was stopped at a moment; its warnings are not the matter here."""
    return run(at(*moment), call)


def run(trace, call):
    tracer = sys.gettrace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.disable()  # the collector would run lines of its own, at another moment each time
        sys.settrace(trace)
        try:
            call()
        except Stop:
            return True
        finally:
            sys.settrace(tracer)
            gc.enable()
            # a line at which a block of torch's is left can be stopped here, where a signal cannot
            torch.set_grad_enabled(True)
    return False


def check_stops(name, start, act, within=PACKAGE):
    """Stopped at each line: as before or as after, and the same when it is done again.

    A model that is as before is stopped at the next line, too, and each tenth is let end: whatever
    the stops have left behind that no picture shows, what is done then tells.
    """
    before = picture(start)
    first = copy.deepcopy(start)  # fills the caches, traced as the others are, which run on less
    moments(lambda: act(first), within)
    whole = copy.deepcopy(start)
    times = moments(lambda: act(whole), within)
    after, halves = picture(whole), 0
    assert before != after
    model = copy.deepcopy(start)
    for index, line in enumerate(times):
        assert stopped(line, lambda model=model: act(model))
        now = picture(model)
        done = now == after
        assert done or now == before, f"line {line} of {name}"
        halves += done
        if done and not name.startswith(("merge", "detach")):  # nothing to do again
            model = copy.deepcopy(start)
        elif done or index % 10 == 9:
            act(model)
            assert picture(model) == after, f"repeated after line {line} of {name}"
            model = copy.deepcopy(start)
    assert len(times) > 20
    if name.startswith("merge"):
        assert halves > 10  # what stopped it once it had begun did not keep it from its end
