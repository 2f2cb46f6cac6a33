"""Runs layers' steps in C++ with their launches in Triton's interpreter, and prints how they
compare with Python's own steps, to the bit, and with float64.

`native/test_steps` starts it with ``TRITON_INTERPRET=1``. The library is the one that is built; in
place of the driver's functions it is given ones that read the parameters as the driver would, and
have the interpreter run the kernel on them. bfloat16, whose roundings the interpreter cuts off.
"""

import ctypes
import functools
import json
import struct
import sys
import threading
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from paramlora import kernels
from paramlora.cuda import launch, operands, operators
from paramlora.cuda.launch import Launch
from paramlora.cuda.linear import plan, tiles
from paramlora.cuda.native import driver, library, steps
from paramlora.cuda.native.handed import launcher
from paramlora.cuda.rescaled import plan as rescaled_plan
from paramlora.evaluate import convolution as convolutions
from paramlora.evaluate import functional, rescaled
from tests.cuda import interpreted

launches = []  # what C++ launched
left = []  # backwards that C++ left to Python
numbers = set()
known = []  # launches, by the handle of their kernel less one
described = {}  # what the driver was told of the matrix at an address
one_at_a_time = threading.Lock()  # the interpreter knows no threads
SCALARS = {4: "i", 8: "q"}


def kinds_of(single, pointers):
    """A kernel's signature as Triton writes it, with the numbers that are 1 compiled in."""
    memory = ["*bf16" for _ in pointers[len(single.layouts) :]]
    whole = ["constexpr" if n == 1 else "i32" if n < 2**31 else "i64" for n in single.numbers]
    loads = [f"tensordesc<bf16{block}>" for _, _, block in single.layouts]
    values = ("fp32", "i64")[: len(single.ahead) - len(pointers)]
    return [*loads, *memory, *values, *whole, *("constexpr" for _ in single.constants)]


def compiled_kernel(single, pointers):
    """What is read of a kernel that Triton compiled."""
    known.append(single)
    kinds = kinds_of(single, pointers)
    meta = [
        {"swizzle": 3, "block_size": block, "fp4_padded": False} for _, _, block in single.layouts
    ]
    nothing = ("launch_pdl", "launch_cooperative_grid")
    none = ("global_scratch_size", "profile_scratch_size")
    about = dict(num_warps=4, num_ctas=1, shared=16, tensordesc_meta=meta)
    about |= dict.fromkeys(nothing, False) | dict.fromkeys(none, 0)
    source = SimpleNamespace(signature=dict(enumerate(kinds)))
    return SimpleNamespace(function=len(known), src=source, metadata=SimpleNamespace(**about))


def sizes_of(kernel):
    single = known[kernel - 1]
    kinds = kinds_of(single, single.types)
    own = {"i32": [4], "i64": [8], "fp32": [4], "constexpr": [], "*bf16": [8]}
    return sum((own.get(kind, [128, 4, 4, 8, 8]) for kind in kinds), []) + [8, 8]


