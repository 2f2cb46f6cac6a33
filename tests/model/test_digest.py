"""The numbers by which a file tells another base from its own, whatever types both are in."""

import itertools
import warnings

import pytest
import torch
from safetensors.torch import save_file

import paramlora
from paramlora.files import conversions
from paramlora.model.digest import digest, others

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PAIRS = list(itertools.product(TYPES, TYPES))


def values(kind):
    torch.manual_seed(0)
    drawn = torch.randn(8, 8, dtype=torch.float64)
    return {
        "usual": 0.02 * drawn,
        "beyond float16": 1e6 * drawn,
        "some beyond float16": torch.logspace(-3, 8, 64).double().view(8, 8) * drawn.sign(),
        "below float16's digits": 1e-6 * drawn,
        "below float16": 1e-7 * drawn,
        "of all sizes": torch.logspace(-9, 2, 64).double().view(8, 8)[:, torch.randperm(8)],
        "zeros": torch.zeros(8, 8).double(),
        "not finite": torch.full((8, 8), float("nan")).double(),
        "one": drawn[0, 0],
        "a count": torch.tensor(100003.0).double(),
    }[kind]


KINDS = "usual,beyond float16,some beyond float16,below float16's digits,below float16,of all sizes"


@pytest.mark.parametrize("kind", [*KINDS.split(","), "zeros", "not finite", "one", "a count"])
@pytest.mark.parametrize("trained,loaded", PAIRS)
def test_the_same_base_in_another_type_is_the_same(kind, trained, loaded):
    base = values(kind)
    told, found = digest(base.to(trained)), digest(base.to(loaded))
    assert told and others({"a": told}, {"a": found}) == []


@pytest.mark.parametrize("scale", (1e-5, 0.02, 1.0, 1e4))
@pytest.mark.parametrize("trained,loaded", PAIRS)
def test_another_base_is_told(scale, trained, loaded):
    torch.manual_seed(0)
    one, two = (scale * torch.randn(8, 8) for _ in range(2))
    assert others({"a": digest(one.to(trained))}, {"a": digest(two.to(loaded))}) == ["a"]
    little = one * (1 + 0.05 * torch.randn(8, 8))
    near = others({"a": digest(one.to(trained))}, {"a": digest(little.to(loaded))})
    assert near == ["a"]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False)
        self.head.weight = self.first.weight


def one_memory():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight.data = model[0].weight.data.t()
    return model


def quantised():
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("narrow", (torch.float8_e4m3fn, torch.float8_e5m2), ids=str)
def test_the_same_base_stored_in_eight_bits_is_not_told_of(narrow, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    stored = {k: v.to(narrow) for k, v in model.state_dict().items()}
    paramlora.attach(model, {"0": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(narrow)
    other.load_state_dict(stored)
    save_file(stored, tmp_path / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", paramlora.ParamloraWarning)
        paramlora.load_adapter(other, tmp_path / "a.safetensors")
        base, adapter, out = (tmp_path / f"{name}.safetensors" for name in ("base", "a", "out"))
        conversions.merge(base, [adapter], out, seed=0)


SHARED = {
    "tied": (Tied, {"re:first|head": {"r": 2}}, "2 of 2"),
    "one memory": (one_memory, {"re:0|1": {"r": 2}}, "2 of 2"),
    "over processes": (lambda: one_memory().share_memory(), {"re:0|1": {"r": 2}}, "2 of 2"),
    # eight bits are other numbers in each way of packing them, so that nothing is told of them
    "quantised": (quantised, {"0": {"r": 2, "hard": 0}}, None),
    "for a quantised one": (
        lambda: torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16(),
        {"0": {"r": 2, "hard": 0}},
        None,
    ),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.filterwarnings("ignore:.*shares its memory")
def test_tensors_that_are_shared_or_packed(case, tmp_path):
    make, config, told = SHARED[case]
    bases = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        bases.append(make())
    paramlora.save_adapter(paramlora.attach(bases[0], config), tmp_path / "a.safetensors")
    same, other = bases[1:] if case != "for a quantised one" else (quantised(), quantised())
    texts = []
    for base in (same, other):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", paramlora.ParamloraWarning)
            paramlora.load_adapter(base, tmp_path / "a.safetensors")
        # beside what attach says of memory that two tensors share
        texts.append([str(one.message) for one in caught if "hold other" in str(one.message)])
    assert not texts[0]
    assert [text.split(" tensors")[0] for text in texts[1]] == ([told] if told else [])
