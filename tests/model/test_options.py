"""A sweep of the options of training: dropout, types, and tensors trained whole."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import paramlora
from paramlora import AdapterError, ConfigError, LoRAConfig, TargetError
from paramlora.evaluate.dropout import drops_for, masked
from paramlora.model.attach import updates
from tests.update.weights import CLOSE, as_weight

pytestmark = pytest.mark.usefixtures("one_seed")


# the configuration


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"r": 2, "dropout": -0.5}, r'"dropout" must be at least 0 and below 1, got -0\.5'),
        ({"r": 2, "dropout": 1}, r"below 1, got 1\.0"),
        ({"r": 2, "init": "zero"}, "default, kaiming, olora, orthogonal, pissa, got 'zero'"),
        ({"r": 2, "init": ["pissa"]}, r"got \['pissa'\]"),
        ({"r": 2, "init": "pissa", "trainable_scale": 1}, 'cannot go with "trainable_scale": 1'),
        ({"r": 2, "init": "olora", "hard": 0, "up_kernel": "same"}, "\"up_kernel\": 'same'"),
        ({"r": 2, "init": "pissa", "scale": 0}, "needs a scale other than 0"),
        ({"r": 2, "rslora": 1}, 'rslora" is scale = alpha / sqrt'),
        ({"r": 2, "alpha": 1, "rslora": "yes"}, "must be 0, 1, true or false, got 'yes'"),
        ({"r": 2, "adapter_dtype": "int8"}, "bfloat16, float16, float32, float64, got 'int8'"),
        ({"whole": 1, "r": 2}, '"whole" trains the tensors themselves, so "r" means nothing'),
        ({"whole": 2}, '"whole" must be 0, 1, true or false, got 2'),
        ({"whole": 0}, '"r" is missing'),
    ],
)
def test_bad_options_are_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig.from_dict({"0": entry})


def test_whole_tensors_in_a_model_that_trains_anyway():
    with pytest.raises(ConfigError, match='"trainable_model" trains every tensor in place'):
        LoRAConfig.from_dict({"trainable_model": 1, "0": {"whole": 1}})


def test_options_survive_json():
    entries = {
        "a": {"r": 4, "alpha": 8, "rslora": 1, "dropout": 0.1, "init": "kaiming"},
        "b": {"r": 1, "adapter_dtype": "bfloat16"},
        "c": {"whole": True, "adapter_dtype": "float32"},
    }
    config = LoRAConfig.from_dict(entries)
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.entries[0].scale == 8 / math.sqrt(4)
    assert LoRAConfig.from_dict({"a": {"r": 4, "alpha": 8, "rslora": 0}}).entries[0].scale == 2


# dropout

DROPPED = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(50, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(9, 4, 5, 5)),
    "circular": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2, padding_mode="circular"),
        lambda: torch.randn(9, 4, 5),
    ),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(9, 4, 5)),
}
HOW = [(k, h) for k in DROPPED for h in (1, 0) if not (k == "transposed" and h)]


@pytest.mark.parametrize("kind, hard", HOW)
def test_dropout_takes_from_the_branchs_input_alone(kind, hard):
    """With the mask known, the output is the base's plus the update of the masked input."""
    make, data = DROPPED[kind]
    plain, x = make().double(), data().double().requires_grad_()
    model = nn.Sequential(copy.deepcopy(plain))
    paramlora.attach(model, {"0": {"r": 2, "scale": 1.5, "dropout": 0.25, "hard": hard}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    product = (low.lora_B @ low.lora_A).detach()
    update = copy.deepcopy(plain)
    update.bias = None
    update.weight = nn.Parameter(1.5 * as_weight(plain, product, plain.weight.shape))
    torch.manual_seed(3)
    got = model.train()(x)
    torch.manual_seed(3)
    mask = masked(torch.ones_like(x), drops_for(x, (0.25,), (2,)), 0) / 0.75
    assert 0.1 < (mask == 0).double().mean() < 0.4 and mask.max() == 1 / 0.75
    torch.testing.assert_close(got, plain(x) + update(x * mask), **CLOSE)
    grad = torch.autograd.grad(got.square().sum(), x)[0]
    want = torch.autograd.grad((plain(x) + update(x * mask)).square().sum(), x)[0]
    torch.testing.assert_close(grad, want, **CLOSE)
    torch.testing.assert_close(model.eval()(x), plain(x) + update(x), **CLOSE)
    paramlora.merge(model)
    torch.testing.assert_close(model.train()(x), plain(x) + update(x), **CLOSE)


def test_dropout_stays_with_a_whole_bias_and_a_second_adapter():
    model = nn.Sequential(nn.Linear(8, 6)).double()
    paramlora.attach(model, {"0": {"r": 2, "dropout": 0.5}, "0.bias": {"whole": 1}})
    paramlora.attach(model, {"0": {"r": 1}}, "second")
    first, second = (low for _, _, low in updates(model) if low.r)  # beside the bias
    for low in (first, second):
        nn.init.normal_(low.lora_B)
    x = torch.randn(4, 8).double()
    assert not torch.equal(model(x), model(x))
    base, bias = model[0].parametrizations.weight.original, model[0].bias
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    seen = masked(x, drops_for(x, (0.5, 0.0), (2, 1)), 0) / 0.5
    want = F.linear(x, base + second.lora_B @ second.lora_A, bias)
    torch.testing.assert_close(got, want + seen @ (first.lora_B @ first.lora_A).T, **CLOSE)
    paramlora.set_adapters(model, {"second": 1})
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, bias), **CLOSE)


