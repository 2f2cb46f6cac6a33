"""A sweep on a card of layers' steps in C++, against Python's to the bit."""

import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from paramlora.cuda.native import library
from paramlora.evaluate import functional, rescaled
from paramlora.evaluate.convolution import CONVOLUTIONS, convolution
from tests.cuda.graphs import recorded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]
pytest.importorskip("paramlora.cuda.native.steps", reason="needs Triton")


@pytest.fixture
def both(monkeypatch):
    """Calls of a step with C++ and without, on a card."""
    monkeypatch.setenv("PARAMLORA_NATIVE", "1")
    library.build()
    library.loaded.cache_clear()
    monkeypatch.setattr(functional, "_native", None)
    monkeypatch.setattr(functional, "_started", False)
    functional.start_cpp()
    ours = functional._native
    return lambda call: _both(call, ours)


def _both(call, ours):
    functional._native = None
    want = [call() for _ in range(3)][-1]
    functional._native = ours
    return [call() for _ in range(3)][-1], want


def on_card(rows=(70,), fan_in=64, out=48, r=4, masters=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, fan_in), torch.randn(out, fan_in) / fan_in**0.5
    a, b = torch.randn(r, fan_in) / fan_in**0.5, torch.randn(out, r) / r**0.5
    of = [x.bfloat16(), weight.bfloat16(), torch.randn(out).bfloat16(), a, b, torch.tensor(0.7)]
    of[3:5] = (t.to(masters) for t in of[3:5])
    return [t.cuda() for t in of], torch.randn(*rows, out).bfloat16().cuda()


def step(of, dy, wanted=(0, 3, 4)):
    own = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(of)]
    y = functional.linear(*own, 0.5)
    return y.detach(), *torch.autograd.grad(y, [own[i] for i in wanted], dy)


def same(pair):
    got, want = pair
    assert len(got) == len(want)
    for p, q in zip(got, want):
        assert p.dtype == q.dtype and p.stride() == q.stride() and torch.equal(p, q)


CARD = {
    "small": dict(),
    "a batch": dict(rows=(4, 197), fan_in=1024, out=1024, r=8),
    "rank 16": dict(rows=(2, 1024), fan_in=1280, out=1280, r=16),
    "rank 64": dict(rows=(300,), fan_in=512, out=256, r=64),
    "by blocks": dict(rows=(8192,), fan_in=1024, out=1024, r=8),
    "16-bit factors": dict(masters=torch.bfloat16),
}


def oddly(t):
    """A copy at an address that is no multiple of 16."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


LAID = {
    "as made": lambda of: of,
    "no bias": lambda of: [*of[:2], None, *of[3:]],
    "padded rows": lambda of: [of[0].repeat_interleave(2, 0)[::2], *of[1:]],
    "transposed weight": lambda of: [of[0], of[1].t().contiguous().t(), *of[2:]],
    "transposed B": lambda of: [*of[:4], of[4].t().contiguous().t(), of[5]],
    "odd": lambda of: [oddly(of[0]), *of[1:]],
}  # fmt: skip


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("sizes", CARD)
@pytest.mark.parametrize("wanted", [(0, 3, 4), (3, 4), (0,)], ids=str)
def test_a_step_on_a_card(sizes, laid, wanted, both):
    of, dy = on_card(**CARD[sizes])
    same(both(lambda: step(LAID[laid](of), dy, wanted)))


@pytest.mark.parametrize("magnitude", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("sizes", CARD)
def test_a_rescaled_step_on_a_card(sizes, laid, magnitude, both):
    """DoRA's, whose outputs a magnitude rescales."""
    of, dy = on_card(**CARD[sizes])
    of = [*LAID[laid](of), torch.rand(of[1].shape[0], 1, device="cuda", dtype=magnitude) + 0.5]

    def call():
        own = [
            t if t is None else t.detach().requires_grad_(i in (0, 3, 4, 6))
            for i, t in enumerate(of)
        ]
        y = rescaled.linear(*own)
        with torch.no_grad():
            again = rescaled.linear(*own)
        return y.detach(), again, *torch.autograd.grad(y, [own[i] for i in (0, 3, 4, 6)], dy)

    same(both(call))


