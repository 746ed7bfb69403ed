"""The schemas of the commands' configurations."""

from moco.config.base import ConfigError, RunWarning, at_least, config_dir, one_of, require, require_finite
from moco.config.data import DataConfig, check_data_fields
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
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunWarning",
    "TrainConfig",
    "at_least",
    "check",
    "check_data_fields",
    "config_dir",
    "one_of",
    "require",
    "require_finite",
]
