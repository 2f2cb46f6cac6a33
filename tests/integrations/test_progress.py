"""The size of each update against its weight, as a dense float64 reference has it."""

import math

import pytest
import torch
from torch import nn

import paramlora
from paramlora.integrations.progress import log_updates, update_norms
from paramlora.model.attach import updates


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 4))


CASES = {
    "linear": (lambda: nn.Linear(6, 5), {"0": {"r": 2, "alpha": 4}}),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"0": {"r": 2, "scale": -0.5}}),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), {"0": {"r": 2}}),
    "embedding": (lambda: nn.Embedding(7, 4), {"0": {"r": 2}}),
    "soft": (lambda: nn.Linear(6, 5), {"0": {"r": 2, "hard": 0, "scale": 3}}),
    "pissa": (lambda: nn.Linear(6, 5), {"0": {"r": 2, "init": "pissa"}}),
    "dora": (lambda: nn.Linear(6, 5), {"0": {"r": 2, "kind": "dora"}}),
    "stack": (Experts, {"0.w": {"r": 2}}),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        {"0": {"r": 2}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_norms_are_those_of_the_dense_weights(name):
    torch.manual_seed(0)
    make, config = CASES[name]
    model = nn.Sequential(make()).double()
    tensor = "w" if name == "stack" else "weight"
    before = getattr(model[0], tensor).detach().clone()
    paramlora.attach(model, config)
    ((path, norm),) = update_norms(model).items()
    assert norm < 1e-9 and path == ("0.w" if name == "stack" else "0")
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    paramlora.set_adapters(model, {"default": 0.7})
    (norm,) = update_norms(model).values()
    after = getattr(paramlora.merge(model)[0], tensor)
    assert norm == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-9)


def test_whole_tensors_ties_and_adapters_are_told_apart():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    start = model["c"].bias.detach().clone()
    paramlora.attach(model, {"re:[ab]": {"r": 2}, "c.bias": {"whole": True}})
    paramlora.attach(model, {"c": {"r": 1}}, "second")
    with torch.no_grad():
        model["c"].parametrizations.bias[0].lora_whole.mul_(3)
    assert set(update_norms(model)) == {"a", "b", "c.bias"}
    assert update_norms(model)["c.bias"] == pytest.approx(2, rel=1e-6) and start.any()
    assert update_norms(model, "second") == {"c": 0.0}
    with paramlora.disable_adapters(model):
        assert update_norms(model)["c.bias"] == 0
    with pytest.raises(paramlora.AdapterError, match='no adapter "third" is attached'):
        update_norms(model, "third")


def test_a_weight_of_zeros_and_two_kernels():
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(2, 2, 3))
    nn.init.zeros_(model[0].weight)
    config = {"0": {"r": 1}, "1": {"r": 1, "hard": 0, "up_kernel": "same"}}
    paramlora.attach(model, config)
    with torch.no_grad():
        model[0].parametrizations.weight[0].lora_B.fill_(1)
    assert update_norms(model) == {"0": math.inf}


def test_a_quantised_base_is_measured_as_what_it_stands_for():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    dense = model[0].weight.dequantize().double()
    paramlora.attach(model, {"0": {"r": 2, "hard": 0}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    update = low.lora_B.double() @ low.lora_A.double()
    assert update_norms(model)["0"] == pytest.approx((update.norm() / dense.norm()).item(), 1e-5)


def test_statistics_are_measured_and_counts_left_out():
    model = paramlora.attach(nn.Sequential(nn.BatchNorm1d(3)), {"0": {"whole": True}})
    model(torch.randn(8, 3) + 5)
    norms = update_norms(model)
    assert set(norms) == {"0", "0.bias", "0.running_mean", "0.running_var"}
    assert norms["0"] == 0 and norms["0.running_mean"] == math.inf and norms["0.running_var"] > 0


def test_they_are_written_one_by_one():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"re:.": {"r": 1}})
    told = []
    log_updates(model, lambda *one: told.append(one), 7)
    assert told == [("update/0", 0.0, 7), ("update/1", 0.0, 7)]
