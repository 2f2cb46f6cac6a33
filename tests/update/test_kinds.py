"""A kind of update that the package does not know: it acts by its forward, and is merged, saved,
shown and grouped by what it says of itself, or refused in one sentence; never by half."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import paramlora
from paramlora import files
from paramlora.files.adapters import convert
from paramlora.files.inspection import inspect
from paramlora.model.attach import _register, updates
from paramlora.update.attached import AttachedUpdate
from paramlora.update.kinds import KINDS, register, unregister
from paramlora.update.lowrank import LowRank
from paramlora.update.sum import Block, Term
from paramlora.update.value import KindUpdate


class Silent(LowRank):
    """``m · (W + scale·B·A)``, with a magnitude for each row, and no word of it."""

    def __init__(self, weight, *args, **options):
        super().__init__(weight, *args, **options)
        self.magnitude = nn.Parameter(torch.full_like(weight[:, :1], 2.0))

    def forward(self, weight):
        return self.magnitude * super().forward(weight)


def model_with(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(4, 6)}).double()
    model.requires_grad_(False)
    weight = model.layer.weight.clone()
    update = kind(model.layer.weight, 2)
    nn.init.normal_(update.lora_B)
    _register(model.layer, "weight", update)
    want = update.magnitude * (weight + update.lora_B @ update.lora_A)
    return model, update, want.detach()


def test_a_class_that_says_nothing_acts_and_trains_by_its_forward():
    model, update, want = model_with(Silent)
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model.layer(x), x @ want.T + model.layer.bias)
    model.layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in update.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "act, question",
    [
        (paramlora.merge, "term"),
        (lambda m: paramlora.parameter_groups(m, 1e-3), "groups"),
        (paramlora.summary, "described"),
        (paramlora.adapter_of, "value"),
        (paramlora.adapter_state_dict, "plain"),
    ],
)
def test_what_it_does_not_say_is_refused(act, question):
    model, _, want = model_with(Silent)
    with pytest.raises(
        paramlora.AdapterError, match=rf'kind Silent computes .* does not say its "{question}"'
    ):
        act(model)
    assert torch.equal(model.layer.weight, want)


@dataclass(frozen=True)
class ScaledTerm(Term):
    """The low-rank sum first, then each row by its magnitude."""

    inner: Term
    magnitude: Tensor
    whole_rows = True

    def prepared(self, wide):
        return ScaledTerm(self.inner.prepared(wide), self.magnitude.detach().to(wide))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        return self.inner.applied(total, block) * self.magnitude[block.rows]


@pytest.fixture
def scaled():
    """The same kind, registered: all that it takes, and the term above."""

    @register
    class Scaled(LowRank):
        """``W' = m · (W + scale·B·A)``, with a magnitude ``m`` for each row."""

        method = "scaled"
        parts = {**LowRank.parts, "lora_length": "weight"}

        def __init__(self, weight, *args, **options):
            super().__init__(weight, *args, **options)
            self.lora_length = nn.Parameter(torch.ones_like(weight[:, :1]))

        def forward(self, weight):
            return torch.lerp(weight, self.lora_length * super().forward(weight), self.gain)

        @staticmethod
        def term_of(parts, gain, layout):
            return ScaledTerm(LowRank.term_of(parts, gain, layout), parts["lora_length"])

    yield Scaled
    unregister("scaled")


def trained(rows=6, columns=4, steps=3):
    """(model, its weight and bias from before, x): attached by a configuration, and trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    weight, bias = (p.detach().clone() for p in model.parameters())
    paramlora.attach(model, {"0": {"r": 2, "scale": 0.7, "kind": "scaled"}})
    optimizer = torch.optim.Adam(paramlora.trainable_parameters(model), lr=0.1)
    x = torch.randn(5, columns).double()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, weight, bias, x


def wanted(model, weight):
    """The definition, in float64 and by the values in the model's own state dict."""
    state = {k.rpartition(".")[2]: v for k, v in model.state_dict().items()}
    total = weight + state["lora_scale"] * state["lora_B"] @ state["lora_A"]
    return state["lora_length"] * total


def test_it_attaches_and_trains(scaled):
    model, weight, bias, x = trained()
    ((_, _, update),) = updates(model)
    assert type(update) is scaled and (update.lora_length != 1).any() and update.lora_B.any()
    torch.testing.assert_close(model(x), x @ wanted(model, weight).T + bias)
    with paramlora.disable_adapters(model):
        assert torch.equal(model[0].weight, weight)


