"""Distillation: fields, checks and construction. The algorithm is in moco/methods/distill.py."""

from dataclasses import dataclass, field
from typing import Any

from moco.config.base import bounded, require
from moco.config.method import MethodConfig
from moco.config.train import TrainConfig


@dataclass
class DistillConfig(MethodConfig):
    """Distillation of a frozen teacher into the encoder, the student.

    `temperature` is the temperature of the student's similarities. It is used with loss=queue only.
    """

    name: str = "distill"
    """The method; set by method=OPTION."""
    teacher: str = bounded("", min_length=1, path=True, example="method.teacher=runs/digits/encoder.safetensors")
    """The teacher: timm/NAME, a model of timm with its published weights; or a file with an encoder: a checkpoint of
    moco.train, encoder.safetensors, or a file of another project. model.dim must be the dimension of the teacher's
    features, see teacher_features."""
    teacher_backbone: str = ""
    """The teacher's network, if the file of the teacher does not name it; the values are those of model.backbone."""
    teacher_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the constructor of the teacher's network, each as +method.teacher_options.NAME=VALUE."""
    teacher_weights: str = bounded("encoder", choices=("encoder", "momentum_encoder"))
    """The network of the teacher's file: encoder, or momentum_encoder if the file holds one."""
    teacher_features: str = bounded("backbone", choices=("backbone", "projection"))
    """What the student learns: the features of the teacher's backbone, or the output of the teacher's projection head,
    if the file of the teacher contains that head."""
    loss: str = bounded("cosine", choices=("cosine", "queue"))
    """cosine: 1 - the cosine similarity between the outputs of the student and of the teacher; queue: the student
    learns the teacher's similarities between an image and the embeddings in a queue (SEED, Fang et al., 2021)."""
    queue_size: int = bounded(0, ge=0)
    """Number of the teacher's embeddings in the queue (K), with loss=queue."""
    teacher_temperature: float = bounded(0.01, gt=0)
    """Temperature of the teacher's similarities, with loss=queue."""

    can_learn_temperature = False
    compares_views = False

    def check(self, config: TrainConfig) -> None:
        """See `MethodConfig.check`."""
        super().check(config)
        require(
            (self.loss == "queue") == (self.queue_size > 0),
            f"method.queue_size={self.queue_size} does not fit method.loss={self.loss}: set a queue_size "
            "with loss=queue, and 0 with loss=cosine",
        )
        published = self.teacher.startswith("timm/")
        require(
            not published or (not self.teacher_backbone and self.teacher_features == "backbone"),
            f"method.teacher={self.teacher} already names the network, and its published weights have no projection "
            "head: remove method.teacher_backbone and method.teacher_features",
        )

    def build(self, config: TrainConfig, encoder: Any, labels: Any, teacher: Any = None) -> Any:
        """See `MethodConfig.build`. `teacher` is the frozen network, an `nn.Module`."""
        from moco.builder import KeyQueue
        from moco.methods.distill import Distill

        queue = KeyQueue(self.queue_size, config.model.dim, mask_own_keys=False) if self.queue_size else None
        temperatures = self.temperature, self.teacher_temperature
        return Distill(encoder, teacher, queue, *temperatures, views=config.augment.views)
