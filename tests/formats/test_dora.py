"""A sweep of DoRA in the files of peft, LyCORIS and diffusers: read from theirs, and read by
them."""

import copy

import peft
import pytest
import torch
from lycoris.modules.locon import LoConModule
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import paramlora
from paramlora import files
from paramlora.files.adapters import convert, format_of
from paramlora.formats import base_of
from paramlora.model.attach import updates


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 3)
        self.emb = nn.Embedding(9, 6)

    def forward(self, ids, image):
        return self.lin(self.emb(ids)), self.conv(image)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.hf = Conv1D(6, 5)

    def forward(self, x):
        return (self.hf(x),)


def examples(kind):
    torch.manual_seed(1)
    if kind is Turned:
        return (torch.randn(3, 5),)
    return torch.arange(9).reshape(3, 3), torch.randn(2, 6, 5, 5)


NAMES = {Model: ["lin", "conv", "emb"], Turned: ["hf"]}


def by_peft(kind, folder):
    """peft's own DoRA, trained a little and saved; the outputs of its model."""
    torch.manual_seed(0)
    model = kind()
    base = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=NAMES[kind],
        use_dora=True,
        fan_in_fan_out=kind is Turned,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + torch.rand_like(p))
    theirs.save_pretrained(folder)
    return base, theirs


def close(ours, theirs, x):
    with torch.no_grad():
        for one, other in zip(ours(*x), theirs(*x)):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", (Model, Turned))
def test_pefts_is_read_trained_on_and_merged(kind, tmp_path):
    base, theirs = by_peft(kind, tmp_path / "theirs")
    x, ours = examples(kind), copy.deepcopy(base)
    paramlora.load_adapter(ours, tmp_path / "theirs")
    assert {row.kind for row in paramlora.summary(ours).rows} == {"dora"}
    close(ours, theirs, x)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    theirs.eval()
    if kind is Model:  # a checkpoint does not tell a Conv1D from a Linear
        out = tmp_path / "out.safetensors"
        files.merge(tmp_path / "base.safetensors", [tmp_path / "theirs"], out)
        merged = copy.deepcopy(base)
        merged.load_state_dict(load_file(out))
        close(merged, theirs, x)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(ours), lr=0.1)
    before = [y.detach() for y in ours(*x)]
    sum(y.square().mean() for y in ours(*x)).backward()
    optimizer.step()
    assert all((a != b).any() for a, b in zip(ours(*x), before))
    close(paramlora.merge(copy.deepcopy(ours)), ours, x)


@pytest.mark.parametrize("kind", (Model, Turned))
def test_ours_is_read_by_peft(kind, tmp_path):
    torch.manual_seed(0)
    base = kind()
    ours, x = copy.deepcopy(base), examples(kind)
    entry = {"r": 2, "scale": 1.5, "kind": "dora"}
    paramlora.attach(ours, {name: entry for name in NAMES[kind]})
    with torch.no_grad():
        for _, _, update in updates(ours):
            update.lora_B.normal_()
            update.lora_magnitude.mul_(1.5)
    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "theirs", "peft", base_of(base))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "theirs")
    close(ours, theirs, x)


@pytest.mark.parametrize("on_out", (True, False))
@pytest.mark.parametrize("name", ("lin", "conv"))
def test_lycoris_in_both_conventions(name, on_out, tmp_path):
    torch.manual_seed(0)
    base = Model()
    layer = getattr(copy.deepcopy(base), name)
    theirs = LoConModule(
        f"lora_unet_{name}", layer, 1.0, 2, 3, weight_decompose=True, wd_on_out=on_out
    )
    with torch.no_grad():
        theirs.lora_up.weight.normal_()
        theirs.dora_scale.mul_(1 + torch.rand_like(theirs.dora_scale))
    state = {f"lora_unet_{name}.{key}": v.clone() for key, v in theirs.custom_state_dict().items()}
    save_file({k: v.detach().contiguous() for k, v in state.items()}, tmp_path / "k.safetensors")
    want = theirs.get_merged_weight()[0].detach()

    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "k.safetensors")
    torch.testing.assert_close(getattr(ours, name).weight.detach(), want, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 6) if name == "lin" else torch.randn(2, 6, 5, 5)
    own = copy.deepcopy(getattr(base, name))
    own.weight = nn.Parameter(want)
    torch.testing.assert_close(getattr(ours, name)(x), own(x), rtol=1e-5, atol=1e-5)

    save_file(base.state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    files.merge(tmp_path / "base.safetensors", [tmp_path / "k.safetensors"], out)
    torch.testing.assert_close(load_file(out)[f"{name}.weight"], want, rtol=1e-5, atol=1e-5)

    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "again.safetensors", "kohya", base_of(base))
    assert format_of(tmp_path / "again.safetensors") == "kohya"
    written = load_file(tmp_path / "again.safetensors")
    assert torch.equal(written[f"lora_unet_{name}.dora_scale"], theirs.dora_scale.detach())
    if on_out:  # LyCORIS makes a module of a file with its own default convention only
        parts = [written.get(f"lora_unet_{name}.{leaf}") for leaf in LEAVES]
        with torch.no_grad():
            again = LoConModule.make_module_from_state_dict("x", layer, *parts)
        torch.testing.assert_close(again.get_merged_weight()[0].detach(), want)
        return
    with pytest.raises(paramlora.FileError, match=f"{name}: its magnitude .* norm over outputs"):
        convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", base_of(base))


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(6, 8, 3), lambda: nn.Conv3d(6, 8, 2)])
def test_lycoris_reads_convolutions_of_one_and_three_dimensions(make, tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"conv": make()})
    ours = paramlora.attach(copy.deepcopy(base), {"conv": {"r": 2, "scale": 1.5, "kind": "dora"}})
    ((_, _, update),) = updates(ours)
    with torch.no_grad():
        update.lora_B.normal_()
        update.lora_magnitude.mul_(1.5)
    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya", base_of(base))
    written = load_file(tmp_path / "k.safetensors")
    parts = [written.get(f"lora_unet_conv.{leaf}") for leaf in LEAVES]
    with torch.no_grad():
        theirs = LoConModule.make_module_from_state_dict("x", base.conv, *parts)
        merged = theirs.get_merged_weight(shape=base.conv.weight.shape)[0]
    torch.testing.assert_close(merged, ours.conv.weight.detach(), rtol=1e-5, atol=1e-5)
    again = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "k.safetensors")
    torch.testing.assert_close(again.conv.weight, ours.conv.weight)


