"""The one place that chooses how a forward is computed, asked without any device."""

import ast
from pathlib import Path

import pytest
import torch

from paramlora.evaluate import choose
from paramlora.evaluate.choose import CARDS, Asked, Thresholds, Way

CPU, H100 = CARDS["cpu"], CARDS["NVIDIA H100 80GB HBM3"]
LEAST = CPU.tiny
FOLDER = Path(choose.__file__).parent
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "card, dtype, tokens, shape, kernels, compiling, way",
    [
        (CPU, F32, 16, (64, 64), False, False, Way.SUM),
        (CPU, F32, 64, (512, 512), False, False, Way.FACTORED),
        (CPU, F32, 4096, (512, 512), False, False, Way.DENSE),
        (CPU, BF16, 16, (64, 64), False, False, Way.FACTORED),
        (CPU, F32, 16, (64, 64), False, True, Way.PLAIN),
        (H100, F32, 64, (512, 512), False, False, Way.PLAIN),
        (H100, F32, 2**15, (4096, 4096), False, False, Way.DENSE),
        (H100, F32, 1024, (4096, 4096), False, False, Way.FACTORED),
        (H100, BF16, 8192, (4096, 4096), True, False, Way.KERNELS),
        (H100, F16, 8192, (4096, 4096), False, False, Way.FACTORED),
        (H100, BF16, 8192, (4096, 4096), True, True, Way.OPERATOR),
        (H100, BF16, 8192, (4096, 4096), False, True, Way.PLAIN),
        (Thresholds(), F32, 16, (64, 64), False, False, Way.FACTORED),
    ],
)
def test_the_way_of_a_linear_layer(card, dtype, tokens, shape, kernels, compiling, way):
    ours = Way.KERNELS if kernels else None
    asked = Asked("linear", card, dtype, tokens * shape[1], shape, 16, ours, compiling)
    assert choose.way(asked) is way
    dropped = Way.PLAIN if compiling else Way.DROPPED
    assert choose.way(asked._replace(dropout=True, kernels=None)) is dropped


@pytest.mark.parametrize(
    "card, dtype, side, shape, groups, kernels, compiling, way",
    [
        (CPU, F32, 8, (16, 8, 3, 3), 1, None, False, Way.SUM),
        (CPU, F32, 64, (64, 64, 3, 3), 1, None, False, Way.DENSE),
        (CPU, F32, 64, (64, 64, 3, 3), 1, None, True, Way.SUM),
        (CPU, F32, 2, (512, 512, 3, 3), 1, None, False, Way.PLAIN),
        (CPU, F32, 64, (256, 32, 3, 3), 8, None, False, Way.DENSE),
        (CPU, BF16, 8, (16, 8, 3, 3), 1, None, False, Way.JOINED),
        (CPU, BF16, 8, (16, 8, 3, 3), 1, None, True, Way.PLAIN),
        (CPU, BF16, 8, (16, 2, 3, 3), 4, None, False, Way.OWN_KERNEL),
        (H100, BF16, 8, (16, 8, 1, 1), 1, Way.POINTWISE, False, Way.POINTWISE),
        (H100, BF16, 8, (16, 1, 3, 3), 16, Way.DEPTHWISE, False, Way.DEPTHWISE),
        (H100, F32, 8, (16, 1, 3, 3), 16, None, False, Way.DENSE),
    ],
)
def test_the_way_of_a_convolution(card, dtype, side, shape, groups, kernels, compiling, way):
    about = (2 * shape[1] * groups * side * side, shape, 16, kernels, compiling)
    asked = Asked("convolution", card, dtype, *about, stride=(1, 1), groups=groups)
    assert choose.way(asked) is way
    dropped = Way.PLAIN if compiling else Way.DROPPED
    assert choose.way(asked._replace(dropout=True)) is dropped


