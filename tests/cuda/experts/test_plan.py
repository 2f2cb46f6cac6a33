"""The kernels of experts in the interpreter and on a device."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.evaluate import choose
from paramlora.evaluate import experts as grouped
from paramlora.evaluate.choose import Asked, Thresholds, Way
from paramlora.evaluate.dropout import Drops, dropped_linear, masked
from tests.cuda.started import printed

triton = pytest.importorskip("triton")
EPS = 2**-10  # of float16


@pytest.fixture(scope="module")
def results():
    return printed("interpreted_experts", TRITON_INTERPRET="1")


def test_every_division_is_right_to_one_rounding(results):
    other = ("whole", "linear", "several", "pairs")
    divisions = {name: e for name, (e, _) in results.items() if not name.startswith(other)}
    assert len(divisions) == 8 * 3
    assert not {name: errors for name, errors in divisions.items() if max(errors.values()) > EPS}
    # sums that were not rounded to 16 bits
    assert max(max(e[k] for k in "AB") for e in divisions.values()) < EPS


def test_a_layer_and_the_compilers_operator_are_right_with_and_without_dropout(results):
    whole = {name: result for name, result in results.items() if name.startswith("whole")}
    assert len(whole) == 3 * 2
    for name, (errors, ran) in whole.items():
        assert {*"yxAB", "scale"} == errors.keys() and max(errors.values()) < 2 * EPS, name
        # of both forwards, then of both backwards
        assert sorted(ran) == sorted(["project", "product"] * 4 + ["gradients"] * 2), name


def test_a_linear_layer_under_dropout(results):
    layers = {name: result for name, result in results.items() if name.startswith("linear")}
    assert len(layers) == 3
    for name, (errors, ran) in layers.items():
        assert {*"yxAB", "scale"} == errors.keys() and max(errors.values()) < 2 * EPS, name
        assert ran == ["forward", "backward"]


def test_several_adapters_of_a_linear_layer_under_dropout(results):
    """Each with a mask of its own, of whichever ranks."""
    layers = {name: result for name, result in results.items() if name.startswith("several")}
    assert len(layers) == 3
    for name, (errors, ran) in layers.items():
        assert {*"yxAB", "scale"} == errors.keys() and max(errors.values()) < 2 * EPS, name
        assert ran == ["pack", "project", "product", "project", "backward"], name


def test_rows_that_take_different_updates_of_each_expert(results):
    """In one accumulator, so that small ones are kept; and the same bits beside any others."""
    for way in ("hopper", "others"):
        (off, ran), (kept, size) = results[f"pairs, {way}"]
        assert off < EPS and ran == ["project", "product"] * 2 + ["gradients"]
        assert 0.97 < kept < 1.03 and size < 2e-3
    assert results["pairs, beside"] == [[True] * 4] * 2


@pytest.mark.parametrize("name", ("experts", "dropout"))
def test_torchs_operations_unless_a_card_was_measured(name, monkeypatch):
    """Each card of the table says whether the kernels were the faster there."""
    for found in (False, True):
        monkeypatch.setitem(choose._SEEN, 0, Thresholds(**{name: found}))
        assert choose.measured(0, name) is found


@pytest.mark.parametrize(
    "layer, dropout", (("experts", False), ("experts", True), ("linear", True))
)
def test_the_way_of_experts_and_of_dropout(layer, dropout):
    about = (Thresholds(), torch.bfloat16, 64, (4, 4), 2)
    asked = Asked(layer, *about, dropout=dropout)
    assert choose.way(asked) is (Way.DROPPED if layer == "linear" else Way.FACTORED)
    assert choose.way(asked._replace(kernels=Way.KERNELS)) is Way.KERNELS
    if layer == "linear":
        compiled = asked._replace(compiling=True)
        assert choose.way(compiled) is Way.PLAIN
        assert choose.way(compiled._replace(kernels=Way.KERNELS)) is Way.OPERATOR


device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def measured(monkeypatch):
    """This device as one where the kernels were found the faster."""
    here = replace(choose.thresholds_of(torch.zeros((), device="cuda")), experts=True, dropout=True)
    monkeypatch.setitem(choose._SEEN, torch.cuda.current_device(), here)
    launched = []
    from paramlora.cuda.experts import plan

    run = plan.planned  # once for each launch
    monkeypatch.setattr(plan, "planned", lambda *a: (launched.append(a[2]), run(*a))[1])
    return launched


def operands(dtype, transposed=False, sizes=(300, 0, 41, 700), fan_in=512, out=384, r=16):
    torch.manual_seed(0)
    experts, n = len(sizes), sum(sizes)
    weight = torch.randn(experts, out, fan_in, device="cuda") / fan_in**0.5
    weight = weight.to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    x = torch.randn(n, fan_in, device="cuda").to(dtype).requires_grad_()
    a = (torch.randn(experts, r, fan_in, device="cuda") / fan_in**0.5).requires_grad_()
    b = (torch.randn(experts, out, r, device="cuda") / r**0.5).requires_grad_()
    ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
    scale = torch.tensor(0.7, device="cuda").requires_grad_()
    return x, weight, ends, a, b, scale


def reference(x, weight, ends, a, b, scale, dy, mask=1):
    """Output and gradients in float64 by a loop over the experts."""
    wide = [t.detach().double().requires_grad_() for t in (x, a, b, scale)]
    starts = [0, *ends.tolist()]
    parts = [
        wide[0][i:j] @ weight[e].double().t()
        + (wide[0] * mask)[i:j] @ (wide[3] * wide[2][e] @ wide[1][e]).t()
        for e, (i, j) in enumerate(zip(starts, starts[1:]))
    ]
    y = torch.cat(parts)
    return [y, *torch.autograd.grad(y, wide, dy.double())]


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def compare(got, want, values):
    """An output and the gradients of x, both factors and the scale; the last is one sum, of terms
    that cancel, ``dB ∘ B / scale``."""
    *_, b, scale = (t.detach().double() for t in values)
    sizes = [t.norm() for t in want[:-1]] + [want[-2].norm() * b.norm() / scale]
    for one, two, size in zip(got, want, sizes):
        assert (one.double() - two).norm() < 2 * torch.finfo(got[0].dtype).eps * size


@pytest.mark.gpu
@device
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_outputs_and_gradients_on_a_device(dtype, transposed, rate, measured):
    values = operands(dtype, transposed)
    x = values[0]
    drops = Drops((rate,), (16,), torch.tensor(7, device="cuda")) if rate else None
    mask = 1 if drops is None else masked(torch.ones_like(x, dtype=torch.double), drops, 0)
    dy = torch.randn(len(x), 384, device="cuda").to(dtype)
    leaves = [x, *values[3:]]
    y = grouped.grouped_linear(*values, 1.0, drops)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    assert len(measured) == 5
    compare(got, reference(*(t.detach() for t in values), dy, mask), values)
    with paramlora.kernels(False):
        grouped.grouped_linear(*values, 1.0, drops)
    assert len(measured) == 5


@pytest.mark.gpu
@device
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_each_launch_gives_the_same_bits_on_a_device(dtype, rate, measured):
    """Of programs for every processor: what a compiler has warp groups multiply before it was
    written is wrong at some launches only."""
    values = operands(dtype, sizes=(1024,) * 8, fan_in=2048, out=768)
    drops = Drops((rate,), (16,), torch.tensor(7, device="cuda")) if rate else None
    dy, leaves = torch.randn(8192, 768, device="cuda").to(dtype), [values[0], *values[3:]]

    def step():
        y = grouped.grouped_linear(*values, 1.0, drops)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    want = step()
    assert all(t.isfinite().all() for t in want)
    for _ in range(11):
        assert all(map(torch.equal, step(), want))


@pytest.mark.gpu
@device
def test_a_small_update_is_kept_on_a_device(measured):
    x, weight, ends, a, b, _ = (t.detach() for t in operands(torch.bfloat16))
    b = b * 1e-3 * weight.float().norm() / (b @ a).norm()
    one, none = torch.ones((), device="cuda"), torch.zeros_like(b)
    y, base = (grouped.grouped_linear(x, weight, ends, a, f, one) for f in (b, none))
    starts = [0, *ends.tolist()]
    change = torch.cat([x[i:j].double() @ (b @ a)[e].double().t()
                        for e, (i, j) in enumerate(zip(starts, starts[1:]))])  # fmt: skip
    share = ((y.double() - base.double()) * change).sum() / change.square().sum()
    assert 0.99 < share < 1.01 and len(measured) == 4


@pytest.mark.gpu
@device
@pytest.mark.parametrize("small", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rows_that_take_different_updates_on_a_device(dtype, small):
    """Right to one rounding, small ones kept, and one adapter's bits the same beside any others; in
    float16, whose range all of them share, the same to a rounding."""
    from paramlora.evaluate.routed_experts import grouped_linear_of_rows, pairs_of

    sizes, n = (300, 0, 41, 700), 1041
    experts = torch.arange(4, device="cuda").repeat_interleave(torch.tensor(sizes, device="cuda"))
    adapters, ends = torch.arange(n, device="cuda") * 5 % 4, operands(dtype, sizes=sizes)[2]

    def run(ranks):
        x, weight, *_ = operands(dtype, sizes=sizes)
        dy, down, up = torch.randn(n, 384, device="cuda").to(dtype), [], []
        for r in ranks:
            torch.manual_seed(r)
            down.append((torch.randn(4, r, 512, device="cuda") / 22).requires_grad_())
            b = (1e-3 if small else 1) * torch.randn(4, r, 384, device="cuda") / r**0.5
            up.append(b.requires_grad_())
        pairs, leaves = pairs_of(experts, adapters, 4, 3), [x, *down, *up]
        y = grouped_linear_of_rows(x, weight, ends, down, up, pairs)
        return weight, dy, leaves, [y, *torch.autograd.grad(y, leaves, dy)]

    weight, dy, leaves, got = run((4, 16, 7))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    whole = weight.double()[experts]  # [n, out, in]
    base = torch.einsum("noi,ni->no", whole, wide[0])
    term = torch.zeros_like(base)
    for at in range(3):
        low = torch.einsum("nri,ni->nr", wide[1 + at][experts], wide[0])
        own = torch.einsum("nro,nr->no", wide[4 + at][experts], low)
        term = term + torch.where((adapters == at)[:, None], own, 0)
    want = [base + term, *torch.autograd.grad(base + term, wide, dy.double())]
    for one, two in zip(got, want):
        assert relative(one, two) < 4 * torch.finfo(dtype).eps
    mine = adapters < 3
    kept = ((got[0].double() - base) * term)[mine].sum() / term[mine].square().sum()
    assert 0.97 < kept < 1.03
    mine = adapters == 0
    for others in ((16, 8), (33, 1)):
        again = run((4, *others))[3]
        pairs = [(again[i][mine], got[i][mine]) for i in (0, 1)]
        for one, two in (*pairs, *((again[i], got[i]) for i in (2, 5))):
            same = relative(one, two.double()) < torch.finfo(dtype).eps
            assert same if dtype == torch.float16 else torch.equal(one, two)


@pytest.mark.gpu
@device
def test_a_graph_serves_every_division_of_the_rows(measured):
    """Captured once; replayed with other rows for each expert, some of which are none's."""
    x, weight, ends, a, b, scale = operands(torch.bfloat16)
    leaves, dy = (x, a, b, scale), torch.randn(len(x), 384, device="cuda").bfloat16()

    def step():
        y = grouped.grouped_linear(x, weight, ends, a, b, scale)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for sizes in ((1, 1000, 0, 40), (0, 0, 0, 1041), (250, 250, 250, 291)):
        ends.copy_(torch.tensor(sizes).cumsum(0))
        graph.replay()
        values = tuple(t.detach() for t in (x, weight, ends, a, b, scale))
        compare(found, reference(*values, dy), values)


