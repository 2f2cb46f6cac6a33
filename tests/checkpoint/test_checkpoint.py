"""Embed, extract and merge on state dicts: equal to the live model, and to W + scale·B·A."""

import warnings

import pytest
import torch
from torch import nn

import paramlora
from paramlora import AdapterError, adapter_of, attach, checkpoint
from paramlora.model.attach import updates
from tests.checkpoint.models import MODELS, Tied, equal, sorted_keys, trained

SAME = {"r": 2, "hard": 0, "up_kernel": "same"}


def unchanged(state):
    before = {key: value.clone() for key, value in state.items()}
    return lambda: equal(before, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_files_and_the_live_model_agree_to_the_last_bit(name, dtype):
    base, model = trained(*MODELS[name], dtype)
    adapter, still = adapter_of(model), unchanged(base)
    embedded = checkpoint.embed(base, adapter)
    other = paramlora.attach_adapter(MODELS[name][0]().to(dtype), adapter)
    if name == "started from the weight":  # saved at twice the rank, without a start
        inside = checkpoint.merge(model.state_dict())
        equal(sorted_keys(inside), sorted_keys(checkpoint.merge(base, adapter)))
    else:
        equal(sorted_keys(embedded), sorted_keys(model.state_dict()))
    assert embedded.keys() == other.state_dict().keys()
    other.load_state_dict(embedded, strict=True)
    equal(sorted_keys(embedded), sorted_keys(other.state_dict()))
    back = checkpoint.extract(embedded)
    untouched = unchanged(embedded)
    from_base, from_inside = checkpoint.merge(base, adapter), checkpoint.merge(embedded)
    from_back = checkpoint.merge(base, back)
    live = paramlora.merge(model).state_dict()
    for merged in (from_base, from_inside, from_back):
        equal(merged, live)
    still(), untouched()


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_is_the_dense_sum(name):
    base, model = trained(*MODELS[name], torch.float64)
    merged = checkpoint.merge(base, adapter_of(model))
    for path, value in adapter_of(model).whole.items():
        key = f"{path}.weight" if f"{path}.weight" in base else path
        assert torch.equal(merged[key], value)
    for path, update in adapter_of(model).updates.items():
        key = f"{path}.weight" if path else "weight"
        key = key if key in base else path
        a, b = update.lora_A.double(), update.lora_B.double()
        product = torch.einsum("...or,...ri->...oi", b, a)
        shape = base[key].shape
        delta = product.T.reshape(shape) if "square" in name else product
        if name in ("transposed conv", "tied") or (name.startswith("started") and path == "1"):
            delta = product.T.reshape(shape)
        want = base[key] + update.scale * delta.reshape(shape)
        torch.testing.assert_close(merged[key], want, rtol=1e-13, atol=1e-13)


def test_tied_tensors_stay_one():
    base, model = trained(*MODELS["tied"])
    updates = adapter_of(model).updates
    assert updates["wte"] is updates["head"]
    merged = checkpoint.merge(base, adapter_of(model))
    assert merged["wte.weight"].data_ptr() == merged["head.weight"].data_ptr()
    back = checkpoint.extract(model.state_dict()).updates
    assert back["wte"] is back["head"]
    # a file that holds a tied tensor once needs it only once
    del base["head.weight"]
    alone = checkpoint.merge(base, adapter_of(model))
    assert torch.equal(alone["wte.weight"], merged["wte.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_weights(dtype):
    base, model = trained(lambda: nn.Sequential(nn.Linear(8, 8)), {"0": {"r": 2, "hard": 0}}, dtype)
    attach(model, {"0": {"r": 3, "scale": 0.1}}, "b")
    attach(model, {"0": {"r": 1}}, "c")
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    a, b, c = (adapter_of(model, name) for name in ("default", "b", "c"))
    merged = checkpoint.merge(base, (a, 0.7), (b, -1.3), (c, 0))
    paramlora.set_adapters(model, {"default": 0.7, "b": -1.3})
    equal(merged, paramlora.merge(model).state_dict())
    want = base["0.weight"].double()
    for adapter, strength in ((a, 0.7), (b, -1.3)):
        u = adapter.updates["0"]
        want = want + strength * u.scale * u.lora_B.double() @ u.lora_A.double()
    close = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(merged["0.weight"].double(), want, rtol=close, atol=close)


def test_two_adapters_inside_merge_together_but_cannot_be_told_apart():
    base, model = trained(*MODELS["linear"])
    attach(model, {"0": {"r": 1}}, "b")
    nn.init.normal_(adapter_of(model, "b").updates["0"].lora_B)
    embedded = checkpoint.embed(checkpoint.embed(base, adapter_of(model)), adapter_of(model, "b"))
    equal(sorted_keys(embedded), sorted_keys(model.state_dict()))
    with pytest.raises(AdapterError, match="0.weight holds 2 updates"):
        checkpoint.extract(embedded)
    equal(checkpoint.merge(embedded), paramlora.merge(model).state_dict())


def test_two_kernels_embed_and_extract_but_do_not_merge():
    for build in (nn.Conv2d, nn.ConvTranspose2d):
        base, model = trained(lambda build=build: nn.Sequential(build(4, 4, 3)), {"0": SAME})
        embedded = checkpoint.embed(base, adapter_of(model))
        equal(sorted_keys(embedded), sorted_keys(model.state_dict()))
        back = checkpoint.extract(embedded)
        assert back.updates["0"].up_kernel == "same" and not back.updates["0"].hard
        for arguments in ((embedded,), (base, back)):
            with pytest.raises(AdapterError, match='0: "up_kernel": "same" is two convolutions'):
                checkpoint.merge(*arguments)


def test_an_adapter_goes_into_another_model_by_its_paths():
    base, model = trained(*MODELS["tied"])
    adapter = adapter_of(model)
    other = Tied()
    other.load_state_dict(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.attach_adapter(other, adapter, "mine")
    assert torch.equal(other.wte.weight, model.wte.weight)
    assert len(list(updates(other))) == 1
    equal(paramlora.merge(other).state_dict(), checkpoint.merge(base, adapter))


def test_a_large_weight_is_summed_in_blocks_with_the_same_result(monkeypatch):
    monkeypatch.setattr("paramlora.update.sum._BLOCK", 7)
    for name in ("linear", "conv", "transposed conv", "experts", "square embedding"):
        test_files_and_the_live_model_agree_to_the_last_bit(name, torch.float32)
        test_a_merge_is_the_dense_sum(name)
