"""The options that commands share."""

import pytest

pytest.importorskip("typer")


from tests.cli.running import run


@pytest.mark.parametrize("weight", ["nan", "inf", "1e400", "O.7", ""])
def test_a_weight_that_is_no_number_is_named(weight, folder, capsys):
    one = f"a.safetensors:{weight}"
    code, _, err = run(capsys, "merge", "base.safetensors", one, "-o", "x.safetensors")
    told = "is no weight. Give a finite number, as in a.safetensors:0.7."
    assert (code, err) == (2, f'error: {one}: "{weight}" {told}\n')


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e400"])
def test_an_alpha_that_is_not_finite_is_refused(alpha, folder, capsys):
    (folder / "c.json").write_text("{}")
    code, _, err = run(
        capsys, "convert", "a.safetensors", "-o", "o", "--to", "native", "--alpha", alpha
    )
    assert code == 2 and "alpha must be finite, got " in err


def test_every_format_that_can_be_written_is_known(folder, capsys):
    code, _, err = run(capsys, "convert", "a.safetensors", "-o", "o", "--to", "pefft")
    assert code == 2 and "Known: comfyui, diffusers, kohya, litgpt, loralib, native, orig" in err
