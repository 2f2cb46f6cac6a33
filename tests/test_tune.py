"""What `benchmarks.tune` makes of its measurements, and what it writes."""

import json
from pathlib import Path

import pytest

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
    ratio = own.brief / choose.CARDS[tune.MEASURED].brief * tune.H100.rate / card.rate
    assert 2**-0.5 <= ratio <= 2**0.5
    assert own.brief & (own.brief - 1) == 0


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