@pytest.mark.parametrize(
    "name, capability, processors, like",
    [
        ("NVIDIA H200", (9, 0), 132, "NVIDIA H200"),
        ("some card", (9, 0), 132, "NVIDIA H100 80GB HBM3"),
        ("some card", (8, 6), 84, "NVIDIA GeForce RTX 3090"),
        ("some card", (8, 7), 16, "NVIDIA A10"),
        ("some card", (8, 0), 56, "NVIDIA A100-SXM4-80GB"),
        ("some card", (10, 3), 148, "NVIDIA B200"),
        ("some card", (12, 1), 48, "NVIDIA GeForce RTX 5090"),
    ],
)
def test_an_unknown_card_gets_the_nearest_table(name, capability, processors, like):
    assert choose.nearest(name, capability, processors) == CARDS[like]


def test_the_nearest_card_is_of_its_generation_first(monkeypatch):
    cards = {
        "cpu": CPU,
        "large": Thresholds(capability=(9, 0), processors=132),
        "older": Thresholds(capability=(8, 6), processors=132),
        "small": Thresholds(capability=(9, 0), processors=78),
    }
    monkeypatch.setattr(choose, "CARDS", cards)
    assert choose.nearest("new", (9, 0), 80) is cards["small"]
    assert choose.nearest("new", (8, 9), 132) is cards["older"]


def test_other_devices_are_unknown():
    assert choose.thresholds_of(torch.empty(1)) is CPU
    assert choose.thresholds_of(torch.empty(1, device="meta")) == Thresholds()


def test_the_choice_between_the_two_ways():
    assert not choose.denser(100, 200, 300, torch.float32)  # 2·200·300/500 = 240
    assert not choose.denser(240, 200, 300, torch.float32)
    assert choose.denser(241, 200, 300, torch.float32)
    assert not choose.denser(10**6, 200, 300, torch.bfloat16)
    assert not choose.denser(10**6, 200, 300, torch.float16)


def test_the_choice_of_the_dense_gradient_at_tiny_sizes():
    assert choose.tiny(16 * 64, (64, 64), 4, LEAST)  # (16 + 3·20)·64·64 < 2^21
    assert not choose.tiny(64 * 256, (256, 256), 8, LEAST)
    assert not choose.tiny(512, (512, 512), 8, LEAST)  # one token, but a large matrix to form
    edge = LEAST // 64 // 64 - 3 * 24
    assert choose.tiny((edge - 1) * 64, (64, 64), 8, LEAST)
    assert not choose.tiny(edge * 64, (64, 64), 8, LEAST)


@pytest.mark.parametrize(
    "dtype, rows, shape, rank, compiling, way",
    [
        (F32, 16, (64, 64), 0, False, Way.SUM),
        (F32, 16, (64, 64), 0, True, Way.SUM),
        (F32, 16, (512, 512), 0, False, Way.FACTORED),
        (F32, 16, (512, 512), 0, True, Way.PLAIN),
        (BF16, 16, (64, 64), 0, False, Way.FACTORED),
        (BF16, 1024, (1280, 1280), 256, False, Way.LOW_RANK),
        (BF16, 1023, (1280, 1280), 256, False, Way.FACTORED),  # fewer rows than repay it
        (BF16, 1024, (1280, 500), 256, False, Way.FACTORED),  # more than half of a side
        (BF16, 2**14, (4096, 4096), 257, True, Way.PLAIN),
    ],
)
def test_the_way_of_a_kronecker_product(dtype, rows, shape, rank, compiling, way):
    assert choose.kronecker(dtype, rows, shape, rank, compiling) is way


@pytest.mark.parametrize("way", [Way.SUM, Way.DENSE, Way.FACTORED, Way.KERNELS, Way.PLAIN])
def test_dora_goes_the_way_of_its_low_rank_layer(way):
    assert choose.rescaled(way, False) is way
    assert choose.rescaled(way, True) is Way.PLAIN
    assert choose.rescaled(Way.OPERATOR, False) is Way.PLAIN


