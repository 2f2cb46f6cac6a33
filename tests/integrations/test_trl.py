"""A sweep of TRL's trainers: they take an attached model as it is: they train it, resume it, keep
no second copy."""

import importlib.util
from pathlib import Path

import pytest
import torch

import paramlora

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers themselves

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {"re:.*_proj": {"r": 4, "alpha": 8, "init": "kaiming"}}
SUMS = [f"{i} plus {i} is " for i in range(32)]
TEXTS = [{"prompt": text, "completion": str(2 * i)} for i, text in enumerate(SUMS)]
PAIRS = [{"prompt": text, "chosen": str(2 * i), "rejected": f"a{i}"} for i, text in enumerate(SUMS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    spec = importlib.util.spec_from_file_location("small_models", EXAMPLES / "small_models.py")
    small_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_models)
    small_models.language_model(folder)
    return folder


def attached(base):
    torch.manual_seed(1)
    return paramlora.attach(AutoModelForCausalLM.from_pretrained(base), CONFIG)


def options(folder, steps, **more):
    return dict(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **more,
    )


def sft(base, folder, steps):
    return trl.SFTTrainer(
        attached(base),
        args=trl.SFTConfig(**options(folder, steps)),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def dpo(base, folder, steps, model=None):
    model = attached(base) if model is None else model
    with paramlora.disable_adapters(model):  # the reference is the base
        return trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**options(folder, steps, precompute_ref_log_probs=True)),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(base),
        )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", (sft, dpo))
def test_it_trains_the_adapter_alone_and_resumes_to_the_last_bit(make, base, tmp_path):
    whole = make(base, tmp_path / "whole", 4)
    whole.train()
    make(base, tmp_path / "stopped", 2).train()
    resumed = make(base, tmp_path / "stopped", 4)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert [k for k in want if not torch.equal(want[k], got[k])] == []
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    left = paramlora.detach(whole.model).state_dict()
    assert all(torch.equal(left[key], value) for key, value in plain.items())


def test_preferences_are_measured_against_the_base_without_a_second_copy(base, tmp_path):
    model = attached(base)
    for parameter in paramlora.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)  # an adapter that was trained already
    run = dpo(base, tmp_path, 1, model)
    assert run.ref_model is None and run.model is model
    plain = AutoModelForCausalLM.from_pretrained(base).double()
    row, moved = run.train_dataset[3], 0.0
    for kind in ("chosen", "rejected"):
        want = log_probability(plain, row["prompt_ids"], row[f"{kind}_ids"])
        assert row[f"ref_{kind}_logps"] == pytest.approx(want, rel=1e-5)
        moved += abs(log_probability(model, row["prompt_ids"], row[f"{kind}_ids"]) - want)
    assert moved > 0.1  # so that the adapter's own would have been seen


@torch.no_grad()
def log_probability(model, prompt, completion):
    """Of a completion after its prompt, summed over tokens."""
    ids = torch.tensor([prompt + completion])
    told = model.eval()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return told.gather(1, torch.tensor(completion)[:, None]).sum().item()
