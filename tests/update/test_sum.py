"""The sum of a merge, against float64: also where torch may round a product's factors, and in how
many launches and waits a model's layers are merged."""

import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora.model.attach import updates
from paramlora.update.lowrank import LowRank
from paramlora.update.sum import Fold, LowRankTerm, WholeTerm, folded, rounds_products

_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv", "mv", "dot")


class Rounding(TorchDispatchMode):
    """A device that computes float32 products as TF32 or bfloat16 does, and float64 right."""

    def __init__(self, bits):
        super().__init__()
        self.bits, self.rounded = bits, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in _PRODUCTS:
            first = 0 if op.overloadpacket.__name__ in ("mm", "bmm", "mv", "dot") else 1
            args = tuple(self._cut(x) if first <= i < first + 2 else x for i, x in enumerate(args))
        return op(*args, **(kwargs or {}))

    def _cut(self, x):
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        drop = 24 - self.bits
        nearest = (bits + (1 << drop - 1)) & -(1 << drop)
        self.rounded += int((nearest != bits).sum())
        return nearest.view(torch.float32).view(x.shape)


@contextmanager
def precision(of, name):
    before = of.fp32_precision
    of.fp32_precision = name
    try:
        yield
    finally:
        of.fp32_precision = before


def filled(kind, dtype, fan_in=24, out=16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(fan_in, out, dtype=dtype))
    paramlora.attach(model, {"0": {"r": 4, "scale": 0.75, **kind}})
    ((_, _, update),) = updates(model)
    for p in update.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, {name: t.detach().double() for name, t in update.named_parameters()}


def lora(w, held):
    return w + 0.75 * held["lora_B"] @ held["lora_A"]


def dora(w, held):
    v = lora(w, held)
    return held["lora_magnitude"].reshape(-1, 1) * v / v.norm(dim=1, keepdim=True)


def loha(w, held):
    one, two = (held[f"hada_w{n}_a"] @ held[f"hada_w{n}_b"] for n in (1, 2))
    return w + 0.75 * one * two


def off(got, want, besides=0.0):
    """The largest distance, in units in the last place of each element of the sum.

    Args:
        besides: a distance that is none.
    """
    told = torch.finfo(got.dtype)
    _, exponent = torch.frexp(want)
    unit = told.eps * torch.exp2(exponent - 1.0).clamp(min=told.smallest_normal)
    return float((((got.double() - want).abs() - besides) / unit).max())


@pytest.mark.parametrize("bits, name", [(11, "tf32"), (8, "bf16")])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("kind, formula", [("lora", lora), ("dora", dora), ("loha", loha)])
def test_a_merge_is_rounded_once_where_products_may_be_rounded(kind, formula, dtype, bits, name):
    model, held = filled({} if kind == "lora" else {"kind": kind}, dtype)
    base = model[0].parametrizations.weight.original.detach().double()
    with precision(torch.backends.mkldnn.matmul, name), Rounding(bits) as device:
        paramlora.merge(model)
    assert not device.rounded
    assert off(model[0].weight.detach(), formula(base, held)) <= 0.5 + 1e-5


@pytest.mark.parametrize("bits", (11, 8))
@pytest.mark.parametrize("layout", ("matrix", "transposed", "stack"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_device_that_may_round_products_is_given_none_to_round(dtype, layout, bits):
    torch.manual_seed(0)
    lead = (3,) if layout == "stack" else ()
    a, b = torch.randn(*lead, 4, 40), torch.randn(*lead, 24, 4) * 0.3
    shape = (40, 24) if layout == "transposed" else (*lead, 24, 40)
    base, scale = torch.randn(shape).to(dtype), torch.tensor(0.75)
    delta = 0.75 * b.double() @ a.double()
    want = base.double() + (delta.mT if layout == "transposed" else delta)
    with precision(torch.backends.cuda.matmul, "tf32"), Rounding(bits) as device:
        got = Fold(shape, dtype, [LowRankTerm(a, b, scale, layout)], "cuda").of(base)
    assert not device.rounded
    assert off(got, want) <= 0.5 + 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ("ieee", "tf32"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(
    "shape, r",
    [((1024, 4096), 16), ((64, 48), 4), ((1, 8), 1), ((4096, 1), 1), ((300, 700), 64)],
)
def test_a_device_rounds_a_sum_once_whatever_it_may_do_to_products(shape, r, dtype, name):
    torch.manual_seed(0)
    a, b = torch.randn(r, shape[1]).cuda(), torch.randn(shape[0], r).cuda() * 0.3
    base, scale = torch.randn(shape).to(dtype).cuda(), torch.tensor(0.75).cuda()
    want = base.double() + 0.75 * b.double() @ a.double()
    sizes = base.double().abs() + 0.75 * b.double().abs() @ a.double().abs()
    added = (r + 2) * 2**-24 * sizes  # what float32's additions round
    with precision(torch.backends.cuda.matmul, name):
        got = base.clone().copy_(
            Fold(shape, dtype, [LowRankTerm(a, b, scale)], "cuda").to_copy(base)
        )
    assert off(got, want, added) <= 0.5 + 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_merge_waits_for_its_device_as_often_for_any_number_of_layers():
    counts = []
    for count in (40, 80):
        model = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(count))).cuda()
        paramlora.attach(model, {"*": {"r": 2}})
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                paramlora.merge(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(told))
    assert counts[0] == counts[1] < 5


def test_the_rounding_of_these_tests_is_one():
    model, held = filled({}, torch.float32)
    base = model[0].parametrizations.weight.original.detach().double()
    with Rounding(11) as device:
        paramlora.merge(model)
    assert device.rounded > 0 and off(model[0].weight.detach(), lora(base, held)) > 100


def test_whether_products_are_rounded_is_asked_of_each_device():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    ours, theirs = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with precision(ours, "ieee"), precision(theirs, "ieee"):
        assert not rounds_products(cuda) and not rounds_products(cpu)
        with precision(ours, "tf32"):
            assert rounds_products(cuda) and not rounds_products(cpu)
        with precision(theirs, "bf16"):
            assert rounds_products(cpu) and not rounds_products(cuda)
        assert not rounds_products(torch.device("mps"))


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3), (8,), (), (600, 700)])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_what_is_copied_into_a_base_is_its_sum(shape, dtype):
    base = torch.randn(shape).to(dtype)
    value = torch.randn(shape)
    terms = [WholeTerm(value, torch.tensor(0.25))]
    if len(shape) > 1:
        rest = base[0].numel()
        terms.append(LowRankTerm(torch.randn(2, rest), torch.randn(shape[0], 2), torch.ones(())))
    kept = base.clone()
    total = Fold(shape, dtype, terms).to_copy(base)
    assert torch.equal(base, kept) and total.shape == base.shape
    assert torch.equal(base.copy_(total), folded(kept, terms))


