"""The original wrapper's files, by its own formulas."""

import pytest
import torch
from torch import nn

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content, Slot
from tests.formats.linears import read, same


def test_the_original_linear_is_not_divided_by_r():
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    state = {"block.a.lora_A": a, "block.a.lora_B": b, "block.a.lora_scale": torch.tensor(1.5)}
    update = read(Content(state)).updates["block.a"]
    assert update.scale == 1.5
    torch.testing.assert_close(update.delta(), 1.5 * b @ a)
    wrapped = {**state, "block.a.base_layer.weight": torch.ones(4, 6), "norm.weight": torch.ones(4)}
    same(read(Content(wrapped)), read(Content(state)))


def test_the_original_soft_branch_has_its_roles_swapped():
    """``lora_B`` is the first convolution and ``lora_A`` the second, against PEFT's spelling."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5)
    for groups in (1, 2):
        first = nn.Conv2d(6, 4, 1, groups=groups, bias=False)
        second = nn.Conv2d(4, 8, 1, groups=groups, bias=False)
        state = {"c.lora_B.weight": first.weight.data, "c.lora_A.weight": second.weight.data}
        base = {"c": Slot((8, 6 // groups, 1, 1), "matrix", "convolution", groups)}
        assert formats.detect(Content(state)) == "original"
        update = formats.read(Content(state), base).updates["c"]
        ours = nn.functional.conv2d(x, update.delta(), groups=groups)
        torch.testing.assert_close(ours, second(first(x)))


def test_the_original_soft_branch_of_two_kernels_is_refused():
    state = {"c.lora_B.weight": torch.ones(2, 6, 3, 3), "c.lora_A.weight": torch.ones(8, 2, 3, 3)}
    with pytest.raises(FileError, match=r"c: .* kernels of \[3, 3\] in a row is one of \[5, 5\]"):
        formats.read(Content({**state, "c.lora_scale": torch.tensor(1.0)}))
