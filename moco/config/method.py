"""The schema of the group `method`: the queue, the momentum encoder and the loss with its switches; and its checks."""

import math
from dataclasses import dataclass

from moco.config.base import at_least, one_of, require

NAMES = ("moco", "moco_v3", "simclr")  # the keys of moco.methods.METHODS
NO_QUEUE = ("moco_v3", "simclr")  # methods whose negatives are the batch


@dataclass
class MethodConfig:
    """The queue, the momentum encoder and the loss. The switches' defaults change nothing, to the bit."""

    name: str = "moco"
    """moco (v1, v2, v2+), moco_v3, or simclr (neither queue nor momentum encoder)"""
    queue_size: int = 65536
    """K; 0 where the method has no queue"""
    queue_start: str = "random"
    """random (official: random keys count as negatives) or empty (only real keys do)"""
    mask_own_keys: bool = True
    """a query's own stale keys are no negatives of it"""
    temperature: float = 0.2
    """T: low punishes the nearest negatives most, high spares those that show the same thing"""
    momentum: float = 0.999
    """m of the momentum encoder"""
    momentum_end: float | None = None
    """m grows to this along half a cosine; null: constant"""
    symmetric: bool = False
    """each view is once the query (v2+)"""
    reduction: str = "mean"
    """of the two directions' losses: mean or sum"""

    labels: bool = False
    """train on the classes of the training images: moco becomes SupMoCo (Majumder et al., 2021; the queue's keys of
    the query's class are positives too), simclr SupCon (Khosla et al., 2020, Eq. 2)"""
    candidates: str = "all"
    """of simclr: each view is compared with all views of the batch (all), or with one other view at a time
    (other_view; Chen et al., 2021, Algorithm 1, ctr): a sample's one positive among the batch"""
    contrast_mode: str = "all"
    """of simclr: the views that are compared are all of them, or the first alone (all or one; Khosla et al., 2020,
    official code)"""
    base_temperature: float | None = None
    """of simclr: the loss times T / base_temperature (Khosla et al., 2020, official code: 0.07); null: no factor"""

    temperature_schedule: str = "constant"
    """constant, cosine (from temperature_high to temperature_low and back; Kukleva et al., 2023) or learned
    (from `temperature` on, within the bounds; Radford et al., 2021, section 2.5)"""
    temperature_low: float = 0.1
    """the lowest T of cosine and learned"""
    temperature_high: float = 1.0
    """the highest T of cosine and learned"""
    temperature_period: float = 200.0
    """epochs of one oscillation of cosine"""
    margin: float = 0.0
    """by how much a positive's similarity is lowered before the softmax; 0: none"""
    margin_kind: str = "arc"
    """arc: cos(theta + m), in radians (Deng et al., 2019, Eq. 3); cosine: cos(theta) - m (Wang et al., 2018)"""
    debias: float = 0.0
    """tau+, the share of the queue that is of the query's own class, 1 / classes if balanced: its expected part is
    taken out of the negatives (Chuang et al., 2020, Eq. 7 and 8); 0: off"""
    false_negatives: str = "keep"
    """what becomes of keys in the queue that resemble the query's own key: keep (as negatives), eliminate or attract
    (as positives): false negative cancellation (Huynh et al., 2022)"""
    false_threshold: float | None = None
    """a key in the queue resembles the query's from this cosine on; null: no threshold"""
    false_top: int | None = None
    """at most so many of a query's most similar keys; null: no limit"""
    mix_hardest: int = 0
    """of how many of a query's hardest negatives further ones are mixed: N of MoCHi (Kalantidis et al., 2020, section
    4); 0: off"""
    mix_pairs: int = 0
    """how many are mixed of two hard negatives: s of MoCHi"""
    mix_query: int = 0
    """how many are mixed of a hard negative and the query: s' of MoCHi"""


