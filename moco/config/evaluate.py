"""The configuration of the evaluation while training."""

from dataclasses import dataclass

from moco.config.base import bounded


@dataclass
class EvaluateConfig:
    """The evaluation while training: the accuracy of a k-nearest-neighbor (kNN) classifier on labeled held-out images.

    Without labels, the evaluation makes two random crops of each of at most 1024 images (or of as many as a training
    batch has, if that is more). It compares each first crop with all second crops, and each second crop with all first
    crops, and reports how often the most similar crop is of the same image.
    """

    every_epochs: int = bounded(1, ge=0)
    """Evaluate every N epochs, before the first epoch and after the last; 0: never."""
    k: int = bounded(200, ge=1)
    """Number of nearest neighbors that vote."""
    temperature: float = bounded(0.1, gt=0)
    """Temperature of the votes: a neighbor's vote has the weight exp(similarity / temperature)."""
    features: str = bounded("backbone", choices=("backbone", "projection"))
    """Features to compare: backbone (the backbone's output), or projection (the embedding that the loss compares)."""
    labels_per_class: int = bounded(0, ge=0)
    """Use N labeled reference images per class; the accuracy is the mean over random draws. 0: use all labels."""
    draws: int = bounded(100, ge=1)
    """Number of draws if labels_per_class is above 0. Mean and standard deviation over the draws are reported."""
    bank_size: int = bounded(0, ge=0)
    """Use at most N reference images, drawn once; 0: use all of them."""
    online_probe: bool = False
    """Also train a linear classifier on the backbone's features and the labels of the training images, and report its
    accuracy on the held-out images. No gradient reaches the encoder, and no further forward pass is needed."""
    raw_pixels: bool = False
    """Also report the kNN accuracy on raw pixels. Without labels, the comparison of crops always includes raw
    pixels."""
    batch_size: int = bounded(512, ge=1)
    """Images per forward pass of the encoder. It affects memory, not results."""
    precision: str = bounded("fp32", choices=("fp32", "bf16"))
    """Number format in which the encoder computes in evaluations. bf16 (bfloat16) is faster on GPUs and CPUs that have
    units for it; it rounds to 8 significant bits, so results differ slightly from those in fp32."""
