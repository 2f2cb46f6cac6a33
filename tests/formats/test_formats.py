"""Every format: the other tools' own formulas, detection, round trips of scales, and refusals."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paramlora import formats
from paramlora.errors import FileError, ParamloraWarning
from paramlora.formats import Content, Options, Slot
from paramlora.formats.factors import within
from paramlora.formats.scale import alpha_of
from paramlora.update.value import Adapter, Update
from tests.formats import foreign

LINEAR = {"block.a": (4, 6), "block.b": (5, 4), "head": (3, 5)}
BASE = {path: Slot(shape, "matrix", "linear", 1) for path, shape in LINEAR.items()}


def adapter(ranks=(2, 2, 2), scales=(0.7, 0.7, 0.7), seed=0):
    torch.manual_seed(seed)
    return Adapter(
        {
            path: Update(torch.randn(r, fan_in), torch.randn(out, r), scale, (out, fan_in))
            for (path, (out, fan_in)), r, scale in zip(LINEAR.items(), ranks, scales)
        }
    )


def same(a, b):
    assert a.updates.keys() == b.updates.keys()
    for path, update in a.updates.items():
        other = b.updates[path]
        assert torch.equal(update.lora_A, other.lora_A) and torch.equal(update.lora_B, other.lora_B)
        assert update.scale == other.scale and update.r == other.r


def read(content, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)
        return formats.read(content, BASE, Options(**options))


MIXED = "comfyui diffusers kohya peft original".split()
UNIFORM = [*MIXED, "litgpt", "sglang", "torchtune", "vllm"]
# alphas that other tools divide by the rank: most are not exact in floating point
ODD = st.floats(1e-3, 1e3, allow_nan=False) | st.sampled_from([0.1, 1 / 3, 0.7, 2.0, 1.0])


@pytest.mark.parametrize("one, two", itertools.product(MIXED, MIXED))
@settings(max_examples=20, deadline=None)
@given(scales=st.tuples(ODD, ODD, ODD), ranks=st.tuples(*[st.integers(1, 4)] * 2, st.just(3)))
def test_every_scale_survives_every_pair_of_formats(one, two, scales, ranks):
    there = read(formats.write(adapter(ranks, scales), one))
    same(adapter(ranks, scales), read(formats.write(there, two)))


@pytest.mark.parametrize("one, two", itertools.product(UNIFORM, UNIFORM))
@settings(max_examples=10, deadline=None)
@given(scale=ODD, r=st.integers(1, 3))
def test_one_scale_survives_the_formats_that_hold_one(one, two, scale, r):
    first = adapter((r, r, r), (scale, scale, scale))
    same(first, read(formats.write(read(formats.write(first, one)), two)))


@given(scale=ODD, r=st.integers(1, 512))
def test_an_alpha_gives_the_nearest_scale(scale, r):
    alpha = alpha_of(scale, r)
    assert abs(alpha / r - scale) <= 2 * math.ulp(scale)
    single = torch.tensor(scale, dtype=torch.float32).item()
    assert alpha_of(single, r) / r == single  # a scale out of a model in single precision


def test_a_changed_alpha_wins_over_the_recorded_scale():
    scale, r = next(
        (s / 100, r) for s in range(1, 99) for r in (3, 5) if alpha_of(s / 100, r) / r != s / 100
    )
    first = adapter((r, r, 3), (scale, scale, 1.0))
    content = formats.write(first, "kohya")
    assert "paramlora_scales" in content.metadata
    same(first, read(content))
    content.state["lora_unet_head.alpha"].fill_(6.0)
    content.state["lora_unet_block_a.alpha"].mul_(2)
    found = read(content).updates
    assert found["head"].scale == 2.0 and found["block.b"].scale == scale
    assert found["block.a"].scale == alpha_of(scale, r) * 2 / r


def test_names_are_told_by_content():
    for name in formats.WRITERS:
        content = formats.write(adapter(scales=(1.0,) * 3), name)
        told = formats.FORMATS[name].like or name
        assert formats.detect(Content(content.state, content.metadata)) in (told, "loralib")
    for outer in ("state_dict", "model"):
        state = formats.write(adapter(), "original").state
        nested = Content({f"{outer}.{key}": value for key, value in state.items()})
        same(read(nested), adapter())


@pytest.mark.parametrize(
    "key, text",
    [
        ("head.weight", "no adapter format that is known. Its first keys: head.weight"),
        ("head.parametrizations.weight.0.lora_A", "use paramlora extract"),
        ("head.w_lora_A", "a file of LoRA-Torch, which is not read"),
    ],
)
def test_what_is_no_adapter_file(key, text):
    with pytest.raises(FileError, match=text):
        formats.read(Content({key: torch.ones(2, 2)}))


# the original wrapper


def test_the_original_linear_is_not_divided_by_r():
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    state = {"block.a.lora_A": a, "block.a.lora_B": b, "block.a.lora_scale": torch.tensor(1.5)}
    update = read(Content(state)).updates["block.a"]
    assert update.scale == 1.5
    torch.testing.assert_close(update.delta(), 1.5 * b @ a)
    wrapped = {**state, "block.a.base_layer.weight": torch.ones(4, 6), "norm.weight": torch.ones(4)}
    same(read(Content(wrapped)), read(Content(state)))


def test_the_original_soft_branch_has_its_roles_swapped():
    """``lora_B`` is the first convolution and ``lora_A`` the second, against PEFT's spelling."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5)
    for groups in (1, 2):
        first = nn.Conv2d(6, 4, 1, groups=groups, bias=False)
        second = nn.Conv2d(4, 8, 1, groups=groups, bias=False)
        state = {"c.lora_B.weight": first.weight.data, "c.lora_A.weight": second.weight.data}
        base = {"c": Slot((8, 6 // groups, 1, 1), "matrix", "convolution", groups)}
        assert formats.detect(Content(state)) == "original"
        update = formats.read(Content(state), base).updates["c"]
        ours = nn.functional.conv2d(x, update.delta(), groups=groups)
        torch.testing.assert_close(ours, second(first(x)))


def test_the_original_soft_branch_of_two_kernels_is_refused():
    state = {"c.lora_B.weight": torch.ones(2, 6, 3, 3), "c.lora_A.weight": torch.ones(8, 2, 3, 3)}
    with pytest.raises(FileError, match=r"c: .* kernels of \[3, 3\] in a row is one of \[5, 5\]"):
        formats.read(Content({**state, "c.lora_scale": torch.tensor(1.0)}))


# loralib


def test_what_loralib_writes_acts_here():
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layers = {
        "linear": loralib.Linear(6, 8, r=2, lora_alpha=3),
        "table": loralib.Embedding(7, 6, r=2, lora_alpha=3),
        "conv": loralib.Conv2d(6, 4, 3, r=2, lora_alpha=3),
        "merged": loralib.MergedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True]),
    }
    net = nn.ModuleDict(layers)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    plain = {name: getattr(layer, "conv", layer) for name, layer in layers.items()}
    before = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    state = loralib.lora_state_dict(net)
    base = {
        "linear": Slot((8, 6), "matrix", "linear", 1),
        "table": Slot((7, 6), "transposed", "embedding", 1),
        "conv": Slot((4, 6, 3, 3), "matrix", "convolution", 1),
        "merged": Slot((9, 6), "matrix", "linear", 1),
    }
    options = Options(alpha=3, enable=(True, False, True))
    found = formats.read(Content(state), base, options).updates
    net.eval()  # loralib merges its terms into the weights
    for name, layer in plain.items():
        torch.testing.assert_close(before[name] + found[name].delta(), layer.weight)
    with pytest.raises(FileError, match="2 of 3 parts of a merged projection were trained"):
        formats.read(Content(state), base, Options(alpha=3))
    with pytest.warns(ParamloraWarning, match="the scale is not in this file"):
        formats.read(Content({k: v for k, v in state.items() if "linear" in k}), base)


def test_what_is_written_here_acts_in_loralib():
    loralib = pytest.importorskip("loralib")
    ours = adapter(scales=(1.0, 1.0, 1.0))
    state = formats.write(ours, "loralib").state
    for path, (out, fan_in) in LINEAR.items():
        layer = loralib.Linear(fan_in, out, r=2, lora_alpha=2)
        before = layer.weight.detach().clone()
        layer.load_state_dict(
            {k.removeprefix(f"{path}."): v for k, v in state.items() if k.startswith(path)},
            strict=False,
        )
        layer.eval()
        update = ours.updates[path]
        torch.testing.assert_close(layer.weight.detach() - before, update.lora_B @ update.lora_A)


# litgpt


@pytest.mark.parametrize("on", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_the_fused_projection_of_litgpt(on):
    """Queries of 8 and keys and values of 4 rows, by the formula of its LoRAQKVLinear."""
    torch.manual_seed(0)
    sizes, r, path = (8, 4, 4), 2, "transformer.h.0.attn"
    trained = [s for s, here in zip(sizes, on) if here]
    a, b = torch.randn(r * len(trained), 6), torch.randn(sum(trained), r)
    config = dict(zip(("lora_query", "lora_key", "lora_value"), map(bool, on)))
    state = {f"{path}.qkv.lora_A": a, f"{path}.qkv.lora_B": b}
    base = {
        f"{path}.qkv": Slot((16, 6), "matrix", "linear", 1),
        f"{path}.proj": Slot((6, 8), "matrix", "linear", 1),
    }
    content = Content(state, {}, {**config, "lora_alpha": 6, "lora_r": r})
    assert formats.detect(content) == "litgpt"
    update = formats.read(content, base).updates[f"{path}.qkv"]
    want, row, block = torch.zeros(16, 6), 0, 0
    for start, size, here in zip((0, 8, 12), sizes, on):
        if here:
            part = b[row : row + size] @ a[block * r : block * r + r]
            want[start : start + size] = 3 * part
            row, block = row + size, block + 1
    torch.testing.assert_close(update.delta(), want)


def test_a_fused_projection_is_written_for_litgpt():
    torch.manual_seed(0)
    path = "transformer.h.0.attn.qkv"
    base = {path: Slot((18, 6), "matrix", "linear", 1)}
    plain = Adapter({path: Update(torch.randn(2, 6), torch.randn(18, 2), 0.7, (18, 6))})
    content = formats.write(plain, "litgpt", base)
    assert content.config["lora_r"] == 2
    back = formats.read(content, base).updates[path]
    torch.testing.assert_close(back.delta(), plain.updates[path].delta())
    again = formats.write(Adapter({path: back}), "litgpt", base)  # now of three blocks
    assert again.state.keys() == content.state.keys()
    for key, tensor in content.state.items():
        assert torch.equal(again.state[key], tensor)


# torchtune and cloneofsimo


def test_torchtune_by_its_formula():
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    state = {"block.a.lora_a.weight": a, "block.a.lora_b.weight": b}
    config = {"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["a"]}
    torch.testing.assert_close(read(Content(state, {}, config)).updates["block.a"].scale, 2.5)
    with pytest.raises(FileError, match="the scale is in adapter_config.json, which is missing"):
        read(Content(state))
    with pytest.raises(FileError, match="DoRA, which rescales .*: block.a.magnitude"):
        read(Content({**state, "block.a.magnitude": torch.ones(4)}, {}, config))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm, self.to_out = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.attn = nn.Linear(6, 6), CrossAttention()


@pytest.mark.parametrize("kind", ["list", "keys"])
def test_cloneofsimo_goes_by_the_order_of_layers(kind):
    net = nn.Sequential(Block(), Block())
    base, names = formats.base_of(net), ["0.attn.to_q", "0.attn.to_out", "1.attn.to_q"]
    names += ["1.attn.to_out"]
    ups = [torch.randn(base[n].shape[0], 2).half() for n in names]
    downs = [torch.randn(2, base[n].shape[1]).half() for n in names]
    if kind == "list":
        flat = [tensor for pair in zip(ups, downs) for tensor in pair]
        content = Content({str(i): tensor for i, tensor in enumerate(flat)})
    else:
        state = {f"unet:{i}:up": up for i, up in enumerate(ups)}
        state |= {f"unet:{i}:down": down for i, down in enumerate(downs)}
        content = Content(state, {"unet": '["CrossAttention", "GEGLU"]', "unet:0:rank": "2"})
    assert formats.detect(content) == "cloneofsimo"
    found = formats.read(content, base)
    assert list(found.updates) == names
    assert all(torch.equal(found.updates[n].lora_A, down) for n, down in zip(names, downs))
    with pytest.raises(FileError, match="4 updates, and the model has 2 inside"):
        formats.read(content, formats.base_of(nn.Sequential(Block())))


# what every reader does


def test_every_tensor_is_accounted_for():
    content = formats.write(adapter(), "peft", BASE)
    extra = {**content.state, "base_model.model.head.modules_to_save.weight": torch.ones(2)}
    content = Content(extra, {}, content.config)
    with pytest.raises(FileError, match="no update of one weight: .*head.modules_to_save.weight"):
        formats.read(content, BASE)
    with pytest.warns(ParamloraWarning, match="modules_to_save"):
        same(formats.read(content, BASE, Options(strict=False)), adapter())


def test_a_target_without_tensors_and_an_update_without_a_layer():
    content = formats.write(adapter(), "peft", BASE)
    more = {**BASE, "other.head": Slot((3, 5), "matrix", "linear", 1)}
    with pytest.raises(FileError, match="targets without tensors: other.head"):
        formats.read(content, more)
    fewer = {path: slot for path, slot in BASE.items() if path != "head"}
    with pytest.raises(FileError, match="what the model does not have: head"):
        formats.read(content, fewer)
    with pytest.warns(ParamloraWarning, match="what the model does not have: head"):
        found = formats.read(content, fewer, Options(strict=False))
    assert set(found.updates) == set(fewer)


def test_a_shape_that_does_not_fit():
    turned = {path: Slot((9, 9), "matrix", "linear", 1) for path in BASE}
    with pytest.raises(FileError, match=r"block.a: an update of \[2, 6\] and \[4, 2\] .* \[9, 9\]"):
        formats.read(formats.write(adapter(), "peft"), turned)


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_values_that_are_not_finite_or_all_zero(name):
    first = adapter(scales=(1.0, 1.0, 1.0))
    content = formats.write(first, name)
    key = next(k for k in content.state if "head" in k and not k.endswith(("alpha", "scale")))
    bad = Content({**content.state, key: content.state[key] * math.nan}, {}, content.config)
    with pytest.raises(FileError, match=r"not finite: (lora_unet_|diffusion_model.)?head.lora_A"):
        read(bad)
    zero = Content({**content.state, key: content.state[key] * 0}, {}, content.config)
    with pytest.warns(ParamloraWarning, match="all zero, so without effect: .*head"):
        formats.read(zero, BASE, Options(alpha=2.0))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"use_dora": True}, "use_dora, and no magnitude in the file of: "),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base weights"),
        ({"peft_type": "OFT"}, 'peft_type "OFT"; only LORA, '),
        ({"alpha_pattern": {"[": 3}}, '"\\[" is no regular expression'),
        ({"lora_alpha": "much"}, "'much' is not a number"),
        ({"lora_alpha": None}, "null is not a number"),
    ],
)
def test_configurations_of_peft_that_are_refused(change, text):
    content = formats.write(adapter(), "peft", BASE)
    with pytest.raises(FileError, match=text):
        formats.read(Content(content.state, {}, {**content.config, **change}), BASE)