WINDOWS = {1: (1, 0, 1), 2: (2, 0, 1), 3: (1, 1, 1), 5: (1, 4, 2)}  # by a kernel's size
KERNELS = {  # the input, outputs, the kernel, groups
    "1×1": ((4, 320, 32, 32), 320, (1, 1), 1),
    "1×1, sequences": ((4, 96, 77), 64, (1,), 1),
    "3×3": ((2, 64, 24, 24), 96, (3, 3), 1),
    "sequences": ((3, 48, 130), 32, (3,), 1),
    "volumes": ((1, 16, 5, 8, 9), 24, (3, 1, 3), 1),
    "steps of two": ((2, 32, 20, 20), 32, (2, 2), 1),
    "dilated": ((2, 32, 20, 20), 32, (5, 3), 1),
    "single": ((2, 96, 28, 28), 96, (3, 3), 96),
    "single, sequences": ((2, 32, 100), 32, (3,), 32),
}


def kernels_on_card(shape, out, kernel, groups, last):
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().cuda()
    weight = torch.randn(out, shape[1] // groups, *kernel).bfloat16().cuda()
    taps, form = weight[0].numel(), torch.channels_last if last else torch.contiguous_format
    window = (*zip(*(WINDOWS[size] for size in kernel)), groups)
    a, b = torch.randn(8, taps).cuda() / taps**0.5, torch.randn(out, 8).cuda()
    of = [x.contiguous(memory_format=form), weight.contiguous(memory_format=form)]
    of += [torch.randn(out).bfloat16().cuda(), a, b, torch.tensor(0.7).cuda()]
    y = CONVOLUTIONS[len(kernel) - 1](*of[:3], *window)
    return of, torch.randn_like(y), window


@pytest.mark.parametrize("last", (False, True), ids=("first", "last"))
@pytest.mark.parametrize("name", KERNELS)
def test_a_convolution_on_a_card(name, last, both, monkeypatch):
    if last and len(KERNELS[name][2]) != 2:
        pytest.skip("has no such format")
    # or cuDNN's own gradients differ from run to run
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    of, dy, window = kernels_on_card(*KERNELS[name], last)
    own = [t.detach().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(of)]

    def call():
        y = convolution(*own, *window)
        return y.detach(), *torch.autograd.grad(y, [own[0], *own[3:5]], dy)

    same(both(call))
    (ours,), (theirs,) = both(lambda: [type(convolution(*own, *window).grad_fn).__name__])
    if not (last and name == "single"):  # whose planes must lie by themselves
        assert theirs != ours


def test_the_card_is_reached_by_cpp(both):
    of, dy = on_card()
    own = [t.requires_grad_(i in (0, 3, 4)) for i, t in enumerate(of)]
    (ours,), (theirs,) = both(lambda: [type(functional.linear(*own).grad_fn).__name__])
    assert theirs == "_LinearBackward" != ours


def test_two_streams_and_a_checkpoint(both):
    of, dy = on_card((2, 300), 512, 512, 16)

    def streams():
        results, streams = [], [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        for turn in range(8):
            with torch.cuda.stream(streams[turn % 2]):
                results += step(of, dy)
        torch.cuda.synchronize()
        return results

    def checkpointed():
        own = [t.detach().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(of)]
        y = checkpoint(functional.linear, *own, use_reentrant=False)
        return y.detach(), *torch.autograd.grad(y, [own[0], *own[3:5]], dy)

    same(both(streams))
    same(both(checkpointed))


def test_a_cuda_graph_is_left_to_python(both):
    of, dy = on_card((512,), 320, 320, 8)
    own = [t.detach().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(of)]

    def held():
        def one():
            y = functional.linear(*own)
            return y, *torch.autograd.grad(y, [own[0], *own[3:5]], dy)

        with torch.cuda.stream(torch.cuda.Stream()):
            one()
        graph, results = recorded(one)
        graph.replay()
        torch.cuda.synchronize()
        return [t.detach().clone() for t in results]

    same(both(held))


@pytest.mark.parametrize("context", ["autocast", "no_grad", "inference", "another device"])
def test_contexts_on_a_card(context, both):
    of, dy = on_card()
    if context == "another device":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two cards")
        of, dy = [t.to("cuda:1") for t in of], dy.to("cuda:1")
    contexts = {
        "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "another device": torch.enable_grad,
    }

    def call():
        with contexts[context]():
            if context in ("no_grad", "inference"):
                return (functional.linear(*of),)
            return step(of, dy)

    got, want = both(call)
    assert all(torch.equal(*pair) for pair in zip(got, want))
