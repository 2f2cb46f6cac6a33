"""Files of any tool onto a model, and into another tool's."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import Adapter, Update, files, formats
from paramlora.errors import FileError, ParamloraWarning
from paramlora.files import adapters as interchange
from paramlora.files.adapters import convert
from paramlora.formats import Options
from paramlora.model.attach import updates
from tests.files.written import filled, small
from tests.formats import foreign

peft = pytest.importorskip("peft")
KINDS = "linear conv1 conv2 conv3 embedding".split()


def theirs(tmp_path, kinds, safe=True):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=kinds, rank_pattern={"linear": 4}, init_lora_weights=False
    )
    torch.manual_seed(3)
    net = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False).eval()
    net.save_pretrained(tmp_path / "peft", safe_serialization=safe)
    return net, tmp_path / "peft"


def close(a, b):
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def state_of(model):
    return [(n, id(p), p.requires_grad) for n, p in model.named_parameters()], [
        type(m) for m in model.modules()
    ]


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_peft_is_loaded_onto_a_model(tmp_path, safe):
    net, folder = theirs(tmp_path, KINDS, safe)
    model = foreign.model()
    assert paramlora.load_adapter(model, folder, "style") is model
    close(model(foreign.TOKENS), net(foreign.TOKENS))
    assert {low.adapter for _, _, low in updates(model)} == {"style"}
    (file,) = [p for p in folder.iterdir() if p.name.startswith("adapter_model")]
    close(paramlora.load_adapter(foreign.model(), file)(foreign.TOKENS), net(foreign.TOKENS))
    paramlora.merge(model)
    close(model(foreign.TOKENS), net(foreign.TOKENS))


def test_a_rank_above_the_layer_is_loaded_too(tmp_path):
    config = peft.LoraConfig(
        r=9, lora_alpha=3, target_modules=["linear", "hf"], init_lora_weights=False
    )
    net = peft.get_peft_model(foreign.model(), config, autocast_adapter_dtype=False)
    net.save_pretrained(tmp_path / "peft")
    model = paramlora.load_adapter(foreign.model(), tmp_path / "peft")
    close(model(foreign.TOKENS), net(foreign.TOKENS))


def damaged(state, config):
    state["base_model.model.conv2.lora_B.weight"] = torch.ones(9, 2, 1, 1).double()


def foreign_layer(state, config):
    state["base_model.model.gone.lora_A.weight"] = torch.ones(2, 4)
    state["base_model.model.gone.lora_B.weight"] = torch.ones(4, 2)


def not_finite(state, config):
    state["base_model.model.linear.lora_A.weight"][0, 0] = math.inf


def half(state, config):
    del state["base_model.model.conv1.lora_A.weight"]


def dora(state, config):
    config["use_dora"] = True


@pytest.mark.parametrize(
    "change, text",
    [
        (damaged, "conv2: an update of .* does not fit the weight of"),
        (foreign_layer, "what the model does not have: gone"),
        (not_finite, "not finite: linear.lora_A"),
        (half, "one factor of two is missing: conv1"),
        (dora, "use_dora, and no magnitude in the file of: "),
    ],
)
def test_a_wrong_file_leaves_the_model_untouched(tmp_path, change, text):
    _, folder = theirs(tmp_path, KINDS)
    state = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(state, config)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = foreign.model()
    before = state_of(model)
    with pytest.raises(FileError, match=text):
        paramlora.load_adapter(model, folder)
    assert state_of(model) == before


class Anything:
    pass


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"lora_A": Anything()}, tmp_path / "a.pt")
    with pytest.raises(FileError, match=f"needs {__name__}.Anything to be unpickled"):
        paramlora.load_adapter(foreign.model(), tmp_path / "a.pt")


def test_a_list_of_tensors(tmp_path):
    net = nn.Sequential(nn.ModuleDict({"q": nn.Linear(6, 4)}))

    class CrossAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 4)

    net = nn.Sequential(CrossAttention())
    up, down = torch.randn(4, 2).half(), torch.randn(2, 6).half()
    torch.save([nn.Parameter(up), nn.Parameter(down)], tmp_path / "lora_weight.pt")
    before = net[0].q.weight.detach().clone()
    paramlora.load_adapter(net, tmp_path / "lora_weight.pt")
    torch.testing.assert_close(net[0].q.weight, before + up.float() @ down.float())


def test_a_folder_without_one_file_of_tensors(tmp_path):
    with pytest.raises(FileError, match="needs one file of tensors, and has none"):
        paramlora.load_adapter(foreign.model(), tmp_path)
    with pytest.raises(FileError, match="cannot be read: No such file"):
        paramlora.load_adapter(foreign.model(), tmp_path / "gone.safetensors")


def native(tmp_path, kinds=("linear", "conv2")):
    torch.manual_seed(5)
    model = paramlora.attach(
        foreign.model(), {k: {"r": foreign.RANKS[k], "scale": 0.7} for k in kinds}
    )
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    path = tmp_path / "native.safetensors"
    paramlora.save_adapter(model, path)
    return model, path


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_a_conversion_there_and_back_is_the_same_file(tmp_path, to):
    model, path = native(tmp_path)
    shapes = {key: tensor.shape for key, tensor in foreign.model().state_dict().items()}
    bases = [formats.base_of(foreign.model()), formats.base_of_shapes(shapes)]
    for i, base in enumerate(bases):
        there, back = tmp_path / f"there{i}", tmp_path / f"back{i}"
        interchange.convert(path, there, to, base)
        loaded = paramlora.load_adapter(foreign.model(), there)
        assert torch.equal(loaded(foreign.TOKENS), model(foreign.TOKENS))
        interchange.convert(there, back, "native", base)
        first, second = load_file(path), load_file(back)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("to", ["litgpt", "torchtune", "original"])
def test_formats_of_linear_layers_there_and_back(tmp_path, to):
    model, path = native(tmp_path, ("linear",))
    there = tmp_path / "there"
    interchange.convert(path, there, to)
    loaded = paramlora.load_adapter(foreign.model(), there)
    assert torch.equal(loaded(foreign.TOKENS), model(foreign.TOKENS))


def test_a_native_file_knows_its_layers(tmp_path):
    """An embedding and a grouped convolution are written for peft without the model."""
    model, path = native(tmp_path, ("embedding", "grouped"))
    interchange.convert(path, tmp_path / "there", "peft")
    loaded = paramlora.load_adapter(foreign.model(), tmp_path / "there")
    close(loaded(foreign.TOKENS), model(foreign.TOKENS))


def test_the_base_checkpoint_names_a_kohya_file(tmp_path):
    _, path = native(tmp_path)
    base = tmp_path / "base.pt"
    torch.save(foreign.model().state_dict(), base)
    interchange.convert(path, tmp_path / "k.safetensors", "kohya")
    with pytest.raises(FileError, match="kohya's names of layers cannot be read back without"):
        interchange.convert(tmp_path / "k.safetensors", tmp_path / "n", "native")
    interchange.convert(
        tmp_path / "k.safetensors", tmp_path / "n", "native", interchange.base_of_file(base)
    )
    assert load_file(tmp_path / "n").keys() == load_file(path).keys()


def test_nothing_is_overwritten_unless_forced(tmp_path):
    _, path = native(tmp_path)
    out = tmp_path / "there"
    interchange.convert(path, out, "peft", dry_run=True)
    assert not out.exists()
    interchange.convert(path, out, "peft")
    with pytest.raises(FileError, match="exists"):
        interchange.convert(path, out, "peft")
    interchange.convert(path, out, "peft", force=True)
    with pytest.raises(FileError, match='"toml" cannot be written. Known: comfyui'):
        interchange.convert(path, tmp_path / "other", "toml")


def test_tied_holders_get_the_update_each_in_its_own_way(tmp_path):
    """An embedding and its head are one tensor, whose input is the other's output."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    def tied():
        torch.manual_seed(0)
        return Tied().double()

    model = paramlora.attach(tied(), {"re:table|head": {"r": 2, "scale": 0.7}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    paramlora.save_adapter(model, tmp_path / "n.safetensors")
    base = formats.base_of(tied())
    interchange.convert(tmp_path / "n.safetensors", tmp_path / "p", "peft", base)
    net = peft.PeftModel.from_pretrained(tied(), tmp_path / "p", autocast_adapter_dtype=False)
    tokens = torch.arange(5)
    close(net(tokens), model(tokens))


def test_options_reach_the_reader(tmp_path):
    state = {"linear.lora_A": torch.randn(2, 6), "linear.lora_B": torch.randn(8, 2)}
    torch.save(state, tmp_path / "loralib.pt")
    model = paramlora.load_adapter(foreign.model(), tmp_path / "loralib.pt", alpha=3)
    ((_, _, low),) = updates(model)
    assert low.lora_scale == 1.5
    torch.save({**state, "bias": torch.ones(2)}, tmp_path / "more.pt")
    with pytest.warns(ParamloraWarning, match="no update of one weight: bias"):
        paramlora.load_adapter(foreign.model(), tmp_path / "more.pt", alpha=3, strict=False)
    assert Options().strict


@pytest.mark.parametrize("entry", ({"r": 1}, {"whole": 1}, {"rows": [1]}, {"r": 1, "kind": "lokr"}))
def test_what_the_model_lacks_is_left_out_of_a_native_file_with_a_warning(entry, tmp_path):
    layers = {"a": nn.Linear(4, 3), "b": nn.Embedding(4, 3)}
    model = paramlora.attach(nn.ModuleDict(layers), {"a": {"r": 1}, "b": entry})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    less = nn.ModuleDict({"a": paramlora.detach(model)["a"]})
    with pytest.raises(paramlora.ParamloraError, match="b"):
        paramlora.load_adapter(less, tmp_path / "a.safetensors")
    assert type(less["a"]) is nn.Linear
    with pytest.warns(ParamloraWarning, match="of what the model does not have: b"):
        paramlora.load_adapter(less, tmp_path / "a.safetensors", strict=False)
    assert [row.path for row in paramlora.summary(less).rows] == ["a"]


def test_a_file_of_another_tool_is_merged_into_a_checkpoint(tmp_path):
    net, folder = theirs(tmp_path, KINDS)
    save_file(foreign.model().state_dict(), tmp_path / "base.safetensors")
    files.merge(tmp_path / "base.safetensors", [folder], tmp_path / "merged.safetensors")
    model = foreign.model(seed=9)
    model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    close(model(foreign.TOKENS), net(foreign.TOKENS))
    files.embed(tmp_path / "base.safetensors", folder, tmp_path / "in.safetensors")
    files.merge(tmp_path / "in.safetensors", [], tmp_path / "again.safetensors")
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("merged", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_our_own_file_begins_at_zero_but_is_finite(tmp_path, recwarn):
    model = paramlora.attach(foreign.model(), {"linear": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "fresh.safetensors")
    paramlora.load_adapter(foreign.model(), tmp_path / "fresh.safetensors")
    assert not [w for w in recwarn if issubclass(w.category, ParamloraWarning)]
    with safe_open(tmp_path / "fresh.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "fresh.safetensors")
    state["linear.lora_A"][0, 0] = math.nan
    save_file(state, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(FileError, match="not finite: linear.lora_A"):
        paramlora.load_adapter(foreign.model(), tmp_path / "bad.safetensors")


def test_a_file_is_interpreted_once_with_an_alpha_too(tmp_path):
    """The check that an alpha says something reads nothing again."""
    form, seen = formats.unregister("kohya"), []

    def read(content, base, options):
        seen.append(options.alpha)
        return form.read(content, base, options)

    state = {"lora_unet_q.lora_down.weight": torch.ones(2, 6)}
    state |= {"lora_unet_q.lora_up.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "bare.safetensors")
    save_file({**state, "lora_unet_q.alpha": torch.ones(())}, tmp_path / "told.safetensors")
    formats.register(replace(form, read=read))
    try:
        options = formats.Options(alpha=3.0)
        found = interchange.read_adapter(tmp_path / "bare.safetensors", options=options).updates
        assert found["lora_unet_q"].scale == 1.5 and type(found["lora_unet_q"].scale) is float
        with pytest.raises(FileError, match="told.safetensors: alpha = 3 says nothing to it"):
            interchange.read_adapter(tmp_path / "told.safetensors", options=options)
        assert seen == [3.0, 3.0]
    finally:
        formats.unregister("kohya")
        formats.register(form)


@pytest.mark.filterwarnings("ignore:.*no place for what is said beside")  # of the 20 keys
@pytest.mark.parametrize("to", [*formats.WRITERS, "native"])
def test_a_conversion_writes_the_same_bytes_each_time(to, tmp_path):
    names = [f"m{i}.attn.{x}" for i in range(9) for x in ("q", "k", "v")]
    scale = 0.7 if to != "loralib" else 1.0
    updates = {name: Update(torch.ones(2, 4), torch.ones(4, 2), scale, (4, 4)) for name in names}
    many = Adapter(updates, metadata={f"key{i}": "x" for i in range(20)})
    paramlora.files.native.write_native(many, tmp_path / "a.safetensors")
    written = []
    for number in range(4):
        out = tmp_path / f"{number}"
        convert(tmp_path / "a.safetensors", out, to)
        parts = sorted(out.iterdir()) if out.is_dir() else [out]
        written.append([part.read_bytes() for part in parts])
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_an_adapter_loads_into_a_wrapped_model(wrap, tmp_path):
    model = filled(small(), {"*": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    inner = small()
    paramlora.load_adapter(wrap(inner), tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(inner(x), model(x))
