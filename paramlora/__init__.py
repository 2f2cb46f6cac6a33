"""LoRA for any `torch.nn.Module`, as a weight parametrization."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paramlora.errors import (
    AdapterError,
    ConfigError,
    FileError,
    ParamloraError,
    ParamloraWarning,
    TargetError,
)

if TYPE_CHECKING:
    from paramlora import checkpoint, files
    from paramlora.config import LoRAConfig, TargetConfig
    from paramlora.config.entry import Entry
    from paramlora.cuda.operands import kernels
    from paramlora.files.adapters import convert, load_adapter
    from paramlora.files.arithmetic import combine, difference, resize
    from paramlora.files.native import save_adapter
    from paramlora.files.served import tensors_for
    from paramlora.model.attach import attach, detach, disable_adapters, rounding, set_adapters
    from paramlora.model.experts import expert_linear
    from paramlora.model.input_grads import disable_input_grads, enable_input_grads
    from paramlora.model.merge import merge
    from paramlora.model.optim import parameter_groups, trainable_parameters
    from paramlora.model.route import route
    from paramlora.model.summary import Summary, summary
    from paramlora.model.targets import Target, targets
    from paramlora.model.values import (
        adapter_of,
        adapter_state_dict,
        attach_adapter,
        load_adapter_state_dict,
    )
    from paramlora.update.lowrank import LowRank
    from paramlora.update.rounding import KeptReport
    from paramlora.update.value import Adapter, Update

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "ConfigError",
    "Entry",
    "FileError",
    "KeptReport",
    "LoRAConfig",
    "LowRank",
    "ParamloraError",
    "ParamloraWarning",
    "Summary",
    "Target",
    "TargetConfig",
    "TargetError",
    "Update",
    "adapter_of",
    "adapter_state_dict",
    "attach",
    "attach_adapter",
    "checkpoint",
    "combine",
    "convert",
    "detach",
    "difference",
    "disable_adapters",
    "disable_input_grads",
    "enable_input_grads",
    "expert_linear",
    "files",
    "kernels",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "parameter_groups",
    "resize",
    "rounding",
    "route",
    "save_adapter",
    "set_adapters",
    "summary",
    "targets",
    "tensors_for",
    "trainable_parameters",
]

# Imported when they are first asked for: most processes read no files, and the command line must be
# there to answer for Ctrl-C before torch, which takes seconds, is imported.
_LATER = {
    "checkpoint": ["checkpoint"],
    "config": ["LoRAConfig", "TargetConfig"],
    "config.entry": ["Entry"],
    "cuda.operands": ["kernels"],
    "files": ["files"],
    "files.adapters": ["convert", "load_adapter"],
    "files.arithmetic": ["combine", "difference", "resize"],
    "files.native": ["save_adapter"],
    "files.served": ["tensors_for"],
    "model.attach": ["attach", "detach", "disable_adapters", "rounding", "set_adapters"],
    "model.experts": ["expert_linear"],
    "model.input_grads": ["disable_input_grads", "enable_input_grads"],
    "model.merge": ["merge"],
    "model.optim": ["parameter_groups", "trainable_parameters"],
    "model.route": ["route"],
    "model.summary": ["Summary", "summary"],
    "model.targets": ["Target", "targets"],
    "model.values": [
        "adapter_of",
        "adapter_state_dict",
        "attach_adapter",
        "load_adapter_state_dict",
    ],
    "update.lowrank": ["LowRank"],
    "update.rounding": ["KeptReport"],
    "update.value": ["Adapter", "Update"],
}


if not TYPE_CHECKING:  # else no name would be unknown to a type checker

    def __getattr__(name: str) -> Any:
        holder = next((module for module, names in _LATER.items() if name in names), None)
        if holder is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{holder}")
        # kept, so that Python does not ask here again; a module, or what it holds
        globals()[name] = found = module if name == holder else getattr(module, name)
        return found


def __dir__() -> list[str]:
    return sorted(__all__)
