"""Compiles the 16-bit CUDA kernels of layers for a device that need not be there, for
`compiled_all`.

The interpreter, which `interpreted` runs them in, sees no types, and neither what fits a device.
Nothing is computed, so the sizes are those of real layers.
"""

import functools
import re
import subprocess
import tempfile

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from paramlora.cuda.convolution import plan as joined
from paramlora.cuda.depthwise import plan as depthwise
from paramlora.cuda.device import Card
from paramlora.cuda.embedding import plan as tables
from paramlora.cuda.launch import Block, Launch
from paramlora.cuda.linear import plan as fused
from paramlora.cuda.masks import plan as masks
from paramlora.cuda.operands import Drop, Operands
from paramlora.cuda.sum import plan as summed
from tests.cuda import interpreted

aten = torch.ops.aten
NAMES = {
    **{torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"},
    **{torch.int32: "i32", torch.int64: "i64"},
}
LAYERS = [(8192, 4096, 4096, 16), (64, 4096, 4096, 64)]  # rows, in, out, rank
HOPPER = [(16384, 320, 320, 32), (70, 317, 211, 5)]
WIDE = [(8192, 1024, 1024, 128), (300, 512, 256, 256)]  # and eager


class Uncomputed(TorchDispatchMode):
    """Convolutions between the kernels give memory that nobody fills, laid out as theirs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (aten.convolution.default, aten.convolution_backward.default):
            return func(*args, **(kwargs or {}))
        return tree_map_only(torch.Tensor, empty, func(*tree_map_only(torch.Tensor, meta, args)))


def empty(t, device="cpu"):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


meta = functools.partial(empty, device="meta")


def source(kernel, arguments):
    """What Triton specialises on: types, integers that are 1, and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        one = value == 1 and not parameter.do_not_specialize if isinstance(value, int) else False
        name = "i64" if isinstance(value, int) and value >= 2**31 else "i32"
        if parameter.is_constexpr or one:
            name, constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            name = f"*{NAMES[value.dtype]}"
        elif isinstance(value, Block):
            shape = ",".join(map(str, value.block_shape))
            name = f"tensordesc<{NAMES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, float):
            name = "fp32"
        even = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, torch.Tensor) or (even and name != "constexpr"):
            attributes[(i,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = name
    return ASTSource(kernel, signature, constants, attributes)


def registers(done):
    """Of a thread of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        asked = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", told)[1])


def launches_compile(capability):
    """Each kernel compiles where it would start; what a block of each takes, as it is filled."""
    taken = {}

    def compiled(self, pointers, addresses, values=()):
        blocks = [*map(Block, pointers, self.layouts)]
        arguments = (*blocks, *pointers[len(blocks) :], *values, *self.tail)
        ones = tuple((n == 1, n % 16 == 0) for n in self.numbers)
        types = tuple(str(t.dtype) for t in pointers)
        family = self.kernel.fn.__module__.split(".")[-2]
        name = f"{family}.{self.kernel.__name__}"
        key = f"{name} {(self.constants, ones, types, *self.options.items())}"
        if key not in taken:
            target = GPUTarget("cuda", capability, 32)
            done = compile_for(
                source(self.kernel, arguments), target=target, options=dict(self.options)
            )
            taken[key] = done.metadata.shared, done.metadata.num_warps, registers(done)

    interpreted.stand_in_for_the_device()
    Launch.__call__ = compiled
    return taken


def launch(capability, few):
    """Every kernel, or a few of each operation."""
    hopper = 90 <= capability < 120
    for planned in (fused, joined):
        planned.card = lambda device: Card(divmod(capability, 10), 132)
    if few:
        linear(64, 4096, 4096, 16)
        linear(*LAYERS[0])
        linear(*LAYERS[0], Drop((0.1,), torch.zeros((), dtype=torch.int64)))
        if capability < 100:  # see `operands.masks_fit`
            several(2)
        convolution((8, 320, 64, 64), (320, 320, 3, 3), 8)
        single_channels((8, 320, 64, 64), (1, 3), 8)
        added(14336, 4096, 16)
        masked((8, 320, 64, 64))
        looked_up(50000, 1024, 16)
        return
    for interpreted.captured in (False, True):
        more = (HOPPER[1:] if interpreted.captured else HOPPER + WIDE) if hopper else []
        for shape in LAYERS + more:
            linear(*shape)
    for shape in LAYERS[:1] + (HOPPER[1:] if hopper else []):
        linear(*shape, Drop((0.1,), torch.zeros((), dtype=torch.int64)))
    several(4)
    convolution((8, 320, 64, 64), (320, 320, 3, 3), 8)
    convolution((3, 40, 17, 9), (24, 40, 3, 3), 64)
    for shape, kernel, r in (((8, 320, 64, 64), (3, 3), 8), ((2, 96, 56, 56), (7, 7), 64)):
        single_channels(shape, kernel, r)
    for shape in ((14336, 4096, 16), (37, 131, 300)):
        added(*shape)
    for shape in ((8192, 4096), (8, 320, 64, 64), (2, 3, 5, 7)):
        masked(shape)
    for shape in ((50000, 1024, 16), (37, 131, 128)):
        looked_up(*shape)


def several(masks):
    """The layer whose tiles leave the fewest registers, and whose masks have the widest shares."""
    rates = (0.1, 0.2, 0.3, 0.4)[:masks]
    linear(*LAYERS[0][:3], 64, Drop(rates, torch.zeros((), dtype=torch.int64)))


def factors(r, fan_in, out):
    return torch.empty(r, fan_in), torch.empty(out, r), torch.ones(())


def linear(rows, fan_in, out, r, drop=None):
    x, weight, bias = (torch.empty(s).half() for s in ((rows, fan_in), (out, fan_in), (out,)))
    of = Operands(x, weight, bias, *factors(r, fan_in, out))
    y, kept = fused.forward(of, drop=drop)
    fused.backward(torch.empty_like(y), of, kept, 1.0, True, (True, True), drop=drop)


def convolution(shape, weight, r):
    x, weight = torch.empty(shape).half(), torch.empty(weight).half()
    bias, where = torch.empty(len(weight)).half(), ((1, 1), (1, 1), (1, 1))
    of = Operands(x, weight, bias, *factors(r, weight[0].numel(), len(weight)))
    with Uncomputed():
        y, t, _ = joined.forward(of, where)
        joined.backward(torch.empty_like(y), of, t, True, (True, True), where)


def single_channels(shape, kernel, r):
    x, weight = torch.empty(shape).half(), torch.empty(shape[1], 1, *kernel).half()
    where = (1, 1), tuple(k // 2 for k in kernel), (1, 1)
    of = Operands(x, weight, None, *factors(r, weight[0].numel(), len(weight)))
    y, total = depthwise.forward(of, where)
    depthwise.backward(y, of, total, where, True, (True, True, True))


def added(out, fan_in, r):
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.empty(out, fan_in, dtype=dtype)  # memory that nobody touches
        a, b, scale = factors(r, fan_in, out)
        summed.added(weight, a, b, scale)
        summed.added(weight.view(fan_in, out), b.t(), a.t(), scale)  # as transformers' Conv1D


def looked_up(num, dim, r):
    ids, y = torch.zeros(64, dtype=torch.int64), torch.empty(64, dim, dtype=torch.bfloat16)
    a, b, scale = factors(r, num, dim)
    tables.add(y, ids, a, b, scale, 1.0)
    tables.gradient(y, ids, a, b, scale, 1.0)


def masked(shape):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.empty(shape, dtype=dtype)
        masks.masked(x, torch.zeros((), dtype=torch.int64), 0, 0, 0)
        if len(shape) == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            masks.masked(last, torch.zeros((), dtype=torch.int64), 0, 0, 0)
