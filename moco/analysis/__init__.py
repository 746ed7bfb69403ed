"""Measures of contrastive representations as pure functions of tensors, and the training doctor over their records.

Measures stay on the device of what they measure. Those of spectra, `tolerance` and `explain_temperature` make the host
wait for it; the others do not, so a training loop may take them every few steps.
"""

from moco.analysis.doctor import ALARMS, diagnose
from moco.analysis.explain import THREE, Explained, explain_temperature
from moco.analysis.geometry import UniformityTolerance, alignment, tolerance, uniformity, uniformity_tolerance
from moco.analysis.histogram import bin_edges, similarity_histogram
from moco.analysis.negatives import (
    Hardness,
    effective_negatives,
    gradient_weights,
    hardness,
    relative_penalty,
    top_share,
)
from moco.analysis.series import Alarm, Facts, Series
from moco.analysis.spectrum import alpha_req, covariance_spectrum, feature_std, power_law_exponent, rank_me, spread
from moco.analysis.staleness import (
    EMPTY,
    duplicate_share,
    key_ages,
    key_drift,
    own_key_share,
    same_label_share,
    similar_share,
)

__all__ = [
    "ALARMS",
    "EMPTY",
    "THREE",
    "Alarm",
    "Explained",
    "Facts",
    "Hardness",
    "Series",
    "UniformityTolerance",
    "alignment",
    "alpha_req",
    "bin_edges",
    "covariance_spectrum",
    "diagnose",
    "duplicate_share",
    "effective_negatives",
    "explain_temperature",
    "feature_std",
    "gradient_weights",
    "hardness",
    "key_ages",
    "key_drift",
    "own_key_share",
    "power_law_exponent",
    "rank_me",
    "relative_penalty",
    "same_label_share",
    "similar_share",
    "similarity_histogram",
    "spread",
    "tolerance",
    "top_share",
    "uniformity",
    "uniformity_tolerance",
]