def told(call):
    """A function for C++ to call: the driver's result, and what went wrong on stderr."""

    def called(*given):
        try:
            call(*given)
            return 0
        except BaseException:
            traceback.print_exc()
            return 1

    return called


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
@told
def launched_from_cpp(config, kernel, places, extra):
    """`cuLaunchKernelEx`: checks what stays the same, and interprets the kernel."""
    single = known[kernel - 1]
    grid = struct.unpack("7I", ctypes.string_at(config, 28))
    assert grid == (single.grid, 1, 1, 128, 1, 1, 16) and extra is None
    launches.append(single.kernel.fn.__name__)
    sizes = sizes_of(kernel)
    places = (ctypes.c_void_p * len(sizes)).from_address(places)
    given = [ctypes.string_at(*pair) for pair in zip(places, sizes)]
    matrices, addresses = [], []
    for layout in single.layouts:
        (address,), rest = struct.unpack("q", given[0][:8]), given[1:5]
        shape, strides, block = layout
        assert [struct.unpack(SCALARS[len(one)], one)[0] for one in rest] == [*shape, *strides]
        assert described[address] == (*shape[::-1], 2 * strides[0], *block[::-1])
        matrix = _at(address, torch.bfloat16, 1 + (shape[0] - 1) * strides[0] + shape[1] - 1)
        matrices.append(matrix)
        addresses.append(address)
        given = given[5:]
    count = len(single.types) - len(matrices)
    for one in given[:count]:
        addresses += struct.unpack("q", one)
    more, rest, values = len(single.ahead) - len(single.types), given[count:-2], ()
    if more:
        (strength, number), rest = rest[:more], rest[more:]
        (strength,), (number,) = struct.unpack("f", strength), struct.unpack("q", number)
        assert number not in numbers
        numbers.add(number)
        values = strength, number
    rest = [struct.unpack(SCALARS[len(one)], one)[0] for one in rest]
    assert rest == [n for n in single.numbers if n != 1] and not any(b"".join(given[-2:]))
    bases = {matrix.data_ptr(): matrix for matrix in matrices}  # of one memory, one tensor
    pointers = [bases.get(a, _at(a, kind)) for a, kind in zip(addresses, single.types)]
    with one_at_a_time:
        interpreted.interpret(single, pointers, addresses, values)


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 12)
@told
def described_by_cpp(out, kind, rank, address, shape, strides, block, steps, *modes):
    """`cuTensorMapEncodeTiled` of a matrix of bfloat16, where a zero pointer reads as None."""
    assert (kind, rank, modes) == (9, 2, (None, 3, 2, None))
    assert struct.unpack("2I", ctypes.string_at(steps, 8)) == (1, 1)
    (step,) = struct.unpack("Q", ctypes.string_at(strides, 8))
    of_matrix = struct.unpack("2Q", ctypes.string_at(shape, 16))
    of_block = struct.unpack("2I", ctypes.string_at(block, 8))
    described[address] = (*of_matrix, step, *of_block)
    ctypes.memmove(out, struct.pack("q", address), 8)


def _at(address, dtype, size=1):
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def launched_from_python(self, pointers, addresses, values=()):
    """`Launch.__call__`, whose kernel is compiled from its second launch on."""
    with one_at_a_time:
        interpreted.interpret(self, pointers, addresses, values)
    if hasattr(self, "types") and self.compiled is None:
        self.compiled = compiled_kernel(self, pointers)
    self.types = [t.dtype for t in pointers]
    self.last = pointers, addresses, values


def launched_by_itself(single):
    """A launch by C++ as `Launch` has it: whether the output is that of its last launch."""
    pointers, addresses, (strength, number) = single.last
    kinds = (*(int for _ in addresses), float, int)
    one = launcher(single.compiled, single.grid, single.layouts, kinds, single.tail)
    out = pointers[2]
    want = out.clone()
    out.zero_()
    launches.clear()
    one(0, *addresses, strength, number + 1)
    return launches == [single.kernel.fn.__name__] and torch.equal(out, want)


def know_bfloat16():
    """Have the interpreter multiply numbers of 16 bits, not the whole numbers that it keeps them
    as, and make them."""
    builder = interpreter.interpreter_builder

    def number(value):
        bits = np.array([value], "float32").view("uint32") >> 16
        return interpreter.TensorHandle(bits.astype("uint16"), tl.bfloat16)

    builder.get_bf16 = number
    dot = builder.create_dot

    def wide(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype("uint32") << 16).view("float32"), tl.float32)

    builder.create_dot = lambda a, b, *others: dot(wide(a), wide(b), *others)


