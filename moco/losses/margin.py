"""Margins on the positives: query and key must be closer than InfoNCE requires."""

import math
from typing import Literal

import torch
from torch import Tensor

Margin = Literal["arc", "cosine"]


def add_margin(cosine: Tensor, margin: float, kind: Margin) -> Tensor:
    """Return the similarities of positives lowered by a margin, before the division by the temperature.

    "arc" is ArcFace (Deng et al., 2019), Eq. 3: cos(theta + m), with m in radians. "cosine" is CosFace's large margin
    cosine loss (Wang et al., 2018): cos(theta) - m.

    Deviation: ArcFace's formula rises again beyond theta = pi - m. There this function returns cos(theta) + cos(m) - 1,
    which is continuous and falls with theta; public implementations are discontinuous there.

    Args:
        cosine: similarities of unit vectors, any shape.
        margin: m >= 0, below pi for "arc"; 0 changes nothing.
    """
    if kind not in ("arc", "cosine"):
        raise ValueError(f"margin_kind={kind!r} must be 'arc' or 'cosine'")
    if not 0 <= margin < (math.pi if kind == "arc" else math.inf):
        raise ValueError(f"margin={margin} must be 0 or more" + (", and below pi (radians)" if kind == "arc" else ""))
    if margin == 0:
        return cosine
    if kind == "cosine":
        return cosine - margin
    # The clamp keeps the gradient of sqrt finite where |cosine| is 1, or is slightly above 1 after rounding.
    sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
    lowered = cosine * math.cos(margin) - sine * math.sin(margin)  # cos(theta + m)
    return torch.where(cosine > -math.cos(margin), lowered, cosine + math.cos(margin) - 1)
