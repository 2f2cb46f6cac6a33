"""Changes that are added whole: LyCORIS's full and norms, and biases beside low-rank updates."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import FileError, files, formats
from paramlora.update.value import Adapter

lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)
IMAGE = torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(5)).double()


def layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 24, (3, 2)), nn.GroupNorm(4, 24), nn.Conv2d(24, 16, 1, bias=False),
        nn.Flatten(), nn.Linear(64, 40), nn.LayerNorm(40),
    )  # fmt: skip
    return net.double().requires_grad_(False)


ALGORITHMS = {
    "full": {"algo": "full"},
    "full with norms": {"algo": "full", "train_norm": True},
    "locon with norms": {"algo": "lora", "train_norm": True},
}


def trained(name, strength):
    """A model under LyCORIS's wrapper, and its file's tensors."""
    net = layers()
    lycoris.LycorisNetwork.apply_preset({"target_name": [".*"], "enable_conv": True})
    made = lycoris.create_lycoris(net, strength, linear_dim=3, linear_alpha=2, **ALGORITHMS[name])
    made.apply_to()
    made.double()
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return net, {key: value.clone() for key, value in made.state_dict().items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # LyCORIS's scale is in float32


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_lycoris_writes_acts_here(name, strength, tmp_path):
    theirs, state = trained(name, strength)
    found = formats.read(formats.Content(state), formats.base_of(layers()))
    kinds = {value.method for value in found.others.values()}
    assert kinds == {"difference"} and {"0.bias", "5"} & found.others.keys()
    ours = paramlora.attach_adapter(layers(), found)
    paramlora.set_adapters(ours, {"default": strength})
    assert (theirs(IMAGE) - layers()(IMAGE)).abs().max() > 0.5
    close(ours(IMAGE), theirs(IMAGE))
    save_file(layers().state_dict(), tmp_path / "base.safetensors")
    save_file(state, tmp_path / "lora.safetensors")
    files.merge(
        tmp_path / "base.safetensors",
        [(tmp_path / "lora.safetensors", strength)],
        tmp_path / "merged.safetensors",
    )
    merged = layers()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    close(merged(IMAGE), theirs(IMAGE))
    close(paramlora.merge(ours)(IMAGE), theirs(IMAGE))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_trained_on_saved_and_written_back(name, tmp_path):
    _, state = trained(name, 1.0)
    base = formats.base_of(layers())
    ours = paramlora.attach_adapter(layers(), formats.read(formats.Content(state), base))
    ours(IMAGE).square().mean().backward()
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(ours):
            assert parameter.grad.abs().max() > 0
            parameter -= 0.1 * parameter.grad
    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    again = paramlora.load_adapter(layers(), tmp_path / "a.safetensors")
    assert torch.equal(again(IMAGE), ours(IMAGE))
    written = formats.write(paramlora.adapter_of(again), "kohya", base, prefix="lycoris")
    assert written.state.keys() == state.keys()
    assert written.metadata["ss_network_module"] == "lycoris.kohya"
    theirs = layers()
    read, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, dict(written.state))
    read.apply_to()
    read.double()
    close(theirs(IMAGE), ours(IMAGE))
    embedded = paramlora.checkpoint.embed(layers().state_dict(), paramlora.adapter_of(again))
    out = paramlora.checkpoint.extract(embedded)
    assert out.values().keys() == paramlora.adapter_of(again).values().keys()


def test_detached_it_leaves_the_base_bit_for_bit():
    _, state = trained("full with norms", 1.0)
    net = layers()
    paramlora.attach_adapter(net, formats.read(formats.Content(state), formats.base_of(net)))
    with paramlora.disable_adapters(net):
        assert torch.equal(net(IMAGE), layers()(IMAGE))
    paramlora.detach(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), layers().parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_sixteen_bits_the_sum_is_rounded_once(dtype):
    net, diff = nn.LayerNorm(64).to(dtype), torch.randn(64) * 1e-3
    state = {"lora_unet_0.w_norm": diff, "lora_unet_0.b_norm": diff}
    model = nn.Sequential(net)
    model[0].bias.data.normal_()
    before = copy.deepcopy(model)
    adapter = formats.read(formats.Content(state), formats.base_of(model))
    model = paramlora.merge(paramlora.attach_adapter(model, adapter))
    for name, weight in before[0].named_parameters():
        want = (weight.detach().double() + diff.double()).to(dtype)
        assert torch.equal(model[0].get_parameter(name), want)


def pair(path, dotted="lora_down", second="lora_up"):
    torch.manual_seed(2)
    return {
        f"{path}.{dotted}.weight": torch.randn(2, 64).double(),
        f"{path}.{second}.weight": torch.randn(40, 2).double(),
    }


SPELLINGS = {
    "kohya": ("lora_unet_4", "lora_down", "lora_up"),
    "comfyui": ("diffusion_model.4", "lora_A", "lora_B"),
    "lightx2v": ("4", "lora_down", "lora_up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_change_of_a_bias_beside_two_factors(spelling):
    path, down, up = SPELLINGS[spelling]
    state = pair(path, down, up) | {f"{path}.diff_b": torch.randn(40).double()}
    if spelling == "lightx2v":
        state = {key.removesuffix(".weight"): value for key, value in state.items()}
    found = formats.read(formats.Content(state), formats.base_of(layers()))
    net = layers()
    a, b, diff = state.values()
    net[4].weight += b @ a
    net[4].bias += diff
    torch.testing.assert_close(paramlora.attach_adapter(layers(), found)(IMAGE), net(IMAGE))


def test_the_bias_of_the_second_factor_is_scaled_with_it():
    """peft's lora_bias: tuners/lora/layer.py adds ``lora_B(lora_A(x)) * scaling``."""
    state = pair("transformer.4", "lora_A", "lora_B")
    state |= {"transformer.4.lora_B.bias": torch.randn(40).double()}
    state |= {"transformer.4.alpha": torch.tensor(1.0)}
    found = formats.read(formats.Content(state), formats.base_of(layers()))
    net = layers()
    net[4].weight += (
        0.5 * state["transformer.4.lora_B.weight"] @ state["transformer.4.lora_A.weight"]
    )
    net[4].bias += 0.5 * state["transformer.4.lora_B.bias"]
    torch.testing.assert_close(paramlora.attach_adapter(layers(), found)(IMAGE), net(IMAGE))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"lora_unet_2.diff_b": torch.ones(16)}, r"the model does not have: lora_unet_2.bias"),
        ({"lora_unet_0.w_norm": torch.ones(24)}, r"0: an update of lora_diff \[24\] does not"),
        ({"lora_unet_1.b_norm": torch.ones(7)}, r"bias: an update of lora_diff \[7\] does not"),
        ({"lora_unet_4.diff": torch.ones(40, 64)}, r"4: diff, lora_down.weight.*no form that can"),
        ({"lora_unet_1.w_norm": torch.ones(24).int()}, r"no change of a tensor: \[24\] int32"),
        ({"lora_unet_1.w_norm": torch.full((24,), torch.nan)}, "not finite: .*lora_unet_1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(more, text):
    with pytest.raises(FileError, match=text):
        formats.read(formats.Content(pair("lora_unet_4") | more), formats.base_of(layers()))


def test_what_the_model_lacks_can_be_left_out():
    content = formats.Content(pair("lora_unet_4") | {"lora_unet_2.diff_b": torch.ones(16)})
    with pytest.warns(paramlora.ParamloraWarning, match="lora_unet_2.bias"):
        found = formats.read(content, formats.base_of(layers()), formats.Options(strict=False))
    assert set(found.values()) == {"4"}


def test_formats_of_two_factors_get_a_matrix_so_and_refuse_a_vector():
    _, state = trained("full", 1.0)
    base = formats.base_of(layers())
    found = formats.read(formats.Content(state), base)
    with pytest.raises(FileError, match='0.bias: .* "difference", which no file of peft holds'):
        formats.write(found, "peft", base)
    matrices = {path: value for path, value in found.others.items() if ".bias" not in path}
    content = formats.write(Adapter({}, others=matrices), "peft", base)
    back = formats.read(content, base)
    for path, value in matrices.items():
        assert torch.equal(back.updates[path].delta(), value.held["lora_diff"])


def test_a_configuration_asks_for_it():
    net = layers()
    paramlora.attach(net, {"4": {"kind": "difference"}})
    (parameter,) = paramlora.trainable_parameters(net)
    assert parameter.shape == (40, 64) and torch.equal(net(IMAGE), layers()(IMAGE))


def test_a_bare_parameter_has_no_name_in_kohyas_format():
    net = nn.Module()
    net.block = nn.Module()
    net.block.table = nn.Parameter(torch.zeros(3, 4))
    paramlora.attach(net, {"block.table": {"kind": "difference"}})
    with pytest.raises(FileError, match="block.table: a parameter that is no weight and no bias"):
        formats.write(paramlora.adapter_of(net), "kohya", formats.base_of(net))
