"""LoRA for any `torch.nn.Module`, as a weight parametrization."""

from paramlora.attach import (
    attach,
    detach,
    disable_adapters,
    set_adapters,
    trainable_parameters,
)
from paramlora.config import LoRAConfig, TargetConfig
from paramlora.errors import (
    AdapterError,
    ConfigError,
    FileError,
    ParamloraError,
    ParamloraWarning,
    TargetError,
)
from paramlora.lowrank import LowRank
from paramlora.merge import merge
from paramlora.state import adapter_state_dict, load_adapter_state_dict
from paramlora.targets import Target, targets

__all__ = [
    "AdapterError",
    "ConfigError",
    "FileError",
    "LoRAConfig",
    "LowRank",
    "ParamloraError",
    "ParamloraWarning",
    "Target",
    "TargetConfig",
    "TargetError",
    "adapter_state_dict",
    "attach",
    "detach",
    "disable_adapters",
    "load_adapter_state_dict",
    "merge",
    "set_adapters",
    "targets",
    "trainable_parameters",
]