def check_method(method: MethodConfig, batch_size: int, accumulate: int, views: int) -> None:
    """Refuses a method that cannot be, or switches that contradict each other.

    Args:
        method: the group.
        batch_size: images in one optimizer step.
        accumulate: micro-batches.
        views: V.

    Raises:
        ConfigError: naming the field, its value and the fix.
    """
    one_of("method.name", method.name, NAMES)
    one_of("method.queue_start", method.queue_start, ("random", "empty"))
    one_of("method.reduction", method.reduction, ("sum", "mean"))
    one_of("method.candidates", method.candidates, ("all", "other_view"))
    one_of("method.contrast_mode", method.contrast_mode, ("all", "one"))
    one_of("method.temperature_schedule", method.temperature_schedule, ("constant", "cosine", "learned"))
    one_of("method.margin_kind", method.margin_kind, ("arc", "cosine"))
    one_of("method.false_negatives", method.false_negatives, ("keep", "eliminate", "attract"))
    if method.name in NO_QUEUE:
        require(
            method.queue_size == 0,
            f"method.queue_size={method.queue_size}: {method.name} has no queue, its negatives are the batch; "
            "set method.queue_size=0",
        )
        require(batch_size > 1, f"batch_size={batch_size} leaves {method.name} no negatives: raise it")
    else:
        at_least(1, {"method.queue_size": method.queue_size})
    at_least(0, {name: getattr(method, name.removeprefix("method.")) for name in _COUNTS})
    require(method.temperature > 0, f"method.temperature={method.temperature} must be above 0")
    for name, momentum in {"method.momentum": method.momentum, "method.momentum_end": method.momentum_end}.items():
        require(momentum is None or 0 <= momentum <= 1, f"{name}={momentum} must lie in 0 ... 1")
    _check_fit(method, accumulate, views)
    _check_temperature(method)
    _check_values(method)
    _check_unused(method)


_COUNTS = ("method.margin", "method.mix_hardest", "method.mix_pairs", "method.mix_query")


def _check_temperature(method: MethodConfig) -> None:
    low, high, kind = method.temperature_low, method.temperature_high, method.temperature_schedule
    bounds = f"method.temperature_low={low} and method.temperature_high={high}"
    require(0 < low <= high, f"{bounds} must be above 0 and in this order")
    require(
        kind != "learned" or low <= method.temperature <= high,
        f"method.temperature={method.temperature} must lie within {bounds}: learning starts there",
    )
    require(method.temperature_period > 0, f"method.temperature_period={method.temperature_period} must be above 0")
    base = method.base_temperature
    require(
        base is None or kind != "learned",
        f"method.base_temperature={base} with method.temperature_schedule=learned: a temperature that is learned would "
        "shrink the factor T / base with itself; set base_temperature=null",
    )
    require(base is None or base > 0, f"method.base_temperature={base} must be above 0, or null for no factor")

    off = MethodConfig()
    for name in ("temperature_low", "temperature_high", "temperature_period"):
        require(
            kind != "constant" or getattr(method, name) == getattr(off, name),
            f"method.{name}={getattr(method, name)} does nothing with method.temperature_schedule=constant: set cosine "
            "or learned",
        )


def _check_values(method: MethodConfig) -> None:
    """Each switch for itself."""
    require(
        method.margin_kind == "cosine" or method.margin < math.pi,
        f"method.margin={method.margin} must be below pi, in radians; or set method.margin_kind=cosine",
    )
    require(0 <= method.debias < 1, f"method.debias={method.debias} must be at least 0 and below 1: it is a share")
    found = method.false_threshold is not None or method.false_top is not None
    require(
        (method.false_negatives != "keep") == found,
        f"method.false_negatives={method.false_negatives} with method.false_threshold={method.false_threshold} and "
        f"method.false_top={method.false_top}: eliminate and attract need one of the two, keep neither",
    )
    threshold, top, size = method.false_threshold, method.false_top, method.queue_size
    require(
        threshold is None or -1 < threshold <= 1,
        f"method.false_threshold={threshold} must be a cosine above -1, at which all keys are false negatives, up to 1",
    )
    require(top is None or 1 <= top <= size, f"method.false_top={top} must be 1 ... {size}, method.queue_size")
    mixed = method.mix_pairs + method.mix_query
    require(
        (method.mix_hardest > 0) == (mixed > 0),
        f"method.mix_hardest={method.mix_hardest}, method.mix_pairs={method.mix_pairs} and "
        f"method.mix_query={method.mix_query}: mixing needs mix_hardest and one of the other two",
    )
    require(
        method.mix_hardest <= size,
        f"method.mix_hardest={method.mix_hardest} exceeds method.queue_size={size}: lower it",
    )