def test_it_is_saved_and_loaded(scaled, tmp_path):
    model, weight, bias, x = trained()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(4, 6)).double()
    with torch.no_grad():
        other[0].weight.copy_(weight), other[0].bias.copy_(bias)
    paramlora.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))
    assert {k: v.tolist() for k, v in paramlora.adapter_state_dict(other).items()} == {
        k: v.tolist() for k, v in paramlora.adapter_state_dict(model).items()
    }
    assert type(paramlora.adapter_of(other).others["0"]) is KindUpdate
    with pytest.raises(paramlora.FileError, match="of other shapes than the model's"):
        paramlora.load_adapter(nn.Sequential(nn.Linear(3, 6)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("rows, columns", [(6, 4), (3, 300_000)])
def test_it_merges_live_in_a_state_dict_and_on_a_streamed_file(scaled, tmp_path, rows, columns):
    model, weight, bias, _ = trained(rows, columns, steps=1)
    want, adapter = wanted(model, weight), paramlora.adapter_of(model)
    base = {"0.weight": weight, "0.bias": bias}
    save_file(base, tmp_path / "base.safetensors")
    save_file(model.state_dict(), tmp_path / "inside.safetensors")
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    files.merge(
        tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "1.safetensors"
    )
    files.merge(tmp_path / "inside.safetensors", [], tmp_path / "2.safetensors")
    merged = [
        paramlora.checkpoint.merge(base, adapter)["0.weight"],
        paramlora.checkpoint.merge(model.state_dict())["0.weight"],
        *(load_file(tmp_path / f"{n}.safetensors")["0.weight"] for n in (1, 2)),
        paramlora.merge(model)[0].weight,
    ]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(merged[0], want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(one, merged[0]) for one in merged)


def test_it_is_embedded_and_extracted(scaled):
    model, weight, bias, _ = trained()
    base, adapter = {"0.weight": weight, "0.bias": bias}, paramlora.adapter_of(model)
    embedded, state = paramlora.checkpoint.embed(base, adapter), model.state_dict()
    assert embedded.keys() == state.keys()
    assert all(torch.equal(embedded[key], state[key]) for key in state)
    again = paramlora.checkpoint.extract(embedded).others["0"]
    assert again.scale == 0.7 and again.r == 2
    assert torch.equal(again.held["lora_length"], adapter.others["0"].held["lora_length"])
    del embedded["0.parametrizations.weight.0.lora_B"]
    with pytest.raises(paramlora.FileError, match="an update is inside without its lora_B"):
        paramlora.checkpoint.extract(embedded)


def test_it_is_shown_and_grouped(scaled, tmp_path):
    model, *_ = trained()
    ((_, _, update),) = updates(model)
    (row,) = paramlora.summary(model).rows
    assert (row.r, row.kind, row.parameters) == (2, "scaled", 2 * (6 + 4) + 6)
    assert row.scale == pytest.approx(0.7)
    groups = {g["name"]: g["params"] for g in paramlora.parameter_groups(model, 1e-3)}
    assert groups["lora_length"] == [update.lora_length] and "model" not in groups
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    (row,) = inspect(tmp_path / "a.safetensors").rows
    assert (row.path, row.shape, row.r, row.scale, row.kind) == ("0", (6, 4), 2, 0.7, "scaled")
    assert "scaled" in str(inspect(tmp_path / "a.safetensors"))


def test_a_dry_run_counts_its_own_tensors(scaled):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Embedding(7, 5))
    (conv, table) = paramlora.targets(model, {"*": {"r": 2, "kind": "scaled", "init": "pissa"}})
    assert (conv.parameters, table.parameters) == (2 * (6 + 36) + 6 * 9, 2 * (7 + 5) + 7)


def test_other_tools_files_refuse_it(scaled, tmp_path):
    model, *_ = trained()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    for name in ("peft", "kohya", "diffusers"):
        with pytest.raises(paramlora.FileError, match=rf'0: .*"scaled".* {name}'):
            convert(tmp_path / "a.safetensors", tmp_path / name, name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("dim", (0, 1))
def test_it_is_sharded_as_its_weight_is(scaled, dim, one_process):
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(4, 6)).double()
    weight = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)]))
    paramlora.attach(model, {"0": {"r": 2, "kind": "scaled"}})
    ((_, _, update),) = updates(model)
    places = {name: getattr(update, name).placements[0] for name in ("lora_A", "lora_B")}
    places["lora_length"] = update.lora_length.placements[0]
    rows = dim == 0
    assert places == {
        "lora_A": Replicate() if rows else Shard(1),
        "lora_B": Shard(0) if rows else Replicate(),
        "lora_length": Shard(0) if rows else Replicate(),
    }
    with torch.no_grad():
        update.lora_B.fill_(0.5), update.lora_length.fill_(1.5)
    a = update.lora_A.full_tensor()
    want = 1.5 * (weight + a.sum(0).mul(0.5).expand(6, 4))
    torch.testing.assert_close(paramlora.merge(model)[0].weight.full_tensor(), want)


