"""Boxes clipped to their images; those that cannot be used are counted, then refused or left out."""

import warnings

import numpy as np

from moco.config import ConfigError, RunWarning

TOLERANCE = 1.0  # a box may reach this many pixels outside its image, because coordinates are rounded; it is clipped


class BoxCheck:
    """Clips the boxes of a data set to their images, and counts those without an area or outside of their image."""

    def __init__(self) -> None:
        self.total = self.empty = self.outside = 0
        self.first = ""  # description of the first box that cannot be used

    def clipped(
        self, where: str, box: tuple[float, float, float, float], size: tuple[int, int]
    ) -> tuple[float, ...] | None:
        """Return a box (left, top, right, bottom), clipped to its image (W, H); None if it cannot be used.

        It cannot be used if it has no area, or reaches more than `TOLERANCE` outside its image. `where` names the box.
        """
        self.total += 1
        left, top, right, bottom = box
        outside = max(-left, -top, right - size[0], bottom - size[1]) > TOLERANCE
        clipped = (max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom))
        # In float32, as boxes are stored: edges at 600 and at 600 + 1e-9 pixels are then equal.
        sides = np.subtract(clipped[2:], clipped[:2], dtype=np.float32)
        empty = not (right > left and bottom > top)
        if not outside and not empty and sides.min() > 0:
            return clipped
        beyond = outside and not empty
        self.outside, self.empty = self.outside + beyond, self.empty + (not beyond)
        problem = f"reaches outside its image of {size[0]} x {size[1]} pixels" if beyond else "has no area"
        self.first = self.first or f"{where} {problem}"
        return None

    def finish(self, where: str, drop: bool, hint: str = "") -> None:
        """Refuse the boxes that cannot be used, or with `drop` warn that they are left out.

        Args:
            where: begins the sentence.
            drop: the caller leaves them out.
            hint: ends the warning.

        Raises:
            ConfigError: if there are any, unless `drop`.
        """
        kinds = {"without an area": self.empty, "reaching outside their image": self.outside}
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        count = f"{self.empty + self.outside:,} of {self.total:,} boxes"
        if listed and drop:
            warnings.warn(f"{where}: boxes.bad_boxes=drop leaves out {count}: {listed}{hint}", RunWarning, stacklevel=3)
        elif listed:
            fix = "correct them, or leave such boxes out with boxes.bad_boxes=drop"
            raise ConfigError(f"{where}: {count} cannot be used ({listed}), the first: {self.first}: {fix}")
