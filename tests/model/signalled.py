"""Sends real signals at random times to every operation on every kind of model, and compares.

Run as ``python signalled.py COUNT SEED PLACE``; a line of JSON tells an operation's, by kind: how
many hit.
"""

import copy
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

from tests.model.stopping import picture
from tests.model.test_stops import KINDS, OPERATIONS, operation

armed = False


def interrupt(*_):
    if armed:
        raise KeyboardInterrupt


def pressed(act, model, took):
    """Whether up to three signals stopped a call; all of them have come when this returns."""
    global armed
    delays = [random.random() * took / n for n in range(1, random.choice((2, 4)))]

    def press():
        for delay in delays:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    try:
        presser.start()
        armed = True
        act(model)
        armed = False
        return False
    except KeyboardInterrupt:
        armed = False
        return True
    finally:
        presser.join()


def hits(name, kind, count, place):
    """How many of `count` calls were stopped; each leaves a model as before it or as after it."""
    start, act = operation(name, kind, place)
    before, done = picture(start), copy.deepcopy(start)
    act(copy.deepcopy(start))  # takes longer than all that come later
    begun = time.perf_counter()
    act(done)
    took, after, found = time.perf_counter() - begun, picture(done), 0
    for _ in range(count):
        model = copy.deepcopy(start)
        found += pressed(act, model, took)
        now = picture(model)
        assert now == before or now == after, f"{name} of {kind}: half done"
        if name in ("merge", "detach", "set_adapters") or now == before:
            act(model)
        assert picture(model) == after, f"{name} of {kind}: not the same when repeated"
    return found


if __name__ == "__main__":
    count, seed, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, interrupt)
    warnings.simplefilter("ignore")
    kinds = [kind for kind in KINDS if kind != "quantised" or sys.argv[4:]]
    for name in OPERATIONS:
        random.seed(seed)
        found = {kind: hits(name, kind, count, place) for kind in kinds}
        print(json.dumps([name, found]))