def test_a_grouped_convolution_of_peft_that_no_weight_equals():
    state = {"base_model.model.c.lora_A.weight": torch.randn(4, 6, 3)}
    state["base_model.model.c.lora_B.weight"] = torch.randn(8, 2, 1)
    base = {"c": Slot((8, 3, 3), "matrix", "convolution", 2)}
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["c"]}
    with pytest.raises(FileError, match="c: the first factor of this grouped convolution reads"):
        formats.read(Content(state, {}, config), base)


TOOLS = "comfyui diffusers kohya litgpt peft sglang torchtune vllm"


def kinds():
    """One update of each kind of layer, with the formats that hold it."""
    torch.manual_seed(0)
    a, b, e = torch.randn(2, 6), torch.randn(4, 2), torch.randn(3, 2, 6)
    yield Update(a, b, 0.7, (4, 6), kind="linear"), f"{TOOLS} original"
    yield Update(a, b, 0.7, (4, 3, 2), kind="convolution"), "comfyui diffusers peft"
    yield Update(a, b, 0.7, (4, 6, 1, 1), kind="convolution"), "comfyui diffusers kohya peft"
    yield Update(a, b, 0.7, (4, 6, 1, 1, 1), kind="convolution"), "comfyui diffusers peft"
    yield Update(a, b, 1.0, (6, 4), "transposed", kind="embedding"), "loralib peft sglang vllm"
    yield Update(a, b, 0.7, (6, 4), "transposed", kind="linear"), "peft sglang vllm"
    yield Update(a, b, 0.7, (6, 4, 1, 1), "transposed", kind="ConvTranspose2d"), ""
    yield Update(a, b, 0.7, (4, 6), kind="parameter"), "peft"
    yield Update(e, e.mT, 0.7, (3, 6, 6), "stack", kind="parameter"), "peft"
    yield Update(a, b, 0.7, (4, 2, 3), kind="Bilinear"), ""
    same_kernel = Update(a, b[..., None, None], 0.7, (4, 6, 1, 1), kind="convolution")
    yield Update(**{**same_kernel.__dict__, "hard": False, "up_kernel": "same"}), ""


