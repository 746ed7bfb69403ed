"""The methods by name. A new method has its schema in NAME_config.py, its algorithm in NAME.py and an entry here.

Importing this package does not import torch: a schema imports its algorithm only when its `build()` is called.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moco.config import MethodConfig
from moco.methods.densecl_config import DenseCLConfig
from moco.methods.distill_config import DistillConfig
from moco.methods.moco_config import MoCoConfig
from moco.methods.moco_v3_config import MoCoV3Config
from moco.methods.nnclr_config import NNCLRConfig
from moco.methods.ressl_config import ReSSLConfig
from moco.methods.simclr_config import SimCLRConfig
from moco.plugins import Registry

METHODS: Registry[type[MethodConfig]] = Registry(
    "method.name",
    {
        "densecl": DenseCLConfig,
        "distill": DistillConfig,
        "moco": MoCoConfig,
        "moco_v3": MoCoV3Config,
        "nnclr": NNCLRConfig,
        "ressl": ReSSLConfig,
        "simclr": SimCLRConfig,
    },
)


def read_method(values: Mapping[str, Any]) -> MethodConfig:
    """Return the group `method` of a saved configuration.

    Runs of version 0.1 saved the fields of all methods: fields that this method does not have are dropped. Fields that
    are newer than the run get their defaults.

    Raises:
        ConfigError: for an unknown method.
    """
    schema = METHODS.find(values.get("name", "moco"))
    known = {each.name for each in fields(schema)}
    return schema(**{field: value for field, value in values.items() if field in known})