@pytest.mark.parametrize("lacks", ("parts", "term_of", "method"))
def test_a_kind_that_says_half_is_not_registered(lacks):
    said = {"method": "half", "parts": LowRank.parts, "term_of": LowRank.term_of}
    said["forward"] = lambda self, weight: weight
    del said[lacks]
    with pytest.raises(paramlora.AdapterError, match=f'Half .* does not say its "{lacks}"'):
        register(type("Half", (LowRank,), said))
    assert "half" not in KINDS


@pytest.mark.parametrize("lacks", ("forward", "attached_to", "term_of"))
def test_a_kind_of_its_own_that_lacks_what_nobody_can_guess_is_not_registered(lacks):
    said = {"method": "half", "parts": {"half_scale": "weight"}, "forward": lambda self, w: w}
    said |= {"attached_to": classmethod(lambda *told: None), "term_of": lambda *told: Term()}
    del said[lacks]
    with pytest.raises(paramlora.AdapterError, match=f'Half .*does not say its "{lacks}"'):
        register(type("Half", (AttachedUpdate,), said))
    assert "half" not in KINDS


def test_a_term_that_does_not_say_what_it_makes_is_refused_before_the_first_write(columns):
    columns.term_of = staticmethod(lambda parts, gain, layout: Term())
    model = paramlora.attach(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0": {"r": 2}, "1": {"kind": "columns"}}
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match='Term does not say its "applied"'):
        paramlora.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_kind_that_does_not_say_how_it_starts_gets_no_memory_from_the_meta_device(columns):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    paramlora.attach(model, {"0": {"kind": "columns"}})
    with pytest.raises(paramlora.AdapterError, match='Columns does not say its "reset_parameters"'):
        model.to_empty(device="cpu")


def test_a_parameter_that_is_not_told_is_refused_before_it_is_lost(scaled):
    model, *_ = trained()
    ((_, _, update),) = updates(model)
    update.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(paramlora.AdapterError, match="has a parameter extra, .* do not tell"):
        paramlora.adapter_state_dict(model)


def test_two_kinds_of_one_name_are_refused(scaled):
    with pytest.raises(paramlora.AdapterError, match='"scaled" is registered already, as Scaled'):
        register(type("Other", (LowRank,), {"method": "scaled"}))


def test_two_kinds_with_tensors_of_the_same_names_are_refused(scaled):
    said = {"method": "twin", "parts": scaled.parts, "term_of": scaled.term_of}
    with pytest.raises(
        paramlora.AdapterError, match='Twin has tensors of the same names .*"scaled'
    ):
        register(type("Twin", (LowRank,), {**said, "forward": scaled.forward}))
    assert "twin" not in KINDS


def test_a_kind_that_is_not_registered_is_no_configuration(tmp_path):
    with pytest.raises(paramlora.ConfigError, match='"kind" must be one of lora.*got .scaled'):
        paramlora.attach(nn.Sequential(nn.Linear(4, 6)), {"0": {"r": 2, "kind": "scaled"}})


def test_every_kind_of_the_package_says_everything():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    config = {"0": {"r": 2}, "1": {"r": 2, "hard": 0}, "2": {"whole": 1}}
    paramlora.attach(model, config)
    assert [row.kind for row in paramlora.summary(model).rows] == ["hard", "soft", "whole", "whole"]
    for _, _, update in updates(model):
        grouped = [p for members in update.groups().values() for p in members]
        assert {id(p) for p in grouped} == {id(p) for p in update.parameters()}
        assert {id(t) for t in update.plain().values()} >= {id(p) for p in update.parameters()}


