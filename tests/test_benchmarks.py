"""The benchmarks still run, check what they measure, and report it; no time is asserted."""

import dataclasses
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from benchmarks import (
    dropout,
    experts,
    finetune_bf16,
    kinds,
    layers,
    llama,
    many,
    models,
    quantised,
    report,
    routed,
    timing,
    update_kept,
)
from benchmarks.opponents import WAYS, Way
from benchmarks.reference import Result, bound, check, definition
from benchmarks.runlora import BACKWARDS, FORWARDS, gradients
from benchmarks.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # the other libraries' own advice


def read(folder, kind):
    return json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))


def test_one_layer_is_measured_and_every_way_is_right_or_says_why(tmp_path, capsys):
    options = ["--size", "tiny", "--no-compile", "--rounds", "1", "--seconds", "0"]
    assert layers.main([*options, "--dtypes", "bf16", "autocast", "--out", str(tmp_path)]) == 0
    content = read(tmp_path, "layers")
    assert content["machine"]["packages"]["torch"] == torch.__version__
    ways = {row["way"] for row in content["rows"]}
    assert ways >= {name for name in WAYS if "compiled" not in name}
    refused = {(r["case"].split()[0], r["way"]) for r in content["rows"] if "refused" in r}
    assert not any(way == "paramlora" for _, way in refused)
    assert not any(case == "linear" for case, _ in refused)
    wrong = [r for r in content["rows"] if r.get("refused", "").startswith("AssertionError")]
    assert wrong == []
    assert "R, bf16, training, eager time" in capsys.readouterr().out
    assert report.main([str(tmp_path), "--out", str(tmp_path / "r.md")]) == 0
    assert (tmp_path / f"{tmp_path.name}-ratio.png").exists()
    assert "saved" in (tmp_path / "r.md").read_text(encoding="utf-8")


def test_inference_is_measured_alone(tmp_path):
    options = ["--size", "tiny", "--groups", "linear", "--rounds", "1", "--seconds", "0"]
    ways = ["--ways", "paramlora", "--no-training"]
    assert layers.main([*options, *ways, "--out", str(tmp_path)]) == 0
    content = read(tmp_path, "layers")
    assert {row["way"] for row in content["rows"]} >= {"paramlora", "peft merged"}
    assert all(row["inference"] for row in content["rows"]) and "launches" not in content


def test_a_wrong_layer_is_caught():
    layer = nn.Linear(6, 5).requires_grad_(False)
    x, dy = torch.randn(4, 6), torch.randn(4, 5)
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    want = definition(layer, A, B, x, dy)
    exact = Result(*(t.float() for t in want))
    check(exact, want, bound(torch.float32, 6))
    half = exact._replace(y=(layer(x) + (want.y - layer(x)) / 2).float())
    with pytest.raises(AssertionError, match="y: relative error"):
        check(half, want, bound(torch.float32, 6))
    with pytest.raises(AssertionError, match="dB is zero"):
        check(exact._replace(dB=torch.zeros(5, 2)), want, bound(torch.float32, 6))


def test_all_of_runloras_orders_agree():
    tensors = [torch.randn(s).double() for s in ((3, 4, 6), (5, 6), (2, 6), (5, 2), (5,))]
    x, W, A, B, bias = (t.requires_grad_() for t in tensors)
    y = nn.functional.linear(x, W + B @ A, bias)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, A, B), dy)
    with torch.no_grad():
        for forward in FORWARDS:
            torch.testing.assert_close(forward(x, W, A, B, bias), y)
        for order in BACKWARDS:
            for got, one in zip(gradients(order, dy, x, W, A, B), want):
                torch.testing.assert_close(got, one)
    assert len(FORWARDS) == 4 and len(set(BACKWARDS)) == 8


@pytest.mark.parametrize("way", [way for way in models.WAYS if way not in models.UNCHECKED])
@pytest.mark.parametrize("name", ["unet", "llama"])
def test_whole_models_are_right(name, way):
    pytest.importorskip("diffusers")
    models.check_tiny(ZOO[name], way)


