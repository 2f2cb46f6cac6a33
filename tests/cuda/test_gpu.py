"""A sweep of training and merging on a CUDA device: factors are born there, and results match a
float64 reference."""

import copy

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def net():
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 16))


@pytest.mark.parametrize("hard", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_and_merging_on_the_device(hard, dtype):
    torch.manual_seed(0)
    model = net().to("cuda", dtype)
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"0": {"r": 2, "hard": hard}, "2": {"r": 4, "hard": hard}})
    x = torch.randn(8, 4, 4, 4, device="cuda", dtype=dtype)
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _, _, low in updates(model):
        assert low.lora_A.is_cuda
        assert low.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = {}
    for path, _, low in updates(model):
        base = plain.get_submodule(path).weight.double()
        update = (low.lora_B.double() @ low.lora_A.double()).reshape(base.shape)
        assert update.abs().max() > 0
        want[path] = base + update
    before = model(x)
    paramlora.merge(model)
    for path, weight in want.items():
        got = model.get_submodule(path).weight
        # one rounding to the weight's type; float32 sums may land on the other side of a tie
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), weight, rtol=unit, atol=unit * 1e-3)
    close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(model(x), before, **close)


def test_an_adapter_file_loads_onto_the_device(tmp_path):
    model = paramlora.attach(net().cuda(), {"2": {"r": 4}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    plain = net().cuda()
    plain.load_state_dict(paramlora.detach(copy.deepcopy(model)).state_dict())
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    paramlora.load_adapter(plain, tmp_path / "a.safetensors")
    x = torch.randn(2, 4, 4, 4, device="cuda")
    assert torch.equal(model(x), plain(x))