@pytest.mark.gpu
@device
def test_compiled_whole_on_a_device(measured):
    values = operands(torch.bfloat16)
    leaves = [values[0], *values[3:]]
    dy = torch.randn(len(values[0]), 384, device="cuda").bfloat16()
    compiled = torch.compile(grouped.grouped_linear, fullgraph=True)
    for function in (grouped.grouped_linear, compiled):
        y = function(*values)
        got = [y, *torch.autograd.grad(y, leaves, dy)]
        compare(got, reference(*(t.detach() for t in values), dy), values)
    assert len(measured) == 10


ONE_MASK = (16,), (0.3,)
SEVERAL_MASKS = (5, 20), (0.3, 0.6)


@pytest.mark.gpu
@device
@pytest.mark.parametrize("way", ("eager", "compiled", "graph"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("ranks, rates", (ONE_MASK, SEVERAL_MASKS), ids=("one", "several"))
def test_a_linear_layer_under_dropout_on_a_device(ranks, rates, dtype, way, measured):
    """Each mask's output and gradients; a graph has new masks at each replay."""
    torch.manual_seed(0)
    x = torch.randn(8, 130, 256, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(384, 256, device="cuda") / 16).to(dtype)
    bias, r = torch.randn(384, device="cuda").to(dtype), sum(ranks)
    a = (torch.randn(r, 256, device="cuda") / 16).requires_grad_()
    b = (torch.randn(384, r, device="cuda") / 4).requires_grad_()
    scale, leaves = torch.ones((), device="cuda"), (x, a, b)
    dy = torch.randn(8, 130, 384, device="cuda").to(dtype)

    def step(seed):
        drops = Drops(rates, ranks, seed)
        return dropped_linear(x, weight, bias, a, b, scale, 1.0, drops)

    from paramlora.cuda.linear import plan

    plan._BACKWARDS.clear()
    run = torch.compile(step, fullgraph=True) if way == "compiled" else step
    seed = torch.tensor(5, device="cuda")

    def both():
        y = run(seed)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as a capture needs: no gradient's stream is the default one
        found = both()
    torch.cuda.current_stream().wait_stream(stream)
    if way == "graph":
        found, graph = None, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both()
        seed.fill_(6)
        graph.replay()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = wide[0] @ weight.double().t() + bias.double()
    for which, (down, up) in enumerate(zip(wide[1].split(ranks), wide[2].split(ranks, 1))):
        seen = masked(torch.ones_like(wide[0]), Drops(rates, ranks, seed), which) * wide[0]
        want = want + seen @ down.t() @ up.t()
    want = [want, *torch.autograd.grad(want, wide, dy.double())]
    for one, two in zip(found, want):
        assert relative(one, two) < 2 * torch.finfo(dtype).eps
    assert plan._BACKWARDS and not measured, "not by the linear layers' kernels"


@pytest.mark.gpu
@device
@pytest.mark.parametrize("ranks, rates", (ONE_MASK, SEVERAL_MASKS), ids=("one", "several"))
@pytest.mark.parametrize("checkpointed", (False, True))
def test_dropout_writes_nothing_of_an_inputs_size(ranks, rates, checkpointed, measured):
    """Beside the output and the input's gradient; and a checkpoint draws the same masks again."""
    torch.manual_seed(0)
    x = torch.randn(8192, 2048, device="cuda").bfloat16().requires_grad_()
    model = nn.Sequential(nn.Linear(2048, 256, device="cuda", dtype=torch.bfloat16))
    for index, (r, rate) in enumerate(zip(ranks, rates)):
        paramlora.attach(model, {"0": {"r": r, "dropout": rate, "hard": 1}}, f"a{index}")
    paramlora.set_adapters(model, {f"a{index}": 1.0 + index for index in range(len(ranks))})
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    for factor in leaves[1:]:
        nn.init.normal_(factor, std=0.02)
    dy = torch.randn(8192, 256, device="cuda").bfloat16()

    def step(again):
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    want = step(False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = step(checkpointed)
    taken = torch.cuda.max_memory_allocated() - before
    size, out = x.numel() * x.element_size(), dy.numel() * dy.element_size()
    assert taken < 1.5 * size + 2 * out  # the input's gradient alone is one
    assert all(map(torch.equal, got, want))