def stand_in():
    know_bfloat16()
    mm = torch.mm
    interpreted.stand_in_for_the_device()
    torch.mm = mm  # these ranks take it without a wider output
    steps.cuda_device, steps.cuda_stream = launch.cuda_device, launch.cuda_stream
    Launch.__call__ = launched_from_python

    def served(x):
        return functional.switched_on() and x.dtype == torch.bfloat16 and type(x) is torch.Tensor

    for module in (operators, functional, rescaled, steps, operands):
        module.served = served
    rescaled_plan.card = plan.card
    convolutions.has_kernel = lambda x, weight: served(x) and 1 in weight.stride()
    calls = {"launch": launched_from_cpp, "describe": described_by_cpp}
    driver.addresses = lambda: {
        name: ctypes.cast(call, ctypes.c_void_p).value for name, call in calls.items()
    }
    driver.sizes_of = sizes_of
    module, in_python = library.loaded(), functional._gradients_of_native

    def backward(*given):
        left.append(given)
        return in_python(*given)

    functional._gradients_of_native = backward
    configure = functools.partial(module.configure, cpu=True)
    given = dict(configure=configure, layer=module.layer, launcher=module.launcher)
    library.loaded = lambda: SimpleNamespace(**given)


def layer(rows=(70,), fan_in=64, out=48, r=4, bias=True):
    """x, weight, bias, A, B, scale, and y's gradient."""
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, fan_in), torch.randn(out, fan_in) / fan_in**0.5
    a, b = torch.randn(r, fan_in) / fan_in**0.5, torch.randn(out, r) / r**0.5
    dy, scale = torch.randn(*rows, out).bfloat16(), torch.tensor(0.7)
    of = [x.bfloat16(), weight.bfloat16(), torch.randn(out).bfloat16(), a, b, scale]
    of[2] = of[2] if bias else None
    return of, dy


def changed(index, change, made=layer, **sizes):
    """A layer with one operand that lies otherwise."""
    of, dy = made(**sizes)
    of[index] = change(of[index])
    return of, dy


def scaled_by(m, **sizes):
    """A layer whose outputs a magnitude rescales."""
    of, dy = layer(**sizes)
    return [*of, m(torch.rand(len(of[1])) + 0.5)], dy


def pointwise(batch=3, sizes=(5, 9), fan_in=64, out=48, r=4, bias=True):
    """The same of a convolution of a kernel of one position."""
    of, dy = layer((batch, *sizes), fan_in, out, r, bias)
    of[0], dy = (t.movedim(-1, 1).contiguous() for t in (of[0], dy))
    of[1] = of[1].view(*of[1].shape, *(1 for _ in sizes))
    return of, dy


def channels_last(weight_too):
    of, dy = pointwise()
    (x, weight, *rest), last = of, {"memory_format": torch.channels_last}
    if weight_too:  # which asks for an x that lies so; this one does not yet
        # as `model.to(memory_format=...)` leaves it: told by the strides alone
        weight = weight.as_strided(weight.shape, (64, 1, 64, 64))
        return [x, weight, *rest], dy
    return [x.contiguous(**last), weight, *rest], dy.contiguous(**last)


WINDOWS = {1: (1, 0, 1), 2: (2, 0, 1), 3: (1, 1, 1), 5: (1, 4, 2)}  # by a kernel's size


