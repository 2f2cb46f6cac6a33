"""The command line as a whole: its help, and wrong use of it."""

import pytest

pytest.importorskip("typer")


from tests.cli.running import run


def test_help_and_wrong_use(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "demo" in out and "targets" in out
    assert run(capsys, "targets")[0] == 2
