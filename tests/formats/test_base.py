"""A base's weights by kind and shape, also tied ones, and adapters that do not fit them."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import formats
from paramlora.errors import FileError
from paramlora.files import adapters as interchange
from paramlora.formats import Slot
from tests.formats import foreign
from tests.formats.linears import BASE, adapter
from tests.formats.peft.language import IDS, TIES, adapted, as_peft, dense


def test_a_shape_that_does_not_fit():
    turned = {path: Slot((9, 9), "matrix", "linear", 1) for path in BASE}
    with pytest.raises(FileError, match=r"block.a: an update of \[2, 6\] and \[4, 2\] .* \[9, 9\]"):
        formats.read(formats.write(adapter(), "peft"), turned)


def test_the_model_of_every_kind_names_them():
    base = formats.base_of(foreign.model())
    assert {path: slot.kind for path, slot in base.items()} == {
        **dict.fromkeys(["linear", "not_linear", "hf"], "linear"),
        **dict.fromkeys(["conv1", "grouped", "conv2", "conv3"], "convolution"),
        "embedding": "embedding",
    }
    assert base["grouped"].groups == 2 and base["hf"].layout == "transposed"


peft = pytest.importorskip("peft")


def untold(path):
    """The file as the first release wrote it, without the kinds of the layers."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["paramlora"])
    del about["holders"]
    save_file(load_file(path), path, {**metadata, "paramlora": json.dumps(about)})


@pytest.mark.parametrize("known", ["nothing", "model", "checkpoint"])
@pytest.mark.parametrize("case", TIES)
def test_tied_and_adapted_layers_act_in_peft(case, known, tmp_path):
    base, model = adapted(*TIES[case])
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    shapes = {name: p.shape for name, p in base.named_parameters(remove_duplicate=False)}
    given = {"nothing": None, "model": formats.base_of(base)}
    if known == "checkpoint":
        given["checkpoint"] = formats.base_of_shapes(shapes)
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", given[known])
    theirs = as_peft(base, tmp_path / "peft")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - base(IDS).logits).abs().max() > 0.1
    again = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("to", sorted(formats.WRITERS))
def test_an_older_file_of_tied_layers_asks_for_the_model(to, checkpoint, tmp_path):
    base, model = adapted(*TIES["embedding first"])
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    untold(tmp_path / "a.safetensors")
    shapes = {name: p.shape for name, p in base.named_parameters(remove_duplicate=False)}
    known = formats.base_of_shapes(shapes) if checkpoint else None  # which tells no kinds
    told = r"transformer.wte, lm_head: one tied tensor.*Give the model \(--model\)"
    with pytest.raises(FileError, match=told):
        interchange.convert(tmp_path / "a.safetensors", tmp_path / "out", to, known)
    assert not (tmp_path / "out").exists()
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", formats.base_of(base))
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(as_peft(base, tmp_path / "p")(input_ids=IDS).logits, want)