def window_of(weight, x):
    """Stride, padding, dilation and groups."""
    axes = zip(*(WINDOWS[size] for size in weight.shape[2:]))
    return (*axes, x.shape[1] // weight.shape[1])


def kernels_of(kernel=(3, 3), sizes=(4, 5), fan_in=8, out=16, r=4, bias=True, single=False):
    """The operands of a convolution; `single`: of one channel each, and
    of few channels, since each is programs of its own."""
    torch.manual_seed(0)
    fan_in, out = (3, 3) if single else (fan_in, out)
    x, inner = torch.randn(2, fan_in, *sizes).bfloat16(), 1 if single else fan_in
    taps = inner * torch.Size(kernel).numel()
    weight = torch.randn(out, inner, *kernel).bfloat16() / taps**0.5
    a, b = torch.randn(r, taps) / taps**0.5, torch.randn(out, r) / r**0.5
    more = torch.randn(out).bfloat16() if bias else None
    of = [x, weight, more, a, b, torch.tensor(0.7)]
    y = convolution_of(weight)(x, weight, None, *window_of(weight, x))
    return of, torch.randn_like(y)


def convolution_of(weight):
    return convolutions.CONVOLUTIONS[weight.dim() - 3]


def last_of(t):
    return t.contiguous(memory_format=torch.channels_last)


def all_last(**sizes):
    """A convolution of which all has its channels last."""
    (x, weight, *rest), dy = kernels_of(**sizes)
    return [last_of(x), last_of(weight), *rest], last_of(dy)


single = functools.partial(kernels_of, single=True)


def oddly(t):
    """A copy at an address that is no multiple of 16."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


LAYERS = {
    "rows": layer,
    "no bias": lambda: layer(bias=False),
    "a batch": lambda: layer((2, 3, 20), 40, 136, 17),
    "one row": lambda: layer((1,), 8, 8, 1),
    "rank 16": lambda: layer((130,), 128, 72, 16),
    "rank 64": lambda: layer((70,), 64, 64, 64),
    "a vector": lambda: layer((), 64, 48),
    "transposed weight": lambda: changed(1, lambda w: w.t().contiguous().t()),
    "16-bit A": lambda: changed(3, torch.Tensor.bfloat16),
    "16-bit B": lambda: changed(4, torch.Tensor.bfloat16),
    "transposed B": lambda: changed(4, lambda b: b.t().contiguous().t()),
    "padded rows": lambda: changed(0, lambda x: x.repeat(1, 2)[:, :64]),
    "every other batch": lambda: changed(0, lambda x: x.repeat(2, 1, 1)[::2], rows=(4, 33)),
    "odd addresses": lambda: changed(0, oddly),
    "by blocks": lambda: layer((130,), 64, 128, 8),
    "images": pointwise,
    "images, no bias": lambda: pointwise(bias=False),
    "sequences": lambda: pointwise(2, (33,), 40, 136, 17),
    "volumes": lambda: pointwise(2, (2, 3, 5), 16, 24, 3),
    "images of one position": lambda: pointwise(7, (1, 1)),
    "channels last": lambda: channels_last(False),
    "channels last by the weight": lambda: channels_last(True),
    "images at odd addresses": lambda: changed(0, oddly, pointwise),
    "every other image": lambda: changed(0, lambda x: x.repeat(2, 1, 1, 1)[::2], pointwise),
    "16-bit factors of images": lambda: changed(3, torch.Tensor.bfloat16, pointwise),
    "kernels": kernels_of,
    "kernels, no bias": lambda: kernels_of(bias=False),
    "kernels of rank 16": lambda: kernels_of(r=16),
    "kernels of rank 17": lambda: kernels_of(r=17, fan_in=40),
    "kernels of sequences": lambda: kernels_of((3,), (19,)),
    "kernels of volumes": lambda: kernels_of((3, 1, 3), (4, 3, 5)),
    "steps of two": lambda: kernels_of((2, 2)),
    "dilated kernels": lambda: kernels_of((5, 3)),
    "kernels, channels last": all_last,
    "kernels, x with its channels last": lambda: changed(0, last_of, kernels_of),
    "kernels, a weight with its channels last": lambda: changed(1, last_of, kernels_of),
    "kernels at odd addresses": lambda: changed(0, oddly, kernels_of),
    "16-bit A of kernels": lambda: changed(3, torch.Tensor.bfloat16, kernels_of),
    "16-bit B of kernels": lambda: changed(4, torch.Tensor.bfloat16, kernels_of),
    "single channels": single,
    "single channels, no bias": lambda: single(bias=False),
    "single channels of sequences": lambda: single((3,), (19,), r=2),
    "single channels of volumes": lambda: single((3, 1, 3), (4, 3, 5)),
    "single channels, steps of two": lambda: single((2, 2)),
    "single channels, dilated": lambda: single((5, 3)),
    "single channels, 16-bit factors": lambda: changed(3, torch.Tensor.bfloat16, single),
    "rescaled": lambda: scaled_by(torch.clone),
    "rescaled, no bias": lambda: scaled_by(torch.clone, bias=False),
    "rescaled batch": lambda: scaled_by(torch.clone, rows=(2, 3, 20), fan_in=40, out=136, r=17),
    "rescaled vector": lambda: scaled_by(torch.clone, rows=()),
    "many rescaled rows": lambda: scaled_by(torch.clone, rows=(9, 40), fan_in=16, out=24),
    "rescaled by blocks": lambda: scaled_by(torch.clone, rows=(130,), fan_in=64, out=128, r=8),
    "a column of magnitudes": lambda: scaled_by(lambda m: m[:, None]),
    "16-bit magnitude": lambda: scaled_by(torch.Tensor.bfloat16),
    "magnitude at an odd address": lambda: scaled_by(oddly),
}  # fmt: skip
STRENGTHS = (1.0, 1, 0.25)
RESCALED = {
    "forward": ["lengths", "forward", "rescale"],
    "backward": ["rescale_backward", "backward"],
}
FUSED = {"forward": ["forward"], "backward": ["backward"]}
JOINED = {"forward": ["prepare", "put", "back"], "backward": ["spread", "back"]}
SINGLE = {"forward": ["add", "forward"], "backward": ["backward", "divide"]}
# a layer of each kind, and the kernels that its passes launch
KINDS = {
    "linear": (functools.partial(layer, (9,), 16, 24), FUSED),
    "rescaled": (lambda: scaled_by(torch.clone, rows=(9,), fan_in=16, out=24), RESCALED),
    "pointwise": (functools.partial(pointwise, 2, (3, 3), 16, 24), FUSED),
    "joined": (kernels_of, JOINED),
    "single": (single, SINGLE),
}


def wanted_of(of):
    """The input, the factors and the magnitude."""
    return (0, 3, 4, *range(6, len(of)))


def leaves_of(of, wanted=None):
    wanted = wanted_of(of) if wanted is None else wanted
    return [None if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(of)]


def computed(of, strength=1.0):
    x, weight = of[:2]
    if len(of) > 6:
        return rescaled.linear(*of[:5], of[5] * strength, of[6])
    if weight.dim() == 2:
        return functional.linear(*of, strength)
    return convolutions.convolution(*of, *window_of(weight, x), strength)


def step(of, dy, strength=1.0, wanted=(0, 3, 4), magnitude=True):
    """y and the gradients, of `functional.linear`, `rescaled.linear`, or `convolution`."""
    wanted = (*wanted, *range(6, len(of))) if magnitude else wanted
    own = leaves_of(of, wanted)
    y = computed(own, strength)
    grads = torch.autograd.grad(y, [own[i] for i in wanted], dy) if wanted else ()
    return y.detach(), *grads


def in_python(call, *given):
    """A call without C++."""
    held, functional._native = functional._native, None
    try:
        return call(*given)
    finally:
        functional._native = held


def compared(call, *given, new=False):
    """Whether C++ and Python give the same, and which of the launches were C++'s; `new`: of kernels
    that were not launched, of which the first two launches are Triton's own."""
    if new:
        call(*given)
    want = in_python(call, *given)
    launches.clear(), left.clear()
    got = call(*given)
    ours, fell = launches[:], len(left)
    same = len(got) == len(want) and all(
        p.dtype == q.dtype and p.shape == q.shape and p.stride() == q.stride() and torch.equal(p, q)
        for p, q in zip(got, want)
    )
    return {"same": same, "launches": ours, "left to Python": fell}, got


def in_float64(of, dy, strength):
    wide = [None if t is None else t.detach().double() for t in of]
    x, weight, bias, a, b, scale, *m = wide
    leaves = [t.requires_grad_() for t in (x, a, b, *m)]
    total = weight + (strength * scale * b @ a).view(weight.shape)
    for magnitude in m:
        total = magnitude.view(-1, 1) * total / total.detach().norm(dim=1, keepdim=True)
    if weight.dim() == 2:
        y = F.linear(x, total, bias)
    else:
        y = convolution_of(weight)(x, total, bias, *window_of(weight, x))
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


# --- what else can happen between a forward and its backward -------------------------------------


def saved_elsewhere(of, dy):
    """Hooks on saved tensors that lay what they keep at odd addresses."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), oddly):
        # of an image Python saves another view, so that another copy lies before the backward
        return tuple(t.contiguous() for t in step(of, dy))


def saved_twice(of, dy):
    """Hooks on saved tensors that give copies as good."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), torch.clone):
        return step(of, dy)


def twice(of, dy):
    own = leaves_of(of)
    y = computed(own)
    wanted = [own[i] for i in wanted_of(of)]
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return *first, *torch.autograd.grad(y, wanted, dy)


def second_order(of, dy):
    own, dy = leaves_of(of), dy.clone().requires_grad_()
    wanted = [own[i] for i in wanted_of(of)]
    grads = torch.autograd.grad(computed(own), wanted, dy, create_graph=True)
    return torch.autograd.grad(sum(g.float().square().sum() for g in grads), [*wanted, dy])


def many_gradients(of, dy):
    own = leaves_of(of)
    wanted = [own[i] for i in wanted_of(of)]
    y = computed(own)
    return torch.autograd.grad(y, wanted, torch.stack([dy, -dy]), is_grads_batched=True)


def off_in_between(of, dy):
    own = leaves_of(of)
    y = computed(own)
    with kernels(False):
        return torch.autograd.grad(y, [own[i] for i in wanted_of(of)], dy)


def checkpointed(of, dy, reentrant=False):
    own = leaves_of(of)
    y = checkpoint(lambda *own: computed(own), *own, use_reentrant=reentrant)
    y.backward(dy)
    return y.detach(), *(own[i].grad for i in wanted_of(of))


def in_threads(of, dy):
    results = [None] * 4

    def run(i):
        results[i] = step(of, dy)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(*pair) for one in results for pair in zip(one, results[0]))
    return results[0]


