"""One process or several: how they start, agree, and keep one result file between runs."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.machine import commit, device
from benchmarks.results import load, save

T = TypeVar("T")
STARTED = time.perf_counter()


def start(timeout: float) -> None:
    """Join torchrun's processes if it started this one; a wait over `timeout` ends them all."""
    if "WORLD_SIZE" not in os.environ:
        return
    if device().type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: T) -> T:
    """The first process's value, in every process."""
    box = [value]
    if processes() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def elapsed(since: float) -> float:
    """Seconds since `since` on the first process, so that all stop at the same step."""
    passed = torch.tensor(time.perf_counter() - since, device=device())
    if processes() > 1:
        dist.broadcast(passed, 0)
    return passed.item()


def together(action: Callable[[], T]) -> T:
    """What `action` gives; out of memory (or failed) in every process if it was in one.

    An action that exchanges nothing can so fail in one process and leave no other waiting. One
    that does exchange relies on all processes holding the same, and on the group's timeout.
    """
    result, reason, kind = None, "", 0
    try:
        result = action()
    except RuntimeError as error:
        reason, kind = str(error), 1 if isinstance(error, torch.OutOfMemoryError) else 2
    worst = torch.tensor(kind, device=device())
    if processes() > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    if worst.item():
        raised = torch.OutOfMemoryError if worst.item() == 1 else RuntimeError
        raise raised(reason or "in another process")
    return result  # type: ignore[return-value]


def resume(folder: "str | Path", kind: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """The content of an earlier run's file, the same in every process, or an empty one.

    `fixed` are the options that all rows of one file share.
    """
    path = Path(folder) / f"{kind}.json"
    empty = {"options": fixed, "processes": processes(), "rows": []}
    found = agreed(load(path) if rank() == 0 and path.exists() else empty)
    there = {**found["options"], "processes": found["processes"]}
    for name, value in {**fixed, "processes": processes()}.items():
        if there.get(name) != value:
            raise SystemExit(
                f"{path}: was made with {name} {there.get(name)}, this run has {value}; "
                "name another folder with --out"
            )
    return found


def is_done(row: "dict[str, Any] | None") -> bool:
    """A row that holds a measurement: a number, or that the memory did not suffice."""
    return row is not None and row.get("outcome", "OOM") == "OOM"


def store(folder: "str | Path", kind: str, content: dict[str, Any]) -> None:
    """The first process writes the file."""
    if rank() == 0:
        save(folder, kind, content)


def origin() -> dict[str, Any]:
    """What a row says of where it was made."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"commit": commit(), "device": name}


def tell(text: str) -> None:
    """A line on the progress, with the seconds since the start."""
    if rank() == 0:
        print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", flush=True)
