"""PEFT's files: what is written here acts the same in peft, and what peft writes acts here."""

import copy
import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import FileError, formats
from paramlora.update.value import Adapter, Update
from tests.formats import foreign

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


@pytest.mark.parametrize("names", [["attn.out_proj"], ["attn.in_proj_weight", "attn.out_proj"]])
def test_the_output_projection_of_attention_is_refused(names):
    """peft 0.21 adds its term twice, and a later one will not."""
    base = formats.base_of(attention())
    with pytest.raises(FileError, match=r"attn.out_proj: the output projection.*adds twice.*merge"):
        formats.write(attention_adapter(names), "peft", base)


@pytest.mark.parametrize("version", [None, "0.21.2", "0.22.0"])
def test_what_peft_writes_of_attention(tmp_path, version):
    """As it acts in the peft that trained it, whose forward adds the output projection twice."""
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(attention(), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "b")
    content, x = opened(tmp_path / "b"), torch.randn(2, 5, 8).double()
    content.config.pop("peft_version", None)
    content.config.update({} if version is None else {"peft_version": version})
    for base in (None, formats.base_of(attention())):
        with expected(version != "0.22.0", r"adds twice: attn.out_proj. It is read with twice"):
            adapter = formats.read(content, base)
        assert set(adapter.updates) == {"attn.in_proj_weight", "attn.out_proj"}
        inside = adapter.updates["attn.in_proj_weight"]
        layer = theirs.base_model.model.attn
        close(2.5 * inside.lora_B @ inside.lora_A, layer.get_delta_weight("default"))
        assert adapter.updates["attn.out_proj"].scale == (2.5 if version == "0.22.0" else 5.0)
    if version != "0.22.0":
        model = paramlora.model.values.attach_adapter(attention(), adapter)
        close(model(x), theirs(x))


def expected(told, text):
    return pytest.warns(paramlora.ParamloraWarning, match=text) if told else nullcontext()


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


def of_another_rank(folder, **told):
    """A folder of peft's, whose configuration is changed afterwards."""
    net = nn.Sequential(nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(net, config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    return nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize(
    "told, wrong",
    [({"r": 3}, "2, not 3"), ({"rank_pattern": {"0": 1}}, "2, not 1"), ({"r": "2"}, "2, not '2'")],
)
def test_a_rank_that_is_not_that_of_the_tensors_is_refused_as_by_peft(told, wrong, tmp_path):
    net = of_another_rank(tmp_path, **told)
    with pytest.raises((RuntimeError, TypeError)):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    says = (
        rf"adapter_model.*of another rank than its configuration tells: 0 \({wrong}\). Mend its r"
    )
    with pytest.raises(FileError, match=says):
        paramlora.load_adapter(net, tmp_path)
    with pytest.warns(paramlora.ParamloraWarning, match=says):
        paramlora.load_adapter(net, tmp_path, strict=False)
    assert net[0].parametrizations.weight[0].lora_scale == 1.5


def test_an_alpha_that_is_none_is_refused_with_the_file(tmp_path):
    net = of_another_rank(tmp_path, lora_alpha="x")
    with pytest.raises(FileError, match="adapter_model.safetensors: lora_alpha of 0: 'x' is not"):
        paramlora.load_adapter(net, tmp_path)