def test_a_whole_model_is_measured(tmp_path):
    ways = ["bound", "paramlora", "peft"]
    options = ["--models", "llama", "--tiny", "--rounds", "1", "--ways", *ways]
    assert models.main([*options, "--dtypes", "float32", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path, "models")["rows"]
    assert [row["way"] for row in rows] == ["frozen", *ways]
    trainable = [row["trainable"] for row in rows]
    assert trainable[0] == 0 < trainable[1] and trainable[1:] == 3 * trainable[1:2]


def test_a_model_that_is_refused_is_recorded_beside_the_others(tmp_path, monkeypatch, capsys):
    def adapt(way, model, entries, r):
        if way == "peft":
            raise KeyError("no such layer")
        if way == "loralib":  # wrong: it computes no update
            return adapted("bound", model, entries, r)
        return adapted(way, model, entries, r)

    adapted = models.adapt
    monkeypatch.setattr(models, "adapt", adapt)
    models.check_tiny.cache_clear()
    options = ["--models", "llama", "--tiny", "--rounds", "1", "--dtypes", "float32"]
    ways = ["--ways", "peft", "loralib", "paramlora"]
    assert models.main([*options, *ways, "--out", str(tmp_path)]) == 0
    models.check_tiny.cache_clear()
    frozen, peft, loralib, ours = read(tmp_path, "models")["rows"]
    assert peft["refused"] == "KeyError: 'no such layer'" and "eager_R" not in peft
    assert loralib["refused"].startswith("AssertionError: loralib: relative error")
    assert frozen["eager_R"] == 1 and ours["eager_R"] > 0
    assert "| peft |  |  |  |  |  |  |  | KeyError: 'no such layer' |" in capsys.readouterr().out


def test_quantised_bases_are_measured_and_take_what_their_bits_take(tmp_path, capsys):
    for package in ("transformers", "bitsandbytes", "torchao"):
        pytest.importorskip(package)
    options = ["--tiny", "--rounds", "1", "--out", str(tmp_path)]
    assert quantised.main(options) == 0
    rows = read(tmp_path, "quantised")["rows"]
    assert [r["way"] for r in rows] == 2 * list(quantised.WAYS)
    assert len({row["trainable"] for row in rows}) == 1
    at = {row["way"]: row for row in rows if row["checkpointing"]}
    model = quantised.plain(quantised._TINY)
    weights = sum(model.get_submodule(p).weight.numel() for p in quantised.targeted(model))
    rest = sum(p.numel() for p in model.parameters()) - weights
    for base, bits in (("bf16", 16), ("torchao int8", 8), ("nf4", 4), ("torchao nf4", 4)):
        row = at[f"{base}, paramlora"]
        packed = row["stored_mib"] * 2**20 - 2 * rest - 4 * row["trainable"]
        assert bits <= 8 * packed / weights < 1.25 * bits  # the rest is scales
    assert report.main([str(tmp_path), "--out", str(tmp_path / "r.md")]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "r.md").read_text(encoding="utf-8")):
        assert "| nf4 prepared, peft | yes |" in text


def test_layers_of_experts_are_measured(tmp_path, capsys):
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    layers_alone = ["--cases", "0", "1"]  # the whole model takes minutes
    assert experts.main(["--tiny", "--rounds", "1", "--out", str(tmp_path), *layers_alone]) == 0
    rows = read(tmp_path, "experts")["rows"]
    assert [row["way"] for row in rows] == 2 * experts.DEFAULT
    assert not [row for row in rows if "refused" in row or not row["eager_R"] > 0]
    kept = {row["way"]: row["kept"] for row in rows if "kept" in row}
    assert set(kept) == {"paramlora", "operations", "kernels", "peft", "unfused", "definition"}
    assert "eager |" in capsys.readouterr().out


