"""The fields of the group `method` that all methods share. A method adds its own in moco/methods/NAME_config.py."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moco.config.base import bounded, require

if TYPE_CHECKING:
    from moco.config.train import TrainConfig


@dataclass
class MethodConfig:
    """The method: its name, its temperature, and the fields that each method adds."""

    name: str = ""
    """The method; set by method=OPTION."""
    temperature: float = bounded(0.2, gt=0)
    """Temperature T of the loss. With a low T, the most similar negatives have the largest weights; with a high T, all
    negatives have similar weights."""
    temperature_schedule: str = bounded("constant", choices=("constant", "cosine", "learned"))
    """How T changes in a run: constant; cosine (T oscillates between temperature_low and temperature_high; Kukleva et
    al., 2023); or learned (T starts at `temperature`, is trained, and stays between temperature_low and
    temperature_high; Radford et al., 2021, section 2.5)."""
    temperature_low: float = bounded(0.1, gt=0)
    """Lowest T of temperature_schedule=cosine or learned."""
    temperature_high: float = bounded(1.0, gt=0)
    """Highest T of temperature_schedule=cosine or learned."""
    temperature_period: float = bounded(200.0, gt=0)
    """Epochs per oscillation of temperature_schedule=cosine."""

    # Properties of the method. A subclass overrides one with a field if users can set it, otherwise with a constant.
    has_momentum_encoder = False
    has_predictor = False
    can_learn_temperature = True
    momentum = 0.0  # m of the momentum encoder
    queue_size = 0  # K
    mask_own_keys = True  # exclude stale keys of a query's own image from its negatives
    teacher = ""  # file or timm/NAME of a trained network; `build` gets the network as its argument `teacher`
    labels = False  # train on the labels of the images
    compares_views = True  # the positive is another view of the image, encoded in the same step
    symmetric = False  # use each view as the query and as the key
    takes_small_views = False  # further views of another size can be queries
    is_local = False  # the loss and its gradient need nothing from other processes
    uses_places = False  # `encode_keys` gets the place of each view in its image

    @property
    def momentum_end(self) -> float | None:
        """Return the momentum at the end of a schedule; None if it is constant."""
        return None

    @property
    def keys_per_image(self) -> int:
        """Return the number of views of an image that serve as keys in one step."""
        return 2 if self.symmetric else 1

    def changing(self) -> list[str]:
        """Return the settings with which the forward pass changes from step to step, so no CUDA graph can repeat it."""
        kind = self.temperature_schedule
        return [f"method.temperature_schedule={kind}"] if kind == "cosine" else []

    def advice(self, config: "TrainConfig") -> list[str]:
        """Return a sentence for each setting that can run, but departs from the published method."""
        if self.has_predictor and config.model.predictor_layers == 0:
            return [f"model.predictor_layers=0: {self.name} has a predictor; set model.predictor_layers=2"]
        return []

    def build(self, config: "TrainConfig", encoder: Any, labels: Any) -> Any:
        """Return the method, a `moco.builder.Method`, that trains `encoder`, a new `moco.models.encoder.Encoder`.

        `labels` are the classes of the training images, a tensor (images,); None unless `self.labels`.
        """
        raise NotImplementedError

    def check(self, config: "TrainConfig") -> None:
        """Raise ConfigError for fields that contradict each other or the rest of the configuration."""
        kind, low, high = self.temperature_schedule, self.temperature_low, self.temperature_high
        require(
            kind != "learned" or self.can_learn_temperature,
            f"method.temperature_schedule=learned must be one of constant, cosine for {self.name}",
        )
        limits = f"method.temperature_low={low} and method.temperature_high={high}"
        require(low <= high, f"{limits} must be in ascending order")
        require(
            kind != "learned" or low <= self.temperature <= high,
            f"method.temperature={self.temperature} must lie between {limits}: learning starts there",
        )
        for name in ("temperature_low", "temperature_high", "temperature_period"):
            value, kinds = getattr(self, name), ["cosine", "learned"][: 1 + (name != "temperature_period")]
            error = f"method.{name}={value} has no effect with method.temperature_schedule={kind}"
            require(kind in kinds or value == getattr(MethodConfig, name), f"{error}: set {' or '.join(kinds)}")
        small = config.augment.small_views
        require(
            self.takes_small_views or small == 0,
            f"augment.small_views={small}: {self.name} takes no small views; set augment.small_views=0, or "
            "method=moco_v2 or moco_v3",
        )
        layers = config.model.predictor_layers
        require(
            self.has_predictor or layers == 0,
            f"model.predictor_layers={layers}: {self.name} has no predictor; set model.predictor_layers=0",
        )


def check_margin(margin: float, kind: str) -> None:
    """Raise ConfigError for a margin of kind "arc" that is not below pi, the largest angle between two vectors."""
    fix = "must be below pi, in radians; or set method.margin_kind=cosine"
    require(kind == "cosine" or margin < math.pi, f"method.margin={margin} {fix}")


def refuse_together(method: MethodConfig, *triples: tuple[str, str, str]) -> None:
    """Raise ConfigError if both fields of a triple (field, field, reason) differ from their defaults."""
    default = type(method)()
    for one, other, reason in triples:
        value, second = getattr(method, one), getattr(method, other)
        require(
            value == getattr(default, one) or second == getattr(default, other),
            f"method.{one}={value} excludes method.{other}={second}: {reason}; reset one of them",
        )
