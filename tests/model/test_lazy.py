"""A sweep of models whose weights come late (the meta device) or lie on several devices
(accelerate)."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import paramlora
from paramlora import FileError, TargetError
from paramlora.model.attach import updates

CLOSE = dict(rtol=1e-10, atol=1e-10)


def net():
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30)).double()


def lazy():
    with torch.device("meta"):
        return net()


@pytest.mark.parametrize("hard", (1, 0))
def test_an_adapter_starts_when_its_model_gets_memory(hard):
    torch.manual_seed(0)
    plain, x = net(), torch.randn(5, 40).double()
    model = paramlora.attach(lazy(), {"0": {"r": 20, "scale": 0.7, "hard": hard}, "2": {"r": 2}})
    assert all(p.is_meta for p in model.parameters())
    paramlora.set_adapters(model, {"default": 0.5})
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    first = next(low for _, _, low in updates(model))
    assert abs(first.lora_A.std().item() * 20 - 1) < 0.1
    assert not first.lora_B.any() and first.lora_scale == 0.7
    nn.init.normal_(first.lora_B)
    weight = plain[0].weight + 0.5 * 0.7 * first.lora_B @ first.lora_A
    want = plain[2](torch.tanh(nn.functional.linear(x, weight, plain[0].bias)))
    torch.testing.assert_close(model(x), want, **CLOSE)


def test_what_needs_values_is_refused_on_the_meta_device(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = paramlora.attach(net(), {"0": {"r": 2}})
    for _, _, low in updates(trained):
        nn.init.normal_(low.lora_B)
    paramlora.save_adapter(trained, path)
    model = lazy()
    with pytest.raises(FileError, match=r"0\.lora_A lies on the meta device, where values are lo"):
        paramlora.load_adapter(model, path)
    for entry in ({"r": 2, "init": "kaiming"}, {"r": 2, "init": "pissa"}, {"whole": 1}):
        with pytest.raises(TargetError, match="on the meta device|meta device and has no values"):
            paramlora.attach(model, {"0": entry})
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def check_training(model, plain, x):
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
        assert low.lora_A.device == low.lora_B.device
    values = {}
    for path, _, low in updates(model):
        base = plain.get_submodule(path).weight
        values[f"{path}.weight"] = base + (low.lora_B @ low.lora_A).detach().to(base.device)
    want = torch.func.functional_call(plain, values, (x,))
    out = model(x)
    torch.testing.assert_close(out.to(want.device), want, **CLOSE)
    out.square().sum().backward()
    assert all(low.lora_A.grad.abs().max() > 0 for _, _, low in updates(model))
    merged = paramlora.merge(model)
    torch.testing.assert_close(merged(x).to(want.device), want, **CLOSE)


@pytest.mark.parametrize("hard", (1, 0))
def test_accelerates_device_map(hard):
    accelerate = pytest.importorskip("accelerate")
    plain, x = net(), torch.randn(5, 40).double()
    model = accelerate.dispatch_model(
        copy.deepcopy(plain), {"0": "cpu", "1": "cpu", "2": "cpu"}, force_hooks=True
    )
    assert model[0]._hf_hook is not None
    paramlora.attach(model, {"re:[02]": {"r": 3, "hard": hard}})
    check_training(model, plain, x)


@pytest.mark.filterwarnings("ignore")  # accelerate's, of a checkpoint without metadata
@pytest.mark.parametrize("hard", (1, 0))
def test_a_model_that_accelerate_loads_into_empty_weights(hard, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, x = net(), torch.randn(5, 40).double()
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        empty = net()
    assert all(p.is_meta for p in empty.parameters())
    model = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), device_map={"0": "cpu", "1": "cpu", "2": "cpu"}
    )
    paramlora.attach(model, {"re:[02]": {"r": 3, "hard": hard, "init": "kaiming"}})
    check_training(model, plain, x)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("hard", (1, 0))
def test_accelerates_device_map_over_two_devices(hard):
    accelerate = pytest.importorskip("accelerate")
    plain, x = net(), torch.randn(5, 40).double()
    model = accelerate.dispatch_model(copy.deepcopy(plain), {"0": 0, "1": 0, "2": 1})
    paramlora.attach(model, {"re:[02]": {"r": 3, "hard": hard}})
    devices = [low.lora_A.device.index for _, _, low in updates(model)]
    assert devices == [0, 1]
    check_training(model, plain, x)


def test_an_offloaded_layer_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(net(), execution_device="cpu")
    with pytest.raises(TargetError, match='"0" matches 0, which accelerate keeps elsewhere'):
        paramlora.attach(model, {"0": {"r": 2}})
    assert type(model[0]) is nn.Linear


KINDS = {
    "lora": {"r": 2},
    "soft": {"r": 2, "hard": 0},
    "a trained scale": {"r": 2, "trainable_scale": 1},
    **{f"lora of {init}": {"r": 2, "init": init} for init in ("kaiming", "pissa", "orthogonal")},
    "dora": {"r": 2, "kind": "dora"},
    "dora of pissa": {"r": 2, "kind": "dora", "init": "pissa"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 2, "kind": "lokr"},
    "rows": {"rows": [3, 1]},
    "whole": {"whole": 1},
}


@pytest.fixture
def unwritten_memory_is_no_number():
    torch.use_deterministic_algorithms(True)  # which fills it with NaN, and integers with the most
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def trained_and_emptied(request, unwritten_memory_is_no_number):
    """(the layer without an update, the trained one, the same one after the meta device)."""
    torch.manual_seed(0)
    plain = nn.Linear(6, 4).double()
    trained = paramlora.attach(copy.deepcopy(plain), {"weight": request.param})
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(trained):
            parameter.add_(torch.randn_like(parameter))
    emptied = copy.deepcopy(trained).to("meta").to_empty(device="cpu")
    return plain, trained, emptied


def test_every_kind_starts_anew_after_the_meta_device(trained_and_emptied):
    plain, _, model = trained_and_emptied
    x = torch.randn(3, 6).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    torch.testing.assert_close(paramlora.merge(model)(x), plain(x), **CLOSE)


def test_every_kind_is_loaded_after_the_meta_device(trained_and_emptied):
    _, trained, model = trained_and_emptied
    x = torch.randn(3, 6).double()
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(x), trained(x))
    model.to("meta").to_empty(device="cpu").load_state_dict(trained.state_dict())
    torch.testing.assert_close(paramlora.merge(model)(x), trained(x), **CLOSE)


def test_every_kind_takes_a_file_after_the_meta_device(trained_and_emptied, tmp_path):
    plain, trained, model = trained_and_emptied
    x = torch.randn(3, 6).double()
    paramlora.save_adapter(trained, tmp_path / "a.safetensors")
    model.load_state_dict(plain.state_dict(), strict=False)
    paramlora.load_adapter(model, tmp_path / "a.safetensors", into="default")
    torch.testing.assert_close(model(x), trained(x), **CLOSE)


def test_no_kind_is_saved_or_merged_without_values(trained_and_emptied, tmp_path):
    plain, _, model = trained_and_emptied
    model.load_state_dict(plain.state_dict(), strict=False)
    for use in (paramlora.merge, lambda model: paramlora.save_adapter(model, tmp_path / "a.st")):
        try:
            use(copy.deepcopy(model))
        except paramlora.AdapterError as error:
            assert "no value before its layer is first read" in str(error)
        else:
            x = torch.randn(3, 6).double()
            torch.testing.assert_close(model(x), plain(x), **CLOSE)
