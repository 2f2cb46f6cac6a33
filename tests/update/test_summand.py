"""The gradients of a low-rank update in a sum that many read, against autograd's of the formula."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora.errors import AdapterError
from paramlora.model.attach import updates
from paramlora.update.summand import Summand, joined

LAYERS = {
    "matrix": lambda: nn.Linear(4, 6),
    "kernel": lambda: nn.Conv2d(4, 6, (1, 2)),
    "transposed": lambda: nn.Embedding(6, 4),
}


def updated(layer, **entry):
    torch.manual_seed(0)
    model = paramlora.attach(nn.Sequential(layer.double()), {"0": {"r": 2, "scale": 0.7, **entry}})
    ((*_, update),) = updates(model)
    nn.init.normal_(update.lora_B)
    return model, update


@pytest.mark.parametrize("strength", [1.0, -0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_each_gradient_is_that_of_the_formula(name, strength):
    model, update = updated(LAYERS[name](), trainable_scale=1)
    paramlora.set_adapters(model, {"default": strength})
    grad = torch.randn(model[0].weight.shape, dtype=torch.float64)
    a, b, scale = (
        t.detach().clone().requires_grad_()
        for t in (update.lora_A, update.lora_B, update.lora_scale)
    )
    delta = strength * scale * b @ a
    delta = delta.t() if name == "transposed" else delta
    want = torch.autograd.grad((delta.reshape(grad.shape) * grad).sum(), (a, b, scale))
    for one, other in zip(Summand(update).gradients(grad), want, strict=True):
        torch.testing.assert_close(one, other)


def test_of_a_stack_each_matrix_has_its_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 4))

    torch.manual_seed(0)
    model = paramlora.attach(Experts().double(), {"w": {"r": 2}})
    ((*_, update),) = updates(model)
    nn.init.normal_(update.lora_B)
    grad = torch.randn(3, 6, 4, dtype=torch.float64)
    da, db, dscale = Summand(update).gradients(grad)
    for e in range(3):
        torch.testing.assert_close(da[e], update.lora_B[e].detach().t() @ grad[e])
        torch.testing.assert_close(db[e], grad[e] @ update.lora_A[e].detach().t())
    torch.testing.assert_close(dscale, ((update.lora_B @ update.lora_A).detach() * grad).sum())


def test_a_start_from_the_weight_is_taken_out_by_a_rank_behind():
    a, b, start_a, start_b = (torch.randn(s).double() for s in ((2, 4), (6, 2), (2, 4), (6, 2)))
    both_a, both_b = joined(a, b, start_a, start_b)
    torch.testing.assert_close(both_b @ both_a, b @ a - start_b @ start_a)
    assert joined(a, b, None, None) == (a, b)


def test_an_update_that_has_changed_since_is_refused():
    model, update = updated(nn.Linear(4, 6))
    summand, grad = Summand(update), torch.ones(6, 4).double()
    summand.gradients(grad)
    with torch.no_grad():
        update.lora_A.add_(1)
    with pytest.raises(AdapterError, match="changed between forward and backward. Call backward"):
        summand.gradients(grad)
