"""What the table of updates says: factors, sizes, and what does nothing or harm."""

import math

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.LayerNorm(2)).double()


def trained():
    config = {"0": {"r": 2, "scale": 3.0}, "1": {"r": 1, "kind": "dora"}, "2.bias": {"whole": 1}}
    model = paramlora.attach(net(), config)
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def rows(model):
    return {row.path: row for row in paramlora.summary(model).rows}


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_the_sizes_are_those_of_the_float64_sums(strength):
    model, plain = trained(), net()
    plain[2].bias.data.fill_(0.5)  # of zeros, no size is known
    model[2].parametrizations.bias.original.data.fill_(0.5)
    paramlora.set_adapters(model, {"default": strength})
    found = rows(model)
    update = model[0].parametrizations.weight[0]
    change = 3.0 * strength * update.lora_B @ update.lora_A
    assert found["0"].norm == pytest.approx((change.norm() / plain[0].weight.norm()).item(), 1e-12)
    merged = paramlora.merge(model)
    for path, tensor in (("1", "weight"), ("2.bias", "bias")):
        was, now = (getattr(one[int(path[0])], tensor).double() for one in (plain, merged))
        assert found[path].norm == pytest.approx(((now - was).norm() / was.norm()).item(), 1e-9)
    assert {row.strength for row in found.values()} == {strength}
    assert (found["0"].scale, found["0"].state) == (3.0, "")


def test_the_table_says_them():
    model = paramlora.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"*": {"r": 1}})
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.eye(2) * 2)
        low = model[0].parametrizations.weight[0]
        low.lora_A.fill_(0.1), low.lora_B.fill_(1.0)
    paramlora.set_adapters(model, {"default": 0.5})
    lines = str(paramlora.summary(model)).splitlines()
    assert lines[0].split() == [
        "tensor",
        "adapter",
        "r",
        "scale",
        "kind",
        "parameters",
        "update/weight",
    ]
    assert lines[1].split() == ["0", "default", "1", "0.5", "hard", "4", "0.035"]  # 0.1 / √8
    assert lines[2].split() == ["1", "default", "1", "0.5", "hard", "4", "idle"]
    assert lines[4:] == ["idle: 1 of 2 updates, which change nothing, as before the first step"]
    assert repr(paramlora.summary(model)) == str(paramlora.summary(model))


def test_what_is_off_or_not_finite_is_said():
    model = trained()
    paramlora.attach(model, {"0": {"r": 1}}, "second")
    paramlora.set_adapters(model, {"default": 1.0})
    with torch.no_grad():
        model[1].parametrizations.weight[0].lora_B[0, 0] = math.inf
        model[2].parametrizations.bias[0].lora_whole[1] = math.nan
    states = [row.state for row in paramlora.summary(model).rows]
    assert states == ["", "off", "not finite", "not finite"]
    text = str(paramlora.summary(model))
    assert "off: 1 of 4 updates, by set_adapters or disable_adapters" in text
    assert "not finite: 2 of 4 updates, so detach that adapter, or load a sound one" in text
    with paramlora.disable_adapters(model):
        assert rows(model)["0"].state == "off"


def test_without_an_adapter_it_says_so():
    model = net()
    shown = paramlora.summary(model)
    assert str(shown) == "no adapter is attached; 27 of 27 parameters train (100.00 %)"
    assert shown.rows == () and shown._repr_html_() == f"<pre>{shown}</pre>"
    assert (
        str(paramlora.summary(nn.ReLU()))
        == "no adapter is attached; 0 of 0 parameters train (0.00 %)"
    )


def test_what_has_no_size_is_measured_as_none():
    with torch.device("meta"):
        model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
    (row,) = paramlora.summary(model).rows
    assert math.isnan(row.norm) and row.state == "" and " -" in str(paramlora.summary(model))
    soft = {"0": {"r": 2, "hard": 0, "up_kernel": "same"}}
    model = paramlora.attach(nn.Sequential(nn.Conv1d(4, 3, 3)), soft)
    assert math.isnan(rows(model)["0"].norm)
    zero = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(zero[0].weight)
    paramlora.attach(zero, {"0": {"r": 2}})
    ((_, _, low),) = updates(zero)
    assert rows(zero)["0"].state == "idle"
    nn.init.normal_(low.lora_B)
    assert rows(zero)["0"].norm == math.inf


def test_a_table_changes_nothing_of_the_model():
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 4).double()
    want = model(x)
    str(paramlora.summary(model))
    assert torch.equal(model(x), want)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_are_escaped_in_a_notebook():
    model = paramlora.attach(nn.ModuleDict({"<script>": nn.Linear(2, 2)}), {"*": {"r": 1}}, "&<b>")
    text = paramlora.summary(model)._repr_html_()
    assert "&lt;script&gt;" in text and "&amp;&lt;b&gt;" in text
    assert "<script>" not in text and "<b>" not in text


def test_two_kinds_of_update_on_one_weight_are_two_lines():
    model = paramlora.attach(net(), {"0": {"r": 2}}, "a")
    paramlora.attach(model, {"0": {"r": 1, "hard": 0}}, "b")
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.normal_()
    weight = net()[0].weight
    for (_, _, update), row in zip(updates(model), paramlora.summary(model).rows, strict=True):
        size = (update.lora_scale * update.lora_B @ update.lora_A).norm() / weight.norm()
        assert row.adapter == update.adapter and row.norm == pytest.approx(size.item())


def test_the_weight_under_a_norm_is_read_with_every_update_on():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    paramlora.attach(model, {"0": {"r": 2}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    held, seen = model[0].parametrizations.weight, []
    norm, plain = held[0], held[0](held.original0, held.original1)
    size = (low.lora_scale * low.lora_B @ low.lora_A).norm() / plain.norm()
    norm.register_forward_hook(lambda *_: seen.append(low.strength))  # as another thread's call
    assert rows(model)["0"].norm == pytest.approx(size.item())
    assert set(seen) == {1.0}
