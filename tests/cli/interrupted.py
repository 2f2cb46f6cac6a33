"""Stops each command by real signals at random moments, and prints what that harms.

Run as ``python interrupted.py PLACE COUNT``; a line of JSON tells the harm and how many were hit.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import paramlora
from paramlora.cli import commands, main  # noqa: F401  so that no child imports them

OUTSIDE = 99  # the exit code of what was stopped where no command runs
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
COMMANDS = (
    "merge base.safetensors a.safetensors -o out.safetensors",
    "merge base.pt a.safetensors -o out.pt",
    "embed base.safetensors a.safetensors -o out.safetensors",
    "extract inside.safetensors -o out.safetensors",
    "convert a.safetensors -o out.safetensors --to kohya",
    "convert a.safetensors -o out --to peft",
    "combine a.safetensors a.safetensors:0.5 -o out.safetensors",
    "resize a.safetensors -o out.safetensors --rank 2",
    "difference base.safetensors tuned.safetensors -o out.safetensors --rank 2 --whole",
    "inspect a.safetensors",
    "targets c.json --model interrupted:net",
)


def net():
    """Layers enough for a command to take a while."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(30)])


def fill():
    """What the commands read."""
    model = net()
    state = model.state_dict()
    safetensors.torch.save_file(state, "base.safetensors")
    torch.save(state, "base.pt")
    safetensors.torch.save_file({k: v + 0.1 for k, v in state.items()}, "tuned.safetensors")
    paramlora.attach(model, {"*": {"r": 4}})
    with torch.no_grad():
        for p in paramlora.trainable_parameters(model):
            p.normal_()
    paramlora.save_adapter(model, "a.safetensors")
    inside = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(inside, "inside.safetensors")
    Path("c.json").write_text(json.dumps({"*": {"r": 4}}))


def left(before):
    """The new files and folders by name, with their content, which is taken away."""
    found = {}
    for name in sorted(set(os.listdir()) - before):
        inside = sorted(Path(name).rglob("*")) if os.path.isdir(name) else [Path(name)]
        found[name] = {str(path): path.read_bytes() for path in inside}
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
    return found


def child(command, ready, said):
    """The command, in a process of its own."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = OUTSIDE
    try:
        os.write(ready, b"1")
        main(command.split())
    except SystemExit as done:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)  # it has ended
        code = done.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def stopped(command, delay, log, number=signal.SIGINT):
    """The exit code, what was said and the time of a command that is stopped after `delay`."""
    ready, write = os.pipe()
    said = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    process = os.fork()
    if not process:
        child(command, write, said)
    os.read(ready, 1)
    start = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(process, number)  # it may have ended, and is not forgotten before the wait
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    took = time.perf_counter() - start
    for handle in (ready, write, said):
        os.close(handle)
    return code, log.read_text(), took


def harm(command, count, before, log):
    """What is wrong after each of `count` stops, and how many came in time."""
    stopped(command, None, log)  # fills the caches of the disk
    left(before)
    code, said, took = stopped(command, None, log)
    whole, found, hits, outside = left(before), [], 0, 0
    assert code == 0, said
    for _ in range(count):
        number = random.choice(list(STOPS))
        code, said, _ = stopped(command, random.random() * took, log, number)
        files, told = left(before), STOPS[number]
        hits += code == told
        sound = (code, said) == (told, "stopped\n") or code == 0 and files == whole
        # stopped once it had done all, and said so
        sound |= code == told and said.endswith("\nstopped\n") and files == whole != {}
        # before the command began, or after it had ended
        out = code == OUTSIDE or code == -signal.SIGTERM and files in ({}, whole)
        sound, outside = sound or out, outside + out
        if not sound or files not in ({}, whole):
            found.append((command, code, said[-300:], {k: list(v) for k, v in files.items()}))
    assert outside <= 1, f"{command}: what stopped it was not caught"
    return found, hits


if __name__ == "__main__":
    place, times = Path(sys.argv[1]), int(sys.argv[2])
    logs = place / "logs"
    (place / "work").mkdir()
    logs.mkdir()
    os.chdir(place / "work")
    torch.set_num_threads(1)
    random.seed(0)
    fill()
    there = {*os.listdir(), "__pycache__"}
    every = [harm(command, times, there, logs / "said") for command in COMMANDS]
    print(json.dumps({"harm": [one for found, _ in every for one in found]}))
    print(json.dumps({"hits": sum(hits for _, hits in every)}))
