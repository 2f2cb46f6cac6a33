"""Entries that mean a class of layers."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora import ConfigError, LoRAConfig, TargetError
from tests.model.chosen import Narrow, R, chosen, net


def test_a_class_means_it_and_those_that_derive_from_it():
    linears = [f"{at}.{name}" for at in "ab" for name in ("attn.out_proj", "up")] + ["head"]
    for name in ("type:Linear", "type:torch.nn.Linear", "type:torch.nn.modules.linear.Linear"):
        assert chosen(net(), {name: R}) == {name: linears}
    narrow = {"type:Narrow": ["a.up", "b.up"]}
    assert chosen(net(), {"type:Narrow": R}) == narrow
    assert chosen(net(), {f"type:{Narrow.__module__}.Narrow": R}) == {
        f"type:{Narrow.__module__}.Narrow": narrow["type:Narrow"]
    }
    assert chosen(net(), {"type:Mine": R}) == {"type:Mine": ["a.mine.table", "b.mine.table"]}
    inside = {"type:MultiheadAttention": ["a.attn.in_proj_weight", "b.attn.in_proj_weight"]}
    assert chosen(net(), {"type:MultiheadAttention": R}) == inside
    lstm = nn.LSTM(3, 2, num_layers=2)
    names = [f"weight_{side}_l{i}" for i in range(2) for side in ("ih", "hh")]
    assert chosen(lstm, {"type:LSTM": R}) == {"type:LSTM": names}
    assert chosen(nn.Linear(2, 2), {"type:Linear": R}) == {"type:Linear": [""]}


def test_a_class_is_found_under_an_update_too():
    model = paramlora.attach(net(), {"type:Linear": R})
    assert chosen(model, {"type:Linear": R}) == chosen(net(), {"type:Linear": R})


def test_a_class_trained_whole_takes_all_that_its_modules_hold():
    found = chosen(net(), {"type:LayerNorm": {"whole": 1}, "type:Mine": R})
    norms = [f"{at}.norm{end}" for at in "ab" for end in ("", ".bias")]
    assert found["type:LayerNorm"] == norms
    assert len(chosen(net(), {"type:Block": {"whole": 1}})["type:Block"]) == 20
    assert chosen(nn.LayerNorm(2), {"type:LayerNorm": {"whole": 1}}) == {
        "type:LayerNorm": ["", "bias"]
    }


def test_an_update_by_class_is_the_products_sum():
    """The adapted outputs against a plain model whose weights are the float64 sums."""
    model, plain = net(), net()
    paramlora.attach(model, {"type:Narrow": {"r": 2, "scale": 3.0}, "type:Mine": R})
    with torch.no_grad():
        for at in "ab":
            for path in ("up.weight", "mine.table"):
                owner, _, name = f"{at}.{path}".rpartition(".")
                update = model.get_submodule(owner).parametrizations[name][0]
                update.lora_B.normal_()
                scale = 3.0 if name == "weight" else 1.0
                plain.get_parameter(f"{at}.{path}").add_(scale * update.lora_B @ update.lora_A)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for at in "ab":
        torch.testing.assert_close(model[at](x), plain[at](x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["type:", "type:a b", "type:.Linear", "type:*", "type:Linear.", "type:re:x"]
)
def test_no_class_is_refused(name):
    with pytest.raises(
        ConfigError, match='"type:" takes the name of one class, such as "type:Linear"'
    ):
        LoRAConfig.from_dict({name: R})
    with pytest.raises(ConfigError, match='"type:" takes the name of one class'):
        LoRAConfig.from_dict({"up": R, "exclude": [name]})


def test_a_class_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(
        TargetError, match=r'"type:Liner" matches nothing. Closest: "type:Linear" \(1 lay'
    ):
        chosen(net(), {"type:Liner": R})
    with pytest.raises(
        TargetError, match=r"There are: MultiheadAttention, NonDyn.* \(2 layers each\)"
    ):
        chosen(net(), {"type:Zzz": R})
    with pytest.raises(
        TargetError, match=r'"type:Block" matches a, a Block with no weight of its own.*a\.attn'
    ):
        chosen(net(), {"type:Block": R})
    with pytest.raises(TargetError, match='"type:not.imported.Linear" matches nothing'):
        chosen(net(), {"type:not.imported.Linear": R})


def test_a_class_of_which_one_cannot_be_adapted_is_refused():
    model = net()
    model["b"].up = Narrow(4, 0)
    with pytest.raises(
        TargetError, match=r'"type:Narrow" matches b.up.weight, of shape \[0, 4\]: it is empty'
    ):
        chosen(model, {"type:Narrow": R})
