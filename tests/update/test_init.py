"""How the factors start: at random, or from the weight's own directions."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

import paramlora
from paramlora import TargetError
from paramlora.model.attach import updates
from tests.update.weights import CLOSE, as_weight

pytestmark = pytest.mark.usefixtures("one_seed")


def one(init, r=2, layer=None, **options):
    """A float64 model of one layer, its update, and the weight's matrix [out, in]."""
    model = nn.Sequential(layer or nn.Linear(8, 6)).double()
    weight = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": r, "init": init, **options}})
    ((_, _, low),) = updates(model)
    return model, low, weight


def test_kaiming_is_uniform_with_the_bound_of_the_fan_in():
    _, low, _ = one("kaiming", 40, nn.Linear(400, 50))
    a = low.lora_A.detach()
    assert a.abs().max() <= 1 / math.sqrt(400)
    # Var U(-b, b) = b²/3; 16,000 draws put the estimate within 3 %
    assert abs(a.var().item() * 3 * 400 - 1) < 0.03
    assert not low.lora_B.any()


def test_orthogonal_rows_are_orthonormal():
    _, low, _ = one("orthogonal", 3)
    torch.testing.assert_close(low.lora_A @ low.lora_A.T, torch.eye(3).double(), **CLOSE)
    assert not low.lora_B.any()


@pytest.mark.parametrize("scale", (1.0, 2.5, -0.5))
def test_pissa_leaves_the_minor_singular_values(scale):
    _, low, weight = one("pissa", 2, scale=scale)
    residual = weight - scale * low.lora_B @ low.lora_A
    want, left = torch.linalg.svdvals(weight), torch.linalg.svdvals(residual)
    torch.testing.assert_close(left[:4], want[2:], **CLOSE)
    torch.testing.assert_close(left[4:], torch.zeros(2).double(), **CLOSE)
    # both factors hold the same half of the singular values
    gram = low.lora_B.T @ low.lora_B
    torch.testing.assert_close(gram, (want[:2] / abs(scale)).diag(), **CLOSE)
    torch.testing.assert_close(low.lora_A @ low.lora_A.T, gram, **CLOSE)


def test_olora_is_orthonormal_and_takes_out_the_first_columns():
    _, low, weight = one("olora", 3)
    torch.testing.assert_close(low.lora_B.T @ low.lora_B, torch.eye(3).double(), **CLOSE)
    assert torch.equal(low.lora_A, low.lora_A.triu())
    residual = weight - low.lora_B @ low.lora_A
    torch.testing.assert_close(residual[:, :3], torch.zeros(6, 3).double(), **CLOSE)
    assert residual[:, 3:].abs().max() > 0.01
    torch.testing.assert_close(low.lora_B.T @ residual, torch.zeros(3, 8).double(), **CLOSE)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(5, 8), 1),
    "linear, soft": (lambda: nn.Linear(8, 6), lambda: torch.randn(5, 8), 0),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5), 1),
    "conv, soft": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5), 0),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(2, 4, 5), 1),
    "transposed, soft": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(2, 4, 5), 0),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.arange(9), 1),
}


def as_matrix(layer, weight):
    """[out, in], written here anew."""
    if isinstance(layer, (nn.Embedding, nn.ConvTranspose1d)):
        return weight.reshape(weight.shape[0], -1).T
    return weight.reshape(weight.shape[0], -1)


@pytest.mark.parametrize("init", ("pissa", "olora"))
@pytest.mark.parametrize("kind", LAYERS)
def test_training_is_the_papers_on_its_changed_base(init, kind, tmp_path):
    make, data, hard = LAYERS[kind]
    x, scale = data(), 1.5
    x = x.double() if x.is_floating_point() else x
    model, low, weight = one(init, 2, make(), scale=scale, hard=hard)
    plain = copy.deepcopy(paramlora.detach(copy.deepcopy(model)))
    assert torch.equal(plain[0].weight, weight)
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    # the paper: the factors leave the base once, and train from there
    a, b = low.lora_A.detach().clone(), low.lora_B.detach().clone()
    if init == "pissa":
        u, s, v = torch.linalg.svd(as_matrix(plain[0], weight), full_matrices=False)
        torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ v[:2] / scale, **CLOSE)
    residual = weight - as_weight(plain[0], scale * b @ a, weight.shape)
    reference = [t.requires_grad_() for t in (a, b)]
    ours = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(reference, lr=0.05, momentum=0.9)
    for _ in range(4):
        dense = residual + as_weight(plain[0], scale * b @ a, weight.shape)
        y = torch.func.functional_call(plain, {"0.weight": dense}, (x,))
        for optimizer, out in ((ours, model(x)), (theirs, y)):
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(low.lora_A, a, **CLOSE)
    torch.testing.assert_close(low.lora_B, b, **CLOSE)
    dense = residual + as_weight(plain[0], scale * b @ a, weight.shape)
    assert (dense - weight).abs().max() > 1e-3

    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert '"init"' not in file.metadata()["paramlora"]
        saved = {key: file.get_tensor(key) for key in file.keys()}
    product = scale * saved["0.lora_B"] @ saved["0.lora_A"]
    torch.testing.assert_close(weight + as_weight(plain[0], product, weight.shape), dense, **CLOSE)
    loaded = paramlora.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)
    for adapted in (model, loaded):
        back = paramlora.detach(copy.deepcopy(adapted))
        assert torch.equal(back[0].weight, weight)
        merged = paramlora.merge(copy.deepcopy(adapted))
        torch.testing.assert_close(merged[0].weight, dense, **CLOSE)

    again, other, _ = one(init, 2, make(), scale=scale, hard=hard)
    again.load_state_dict(plain.state_dict())
    paramlora.load_adapter_state_dict(again, saved)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in low.state_dict().items())
    with paramlora.disable_adapters(model):
        assert torch.equal(model(x), plain(x))


def test_a_stack_starts_matrix_by_matrix():
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 6, 5))}).double()
    weight = model["w"].detach().clone()
    paramlora.attach(model, {"w": {"r": 2, "init": "pissa"}})
    ((_, _, low),) = updates(model)
    for i in range(3):
        u, s, v = torch.linalg.svd(weight[i])
        want = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close(low.lora_B[i] @ low.lora_A[i], want, **CLOSE)


@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_what_such_a_start_cannot_have(init):
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(TargetError, match="saved at twice its rank.*r of at most 3"):
        paramlora.attach(model, {"0": {"r": 4, "init": init}})
    with torch.device("meta"):
        lazy = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(TargetError, match="of a weight on the meta device"):
        paramlora.attach(lazy, {"0": {"r": 2, "init": init}})
    assert type(model[0]) is type(lazy[0]) is nn.Linear
