"""Measures of contrastive representations, pure functions of tensors. `doctor` checks recorded measures of a run.

A measure is computed on the device of its input. The spectra, `tolerance` and `explain_temperature` make the host wait
for the device. The other measures do not, so a training loop can compute these every few steps.
"""

from moco.analysis.geometry import alignment, tolerance, uniformity
from moco.analysis.histogram import bin_edges, similarity_histogram
from moco.analysis.negatives import (
    Explained,
    Hardness,
    effective_negatives,
    explain_temperature,
    hardness,
    relative_penalty,
    top_share,
)
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

__all__ = ["alignment", "bin_edges", "similarity_histogram", "tolerance", "uniformity"]
__all__ += ["Explained", "Hardness", "effective_negatives", "explain_temperature", "hardness", "relative_penalty"]
__all__ += ["alpha_req", "covariance_spectrum", "feature_std", "power_law_exponent", "rank_me", "spread", "top_share"]
__all__ += ["EMPTY", "duplicate_share", "key_ages", "key_drift", "own_key_share", "same_label_share", "similar_share"]
