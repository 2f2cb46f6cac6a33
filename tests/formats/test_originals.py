"""The original names of a model's weights: an adapter under them is the same."""

import pytest
import torch

from paramlora import formats
from paramlora.formats import Slot
from paramlora.formats.places import Places
from tests.formats.architectures import (
    ARCHITECTURES,
    delta,
    file_of,
    originals_of,
    pairs_of,
    same,
    slots_of,
    through,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_under_the_original_names_is_the_same(name):
    """As for ComfyUI and kohya: fused, and diffusers' converter makes the model's own of it."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    ours = formats.read(file_of(factors, ""), slots)
    original = formats.original_of(slots)
    assert original.keys() == originals_of(case, slots).keys()
    assert formats.original_of(original) == original
    spelled = formats.fit(ours, original, formats.Options(), "adapter")
    want = {path: delta(f, 2.0) for path, f in factors.items()}
    converted = through(case, {n: u.delta() for n, u in spelled.updates.items()})
    assert converted.keys() == want.keys()
    for path, dense in converted.items():
        torch.testing.assert_close(dense, want[path], rtol=1e-12, atol=1e-12)
    real = formats.base_of(case.make())  # without norms, and of its own sizes
    names = {n for n, slot in formats.original_of(real).items() if slot.kind != "parameter"}
    assert names <= set(original)
    back = formats.read(formats.write(spelled, "kohya", original), slots).updates
    same(back, want)


def test_a_table_that_knows_nothing_of_a_model_leaves_it():
    slots = {"blocks.0.x": Slot((4, 6)), "head": Slot((4, 6))}
    assert formats.original_of(slots) == slots
    assert Places({}).find("a", "a") is None
