"""What a merge keeps of small updates, rounding at random, and rounding as servers do."""

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.cli import main
from paramlora.model.experts import product, stack_of
from paramlora.update.rounding import stochastic

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def small(dtype=torch.bfloat16, size=1e-3, seed=0):
    """Two layers with updates of `size` times their weights, in norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128))
    paramlora.attach(model, {"0": {"r": 4}, "1": {"r": 2, "scale": 2.0}})
    for layer in model:
        lists = layer.parametrizations.weight
        lists.original.data = lists.original.data.to(dtype)
        update = lists[0]
        update.lora_B.data.normal_()
        delta = update.lora_scale * update.lora_B @ update.lora_A
        update.lora_B.data *= size * lists.original.data.float().norm() / delta.norm()
    return model


def apart(layer):
    lists = layer.parametrizations.weight
    update = lists[0]
    delta = update.lora_scale.double() * update.lora_B.double() @ update.lora_A.double()
    return lists.original.data.double(), delta.detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_report_is_what_the_weights_hold(dtype):
    model = small(dtype)
    parts = [apart(layer) for layer in model]
    report = paramlora.merge(model, report=True)
    assert [row.path for row in report.rows] == ["0", "1"]
    dots, squares = 0.0, 0.0
    for layer, row, (weight, delta) in zip(model, report.rows, parts):
        got = layer.weight.double() - weight
        dot, square = (got * delta).sum(), delta.square().sum()
        assert row.kept == pytest.approx(float(dot / square), rel=1e-4, abs=1e-6)
        assert row.off == pytest.approx(float((got - delta).norm() / delta.norm()), rel=1e-4)
        assert row.size == pytest.approx(1e-3, rel=1e-3)
        assert row.dtype == str(dtype).removeprefix("torch.")
        dots, squares = dots + dot, squares + square
    assert report.total.kept == pytest.approx(float(dots / squares), rel=1e-4, abs=1e-6)
    table = str(report).splitlines()
    assert len(table) == 4 and table[0].split()[0] == "tensor" and table[-1].startswith("total")
    assert f"{report.total.kept:.1%}" in table[-1] and "<pre>" in report._repr_html_()


def test_a_float32_base_keeps_all():
    report = paramlora.merge(small(torch.float32), report=True)
    assert report.total.kept == pytest.approx(1, abs=1e-4) and report.total.off < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_random_the_mean_is_the_sum(dtype):
    model = small(dtype)
    parts = [apart(layer) for layer in model]
    total = [torch.zeros_like(weight) for weight, _ in parts]
    runs = 60
    for seed in range(runs):
        other = copy.deepcopy(model)
        assert paramlora.merge(other, seed=seed) is other
        for mean, layer in zip(total, other):
            mean += layer.weight.double() / runs
    for mean, (weight, delta) in zip(total, parts):
        kept = ((mean - weight) * delta).sum() / delta.square().sum()
        # each element is off by at most a step, so the share by so much at five deviations
        step = weight.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        spread = 5 * (step * delta).norm() / delta.square().sum() / runs**0.5
        assert abs(kept - 1) < spread
        assert spread < 0.35 or dtype.itemsize == 1


def test_one_seed_gives_one_result_and_another_another():
    one, same, other = (paramlora.merge(small(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    near = paramlora.merge(small())
    gaps = (one[0].weight.double() - near[0].weight.double()).abs()
    assert (gaps <= near[0].weight.double().abs() * torch.finfo(torch.bfloat16).eps + 1e-30).all()


@pytest.mark.parametrize("seed", ("3", 3.0, True, torch.tensor(3)), ids=repr)
def test_a_seed_that_is_no_whole_number_is_refused(seed, tmp_path):
    model = small()
    before = copy.deepcopy(model.state_dict())
    adapter = paramlora.adapter_of(model)
    with pytest.raises(paramlora.ParamloraError, match="seed must be a whole number, got "):
        paramlora.merge(model, seed=seed)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(paramlora.ParamloraError, match="seed must be a whole number, got "):
        paramlora.combine([adapter, adapter], how="dare", rank=2, density=0.5, seed=seed)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_file_is_rounded_at_random_too(dtype, ending, tmp_path, capsys):
    model = small(dtype)
    parts = [apart(layer) for layer in model]
    base = {f"{i}.weight": weight.to(dtype) for i, (weight, _) in enumerate(parts)}
    path, adapter = tmp_path / f"base{ending}", tmp_path / "adapter.safetensors"
    save = safetensors.torch.save_file if ending == ".safetensors" else torch.save
    save(base, path)
    paramlora.save_adapter(model, adapter)
    total, runs = [torch.zeros_like(weight) for weight, _ in parts], 40
    for seed in range(runs):
        out = tmp_path / f"out{seed}{ending}"
        paramlora.files.merge(path, [adapter], out, seed=seed)
        merged = read(out)
        for i, mean in enumerate(total):
            mean += merged[f"{i}.weight"].double() / runs
    for mean, (weight, delta) in zip(total, parts):
        kept = ((mean - weight) * delta).sum() / delta.square().sum()
        step = weight.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        spread = 5 * (step * delta).norm() / delta.square().sum() / runs**0.5
        assert abs(kept - 1) < spread
    out, told = tmp_path / f"again{ending}", [str(path), str(adapter), "--seed", "3"]
    with pytest.raises(SystemExit, match="0"):
        main(["merge", *told, "-o", str(out), "--report"])
    assert all(map(torch.equal, bits(read(out)), bits(read(tmp_path / f"out3{ending}"))))
    shown = float(capsys.readouterr().out.splitlines()[-1].split()[-2].rstrip("%")) / 100
    got = [read(out)[f"{i}.weight"].double() - weight for i, (weight, _) in enumerate(parts)]
    dots = sum((g * delta).sum() for g, (_, delta) in zip(got, parts))
    assert shown == pytest.approx(float(dots / sum(d.square().sum() for _, d in parts)), abs=1e-3)


def read(path):
    if path.suffix == ".pt":
        return torch.load(path)
    return safetensors.torch.load_file(path)


def bits(state):
    return [tensor.view(torch.uint8) for _, tensor in sorted(state.items())]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_a_number_becomes_one_of_its_two_neighbours(dtype):
    bits = torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1))
    every = bits.to({1: torch.int8, 2: torch.int16}[dtype.itemsize]).view(dtype).float()
    every = every[every.isfinite()].unique()
    total = (every[1:] * 0.25 + every[:-1] * 0.75).repeat(40)
    found = stochastic(total, dtype, torch.Generator().manual_seed(0)).float()
    low, high = every[:-1].repeat(40), every[1:].repeat(40)
    assert ((found == low) | (found == high)).all()
    up = (found == high).float()
    assert abs(up.mean() - 0.25) < 5 * (0.25 * 0.75 / len(total)) ** 0.5 + 1e-3
    each = up.view(40, -1)[:, every[:-1].abs().argsort()[:8]].sum(0)  # beside zero
    assert ((1 <= each) & (each <= 25)).all()
    exact = stochastic(every, dtype, torch.Generator().manual_seed(0)).float()
    assert torch.equal(exact, every)


def test_a_narrow_base_is_refused_where_nothing_is_asked():
    model = small(torch.float8_e4m3fn)
    with pytest.raises(paramlora.AdapterError) as told:
        paramlora.merge(model)
    assert "or round at random (seed=0), or count what is lost (report=True)" in str(told.value)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return stop.value.code


def test_the_command_line_shows_the_same(tmp_path, capsys):
    model = small()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    torch.save(paramlora.detach(copy.deepcopy(model)).state_dict(), tmp_path / "base.pt")
    report = paramlora.merge(model, report=True)
    files = (tmp_path / "base.pt", tmp_path / "a.safetensors", "-o", tmp_path / "out.pt")
    assert run("merge", *files, "--report", "-q") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-1].split() == str(report).splitlines()[-1].split()
    assert [line.split()[0] for line in table[-3:]] == ["0.weight", "1.weight", "total"]
    assert run("merge", *files, "--report", "--json", "--force") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"]["total"]["kept"] == pytest.approx(report.total.kept)


# --- as served -----------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
def test_as_served_rounds_the_base_and_then_the_update(routed):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).bfloat16()
    paramlora.attach(layer, {"weight": {"r": 4, "scale": 0.5}})
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_()
    x = torch.randn(32, 64).bfloat16()
    weight = layer.parametrizations.weight.original
    a, b = update.lora_A.bfloat16(), (update.lora_B * 0.5).bfloat16()
    served = F.linear(x, weight, layer.bias) + F.linear(F.linear(x, a), b)

    def run():
        if not routed:
            return layer(x)
        with paramlora.route(layer, ["default"] * 32):
            return layer(x)

    once = run()
    paramlora.rounding(layer, "as served")
    torch.testing.assert_close(run(), served, rtol=0, atol=2**-7)
    assert (run() == served).float().mean() > 0.99 and not torch.equal(run(), once)
    assert torch.autograd.grad(run().float().sum(), update.lora_B)[0].abs().sum() > 0
    paramlora.rounding(layer, "once")
    assert torch.equal(run(), once)


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
def test_a_convolution_as_served(dropout):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).bfloat16()
    paramlora.attach(layer, {"weight": {"r": 2, "dropout": dropout}})
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_()
    x = torch.randn(2, 4, 6, 6).bfloat16()
    paramlora.rounding(layer, "as served")
    thin = F.conv2d(x, update.lora_A.bfloat16().view(2, 4, 3, 3))
    served = F.conv2d(x, layer.parametrizations.weight.original, layer.bias)
    served = served + F.conv2d(thin, update.lora_B.bfloat16().view(6, 2, 1, 1))
    assert torch.equal(layer(x), served)


@pytest.mark.parametrize("routed", [False, True])
def test_as_served_where_inputs_are_dropped(routed):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).bfloat16()
    paramlora.attach(layer, {"weight": {"r": 4, "scale": 0.5, "dropout": 1e-6}})
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_()
    paramlora.set_adapters(layer, {"default": 0.5})
    x = torch.randn(64, 64).bfloat16()
    a, b = update.lora_A.bfloat16(), (update.lora_B * 0.25).bfloat16()
    served = F.linear(x, layer.parametrizations.weight.original, layer.bias)
    served = served + F.linear(F.linear(x, a), b)
    paramlora.rounding(layer, "as served")
    if routed:
        with paramlora.route(layer, ["default"] * 64):
            y = layer(x)
    else:
        y = layer(x)
    assert (y == served).float().mean() > 0.99
    update.keep(dropout=0.5)
    dropped = [layer(torch.ones_like(x)) for _ in range(2)]
    assert not torch.equal(*dropped)
    layer.eval()
    assert torch.equal(layer(x), served)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_of_experts_as_served(transposed):
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 32, 16).bfloat16() / 4)
    layer = nn.Module()
    layer.w1 = stack
    paramlora.attach(layer, {"w1": {"r": 2, "scale": 0.5}})
    update = layer.parametrizations.w1[0]
    for factor in (update.lora_A, update.lora_B):
        factor.data.normal_()
    paramlora.rounding(layer, "as served")
    x = torch.randn(24, 32 if transposed else 16).bfloat16()
    ends = torch.tensor([10, 10, 24], dtype=torch.int32)
    y = product(x, stack_of(layer, "w1", x), ends, transposed)
    a, b = update.lora_A.bfloat16(), (update.lora_B * 0.5).bfloat16()
    weight = stack.detach()
    if transposed:
        weight, a, b = weight.mT, update.lora_B.bfloat16().mT, (update.lora_A * 0.5).bfloat16().mT
    for e, rows in ((0, slice(0, 10)), (2, slice(10, 24))):
        served = F.linear(x[rows], weight[e]) + F.linear(F.linear(x[rows], a[e]), b[e])
        torch.testing.assert_close(y[rows], served, rtol=2**-7, atol=2**-6)
        assert (y[rows] == served).float().mean() > 0.97
    assert torch.autograd.grad(y.float().sum(), update.lora_B)[0].abs().sum() > 0


def test_what_cannot_round_is_refused():
    with pytest.raises(paramlora.AdapterError, match="rounding is 'once' or 'as served', got 'up'"):
        paramlora.rounding(small(), "up")
    with pytest.raises(paramlora.AdapterError, match="no adapter is attached, so there is nothing"):
        paramlora.rounding(nn.Linear(2, 2), "once")
