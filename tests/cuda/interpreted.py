"""Runs the 16-bit CUDA kernels in Triton's interpreter and prints their errors against float64.

`test_interpreted` starts it in a process of its own with ``TRITON_INTERPRET=1``, which Triton reads
when a kernel is defined. Programs of a grid run one after the other there, so it finds wrong
arithmetic, places and masks, but no race; `linear/test_plan` runs on CUDA. float16 alone: the
interpreter cuts off what bfloat16 would round.
"""

import dataclasses
import functools
import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from paramlora.cuda import launch, operators
from paramlora.cuda.convolution import plan as joined
from paramlora.cuda.depthwise import plan as depthwise
from paramlora.cuda.device import Card
from paramlora.cuda.launch import Launch
from paramlora.cuda.linear import kernels as linear_kernels
from paramlora.cuda.linear import plan as fused
from paramlora.cuda.operands import Drop, Operands, Wanted
from paramlora.evaluate.convolution import convolution as convolved
from paramlora.evaluate.dropout import Drops, masked

captured = False
last_first = False  # programs start in the opposite order to their index
launched = []


@triton.jit
def nothing():
    tl.debug_barrier()


def interpret(self, pointers, addresses, values=()):
    """What `Launch.__call__` has the device do."""
    launched.append(self.kernel.fn.__name__)
    aligned = [address % 16 == 0 for address in addresses]
    types = [t.dtype for t in pointers]
    self.first, self.kinds = getattr(self, "first", aligned), getattr(self, "kinds", types)
    # what a compiled kernel counts on
    assert all(now or not then for now, then in zip(aligned, self.first)), "a stale alignment"
    assert types == self.kinds, "stale types"
    described = [TensorDescriptor(t, *of) for t, of in zip(pointers, self.layouts)]
    count = len(described)
    assert [*addresses[:count]] == [t.data_ptr() for t in pointers[:count]]
    rest = zip(pointers[count:], addresses[count:], strict=True)
    placed = [from_address(*one) for one in rest]
    self.kernel[(self.grid,)](*described, *placed, *values, *self.tail)


def from_address(tensor, address):
    """The rest of the tensor's memory from there on."""
    skipped, odd = divmod(address - tensor.data_ptr(), tensor.element_size())
    left = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    assert odd == 0 <= skipped < left, "an address outside its tensor"
    return tensor.as_strided((left - skipped,), (1,), tensor.storage_offset() + skipped)


def start_in_order():
    """Have the interpreter start programs in either order: a device promises none."""
    from triton.runtime.interpreter import interpreter_builder as builder

    dims, index = builder.set_grid_dim, builder.set_grid_idx

    def set_grid_dim(*sizes):
        builder.programs = sizes[0]
        dims(*sizes)

    def set_grid_idx(x, y, z):
        index(builder.programs - 1 - x if last_first else x, y, z)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


