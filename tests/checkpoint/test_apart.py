"""A sweep over the updates of one of several layers that hold a tensor, on checkpoints of it."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import files
from paramlora.arithmetic import combine
from paramlora.errors import FileError
from paramlora.formats import base_of

KINDS = {
    "lora": {"r": 2}, "dora": {"r": 2, "kind": "dora"}, "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 2, "kind": "lokr"}, "whole": {"whole": True}, "rows": {"rows": [1, 4]},
    "difference": {"kind": "difference"},
}  # fmt: skip
MOVES_ALL = ("rows", "difference")
STORED = {"embedding": ["head"], "head": ["embedding"], "both": []}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


def adapted(kind, layer):
    torch.manual_seed(0)
    model = Tied()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layer that has no update
        paramlora.attach(model, {layer: KINDS[kind]})
    for one in model.parameters():
        if one.requires_grad:
            nn.init.uniform_(one, 0.5, 1.5)
    return model, base


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("layer", ("embedding", "head"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_becomes_what_the_model_becomes_or_is_refused(kind, layer, stored, tmp_path):
    model, base = adapted(kind, layer)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    want = paramlora.merge(copy.deepcopy(model)).state_dict()
    for other in STORED[stored]:
        del base[f"{other}.weight"]
    save_file(base, tmp_path / "base.safetensors")

    def merged():
        files.merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "m.pt")
        return torch.load(tmp_path / "m.pt")

    if stored == "both" or kind in MOVES_ALL:
        found = merged()
        assert found.keys() == base.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, want[key])
        return
    apart = "held the same tensor without this update, and the base has it under one name"
    text = f"{layer}: .*{apart}" if stored == layer else f"such as {layer}"
    with pytest.raises(FileError, match=text):
        merged()
    assert not (tmp_path / "m.pt").exists()


def test_what_is_made_of_the_adapter_is_refused_too(tmp_path):
    model, base = adapted("lora", "embedding")
    own = paramlora.adapter_of(model)
    assert own.apart == {"embedding": ("head",)}
    save_file({"embedding.weight": base["embedding.weight"]}, tmp_path / "base.safetensors")
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    for made in (
        combine([own, (own, 0.5)]).adapter,
        files.read_adapter(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(FileError, match="embedding: head held the same tensor"):
            paramlora.checkpoint.merge({"embedding.weight": base["embedding.weight"]}, made)


def test_another_tools_file_is_refused_where_the_model_is_known(tmp_path):
    model, base = adapted("lora", "head")
    files.write_adapter(paramlora.adapter_of(model), tmp_path / "peft", "peft")
    save_file({"head.weight": base["head.weight"]}, tmp_path / "base.safetensors")
    run = (tmp_path / "base.safetensors", [tmp_path / "peft"], tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="head: embedding held the same tensor"):
        files.merge(*run, known=base_of(Tied()))
    # nothing tells that another layer has it
    files.merge(*run)
    assert load_file(tmp_path / "m.safetensors").keys() == {"head.weight"}


def test_embedding_into_such_a_checkpoint_stays_possible(tmp_path):
    """The attached model's own file has the tensor once for both layers."""
    model, base = adapted("lora", "embedding")
    inside = paramlora.checkpoint.embed(
        {"embedding.weight": base["embedding.weight"]}, paramlora.adapter_of(model)
    )
    assert "embedding.parametrizations.weight.original" in inside