def test_the_file_of_a_plain_adapter_tells_nothing_new(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    paramlora.attach(model, {"0": {"r": 2}, "1.bias": {"whole": 1}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["paramlora"])
        assert set(file.keys()) == {"0.lora_A", "0.lora_B", "0.lora_scale", "1.bias.lora_whole"}
    entry = {"r": 2, "scale": 1.0, "trainable_scale": False, "hard": True}
    assert about["config"] == {"trainable_model": False, "0": entry, "1.bias": {"whole": True}}
    assert about["shapes"] == {
        "0": {"shape": [3, 4], "layout": "matrix", "groups": 1, "kind": "linear"}
    }


@dataclass(frozen=True)
class ColumnsTerm(Term):
    """Multiplies each column by its number."""

    scale: Tensor

    def prepared(self, wide):
        return ColumnsTerm(self.scale.detach().to(wide).flatten())

    def applied(self, total: Tensor, block: Block) -> Tensor:
        return total * (1 + self.scale[block.columns])


@pytest.fixture
def columns():
    """A kind that adds nothing and has no rank: ``W' = W · diag(1 + c)``."""

    @register
    class Columns(AttachedUpdate):
        method = "columns"
        parts = {"column_scale": "weight"}

        def __init__(self, weight, adapter, gains):
            super().__init__(adapter, weight.device, weight.dtype, gains)
            self.column_scale = nn.Parameter(torch.zeros_like(weight[:1]))

        def forward(self, weight):
            return weight * (1 + self.gain * self.column_scale)

        @classmethod
        def attached_to(cls, site, entry, adapter, gains):
            return cls(site.weight.detach(), adapter, gains)

        @staticmethod
        def term_of(parts, gain, layout):
            return ColumnsTerm(parts["column_scale"] * gain)

    yield Columns
    unregister("columns")


def test_a_kind_without_a_rank_is_saved_loaded_and_merged(columns, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(4, 6, 3)).double()
    model = paramlora.attach(copy.deepcopy(base), {"*": {"kind": "columns"}})
    with torch.no_grad():
        for p in paramlora.trainable_parameters(model):
            p.normal_()
    weights = [layer.weight.detach() for layer in model]
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    assert {row.kind for row in inspect(tmp_path / "a.safetensors").rows} == {"columns"}
    other = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    files.merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], out)
    for i, (plain, merged) in enumerate(zip(base, paramlora.merge(model))):
        want = plain.weight * (1 + load_file(tmp_path / "a.safetensors")[f"{i}.column_scale"])
        assert torch.equal(weights[i], want) and torch.equal(other[i].weight, want)
        torch.testing.assert_close(merged.weight, want)
        assert torch.equal(load_file(out)[f"{i}.weight"], merged.weight)


@pytest.mark.parametrize(
    "kind, key, value",
    [
        ("columns", "r", 1),
        ("columns", "scale", 2.0),
        ("columns", "trainable_scale", 1),
        ("columns", "dropout", 0.1),
        ("columns", "init", "orthogonal"),
        ("columns", "up_kernel", "same"),
        ("scaled", "dropout", 0.1),  # which has no input of its own to drop
        ("scaled", "up_kernel", "same"),
    ],
)
def test_what_an_entry_says_that_its_kind_does_not_heed_is_refused(
    scaled, columns, kind, key, value
):
    model, entry = nn.Sequential(nn.Linear(4, 6)), {"r": 2} if kind == "scaled" else {}
    with pytest.raises(paramlora.ConfigError, match=f'"{key}" means nothing to the kind "{kind}"'):
        paramlora.attach(model, {"0": {"kind": kind, **entry, key: value}})
    paramlora.attach(model, {"0": {"kind": kind, **entry, "hard": True, "adapter_dtype": None}})


def test_what_an_entry_says_of_its_kind_comes_back(scaled, columns):
    own = {"r": 2, "alpha": 3, "trainable_scale": 1, "init": "orthogonal", "kind": "scaled"}
    config = paramlora.LoRAConfig.from_dict({"a": own, "b": {"kind": "columns"}})
    assert paramlora.LoRAConfig.from_dict(config.to_dict()) == config
    assert config.entries[0].scale == 1.5 and config.entries[0].init == "orthogonal"


def test_a_tensor_along_a_side_that_its_base_grows_is_told(columns):
    """Of the inputs as of the outputs: left as it is, it would fail at the next read."""
    layer = paramlora.attach(nn.Linear(4, 6), {"weight": {"kind": "columns"}})
    ((_, _, update),) = updates(layer)
    update.resize(torch.zeros(7, 4))
    assert update.column_scale.shape == (1, 4)
    with pytest.raises(paramlora.AdapterError, match="Columns does not say what column_scale is"):
        update.resize(torch.zeros(6, 5))


def test_a_kind_says_how_tables_and_messages_call_it():
    titles = {name: kind.title() for name, kind in KINDS.items()}
    assert titles == {name: name for name in KINDS} | {"lora": "hard"}
    instead = {name: kind.beside_instead() for name, kind in KINDS.items() if not kind.internal}
    assert instead.pop("lora") == ""
    assert instead.pop("rows") == ' with "r" and no "rows"'
    assert {*instead.values()} == {' and no "kind"'}
    assert type("Derived", (LowRank,), {"method": "derived"}).title() == "derived"


def test_only_what_is_trained_whole_means_all_that_lies_inside():
    assert [name for name, kind in KINDS.items() if kind.inside] == ["whole"]
    assert not KINDS["whole"].bounded  # it has no rank, and may have fewer than two dimensions
