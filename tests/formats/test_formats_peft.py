"""PEFT's files: what is written here acts the same in peft, and what peft writes acts here."""

import json
import warnings

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import formats
from paramlora.update.value import Adapter, Update

peft = pytest.importorskip("peft")

PLAIN = "linear conv1 conv2 conv3 embedding".split()


def saved(folder, content):
    folder.mkdir()
    save_file(dict(content.state), folder / "adapter_model.safetensors", dict(content.metadata))
    (folder / "adapter_config.json").write_text(json.dumps(content.config))
    return folder


def opened(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return formats.Content(load_file(folder / "adapter_model.safetensors"), {}, config)


def in_peft(net, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a missing or an unexpected key
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        # peft looks for patterns among modules only, and finds those of parameters all the same
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        found = peft.PeftModel.from_pretrained(net, folder, autocast_adapter_dtype=False)
    return found.eval()


def close(a, b):
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("kinds", [PLAIN, ["hf"], ["hf", "linear"], ["grouped"]])
def test_what_is_written_here_acts_in_peft(tmp_path, kinds):
    adapter, base = foreign.adapter(kinds), formats.base_of(foreign.model())
    folder = saved(tmp_path / "a", formats.write(adapter, "peft", base))
    want = foreign.dense(foreign.model(), adapter)(foreign.TOKENS)
    assert (want - foreign.model()(foreign.TOKENS)).abs().max() > 0.05
    close(in_peft(foreign.model(), folder)(foreign.TOKENS), want)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kinds", [PLAIN, ["hf", "linear"]])
def test_what_peft_writes_acts_here(tmp_path, kinds, rslora):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=kinds,
        rank_pattern={"^linear": 4, "conv2": 1},
        alpha_pattern={"conv[12]": 5.5, "linear": 7},
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out="hf" in kinds,
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "b")
    base = formats.base_of(foreign.model())
    adapter = formats.read(opened(tmp_path / "b"), base)
    root = 2 if rslora else 4
    assert adapter.updates["linear"].scale == 7 / root
    ours = foreign.dense(foreign.model(), adapter)
    close(ours(foreign.TOKENS), theirs(foreign.TOKENS))
    attached = paramlora.model.values.attach_adapter(foreign.model(), adapter)
    close(attached(foreign.TOKENS), theirs(foreign.TOKENS))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_what_peft_trains_whole_comes_along(tmp_path, bias):
    """A head in ``modules_to_save``, and biases."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["linear", "conv2"],
        modules_to_save=["not_linear"],
        bias=bias,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "b")
    model = paramlora.load_adapter(foreign.model(), tmp_path / "b")
    close(model(foreign.TOKENS), theirs(foreign.TOKENS))
    content = opened(tmp_path / "b")
    whole = formats.read(content, formats.base_of(foreign.model())).whole
    assert {"not_linear", "not_linear.bias"} <= set(whole)
    assert ("linear.bias" in whole) == (bias != "none") and ("conv1.bias" in whole) == (
        bias == "all"
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def attention():
    torch.manual_seed(0)
    return Attention().double().requires_grad_(False).eval()


def attention_adapter(names):
    torch.manual_seed(1)
    sizes = {"attn.in_proj_weight": 24, "attn.out_proj": 8}
    return Adapter(
        {
            name: Update(torch.randn(2, 8).double(), torch.randn(sizes[name], 2).double(), 0.7)
            for name in names
        }
    )


def test_attention_acts_in_peft(tmp_path):
    adapter, net = attention_adapter(["attn.in_proj_weight"]), attention()
    content = formats.write(adapter, "peft", formats.base_of(net))
    x, update = torch.randn(2, 5, 8).double(), adapter.updates["attn.in_proj_weight"]
    theirs = in_peft(attention(), saved(tmp_path / "a", content))
    net.attn.in_proj_weight += 0.7 * update.lora_B @ update.lora_A
    close(theirs(x), net(x))


def test_both_weights_of_attention(tmp_path):
    """peft 0.21 adds the output projection's term twice, so its deltas are compared instead."""
    adapter = attention_adapter(["attn.in_proj_weight", "attn.out_proj"])
    content = formats.write(adapter, "peft", formats.base_of(attention()))
    theirs = in_peft(attention(), saved(tmp_path / "a", content)).base_model.model.attn
    inside, outside = adapter.updates.values()
    close(theirs.get_delta_weight("default"), 0.7 * inside.lora_B @ inside.lora_A)
    out = theirs.base_layer.out_proj.get_delta_weight("default")
    close(out, 0.7 * outside.lora_B @ outside.lora_A)


def test_what_peft_writes_of_attention(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(attention(), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "b")
    for base in (None, formats.base_of(attention())):
        adapter = formats.read(opened(tmp_path / "b"), base)
        assert set(adapter.updates) == {"attn.in_proj_weight", "attn.out_proj"}
        layer = theirs.base_model.model.attn
        inside = adapter.updates["attn.in_proj_weight"]
        close(2.5 * inside.lora_B @ inside.lora_A, layer.get_delta_weight("default"))
        assert inside.scale == adapter.updates["attn.out_proj"].scale == 2.5


def test_an_idle_half_of_attention_stays_out(tmp_path):
    adapter = attention_adapter(["attn.out_proj"])
    base = formats.base_of(attention())
    content = formats.write(adapter, "peft", base)
    assert len(content.state) == 4
    assert set(formats.read(content, base).updates) == {"attn.out_proj"}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 10))
        self.gate = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        hidden = torch.einsum("eoi,bi->beo", self.up, x).tanh()
        parts = torch.einsum("eio,beo->bei", self.down, hidden)
        return torch.einsum("bei,be->bi", parts, torch.softmax(x @ self.gate.T, -1))


