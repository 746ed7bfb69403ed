"""The configurations of the commands: schemas, bounds and checks."""

from moco.config.base import (
    ComputeConfig,
    ConfigError,
    RunWarning,
    bounded,
    check_bounds,
    config_dir,
    expand_paths,
    require,
)
from moco.config.data import DataConfig
from moco.config.method import MethodConfig
from moco.config.train import (
    AugmentConfig,
    CheckpointConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunWarning",
    "TrainConfig",
    "bounded",
    "check",
    "check_bounds",
    "config_dir",
    "expand_paths",
    "require",
]
