"""LoHa's own formula and shapes, written out index by index."""

import pytest
import torch

from paramlora.config import LoRAConfig
from paramlora.update.loha import Loha


def entry(**more):
    return LoRAConfig.from_dict({"a": {"r": 3, "kind": "loha", **more}}).entries[0]


def filled(sizes):
    torch.manual_seed(0)
    return {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}


@pytest.mark.parametrize(
    "shape, layout, out, fan_in",
    [((5, 4), "matrix", 5, 4), ((5, 2, 3), "matrix", 5, 6), ((4, 5), "transposed", 5, 4)],
)
def test_each_element_is_the_product_of_two_sums(shape, layout, out, fan_in):
    parts = filled(Loha.sizes(entry(), shape, layout))
    change = Loha.change(parts)
    assert change.shape == (out, fan_in)
    one, two = (
        sum(torch.outer(parts[f"hada_w{n}_a"][:, k], parts[f"hada_w{n}_b"][k]) for k in range(3))
        for n in (1, 2)
    )
    torch.testing.assert_close(change, one * two)
    assert torch.linalg.matrix_rank(change) == min(out, fan_in, 9)  # above its r of 3
    assert Loha.rank_of(parts) == 3 and Loha.options_of(parts) == ()


def test_of_tuckers_form_each_position_of_a_kernel_has_its_own_middle():
    parts = filled(Loha.sizes(entry(tucker=True), (5, 4, 2, 2), "matrix"))
    change = Loha.change(parts)
    assert change.shape == (5, 4, 2, 2)
    for y in range(2):
        for x in range(2):
            one, two = (
                parts[f"hada_w{n}_a"].t() @ parts[f"hada_t{n}"][:, :, y, x] @ parts[f"hada_w{n}_b"]
                for n in (1, 2)
            )
            torch.testing.assert_close(change[:, :, y, x], one * two)
    assert Loha.rank_of(parts) == 3 and Loha.options_of(parts) == (("tucker", True),)
    # a kernel of 1 has no middle
    assert "hada_t1" not in Loha.sizes(entry(tucker=True), (5, 4, 1, 1), "matrix")


def test_it_starts_at_nothing_with_one_factor_of_zeros():
    torch.manual_seed(0)
    parts = {n: torch.empty(s) for n, s in Loha.sizes(entry(), (500, 400), "matrix").items()}
    for name, own in parts.items():
        Loha.start(name, own)
    assert not parts["hada_w2_a"].any() and not Loha.change(parts).any()
    stds = {name: float(own.std()) for name, own in parts.items() if name != "hada_w2_a"}
    for name, want in {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}.items():
        assert stds[name] == pytest.approx(want, rel=0.1)
