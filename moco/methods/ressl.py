"""ReSSL: the student sees a strong view and learns the similarities of the teacher's weak view to keys in a queue.

    ReSSL: Relational Self-Supervised Learning with Weak Augmentation (Zheng et al., NeurIPS 2021)

One training step is that of MoCo with another loss (see `moco/builder.py`):

    keys = method.encode_keys(views)             k = f_k(weak view), no gradient
    output = method(views, keys, index)          q = f_q(strong view); cross entropy of softmax(q·Q / T) with
                                                 softmax(k·Q / T_t)
    output.loss.backward(); optimizer.step()     update f_q
    method.update_momentum_encoder(momentum)     f_k = m f_k + (1 - m) f_q
    method.enqueue(output.new_keys, index)       enqueue k, dequeue the oldest keys

The first view is the strong one. `augment=ressl` makes the second one weak: its field `augment.second` turns off color
changes and blur.

Deliberate deviation: the official code updates the momentum encoder between encoding query and key; here it is updated
at the end of the previous step, as in `moco/builder.py`.

Legend: N micro-batch, n local batch, C embedding, Q queue, T and T_t temperatures of student and teacher.
"""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from moco.builder import KeyQueue, Output, encode_keys, unit_length, update_momentum_encoder
from moco.distributed import Order, gather
from moco.losses import relational_cross_entropy


class ReSSL(nn.Module):
    """The method ReSSL: the student is the encoder f_q, the teacher is the momentum encoder f_k.

    Args:
        encoder: f_q, images (N, channels, S, S) to embeddings (N, C). f_k starts as its copy.
        queue: Q.
        temperature: T, of the student.
        teacher_temperature: T_t.
    """

    directions = ((0, 1),)  # (strong view, weak view)
    passes = 1
    step = 0

    def __init__(
        self, encoder: nn.Module, queue: KeyQueue, temperature: float = 0.1, teacher_temperature: float = 0.04
    ) -> None:
        super().__init__()
        self.encoder, self.queue = encoder, queue
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def encode_keys(
        self,
        views: Sequence[Tensor],
        shuffles: Sequence[Order] | None = None,
        micro_batch: int | None = None,
    ) -> dict[int, Tensor]:
        """Return the keys of the weak views of the local batch, {1: (n, C)}; see `moco.builder.encode_keys`."""
        shuffle = None if shuffles is None else shuffles[1]
        return {1: encode_keys(self.momentum_encoder, views[1], shuffle, micro_batch)}

    def forward(self, views: Sequence[Tensor], keys: dict[int, Tensor], index: Tensor, start: int = 0) -> Output:
        """Compute the loss of one micro-batch against the queue before this step; see `MoCo.forward`."""
        q = unit_length(self.encoder(views[0]))  # (N, C)
        k = keys[1][start : start + len(index)]  # (N, C)
        loss, measures = relational_cross_entropy(q, k, self.queue.keys, self.temperature, self.teacher_temperature)
        return Output(loss, measures, q.detach(), k, new_keys=k[:, None])

    def update_momentum_encoder(self, momentum: float) -> None:
        """Set f_k = m f_k + (1 - m) f_q."""
        update_momentum_encoder(self.momentum_encoder, self.encoder, momentum)

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Enqueue the keys of all ranks, given those of this rank, (n, 1, C), and their image indices, (n,)."""
        self.queue.enqueue(gather(keys[:, 0]), gather(index))
