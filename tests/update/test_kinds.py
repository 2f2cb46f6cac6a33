"""A kind of update that the package does not know: it acts by its forward, and is merged, saved,
shown and grouped by what it says of itself, or refused in one sentence; never by half."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import paramlora
from paramlora.model.attach import _register, updates
from paramlora.update.lowrank import LowRank
from paramlora.update.sum import Block, Term


class Silent(LowRank):
    """``m · (W + scale·B·A)``, with a magnitude for each row, and no word of it."""

    def __init__(self, weight, *args, **options):
        super().__init__(weight, *args, **options)
        self.magnitude = nn.Parameter(torch.full_like(weight[:, :1], 2.0))

    def forward(self, weight):
        return self.magnitude * super().forward(weight)


@dataclass(frozen=True)
class ScaledTerm(Term):
    """The low-rank sum first, then each row by its magnitude."""

    inner: Term
    magnitude: Tensor
    whole_rows = True

    def prepared(self, wide):
        return ScaledTerm(self.inner.prepared(wide), self.magnitude.detach().to(wide))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        return self.inner.applied(total, block) * self.magnitude[block.rows]


class Scaled(Silent):
    """The same, that tells."""

    def term(self):
        return ScaledTerm(super().term(), self.magnitude)

    def groups(self):
        return {**super().groups(), "magnitude": [self.magnitude]}

    def described(self):
        return self.r, self.lora_scale.item(), "scaled"


def model_with(kind, rows=6, columns=4):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(columns, rows)}).double()
    model.requires_grad_(False)
    weight = model.layer.weight.clone()
    update = kind(model.layer.weight, 2)
    nn.init.normal_(update.lora_B)
    _register(model.layer, "weight", update)
    want = update.magnitude * (weight + update.lora_B @ update.lora_A)
    return model, update, want.detach()


@pytest.mark.parametrize("kind", (Silent, Scaled))
def test_it_acts_and_trains_by_its_forward(kind):
    model, update, want = model_with(kind)
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model.layer(x), x @ want.T + model.layer.bias)
    model.layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in update.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "act, question",
    [
        (paramlora.merge, "term"),
        (lambda m: paramlora.parameter_groups(m, 1e-3), "groups"),
        (paramlora.summary, "described"),
        (paramlora.adapter_of, "value"),
        (paramlora.adapter_state_dict, "plain"),
    ],
)
def test_what_it_does_not_say_is_refused(act, question):
    model, _, want = model_with(Silent)
    with pytest.raises(
        paramlora.AdapterError, match=rf'kind Silent computes .* does not say its "{question}"'
    ):
        act(model)
    assert torch.equal(model.layer.weight, want)


@pytest.mark.parametrize("rows, columns", [(6, 4), (3, 300_000)])
def test_it_merges_by_its_own_term(rows, columns):
    model, _, want = model_with(Scaled, rows, columns)
    paramlora.merge(model)
    torch.testing.assert_close(model.layer.weight, want, rtol=1e-12, atol=1e-12)
    assert type(model.layer) is nn.Linear


def test_it_is_shown_and_grouped_by_its_own_words():
    model, update, _ = model_with(Scaled)
    (row,) = paramlora.summary(model).rows
    assert (row.r, row.scale, row.kind) == (2, 1.0, "scaled")
    groups = {g["name"]: g["params"] for g in paramlora.parameter_groups(model, 1e-3)}
    assert groups["magnitude"] == [update.magnitude] and "model" not in groups


def test_every_kind_of_the_package_says_everything():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    config = {"0": {"r": 2}, "1": {"r": 2, "hard": 0}, "2": {"whole": 1}}
    paramlora.attach(model, config)
    assert [row.kind for row in paramlora.summary(model).rows] == ["hard", "soft", "whole", "whole"]
    for _, _, update in updates(model):
        grouped = [p for members in update.groups().values() for p in members]
        assert {id(p) for p in grouped} == {id(p) for p in update.parameters()}
        assert {id(t) for t in update.plain().values()} >= {id(p) for p in update.parameters()}
