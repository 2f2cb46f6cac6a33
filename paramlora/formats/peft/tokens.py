"""The rows that PEFT trains of an embedding: its trainable tokens, read and written."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paramlora.errors import FileError, spelled, with_article
from paramlora.formats.content import (
    Content,
)
from paramlora.formats.peft.configuration import ends_in, stem
from paramlora.update.value import Adapter, KindUpdate

TOKENS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta", re.DOTALL)


def tokens_of(content: Content, config: Mapping[str, Any]) -> dict[str, KindUpdate]:
    """The rows that PEFT trained (its trainable tokens), by the path of their layer."""
    found: dict[str, KindUpdate] = {}
    for key, rows in content.state.items():
        match = TOKENS.fullmatch(stem(key))
        if match is not None:
            path = match["path"]
            ids = _token_ids(path, config, content.source)
            if rows.dim() < 2 or len(ids) != len(rows):
                raise FileError(
                    f"{content.source}: {path}: {list(rows.shape)} for {len(ids)} trained tokens. "
                    "Save it again."
                )
            made = _rows(ids, rows)
            same = (one for one in found.values() if _is_same(one, made))
            found[path] = next(same, made)  # of tied layers both are in the file
    return found


def _is_same(one: KindUpdate, other: KindUpdate) -> bool:
    return one.options == other.options and torch.equal(
        one.held["lora_rows"], other.held["lora_rows"]
    )


def _rows(ids: list[int], rows: Tensor) -> KindUpdate:
    """Rows in ascending order; of a number that stands twice PEFT's own last one counts."""
    at = {number: place for place, number in enumerate(ids)}
    order = sorted(at)
    held = {"lora_rows": rows[[at[n] for n in order]], "lora_ids": torch.tensor(order)}
    return KindUpdate("rows", held, options=(("rows", tuple(order)),))


def _token_ids(path: str, config: Mapping[str, Any], source: str) -> list[int]:
    """The numbers that the configuration tells of a layer."""
    # beside LoRA by layer or as one list; in a folder of tokens alone token_indices
    told = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(told, dict):
        told = next((ids for name, ids in told.items() if ends_in(path, {name})), [])
    sound = isinstance(told, list) and all(type(n) is int and 0 <= n < 2**31 for n in told)
    if not sound or not told:
        raise FileError(
            f"{source}: {path}: trained tokens, and the configuration tells no numbers of them: "
            f"{spelled(told)}. Is adapter_config.json whole?"
        )
    return told


def without_rows(adapter: Adapter) -> tuple[Adapter, dict[str, KindUpdate]]:
    """An adapter without the rows that it trains, and those; of tied layers the first one's."""
    rows, seen = {}, set()
    for path, value in adapter.others.items():
        if value.method == "rows" and id(value) not in seen:
            seen.add(id(value))
            _check_layer(path, value)
            rows[path] = value
    rest = {p: value for p, value in adapter.others.items() if value.method != "rows"}
    return replace(adapter, others=rest), rows


def _check_layer(path: str, value: KindUpdate) -> None:
    """Refuse rows of what peft's ``TrainableTokensLayer`` does not know (its layer.py)."""
    turned = value.kind == "linear" and value.layout == "transposed"
    kind = "transformers Conv1D" if turned else value.kind
    if kind not in (None, "embedding", "linear"):
        raise FileError(
            f"{path}: rows of {with_article(kind)}, which PEFT trains of an embedding or a Linear "
            "alone. Keep the native format."
        )


def numbers_of(value: KindUpdate) -> list[int]:
    numbers: list[int] = value.held["lora_ids"].tolist()
    return numbers


def tokens_alone(tokens: Mapping[str, KindUpdate], prefix: str) -> Content:
    """A file of trained tokens only, which PEFT tells by another type of its own."""
    told = {tuple(numbers_of(value)) for value in tokens.values()}
    if len(told) > 1:
        raise FileError(
            f"{', '.join(tokens)}: rows of different numbers, and without low-rank updates PEFT "
            "holds one list of them. Save an adapter for each."
        )
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": list(told.pop()),
        "target_modules": sorted(tokens),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }
    state = {
        f"{prefix}{path}.trainable_tokens_delta": value.held["lora_rows"].contiguous()
        for path, value in tokens.items()
    }
    return Content(state, {"format": "pt"}, config)
