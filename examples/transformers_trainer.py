"""transformers' Trainer as it is: it trains an attached model, saves it, and resumes.

python examples/transformers_trainer.py
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import paramlora

CONFIG = {"c_attn": {"r": 4, "alpha": 8}, "attn.c_proj": {"r": 4, "alpha": 8}}


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


def sentences() -> list[dict[str, torch.Tensor]]:
    """Counting upwards from any number, modulo 32."""
    rows = [(torch.arange(12) + start) % 32 for start in range(32)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(1)
    model = paramlora.attach(base(), CONFIG)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=20,
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=sentences())


def losses(run: Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


def main(folder: Path = Path("trainer")) -> dict[str, float]:
    whole = trainer(folder / "whole", 40)
    whole.train()
    trainer(folder / "stopped", 20).train()
    resumed = trainer(folder / "stopped", 40)
    resumed.train(resume_from_checkpoint=True)
    first, last = losses(whole)
    attached = evaluated(resumed.model)
    resumed.save_model(str(folder / "saved"))  # the base, and beside it the adapter as PEFT's
    paramlora.merge(resumed.model).save_pretrained(folder / "merged")
    return {
        "first": first,
        "last": last,
        "resumed": losses(resumed)[-1],
        "attached": attached,
        "loaded": evaluated(paramlora.load_adapter(base(), folder / "saved")),
        "merged": evaluated(GPT2LMHeadModel.from_pretrained(folder / "merged")),
    }


@torch.no_grad()
def evaluated(model: GPT2LMHeadModel) -> float:
    rows = torch.stack([row["input_ids"] for row in sentences()])
    return model.eval()(input_ids=rows, labels=rows).loss.item()


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
