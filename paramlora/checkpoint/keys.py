"""The keys of an attached model's state dict: the one place that spells them."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paramlora.update.kinds import tensor_names
from paramlora.update.names import BRANCHES

# names hold any character; where a line break ended one, each of its parts would be tried in turn
_HARD = re.compile(
    r"(?P<module>(?:.+\.)?)parametrizations\.(?P<tensor>[^.]+)\.(?P<part>.+)", re.DOTALL
)
_SOFT = re.compile(rf"(?P<module>(?:.+\.)?){BRANCHES}\.(?P<part>.+)", re.DOTALL)
_INDEX = re.compile("0|[1-9][0-9]{0,8}")  # as torch spells them; any other is part of a name


@dataclass(frozen=True)
class Key:
    """A key of an attached model's state dict.

    Args:
        weight: the tensor that it belongs to, by the name that it has in the base.
        part: empty for a tensor that stands under its own name, ``original`` (or ``original0``,
            ...) for one under a parametrization, else the name inside one, such as ``lora_A``.
        index: the parametrization's or branch's place in its list.
        hard: whether it is of a parametrization, not of a soft branch.
    """

    weight: str
    part: str = ""
    index: int = -1
    hard: bool = True

    @classmethod
    def parse(cls, key: str) -> "Key":
        """Read a key; any other key is a tensor under its own name."""
        for pattern, hard in ((_HARD, True), (_SOFT, False)):
            if found := pattern.fullmatch(key):
                weight = found["module"] + (found["tensor"] if hard else "weight")
                index, dot, part = found["part"].partition(".")
                # parametrizations.weight.0.lora_A, and of a branch <list>.0.lora_A
                if dot and _INDEX.fullmatch(index):
                    return cls(weight, part, int(index), hard)
                # torch's name of what is parametrized; original0 and original1 of two tensors
                if hard and not dot and index.startswith("original"):
                    return cls(weight, index)
        return cls(key)

    def __str__(self) -> str:
        module, dot, tensor = self.weight.rpartition(".")
        if not self.part:
            return self.weight
        number = f"{self.index}." if self.index >= 0 else ""
        middle = f"parametrizations.{tensor}" if self.hard else BRANCHES
        return f"{module}{dot}{middle}.{number}{self.part}"

    @property
    def of_update(self) -> bool:
        """Whether it is a tensor of an update of ours."""
        return self.index >= 0 and self.part in tensor_names()

    @property
    def place(self) -> tuple[str, bool, int]:
        """The parametrization or branch whose tensor it is; of index -1 none."""
        return self.weight, self.hard, self.index

    @property
    def path(self) -> str:
        """The adapter's path for an update of this tensor."""
        return (
            self.weight.removesuffix("weight").removesuffix(".") if self._named() else self.weight
        )

    def _named(self) -> bool:
        return self.weight == "weight" or self.weight.endswith(".weight")


def weights_at(path: str) -> tuple[str, str]:
    """The two tensors that a path of an adapter can mean: a module's weight, or a parameter."""
    return (f"{path}.weight" if path else "weight"), path


def without_updates(modules: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """A state dict's ``_metadata``, by module, without the modules that `merge` erases."""
    structure = {"parametrizations", BRANCHES}
    return OrderedDict((k, v) for k, v in modules.items() if not structure & set(k.split(".")))
