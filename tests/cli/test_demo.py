"""The demonstration: what it says and asks, the files that it leaves, and what it proposes."""

import os
import re
import shlex
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import paramlora
from paramlora.cli import demo, main

QUICK = ("--steps", "2", "--pretrain-steps", "2", "--seed", "3")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few steps of sampling: what is drawn then is noise, and the same noise again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "SAMPLING_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One run: its folder, whose name a shell must be told in quotes, and the picture's panels."""
    folder, drawn = tmp_path_factory.mktemp("demo") / "my demo", {}
    draw = demo.draw
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(demo, "draw", lambda to, panels: (drawn.update(panels), draw(to, panels)))
        main(["demo", "--out", str(folder), *QUICK])
    assert stop.value.code == 0
    return folder, drawn


def held(folder):
    """Every file below, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def plain(path):
    model = demo.UNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def test_it_says_what_will_happen_and_a_seed_decides_the_files(capsys, shown, tmp_path):
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "again", *QUICK)
    first, rest = out.split("\n", 1)
    assert code == 0 and first.startswith(
        "A small diffusion U-Net learns to draw the digits 0 to 4"
    )
    assert first.endswith(f"into {tmp_path / 'again'}.") and first.count(". ") == 0
    assert '"to_q": {"r": 4, "scale": 1}' in rest and "largest difference after merging" in rest
    assert set(held(tmp_path / "again")) == set(demo.FILES)
    for name in demo.FILES:
        assert (tmp_path / "again" / name).read_bytes() == (shown[0] / name).read_bytes(), name


@pytest.mark.parametrize("name", ["sklearn", "matplotlib"])
def test_what_it_needs_is_asked_before_it_begins(name, tmp_path, monkeypatch, capsys):
    for module in [name, *(one for one in sys.modules if one.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "paramlora.cli.demo")
    monkeypatch.delattr(paramlora.cli, "demo")
    code, out, err = run(capsys, "demo", "--out", tmp_path / "new", *QUICK)
    assert (code, out, os.listdir(tmp_path)) == (2, "", [])
    assert err.startswith(f"error: the demo needs scikit-learn and matplotlib (import of {name}")
    assert err.endswith("): pip install 'paramlora[demo]'\n")


def test_the_picture_shows_the_base_half_and_all_of_the_update(shown):
    folder, panels = shown
    base, merged = plain(folder / "base.pt"), plain(folder / "merged.pt")
    half = demo.UNet()
    pairs = zip(base.state_dict().items(), merged.state_dict().values())
    half.load_state_dict({k: (b.double() + m.double()).div(2).float() for (k, b), m in pairs})
    with demo.one_thread():
        want = [demo.sample(model, 3) for model in (base, half, merged)]
    zero, middle, one, _ = panels.values()
    assert torch.equal(zero, want[0])  # the base is back, bit for bit
    torch.testing.assert_close(middle, want[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(one, want[2], rtol=0, atol=1e-3)
    assert [re.findall(r"strength ([\d.]+)", title) for title in panels] == [
        ["0"],
        ["0.5"],
        ["1"],
        [],
    ]
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_at_its_end_work_as_printed(shown, capsys):
    folder, _ = shown
    for line in demo.commands(folder):
        program, *arguments = shlex.split(line)
        code, out, err = run(capsys, *arguments)
        assert (program, code) == ("paramlora", 0), err
        assert not err or re.match(r"merged 20 of 89 tensors|converted 20 updates", err), err
    half, base = (torch.load(folder / name, weights_only=True) for name in ("half.pt", "base.pt"))
    adapter = load_file(folder / "adapter.safetensors")
    a, b = (adapter[f"middle.time.lora_{f}"].double() for f in "AB")
    want = base["middle.time.weight"].double() + 0.5 * b @ a
    torch.testing.assert_close(half["middle.time.weight"].double(), want, rtol=1e-6, atol=1e-7)
    assert (folder / "peft" / "adapter_config.json").exists()


def test_the_commands_are_what_it_prints(capsys, shown):
    code, out, _ = run(capsys, "demo", "--out", shown[0], "--force", *QUICK)
    assert code == 0 and out.rstrip().split("\n")[-3:] == [
        f"  {c}" for c in demo.commands(shown[0])
    ]


def test_without_a_terminal_it_replaces_nothing_unless_forced(capsys, tmp_path):
    (tmp_path / "base.pt").write_text("mine")
    code, _, err = run(capsys, "demo", "--out", tmp_path, *QUICK)
    told = f"error: {tmp_path}: holds base.pt. Give another --out, or --force to replace them.\n"
    assert (code, err) == (2, told) and held(tmp_path) == {"base.pt": b"mine"}


@pytest.fixture
def answering(monkeypatch):
    """Answer on a terminal."""
    ends = os.openpty()
    with open(ends[1]) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield lambda text: os.write(ends[0], f"{text}\n".encode())
    os.close(ends[0])


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal_it_asks(capsys, tmp_path, answering):
    (tmp_path / "base.pt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine, too")
    answering("n")
    code, _, err = run(capsys, "demo", "--out", tmp_path, *QUICK)
    assert code == 130 and f"{tmp_path}: holds base.pt. Replace them? [y/N]" in err
    assert held(tmp_path) == {"base.pt": b"mine", "notes.txt": b"mine, too"}
    answering("y")
    assert run(capsys, "demo", "--out", tmp_path, *QUICK)[0] == 0
    assert held(tmp_path)["notes.txt"] == b"mine, too" and held(tmp_path)["base.pt"] != b"mine"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("at", ["keep", "sample", "draw"])
def test_ctrl_c_leaves_what_was_there(capsys, monkeypatch, tmp_path, at, there):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "below" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "base.pt").write_text("mine")
    before = sorted(tmp_path.rglob("*")), held(tmp_path)
    monkeypatch.setattr(demo, at, interrupt)
    code, _, err = run(capsys, "demo", "--force", "--out", out, *QUICK)
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err
    assert (sorted(tmp_path.rglob("*")), held(tmp_path)) == before


def test_ctrl_c_while_files_are_put_in_place_leaves_all_of_them(monkeypatch, tmp_path):
    replace, calls = os.replace, []

    def interrupted(*paths):
        replace(*paths)
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), demo.whole_folder(tmp_path) as folder:
        for name in demo.FILES:
            (folder / name).write_text("new")
            (tmp_path / name).write_text("old")
        monkeypatch.setattr(os, "replace", interrupted)
    assert held(tmp_path) == dict.fromkeys(demo.FILES, b"new")


@pytest.mark.parametrize("below", [".", "deeper"])
def test_it_says_when_its_folder_cannot_be_written(capsys, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, "demo", "--out", tmp_path / "file" / below)
    said = " ".join(err.split())
    assert code == 2 and "cannot be written" in said and "Give a folder of your own." in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_a_file_s_place_is_refused_before_anything_is_trained(capsys, tmp_path):
    (tmp_path / "base.pt").mkdir()
    code, _, err = run(capsys, "demo", "--force", "--out", tmp_path, *QUICK)
    assert code == 2 and f"{tmp_path / 'base.pt'}: is a folder" in err
    assert os.listdir(tmp_path) == ["base.pt"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_adapts_a_modest_share_and_keeps_the_threads(tmp_path, two_threads):
    result = demo.run(tmp_path, 1, 0, lambda *_, **__: None, pretrain_steps=1)
    assert result.trainable / result.total < 0.06 and result.restored == 0
    assert torch.get_num_threads() == 2


def moved(folder, size):
    """The demonstration's base, and an adapter that moves each weight by `size` of its norm."""
    torch.manual_seed(0)
    model = paramlora.attach(demo.UNet(), demo.CONFIG)
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            weight, (update,) = (
                module.parametrizations.weight.original,
                module.parametrizations.weight,
            )
            torch.nn.init.normal_(update.lora_B)
            with torch.no_grad():
                change = module.weight - weight
                update.lora_B.mul_(size * weight.norm() / change.norm())
    paramlora.save_adapter(model, folder / "adapter.safetensors")
    base = paramlora.detach(model)
    torch.save(base.state_dict(), folder / "base.pt")
    return base


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_merging_into_a_merged_file_is_warned_of(capsys, tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    base = moved(tmp_path, size)
    code, _, err = run(capsys, "merge", "base.pt", "adapter.safetensors", "-o", "merged.pt")
    assert code == 0 and "warning" not in err
    code, _, err = run(capsys, "merge", "merged.pt", "adapter.safetensors", "-o", "twice.pt")
    told = r"warning: \d+ of 20 tensors, such as [\w.]+, hold other values than those that the "
    told += r"adapter was trained on\. Is this its base, and is the adapter not merged into it "
    told += r"already\?"
    assert code == 0 and re.match(told, err), err
    with pytest.warns(paramlora.ParamloraWarning, match="merged into it already"):  # live, too
        paramlora.load_adapter(plain("merged.pt"), "adapter.safetensors")
    paramlora.load_adapter(base, "adapter.safetensors")  # warnings are errors in tests