def test_every_way_of_experts_gets_the_same_draws():
    case, r = experts.TINY[0], 4
    first, second = experts.inputs(case), experts.inputs(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(
        first[0], torch.randn(case.tokens, case.hidden, generator=generator).bfloat16()
    )
    small, large = (experts.values(case, r, size) for size in (1e-3, 1.0))
    for name in experts.STACKS:
        (a, b), (same, more) = small[name], large[name]
        assert torch.equal(a, same) and a.data_ptr() != same.data_ptr()
        torch.testing.assert_close(more, 1e3 * b)


def test_a_whole_llama_is_trained(tmp_path, capsys):
    pytest.importorskip("transformers")
    options = ["--tiny", "--steps", "1", "--out", str(tmp_path)]
    assert llama.main([*options, "--ways", "frozen", "paramlora", "--limit", "1e6"]) == 0
    assert llama.main([*options, "--limit", "1e6"]) == 0  # goes on with the rest
    rows = read(tmp_path, "llama")["rows"]
    assert [row["way"] for row in rows] == list(llama.WAYS)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "| peft bf16 |" in capsys.readouterr().out


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_the_loss_in_chunks_is_the_loss(chunks):
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 16).double().requires_grad_(), torch.randn(20, 16).double()
    labels = torch.randint(20, (12,))
    whole = torch.nn.functional.cross_entropy(hidden @ head.t(), labels)
    (want,) = torch.autograd.grad(whole, hidden)
    loss = llama.ChunkedLoss.apply(hidden, head, labels, chunks)
    (got,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_every_kind_is_measured_and_right(tmp_path, capsys):
    options = ["--size", "tiny", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert kinds.main(options) == 0
    rows = read(tmp_path, "kinds")["rows"]
    assert [row["way"] for row in rows] == 2 * ["frozen", *kinds.WAYS]
    assert all("eager_R" in row for row in rows)
    assert "| paramlora rows |" in capsys.readouterr().out
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / f"{tmp_path.name}-kinds.png").exists()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter", encoding="utf-8")
    for _ in range(2):
        assert report.main([str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter") and "old" not in text
    assert text.count("| paramlora dora |") == 1 and "](kinds.png)" in text
    assert (tmp_path / "kinds.png").exists()


def test_many_adapters_on_one_base_are_measured_and_right(tmp_path, capsys):
    options = ["--size", "tiny", "--rounds", "1", "--out", str(tmp_path)]
    assert routed.main(options) == 0
    rows = read(tmp_path, "routed")["rows"]
    assert sum("eager_R" in row for row in rows) == 9
    assert sum("tokens_per_second" in row for row in rows) == 4
    assert [row["way"] for row in rows if "seconds" in row] == ["paramlora", "peft"]
    assert "| loop of set_adapters |" in capsys.readouterr().out


def test_a_kind_without_its_update_is_found_wrong():
    case = next(kinds.selection("tiny", ["linear"]))
    tensors = kinds.cases.make(case, torch.float32, torch.device("cpu"), torch.float32)
    built = kinds.WAYS["paramlora dora"](tensors.layer, case.r)
    kinds.check(built, tensors, 1e-5)
    lost = dataclasses.replace(built, wanted=lambda weight: weight)
    with pytest.raises(AssertionError, match="relative error"):
        kinds.check(lost, tensors, 1e-5)


def test_dropout_is_measured_and_kept(tmp_path, capsys):
    assert dropout.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path, "dropout")["rows"]
    assert [row["way"] for row in rows] == [*dropout.Layer.ways, *dropout.Image.ways]
    assert all(0.9 < row["kept"] < 1.1 for row in rows if "kept" in row)
    assert "kernels dropout" in capsys.readouterr().out


def test_peft_trains_its_own_4_bit_layers():
    pytest.importorskip("bitsandbytes")
    model = quantised.adapted(quantised.WAYS["nf4, peft"], quantised._TINY, True)
    kinds = {type(m) for m in model.modules() if "Linear4bit" in type(m).__name__}
    assert {kind.__module__.split(".")[0] for kind in kinds} == {"peft", "bitsandbytes"}


def test_the_share_of_an_update_is_one_when_it_arrives_and_zero_when_it_does_not(tmp_path):
    base, true = torch.randn(50, 40).double(), torch.randn(50, 40).double()
    assert update_kept.share(base + true, base, true) == pytest.approx(1)
    assert update_kept.share(base, base, true) == 0
    assert update_kept.main(["--size", "tiny", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path, "update_kept")["rows"]
    large = {r["way"]: r["output"] for r in rows if r["size"] == 1e-2 and "bias" not in r["case"]}
    assert abs(large["frozen"]) < 0.2 < 0.8 < large["dense"]


def test_many_layers_and_fine_tuning_run(tmp_path):
    for way in ("paramlora", "peft"):
        (tmp_path / way).mkdir()
        many.check(way, 3, tmp_path / way)
    options = ["--steps", "10", "--seeds", "1", "--size", "1e-2", "--out", str(tmp_path)]
    assert finetune_bf16.main(options) == 0
    curve = read(tmp_path, "finetune_bf16")["curves"][0]
    assert curve["way"] == "float32" and curve["learned"][0] == pytest.approx(1)


def test_steps_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.eager(steps, torch.device("cpu"), rounds=3, seconds=0)
    assert order[-6:] == list("ababab") and all(len(t) == 3 for t in times.values())
    assert len(order) == 2 * (3 + 3)  # no more calls to find that one fills a sample of no length


def test_saved_bytes_leave_out_what_lives_anyway():
    from benchmarks.cases import linear, make
    from benchmarks.saved import saved_bytes

    made = make(linear(8, 6, 5, 2), torch.float32, torch.device("cpu"), torch.float32)
    frozen = WAYS["frozen"](made.layer, made.A, made.B)
    branch = WAYS["loralib"](made.layer, made.A, made.B)
    context = layers.context_of("float32")
    assert isinstance(branch, Way)
    assert saved_bytes(frozen, made, context) == 0
    assert saved_bytes(branch, made, context) == 8 * 2 * 4  # x·Aᵀ
