"""Draws masks in Triton's interpreter and prints which inputs are not what torch's operations make
of them; `masks/test_plan` starts it in a process of its own, see `interpreted`."""

import json
import sys

import torch

from paramlora.cuda.masks import plan
from paramlora.cuda.operands import threshold
from paramlora.evaluate.dropout import Drops, masked
from tests.cuda import interpreted

SHAPES = {
    "rows": (70, 200),
    "a vector": (37,),
    "a batch": (2, 3, 20),
    "one": (1, 1),
    "an image": (2, 5, 6, 7),
    "large": (3, 130, 4, 33),
    "a volume": (2, 6, 3, 4, 5),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs():
    for name, shape in SHAPES.items():
        for dtype in (torch.float16, torch.float32, torch.float64):
            x = torch.randn(shape).to(dtype)
            x.view(-1)[0] = float("nan")
            yield f"{name}, {dtype}", x
            if len(shape) in LAST:
                yield f"{name}, {dtype}, channels last", x.to(memory_format=LAST[len(shape)])


def wrong():
    found, seed = [], torch.tensor(7)
    for name, x in inputs():
        for which, start, rate in ((0, 0, 0.1), (1, 0, 0.5), (0, 9, 0.25)):
            got = plan.masked(x, seed, which, start, threshold(rate))
            want = masked(x, Drops((rate,) * 2, (1, 1), seed), which, start)
            same = torch.equal(got.nan_to_num(9), want.nan_to_num(9))
            if not (same and got.stride() == x.stride() and got.dtype == x.dtype):
                found.append(f"{name}, {which}, {start}, {rate}")
    return found


def main():
    interpreted.stand_in_for_the_device()
    found = {"wrong": wrong(), "launched": len(interpreted.launched)}
    strided = torch.randn(6, 8)[:, ::2]
    got = plan.masked(strided, torch.tensor(7), 0, 0, threshold(0.5))
    want = masked(strided.contiguous(), Drops((0.5,), (1,), torch.tensor(7)), 0)
    found["strided"] = torch.equal(got, want)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
