"""Every warning points at the line that called paramlora, through whatever that line went."""

import inspect
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora import files
from paramlora.arithmetic import between, combine
from paramlora.arithmetic.difference import Side
from paramlora.update.value import Adapter, Update


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.first.weight


def overlapping():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    return model


def trained_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    paramlora.attach(model, {"0": {"r": 1}})
    model.train()(torch.randn(3, 4))
    return model


def saved(tmp_path):
    paramlora.save_adapter(
        paramlora.attach(nn.Linear(4, 4), {"weight": {"r": 1}}), tmp_path / "a.safetensors"
    )
    return tmp_path / "a.safetensors"


def copied(tmp_path, inside):
    """What merging writes of a folder that holds a link to a folder and one to a file elsewhere."""
    own = Path(tempfile.mkdtemp(dir=tmp_path))
    (own / "base" / inside).mkdir(parents=True)
    save_file({"0.weight": torch.ones(4, 4)}, own / "base" / inside / "model.safetensors")
    (own / "base" / "folder").symlink_to(tmp_path)
    (own / "base" / "file").symlink_to(saved(tmp_path))
    one = Update(torch.ones(1, 4), torch.ones(4, 1), 1.0, (4, 4), kind="linear")
    name = "0" if inside == "." else f"{inside}.0"
    return own / "base", [Adapter({name: one})], own / "merged"


def adapter(config):
    torch.manual_seed(len(str(config)))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return paramlora.adapter_of(paramlora.attach(model, config))


def side(value):
    state = {"a.weight": torch.full((4, 4), value), "b": torch.full((4,), value)}
    return Side(state, state.__getitem__, "a checkpoint")


ONE, BOTH = {"0": {"r": 1}}, {"re:[01]": {"r": 1}}
CASES = {
    "attach, nothing matches": lambda _: paramlora.attach(overlapping(), {**BOTH, "x": {"r": 1}}),
    "attach, tied": lambda _: paramlora.attach(Tied(), {"first": {"r": 1}}),
    "attach, overlapping": lambda _: paramlora.attach(overlapping(), ONE),
    "attach, statistics": lambda _: paramlora.attach(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ONE
    ),
    "attach, frozen": lambda _: paramlora.attach(
        nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), {"trainable_model": 1, **ONE}
    ),
    "targets": lambda _: paramlora.targets(overlapping(), {**BOTH, "x": {"r": 1}}),
    "save_adapter": lambda path: paramlora.save_adapter(trained_norm(), path / "b.safetensors"),
    "load_adapter": lambda path: paramlora.load_adapter(nn.Linear(4, 4), saved(path)),
    "combine": lambda _: combine([(adapter(ONE), 1.0), (adapter(BOTH), 1.0)]),
    "merge, links in a model": lambda path: files.merge(*copied(path, ".")),
    "merge, links in a pipeline": lambda path: files.merge(*copied(path, "unet")),
    "between": lambda _: between(side(1.0), side(2.0), rank=1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_warning_points_at_the_callers_line(case, tmp_path):
    """As it is called, and inside of a block that a decorator made of a context manager."""
    act = CASES[case]
    decorated = torch.no_grad()(torch.inference_mode(False)(act))
    lines, first = inspect.getsourcelines(act)
    for run in (act, decorated):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(tmp_path)
        told = [one for one in caught if one.category is paramlora.ParamloraWarning]
        assert told
        for one in told:
            assert one.filename == __file__
            assert first <= one.lineno < first + len(lines)
