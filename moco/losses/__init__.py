"""Contrastive losses: pure functions of tensors. The caller gathers tensors across processes.

With a queue: `info_nce` (MoCo), `multi_positive_info_nce` (SupMoCo), `decoupled_info_nce` (DCL),
`relational_cross_entropy` (ReSSL), and `contrast`, which is InfoNCE with optional changes (`Switches`). Within a batch:
`in_batch_info_nce` (MoCo v3), `nt_xent` (SimCLR), `sup_con` (SupCon) and `multi_positive_nt_xent`.
`cross_entropy_over_positives` computes a loss from logits with any number of positives.
"""

from moco.losses.batch import in_batch_info_nce, multi_positive_nt_xent, nt_xent, sup_con
from moco.losses.contrast import Switches, contrast
from moco.losses.debias import debiased_cross_entropy
from moco.losses.false_negatives import find_false_negatives
from moco.losses.margin import Margin, add_margin
from moco.losses.mixing import mix_hard_negatives
from moco.losses.positives import PositivesMean, cross_entropy_over_positives
from moco.losses.queue import decoupled_info_nce, info_nce, info_nce_logits, multi_positive_info_nce
from moco.losses.relation import relational_cross_entropy
from moco.losses.similarity import Temperature
from moco.losses.streamed import info_nce_streamed, logit_measures
from moco.losses.temperature import LearnedTemperature, split_temperature, temperature_at

__all__ = [
    "LearnedTemperature",
    "Margin",
    "PositivesMean",
    "Switches",
    "Temperature",
    "add_margin",
    "contrast",
    "cross_entropy_over_positives",
    "debiased_cross_entropy",
    "decoupled_info_nce",
    "find_false_negatives",
    "in_batch_info_nce",
    "info_nce",
    "info_nce_logits",
    "info_nce_streamed",
    "logit_measures",
    "mix_hard_negatives",
    "multi_positive_info_nce",
    "multi_positive_nt_xent",
    "nt_xent",
    "relational_cross_entropy",
    "split_temperature",
    "sup_con",
    "temperature_at",
]
