"""transformers' Trainer: its checkpoints hold the adapter and the optimizer's state, not the base.

python examples/transformers_trainer.py
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import paramlora

CONFIG = {"c_attn": {"r": 4, "alpha": 8}, "attn.c_proj": {"r": 4, "alpha": 8}}


class AdapterTrainer(Trainer):
    """Saves and restores `adapter.safetensors` where a Trainer has the whole model."""

    def save_model(self, output_dir=None, _internal_call=False):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        paramlora.save_adapter(self.model, folder / "adapter.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state = load_file(os.path.join(resume_from_checkpoint, "adapter.safetensors"))
        paramlora.load_adapter_state_dict(self.model, state)


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


def sentences() -> list[dict[str, torch.Tensor]]:
    """Counting upwards from any number, modulo 32."""
    rows = [(torch.arange(12) + start) % 32 for start in range(32)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, steps: int) -> AdapterTrainer:
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
    return AdapterTrainer(model=model, args=arguments, train_dataset=sentences())


def losses(run: AdapterTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


def main(folder: Path = Path("trainer")) -> dict[str, float]:
    whole = trainer(folder / "whole", 40)
    whole.train()
    trainer(folder / "stopped", 20).train()
    resumed = trainer(folder / "stopped", 40)
    resumed.train(resume_from_checkpoint=True)
    first, last = losses(whole)
    attached = evaluated(resumed.model)
    paramlora.merge(resumed.model).save_pretrained(folder / "merged")
    return {
        "first": first,
        "last": last,
        "resumed": losses(resumed)[-1],
        "attached": attached,
        "merged": evaluated(GPT2LMHeadModel.from_pretrained(folder / "merged")),
    }


@torch.no_grad()
def evaluated(model: GPT2LMHeadModel) -> float:
    rows = torch.stack([row["input_ids"] for row in sentences()])
    return model.eval()(input_ids=rows, labels=rows).loss.item()


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
