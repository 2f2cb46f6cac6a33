"""A bound forward that something kept while a layer was adapted, called after a merge or detach.

accelerate's hooks keep one, and put it back on the layer when they are removed.
"""

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import lowranks

KINDS = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6).double()),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5).double()),
    "uneven convolution": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"),
        torch.randn(2, 4, 5, 5).double(),
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        torch.ones(2, 4, 5, 5).double(),
    ),
    "embedding": (lambda: nn.Embedding(7, 5), torch.tensor([[1, 6], [0, 3]])),
    "Conv1D": (lambda: conv1d(), torch.randn(3, 6).double()),
}


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


SOFT = [kind for kind in KINDS if kind not in ("embedding", "transposed convolution")]
CASES = [(kind, 1) for kind in KINDS] + [(kind, 0) for kind in SOFT]


@pytest.mark.parametrize("end", ("merge", "detach"))
@pytest.mark.parametrize("kind, hard", CASES)
def test_a_kept_forward_computes_the_layer_as_it_is(kind, hard, end):
    make, x = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make().double())
    plain = model[0](x)
    paramlora.attach(model, {"0": {"r": 2, "hard": hard}})
    for _, _, low in lowranks(model):
        nn.init.normal_(low.lora_B)
    kept, adapted = model[0].forward, model[0](x)
    assert (adapted - plain).abs().max() > 0.1
    getattr(paramlora, end)(model)
    want = adapted if end == "merge" else plain
    torch.testing.assert_close(model[0](x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept(x), want, rtol=1e-12, atol=1e-12)
