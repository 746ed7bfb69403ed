"""Contrastive losses: pure functions of tensors. Whoever calls them gathers across processes first.

`info_nce` is MoCo's; `contrast` is the same with switches, each in a file of its own.
"""

from moco.losses.batch import in_batch_info_nce, nt_xent, sup_con
from moco.losses.composed import contrast
from moco.losses.debias import debiased_cross_entropy
from moco.losses.false_negatives import find_false_negatives
from moco.losses.margin import Margin, add_margin
from moco.losses.mixing import mix_hard_negatives
from moco.losses.queue import info_nce, info_nce_logits, multi_positive_info_nce
from moco.losses.similarity import Temperature
from moco.losses.streamed import Streamed, info_nce_streamed, logit_measures
from moco.losses.switches import Switches, switched_contrast
from moco.losses.temperature import LearnedTemperature, split_temperature, temperature_at

__all__ = [
    "LearnedTemperature",
    "Margin",
    "Streamed",
    "Switches",
    "Temperature",
    "add_margin",
    "contrast",
    "debiased_cross_entropy",
    "find_false_negatives",
    "in_batch_info_nce",
    "info_nce",
    "info_nce_logits",
    "info_nce_streamed",
    "logit_measures",
    "mix_hard_negatives",
    "multi_positive_info_nce",
    "nt_xent",
    "split_temperature",
    "sup_con",
    "switched_contrast",
    "temperature_at",
]
