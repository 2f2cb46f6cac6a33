"""Single rows against their definition in float64, and against peft's trainable tokens."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import files
from paramlora.files.inspection import inspect
from paramlora.model.attach import updates

IDS = [7, 1, 4]
LAYERS = {
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.arange(18).reshape(6, 3) % 9),
    "padded": (lambda: nn.Embedding(9, 5, padding_idx=4), lambda: torch.arange(18) % 9),
    "head": (lambda: nn.Linear(5, 9), lambda: torch.randn(2, 3, 5)),
    "bare": (lambda: nn.Linear(5, 9, bias=False), lambda: torch.randn(3, 5)),
    "conv": (lambda: nn.Conv1d(4, 9, 3), lambda: torch.randn(2, 4, 6)),
}


def attached(name):
    torch.manual_seed(0)
    make, example = LAYERS[name]
    layer, x = make().double(), example()
    x = x.double() if x.is_floating_point() else x
    before = copy.deepcopy(layer)
    paramlora.attach(layer, {"weight": {"rows": IDS}})
    ((_, _, update),) = updates(layer)
    return layer, before, x, update


def dense(before, update, strength=1.0):
    """The definition: (the weight, the rows that it is made of)."""
    rows, weight = update.lora_rows.detach().clone().requires_grad_(), before.weight.detach()
    total = weight.clone()
    for place, row in enumerate(sorted(IDS)):
        total[row] = weight[row] + strength * (rows[place] - weight[row])
    return total, rows


@pytest.mark.parametrize("strength", (1.0, 0.3))
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_definition(name, strength):
    layer, before, x, update = attached(name)
    torch.testing.assert_close(layer(x), before(x), rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        update.lora_rows.normal_()
    paramlora.set_adapters(layer, {"default": strength})
    weight, rows = dense(before, update, strength)
    y, want = layer(x), torch.func.functional_call(before, {"weight": weight}, (x,))
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, [update.lora_rows], dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, [rows], dy)[0])
    torch.testing.assert_close(layer.weight, weight)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "parametrizations.weight.0.lora_rows"
    ]


@pytest.mark.parametrize("strength", (1.0, 0.3))
@pytest.mark.parametrize("name", ("embedding", "conv"))
def test_they_are_saved_read_and_merged(name, strength, tmp_path):
    layer, before, x, update = attached(name)
    with torch.no_grad():
        update.lora_rows.normal_()
    paramlora.set_adapters(layer, {"default": strength})
    paramlora.save_adapter(layer, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["lora_ids"].tolist() == sorted(IDS)
    other = paramlora.load_adapter(copy.deepcopy(before), tmp_path / "a.safetensors")
    paramlora.set_adapters(other, {"default": strength})
    assert torch.equal(other(x), layer(x))
    save_file(before.state_dict(), tmp_path / "base.safetensors")
    pair = (tmp_path / "a.safetensors", strength)
    files.merge(tmp_path / "base.safetensors", [pair], tmp_path / "out.safetensors")
    embedded = paramlora.checkpoint.embed(before.state_dict(), paramlora.adapter_of(layer))
    assert embedded.keys() == layer.state_dict().keys()
    (again,) = paramlora.checkpoint.extract(embedded).others.values()
    assert again.options == (("rows", (1, 4, 7)),)
    want = dense(before, update, strength)[0].detach()
    merged = paramlora.merge(layer).weight.detach()
    torch.testing.assert_close(merged, want)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], merged)
    (row,) = inspect(tmp_path / "a.safetensors").rows
    assert row.kind == "rows" and row.r == 0
    assert "nan" not in str(inspect(tmp_path / "a.safetensors"))  # which damage alone shows


def test_rows_across_the_blocks_of_a_merge():
    torch.manual_seed(0)
    layer = nn.Linear(300_000, 3).double()
    before = layer.weight.detach().clone()
    paramlora.attach(layer, {"weight": {"rows": [2, 0]}})
    ((_, _, update),) = updates(layer)
    with torch.no_grad():
        update.lora_rows.normal_()
    want = torch.stack([update.lora_rows[0], before[1], update.lora_rows[1]]).detach()
    assert torch.equal(paramlora.merge(layer).weight, want)


def tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
    model.head.weight = model.embed.weight
    return model.double()


@pytest.mark.parametrize("name", ("embed", "head", "re:embed|head"))
def test_tied_heads_move_together(name, tmp_path, recwarn):
    model = tied()
    before = model.embed.weight.detach().clone()
    paramlora.attach(model, {name: {"rows": IDS}})
    ((_, _, update),) = updates(model)
    with torch.no_grad():
        update.lora_rows.normal_()
    want = before.clone()
    want[sorted(IDS)] = update.lora_rows.detach()
    assert torch.equal(model.embed.weight, want) and torch.equal(model.head.weight, want)
    x, tokens = torch.randn(2, 5).double(), torch.arange(9)
    torch.testing.assert_close(model.head(x), x @ want.T)
    torch.testing.assert_close(model.embed(tokens), want)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(tied(), tmp_path / "a.safetensors")
    assert torch.equal(other.head.weight, want) and torch.equal(other.embed.weight, want)
    paramlora.merge(model)
    assert model.head.weight is model.embed.weight and torch.equal(model.head.weight, want)
    assert not [w for w in recwarn if issubclass(w.category, paramlora.ParamloraWarning)]


def test_beside_an_update_of_another_adapter():
    layer, before, x, update = attached("head")
    paramlora.attach(layer, {"weight": {"r": 2}}, adapter="second")
    second = list(updates(layer))[1][2]
    with torch.no_grad():
        update.lora_rows.normal_(), second.lora_B.normal_()
    want = dense(before, update)[0].detach() + (second.lora_B @ second.lora_A).detach()
    torch.testing.assert_close(layer(x), x @ want.T + before.bias)
    torch.testing.assert_close(paramlora.merge(layer).weight.detach(), want)


def test_it_compiles_whole():
    torch.compiler.reset()  # what other tests compiled counts against the limit
    layer, before, x, update = attached("embedding")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), before(x))


@pytest.mark.parametrize(
    "entry, text",
    [
        ({"rows": []}, r'"rows" must be a list of different numbers of rows, got \[\]'),
        ({"rows": [1, 1]}, r"different numbers of rows, got \[1, 1\]"),
        ({"rows": [-1]}, r"different numbers of rows, got \[-1\]"),
        ({"rows": [1], "r": 2}, '"r" means nothing to the kind "rows". Allowed beside it: rows, '),
        ({"kind": "rows"}, 'the kind "rows" needs "rows"'),
        ({"kind": "lora", "r": 1, "rows": [1]}, 'unknown key "rows"'),
    ],
)
def test_wrong_entries(entry, text):
    with pytest.raises(paramlora.ConfigError, match=text):
        paramlora.attach(nn.Linear(4, 3), {"weight": entry})


def test_what_cannot_have_such_rows():
    with pytest.raises(paramlora.TargetError, match="none of number 5. Number them from 0"):
        paramlora.attach(nn.Linear(4, 3), {"weight": {"rows": [1, 5]}})
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
    with pytest.raises(paramlora.TargetError, match="no values to start from. Load the model"):
        paramlora.attach(layer, {"weight": {"rows": [1]}})


def test_the_configuration_comes_back():
    config = paramlora.LoRAConfig.from_dict({"a": {"rows": [3, 1], "adapter_dtype": "float32"}})
    assert config.to_dict()["a"] == {"rows": [1, 3], "adapter_dtype": "float32"}
    assert paramlora.LoRAConfig.from_dict(config.to_dict()) == config
    (target,) = paramlora.targets(nn.Linear(4, 5), {"weight": {"rows": [3, 1]}})
    assert target.parameters == 8
