"""Adapters as values: what one tensor's update adds, tells and fits, by its own formula."""

import math

import pytest
import torch

from paramlora.errors import AdapterError
from paramlora.update.value import (
    Adapter,
    KindUpdate,
    Update,
    WholeValue,
    apart_by_kind,
    refuse_two_kernels,
)


def factors(out, fan_in, r=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(r, fan_in), torch.randn(out, r)


def rounded(a, b, scale):
    return scale * (b.double() @ a.double())


def test_what_it_adds_is_the_scaled_product_in_the_weights_shape():
    a, b = factors(6, 12)
    want = rounded(a, b, 0.7)
    kernel = Update(a, b, 0.7, (6, 4, 3))
    torch.testing.assert_close(kernel.delta().double(), want.reshape(6, 4, 3), rtol=1e-5, atol=1e-5)
    turned = Update(a, b, 0.7, (12, 6), "transposed")
    torch.testing.assert_close(turned.delta().double(), want.t(), rtol=1e-5, atol=1e-5)
    same = turned.turned("matrix")
    assert same.layout == "matrix" and torch.equal(same.lora_A, b.t())
    torch.testing.assert_close(same.delta(), turned.delta())


@pytest.mark.parametrize("sizes", [(6, 4, 2), (3, 4, 9)])  # of the rank's sizes, and the product's
def test_its_norm_is_that_of_the_dense_sum(sizes):
    out, fan_in, r = sizes
    a, b = factors(out, fan_in, r)
    assert Update(a, b, -0.7).norm() == pytest.approx(float(rounded(a, b, -0.7).norm()), rel=1e-6)
    assert Update(a, b * 0).norm() == 0 and Update(a, b * 0).idle() and not Update(a, b).idle()
    assert math.isnan(Update(a, b[..., None], up_kernel="same").norm())


@pytest.mark.parametrize(
    "told, shape, layout",
    [
        (Update(*factors(6, 4)), (6, 4), "matrix"),
        (Update(*factors(4, 6)), (6, 4), "transposed"),
        (Update(*factors(6, 12)), (6, 4, 3), "matrix"),
        (Update(torch.ones(3, 2, 4), torch.ones(3, 6, 2)), (3, 6, 4), "stack"),
        (Update(*factors(4, 4), shape=(4, 4), layout="transposed"), (4, 4), "transposed"),
        (Update(*factors(6, 4)), (6, 5), None),
        (Update(*factors(4, 6), shape=(4, 6)), (6, 4), None),  # told: no other layout is tried
    ],
)
def test_a_shape_tells_its_layout_or_that_it_is_anothers(told, shape, layout):
    found = told.fitted(shape)
    assert (found is None) == (layout is None)
    if found is not None:
        assert (found.shape, found.layout) == (shape, layout)


def test_what_a_live_update_shows_has_the_types_of_one():
    update = Update(*factors(6, 4), 0.1, (6, 4))
    shown = update.attached(torch.bfloat16)
    assert shown["lora_A"].dtype == torch.float32  # factors of 16 bits would lose small steps
    assert update.attached(torch.float64)["lora_A"].dtype == torch.float64
    assert update.parts()["lora_scale"].item() == 0.1
    entry = update.entry("a.b")
    assert (entry.name, entry.r, entry.scale, entry.hard) == ("a.b", 2, 0.1, True)


def test_an_adapters_values_come_apart_by_kind_as_they_were():
    low, whole = Update(*factors(6, 4)), torch.ones(3)
    rows = KindUpdate("rows", {"lora_ids": torch.tensor([1]), "lora_rows": torch.ones(1, 4)})
    adapter = Adapter({"a": low}, whole={"norm": whole}, others={"wte": rows})
    values = adapter.values()
    assert set(values) == {"a", "norm", "wte"} and isinstance(values["norm"], WholeValue)
    assert values["norm"].shape == (3,) and values["norm"].norm() == pytest.approx(3**0.5)
    apart = apart_by_kind(values)
    assert apart["updates"] == {"a": low} and apart["others"] == {"wte": rows}
    assert apart["whole"]["norm"] is whole


def test_two_kernels_in_a_row_are_merged_nowhere():
    same = Update(torch.ones(2, 12), torch.ones(6, 2, 3), up_kernel="same")
    assert same.r == 2
    with pytest.raises(AdapterError, match=r'conv: "up_kernel": "same" is two .* \[3\] in a row'):
        same.check_mergeable("conv")
    with pytest.raises(AdapterError, match="this layer: "):
        refuse_two_kernels("", (3, 3))
    Update(*factors(6, 4)).check_mergeable("conv")
