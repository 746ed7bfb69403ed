"""Contrastive losses: pure functions of tensors. The caller gathers tensors across processes.

With a queue: `info_nce` (MoCo), `multi_positive_info_nce` (SupMoCo), and `contrast`, which adds the switches; each
switch has its own file. Within a batch: `in_batch_info_nce` (MoCo v3), `nt_xent` (SimCLR) and `sup_con` (SupCon).
"""

from moco.losses.batch import in_batch_info_nce, nt_xent, sup_con
from moco.losses.contrast import Switches, contrast
from moco.losses.debias import debiased_cross_entropy
from moco.losses.false_negatives import find_false_negatives
from moco.losses.margin import Margin, add_margin
from moco.losses.mixing import mix_hard_negatives
from moco.losses.queue import info_nce, info_nce_logits, multi_positive_info_nce
from moco.losses.similarity import Temperature
from moco.losses.streamed import Streamed, info_nce_streamed, logit_measures
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
    "temperature_at",
]
