"""Differences of checkpoints in files: what is one tensor there, and what is no checkpoint."""

import pytest
import torch

import paramlora
from paramlora.errors import FileError
from tests.arithmetic.layers import Tied, model


def test_what_began_as_one_tensor_and_is_two_has_two_updates():
    net = Tied().state_dict()
    tuned = {**net, "wte.weight": net["wte.weight"] + 1, "lm_head.weight": net["wte.weight"] + 2}
    done = paramlora.difference(dict(net), tuned, 1)
    one, other = (done.adapter.updates[name].delta() for name in ("wte", "lm_head"))
    torch.testing.assert_close(one, torch.ones(30, 12))
    torch.testing.assert_close(other, 2 * torch.ones(30, 12))


@pytest.mark.parametrize("value", [torch.ones(12), torch.zeros(5, 5), torch.randn(5, 5)])
def test_what_a_checkpoint_lacks_is_no_tie_where_it_only_starts_alike(value):
    base = {"a": value.clone(), "b": value.clone() if value.unique().numel() < 9 else value + 1}
    for first, second, name in (
        (base, {"a": base["a"]}, "tuned"),
        ({"a": base["a"]}, base, "base"),
    ):
        with pytest.raises(FileError, match=f"^{name}: lacks b of"):
            paramlora.difference(first, second, 1)


def test_a_model_with_an_adapter_is_no_checkpoint():
    attached = paramlora.attach(model(), {"fc": {"r": 1}})
    for tuned in (attached, attached.state_dict()):
        with pytest.raises(FileError, match="^tuned: a model with an adapter attached. Take the"):
            paramlora.difference(model(), tuned, 1)


WEIGHT = torch.eye(3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "it holds no tensors. Give a checkpoint that has some"),
        ({"step": 3}, "it holds no tensors"),
        (torch.nn.ReLU(), "it holds no tensors"),
        (None, "expected a checkpoint, got None. Give a file, a folder, a state dict or a model"),
        (3, "expected a checkpoint, got 3"),
        ([WEIGHT], "expected a checkpoint, got .tensor"),
        (WEIGHT, "expected a checkpoint, got tensor"),
        (paramlora.Adapter({}), "expected a checkpoint, got Adapter"),
        ({1: WEIGHT}, "expected a state dict, whose keys are names, and one is 1"),
    ],
)
def test_what_is_no_checkpoint_is_told(given, told):
    other = {"w": WEIGHT}
    for pair, name in (((given, other), "base"), ((other, given), "tuned")):
        with pytest.raises(FileError, match=f"^{name}: {told}"):
            paramlora.difference(*pair, 1)
    with pytest.raises(FileError, match=f"^base: {told}"):
        paramlora.difference(given, given, 1)


def test_vectors_alone_are_had_whole_at_any_rank():
    base, tuned = {"norm": torch.zeros(3)}, {"norm": torch.ones(3)}
    assert paramlora.difference(base, tuned, 4, whole=True).adapter.whole.keys() == {"norm"}
    with pytest.raises(paramlora.AdapterError, match="but vectors, which whole .--whole. keeps"):
        paramlora.difference(base, tuned, 4)


def test_what_is_no_adapter_and_no_name_is_told():
    for given in (3, None, model(), [paramlora.Adapter({})]):
        with pytest.raises(paramlora.AdapterError, match="expected an adapter or its file, got"):
            paramlora.resize(given, 1)
    with pytest.raises(paramlora.AdapterError, match="the name of a layer, got 3. Give a string"):
        paramlora.resize(paramlora.Adapter({}), {3: 1})
    with pytest.raises(paramlora.AdapterError, match="the name of a layer, got 3. Give a string"):
        paramlora.difference({"w": WEIGHT}, {"w": WEIGHT + 1}, 1, exclude=[3])
