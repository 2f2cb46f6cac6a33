"""What diffusers and accelerate do to save memory is done to the weights and not to the updates."""

import copy

import pytest
import torch

pytest.importorskip("peft")


import paramlora
from paramlora.model.attach import updates
from paramlora.update.sharded import take_all
from tests.integrations.unets import BOTH, SOFT, attached, fill, outputs, unet


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("config", (BOTH, SOFT))
@pytest.mark.filterwarnings("ignore")
def test_under_layerwise_casting_the_factors_keep_their_type(config, dtype):
    stored = torch.float8_e4m3fn
    model = fill(paramlora.attach(unet().to(dtype), config))
    factors = {n: p.clone() for n, p in model.named_parameters() if "lora" in n}
    model.enable_layerwise_casting(stored, dtype)
    got = outputs(model, dtype)
    assert model.down_blocks[0].resnets[0].conv2.weight.dtype == stored
    # the reference: the same factors on a base that was rounded once
    plain = unet().to(dtype)
    plain.enable_layerwise_casting(stored, dtype)
    rounded = unet().to(dtype)
    with torch.no_grad():
        for parameter, narrow in zip(rounded.parameters(), plain.parameters()):
            parameter.copy_(narrow.to(dtype))
    fill(paramlora.attach(rounded, config))
    if (
        config is SOFT
    ):  # beside a forward that is somebody's, as casting's, the output stays rounded
        for layer in rounded.modules():
            layer.forward = layer.forward
    want = outputs(rounded, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for _ in range(2):
        after = {n: p for n, p in model.named_parameters() if "lora" in n}
        assert {p.dtype for p in after.values()} == {torch.float32}
        assert all(torch.equal(value, after[name]) for name, value in factors.items())
        assert torch.equal(outputs(model, dtype), got)


@pytest.mark.filterwarnings("ignore")
def test_attached_under_layerwise_casting():
    model = unet()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    model.to(torch.float8_e4m3fn)
    with pytest.raises(paramlora.TargetError, match="float8_e4m3fn: a hard update needs one of"):
        paramlora.attach(model, BOTH)
    model = unet().to(torch.bfloat16)
    other = fill(paramlora.attach(copy.deepcopy(model), SOFT))
    for one in (model, other):
        one.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    fill(paramlora.attach(model, SOFT))
    for (_, _, a), (_, _, b) in zip(updates(model), updates(other)):
        take_all(a.taking(b.plain()))
    want = outputs(other, torch.bfloat16)
    torch.testing.assert_close(outputs(model, torch.bfloat16), want, rtol=0, atol=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


@pytest.mark.parametrize("kind", ("block_level", "leaf_level"))
@pytest.mark.parametrize("config", (BOTH, SOFT))
def test_group_offloading(config, kind):
    model = attached(config)
    want, cpu = outputs(model), torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(outputs(model), want)


@pytest.mark.parametrize("config", (BOTH, SOFT))
def test_accelerates_offloading_is_told_of_the_updates(config):
    accelerate = pytest.importorskip("accelerate")
    model, cpu = attached(config), torch.device("cpu")
    want = outputs(model)
    moved, _ = accelerate.cpu_offload_with_hook(copy.deepcopy(model), cpu)
    assert torch.equal(outputs(moved), want)
    with pytest.raises(paramlora.AdapterError, match="cannot keep an update elsewhere between"):
        accelerate.cpu_offload(model, cpu)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(outputs(model), want)
    accelerate.cpu_offload(paramlora.merge(model), cpu)
    torch.testing.assert_close(outputs(model), want, rtol=1e-4, atol=1e-4)