class Turned(nn.Module):
    """Square expert matrices stored as [E, in, out], as transformers marks them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 6))
        self.is_transposed = True

    def forward(self, x):
        return torch.einsum("eio,bi->bo", self.w, x)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.turned = Experts(), Turned()

    def forward(self, x):
        return self.turned(self.experts(x))


def mixture():
    torch.manual_seed(0)
    return Mixture().double().requires_grad_(False).eval()


PARAMETERS = ["experts.up", "experts.down", "experts.gate", "turned.w"]


def test_experts_act_in_peft(tmp_path):
    torch.manual_seed(1)
    updates, net = {}, mixture()
    for name, r, scale in zip(PARAMETERS, (2, 3, 2, 1), (0.7, 1.5, 2.0, 1 / 3)):
        *lead, out, fan_in = net.get_parameter(name).shape
        a, b = torch.randn(*lead, r, fan_in).double(), torch.randn(*lead, out, r).double()
        layout = "stack" if lead else "matrix"
        updates[name] = Update(a, b, scale, (*lead, out, fan_in), layout)
    content = formats.write(Adapter(updates), "peft", formats.base_of(net))
    theirs = in_peft(mixture(), saved(tmp_path / "a", content))
    for name, update in updates.items():
        net.get_parameter(name).data += update.scale * (update.lora_B @ update.lora_A)
    x = torch.randn(4, 6).double()
    close(theirs(x), net(x))
    back = formats.read(content, formats.base_of(net)).updates
    for name, update in updates.items():
        assert torch.equal(back[name].lora_A, update.lora_A) and back[name].scale == update.scale


def test_what_peft_writes_of_experts(tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[],
        target_parameters=PARAMETERS,
        rank_pattern={"experts.down": 4},
        init_lora_weights=False,
    )
    torch.manual_seed(2)
    theirs = peft.get_peft_model(mixture(), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "b")
    net = mixture()
    adapter = formats.read(opened(tmp_path / "b"), formats.base_of(net))
    for name, update in adapter.updates.items():
        net.get_parameter(name).data += update.scale * (update.lora_B @ update.lora_A)
    x = torch.randn(4, 6).double()
    assert adapter.updates["experts.down"].r == 4
    close(net(x), theirs(x))
    close(paramlora.model.values.attach_adapter(mixture(), adapter)(x), theirs(x))


def test_a_checkpoint_tells_the_experts_apart_by_shape(tmp_path):
    net = mixture()
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    updates = {
        "experts.up": Update(
            torch.randn(3, 2, 6), torch.randn(3, 10, 2), 0.7, (3, 10, 6), "stack", kind="parameter"
        )
    }
    content = formats.write(Adapter(updates), "peft")
    (back,) = formats.read(content, formats.base_of_shapes(shapes)).updates.values()
    assert torch.equal(back.lora_B, updates["experts.up"].lora_B)