@pytest.mark.parametrize("update, holds", list(kinds()))
@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_a_layer_that_a_format_cannot_hold_is_named(update, holds, name):
    one = Adapter({"inner.layer": update})
    if name in holds.split():
        base = {"inner.layer": Slot(update.shape, update.layout, update.kind, update.groups)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParamloraWarning)  # loralib's, for want of a scale
            same(formats.read(formats.write(one, name), base), one)
    else:
        with pytest.raises(FileError, match="inner.layer"):
            formats.write(one, name)


@pytest.mark.parametrize("name", ["litgpt", "torchtune"])
def test_formats_of_one_rank_and_scale_name_the_layer_that_differs(name):
    with pytest.raises(FileError, match="head: r = 3 and scale 0.7, while block.a has 2"):
        formats.write(adapter(ranks=(2, 2, 3)), name)
    with pytest.raises(FileError, match="block.b: r = 2 and scale 2, while block.a has 2 and 0.7"):
        formats.write(adapter(scales=(0.7, 2.0, 0.7)), name)


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_whole_tensors_are_never_left_out(name):
    more = Adapter(adapter(scales=(1.0,) * 3).updates, whole={"norm": torch.ones(3)})
    if formats.FORMATS[name].whole:
        content = formats.write(more, name)
        (held,) = (tensor for key, tensor in content.state.items() if "norm" in key)
        assert held is more.whole["norm"] and content.config["modules_to_save"] == ["norm"]
        return
    with pytest.raises(FileError, match="norm: whole tensors beside the updates"):
        formats.write(more, name)


