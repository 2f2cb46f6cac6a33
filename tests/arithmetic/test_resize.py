"""Adapters at lower ranks, against dense singular values in float64."""

import pytest
import torch

import paramlora
from paramlora.arithmetic import combine, resize
from paramlora.errors import AdapterError
from paramlora.update.value import Adapter, Update


def adapter():
    torch.manual_seed(0)
    tied = Update(torch.randn(4, 10), torch.randn(8, 4), 0.3, (8, 10))
    return Adapter(
        {
            "a.to_q": Update(torch.randn(6, 10), torch.randn(8, 6), 2.5, (8, 10)),
            "b.to_q": tied,
            "b.to_k": tied,
            "conv": Update(torch.randn(2, 27), torch.randn(8, 2), 1.0, (8, 3, 3, 3)),
            "experts": Update(torch.randn(3, 4, 5), torch.randn(3, 6, 4), 0.5, (3, 6, 5), "stack"),
        },
        "style",
        {"note": "kept"},
        {"norm": torch.ones(3)},
    )


def dense(update):
    return update.scale * (update.lora_B.double() @ update.lora_A.double())


def cut(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def test_a_rank_is_the_nearest_of_it_and_its_error_is_told():
    before = adapter()
    done = resize(before, 3)
    for path, update in before.updates.items():
        found, best = done.adapter.updates[path], cut(dense(update), 3)
        assert found.r == min(3, update.r) and found.scale == update.scale
        assert (dense(found) - best).norm() < 1e-6 * best.norm()
        error = float((dense(update) - best).norm() / dense(update).norm())
        assert done.errors[path] == pytest.approx(error, abs=1e-12)
    assert done.adapter.updates["b.to_q"] is done.adapter.updates["b.to_k"]
    assert done.adapter.updates["conv"] is before.updates["conv"]  # it has no more
    assert (done.adapter.name, done.adapter.metadata) == ("style", {"note": "kept"})
    assert done.adapter.whole is before.whole


def test_a_name_of_one_holder_cuts_what_tied_tensors_share():
    before = adapter()
    for name in ("b.to_q", "b.to_k"):
        found = resize(before, {name: 2}).adapter.updates
        assert found["b.to_q"] is found["b.to_k"] and found["b.to_k"].r == 2
        assert found["a.to_q"] is before.updates["a.to_q"]


def test_a_share_of_energy_is_kept_by_the_smallest_rank_that_does():
    before = adapter()
    done = resize(before, energy=0.9)
    for path, update in before.updates.items():
        r, whole = done.adapter.updates[path].r, dense(update).square().sum()
        kept = [float(cut(dense(update), k).square().sum() / whole) for k in range(update.r + 1)]
        assert r == next(k for k, share in enumerate(kept) if share >= 0.9)
        assert done.errors[path] ** 2 == pytest.approx(max(0, 1 - kept[r]), abs=1e-9)


def test_all_of_it_loses_nothing():
    before = adapter()
    done = resize(before, energy=1.0)
    assert done.error < 1e-7 and all(
        u.r == before.updates[p].r for p, u in done.adapter.updates.items()
    )


def test_layers_have_ranks_of_their_own():
    done = resize(adapter(), {"to_q": 2, "a.to_q": 3, "experts": 1})
    ranks = {path: update.r for path, update in done.adapter.updates.items()}
    assert ranks == {"a.to_q": 3, "b.to_q": 2, "b.to_k": 2, "conv": 2, "experts": 1}
    assert done.errors.keys() == {"a.to_q", "b.to_q", "b.to_k", "experts"}  # these two are tied


def test_an_update_of_zeros_has_rank_one():
    zero = Adapter({"q": Update(torch.randn(4, 9), torch.zeros(7, 4))})
    done = resize(zero, energy=0.5)
    assert done.adapter.updates["q"].r == 1 and done.errors["q"] == 0


@pytest.mark.parametrize(
    ("rank", "energy", "told"),
    [
        (None, None, "give a rank or an energy, and one of them only"),
        (2, 0.5, "one of them only"),
        (0, None, "rank \\(--rank\\) must be a whole number and at least 1, got 0"),
        (1.5, None, "must be a whole number and at least 1, got 1.5"),
        ({"to_q": 1.5}, None, "must be a whole number and at least 1, got 1.5"),
        (7, None, 'rank \\(--rank\\) 7 is above what there is: the highest is 6, of "a.to_q"'),
        ({"to_k": 5}, None, '"to_k": rank \\(--rank\\) 5 is above what there is: b.to_k has 4'),
        ({"zz": 1}, None, '"zz" names no layer. There are: '),
        ({"to_kk": 1}, None, '"to_kk" names no layer. Closest: "b.to_k"'),
        ({"re:(": 1}, None, r'"re:\(": '),
        (None, "0.5", "energy \\(--energy\\) is a share of the squared norm.* got '0.5'"),
        (None, float("nan"), "energy .* is a share of the squared norm.* got nan"),
        (None, 1.5, "energy \\(--energy\\) is a share of the squared norm.* got 1.5"),
    ],
)
def test_what_cannot_be_is_told(rank, energy, told):
    with pytest.raises(AdapterError, match=told):
        resize(adapter(), rank, energy=energy)


def test_where_nothing_has_a_rank_no_name_is_offered():
    with pytest.raises(AdapterError, match='"q" names no layer. There are: none. Give'):
        resize(Adapter({}), {"q": 1})


@pytest.mark.parametrize("kind", ({"r": 1, "kind": "dora"}, {"rows": [0]}))
def test_other_kinds_are_refused_and_never_left_out(kind):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3)})
    paramlora.attach(model, {"a": kind, "b": {"r": 1}})
    adapter = paramlora.adapter_of(model)
    name = adapter.others["a"].method
    for act in (lambda: combine([adapter]), lambda: resize(adapter, rank=1)):
        with pytest.raises(
            paramlora.AdapterError, match=rf'a: in "default" it is of a kind \({name}\)'
        ):
            act()
