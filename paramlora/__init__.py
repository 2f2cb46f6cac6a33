"""LoRA for any `torch.nn.Module`, as a weight parametrization."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paramlora.config import LoRAConfig, TargetConfig
from paramlora.config.entry import Entry
from paramlora.cuda.operands import kernels
from paramlora.errors import (
    AdapterError,
    ConfigError,
    FileError,
    ParamloraError,
    ParamloraWarning,
    TargetError,
)
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

if TYPE_CHECKING:
    from paramlora import checkpoint, files
    from paramlora.files.adapters import convert, load_adapter
    from paramlora.files.arithmetic import combine, difference, resize
    from paramlora.files.native import save_adapter
    from paramlora.files.served import tensors_for

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

# files and their formats are half of the package, and most processes that import it read none
_LATER = {
    "checkpoint": "paramlora.checkpoint",
    "combine": "paramlora.files.arithmetic",
    "convert": "paramlora.files.adapters",
    "difference": "paramlora.files.arithmetic",
    "files": "paramlora.files",
    "resize": "paramlora.files.arithmetic",
    "load_adapter": "paramlora.files.adapters",
    "save_adapter": "paramlora.files.native",
    "tensors_for": "paramlora.files.served",
}


if not TYPE_CHECKING:  # else no name would be unknown to a type checker

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(_LATER[name])
        globals()[name] = found = module if _is_module(name) else getattr(module, name)
        return found


def _is_module(name: str) -> bool:
    return _LATER[name] == f"{__name__}.{name}"


def __dir__() -> list[str]:
    return sorted(__all__)
