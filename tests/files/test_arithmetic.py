"""Differences of checkpoints in files: what is one tensor there, and what is no checkpoint."""

import pytest
import torch

import paramlora
from paramlora.errors import FileError
from tests.arithmetic.layers import Tied, model


def test_what_began_as_one_tensor_and_is_two_has_two_updates():
    net = Tied().state_dict()
    tuned = {**net, "wte.weight": net["wte.weight"] + 1, "lm_head.weight": net["wte.weight"] + 2}
    done = paramlora.difference(dict(net), tuned, 1)
    one, other = (done.adapter.updates[name].delta() for name in ("wte", "lm_head"))
    torch.testing.assert_close(one, torch.ones(30, 12))
    torch.testing.assert_close(other, 2 * torch.ones(30, 12))


@pytest.mark.parametrize("value", [torch.ones(12), torch.zeros(5, 5), torch.randn(5, 5)])
def test_what_a_checkpoint_lacks_is_no_tie_where_it_only_starts_alike(value):
    base = {"a": value.clone(), "b": value.clone() if value.unique().numel() < 9 else value + 1}
    for first, second, name in (
        (base, {"a": base["a"]}, "tuned"),
        ({"a": base["a"]}, base, "base"),
    ):
        with pytest.raises(FileError, match=f"^{name}: lacks b of"):
            paramlora.difference(first, second, 1)


def test_a_model_with_an_adapter_is_no_checkpoint():
    attached = paramlora.attach(model(), {"fc": {"r": 1}})
    for tuned in (attached, attached.state_dict()):
        with pytest.raises(FileError, match="^tuned: a model with an adapter attached. Take the"):
            paramlora.difference(model(), tuned, 1)
