"""Choice of a batch that take different adapters, against each row by itself in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.model.attach import updates
from tests.model.rows import (
    RANKS,
    ROWS,
    STRENGTHS,
    Attends,
    adapted,
    check,
    first,
    gradients,
    images,
    linears,
    one_row,
    trained,
)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 20, 6)])
def test_linear(hard, shape):
    check(linears, ["0", "2"], images(*shape), hard)


def conv(kind, **more):
    return lambda: nn.Sequential(kind(4, 6, 3, **more), nn.Tanh(), kind(6, 5, 1))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(
    ("kind", "more", "shape"),
    [
        (nn.Conv1d, {"stride": 2}, (4, 9)),
        (nn.Conv2d, {"padding": 1, "groups": 2}, (4, 6, 5)),
        (nn.Conv2d, {"padding": 1, "padding_mode": "circular"}, (4, 6, 5)),
        (nn.Conv2d, {"padding": "same", "dilation": 2}, (4, 6, 5)),
        (nn.Conv3d, {}, (4, 4, 3, 5)),
        (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1}, (4, 3, 4)),
    ],
)
def test_convolutions(kind, more, shape, hard):
    check(conv(kind, **more), ["0", "2"], images(*shape), hard)


def test_soft_branches_of_two_kernels():
    """By the definition, written out: two convolutions in a row for each row of the batch."""
    torch.manual_seed(0)
    for kind, x in ((nn.Conv2d, images(4, 6, 5)), (nn.ConvTranspose2d, images(4, 3, 4))):
        plain = kind(4, 6, 3, padding=1, groups=2).double()
        model = adapted(copy.deepcopy(plain), ["weight"], hard=False, up_kernel="same")
        paramlora.attach(model, {"weight": {"r": 2, "hard": False}}, "d")  # a 1×1 one beside them
        own = {update.adapter: update for _, _, update in updates(model)}
        own["d"].lora_B.data.normal_()
        rows = [*ROWS[:-1], "d"]
        paramlora.set_adapters(model, {**STRENGTHS, "d": 1.0})
        with paramlora.route(model, rows):
            y = model(x)
        for i, name in enumerate(rows[:-1]):
            row = x[i : i + 1]
            expected = plain(row)
            if name is not None:
                a, b, r = own[name].lora_A, own[name].lora_B, RANKS[name]
                if kind is nn.Conv2d:
                    thin = F.conv2d(row, torch.cat([a.view(r, 2, 3, 3)] * 2), padding=1, groups=2)
                    up = b
                else:
                    down = a.view(r, 9, 4).permute(2, 0, 1).reshape(4, r, 3, 3)
                    thin = F.conv_transpose2d(row, down, padding=1, groups=2)
                    up = torch.cat([b] * (6 // len(b)))
                term = F.conv2d(thin, up, padding=1, groups=2)
                expected = expected + STRENGTHS[name] * own[name].lora_scale * term
            torch.testing.assert_close(y[i : i + 1], expected)
        assert not torch.allclose(y[-1:], plain(x[-1:]))


def test_embedding():
    tokens = torch.arange(len(ROWS) * 4).view(len(ROWS), 4) % 9
    check(lambda: nn.Embedding(9, 5, padding_idx=2), ["weight"], tokens)
    many = torch.randint(0, 9, (120, 1))
    check(lambda: nn.Embedding(9, 5), ["weight"], many, rows=["a", "b", None, "c"] * 30)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2.0


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)) + 1.0


class ShiftedAgain(Shifted):
    def forward(self, x):
        return super().forward(x).tanh()


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class OwnPart(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.abs(), weight, bias)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: Scaled(9, 5), torch.arange(len(ROWS) * 4).view(len(ROWS), 4) % 9),
        (lambda: Shifted(6, 5), images(3, 6)),
        (lambda: ShiftedAgain(6, 5), images(3, 6)),
        (lambda: Causal(4, 6, 3), images(4, 7)),
        (lambda: OwnPart(4, 6, 3), images(4, 7)),
    ],
    ids=["embedding", "linear", "twice", "convolution", "its part alone"],
)
def test_a_forward_that_ends_in_a_known_one(make, x):
    check(make, ["weight"], x)


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    check(lambda: pytorch_utils.Conv1D(5, 5), ["weight"], images(3, 5))


def test_many_short_rows_go_in_blocks():
    check(linears, ["0", "2"], torch.randn(150, 6).double(), rows=["a", "b", None, "c", "a"] * 30)


@pytest.mark.parametrize("more", [{"batch_first": True}, {"kdim": 8, "vdim": 9}])
def test_attention(more):
    layers = ["out_proj", "k_proj_weight" if "kdim" in more else "in_proj_weight"]
    check(lambda: Attends(**more), layers, images(5, 8))


def test_masks_of_attention_go_with_their_rows():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double()
    model, x = adapted(copy.deepcopy(plain), ["in_proj_weight"]), images(5, 8)
    mask = torch.rand(len(ROWS) * 2, 5, 5) < 0.3
    mask[:, :, 0] = False
    unread = torch.zeros(len(ROWS), 5).bool()
    unread[2, 4] = unread[3, 3:] = True
    with paramlora.route(model, ROWS):
        y, weights = model(x, x, x, key_padding_mask=unread, attn_mask=mask)
    for i, name in enumerate(ROWS):
        row, one = x[i : i + 1], slice(i, i + 1)
        masks = {"key_padding_mask": unread[one], "attn_mask": mask[2 * i : 2 * i + 2]}
        expected = one_row(plain, model, name, row, row, row, **masks)
        torch.testing.assert_close((y[one], weights[one]), expected)


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_is_not_fused_past_its_rows(training):
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    plain.train(training)
    model = adapted(copy.deepcopy(plain), ["in_proj_weight", "linear1", "out_proj"])
    x = images(5, 8)
    with torch.no_grad(), paramlora.route(model, ROWS):
        y = model(x)
    plain.train()  # whose evaluation is not the fused one
    for i, name in enumerate(ROWS):
        torch.testing.assert_close(y[i : i + 1], one_row(plain, model, name, x[i : i + 1]))


@pytest.mark.parametrize("layers", [["in_proj_weight", "linear1", "out_proj"], ["1.linear2"]])
@pytest.mark.parametrize("no_grad", [True, False])
def test_an_encoder_packs_no_rows_past_their_adapters(layers, no_grad):
    """In evaluation torch packs what its mask of padding leaves of the rows, and asks the first
    layer for its weights before."""
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(one, 2).double()
    model, x = adapted(copy.deepcopy(plain), layers).eval(), images(5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4, 5, 1, 2])[:, None]
    before = {**vars(model)}
    with torch.set_grad_enabled(not no_grad), paramlora.route(model, ROWS):
        y = model(x, src_key_padding_mask=padding)
        other = copy.deepcopy(model)
    for i, name in enumerate(ROWS):
        kept = x[i : i + 1, : int((~padding[i]).sum())]
        torch.testing.assert_close(y[i : i + 1, : kept.shape[1]], one_row(plain, model, name, kept))
    # and torch may pack again
    for left in (model, other):
        assert vars(left)["use_nested_tensor"] is True and vars(left).keys() == before.keys()


def test_rows_in_another_dimension_and_packed_sequences():
    torch.manual_seed(0)
    plain = linears().double()
    model, x = adapted(copy.deepcopy(plain), ["0", "2"]), images(3, 6)
    apart = torch.cat([one_row(plain, model, n, x[i : i + 1]) for i, n in enumerate(ROWS)])
    with paramlora.route(model, ROWS, dim=1):
        torch.testing.assert_close(model(x.transpose(0, 1)).transpose(0, 1), apart)
    flat = torch.cat([x[0], x[1], x[2, :1]])  # of lengths 3, 3, none and 1
    wanted = torch.cat([apart[0], apart[1], apart[2, :1]])
    with paramlora.route(model, ["a", None, "b", "c"], cu_seqlens=[0, 3, 6, 6, 7]):
        torch.testing.assert_close(model(flat), wanted)
    bounds = torch.tensor([0, 3, 6, 6, 7], dtype=torch.int32)
    with paramlora.route(model, ["a", None, "b", "c"], dim=1, cu_seqlens=bounds):
        torch.testing.assert_close(model(flat[None])[0], wanted)


def test_indices_into_a_list_of_names():
    model, x = adapted(linears().double(), ["0", "2"]), images(6)
    with paramlora.route(model, ["c", None, "a", None, "b", "c"]):
        expected = model(x)
    index = torch.tensor([1, -1, 0, 2, 3, 1])
    with paramlora.route(model, index, names=["a", "c", None, "b"]):
        assert torch.equal(model(x), expected)


def test_what_is_there_once_is_there_for_all_rows():
    """Such as the positions of tokens, which a model looks up in a batch of one."""
    torch.manual_seed(0)
    plain = nn.Embedding(7, 4).double()
    model = adapted(copy.deepcopy(plain), ["weight"])
    with paramlora.route(model, ROWS):
        y = model(torch.arange(5)[None])
    rows = [one_row(plain, model, n, torch.arange(5)[None]) for n in ROWS]
    torch.testing.assert_close(y, torch.cat(rows))


@pytest.mark.parametrize("shape", [(6,), (20, 6)])
def test_what_is_not_finite_stays_in_its_rows(shape):
    """Neither a weight, nor an input, nor a gradient."""
    torch.manual_seed(0)
    rows = ["a", "b", None, "c"] * 200
    model = adapted(linears().double(), ["0", "2"])
    bad = [n for n, _, u in updates(model) if u.adapter == "b"]
    assert bad
    x = torch.randn(len(rows), *shape).double()

    def run():
        with paramlora.route(model, rows):
            y = model(x)
        losses = {n: y[[i for i, m in enumerate(rows) if m == n]].square().sum() for n in RANKS}
        return y, gradients(model, sum(losses.values()))

    def own(name):
        return {id(p) for _, _, u in updates(model) if u.adapter == name for p in u.parameters()}

    sound_y, sound = run()
    x[1::4] = float("inf")
    for _, _, update in updates(model):
        if update.adapter == "b":
            update.lora_B.data[0] = float("nan")
    y, found = run()
    kept = [i for i, name in enumerate(rows) if name != "b"]
    assert torch.equal(y[kept], sound_y[kept]) and not y[1::4].isfinite().all()
    for name, p in trained(model).items():
        if id(p) in own("b"):
            assert not found[name].isfinite().all()
        else:
            assert torch.equal(found[name], sound[name]), name


def test_convolutions_too_keep_what_is_not_finite():
    torch.manual_seed(0)
    model = adapted(nn.Conv2d(3, 4, 3).double(), ["weight"])
    x = images(3, 5, 5)
    with paramlora.route(model, ROWS):
        sound = gradients(model, model(x).square().sum())
        x[3] = float("inf")
        found = gradients(model, model(x).square()[[0, 1, 2, 4, 5]].sum())
        bad = gradients(model, model(x).square().sum())
    for at, name in enumerate(RANKS):
        stem = f"parametrizations.weight.{at}."
        for part in ("lora_A", "lora_B", "lora_scale"):
            key = stem + part
            if name == "b":
                assert not bad[key].isfinite().all()
            else:
                assert torch.equal(bad[key], sound[key]) and torch.equal(found[key], sound[key])


def test_each_row_drops_as_its_adapter_says():
    torch.manual_seed(0)
    layer = nn.Linear(200, 1, bias=False).double()
    for name, rate in {"a": 0.0, "b": 0.5}.items():
        paramlora.attach(layer, {"weight": {"r": 1, "dropout": rate}}, name)
    for update in layer.parametrizations.weight:
        update.lora_A.data.fill_(1)
        update.lora_B.data.fill_(1)
    x = torch.ones(40, 200).double()
    base = F.linear(x, layer.parametrizations.weight.original)
    with paramlora.route(layer, ["a", "b"] * 20):
        y = (layer(x) - base)[:, 0]
    torch.testing.assert_close(y[::2], torch.full((20,), 200.0).double())
    assert y[1::2].std() > 1 and (y[1::2] / 2).sub((y[1::2] / 2).round()).abs().max() < 1e-9
    assert abs(y[1::2].mean() - 200) < 15
    with paramlora.route(layer.eval(), ["a", "b"] * 20):
        torch.testing.assert_close((layer(x) - base)[:, 0], torch.full((40,), 200.0).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_small_update_is_kept(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 256).to(dtype)
    x = torch.randn(8, 512, 256).to(dtype)
    for name in RANKS:
        paramlora.attach(layer, {"weight": {"r": RANKS[name]}}, name)
    weight, bias = layer.parametrizations.weight.original.double(), layer.bias.double()
    deltas = {}
    for update in layer.parametrizations.weight:
        update.lora_B.data.normal_()
        size = (update.lora_B @ update.lora_A).norm() / weight.norm()
        update.lora_B.data *= 1e-3 / size
        deltas[update.adapter] = (update.lora_B @ update.lora_A).double()
    rows = ["a", "b", "c", None] * 2
    with torch.no_grad(), paramlora.route(layer, rows):
        y = layer(x).double()
    for i, name in enumerate(rows):
        if name is None:
            continue
        term = x[i].double() @ deltas[name].t()
        gained = y[i] - F.linear(x[i].double(), weight, bias)
        kept = (gained * term).sum() / term.square().sum()
        assert 0.97 < kept < 1.03, name


def test_under_autocast():
    torch.manual_seed(0)
    model, x = adapted(linears(), ["0", "2"]), images(3, 6).float()
    with paramlora.route(model, ROWS), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    with paramlora.route(model, ROWS):
        exact = model(x)
    assert (y - exact).norm() < 0.02 * exact.norm()
    assert all(g.dtype == torch.float32 for g in gradients(model, y.float().sum()).values())


def test_gradients_of_gradients():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model, x = adapted(small, ["0", "2"]), images(3).requires_grad_()
    weights = [p.detach().requires_grad_() for p in trained(model).values()]
    names = list(trained(model))

    def run(x, *weights):
        with paramlora.route(model, ROWS):
            return torch.func.functional_call(model, dict(zip(names, weights)), (x,))

    assert torch.autograd.gradgradcheck(run, (x, *weights))


@pytest.mark.parametrize("reentrant", [False])
def test_a_checkpointed_forward_is_computed_again_with_its_rows(reentrant):
    torch.manual_seed(0)
    model, x = adapted(linears().double(), ["0", "2"]), images(3, 6)
    with paramlora.route(model, ROWS):
        expected = gradients(model, model(x).square().sum())
    with paramlora.route(model, ROWS):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    with paramlora.route(model, ["b"] * 6):
        model(x)
    found = gradients(model, y.square().sum())
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_the_batch_changes_no_compiled_graph():
    torch.manual_seed(0)
    model, x = adapted(linears().double(), ["0", "2"]), images(3, 6)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    every = [ROWS, ["a"] * 6, [None] * 6, ["a", "b"] * 3]
    for rows in every:
        with paramlora.route(model, rows):
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            (found, expected) = (gradients(model, v.square().sum()) for v in (y, model(x)))
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_blocks_nest_and_leave_everything_as_it_was():
    torch.manual_seed(0)
    model, x = adapted(linears().double(), ["0", "2"]), images(6)
    attention = adapted(nn.MultiheadAttention(8, 2).double(), ["in_proj_weight"])
    before = model(x)
    with paramlora.route(model, ROWS):
        routed = model(x)
        with paramlora.route(model, ["b"] * 6):
            only_b = model(x)
        assert torch.equal(model(x), routed)
        with paramlora.disable_adapters(model):
            base = model(x)
        paramlora.set_adapters(model, {"b": 0.5})
        changed = model(x)
        paramlora.set_adapters(model, STRENGTHS)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(only_b[3], routed[3])
    torch.testing.assert_close(base[1], routed[1])
    torch.testing.assert_close(changed[[1, 3]], routed[[1, 3]])
    torch.testing.assert_close(changed[[0, 2, 4, 5]], base[[0, 2, 4, 5]])
    with pytest.raises(RuntimeError, match="stop"), paramlora.route(attention, ROWS):
        assert "forward" in vars(attention)
        raise RuntimeError("stop")
    assert "forward" not in vars(attention)
    assert all(update.switch.rows is None for _, _, update in updates(attention))


def test_a_copy_made_inside_acts_on_all_rows():
    torch.manual_seed(0)
    model, x = adapted(linears().double(), ["0", "2"]), images(6)
    before = model(x)
    with paramlora.route(model, ROWS):
        other = copy.deepcopy(model)
    assert torch.equal(other(x), before)


# --- what is refused ------------------------------------------------------------------------------


def test_refusals_of_what_was_asked():
    model = adapted(linears().double(), ["0", "2"])
    cases = {
        'no adapter "d" is attached': (["d"], {}),
        "expected the adapter of each row, such as ['a', None], got 'abc'": ("abc", {}),
        "indices need the list of adapters that they mean, got None": (torch.tensor([0]), {}),
        "expected the adapters of rows as integers of one dimension, got shape [1, 1]": (
            torch.tensor([[0]]),
            {"names": ["a"]},
        ),
        "index 2 is beyond the 1 adapter named": (torch.tensor([2]), {"names": ["a"]}),
        "dim must be a whole number of at least 0, got -1": (["a"], {"dim": -1}),
        "cu_seqlens of 1 sequence must be 2 whole numbers": (["a"], {"cu_seqlens": [0, 1, 2]}),
        "and do not fall, got [0, 1.5]": (["a"], {"cu_seqlens": [0, 1.5]}),
        "and do not fall, got 'ab'": (["a"], {"cu_seqlens": "ab"}),
        "indices need the list of adapters that they mean, got None.": ([0, -1], {}),
        "the rows have names already: ['a', None]. Leave": (["a", None], {"names": ["a"]}),
        "already: []. Leave names out": ([], {"names": ["a"]}),
    }
    for text, (rows, more) in cases.items():
        with pytest.raises(paramlora.AdapterError) as told, paramlora.route(model, rows, **more):
            pass
        assert text in str(told.value)
        assert all(update.switch.rows is None for _, _, update in updates(model))
    paramlora.set_adapters(model, {"a": 1.0})
    with pytest.raises(paramlora.AdapterError, match='"b" is switched off, so its rows'):
        with paramlora.route(model, ["b"]):
            pass


def test_a_list_of_indices_is_as_a_tensor_of_them():
    model, x = adapted(linears().double(), ["0", "2"]), torch.randn(3, 6).double()
    with paramlora.route(model, ["a", None, "b"]):
        y = model(x)
    for rows in ([1, -1, 0], (1, -1, 0)):
        with paramlora.route(model, rows, names=["b", "a"]):
            assert torch.equal(model(x), y)


def test_another_number_of_rows_is_refused():
    model = adapted(linears().double(), ["0", "2"])
    with paramlora.route(model, ROWS), pytest.raises(paramlora.AdapterError) as told:
        model(torch.randn(5, 6).double())
    assert "Linear was given an input of shape [5, 6], whose dimension 0 is not the 6" in str(
        told.value
    )
    assert str(told.value).endswith("or call the model once for each (set_adapters).")


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return x @ self.table.t()


class ReadsItself(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t()


class EndsInThat(ReadsItself):
    def forward(self, x):
        return super().forward(x)


class Quick(nn.Linear):
    forward = staticmethod(torch.tanh)  # no function of Python, so nothing of it is known


@pytest.mark.parametrize("kind", [ReadsItself, EndsInThat, Quick])
def test_a_subclass_that_ends_in_no_known_forward_is_refused(kind):
    model = adapted(nn.Sequential(kind(6, 6)), ["0"])
    with pytest.raises(paramlora.AdapterError) as told, paramlora.route(model, ROWS):
        pass
    assert str(told.value).startswith(f"0: of {kind.__name__} only the tensor is known")
    assert all(update.switch.rows is None for _, _, update in updates(model))


def test_a_layer_that_cannot_tell_rows_apart_is_refused_before_anything_runs():
    model = nn.Sequential(nn.Linear(6, 6), Unknown())
    adapted(model, ["1.table", "0"])
    with pytest.raises(paramlora.AdapterError) as told, paramlora.route(model, ROWS):
        pass
    assert str(told.value).startswith("1.table: of Unknown only the tensor is known, and not where")
    assert all(update.switch.rows is None for _, _, update in updates(model))
    conv = adapted(nn.Conv1d(4, 4, 3), ["weight"])
    with pytest.raises(paramlora.AdapterError) as told:
        with paramlora.route(conv, ["a"], cu_seqlens=[0, 9]):
            pass
    assert "weight: Conv1d sees more than one position of a sequence at a time" in str(told.value)


def test_inputs_without_rows_are_refused():
    """Whose first dimension, of channels or of time, may be as long as the batch by chance."""
    bag = adapted(nn.EmbeddingBag(9, 6, mode="sum"), ["weight"])
    cases = [
        (bag, (torch.arange(4), torch.tensor([0, 0, 2, 3])), "EmbeddingBag"),
        (adapted(nn.LSTM(4, 3), ["weight_ih_l0"]), (torch.randn(5, 4),), "LSTM"),
        (adapted(nn.LSTMCell(4, 3), ["weight_ih"]), (torch.randn(4),), "LSTMCell"),
        (adapted(nn.MultiheadAttention(4, 2), ["out_proj"]), (torch.randn(5, 4),) * 3, "Multihead"),
        (adapted(nn.ConvTranspose1d(4, 3, 2), ["weight"]), (torch.randn(4, 6),), "ConvTranspose1d"),
        (adapted(nn.Conv1d(4, 3, 2), ["weight"]), (torch.randn(4, 6),), "Conv1d"),
        (adapted(nn.Conv1d(4, 3, 2), ["weight"], hard=False), (torch.randn(4, 6),), "Conv1d"),
    ]
    for model, inputs, kind in cases:
        for rows in (["a", "b", "a", None], ["a"] * 4):
            with pytest.raises(paramlora.AdapterError) as told, paramlora.route(model, rows):
                model(*inputs)
            shape = list(inputs[0].shape)
            assert f"{kind}" in str(told.value) and f"an input of shape {shape}" in str(told.value)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(paramlora.AdapterError, match="LSTM was given an input of shape"):
        with paramlora.route(cases[1][0], ["a", "b"]):
            cases[1][0](packed)


def test_packed_sequences_in_another_dimension_are_refused():
    """Not taken for an input that is there once, which would be looked up for every position."""
    model = adapted(linears(), ["0", "2"])
    table = adapted(nn.Embedding(9, 6), ["weight"])
    for layer, x in ((model, torch.randn(1, 5, 6)), (table, torch.arange(5)[None])):
        with paramlora.route(layer, ["a", "b"], cu_seqlens=[0, 3, 5]):
            with pytest.raises(paramlora.AdapterError, match="dimension 0 is not the 5 positions"):
                layer(x)
        with paramlora.route(layer, ["a", "b"], cu_seqlens=[0, 3, 5], dim=1):
            assert layer(x).shape[:2] == (1, 5)
    with paramlora.route(model, ["a", "b"], cu_seqlens=[0, 3, 5]):
        assert model(torch.randn(1, 6)).shape == (5, 4)  # one vector for all positions


def test_a_batch_of_no_rows():
    cases = [
        (linears, ["0", "2"], torch.randn(0, 6)),
        (linears, ["0", "2"], torch.randn(0, 3, 6)),
        (lambda: nn.Embedding(9, 5), ["weight"], torch.zeros(0, 3).long()),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), ["weight"], torch.randn(0, 4, 5, 5)),
        (lambda: nn.LSTM(4, 3, batch_first=True), ["weight_ih_l0"], torch.randn(0, 5, 4)),
    ]
    for make, layers, x in cases:
        soft = x.is_floating_point() and layers != ["weight_ih_l0"]
        for hard in [True, False] if soft else [True]:
            plain = make()
            model = adapted(copy.deepcopy(plain), layers, hard)
            for rows, more in (([], {}), (torch.zeros(0).long(), {"names": ["a"]})):
                with paramlora.route(model, rows, **more):
                    y = first(model(x))
                assert y.shape == first(plain(x)).shape
                assert not y.requires_grad or not any(
                    grad.any() for grad in gradients(model, y.sum()).values()
                )


def test_a_checkpointed_layer_is_not_computed_again_with_the_rows_of_another_block():
    torch.manual_seed(0)
    model = adapted(nn.MultiheadAttention(8, 2, batch_first=True).double(), ["in_proj_weight"])
    x = images(5, 8)
    with paramlora.route(model, ROWS):
        expected = gradients(model, model(x, x, x)[0].square().sum())

    def forward():
        run = lambda x: model(x, x, x)[0].square().sum()  # noqa: E731
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)

    plain = gradients(model, model(x, x, x)[0].square().sum())
    before = forward()
    with paramlora.route(model, ROWS):
        found = gradients(model, forward())
        later = forward()
        again = gradients(model, before)
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    with paramlora.route(model, ROWS[::-1]):
        with pytest.raises(paramlora.AdapterError, match="call backward inside of it"):
            later.backward()


def test_who_reads_a_weight_inside_is_told():
    model = adapted(linears(), ["0", "2"])
    with paramlora.route(model, ROWS):
        with pytest.raises(paramlora.AdapterError, match="acts on some rows of the batch") as told:
            _ = model[0].weight
        assert "once for each adapter (set_adapters), or detach the adapters from" in str(
            told.value
        )
        with pytest.raises(paramlora.AdapterError, match="acts on some rows of the batch here"):
            paramlora.merge(model)
        with pytest.raises(paramlora.AdapterError, match="cannot be attached inside of paramlora"):
            paramlora.attach(model, {"0": {"r": 1}}, "late")
        assert "strength" in repr(model) and paramlora.summary(model).rows
    paramlora.merge(model)


@pytest.mark.parametrize("layer", ["linear", "attention", "encoder"])
@pytest.mark.parametrize("leaves", [0, 1])
def test_blocks_are_left_in_any_order(layer, leaves):
    """The rows of the last block that is open act, as with both left in turn; then none do."""
    torch.manual_seed(0)
    if layer == "linear":
        plain, names, inputs = nn.Sequential(nn.Linear(4, 3)).double(), ["0"], 1
    else:
        plain = nn.MultiheadAttention(4, 2, batch_first=True).double()
        names, inputs = ["in_proj_weight"], 3
    if layer == "encoder":
        one = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        plain, names, inputs = nn.TransformerEncoder(one, 1).double(), ["linear1"], 1
    model = adapted(copy.deepcopy(plain), names)
    x = (torch.randn(2, 5, 4, dtype=torch.float64),) * inputs
    rows = (["a", "b"], ["b", None])

    def alone(own):
        each = [one_row(plain, model, n, *(t[i : i + 1] for t in x)) for i, n in enumerate(own)]
        return torch.cat([first(y) for y in each])

    whole, base = first(model(*x)), {k: id(v) for k, v in vars(model).items()}
    blocks = [paramlora.route(model, own) for own in rows]
    for block, own in zip(blocks, rows):
        block.__enter__()
        torch.testing.assert_close(first(model(*x)), alone(own), rtol=1e-10, atol=1e-10)
    blocks[leaves].__exit__(None, None, None)
    torch.testing.assert_close(first(model(*x)), alone(rows[1 - leaves]), rtol=1e-10, atol=1e-10)
    blocks[1 - leaves].__exit__(None, None, None)
    assert torch.equal(first(model(*x)), whole)
    assert {k: id(v) for k, v in vars(model).items()} == base


def test_updates_that_share_a_switch_change_alone():
    torch.manual_seed(0)
    model = paramlora.attach(linears().double(), {"*": {"r": 2}}, "b")
    one, other = (u for _, _, u in updates(model))
    for update in (one, other):
        update.lora_B.data.normal_()
    with paramlora.route(model, ["b"]):
        pass
    assert one.switch is other.switch  # made once for the whole model
    one.strength = 2.0
    x = torch.randn(1, 6, dtype=torch.float64)
    with paramlora.route(model, ["b"]):
        y = model(x)
    first, second = (
        layer.parametrizations.weight.original + strength * u.lora_scale * u.lora_B @ u.lora_A
        for layer, u, strength in ((model[0], one, 2.0), (model[2], other, 1.0))
    )
    want = torch.tanh(x @ first.t() + model[0].bias) @ second.t()
    torch.testing.assert_close(y, want)