def test_the_way_of_an_embedding():
    assert choose.embedding(True, 128) is Way.KERNELS
    assert choose.embedding(True, 256) is choose.embedding(False, 16) is Way.PLAIN


def test_the_way_of_the_norms():
    assert choose.norms(True, 128, False) is Way.KERNELS
    assert choose.norms(True, 256, False) is Way.PLAIN
    assert choose.norms(True, 16, True) is choose.norms(False, 16, False) is Way.PLAIN


@pytest.mark.parametrize(
    "dtype, rows, kernels, compiling, dropout, gradients, way",
    [
        (F32, 16, None, False, False, True, Way.PLAIN),
        (F32, 16, None, False, True, True, Way.PLAIN),
        (BF16, 16, None, True, False, True, Way.PLAIN),
        (BF16, 16, None, False, True, True, Way.DROPPED),
        (F16, 16, None, False, False, True, Way.FACTORED),
        (BF16, 16, Way.KERNELS, False, False, False, Way.KERNELS),
        (BF16, 128, Way.FEW_ROWS, False, False, False, Way.FEW_ROWS),
        (BF16, 129, Way.FEW_ROWS, False, False, False, Way.KERNELS),
        (BF16, 128, Way.FEW_ROWS, False, False, True, Way.KERNELS),
    ],
)
def test_the_way_of_rows_of_different_updates(
    dtype, rows, kernels, compiling, dropout, gradients, way
):
    assert choose.of_rows(dtype, rows, kernels, compiling, dropout, gradients) is way


@pytest.mark.parametrize(
    "dtype, kernels, compiling, dropout, on_cpu, way",
    [
        (F32, False, False, False, True, Way.PLAIN),
        (BF16, False, False, False, True, Way.FACTORED),
        (BF16, False, False, True, True, Way.FACTORED),
        (BF16, False, True, False, True, Way.PLAIN),
        (F16, False, False, False, True, Way.PLAIN),
        (BF16, False, False, False, False, Way.PLAIN),
        (BF16, True, False, False, False, Way.KERNELS),
        (F16, True, False, False, False, Way.KERNELS),
        (BF16, True, False, True, False, Way.PLAIN),
        (BF16, True, True, False, False, Way.PLAIN),
    ],
)
def test_the_way_of_pairs_of_expert_and_adapter(dtype, kernels, compiling, dropout, on_cpu, way):
    assert choose.of_pairs(dtype, kernels, compiling, dropout, on_cpu) is way


def test_the_gradients_of_a_convolutions_factors():
    assert choose.dense_gradient(True, 1) and choose.dense_gradient(False, 8)
    assert not choose.dense_gradient(False, 1)


def test_no_operation_of_a_device_serves_a_cpu():
    x = torch.empty(8, 8, dtype=BF16)
    assert not choose.grouped_serves(x, 8) and not choose.by_cublas(x)
    assert not choose.by_cublas(torch.empty(8, 8, device="meta"))


# what a choice compares with stands in the one place that chooses; here what is none
NO_CHOICE = {
    "dropout.py": {"_BLOCK", "_BLOCK_OF_A_DEVICE"},  # numbers of a mask that are drawn at a time
    "sources.py": {"_BLOCK"},  # bytes of rows whose gradient is computed at a time
}


def numbers_of(path):
    """The names that a module gives whole numbers."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = [*ast.walk(node.value)] if isinstance(node, ast.Assign) else []
        whole = any(isinstance(n, ast.Constant) and type(n.value) is int for n in inner)
        if whole and not any(isinstance(n, ast.Name) for n in inner):
            yield from (n.id for one in node.targets for n in ast.walk(one) if hasattr(n, "id"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_no_threshold_stands_elsewhere(path):
    if path.name == "choose.py":
        assert {"FEW", "LONG", "REPAID"} <= {*numbers_of(path)}
    else:
        assert {*numbers_of(path)} == NO_CHOICE.get(path.name, set())
