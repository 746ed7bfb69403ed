"""Distillation: a small encoder, the student, learns the embeddings of a trained and frozen one, the teacher.

One training step (see `moco/training/step.py`):

    keys = method.encode_keys(views)             t = teacher(x), no gradient
    output = method(views, keys, index)          s = student(x); the loss compares s with t
    output.loss.backward(); optimizer.step()     update the student
    method.enqueue(output.new_keys, index)       enqueue t, dequeue the oldest; with a queue only

Student and teacher see the same view. Without a queue the loss is 1 - cos(s, t), averaged over images and views.
With a queue the loss is that of SEED: the student learns the teacher's similarities of the image to the embeddings in
the queue.

    SEED: Self-supervised Distillation for Visual Representation (Fang et al., ICLR 2021)

Checkpoints do not contain the teacher: a resumed run loads the teacher again, and refuses one with another digest.

Legend: N micro-batch, n local batch, W processes, M = W n global batch, C embedding, K queue length, V views.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from moco.builder import KeyQueue, Output, encode_keys, mean_measures, unit_length
from moco.digest import digest
from moco.distributed import Order, gather, rank, world_size
from moco.losses import relational_cross_entropy
from moco.losses.similarity import paired_similarity, similarity


class Distill(nn.Module):
    """Distillation of a frozen teacher.

    Args:
        encoder: the student, images (N, channels, S, S) to embeddings (N, C).
        teacher: images (N, channels, S, S), prepared as for the student, to embeddings (N, C). It is set to eval mode.
        queue: embeddings of the teacher, for the loss of SEED; None: the cosine loss.
        temperature: of the student's similarities; only with a queue.
        teacher_temperature: of the teacher's similarities; only with a queue.
        views: V.
    """

    momentum_encoder: None = None
    step = 0
    teacher_digest: Tensor  # (32,), uint8

    def __init__(
        self,
        encoder: nn.Module,
        teacher: nn.Module,
        queue: KeyQueue | None = None,
        temperature: float = 0.2,
        teacher_temperature: float = 0.01,
        views: int = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.queue = encoder, queue
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.directions = tuple((view, view) for view in range(views))
        self.passes = views
        # In a list, so that it is no submodule: it is neither trained nor saved, and stays in evaluation mode.
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.register_buffer("teacher_digest", torch.tensor(list(bytes.fromhex(digest(teacher.state_dict())))).byte())

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return the teacher's embeddings of the global batch, {view: (M, C)}. `shuffles` are ignored: BN is frozen."""
        (teacher,) = self._teacher
        return {number: gather(encode_keys(teacher, view, None, micro_batch)) for number, view in enumerate(views)}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of one micro-batch; see `MoCo.forward`, but here keys are {view: (M, C)}."""
        rows = rank() * (len(keys[0]) // world_size()) + start + torch.arange(len(index), device=index.device)  # (N,)
        losses, measured, pairs = [], [], []
        for view, _ in self.directions:
            s, t = unit_length(self.encoder(views[view])), keys[view][rows]  # (N, C) each
            if self.queue is None:
                loss, measures = _cosine_loss(s, keys[view], rows)
            else:
                temperatures = self.temperature, self.teacher_temperature
                loss, measures = relational_cross_entropy(s, t, self.queue.keys, *temperatures, with_key=True)
            losses.append(loss)
            measured.append(measures)
            pairs.append((s.detach(), t))
        new_keys = None if self.queue is None else pairs[0][1][:, None]
        return Output(torch.stack(losses).mean(), mean_measures(measured), *pairs[0], new_keys=new_keys)

    def update_momentum_encoder(self, momentum: float) -> None:
        """Do nothing: the teacher is frozen."""

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Enqueue the embeddings of all ranks, given those of this rank, (n, 1, C), and their image indices, (n,)."""
        assert self.queue is not None
        self.queue.enqueue(gather(keys[:, 0]), gather(index))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher too, to a device or memory format."""
        self._teacher[0]._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse the state of a run with another teacher."""
        saved = state_dict.get(f"{prefix}teacher_digest")
        if saved is not None and not torch.equal(saved.cpu(), self.teacher_digest.cpu()):
            raise ValueError("method.teacher has other weights than when the run started: restore its file")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _cosine_loss(student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of 1 - cos(s, t), shape (), and measures.

    `student` holds s of the micro-batch, (N, C), `teacher` holds t of the global batch, (M, C), and `rows`, (N,), the
    rows of the same images in `teacher`.

    The contrast accuracy is the share of images whose student embedding s is nearer to t of the same image than to any
    other t.
    """
    cosine = paired_similarity(student, teacher[rows])  # (N, 1)
    others = similarity(student.detach(), teacher)  # (N, M)
    measures = {
        "contrast_accuracy": ((others >= others.gather(1, rows[:, None])).sum(dim=1) == 1).float().mean(),
        "positive_similarity": cosine.detach().mean(),
        "chance": torch.ones((), device=student.device),  # the loss of unrelated embeddings
    }
    return (1 - cosine).mean(), measures
