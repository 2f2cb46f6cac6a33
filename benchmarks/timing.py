"""Times of several steps in one process, interleaved: wall time and the device's own."""

import gc
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median

import torch

Step = Callable[[], object]


def once(step: Step, device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a few calls after two to warm up."""
    step(), step()
    return median(_wall(step, 1, device) for _ in range(repeats))


def eager(
    steps: Mapping[str, Step], device: torch.device, rounds: int = 9, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Milliseconds of wall time for each step, `rounds` of them, a round taking each in turn.

    Args:
        steps: what to time, by name.
        device: synchronised before and after every sample.
        rounds: samples of each step.
        seconds: about how long one sample lasts; a step is repeated to fill it. 0: one call.
    """
    counts = {name: _count(step, device, seconds) for name, step in steps.items()}
    return _rounds(steps, rounds, lambda name: 1e3 * _wall(steps[name], counts[name], device))


def replayed(
    steps: Mapping[str, Step], rounds: int = 9, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Milliseconds of device time for each step that a CUDA graph can hold, from its replay."""
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = capture(step)
        except RuntimeError as reason:
            warnings.warn(f"{name}: no CUDA graph: {reason}", stacklevel=2)
    device = torch.device("cuda")
    counts = {name: _count(graph, device, seconds) for name, graph in graphs.items()}
    return _rounds(graphs, rounds, lambda name: _events(graphs[name], counts[name]))


def enqueued(
    steps: Mapping[str, Step], calls: int = 200, rounds: int = 9
) -> dict[str, list[float]]:
    """Microseconds of Python for each step: calls that return before the device is done.

    Only meaningful for steps so small that the device never holds Python up.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for step in steps.values():
        once(step, device)

    def sample(name: str) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            steps[name]()
        return (time.perf_counter() - start) / calls * 1e6

    return _rounds(steps, rounds, sample)


def capture(step: Step) -> Step:
    """The replay of a CUDA graph of `step`, warmed up beside the main stream as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rounds(
    steps: Mapping[str, Step], rounds: int, sample: Callable[[str], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in steps:
                times[name].append(sample(name))
    finally:
        if collecting:
            gc.enable()
    return times


def _count(step: Step, device: torch.device, seconds: float) -> int:
    """Calls that fill a sample, after two to warm up; a model's step is not timed to find one."""
    one = once(step, device, repeats=5 if seconds else 1)
    return max(1, min(1000, round(seconds / max(one, 1e-7))))


def _wall(step: Step, count: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / count


def _events(step: Step, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count
