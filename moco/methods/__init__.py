"""The methods by the name that a configuration gives them (`method.name`); a new one is added here.

What a method is says `moco.training.step.Method`.
"""

from collections.abc import Callable

from moco.builder import MoCo
from moco.methods.moco_v3 import MoCoV3
from moco.methods.simclr import SimCLR

AnyMethod = MoCo | MoCoV3 | SimCLR

METHODS: dict[str, Callable[..., AnyMethod]] = {
    "moco": MoCo,  # v1, v2 and v2+; with labels SupMoCo
    "moco_v3": MoCoV3,
    "simclr": SimCLR,  # with labels SupCon; candidates="other_view" is the plainest contrast in a batch
}
