"""What the examples on real weights share: LoRA, and full fine-tuning of the same beside it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import nn

import paramlora

ALONE = """
import json, sys
sys.modules["paramlora"] = None  # so that importing it fails
import {name} as task
print(json.dumps(task.measure(task.base({file!r}))))
"""


def without_paramlora(task: ModuleType, file: Path) -> dict[str, float]:
    """Measure the plain model with the weights of `file`, where paramlora cannot be imported."""
    script = Path(task.__file__).resolve()
    command = [sys.executable, "-c", ALONE.format(name=script.stem, file=str(file.resolve()))]
    done = subprocess.run(command, cwd=script.parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(call: Callable[[], None]) -> float:
    """Processor time, which other programs on the machine disturb little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def tuned(task: ModuleType, folder: Path, steps: int) -> tuple[nn.Module, dict[str, dict]]:
    """The attached model after training, and the rows of the table that come from it."""
    torch.manual_seed(0)
    model = paramlora.attach(task.base(), task.CONFIG)
    groups = paramlora.parameter_groups(model, lr=task.RATE)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    taken = seconds_of(lambda: task.train(model, optimizer, steps))
    count = sum(p.numel() for p in paramlora.trainable_parameters(model))
    file = folder / "adapter.safetensors"
    paramlora.save_adapter(model, file)
    row = {"parameters": count, "bytes": file.stat().st_size, "seconds": taken}
    rows = {"LoRA": row | task.measure(model)}

    paramlora.set_adapters(model, {"default": 0.0})
    rows["LoRA at strength 0"] = task.measure(model)
    paramlora.set_adapters(model, {"default": 1.0})
    rows["LoRA from its file"] = task.measure(paramlora.load_adapter(task.base(), file))
    return model, rows


def merged(task: ModuleType, model: nn.Module, file: Path) -> dict[str, float]:
    """Fold the update in, keep the plain model, and measure that without paramlora."""
    paramlora.merge(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return {"bytes": file.stat().st_size} | without_paramlora(task, file)


def fully_tuned(task: ModuleType, file: Path, steps: int) -> dict[str, float]:
    """The same batches, every parameter of the model trained, at a rate of its own."""
    model = task.base()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.FULL_RATE, weight_decay=0)
    taken = seconds_of(lambda: task.train(model, optimizer, steps))
    count = sum(p.numel() for p in model.parameters())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    row = {"parameters": count, "bytes": file.stat().st_size, "seconds": taken}
    return row | task.measure(model)


def compare(task: ModuleType, folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """Every row of the table; `folder` then holds the adapter and both whole models."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = {"base": task.measure(task.base())}
    model, more = tuned(task, folder, steps)
    rows |= more
    rows["LoRA merged, without paramlora"] = merged(task, model, folder / "merged.safetensors")
    rows["full fine-tuning"] = fully_tuned(task, folder / "full.safetensors", steps)
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print the rows as a Markdown table; a metric is a share, so it is shown in percent."""
    columns = list(rows["LoRA"])
    shape = {"parameters": "{:,}", "bytes": "{:,}", "seconds": "{:.0f}"}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        cells = [shape.get(c, "{:.1%}").format(row[c]) if c in row else "" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
