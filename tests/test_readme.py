"""The README's own code runs, and what it points at exists."""

import re
from pathlib import Path

from paramlora.config import ALLOWED, INITS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippet_is_short_and_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(code.splitlines()) < 15 and TEXT.index(code) < 2_500  # on the first screen
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "merged.pt").stat().st_size > 0


def test_the_files_that_it_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_what_reaches_the_logits_is_what_the_recipe_computes():
    recipe = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
    ways = (
        "share(model) <",
        'share(paramlora.rounding(model, "as served"))',
        "share(paramlora.merge(",
    )
    told = [re.search(re.escape(way) + r".*# 0\.(\d\d)", recipe) for way in ways]
    exact, served, merged = (found.group(1) for found in told)
    shown = f"on the logits {exact} % arrives, {served} % as a server computes it"
    text = " ".join(TEXT.split())
    assert shown in text and f"and {merged} % once merged" in text


def test_the_table_names_every_key_and_every_start():
    table = TEXT[TEXT.index("| key |") : TEXT.index('An entry `{"rows"')]
    keys = {
        k for row in re.findall(r"^\| (.*?) \|", table, re.M) for k in re.findall(r"`(\w+)`", row)
    }
    assert keys == set(ALLOWED)
    assert all(f"`{start}`" in table for start in INITS)