_KNOWN = {  # the switches, and the methods that have them
    "labels": ("moco", "simclr"),
    "margin": ("moco", "simclr"),
    "debias": ("moco",),
    "false_negatives": ("moco",),
    "mix_hardest": ("moco",),
    "candidates": ("simclr",),
    "contrast_mode": ("simclr",),
    "base_temperature": ("simclr",),
}
_ESTIMATE = "the estimate that debias makes holds for the queue's keys as they are, each as a negative"
_ONE_POSITIVE = "with other_view a sample has the one positive, itself"
_CONTRADICTIONS = [
    ("debias", "labels", _ESTIMATE),
    ("debias", "margin", _ESTIMATE),
    ("debias", "false_negatives", _ESTIMATE),
    ("debias", "mix_hardest", _ESTIMATE),
    ("labels", "false_negatives", "the labels say already which keys are no negatives"),
    ("candidates", "labels", _ONE_POSITIVE),
    ("candidates", "base_temperature", _ONE_POSITIVE),
]


def _check_fit(method: MethodConfig, accumulate: int, views: int) -> None:
    """What goes with which method, and with what else."""
    off = MethodConfig()
    on = {name: getattr(method, name) for name in _KNOWN if getattr(method, name) != getattr(off, name)}
    for name, value in on.items():
        known = _KNOWN[name]
        require(
            method.name in known,
            f"method.{name}={value} is a switch of {' and '.join(known)}, not of {method.name}: leave it at "
            f"{getattr(off, name)}",
        )
    for one, other, why in _CONTRADICTIONS:
        require(
            one not in on or other not in on,
            f"method.{one}={on.get(one)} together with method.{other}={on.get(other)}: {why}; leave one of them off",
        )
    require(
        method.temperature_schedule != "learned" or method.name != "moco_v3",
        "method.temperature_schedule=learned: moco_v3 has a constant one or cosine; set one of these",
    )
    if method.name in NO_QUEUE:
        require(method.queue_start == off.queue_start, f"method.queue_start={method.queue_start}: there is no queue")
    if method.name != "simclr":
        require(views == 2, f"augment.views={views} must be 2 for {method.name}; method.name=simclr takes more")
        return
    require(not method.symmetric, "method.symmetric=true: with simclr every view is an anchor by contrast_mode=all")
    require(
        "margin" not in on or "candidates" in on,
        f"method.margin={method.margin} needs the one positive of method.candidates=other_view: set it, or margin=0",
    )
    require(views > 1, f"augment.views={views} leaves a sample no positive of its own: set 2 or more")
    require(
        accumulate == 1,
        f"accumulate={accumulate} would leave simclr the negatives of one micro-batch: set accumulate=1 and take more "
        "processes, or method=moco_v2, whose negatives do not depend on the batch",
    )


def _check_unused(method: MethodConfig) -> None:
    """What would do nothing, because the method is what it is."""
    off = MethodConfig()
    require(
        method.name != "moco_v3" or (method.symmetric and method.reduction == "sum"),
        f"method.symmetric={method.symmetric} and method.reduction={method.reduction}: moco_v3 is the sum of both "
        "directions; set true and sum",
    )
    require(
        method.name != "simclr" or (method.momentum_end is None and method.reduction == off.reduction),
        f"method.momentum_end={method.momentum_end} and method.reduction={method.reduction}: simclr has no momentum "
        f"encoder and no directions; set null and {off.reduction}",
    )
