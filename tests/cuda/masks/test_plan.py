"""An input's mask in one launch: in Triton's interpreter, and on CUDA, against torch's operations,
which draw the same one."""

import pytest
import torch

import paramlora
from paramlora.evaluate import dropout
from paramlora.evaluate.dropout import Drops, masked
from tests.cuda.started import printed

pytest.importorskip("triton")


def test_a_kernel_draws_what_torch_does():
    found = printed("interpreted_masks", TRITON_INTERPRET="1")
    # seven shapes of three types, three of them in two formats; three masks each
    assert found == {"wrong": [], "launched": (7 + 3) * 3 * 3, "strided": True}


def drawn(x, rate, which, wanted):
    """A masked input and its gradient, with the kernels and without."""
    found = []
    for on in (True, False):
        leaf = x.clone().requires_grad_(wanted)
        with paramlora.kernels(on):
            y = masked(leaf, Drops((rate, rate), (1, 1), torch.tensor(7, device="cuda")), which)
            found.append([y.detach(), *torch.autograd.grad(y, leaf, x)] if wanted else [y])
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((700, 330), (57,), (3, 40, 17, 20), (2, 64, 3, 5, 8)))
def test_on_the_device_it_is_the_same_mask(shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    x = torch.randn(shape, device="cuda").to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    every = [x, x.to(memory_format=formats[x.dim()])] if x.dim() in formats else [x]
    for one in every:
        for wanted in (True, False):
            ours, theirs = drawn(one, 0.25, 1, wanted)
            assert all(map(torch.equal, ours, theirs)) and (ours[0] == 0).any()
            assert ours[0].stride() == one.stride()


@pytest.mark.gpu
def test_the_mask_is_one_launch(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    monkeypatch.setattr(dropout, "dropped", None)  # torch's operations, which are not called
    x = torch.randn(40, 30, device="cuda", requires_grad=True)
    masked(x, Drops((0.5,), (1,), torch.tensor(7, device="cuda")), 0).sum().backward()
    assert 0 < (x.grad == 0).float().mean() < 1