class Counting(TorchDispatchMode):
    """How often each operator that computes runs: a launch, on a device."""

    VIEWS = ("detach", "view", "alias", "slice", "select", "t", "transpose", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name not in self.VIEWS and not name.startswith("empty"):
            self.count[name] += 1
        return op(*args, **(kwargs or {}))


def merged(count, dtype):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(count)))
    paramlora.attach(model, {"*": {"r": 2}})
    with Counting() as counting:
        paramlora.merge(model)
    return counting.count


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_layer_more_takes_few_launches_and_no_wait(dtype):
    few, many = merged(10, dtype), merged(30, dtype)
    more = Counter({name: (many[name] - few[name]) / 20 for name in many})
    # of each factor an extreme, for which a device has one launch for all layers; and of a weight
    # whose type ends at 65504
    assert more.pop("aminmax") == (3 if dtype == torch.float16 else 2)
    assert more.pop("_local_scalar_dense") == 0 and few["_local_scalar_dense"] <= 2
    # the scaled B, the wide copy of the base, the product, and the copy into the base
    assert sum(more.values()) == 4, more


def test_what_updates_tell_of_their_size_skips_no_check():
    model, _ = filled({"kind": "dora"}, torch.bfloat16)
    base = model[0].parametrizations.weight.original.detach().clone()
    ((_, _, update),) = updates(model)
    update.lora_B.data[:, 1:] = update.lora_A.data[:, 1:] = 0
    update.lora_magnitude.data.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(paramlora.AdapterError, match="beyond"):
        paramlora.merge(model)
    assert torch.equal(model[0].parametrizations.weight.original, base)


@pytest.mark.parametrize("scale", (1e19, -1e19))
def test_a_low_rank_sum_beyond_its_type_is_refused_before_the_first_weight(scale):
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(2)))
    paramlora.attach(model, {"*": {"r": 2}})
    found = [update for _, _, update in updates(model)]
    for update in found:
        torch.nn.init.normal_(update.lora_B)
    found[1].lora_A.data.fill_(scale)
    found[1].lora_B.data.fill_(1e20)
    before = [layer.parametrizations.weight.original.clone() for layer in model]
    with pytest.raises(paramlora.AdapterError, match="1.weight: the sum is beyond"):
        paramlora.merge(model)
    for layer, held in zip(model, before):
        assert torch.equal(layer.parametrizations.weight.original, held)
    assert LowRank.at_most(found[1], 1e20) > 1e60


def test_only_a_term_that_adds_a_product_gives_its_factors():
    """By them a kernel forms the sum, which knows nothing of what a class does besides."""
    torch.manual_seed(0)
    a, b, factor = torch.randn(2, 4), torch.randn(3, 2), torch.tensor(0.5)

    class Halved(LowRankTerm):
        def applied(self, total, block):
            return super().applied(total, block) / 2

    assert Halved(a, b, factor).product() is None
    assert LowRankTerm(a[None], b[None], factor, "stack").product() is None
    assert WholeTerm(a, factor).product() is None
    for layout, shape in (("matrix", (3, 4)), ("transposed", (4, 3))):
        term = LowRankTerm(a, b, factor, layout)
        own_a, own_b, own_factor = term.product()
        want = folded(torch.zeros(shape), [term])
        torch.testing.assert_close(own_factor * own_b @ own_a, want)
