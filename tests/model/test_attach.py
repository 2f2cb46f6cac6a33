"""What cannot be adapted, switched or loaded is refused in one clear sentence; nothing changes."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import lowranks


def picture(model):
    return [
        (
            path,
            id(module),
            type(module),
            [(n, id(p), p.requires_grad) for n, p in module._parameters.items() if p is not None],
            [name for name, _ in module.named_children()],
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    ]


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the deprecated form is what is tested
        return nn.utils.weight_norm(nn.Linear(4, 3))


def pruned():
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)


RECOMPUTED = "no weight of its own to adapt, because a hook computes it anew before each call"


@pytest.mark.parametrize(
    "layer, text",
    [
        (
            lambda: Holder(torch.ones(4, 4, dtype=torch.int8)),
            "0.weight, of type torch.int8: a hard",
        ),
        (lambda: Holder(torch.ones(4, 4, dtype=torch.complex64)), "of type torch.complex64"),
        (lambda: Holder(torch.ones(4, 4).to(torch.float8_e4m3fn)), "of type torch.float8_e4m3fn"),
        (lambda: Holder(torch.ones(4)), r"of shape [4]: an update needs two or more dimensions"),
        (lambda: Holder(torch.ones(4, 0)), r"of shape [4, 0]: it is empty"),
        (lambda: nn.LazyLinear(3), "0.weight has no shape yet. Call the model once on an example"),
        (
            lambda: nn.Embedding(9, 4, sparse=True),
            "whose gradients are sparse, which no update can",
        ),
        (lambda: nn.EmbeddingBag(9, 4, sparse=True), "Make the layer sparse=False"),
        (weight_normed, RECOMPUTED),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), RECOMPUTED),
        (pruned, RECOMPUTED),
    ],
)
def test_weights_that_cannot_be_adapted(layer, text):
    model = nn.Sequential(layer(), nn.Linear(3, 3))
    before = picture(model)
    with pytest.raises(paramlora.TargetError, match=re.escape(text)):
        paramlora.attach(model, {"0": {"r": 1}, "1": {"r": 1}})
    assert picture(model) == before


def test_a_sweeping_pattern_passes_over_what_cannot_be_adapted():
    bad = [torch.ones(4, 4, dtype=torch.int8), torch.ones(4), torch.ones(4, 0)]
    model = nn.Sequential(*map(Holder, bad), nn.Linear(4, 4))
    for pattern in ("*", "re:.*"):
        assert [t.path for t in paramlora.targets(model, {pattern: {"r": 1}})] == ["3"]


def test_a_lazy_layer_elsewhere_is_named_before_anything_is_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    with pytest.raises(paramlora.TargetError, match="1.weight has no shape yet"):
        paramlora.attach(model, {"0": {"r": 1}})
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_built_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(paramlora.TargetError, match="0.weight was made under torch.inference_mode"):
        paramlora.attach(model, {"0": {"r": 1}})


@pytest.mark.parametrize("name", ("", None, 3, ["a"]))
def test_names_that_are_none(name):
    model = nn.Sequential(nn.Linear(4, 3))
    before = picture(model)
    with pytest.raises(paramlora.AdapterError, match="must be a non-empty string, got"):
        paramlora.attach(model, {"0": {"r": 1}}, name)
    assert picture(model) == before


@pytest.mark.parametrize("model", ("model.pt", None, {}, nn.Linear))
def test_models_that_are_none(model):
    with pytest.raises(paramlora.TargetError, match="expected a torch.nn.Module, got a"):
        paramlora.attach(model, {"0": {"r": 1}})


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf, "0.5", None, True, [1.0]))
def test_strengths_that_are_no_numbers_change_none(value):
    model = nn.Sequential(nn.Linear(4, 3))
    paramlora.attach(model, {"0": {"r": 1}}, "a")
    paramlora.attach(model, {"0": {"r": 1}}, "b")
    with pytest.raises(paramlora.AdapterError, match='"b": its strength must be a finite number'):
        paramlora.set_adapters(model, {"a": 0.5, "b": value})
    assert [low.strength for _, _, low in lowranks(model)] == [1.0, 1.0]


@pytest.mark.parametrize("value", ("a", ["a"], None))
def test_strengths_that_are_no_mapping(value):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 1}}, "a")
    with pytest.raises(paramlora.AdapterError, match='expected strengths such as {"style": 0.7}'):
        paramlora.set_adapters(model, value)


@pytest.mark.parametrize("verb", (paramlora.merge, paramlora.detach))
def test_adapters_that_are_not_there(verb):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 1}}, "a")
    before = picture(model)
    for names in ("b", ["a", "b"], {"b"}):
        with pytest.raises(
            paramlora.AdapterError, match='no adapter "b" is attached. Attached: a.'
        ):
            verb(model, names)
    with pytest.raises(paramlora.AdapterError, match="expected the names of adapters, got 3"):
        verb(model, 3)
    assert picture(model) == before


def test_a_scripted_layer_is_refused_as_a_target_and_left_alone_elsewhere():
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    model = nn.Sequential(nn.Linear(3, 3), scripted)
    before = picture(model)
    with pytest.raises(paramlora.TargetError, match="1.weight, which torch.jit compiled. Attach"):
        paramlora.attach(model, {"1": {"r": 1}})
    assert picture(model) == before
    paramlora.attach(model, {"re:.*": {"r": 1}})
    assert [path for path, _, _ in lowranks(model)] == ["0"]
    x, y = torch.ones(1, 3), model(torch.ones(1, 3))
    assert torch.equal(paramlora.merge(model)(x), y)


@pytest.mark.parametrize("frozen", (True, False))
def test_a_trainable_model_of_which_nothing_can_train_is_a_warning(frozen):
    model = nn.Sequential(nn.Linear(3, 3))
    if frozen:
        paramlora.attach(model, {"0": {"r": 1}}, "first")
        with pytest.warns(paramlora.ParamloraWarning, match='"trainable_model" is set, but no par'):
            paramlora.attach(model, {"0": {"r": 1}, "trainable_model": 1}, "second")
    else:
        paramlora.attach(model, {"0": {"r": 1}, "trainable_model": 1}, "second")
    assert model[0].bias.requires_grad is not frozen


def test_a_layer_of_the_users_own_called_parametrizations_is_left_alone():
    model = nn.ModuleDict({"parametrizations": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    paramlora.attach(model, {"other": {"r": 1}})
    assert [path for path, _, _ in lowranks(model)] == ["other"]
    assert type(paramlora.merge(model)["other"]) is nn.Linear


@pytest.mark.parametrize(
    "config, strict, text",
    [
        (
            {"9": {"r": 1}},
            False,
            'nothing to adapt in Sequential (3 modules): "9" matches nothing.',
        ),
        (
            {"0": {"r": 1}, "9": {"r": 1}},
            True,
            'config: "9" matches nothing. There are: 0, 1 (1 layer each). Remove',
        ),
        ({"re:0": {"r": 1}, "re:.*": {"r": 2}}, False, '0.weight: "re:0" and "re:.*" claim it equ'),
        (
            {"1": {"r": 4}},
            False,
            '"1": r = 4 is more than 1 holds: its matrix is 3×3. Give r of at',
        ),
        ({"0": {"r": 1}, "1": {"r": 1, "scale": 1e99}}, False, "scale 1e+99 is beyond"),
        (
            {"0": {"r": 1}, "1": {"r": 1, "hard": 0, "up_kernel": "same"}},
            False,
            "which has no kernel",
        ),
    ],
)
def test_configurations_that_do_not_fit(config, strict, text):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    before = picture(model)
    with pytest.raises(paramlora.TargetError, match=re.escape(text)):
        paramlora.attach(model, config, strict=strict)
    assert picture(model) == before


def test_one_entry_of_several_without_a_match_is_a_warning_with_the_closest_name():
    model = nn.ModuleDict({"to_q": nn.Linear(4, 3), "to_v": nn.Linear(4, 3)})
    with pytest.warns(paramlora.ParamloraWarning, match='"to_qq" matches nothing. Closest: "to_q"'):
        paramlora.attach(model, {"to_qq": {"r": 1}, "to_v": {"r": 1}})
    assert [path for path, _, _ in lowranks(model)] == ["to_v"]


def test_the_same_adapter_twice():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 1}}, "a")
    before = picture(model)
    with pytest.raises(paramlora.AdapterError, match='adapter "a" is attached already. Detach it'):
        paramlora.attach(model, {"0": {"r": 2}}, "a")
    assert picture(model) == before


def test_reading_and_writing_an_adapter_that_is_not_there(tmp_path):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 1}}, "a")
    path = tmp_path / "b.safetensors"
    for call in (
        lambda: paramlora.adapter_state_dict(model, "b"),
        lambda: paramlora.load_adapter_state_dict(model, {}, "b"),
        lambda: paramlora.save_adapter(model, path, "b"),
        lambda: paramlora.set_adapters(model, {"a": 1, "b": 1}),
    ):
        with pytest.raises(
            paramlora.AdapterError, match='no adapter "b" is attached. Attached: a.'
        ):
            call()
    assert not path.exists()
