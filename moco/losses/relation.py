"""Relations: a student learns a teacher's similarities of an image to the keys of a queue.

Legend: N queries, C dimension, K queue length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.losses.queue import check_inputs, info_nce_logits
from moco.losses.similarity import Temperature, check_temperature, paired_similarity, similarity
from moco.losses.streamed import logit_measures


def relational_cross_entropy(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Temperature,
    teacher_temperature: float,
    with_key: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the cross entropy of the student's distribution over the queue with the teacher's.

    With queue Q, student query q and teacher key k:

        p_j = softmax over j of k·Q_j / T_t,   r_j = softmax over j of q·Q_j / T,   loss = - sum over j of p_j log r_j

    ReSSL (Zheng et al., 2021): the key is the embedding of a weak view, and T_t < T, so that p is the sharper one. With
    `with_key` the key itself is one more candidate, as in SEED (Fang et al., 2021), where a frozen network computes it.
    The loss is at least the entropy of p. If all candidates are equally similar to q, the loss is log(K), or log(1 + K)
    with the key.

    Args:
        query: the student's embeddings, L2-normalized, shape (N, C).
        key: the teacher's embeddings, L2-normalized, shape (N, C), without gradient.
        queue: earlier embeddings of the teacher, L2-normalized, shape (K, C), without gradient.
        temperature: T > 0, of the student.
        teacher_temperature: T_t > 0.
        with_key: whether the key itself is one more candidate.

    Returns:
        The mean loss over the queries, shape (), and a dict of detached measures of shape (): "teacher_entropy" (the
        lowest possible loss), "negatives" (K), "chance", and those of `logit_measures`.

    Raises:
        ValueError: for an invalid temperature or shape.
    """
    check_inputs(query, key, queue, temperature)
    check_temperature(teacher_temperature, "teacher_temperature")
    logits = info_nce_logits(query, key, queue, temperature)  # (N, 1+K), the key in column 0
    with torch.no_grad():
        teacher = similarity(key, queue)  # (N, K)
        if with_key:
            teacher = torch.cat([paired_similarity(key, key), teacher], dim=1)  # (N, 1+K)
        teacher = F.softmax(teacher / teacher_temperature, dim=1)
    student = F.log_softmax(logits if with_key else logits[:, 1:], dim=1)  # (N, K) or (N, 1+K)
    loss = -(teacher.to(student.dtype) * student).sum(dim=1).mean()
    count = torch.full((), float(teacher.shape[1]), device=query.device)
    measures = {
        "teacher_entropy": torch.special.entr(teacher).sum(dim=1).mean(),
        "negatives": torch.full_like(count, float(len(queue))),
        "chance": count.log(),
    }
    return loss, measures | logit_measures(logits.detach(), temperature)
