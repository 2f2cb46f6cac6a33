"""Soft updates against a dense float64 weight, and the two-convolution form against its own."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.model.attach import updates


def conv1d(out, fan_in):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(out, fan_in)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "Conv1D": (lambda: conv1d(6, 4), (2, 3, 4)),
    "square Conv1D": (lambda: conv1d(4, 4), (3, 4)),
    **{
        f"conv{dim}d-{'-'.join(map(str, (k, s, d, g, m)))}": (
            lambda dim=dim, k=k, s=s, d=d, g=g, m=m: getattr(nn, f"Conv{dim}d")(
                4, 8, k, stride=s, dilation=d, groups=g, padding=1, padding_mode=m
            ),
            (2, 4, *[6] * dim),
        )
        for dim, k, s, d, g, m in itertools.product(
            (1, 2, 3), (1, 3), (1, 2), (1, 2), (1, 2), ("zeros", "circular", "reflect")
        )
    },
    **{
        f"transposed{dim}d-{s}-{g}": (
            lambda dim=dim, s=s, g=g: getattr(nn, f"ConvTranspose{dim}d")(
                4, 8, 3, stride=s, padding=1, output_padding=s - 1, groups=g
            ),
            (2, 4, *[5] * dim),
        )
        for dim, s, g in itertools.product((1, 2, 3), (1, 2), (1, 2))
    },
}


def soft(layer, **more):
    model = nn.ModuleDict({"layer": layer}).double()
    plain = copy.deepcopy(model)
    paramlora.attach(
        model, {"layer": {"r": 2, "scale": 1.3, "trainable_scale": 1, "hard": 0, **more}}
    )
    ((_, _, low),) = updates(model)
    return model, plain, low


def dense_weight(plain, low, a, b, scale):
    product = b @ a
    if isinstance(plain, nn.modules.conv._ConvTransposeNd) or type(plain).__name__ == "Conv1D":
        product = product.T
    return plain.weight + scale * product.reshape(plain.weight.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_soft_branch_is_the_dense_update(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, plain, low = soft(make())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model.layer(x), plain.layer(x))
    nn.init.normal_(low.lora_B)
    a, b, scale = (
        tensor.detach().clone().requires_grad_()
        for tensor in (low.lora_A, low.lora_B, low.lora_scale)
    )
    weight = dense_weight(plain.layer, low, a, b, scale)
    want = torch.func.functional_call(plain.layer, {"weight": weight}, (x,))
    got = model.layer(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(want)
    mine = torch.autograd.grad(got, [low.lora_A, low.lora_B, low.lora_scale, x], seed)
    theirs = torch.autograd.grad(want, [a, b, scale, x], seed)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    paramlora.merge(model)
    torch.testing.assert_close(model.layer.weight, weight, rtol=1e-12, atol=1e-12)
    assert not model.layer._forward_hooks and not model.layer._forward_hooks_with_kwargs
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("hard", [0, 1])
def test_updates_are_born_in_the_mode_of_their_layer(hard):
    model = nn.Sequential(nn.Linear(4, 4).eval(), nn.Linear(4, 4))
    paramlora.attach(model, {"*": {"r": 2, "hard": hard}})
    assert [low.training for _, _, low in updates(model)] == [False, True]


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_up_kernel_same_is_two_convolutions(mode, groups):
    layer = nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=1, groups=groups, padding_mode=mode)
    model, plain, low = soft(layer, up_kernel="same")
    nn.init.normal_(low.lora_B)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    down = nn.Conv2d(4, 2 * groups, 3, 2, 1, 2, groups, False, mode, dtype=torch.float64)
    up = nn.Conv2d(2 * groups, 8, 3, 1, 2, 2, groups, False, mode, dtype=torch.float64)
    with torch.no_grad():
        down.weight.copy_(torch.cat([low.lora_A.reshape(2, -1, 3, 3)] * groups))
        up.weight.copy_(low.lora_B)
    want = plain.layer(x) + 1.3 * up(down(x))
    torch.testing.assert_close(model.layer(x), want, rtol=1e-10, atol=1e-10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match='"up_kernel": "same" is two convolutions'):
        paramlora.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    paramlora.detach(model)
    assert torch.equal(model.layer(x), plain.layer(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_up_kernel_same_on_a_transposed_convolution(groups):
    layer = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, groups=groups)
    model, plain, low = soft(layer, up_kernel="same")
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(model.layer(x), plain.layer(x))
    nn.init.normal_(low.lora_B)
    first = low.lora_A.reshape(2, 3, 3, 4).permute(3, 0, 1, 2)
    hidden = F.conv_transpose2d(x, first, None, 2, 1, 0, groups)
    up = torch.cat([low.lora_B] * groups)
    want = plain.layer(x) + 1.3 * F.conv2d(hidden, up, None, 1, 1, 1, groups)
    torch.testing.assert_close(model.layer(x), want, rtol=1e-10, atol=1e-10)


def test_a_caller_may_choose_the_output_size_of_a_transposed_convolution():
    model, plain, low = soft(nn.ConvTranspose1d(4, 8, 3, stride=2))
    nn.init.normal_(low.lora_B)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    weight = dense_weight(plain.layer, low, low.lora_A, low.lora_B, 1.3)
    plain.layer.weight = nn.Parameter(weight.detach())
    want = plain.layer(x, output_size=[12])
    torch.testing.assert_close(model.layer(x, output_size=[12]), want, rtol=1e-10, atol=1e-10)


def test_soft_copies_are_independent_and_refuse_pickling():
    import pickle

    model, plain, low = soft(nn.Linear(4, 6))
    copied = copy.deepcopy(model)
    ((_, _, other),) = updates(copied)
    nn.init.normal_(other.lora_B)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(model.layer(x), plain.layer(x))
    assert not torch.equal(copied.layer(x), plain.layer(x))
    with pytest.raises(paramlora.AdapterError, match="cannot be pickled"):
        pickle.dumps(model)
    paramlora.detach(copied)
    assert torch.equal(copied.layer(x), plain.layer(x))
    copied.load_state_dict(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    "layer, more, text",
    [
        (nn.LSTM(4, 4), {}, "a soft update serves Linear and convolutions"),
        (nn.Embedding(8, 4), {}, "a Embedding"),
        (nn.Linear(4, 4), {"up_kernel": "same"}, 'a Linear, which has no kernel for "up_kernel"'),
    ],
)
def test_soft_is_refused_where_it_cannot_act(layer, more, text):
    name = "weight_hh_l0" if isinstance(layer, nn.LSTM) else "layer"
    model = nn.ModuleDict({"layer": layer})
    with pytest.raises(paramlora.TargetError, match=text):
        paramlora.attach(model, {name: {"r": 2, "hard": 0, **more}})
    assert all(p.requires_grad for p in model.parameters())


def test_soft_on_the_output_projection_of_attention_is_refused():
    with pytest.raises(paramlora.TargetError, match="never calls"):
        paramlora.attach(nn.MultiheadAttention(4, 2), {"out_proj": {"r": 2, "hard": 0}})


def test_hard_and_soft_on_one_tensor_merge_together():
    torch.manual_seed(1)
    model, plain, low = soft(nn.Linear(4, 6))
    paramlora.attach(model, {"layer": {"r": 1}}, "hard")
    for _, _, update in updates(model):
        nn.init.normal_(update.lora_B)
    weight = plain.layer.weight.detach().clone()
    for _, _, update in updates(model):
        weight += update.lora_scale.item() * update.lora_B.detach() @ update.lora_A.detach()
    x = torch.randn(3, 4, dtype=torch.float64)
    want = F.linear(x, weight, plain.layer.bias)
    torch.testing.assert_close(model.layer(x), want, rtol=1e-10, atol=1e-10)
    paramlora.merge(model)
    torch.testing.assert_close(model.layer.weight, weight, rtol=1e-12, atol=1e-12)
    assert type(model.layer) is nn.Linear


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class Renamed(nn.Conv2d):
    pass


class Padded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


@pytest.mark.parametrize(
    "layer, own",
    (
        (nn.Linear(4, 6), False),
        (nn.ConvTranspose2d(4, 6, 3), False),
        (Renamed(4, 6, 3), False),
        (Scaled(4, 6), True),
        (Padded(4, 6, 3), True),
    ),
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("more", ((), ({"r": 1},)), ids=("soft", "hard and soft"))
def test_a_merge_into_a_forward_of_its_own_is_told(layer, own, more, recwarn):
    model, *_ = soft(copy.deepcopy(layer))
    for entry in more:
        paramlora.attach(model, {"layer": entry}, "hard")
    recwarn.clear()
    paramlora.merge(model)
    told = [str(one.message) for one in recwarn if one.category is paramlora.ParamloraWarning]
    assert [type(layer).__name__ in text for text in told] == [True] * own


@pytest.mark.parametrize("dropout", (0.0, 0.25))
@pytest.mark.parametrize("name", ("linear", "Conv1D", "square Conv1D", "conv2d-3-1-1-1-zeros"))
def test_a_small_update_arrives_in_sixteen_bits(name, dropout):
    """On a CPU, where a term beside an output that is rounded already would be lost by half."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain = make().bfloat16()
    model = nn.ModuleDict({"layer": copy.deepcopy(plain)})
    paramlora.attach(model, {"layer": {"r": 2, "hard": 0, "dropout": dropout}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    wide = plain.double()
    size = (dense_weight(wide, low, low.lora_A, low.lora_B, 1.0) - wide.weight).norm()
    low.lora_B.data *= (1e-3 * wide.weight.norm() / size).float()
    x = torch.randn(4096 // shape[0] * shape[0], *shape[1:]).bfloat16()
    weight = dense_weight(wide, low, low.lora_A.double(), low.lora_B.double(), 1.0)
    want = torch.func.functional_call(wide, {"weight": weight}, (x.double(),)) - wide(x.double())
    got = model["layer"](x).double() - wide(x.double())
    share = ((got * want).sum() / want.square().sum()).item()
    assert share == pytest.approx(1, abs=0.05)  # of 4,096 rows' roundings, and their masks


def test_rows_that_choose_beside_a_conv1d_keep_a_small_update():
    torch.manual_seed(0)
    layer = conv1d(48, 32)
    base = copy.deepcopy(layer).bfloat16().double()
    model = nn.ModuleDict({"layer": layer.bfloat16()})
    for name in ("a", "b"):
        paramlora.attach(model, {"layer": {"r": 2, "hard": 0}}, name)
    x = torch.randn(2, 2048, 32).bfloat16()
    changes = []
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
        change = (low.lora_B.double() @ low.lora_A.double()).T
        by = (1e-3 * base.weight.norm() / change.norm()).item()
        low.lora_B.data *= by
        changes.append(change * by)
    with paramlora.route(model, ["b", "a"]):
        got = model["layer"](x).double() - base(x.double())
    for row, change in enumerate(reversed(changes)):
        want = x[row].double() @ change
        share = ((got[row] * want).sum() / want.square().sum()).item()
        assert share == pytest.approx(1, abs=0.05)