def without_graph(of, dy):
    with torch.no_grad():
        y = computed(leaves_of(of))
    with torch.inference_mode():
        z = computed(leaves_of(of)).clone()
    assert y.grad_fn is None and not y.requires_grad
    return y, z


def spread_gradient(of, dy):
    own = leaves_of(of)
    computed(own).sum().backward()
    return tuple(own[i].grad for i in wanted_of(of))


def under_autocast(of, dy):
    with torch.autocast("cpu", torch.bfloat16):
        return step(of, dy)


def under_autocast_with_a_wide_bias(of, dy):
    return under_autocast([*of[:2], of[2].float(), *of[3:]], dy)


def in_two_parts(of, dy):
    """Only a part of the gradients, then the others."""
    own = leaves_of(of)
    y, (first, *others) = computed(own), [own[i] for i in wanted_of(own)]
    last = torch.autograd.grad(y, others, dy, retain_graph=True)
    return *last, *torch.autograd.grad(y, [first], dy)


def shown_to_make_fx(of, dy):
    graph = make_fx(lambda x: computed([x, *of[1:]]))(of[0])
    assert len(graph.graph.nodes) > 3, graph.code
    return (graph(of[0]),)


EVENTS = {
    "hooks": (saved_twice, ["forward", "backward"], 0),
    "hooks, odd": (saved_elsewhere, ["forward"], 1),
    "twice": (twice, ["forward", "backward", "backward"], 0),
    "second order": (second_order, ["forward"], 1),
    "many gradients": (many_gradients, ["forward"], 1),
    "off in between": (off_in_between, ["forward"], 1),
    "checkpoint": (checkpointed, ["forward", "forward", "backward"], 0),
    "reentrant checkpoint": (
        functools.partial(checkpointed, reentrant=True), ["forward", "forward", "backward"], 0
    ),
    "threads": (in_threads, 4 * ["forward"] + 4 * ["backward"], 0),
    "no graph": (without_graph, ["forward", "forward"], 0),
    "a spread gradient": (spread_gradient, ["forward"], 1),
    "input alone": (functools.partial(step, wanted=(0,)), [], 0),
    "factors alone": (functools.partial(step, wanted=(3, 4)), ["forward"], 1),
    "one factor": (functools.partial(step, wanted=(0, 4)), ["forward", "backward"], 0),
    "in two parts": (in_two_parts, ["forward", "backward", "backward"], 0),
    "the weight too": (functools.partial(step, wanted=(0, 1, 3, 4)), [], 0),
    "the scale too": (functools.partial(step, wanted=(0, 3, 4, 5)), [], 0),
    "the bias too": (functools.partial(step, wanted=(0, 2, 3, 4)), [], 0),
    "autocast": (under_autocast, ["forward", "backward"], 0),
    "autocast, a wide bias": (under_autocast_with_a_wide_bias, [], 0),
    "make_fx": (shown_to_make_fx, [], 0),
}  # fmt: skip


