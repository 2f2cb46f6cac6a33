"""LoHa and LoKr against their definitions in float64, written out here."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import files
from paramlora.model.attach import updates

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(4, 12)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 8, 1), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: torch.arange(12).reshape(4, 3)),
    "hf": (lambda: of_transformers(8, 12), lambda: torch.randn(4, 12)),
    "prime": (lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7)),
}
ENTRIES = {
    "loha": {"kind": "loha", "r": 2, "scale": 0.7},
    "loha tucker": {"kind": "loha", "r": 2, "alpha": 3, "tucker": True},
    "lokr": {"kind": "lokr", "r": 1, "scale": 0.7},
    "lokr both": {"kind": "lokr", "r": 1, "factor": 4, "decompose_both": 1},
    "lokr whole": {"kind": "lokr", "r": 1, "factor": 2, "full_matrix": 1, "scale": 1.5},
    "lokr, a rank that needs no factors": {"kind": "lokr", "r": 8},
    "lokr tucker": {"kind": "lokr", "r": 1, "tucker": 1, "trainable_scale": 1},
    "lokr sizes": {"kind": "lokr", "r": 2, "sizes": [[4, 2], [2, 6]]},
}
CASES = [(e, n) for e in ENTRIES for n in LAYERS if e != "lokr sizes" or n in ("linear", "hf")]


def of_transformers(out, fan_in):
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(out, fan_in)


def formed(state, shape):
    """The change in float64 with every index written out, ``[out, in, ...]``."""
    get = state.get
    if "hada_w1_a" in state:
        sides = []
        for n in (1, 2):
            a, b, t = (get(f"hada_{x}") for x in (f"w{n}_a", f"w{n}_b", f"t{n}"))
            sides.append(a @ b if t is None else torch.einsum("ijkl,io,jn->onkl", t, a, b))
        return sides[0] * sides[1]
    w1 = get("lokr_w1")
    w1 = get("lokr_w1_a") @ get("lokr_w1_b") if w1 is None else w1
    w2, t2 = get("lokr_w2"), get("lokr_t2")
    if w2 is None and t2 is None:
        w2 = get("lokr_w2_a") @ get("lokr_w2_b")
    elif w2 is None:
        w2 = torch.einsum("ijkl,ic,jd->cdkl", t2, get("lokr_w2_a"), get("lokr_w2_b"))
    out = torch.zeros(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:]).double()
    for i in range(w1.shape[0]):
        for j in range(w1.shape[1]):
            rows = slice(i * w2.shape[0], (i + 1) * w2.shape[0])
            out[rows, j * w2.shape[1] : (j + 1) * w2.shape[1]] = w1[i, j] * w2
    return out


def attached(entry, name):
    torch.manual_seed(0)
    make, example = LAYERS[name]
    layer, x = make().double(), example()
    x = x.double() if x.is_floating_point() else x
    before = copy.deepcopy(layer)
    paramlora.attach(layer, {"weight": ENTRIES[entry]})
    ((_, _, update),) = updates(layer)
    return layer, before, x, update


def dense(before, update, strength=1.0):
    state = {n: p.detach().clone().requires_grad_() for n, p in update.named_parameters()}
    scale = state.get("lora_scale", update.lora_scale)
    change, weight = formed(state, before.weight.shape), before.weight.detach()
    change = change.flatten(1).T if update.layout == "transposed" else change
    return weight + strength * scale * change.reshape(weight.shape), state


@pytest.mark.parametrize("strength", (1.0, 0.4))
@pytest.mark.parametrize("entry, name", CASES)
def test_values_and_gradients_are_those_of_the_definition(entry, name, strength):
    layer, before, x, update = attached(entry, name)
    torch.testing.assert_close(layer(x), before(x))  # what is added starts at zero
    with torch.no_grad():
        for p in update.parameters():
            p.normal_()
    paramlora.set_adapters(layer, {"default": strength})
    weight, leaves = dense(before, update, strength)
    y, want = layer(x), torch.func.functional_call(before, {"weight": weight}, (x,))
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, list(update.parameters()), dy)
    for one, other in zip(got, torch.autograd.grad(want, list(leaves.values()), dy)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(layer.weight, weight)
    groups = {g["name"] for g in paramlora.parameter_groups(layer, 1e-3)}
    assert groups == set(leaves)


@pytest.mark.parametrize("entry, name", CASES)
def test_they_are_saved_read_and_merged(entry, name, tmp_path):
    layer, before, x, update = attached(entry, name)
    with torch.no_grad():
        for p in update.parameters():
            p.normal_()
    paramlora.save_adapter(layer, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(copy.deepcopy(before), tmp_path / "a.safetensors")
    assert torch.equal(other(x), layer(x))
    save_file(before.state_dict(), tmp_path / "base.safetensors")
    files.merge(
        tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors"
    )
    value = paramlora.adapter_of(layer)
    embedded = paramlora.checkpoint.embed(before.state_dict(), value)
    state = layer.state_dict()
    assert embedded.keys() == state.keys()
    assert all(torch.equal(embedded[key], state[key]) for key in state)
    again = paramlora.attach_adapter(copy.deepcopy(before), paramlora.checkpoint.extract(embedded))
    torch.testing.assert_close(again(x), layer(x))
    want = dense(before, update)[0].detach()
    merged = paramlora.merge(layer).weight.detach()
    torch.testing.assert_close(merged, want)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], merged)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("entry", ("loha", "lokr"))
def test_sixteen_bits_are_near(entry, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(12, 8).to(dtype)
    before, x = copy.deepcopy(layer), torch.randn(4, 12).to(dtype)
    paramlora.attach(layer, {"weight": ENTRIES[entry]})
    ((_, _, update),) = updates(layer)
    with torch.no_grad():
        for p in update.parameters():
            p.normal_(std=0.5)
    wide = copy.deepcopy(before).double()
    weight = dense(wide, copy.deepcopy(update).double())[0]
    want = x.double() @ weight.T + wide.bias
    error = (layer(x).double() - want).abs().max() / want.abs().max()
    assert error < 3 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(layer).float()(x.float())
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).abs().max() / want.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("entry", ("loha", "lokr"))
def test_it_compiles_whole(entry):
    torch.compiler.reset()  # what other tests compiled counts against the limit
    layer, _, x, update = attached(entry, "linear")
    with torch.no_grad():
        for p in update.parameters():
            p.normal_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("entry, name", CASES)
def test_a_dry_run_counts_its_elements(entry, name):
    _, before, _, update = attached(entry, name)
    (target,) = paramlora.targets(before, {"weight": ENTRIES[entry]})
    own = sum(p.numel() for n, p in update.named_parameters() if n != "lora_scale")
    assert target.parameters == own


@pytest.mark.parametrize(
    "entry, text",
    [
        ({"kind": "loha", "r": 1, "dropout": 0.1}, '"dropout" means nothing to the kind "loha"'),
        ({"kind": "loha", "r": 1, "hard": 0}, '"hard" means nothing to the kind "loha"'),
        ({"kind": "lokr", "r": 1, "factor": 0}, '"factor" must be a whole number above 0, or -1'),
        ({"kind": "lokr", "r": 1, "sizes": [[1, 2]]}, '"sizes" must be .* got \\[\\[1, 2\\]\\]'),
        ({"kind": "lokr", "r": 1, "tucker": 2}, '"tucker" must be 0, 1, true or false, got 2'),
        ({"kind": "loha"}, '"r" is missing'),
        ({"kind": "loh", "r": 1}, '"kind" must be one of .*loha, lokr.*, got .loh'),
    ],
)
def test_wrong_entries(entry, text):
    with pytest.raises(paramlora.ConfigError, match=text):
        paramlora.attach(nn.Linear(4, 3), {"weight": entry})


def test_what_it_does_not_fit():
    sizes = {"kind": "lokr", "r": 1, "sizes": [[2, 2], [2, 2]]}
    with pytest.raises(paramlora.TargetError, match=r'3 outputs and 4 inputs, and "sizes" give'):
        paramlora.attach(nn.Linear(4, 3), {"weight": sizes})
    layer = nn.Module()
    layer.w = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(paramlora.TargetError, match='a stack of matrices .* no "loha"'):
        paramlora.attach(layer, {"w": {"kind": "loha", "r": 1}})


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_the_configuration_comes_back(entry):
    config = paramlora.LoRAConfig.from_dict({"a": entry})
    assert paramlora.LoRAConfig.from_dict(config.to_dict()) == config