def test_loralib_has_no_place_for_a_scale():
    with pytest.raises(FileError, match="block.a: scale 0.7; loralib's files have no place"):
        formats.write(adapter(), "loralib")


@pytest.mark.parametrize("name", ["litgpt", "loralib", "torchtune"])
def test_a_scale_without_a_place_can_be_folded(name):
    first = adapter(scales=(0.7, 2.0, 1 / 3))
    found = read(formats.write(first, name, fold_scale=True))
    for path, update in first.updates.items():
        want = update.scale * update.lora_B.double() @ update.lora_A.double()
        assert found.updates[path].scale == 1.0
        torch.testing.assert_close(found.updates[path].delta().double(), want)


def test_a_rank_above_the_matrix_is_multiplied_out():
    torch.manual_seed(0)
    for shape in ((4, 6), (6, 4)):
        update = Update(torch.randn(9, shape[1]), torch.randn(shape[0], 9), 0.7, shape)
        small = within(update)
        assert small.r == 4
        torch.testing.assert_close(small.delta(), update.delta())


def test_the_model_of_every_kind_names_them():
    base = formats.base_of(foreign.model())
    assert {path: slot.kind for path, slot in base.items()} == {
        **dict.fromkeys(["linear", "not_linear", "hf"], "linear"),
        **dict.fromkeys(["conv1", "grouped", "conv2", "conv3"], "convolution"),
        "embedding": "embedding",
    }
    assert base["grouped"].groups == 2 and base["hf"].layout == "transposed"
