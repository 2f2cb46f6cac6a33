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
    "attach",
    "detach",
    "disable_adapters",
    "merge",
    "set_adapters",
    "targets",
    "trainable_parameters",
]
