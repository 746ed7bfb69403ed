"""The configurations of the commands: schemas, bounds and checks."""

from moco.config.base import ComputeConfig as ComputeConfig
from moco.config.base import ConfigError as ConfigError
from moco.config.base import ResumableConfig as ResumableConfig
from moco.config.base import RunWarning as RunWarning
from moco.config.base import bounded as bounded
from moco.config.base import check_bounds as check_bounds
from moco.config.base import config_dir as config_dir
from moco.config.base import expand_paths as expand_paths
from moco.config.base import flatten as flatten
from moco.config.base import require as require
from moco.config.data import DataConfig as DataConfig
from moco.config.evaluate import EvaluateConfig as EvaluateConfig
from moco.config.method import MethodConfig as MethodConfig
from moco.config.train import AugmentConfig as AugmentConfig
from moco.config.train import CheckpointConfig as CheckpointConfig
from moco.config.train import ModelConfig as ModelConfig
from moco.config.train import OptimConfig as OptimConfig
from moco.config.train import TrainConfig as TrainConfig
from moco.config.train import check as check
