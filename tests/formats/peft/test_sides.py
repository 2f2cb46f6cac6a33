"""A sweep of Linear layers beside Conv1Ds in peft's files, whose ``fan_in_fan_out`` is of the last
layer that it adapted, whatever the others are."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import paramlora
from paramlora import FileError, files, formats
from tests.formats.peft.folders import close, in_peft

peft = pytest.importorskip("peft")
X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# L and l: a Linear, square or not; H and h: transformers' Conv1D
LAYERS = {
    "L": lambda: nn.Linear(6, 6),
    "l": lambda: nn.Linear(6, 4),
    "H": lambda: Conv1D(6, 6),
    "h": lambda: Conv1D(4, 6),
}


class Net(nn.ModuleList):
    def forward(self, x):
        return torch.cat([layer(x) for layer in self], -1)


def adapted_by_peft(net, config, folder):
    """What peft's adapter of a model makes of `X`; it is saved in a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        theirs = peft.get_peft_model(copy.deepcopy(net), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
        theirs.save_pretrained(folder)
        return theirs(X)


def trained(order, dora, folder):
    """A model, and what peft's adapter of all its layers makes of `X`; it is saved in a folder."""
    torch.manual_seed(1)
    net = Net(LAYERS[one]() for one in order).double().requires_grad_(False)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[str(at) for at in range(len(order))],
        use_dora=dora,
        init_lora_weights=False,
    )
    return net, adapted_by_peft(net, config, folder)


def merged(net, folder, known=None):
    """What a checkpoint makes of `X` into which the folder's adapter was merged."""
    save_file(net.state_dict(), folder / "base.safetensors")
    files.merge(folder / "base.safetensors", [folder], folder / "merged.safetensors", known=known)
    other = copy.deepcopy(net)
    other.load_state_dict(load_file(folder / "merged.safetensors"))
    return other(X)


ORDERS = ["".join(one) for n in (1, 2, 3) for one in itertools.permutations("LlHh", n)]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_what_peft_trained_on_both_kinds_of_layers_acts_here(order, dora, tmp_path):
    net, want = trained(order, dora, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert told == (order[-1] in "Hh")
    ours = paramlora.load_adapter(copy.deepcopy(net), tmp_path)
    close(ours(X), want)
    files.write_adapter(paramlora.adapter_of(ours), tmp_path / "again", "peft")
    close(in_peft(copy.deepcopy(net), tmp_path / "again")(X), want)
    close(merged(net, tmp_path, formats.base_of(net)), want)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("order", ["l", "h", "lh", "hl", "Ll", "Hh"])
def test_a_checkpoint_tells_the_sides_of_what_is_not_square(order, dora, tmp_path):
    net, want = trained(order, dora, tmp_path)
    close(merged(net, tmp_path), want)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("order", ["Hhl", "Llh", "hLl", "lHh"])
def test_a_square_weight_asks_for_the_model_where_the_file_is_wrong_of_another(
    order, dora, tmp_path
):
    net, _ = trained(order, dora, tmp_path)
    square = next(at for at, one in enumerate(order) if one in "LH")
    # of the other kind than the last, after which the file is told
    wrong = next(at for at, one in enumerate(order) if one in "lh")
    told = (
        f"{square}: a checkpoint does not tell which side of a square weight is the input, and the "
        rf"file tells it wrongly of {wrong}. Give the model \(--model\)."
    )
    with pytest.raises(FileError, match=told):
        merged(net, tmp_path)
    assert not (tmp_path / "merged.safetensors").exists()


class Block(nn.Module):
    """Layers as GPT-2 calls them, of either kind, square ones among them."""

    def __init__(self, conv1d):
        super().__init__()
        sizes = {"c_attn": (6, 18), "c_proj": (18, 18), "q_attn": (18, 18)}
        for name, (fan_in, out) in sizes.items():
            self.add_module(name, Conv1D(out, fan_in) if conv1d else nn.Linear(fan_in, out))

    def forward(self, x):
        return self.q_attn(self.c_proj(self.c_attn(x)))


class Named(nn.Module):
    def __init__(self, conv1d):
        super().__init__()
        self.h, self.score = nn.ModuleList([Block(conv1d)]), nn.Linear(18, 18)

    def forward(self, x):
        return self.score(self.h[0](x))


def named(conv1d, targets, dora, folder):
    torch.manual_seed(1)
    net = Named(conv1d).double().requires_grad_(False)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, use_dora=dora, init_lora_weights=False
    )
    return net, adapted_by_peft(net, config, folder)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(
    "targets",
    [["c_attn"], ["c_proj"], ["score"], ["c_proj", "q_attn"], ["c_proj", "score"],
     ["c_attn", "score"], ["c_attn", "c_proj", "q_attn", "score"]],
    ids="-".join,
)  # fmt: skip
def test_a_checkpoint_of_gpt_2s_names_tells_the_sides_of_square_weights(
    targets, conv1d, dora, tmp_path
):
    """What is wider than it is deep in the same blocks tells how they are stored."""
    net, want = named(conv1d, targets, dora, tmp_path)
    close(paramlora.load_adapter(copy.deepcopy(net), tmp_path)(X), want)
    close(merged(net, tmp_path), want)
    mixed = "score" in targets and len(targets) > 1
    assert len(files.inspect(tmp_path).rows) == len(targets)

    def converted():
        files.convert(tmp_path, tmp_path / "a.safetensors", "native")
        return paramlora.load_adapter(copy.deepcopy(net), tmp_path / "a.safetensors")(X)

    if not mixed:
        close(converted(), want)
        return
    with pytest.raises(FileError, match=r"c_(proj|attn).*does not tell which of the two these are"):
        converted()
    assert not (tmp_path / "a.safetensors").exists()


def test_square_weights_of_these_names_alone_ask_for_the_model(tmp_path):
    net, _ = named(True, ["c_proj", "score"], False, tmp_path)
    state = {k: v for k, v in net.state_dict().items() if "c_attn" not in k}
    save_file(state, tmp_path / "base.safetensors")
    with pytest.raises(FileError, match=r"c_proj: its file is of Linear layers beside"):
        files.merge(tmp_path / "base.safetensors", [tmp_path], tmp_path / "merged.safetensors")
