"""Experts in peft's files, and the layers beside them: what each loads acts the same."""

import copy

import pytest
import torch
from torch import nn

import paramlora
from paramlora import FileError, formats
from paramlora.files import adapters as interchange
from paramlora.update.value import Adapter, Update
from tests.formats.peft.folders import close, in_peft, opened, saved
from tests.formats.peft.language import (
    IDS,
    adapted,
    as_peft,
    deepseek,
    dense,
    glm,
    llama,
    mixtral,
    qwen,
)

peft = pytest.importorskip("peft")


EXPERTS = {
    "shared and dense": {"gate_proj": {"r": 2}, "q_proj": {"r": 3}},
    "ranks and scales": {
        "re:.*(shared_experts?|mlp).down_proj": {"r": 3, "scale": 0.5},
        "re:.*shared_experts?.up_proj": {"r": 2},
        "o_proj": {"r": 4, "alpha": 3},
    },
    "fused too": {
        "re:.*shared_expert.*_proj": {"r": 2},
        "re:.*mlp.experts.(gate_up|down)_proj": {"r": 2, "scale": 0.6},
    },
    "the router": {"mlp.gate": {"r": 2}, "re:.*shared_experts?.up_proj": {"r": 1}},
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("make", [deepseek, glm, qwen])
def test_layers_beside_fused_experts_act_in_peft(make, case, known, tmp_path):
    config = dict(EXPERTS[case])
    if make is deepseek:
        config = {"q_b_proj" if name == "q_proj" else name: v for name, v in config.items()}
    base, model = adapted(make, config)
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - base(IDS).logits).abs().max() > 1e-3
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    known_base = formats.base_of(base) if known or case == "fused too" else None
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", known_base)
    theirs = as_peft(base, tmp_path / "peft")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)
    again = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-5, atol=1e-5)
    if case != "fused too":
        interchange.convert(tmp_path / "peft", tmp_path / "b.safetensors", "native")
        back = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "b.safetensors")
        torch.testing.assert_close(back(IDS).logits, want, rtol=1e-5, atol=1e-5)


def test_the_experts_of_mixtral_act_in_peft(tmp_path):
    names = ("q_proj", "re:.*gate_up_proj", "mlp.gate")
    base, model = adapted(mixtral, dict.fromkeys(names, {"r": 2}))
    want = dense(base, model)(IDS).logits
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", formats.base_of(base))
    torch.testing.assert_close(as_peft(base, tmp_path / "p")(input_ids=IDS).logits, want)


def test_without_experts_layers_of_these_names_stay_modules():
    _, model = adapted(llama, {"re:.*(gate|up|down)_proj": {"r": 2}})
    content = formats.write(paramlora.adapter_of(model), "peft", formats.base_of(llama()))
    assert "target_parameters" not in content.config
    assert len(content.config["target_modules"]) == 3


class Owner(nn.Module):
    """A module with a parameter of its own, and with layers inside."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.inner, self.tokens = nn.Linear(6, 6), nn.Embedding(5, 6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.inner(x @ self.table.T) + self.tokens(torch.arange(x.shape[-2]))
        return self.attn(x, x, x, need_weights=False)[0]


class Owners(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Owner())

    def forward(self, x):
        return self.block(x)


def test_layers_inside_of_what_has_an_adapted_parameter(tmp_path):
    torch.manual_seed(0)
    net, updates = Owners().double().requires_grad_(False).eval(), {}
    for path in ("table", "inner", "tokens", "attn.in_proj_weight"):
        out, fan_in = {"attn.in_proj_weight": (18, 6), "tokens": (6, 5)}.get(path, (6, 6))
        a, b = torch.randn(2, fan_in).double(), torch.randn(out, 2).double()
        layout = "transposed" if path == "tokens" else "matrix"
        shape = (fan_in, out) if path == "tokens" else (out, fan_in)
        updates[f"block.0.{path}"] = Update(a, b, 0.7, shape, layout)
    base, x = formats.base_of(net), torch.randn(2, 4, 6).double()
    adapter = formats.fit(Adapter(updates), base, formats.Options(), "a")
    folder = saved(tmp_path / "a", formats.write(adapter, "peft", base))
    theirs = in_peft(copy.deepcopy(net), folder)
    want = copy.deepcopy(net)
    for path, update in updates.items():
        name = path if path.endswith(("table", "in_proj_weight")) else f"{path}.weight"
        want.get_parameter(name).data += update.delta()
    close(theirs(x), want(x))
    for known in (base, None):
        again = formats.read(opened(folder), known)
        assert again.updates.keys() == updates.keys()
    with pytest.raises(FileError, match="block.0.table: inside of block, of which a parameter"):
        table = Update(*(torch.ones(1, 6), torch.ones(3, 1), 1.0, (3, 6)), kind="parameter")
        formats.write(Adapter({**adapter.updates, "block.scales": table}), "peft")


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
