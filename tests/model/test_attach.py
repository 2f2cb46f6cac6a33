"""Attaching and switching: what cannot be is refused in one clear sentence, and nothing changes."""

import copy
import itertools
import math
import re
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import paramlora
from paramlora import ParamloraError, ParamloraWarning, attach, summary
from paramlora.model.attach import updates
from tests.config.generated import FLAGS, NEARLY


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
    assert [low.strength for _, _, low in updates(model)] == [1.0, 1.0]


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
    assert [path for path, _, _ in updates(model)] == ["0"]
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
    assert [path for path, _, _ in updates(model)] == ["other"]
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
    assert [path for path, _, _ in updates(model)] == ["to_v"]


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


FEWER = settings(max_examples=40, deadline=None, database=None)


# errors leave nothing behind


def fingerprint(model):
    """Identities, so that an equal copy of something counts as a change."""
    return [
        (
            path,
            id(module),
            type(module),
            module.training,
            list(module._modules),
            [(n, id(p), getattr(p, "requires_grad", None)) for n, p in module._parameters.items()],
            [(p.data_ptr(), p.tolist()) for p in module._parameters.values() if p is not None],
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            sorted(module.__dict__),
        )
        for path, module in model.named_modules()
    ]


def mixed():
    model = nn.ModuleDict(
        {
            "to_q": nn.Linear(3, 2),
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.LayerNorm(3),
            "table": nn.Embedding(5, 3),
            "block": nn.ModuleDict({"to_q": nn.Linear(3, 3), "attn": nn.MultiheadAttention(4, 2)}),
            "lstm": nn.LSTM(3, 2),
        }
    )
    model["conv"].bias.requires_grad_(False)
    return model


MIXED_NAMES = st.sampled_from(
    "to_q block.to_q *.to_q conv norm table block attn out_proj in_proj_weight lstm "
    "weight_ih_l0 weight bias nothing re:.* re:block.*".split()
)
MIXED_ENTRIES = NEARLY | st.fixed_dictionaries(
    {"r": st.integers(1, 5)},
    optional={"hard": FLAGS, "up_kernel": st.sampled_from([1, "same"]), "scale": st.just(2)},
)


@pytest.mark.parametrize("attached", (False, True))
@FEWER
@given(st.dictionaries(MIXED_NAMES, MIXED_ENTRIES, min_size=1, max_size=3), st.booleans())
def test_an_error_leaves_the_model_as_it_was(attached, config, strict):
    model = mixed()
    if attached:
        attach(model, {"to_q": {"r": 1}, "conv": {"r": 1, "hard": 0}}, adapter="first")
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)
        try:
            attach(model, config, strict=strict)
        except ParamloraError:
            assert fingerprint(model) == before
        else:
            assert fingerprint(model) != before


class Interrupted:
    """Ctrl-C at the n-th line that Python runs inside some functions of the package."""

    def __init__(self, at, names):
        self.left, self.names = at, names

    def __call__(self, frame, event, _):
        if frame.f_code.co_name not in self.names or "paramlora" not in frame.f_code.co_filename:
            return None
        return self.line

    def line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.line


def interrupt(at, names, call):
    """Whether `call` was interrupted."""
    tracer = sys.gettrace()
    sys.settrace(Interrupted(at, names))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


@pytest.mark.parametrize("attached", (False, True))
def test_ctrl_c_at_any_line_of_attaching_leaves_the_model_as_it_was(attached):
    config = {n: {"r": 1} for n in ("to_q", "table", "out_proj", "in_proj_weight", "*.to_q")}
    config |= {"weight_ih_l0": {"r": 1}, "conv": {"r": 1, "hard": 0}}
    model = mixed()
    parametrizations.weight_norm(model["block"]["to_q"])
    if attached:
        attach(model, {"to_q": {"r": 1}, "conv": {"r": 1, "hard": 0}}, adapter="first")
    before, lines = fingerprint(model), 0
    inside = {"_register", "_former", "shared", "add_branch", "attach"}
    whole = summary(attach(copy.deepcopy(model), config)).rows
    while interrupt(lines, inside, lambda: attach(model, config)):
        if fingerprint(model) != before:  # the last line, `return model`: all is there
            assert [row.path for row in summary(model).rows] == [row.path for row in whole]
            break
        lines += 1
    assert lines > 50
    attach(model, {"re:.*(to_q|conv)": {"r": 1}}, adapter="after")
    assert torch.is_tensor(model["to_q"](torch.ones(1, 3)))


ROWS = [["a", None], ["b", "a"]]  # of two blocks of route


def made():
    """A layer with two adapters, and by adapter what each row gives, formed here."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    for name in "ab":
        paramlora.attach(layer, {"weight": {"r": 2}}, name)
    held = {update.adapter: update for _, _, update in updates(layer)}
    with torch.no_grad():
        for update in held.values():
            update.lora_B.normal_()
    base, x = layer.parametrizations.weight.original, torch.randn(2, 4).double()
    delta = {n: u.lora_scale * u.lora_B @ u.lora_A for n, u in held.items()}
    weight = {None: base, "a": base + delta["a"], "b": base + delta["b"], "both": base}
    weight["both"] = base + delta["a"] + delta["b"]
    found = {n: nn.functional.linear(x, w, layer.bias).detach() for n, w in weight.items()}
    return layer, x, found


def wanted(found, opened):
    """Nothing acts in a block of disable_adapters, else the rows of the last block of route."""
    if "off" in opened:
        return found[None]
    rows = ["both"] * 2 if not opened else ROWS[opened[-1]]
    return torch.stack([found[name][at] for at, name in enumerate(rows)])


@pytest.mark.parametrize("order", list(itertools.permutations(["off", 0, 1])))
def test_blocks_are_left_in_any_order(order):
    layer, x, found = made()
    for leaving in itertools.permutations(order):
        opened, blocks = [], {}
        for name in order:
            off = name == "off"
            make = paramlora.disable_adapters(layer) if off else paramlora.route(layer, ROWS[name])
            blocks[name] = make
            make.__enter__()
            opened.append(name)
        for name in leaving:
            torch.testing.assert_close(layer(x), wanted(found, opened), rtol=1e-12, atol=1e-12)
            blocks[name].__exit__(None, None, None)
            opened.remove(name)
        torch.testing.assert_close(layer(x), found["both"], rtol=1e-12, atol=1e-12)