def interpret_quickly():
    """Spare the interpreter two thirds of its time, which show nothing here: it patches Triton's
    language anew at each call of a function inside of a kernel, and does all arithmetic of 32 bits
    in 64 too, to see whether the former hold indices, as small as they are in these tests."""
    from triton.runtime import interpreter

    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(language)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def dot_by_16(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product as tensor cores compute it: each instruction adds 16 products and what was there,
    and rounds once."""
    total = d.data.astype(np.float64)
    for k in range(0, a.data.shape[1], 16):
        part = a.data[:, k : k + 16].astype(np.float64) @ b.data[k : k + 16].astype(np.float64)
        total = (total + part).astype(np.float32).astype(np.float64)
    return TensorHandle(total.astype(d.data.dtype), tl.float32)


def stand_in_for_the_device():
    if triton.knobs.runtime.interpret:
        interpret_quickly()
    launch.cuda_device = lambda: -1
    torch.cuda.is_current_stream_capturing = lambda: captured
    mm = torch.mm  # which has no out_dtype on a CPU
    torch.mm = lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype))
    fused.has_kernel = lambda x, weight: 1 in weight.stride()
    for planned in (fused, joined):
        planned.card = lambda device: Card((9, 0), 132)
    operators.served = lambda x: x.dtype == torch.float16
    linear_kernels.gdc_wait = linear_kernels.gdc_launch_dependents = nothing
    launch.cuda_stream = lambda device: 0
    joined.cuda_empty = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    Launch.__call__ = interpret


def lead(*shape):
    return lambda fan_in: torch.randn(*shape, fan_in).half()


INPUTS = {
    "rows": lead(70),
    "one row": lead(1),
    "many rows": lead(300),
    "a batch": lead(2, 3, 20),
    "padded rows": lambda k: lead(2, 33)(2 * k)[..., :k],
    "every other batch": lambda k: lead(4, 33)(k)[::2],
    "a single column": lambda k: torch.randn(1, 7).half().t(),
    "NCHW": lambda k: torch.randn(3, k, 49).half().transpose(1, 2),
    "NCHW, even": lambda k: torch.randn(2, k, 128).half().transpose(1, 2),
    "NCHW, one": lambda k: torch.randn(1, k, 128).half().transpose(1, 2),
    "NCHW, pooled": lambda k: torch.randn(2, k, 128).half().transpose(1, 2),
    "NHWC": lead(2, 128),
    "a vector": lead(),
}
BOTH = (True, True)
LAYERS = [  # input, in, out, rank, transposed weight, wanted gradients: input, factors
    ("rows", 64, 48, 4, False, BOTH),
    ("one row", 1, 1, 1, False, BOTH),
    ("a batch", 40, 136, 17, False, BOTH),
    ("many rows", 128, 272, 16, False, BOTH),
    ("rows", 145, 83, 5, True, BOTH),
    ("a batch", 64, 64, 64, False, BOTH),
    ("rows", 96, 64, 100, False, BOTH),
    ("rows", 96, 64, 200, False, BOTH),
    ("rows", 64, 96, 300, False, BOTH),
    ("padded rows", 64, 32, 3, False, BOTH),
    ("every other batch", 64, 32, 3, False, BOTH),
    ("a single column", 1, 48, 4, False, BOTH),
    ("NCHW", 33, 20, 3, False, BOTH),
    ("NCHW, even", 64, 32, 3, False, BOTH),
    ("NCHW, one", 64, 48, 4, False, BOTH),
    ("NCHW, pooled", 64, 32, 3, False, BOTH),
    ("NHWC", 64, 32, 3, False, BOTH),
    ("a vector", 64, 48, 100, False, BOTH),
    ("NCHW", 33, 20, 100, False, BOTH),
    ("rows", 64, 48, 4, False, (True, False)),
    ("rows", 64, 48, 4, False, (False, True)),
    ("rows", 96, 64, 100, False, (True, False)),
]


def error(got, want):
    return ((got.double() - want).norm() / (want.norm() or 1)).item()


DROPPED = [case for case in LAYERS if case[3] <= 64]  # ranks whose masks the kernels draw
SEVERAL = [  # of which each mask has a share
    (("rows", 64, 48, 32, False, BOTH), (0.3, 0.6)),
    (("one row", 1, 1, 32, False, BOTH), (0.3, 0.6)),
    (("many rows", 145, 272, 64, True, BOTH), (0.5, 0.1)),
    (("a batch", 40, 136, 64, False, BOTH), (0.2, 0.4, 0.6, 0.0)),
    (("NCHW", 33, 20, 32, False, BOTH), (0.3, 0.3)),
    (("rows", 64, 48, 32, False, (True, False)), (0.3, 0.6)),
    (("rows", 64, 48, 32, False, (False, True)), (0.3, 0.6)),
]


def layer(name, fan_in, out, r, transposed, wanted, *rates):
    """Errors of everything that one layer computes, and the kernels that ran. The mask at each
    rate, of an equal share of the ranks, is the one that torch's operations draw."""
    x, image = INPUTS[name](fan_in), name.startswith("N")
    weight = (torch.randn(out, fan_in) / fan_in**0.5).half()
    weight = weight.t().contiguous().t() if transposed else weight
    bias, a, b = torch.randn(out).half(), torch.randn(r, fan_in), torch.randn(out, r)
    a, b, scale = a / fan_in**0.5, b / r**0.5, torch.tensor(0.7)
    dy = torch.randn(*x.shape[:-1], out).half()
    dy = dy[:, :1].expand_as(dy) if name == "NCHW, pooled" else dy
    launched.clear()
    of, drop = Operands(x, weight, bias, a, b, scale), None
    if rates:
        drop = Drop(rates, torch.randint(2**62, ()))
    y, kept = fused.forward(of, 1.5, image, drop)
    got = [y, *fused.backward(dy, of, kept, 1.5, True, wanted, image, drop)]
    moved = kept.new_empty(len(kept) + 1)[1:].copy_(kept)  # as a hook on saved tensors may
    again = fused.backward(dy, of, moved, 1.5, True, wanted, image, drop)
    assert all(p is q or torch.equal(p, q) for p, q in zip(got[1:], again)), "not twice the same"
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    want_y = leaves[0] @ weight.double().T + bias.double()
    shares = leaves[1].split(r // max(1, len(rates))), leaves[2].split(r // max(1, len(rates)), 1)
    for which, (down, up) in enumerate(zip(*shares)):
        seen = leaves[0]
        if rates:
            seen = seen * masked(torch.ones(x.shape), Drops(rates, (), drop.seed), which)
        want_y = want_y + 1.5 * scale.double() * seen @ down.T @ up.T
    want = [want_y.detach(), *torch.autograd.grad(want_y, leaves, dy.double())]
    if image:
        assert y[0].stride(0) == x.stride(1) == 1 or y.is_contiguous() and x.is_contiguous()
        assert got[1] is None or got[1].stride() == x.stride()
    else:
        assert y.is_contiguous()
    named = zip(("y", "x", "A", "B"), got, want)
    return {key: error(mine, true) for key, mine, true in named if mine is not None}


CONVOLUTIONS = [  # input's batch and sizes, weight, rank, stride, padding, dilation
    ((2, 9, 9), (20, 33, 3, 3), 4, 1, 1, 1),
    ((2, 9, 16), (130, 24, 3, 3), 8, 1, 1, 1),
    ((1, 12, 11), (8, 16, 3, 1), 9, (2, 3), (1, 0), 1),
    ((3, 7, 5), (6, 5, 5, 3), 17, 1, (2, 2), (1, 2)),
    ((2, 8, 8), (7, 80, 2, 2), 40, 2, 0, 1),
    ((1, 4, 4), (1, 1, 1, 1), 1, 2, 0, 1),
    ((2, 6, 7), (9, 16, 3, 3), 16, 1, 1, 1),  # no channel is left for the bias
    ((3, 40), (7, 4, 5), 3, 2, 2, 1),
    ((2, 5, 6, 4), (6, 5, 2, 3, 4), 2, 1, (0, 1, 1), 1),
]


def convolution(sizes, shape, r, stride, padding, dilation, last, rate=0.0):
    """Errors of everything that one convolution computes, whose update drops some of its input."""
    (batch, *sizes), (out, inner, *kernel) = sizes, shape
    n, formats = len(kernel), {2: torch.channels_last, 3: torch.channels_last_3d}
    where = tuple((v,) * n if isinstance(v, int) else v for v in (stride, padding, dilation))
    x = torch.randn(batch, inner, *sizes).half()
    fan_in = inner * torch.Size(kernel).numel()
    weight = (torch.randn(shape) / fan_in**0.5).half()
    x = x.to(memory_format=formats[n]) if "x" in last else x
    weight = weight.to(memory_format=formats[n]) if "w" in last else weight
    bias, a = 9 * torch.randn(out).half(), torch.randn(r, fan_in) / fan_in**0.5
    b, scale = torch.randn(r, out).t() / r**0.5, torch.tensor(0.7)
    launched.clear()
    of = Operands(x, weight, bias, a, b, scale)
    drop = Drop((rate,), torch.tensor(7)) if rate else None
    y, t, down = joined.forward(of, where, drop)
    dy = torch.randn(y.shape).half()
    dy = dy.to(memory_format=formats[n]) if "y" in last else dy
    dy = dy[:, :1].expand_as(dy) if "e" in last else dy
    got = [y, *joined.backward(dy, of, t, True, BOTH, where, drop, down)]
    t = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)  # as a hook on saved tensors may
    alone = joined.backward(dy, of, t, True, (False, True), where, drop, down)
    other = joined.backward(dy, of, t, True, (True, False), where, drop, down)
    assert alone[0] is None and other[1] is None, "not wanted"
    again = (other[0], alone[1], other[2])
    assert all(torch.equal(p, q) for p, q in zip(got[1:], again)), "not twice the same"
    assert y.is_contiguous() or {*last} & {*"xw"}
    assert got[1].is_contiguous() or not x.is_contiguous()
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    delta = (scale.double() * leaves[2] @ leaves[1]).reshape(shape)
    conv = getattr(torch.nn.functional, f"conv{n}d")
    seen = leaves[0]
    if drop is not None:
        seen = seen * masked(torch.ones(x.shape), Drops((rate,), (), drop.seed), 0).double()
    want_y = conv(leaves[0], weight.double(), bias.double(), *where) + conv(
        seen, delta, None, *where
    )
    want = [want_y.detach(), *torch.autograd.grad(want_y, leaves, dy.double())]
    return {key: error(*pair) for key, *pair in zip(("y", "x", "A", "B"), got, want)}


DEPTHWISE = [  # input, kernel, rank, stride, padding, dilation
    ((2, 2, 9, 9), (3, 3), 4, 1, 1, 1),
    ((1, 3, 12, 11), (3, 1), 9, (2, 3), (1, 0), 1),
    ((1, 20, 5, 4), (2, 2), 40, 1, (2, 1), (2, 1)),
    ((2, 2, 8, 8), (2, 2), 3, 2, 1, 3),
    ((1, 1, 1, 1), (1, 1), 1, 1, 0, 1),
    ((1, 2, 20, 17), (5, 4), 5, 1, 2, 1),
    ((1, 2, 520), (4,), 2, 1, 3, 1),
    ((1, 1, 40), (31,), 8, 3, 15, 1),
    ((1, 2, 3, 4, 5), (3, 2, 3), 2, (1, 2, 1), (1, 0, 2), (1, 2, 1)),
]


def depth(shape, kernel, r, stride, padding, dilation, last):
    """Errors of everything that a convolution of single channels computes."""
    n, channels, fan_in = len(kernel), shape[1], torch.Size(kernel).numel()
    where = tuple((v,) * n if isinstance(v, int) else v for v in (stride, padding, dilation))
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    x, weight = torch.randn(shape).half(), torch.randn(channels, 1, *kernel).half()
    x = x.to(memory_format=formats[n]) if last else x
    bias, a = 9 * torch.randn(channels).half(), torch.randn(r, fan_in) / fan_in**0.5
    b, scale = torch.randn(r, channels).t() / r**0.5, torch.tensor(0.7)
    launched.clear()
    of = Operands(x, weight, bias, a, b, scale)
    y, total = depthwise.forward(of, where)
    dy = torch.randn(y.shape).half()
    call = functools.partial(depthwise.backward, dy, of)
    got = call(total, where, True, (True, True, True))
    moved = total.new_empty(total.numel() + 1)[1:].view_as(total).copy_(total)
    alone = [call(moved, where, True, tuple(i == j for j in range(3))) for i in range(3)]
    again = (alone[0][0], alone[1][1], *alone[2][2:])
    assert all(torch.equal(p, q) for p, q in zip(got, again)), "not twice the same"
    assert alone[0][1] is alone[1][0] is alone[1][2] is alone[2][0] is None, "not wanted"
    unscaled = call(total, where, False, (False, False, True))[3]
    assert torch.allclose(unscaled * scale, got[3], rtol=1e-5, atol=1e-5)
    assert not last or y.stride() == y.to(memory_format=formats[n]).stride()
    for wrong in ((total[:, 1:], where), (total, tuple((9,) * n for _ in where))):
        with pytest.raises(ValueError, match="belong together .*Run the forward again"):
            call(*wrong, True, (True, True, True))
    leaf, *factors = (t.double().requires_grad_() for t in (x, a, b))
    whole = weight.double() + (scale.double() * factors[1] @ factors[0]).view_as(weight)
    conv = getattr(torch.nn.functional, f"conv{n}d")
    want_y = conv(leaf, whole, bias.double(), *where, channels)
    want = [want_y.detach(), *torch.autograd.grad(want_y, (leaf, whole, *factors), dy.double())]
    got = (y, got[0], got[1].view_as(weight), *got[2:])
    return {k: error(*pair) for k, *pair in zip(("y", "x", "W", "A", "B"), got, want)}


EXTREMES = {  # of A, B, the scale, the input and the output's gradient
    "a large scale": (1e-4, 1.0, 1e5, 1.0, 10.0),
    "a large gradient": (1e-3, 1.0, 1.0, 1e-2, 2000.0),
    "a large A": (1e6, 1e-7, 1.0, 1.0, 1000.0),
    "beyond both ends": (1e-30, 1e28, 1.0, 1.0, 1.0),
    "no B": (1e6, 0.0, 1e5, 1.0, 1.0),
}


def in_range(numbers, kind, scale_too):
    """Errors of what `operators` computes of float16, whose factors alone it could not hold."""
    a_size, b_size, scale, size, gradient = EXTREMES[numbers]
    shape = {"linear": (48, 40), "convolution": (48, 8, 3, 3)}[kind]
    fan_in = torch.Size(shape[1:]).numel()
    weight, a = (0.1 * torch.randn(shape)).half(), a_size * torch.randn(3, fan_in)
    b, scale = b_size * torch.randn(48, 3), torch.tensor(scale)
    x = (size * torch.randn({"linear": (70, 40), "convolution": (2, 8, 6, 6)}[kind])).half()
    where = ((1, 1), (1, 1), (1, 1))
    leaves = [t.double().requires_grad_() for t in (x, a, b, scale)]
    total = weight.double() + (leaves[3] * leaves[2] @ leaves[1]).reshape(shape)
    launched.clear()
    if kind == "linear":
        of = Operands(x, weight, None, a, b, scale)
        y, kept = operators.forward(of, 0.5)
        total = weight.double() + 0.5 * leaves[3] * leaves[2] @ leaves[1]
        want = leaves[0] @ total.T
    else:
        leaf = [t.clone().requires_grad_() for t in (x, a, b, scale)]
        y = convolved(leaf[0], weight, None, *leaf[1:], *where, 1)
        want = torch.nn.functional.conv2d(leaves[0], total, None, *where)
    dy = (gradient * torch.randn(y.shape)).half()
    wanted = Wanted(True, False, False, True, True, scale_too)
    if kind == "linear":
        got = operators.backward(dy, of, 0.5, kept, wanted)
    else:
        got = torch.autograd.grad(y, leaf if scale_too else leaf[:3], dy)
    true = torch.autograd.grad(want, leaves, dy.double())
    named = [("y", y, want), *zip(("x", "A", "B"), got, true)]
    errors = {key: error(mine, real) for key, mine, real in named}
    if scale_too:  # a sum that may cancel
        terms = (true[2].norm() * b.norm() / scale).item()
        errors["scale"] = (got[3].double() - true[3]).abs().item() / (terms or 1.0)
    assert got[1].dtype == a.dtype and got[2].dtype == b.dtype
    return {k: v if v == v else "not a number" for k, v in errors.items()}


def main():
    global captured, last_first
    stand_in_for_the_device()
    start_in_order()
    warnings.simplefilter("error")
    results = {}
    for captured in (False, True):
        for case in LAYERS:
            torch.manual_seed(0)
            errors = layer(*case)
            results[f"{case}, {'captured' if captured else 'eager'}"] = errors, launched[:]
        for case in DROPPED[2:5] if captured else DROPPED:  # the kernels that draw are the same
            torch.manual_seed(0)
            errors = layer(*case, 0.3)
            results[f"dropped {case}, {'captured' if captured else 'eager'}"] = errors, launched[:]
    for case, rates in SEVERAL:
        torch.manual_seed(0)
        results[f"several {case}, {rates}"] = layer(*case, *rates), launched[:]
    captured, last_first = False, True
    for case in LAYERS[3:6]:
        torch.manual_seed(0)
        errors = layer(*case)
        results[f"last first: {case}"] = errors, launched[:]
    captured, last_first = True, False
    for one in CONVOLUTIONS:
        formats = ("", "x", "w", "y", "xwy") if one[2] == 4 else ("", "xwy", "e")
        for last in formats[: 1 if one[1][0] > 128 else None]:  # this one is slow
            if len(one[1]) > 3 or not {*last} & {*"xwy"}:
                torch.manual_seed(0)
                errors = convolution(*one, last)
                results[f"{one}, last: {last}"] = errors, launched[:]
    for one in CONVOLUTIONS[:1] + CONVOLUTIONS[2:]:  # the second is slow
        for last in ("", "xwy") if one[2] == 4 else ("xwy" if one[2] == 17 else "",):
            torch.manual_seed(0)
            errors = convolution(*one, last, 0.3)
            results[f"masked {one}, last: {last}"] = errors, launched[:]
    for case in DEPTHWISE:
        for last in (False, True) if case in DEPTHWISE[:2] else (len(case[0]) == 5,):
            torch.manual_seed(0)
            errors = depth(*case, last)
            results[f"depthwise {case}, last: {last}"] = errors, launched[:]
    for numbers in EXTREMES:
        for kind, scale_too in (("linear", False), ("linear", True), ("convolution", True)):
            torch.manual_seed(0)
            errors = in_range(numbers, kind, scale_too)
            results[f"range: {numbers}, {kind}, {scale_too}"] = errors, launched[:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
