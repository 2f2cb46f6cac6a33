"""What `benchmarks.tune` makes of its measurements, and what it writes."""

import json

import pytest

from benchmarks import tune
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Card


def test_the_threshold_loses_the_least_time():
    rows = [(2**12, 1.0, 2.0), (2**16, 1.0, 1.2), (2**17, 1.5, 1.0), (2**20, 9.0, 1.0)]
    assert 2**16 < tune.threshold(rows) <= 2**17
    assert tune.threshold([(2**20, 1.0, 2.0)]) > 2**20
    assert tune.threshold([(2**20, 2.0, 1.0)]) <= 2**20


def test_a_written_table_is_read_as_it_was_measured(tmp_path, monkeypatch):
    table = tmp_path / "cards.json"
    table.write_bytes(tune.TABLE.read_bytes())
    card = Card(brief=2**30, capability=(8, 0), processors=108)
    tune.write("NVIDIA A100", card, table)
    monkeypatch.setattr(choose, "files", lambda package: tmp_path)
    assert choose.read_cards() == {**choose.CARDS, "NVIDIA A100": card}
    assert choose.read_cards()["NVIDIA A100"] == card
    assert table.read_text().count("\n") == len(json.loads(table.read_text())) + 2


def test_it_measures_on_a_cpu(capsys, monkeypatch):
    if tune.device().type != "cpu":
        pytest.skip("of a CPU's shapes")
    monkeypatch.setattr(tune, "CPU_LINEAR", [(4, 8, 2), (64, 64, 2)])
    monkeypatch.setattr(tune, "CONVOLUTIONS", [(4, 8, 2)])
    own = choose.card_of
    assert tune.main([]) == 0
    assert choose.card_of is own
    assert "in use: Card(tiny=2097152" in capsys.readouterr().out
