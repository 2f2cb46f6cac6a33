"""Rows that choose, of tokens that a block flattens before its layers see them."""

import pytest
import torch
from torch import nn

import paramlora
from tests.model.rows import ROWS, adapted, check, images


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(self.up(x).tanh())


class Shared(nn.Module):
    """As Qwen2-MoE calls its shared experts."""

    def __init__(self):
        super().__init__()
        self.before, self.mlp, self.gate = nn.Linear(6, 6), Mlp(), nn.Linear(6, 6)

    def forward(self, x):
        x = self.before(x)
        flat = x.view(-1, 6)
        return (self.mlp(flat) * self.gate(flat).sigmoid()).view(x.shape)


class Windows(nn.Module):
    """As Swin divides an image."""

    def __init__(self):
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):  # [rows, height, width, 6]
        divided = x.unflatten(2, (2, -1)).unflatten(1, (2, -1)).transpose(2, 3).contiguous()
        y = self.mlp(divided.view(-1, divided.shape[3] * divided.shape[4], 6))
        return y.view(divided.shape).transpose(2, 3).reshape(x.shape)


class Chosen(nn.Module):
    """As a loop over experts: some of the tokens, here as many as there are, in another order."""

    def __init__(self):
        super().__init__()
        self.mlp, self.gate = Mlp(), nn.Linear(6, 6)

    def forward(self, x):
        flat = x.view(-1, 6)
        order = self.gate(flat)[:, 0].argsort()
        return torch.empty_like(flat).index_copy(0, order, self.mlp(flat[order])).view(x.shape)


@pytest.mark.parametrize("hard", [True, False])
def test_a_view_tells_where_the_rows_lie(hard):
    check(Shared, ["before", "mlp.up", "mlp.down", "gate"], images(5, 6), hard)
    check(Windows, ["mlp.up", "mlp.down"], images(4, 6, 6), hard)


def test_also_without_gradients():
    model = adapted(Shared().double(), ["before", "mlp.up", "mlp.down", "gate"])
    x = images(5, 6)
    with paramlora.route(model, ROWS):
        y = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), y)
        y.sum().backward()


@pytest.mark.parametrize("many", [2, 5])
def test_a_choice_among_tokens_is_refused(many):
    """However many they are: which row each is of nobody tells."""
    model = adapted(Chosen().double(), ["gate", "mlp.up", "mlp.down"])
    with paramlora.route(model, ROWS), pytest.raises(paramlora.AdapterError) as told:
        model(images(many, 6))
    assert f"was given an input of shape [{6 * many}, 6], whose dimension 0 is not the 6" in str(
        told.value
    )


def test_memory_of_another_order_tells_nothing():
    """Tokens behind time, and views of a part."""
    layer = adapted(nn.Sequential(nn.Linear(6, 6)).double(), ["0"])
    with paramlora.route(layer, ROWS):
        for x in (
            images(5, 6).transpose(0, 1).reshape(-1, 6),
            torch.randn(5, 6, 6).double().view(-1, 6),  # [time, rows, side]
            torch.randn(2 * len(ROWS), 5, 6).double()[: len(ROWS)].view(-1, 6),
        ):
            with pytest.raises(paramlora.AdapterError, match="is not the 6 rows"):
                layer(x)
