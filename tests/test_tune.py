"""What `benchmarks.tune` makes of its measurements, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import paramlora
from benchmarks import tune
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Thresholds


def test_the_threshold_loses_the_least_time():
    rows = [(2**12, 1.0, 2.0), (2**16, 1.0, 1.2), (2**17, 1.5, 1.0), (2**20, 9.0, 1.0)]
    assert 2**16 < tune.threshold(rows) <= 2**17
    assert tune.threshold([(2**20, 1.0, 2.0)]) > 2**20
    assert tune.threshold([(2**20, 2.0, 1.0)]) <= 2**20


def test_a_written_table_is_read_as_it_was_measured(tmp_path, monkeypatch):
    table = tmp_path / "cards.json"
    table.write_bytes(tune.TABLE.read_bytes())
    card = Thresholds(brief=2**30, capability=(8, 0), processors=108)
    tune.write("NVIDIA A100", card, table)
    monkeypatch.setattr(choose, "files", lambda package: tmp_path)
    assert choose.read_cards() == {**choose.CARDS, "NVIDIA A100": card}
    assert choose.read_cards()["NVIDIA A100"] == card
    assert table.read_text().count("\n") == len(json.loads(table.read_text())) + 2


@pytest.mark.parametrize("name", tune.NEVER_RUN)
def test_a_card_that_never_ran_has_what_follows_from_its_figures(name):
    card, own = tune.NEVER_RUN[name], choose.CARDS[name]
    assert own == tune.estimated(card) and own.never_run
    ratio = own.brief / choose.CARDS[tune.MEASURED].brief * tune.H100.teraflops / card.teraflops
    assert 2**-0.5 <= ratio <= 2**0.5
    assert own.brief & (own.brief - 1) == 0


LANES = {(8, 0): 64}  # float32 units of a multiprocessor, where they are not 128
BOOST = (1.4, 2.6)  # GHz; a wrong number of multiprocessors or teraflops leaves it


@pytest.mark.parametrize("name", [*tune.NEVER_RUN, "H100"])
def test_a_card_s_figures_agree_with_each_other(name):
    card = tune.NEVER_RUN.get(name, tune.H100)
    gigahertz = 1e3 * card.teraflops / (2 * card.processors * LANES.get(card.capability, 128))
    assert BOOST[0] < gigahertz < BOOST[1]
    assert card.capability in tune.LIMITS


# Blocks of 128 threads, 32 registers and no shared memory; 256 threads, 128 registers, 48 KiB; four
# warps of 255 registers, all of the shared memory: by the rules of CUDA's occupancy calculator.
RESIDENT = {
    (8, 0): (16, 2, 1),
    (8, 6): (12, 2, 1),
    (8, 9): (12, 2, 1),
    (9, 0): (16, 2, 1),
    (10, 0): (16, 2, 1),
    (12, 0): (12, 2, 1),
}


@pytest.mark.parametrize("capability", tune.LIMITS, ids=str)
def test_how_many_blocks_a_multiprocessor_holds(capability):
    limits = tune.LIMITS[capability]
    found = (
        limits.resident(0, 4, 32),
        limits.resident(48 * 1024, 8, 128),
        limits.resident(limits.shared, 4, 255),
    )
    assert found == RESIDENT[capability]
    assert limits.resident(limits.shared + 1, 4, 32) == 0
    assert limits.resident(0, 16, 255) == 0  # more registers than there are


def test_what_was_measured_is_not_marked_as_never_run(tmp_path, monkeypatch):
    assert not any(choose.CARDS[name].never_run for name in ("cpu", tune.MEASURED, "NVIDIA H200"))
    table = tmp_path / "cards.json"
    table.write_bytes(tune.TABLE.read_bytes())
    monkeypatch.setattr(tune, "TABLE", table)
    assert tune.main(["--never-run"]) == 0
    assert table.read_bytes() == Path(choose.__file__).with_name("cards.json").read_bytes()


def test_it_measures_on_a_cpu(capsys, monkeypatch):
    if tune.device().type != "cpu":
        pytest.skip("of a CPU's shapes")
    monkeypatch.setattr(tune, "CPU_LINEAR", [(4, 8, 2), (64, 64, 2)])
    monkeypatch.setattr(tune, "CONVOLUTIONS", [(4, 8, 2)])
    own = choose.thresholds_of
    assert tune.main([]) == 0
    assert choose.thresholds_of is own
    assert "in use: Thresholds(tiny=2097152" in capsys.readouterr().out


def test_every_shape_that_it_measures_can_be_adapted(monkeypatch):
    def attached(layer, x, r):
        paramlora.attach(nn.Sequential(layer), {"0": {"r": r}})

    monkeypatch.setattr(tune, "step_of", attached)
    monkeypatch.setattr(tune, "timed", lambda *told: (1.0, 1.0))
    for rows in (tune.linears(True), tune.convolutions()):
        assert all(work > 0 for work, *_ in rows)


@pytest.mark.parametrize("name", ("NVIDIA H200", "NVIDIA GeForce RTX 4090"))
def test_what_another_benchmark_measured_of_a_card_stays(name, monkeypatch):
    old = choose.CARDS[name]
    (major, minor), processors = old.capability, old.processors
    about = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=processors)
    monkeypatch.setattr(tune.torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(tune, "linears", lambda on_cpu: [(2**20, 1.0, 2.0)])
    found = tune.measured(False)
    assert found == replace(old, brief=found.brief, never_run=False)
