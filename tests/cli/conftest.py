"""The working directory of what the command line is run on."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from tests.cli.running import fill  # which needs the command line's libraries

    monkeypatch.chdir(tmp_path)
    fill()
    return tmp_path