LEAVES = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")


def test_diffusers_reads_ours(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    base = diffusers.UNet2DConditionModel(**small)
    ours = copy.deepcopy(base)
    paramlora.attach(ours, {"to_q": {"r": 2, "scale": 1.5, "kind": "dora"}})
    with torch.no_grad():
        for _, _, update in updates(ours):
            update.lora_B.normal_()
            update.lora_magnitude.mul_(1.5)
    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    out = tmp_path / "pytorch_lora_weights.safetensors"
    convert(tmp_path / "a.safetensors", out, "diffusers", base_of(base), component="")
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(tmp_path, weight_name=out.name, prefix=None)
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(*x).sample, theirs(*x).sample, rtol=1e-4, atol=1e-4)
    again = paramlora.load_adapter(copy.deepcopy(base), out)
    with torch.no_grad():
        torch.testing.assert_close(again(*x).sample, ours(*x).sample)


def test_what_no_file_holds_is_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    paramlora.attach(model, {"a": {"r": 2, "kind": "dora"}, "b": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    for to, text in (
        ("peft", 'a is of the kind "dora", b is not: PEFT has one switch'),
        ("diffusers", 'a is of the kind "dora", b is not: diffusers has one switch'),
        ("torchtune", 'a: an update of the kind "dora", which no file of torchtune holds'),
        ("litgpt", 'a: an update of the kind "dora", which no file of litgpt holds'),
    ):
        with pytest.raises(paramlora.FileError, match=text):
            convert(tmp_path / "a.safetensors", tmp_path / to, to, base_of(model))
        assert not (tmp_path / to).exists()
    convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya", base_of(model))
    assert "lora_unet_a.dora_scale" in load_file(tmp_path / "k.safetensors")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda s: {k: v for k, v in s.items() if "lora_B" not in k}, "one factor of two"),
        (
            lambda s: {k: v for k, v in s.items() if "lin.lora_" not in k} | only(s),
            "without factor",
        ),
        (lambda s: {k: cut(k, v) for k, v in s.items()}, r"a magnitude of \[5\] does not fit"),
    ],
)
def test_damaged_files_are_refused(change, text, tmp_path):
    base, _ = by_peft(Model, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(paramlora.FileError, match=text):
        paramlora.load_adapter(base, tmp_path / "theirs")


def only(state):
    return {k: v for k, v in state.items() if k.endswith("lin.lora_magnitude_vector")}


def cut(key, value):
    return value[:5].clone() if key.endswith("lin.lora_magnitude_vector") else value


THIN = {
    "inputs": (lambda: nn.Linear(1, 8), (3, 1)),
    "outputs": (lambda: nn.Linear(8, 2), (3, 8)),
    "channels": (lambda: nn.Conv2d(1, 4, 1), (2, 1, 3, 3)),
    "kernels": (lambda: nn.Conv2d(4, 2, 3), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("rescaled", (True, False), ids=("dora", "lora"))
@pytest.mark.parametrize("layer", THIN)
@pytest.mark.parametrize("tool", ("peft", "lycoris", "native"))
def test_a_rank_above_what_the_matrix_holds_is_read(tool, layer, rescaled, tmp_path):
    """Other tools allow it; here an update of the highest rank that there is does the same."""
    torch.manual_seed(0)
    make, shape = THIN[layer]
    base, x, path = nn.Sequential(make()), torch.randn(shape), tmp_path / "a.safetensors"
    theirs = copy.deepcopy(base)
    if tool == "lycoris":
        net = LoConModule("l_0", theirs[0], lora_dim=5, alpha=3, weight_decompose=rescaled)
        net.apply_to()
        parameters = list(net.parameters())
    else:
        config = peft.LoraConfig(r=5, target_modules=["0"], use_dora=rescaled)
        theirs = peft.get_peft_model(theirs, config)
        parameters = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    if tool == "lycoris":
        state = {f"lycoris_0.{key}": value for key, value in net.custom_state_dict().items()}
        save_file({key: value.detach().contiguous() for key, value in state.items()}, path)
    else:
        theirs.save_pretrained(tmp_path / "peft")
        path = tmp_path / "peft"
    if tool == "native":
        convert(path, tmp_path / "b.safetensors", "native", base=base_of(base))
        path = tmp_path / "b.safetensors"
    ours = paramlora.load_adapter(copy.deepcopy(base), path)
    assert {row.kind for row in paramlora.summary(ours).rows} == {"dora" if rescaled else "hard"}
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    paramlora.load_adapter(ours, path, into="default")
    torch.testing.assert_close(paramlora.merge(ours)(x), theirs(x), rtol=2e-5, atol=2e-5)
