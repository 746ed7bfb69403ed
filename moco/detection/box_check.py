"""Clip boxes to their images; count the boxes that cannot be used, and refuse them or leave them out."""

import warnings

import numpy as np

from moco.config import ConfigError, RunWarning

# A box that reaches at most this many pixels outside its image is clipped, because coordinates are rounded.
TOLERANCE = 1.0


class BoxCheck:
    """Clips the boxes of a data set to their images, and counts the boxes that cannot be used."""

    def __init__(self) -> None:
        self.total = 0  # boxes
        self.outside = 0  # boxes that have an area, and reach more than `TOLERANCE` outside their image
        self.empty = 0  # all other unusable boxes: without an area, before or after clipping
        self.first = ""  # description of the first box that cannot be used

    def clipped(
        self, where: str, box: tuple[float, float, float, float], size: tuple[int, int]
    ) -> tuple[float, ...] | None:
        """Return a box (left, top, right, bottom), clipped to its image (W, H); None if it cannot be used.

        A box cannot be used if it has no area, before or after clipping, or reaches more than `TOLERANCE` outside its
        image. `where` is the name of the box in messages.
        """
        self.total += 1
        left, top, right, bottom = box
        outside = max(-left, -top, right - size[0], bottom - size[1]) > TOLERANCE
        clipped = (max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom))
        # In float32, as boxes are stored: edges at 600 and at 600 + 1e-9 pixels are then equal.
        sides = np.subtract(clipped[2:], clipped[:2], dtype=np.float32)
        if not (right > left and bottom > top) or (not outside and sides.min() <= 0):
            self.empty += 1
            problem = "has no area"
        elif outside:
            self.outside += 1
            problem = f"reaches outside its image of {size[0]} x {size[1]} pixels"
        else:
            return clipped
        self.first = self.first or f"{where} {problem}"
        return None

    def finish(self, where: str, drop: bool, hint: str = "") -> None:
        """Refuse the boxes that cannot be used, or with `drop` warn that they are left out.

        Args:
            where: the beginning of the message: where the boxes come from.
            drop: the caller leaves out the boxes that cannot be used.
            hint: the end of the warning.

        Raises:
            ConfigError: if a box cannot be used, unless `drop`.
        """
        kinds = {"without an area": self.empty, "reaching outside their image": self.outside}
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        count = f"{self.empty + self.outside:,} of {self.total:,} boxes"
        if listed and drop:
            warnings.warn(f"{where}: boxes.bad_boxes=drop leaves out {count}: {listed}{hint}", RunWarning, stacklevel=3)
        elif listed:
            fix = "correct them, or leave such boxes out with boxes.bad_boxes=drop"
            raise ConfigError(f"{where}: {count} cannot be used ({listed}), the first: {self.first}: {fix}")