@pytest.mark.parametrize(
    "layer, entry",
    [
        (lambda: nn.MultiheadAttention(8, 2), "0.in_proj_weight"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj"),
        (lambda: nn.Embedding(9, 8), "0"),
        (lambda: nn.LSTM(4, 4), "weight_ih_l0"),
        (lambda: nn.ConvTranspose1d(4, 4, 3), "0"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "0.weight"),
    ],
)
def test_dropout_where_only_the_weight_is_known_is_refused(layer, entry):
    model = nn.Sequential(layer())
    before = [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match=f'"{entry}": "dropout" cannot act at 0.* a weight has'):
        paramlora.attach(model, {entry: {"r": 1, "dropout": 0.1}})
    assert [type(m) for m in model.modules()] == before


class Tagged(torch.Tensor):
    """As images of torchvision, and all tensors of fastai, are."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def ragged(x):
    return torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)


INPUTS = {
    "plain": lambda x: x,
    "alone": lambda x: x[0],  # a row, or an image without its batch
    "of a class": lambda x: x.as_subclass(Tagged),
    "nested": ragged,
}
BESIDE = {
    "nothing": lambda model: None,
    "another": lambda model: paramlora.attach(model, {"0": {"r": 1}}, "second"),
    "a loha": lambda model: paramlora.attach(model, {"0": {"r": 1, "kind": "loha"}}, "second"),
    "a dora": lambda model: paramlora.attach(model, {"0": {"r": 1, "kind": "dora"}}, "second"),
    "a rule": lambda model: parametrize.register_parametrization(model[0], "weight", Doubled()),
}


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 32)


DROPPING = {
    "linear": (lambda: nn.Linear(32, 6), (3, 32)),
    "Conv1D": (conv1d_of_transformers, (3, 32)),
    "1": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 5)),
    "2": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    "3": (lambda: nn.Conv3d(4, 6, 2, groups=2), (3, 4, 5, 5, 3)),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_acts_or_says_that_it_cannot(kind, beside):
    """Never neither: whatever the input is, and whatever else is on the weight."""
    make, shape = DROPPING[kind]
    of_a_kind = ({"r": 2, "hard": 0}, {"r": 2, "kind": "dora"}) if beside == "nothing" else ()
    refused = ("nested",) if beside in ("nothing", "another") else (*INPUTS,)
    for entry in ({"r": 2}, *of_a_kind):
        model = paramlora.attach(nn.Sequential(make()).double(), {"0": entry | {"dropout": 0.5}})
        BESIDE[beside](model)
        for p in paramlora.trainable_parameters(model):
            nn.init.normal_(p)
        for name, given in INPUTS.items():
            x = torch.randn(shape).double()
            if name == "nested" and (entry.get("hard") == 0 or kind != "linear"):
                continue  # which the others take not even without an update
            x, found = given(x), f"{entry} {name}"
            if name in refused:
                with pytest.raises(AdapterError, match="as a dense sum .* cannot act. "):
                    model.train()(x)
            else:
                one, two = model.train()(x), model(x)
                assert one.shape == two.shape == model.eval()(x).shape
                assert type(one) is type(make().double()(x)), found
                assert not torch.equal(one, two), found
            # where nothing is dropped, all of it is as ever
            torch.testing.assert_close(model.eval()(x), model(x))
            with paramlora.disable_adapters(model.train()):
                torch.testing.assert_close(model(x), model(x))


def test_an_image_without_its_batch():
    """Its mask is that of a batch of one, and its gradients are."""
    for make, shape in list(DROPPING.values())[2:]:
        model = paramlora.attach(nn.Sequential(make()).double(), {"0": {"r": 2, "dropout": 0.5}})
        nn.init.normal_(next(updates(model))[2].lora_B)
        x, found = torch.randn(shape[1:]).double().requires_grad_(), []
        for given in (x, x[None]):
            torch.manual_seed(3)
            y = model(given).reshape(-1)
            leaves = [x, *paramlora.trainable_parameters(model)]
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for one, two in zip(*found):
            torch.testing.assert_close(one, two, **CLOSE)


# types


@pytest.mark.parametrize("hard", (1, 0))
def test_narrow_factors_leave_a_wide_base_whole(hard):
    model = nn.Sequential(nn.Linear(8, 6))
    weight = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": 2, "adapter_dtype": "bfloat16", "hard": hard}})
    ((_, _, low),) = updates(model)
    assert low.lora_A.dtype == low.lora_B.dtype == torch.bfloat16
    if hard:
        assert torch.equal(model[0].weight, weight)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), F.linear(x, weight, model[0].bias))
    nn.init.normal_(low.lora_B)
    want = weight.double() + low.lora_B.double() @ low.lora_A.double()
    paramlora.merge(model)
    # the product in float32, rounded once: bfloat16 anywhere on the way would miss by 1e-3
    torch.testing.assert_close(model[0].weight.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_factors_are_float32_on_a_16_bit_base_unless_told(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype)
    name = str(dtype).split(".")[1]
    paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 2, "adapter_dtype": name}})
    first, second = (low for _, _, low in updates(model))
    assert first.lora_A.dtype == torch.float32 and second.lora_A.dtype == dtype
    assert second.lora_scale.dtype == torch.float32  # a number that 16 bits would round
    assert model(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    for low in (first, second):
        nn.init.normal_(low.lora_B)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    plain = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype)
    other = paramlora.load_adapter(plain, tmp_path / "a.safetensors")
    assert [low.lora_A.dtype for _, _, low in updates(other)] == [torch.float32, dtype]


# tensors trained whole


def classifier():
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8)),
            "head": nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)),
        }
    )


def logits(model, x):
    return model["head"](model["body"](x))


WHOLE = {"body.3": {"r": 2}, "head": {"whole": 1}, r"re:body\..*bias": {"whole": 1}}
NAMES = [f"head.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")] + [
    f"body.{i}.bias" for i in (0, 2, 3)
]


def trained(dtype=torch.float64):
    """A model trained for four steps, the plain one, and the same steps taken by hand."""
    plain = classifier().to(dtype)
    model = paramlora.attach(copy.deepcopy(plain), WHOLE)
    state = {k: v.detach().double() for k, v in plain.state_dict().items()}
    (low,) = (low for _, _, low in updates(model) if low.r)
    own = {n: state[n].clone().requires_grad_() for n in NAMES}
    a, b = (t.detach().double().clone().requires_grad_() for t in (low.lora_A, low.lora_B))
    x = torch.randn(16, 5).to(dtype)
    ours = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.1)
    theirs = torch.optim.SGD([a, b, *own.values()], lr=0.1)
    reference = copy.deepcopy(plain).double()
    call = Call(reference)
    for _ in range(4):
        dense = {**own, "body.3.weight": state["body.3.weight"] + b @ a}
        y = torch.func.functional_call(call, {f"m.{k}": v for k, v in dense.items()}, (x.double(),))
        for optimizer, out in ((ours, logits(model, x)), (theirs, y)):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
    dense = {**state, **own, "body.3.weight": state["body.3.weight"] + b @ a}
    return model, plain, {k: v.detach() for k, v in dense.items()}, x


class Call(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return logits(self.m, x)


def test_heads_and_biases_train_whole_and_travel_in_the_file(tmp_path):
    model, plain, dense, x = trained()
    assert {k for k in paramlora.adapter_state_dict(model) if "whole" in k} == {
        f"{n.removesuffix('.weight')}.lora_whole" for n in NAMES
    }
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(plain.parameters()))
    torch.testing.assert_close(
        logits(model, x),
        torch.func.functional_call(Call(plain), {f"m.{k}": v for k, v in dense.items()}, (x,)),
        **CLOSE,
    )
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = paramlora.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    assert torch.equal(logits(loaded, x), logits(model, x))
    for adapted in (model, loaded):
        with paramlora.disable_adapters(adapted):
            assert torch.equal(logits(adapted, x), logits(plain, x))
        off = paramlora.detach(copy.deepcopy(adapted)).state_dict()
        assert list(off) == list(plain.state_dict())
        assert all(torch.equal(v, off[k]) for k, v in plain.state_dict().items())
        merged = paramlora.merge(copy.deepcopy(adapted)).state_dict()
        for key, value in dense.items():
            torch.testing.assert_close(merged[key], value, **CLOSE)


def test_half_strength_lies_halfway():
    model, plain, dense, _ = trained()
    paramlora.set_adapters(model, {"default": 0.5})
    merged = paramlora.merge(model).state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(merged[key], (value + dense[key]) / 2, **CLOSE)


def test_whole_tensors_are_float32_on_a_16_bit_base():
    """A step far below the base's precision arrives, as large as a float64 model's."""
    plain = nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16)
    model = paramlora.attach(copy.deepcopy(plain), {"0": {"whole": 1}})
    dense = copy.deepcopy(plain).double()
    x = torch.randn(16, 8).to(torch.bfloat16)
    for m, data in ((model, x), (dense, x.double())):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-5)
        out = m(data)
        assert out.dtype == data.dtype
        out.square().sum().backward()
        optimizer.step()
    for name in ("weight", "bias"):
        own = model[0].parametrizations[name][0].lora_whole
        assert own.dtype == torch.float32
        start = getattr(plain[0], name).double()
        want = getattr(dense[0], name) - start
        assert (own.double() - start - want).norm() < 0.02 * want.norm()
        assert torch.equal(getattr(plain[0], name), own.to(torch.bfloat16))  # lost if narrow
    assert {p.dtype for p in paramlora.merge(model).parameters()} == {torch.bfloat16}


def test_parameter_groups_and_the_summary_know_them():
    model = paramlora.attach(classifier(), WHOLE)
    groups = {g["name"]: g for g in paramlora.parameter_groups(model, lr=1e-3, lr_ratio=4)}
    assert len(groups["whole"]["params"]) == len(NAMES)
    assert groups["whole"]["lr"] == 1e-3 and set(groups) == {"lora_A", "lora_B", "whole"}
    rows = {row.path: row for row in paramlora.summary(model).rows}
    assert rows["head.2"].kind == "whole" and rows["head.2"].parameters == 12
    assert sum(t.parameters for t in paramlora.targets(model, {"head.2": {"whole": 1}})) == 15


def test_one_tensor_has_no_other_update_beside_its_whole():
    model = paramlora.attach(classifier(), WHOLE)
    before = [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match='head.2, which adapter "default" adapts already'):
        paramlora.attach(model, {"head.2": {"r": 1}}, "second")
    with pytest.raises(AdapterError, match='body.3, which adapter "default" adapts already'):
        paramlora.attach(model, {"body.3.weight": {"whole": 1}}, "second")
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(TargetError, match="claim it equally"):
        paramlora.attach(classifier(), {"head.2": {"whole": 1}, "head.*": {"r": 1}})


def test_the_longer_path_wins_inside_a_module_trained_whole():
    model = paramlora.attach(classifier(), {"head": {"whole": 1}, "head.2": {"r": 1}})
    kinds = {row.path: row.kind for row in paramlora.summary(model).rows}
    assert kinds["head.2"] == "hard" and kinds["head.2.bias"] == kinds["head.0"] == "whole"


def test_a_whole_tensor_under_weight_norm_starts_from_what_is_seen():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    x = torch.randn(5, 4).double()
    before, weight = model(x), layer.weight.detach().clone()
    paramlora.attach(model, {"0.weight": {"whole": 1}})
    torch.testing.assert_close(model(x), before, **CLOSE)
    (trains,) = paramlora.trainable_parameters(model)  # what is seen is no parameter, and trains
    assert trains is layer.parametrizations.weight[1].lora_whole
    with torch.no_grad():
        trains.add_(1)
    paramlora.merge(model)
    torch.testing.assert_close(model[0].weight, weight + 1, **CLOSE)


def test_a_base_checkpoint_loads_and_the_trained_values_stay():
    model, plain, dense, x = trained()
    want = logits(model, x)
    moved = {k: v + 1 if k.startswith("head") else v for k, v in plain.state_dict().items()}
    model.load_state_dict(moved)
    assert torch.equal(logits(model, x), want)
    off = paramlora.detach(model).state_dict()
    assert all(torch.equal(v, off[k]) for k, v in moved.items())


@pytest.mark.parametrize("hard", (1, 0))
@pytest.mark.parametrize(
    "layer, shape",
    [(lambda: nn.Linear(8, 6), (4, 8)), (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9))],
    ids=("linear", "conv"),
)
def test_dropout_acts_under_functional_transforms(hard, layer, shape):
    torch.manual_seed(0)
    model = nn.Sequential(layer()).double()
    paramlora.attach(model, {"0": {"r": 2, "hard": hard, "dropout": 0.5}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    x = torch.randn(shape).double()
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    got, _ = torch.func.vjp(model, x)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, model.eval()(x))
