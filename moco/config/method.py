"""The fields of the group `method` that all methods share. A method adds its own in moco/methods/NAME_config.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moco.config.base import one_of, require

if TYPE_CHECKING:
    from moco.config.train import TrainConfig


@dataclass
class MethodConfig:
    """The method's name and its temperature."""

    name: str = ""
    """the method; set by method=OPTION"""
    temperature: float = 0.2
    """T; a low one weights the nearest negatives most, a high one weights all negatives similarly"""
    temperature_schedule: str = "constant"
    """constant, cosine (from temperature_high to temperature_low and back; Kukleva et al., 2023), or learned (starts at
    `temperature`, stays within the bounds; Radford et al., 2021, section 2.5)"""
    temperature_low: float = 0.1
    """lowest T of cosine and learned"""
    temperature_high: float = 1.0
    """highest T of cosine and learned"""
    temperature_period: float = 200.0
    """epochs per oscillation of cosine"""

    # What the rest of the code asks about a method. None of these is a field; a method overrides what differs.
    has_momentum_encoder = False
    has_predictor = False
    can_learn_temperature = True

    @property
    def momentum(self) -> float:
        """Return m of the momentum encoder; 0 without one."""
        return 0.0

    @property
    def momentum_end(self) -> float | None:
        """Return the momentum that a schedule ends with; None if it is constant."""
        return None

    @property
    def queue_size(self) -> int:
        """Return K; 0 without a queue."""
        return 0

    @property
    def mask_own_keys(self) -> bool:
        """Return whether no query is compared with stale keys of its own image."""
        return True

    @property
    def keys_per_image(self) -> int:
        """Return the number of views of an image that serve as keys in one step."""
        return 1

    @property
    def labels(self) -> bool:
        """Return whether the method trains on the labels of the images."""
        return False

    def build(self, config: "TrainConfig", encoder: Any, labels: Any) -> Any:
        """Return the method, a `moco.training.step.Method`.

        Args:
            config: the configuration of the run.
            encoder: the new encoder, an `nn.Module`.
            labels: the class of each training image, a tensor (samples,); None unless `self.labels`.
        """
        raise NotImplementedError

    def check(self, config: "TrainConfig") -> None:
        """Refuse invalid values and contradictions. A method extends this check.

        Args:
            config: the configuration of the run, for what depends on the batch, the views or the model.

        Raises:
            ConfigError: with the field, its value and the fix.
        """
        kind, low, high = self.temperature_schedule, self.temperature_low, self.temperature_high
        one_of("method.temperature_schedule", kind, ("constant", "cosine", *["learned"] * self.can_learn_temperature))
        require(self.temperature > 0, f"method.temperature={self.temperature} must be above 0")
        bounds = f"method.temperature_low={low} and method.temperature_high={high}"
        require(0 < low <= high, f"{bounds} must be above 0 and in this order")
        require(
            kind != "learned" or low <= self.temperature <= high,
            f"method.temperature={self.temperature} must lie within {bounds}: learning starts there",
        )
        require(self.temperature_period > 0, f"method.temperature_period={self.temperature_period} must be above 0")
        for name in ("temperature_low", "temperature_high", "temperature_period"):
            value = getattr(self, name)
            require(
                kind != "constant" or value == getattr(MethodConfig, name),
                f"method.{name}={value} has no effect with method.temperature_schedule=constant: set cosine or learned",
            )
        for name in ("momentum", "momentum_end"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"method.{name}={value} must lie in 0 ... 1")
        layers = config.model.predictor_layers
        require(
            self.has_predictor or layers == 0,
            f"model.predictor_layers={layers}: {self.name} has no predictor; set model.predictor_layers=0",
        )


def refuse_together(method: MethodConfig, *pairs: tuple[str, str, str]) -> None:
    """Refuse two fields that both differ from their defaults.

    Args:
        method: the configuration.
        pairs: the names of two fields, and the reason why they exclude each other.

    Raises:
        ConfigError: with both fields, their values and the reason.
    """
    off = type(method)()
    for one, other, why in pairs:
        value, second = getattr(method, one), getattr(method, other)
        require(
            value == getattr(off, one) or second == getattr(off, other),
            f"method.{one}={value} excludes method.{other}={second}: {why}; reset one of them",
        )


def refuse_other_view_counts(method: MethodConfig, views: int) -> None:
    """Raise ConfigError unless each image has two views."""
    require(views == 2, f"augment.views={views} must be 2 for {method.name}")