def said(call):
    """What is raised, by its kind and first words."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors_of(of, dy):
    """What is said of operands that changed since their forward, and of a second backward."""

    def with_graph(change):
        own = leaves_of([None if t is None else t.clone() for t in of])
        y = computed(own)
        return said(lambda: change(y, own))

    def backward(y, own):
        torch.autograd.grad(y, [own[i] for i in wanted_of(of)], dy)

    def in_place(y, own):
        with torch.no_grad():
            own[3].mul_(2)
        backward(y, own)

    def smaller(y, own):
        own[1].data = own[1].data[: len(own[1]) // 2]
        backward(y, own)

    def again(y, own):
        backward(y, own)
        backward(y, own)

    def in_transform(y, own):
        torch.func.grad(lambda x: computed([x, *own[1:]]).float().sum())(own[0].detach())

    return [with_graph(one) for one in (in_place, smaller, again, in_transform)]


def main():
    stand_in()
    warnings.simplefilter("error")
    by_blocks = tiles.tiling

    def tiling(M, N, K, processors, aligned, local, alone):
        if aligned and M == 130 and {N, K} == {64, 128}:
            return tiles.Tiling(64, 64, 64, 8, 3, 4, True)
        return by_blocks(M, N, K, processors, aligned, local, alone)

    tiles.tiling = tiling
    results = {}
    for name, made in LAYERS.items():
        for strength in STRENGTHS if name == "rows" else STRENGTHS[-1:]:
            of, dy = made()
            told, got = compared(step, of, dy, strength, new=True)
            want = in_float64(of, dy, strength)
            told["errors"] = [interpreted.error(*pair) for pair in zip(got, want)]
            results[f"{name}, {strength}"] = told
    assert any(p.tiles.layouts for p in plan._FORWARDS.values()), "no block was described"
    fused = enumerate(one for one in known if one.last[2])  # of steps that draw a number
    alone = {f"{i}, {len(one.layouts)}": launched_by_itself(one) for i, one in fused}
    events, errors = {}, {}
    of, dy = KINDS["rescaled"][0]()
    told, _ = compared(functools.partial(step, magnitude=False), of, dy)
    events["a magnitude that is not trained, rescaled"] = told | {"as planned": [[], 0]}
    for kind, (made, launched_of) in KINDS.items():
        of, dy = made()
        for _ in range(2):
            step(of, dy)
        for name, (call, passes, fell) in EVENTS.items():
            told, _ = compared(call, of, dy)
            launched = [kernel for one in passes for kernel in launched_of[one]]
            events[f"{name}, {kind}"] = told | {"as planned": [launched, fell]}
        errors[kind] = {"cpp": errors_of(of, dy), "python": in_python(errors_of, of, dy)}
    json.dump({"layers": results, "events": events, "errors": errors, "alone": alone}, sys.stdout)


if __name__ == "__main__":
    main()
