"""The way to the kernels as custom operators: torch's own checks, and compilers."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates
from tests.evaluate.layers import tensors

pytestmark = pytest.mark.usefixtures("needs_its_device")


@pytest.mark.gpu
@pytest.mark.parametrize("trainable_scale", (0, 1))
def test_compiled_kernels_have_no_break_and_switching_compiles_nothing(trainable_scale):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).to("cuda", torch.bfloat16)
    config = {"re:[01]": {"r": 4, "trainable_scale": trainable_scale}}
    paramlora.attach(model, config)
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.3)
    x = torch.randn(96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    names = [p for p in (x, *paramlora.trainable_parameters(model))]
    for strength in (1.0, 0.3, -2.0):
        paramlora.set_adapters(model, {"default": strength})
        want = torch.autograd.grad(model(x).sum(), names)
        with torch._dynamo.config.patch(error_on_recompile=strength == -2.0):
            y = compiled(x)
        torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02)
        got = torch.autograd.grad(y.sum(), names)
        for a, b in zip(got, want):
            assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm() + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", (0, 1))
def test_the_operators_pass_torchs_own_checks(transposed):
    x, weight, bias, a, b, scale = tensors((96,), 64, 48, 4, "cuda", torch.bfloat16)
    if transposed:
        x, a, b = (t.t().contiguous().t() for t in (x, a, b))
    leaves = [t.requires_grad_() for t in (x, a, b, scale)]
    arguments = (leaves[0], weight, bias, *leaves[1:])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.paramlora.linear.default, arguments, test_utils=tests)
    mask = ([0.1], torch.tensor(7, device="cuda"))
    operator = torch.ops.paramlora.linear.default
    torch.library.opcheck(operator, (*arguments, *mask), test_utils=tests)
    none = (x[:0].detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.paramlora.linear.default, none, test_utils=tests[:2])
    y, kept = torch.ops.paramlora.linear(*arguments)
    values = [t.detach() for t in (torch.randn_like(y), x, weight, a, b, scale, kept)]
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        torch.library.opcheck(
            torch.ops.paramlora.linear_backward.default, (*values, wanted), test_utils=tests[:2]
        )
