"""The relational cross entropy (ReSSL, SEED) against loops, finite differences and closed forms."""

import math

import pytest
import torch

from moco.losses import relational_cross_entropy
from tests.losses.loops import dot, mean, unit

N, C, K, T, T_TEACHER = 5, 6, 9, 0.3, 0.1


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(each) for each in logits)
    return [math.exp(each) / total for each in logits]


@pytest.mark.parametrize("with_key", [False, True])
def test_loss_and_entropy_equal_the_loops(with_key: bool) -> None:
    query, key, queue = (unit(n, C, seed=seed, dtype=torch.float64) for seed, n in enumerate((N, N, K)))
    loss, measures = relational_cross_entropy(query, key, queue, T, T_TEACHER, with_key)
    losses, entropies = [], []
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        candidates = [k, *queue.tolist()] if with_key else queue.tolist()
        teacher = softmax([dot(k, each) / T_TEACHER for each in candidates])
        student = softmax([dot(q, each) / T for each in candidates])
        losses.append(-sum(p * math.log(r) for p, r in zip(teacher, student, strict=True)))
        entropies.append(-sum(p * math.log(p) for p in teacher))
    assert loss.item() == pytest.approx(mean(losses), rel=1e-12)
    assert measures["teacher_entropy"].item() == pytest.approx(mean(entropies), rel=1e-12)
    assert loss > measures["teacher_entropy"]
    cosines = [dot(q, k) for q, k in zip(query.tolist(), key.tolist(), strict=True)]
    assert measures["positive_similarity"].item() == pytest.approx(mean(cosines))


@pytest.mark.parametrize("with_key", [False, True])
def test_only_the_query_gets_a_gradient_which_passes_gradcheck(with_key: bool) -> None:
    query, key, queue = (
        unit(n, C, seed=seed, dtype=torch.float64).requires_grad_() for seed, n in enumerate((N, N, K))
    )
    fixed = key.detach(), queue.detach()
    assert torch.autograd.gradcheck(lambda q: relational_cross_entropy(q, *fixed, T, T_TEACHER, with_key)[0], [query])
    relational_cross_entropy(query, key.detach(), queue.detach(), T, T_TEACHER, with_key)[0].backward()
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("with_key", [False, True])
def test_equal_candidates_give_the_logarithm_of_their_number(with_key: bool) -> None:
    one = torch.eye(C)[:1]
    loss, measures = relational_cross_entropy(one.expand(N, -1), one.expand(N, -1), one.expand(K, -1), T, 0.1, with_key)
    assert loss.item() == pytest.approx(math.log(K + with_key))
    assert measures["chance"].item() == pytest.approx(math.log(K + with_key))
    assert measures["teacher_entropy"].item() == pytest.approx(math.log(K + with_key), rel=1e-5)


def test_a_student_like_its_teacher_reaches_the_entropy() -> None:
    key, queue = unit(N, C, seed=0), unit(K, C, seed=1)
    loss, measures = relational_cross_entropy(key, key, queue, T, T)
    assert loss.item() == pytest.approx(measures["teacher_entropy"].item(), rel=1e-5)


def test_with_a_cold_teacher_and_its_key_the_loss_is_info_nce() -> None:
    """As T_t goes to 0, the teacher's distribution is 1 at its own key."""
    from moco.losses import info_nce

    query, key, queue = unit(N, C, seed=0), unit(N, C, seed=1), unit(K, C, seed=2)
    loss, _ = relational_cross_entropy(query, key, queue, T, 1e-3, with_key=True)
    assert loss.item() == pytest.approx(info_nce(query, key, queue, T)[0].item(), rel=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [(0.0, 0.1), (0.1, 0.0), (0.1, -1.0), (0.1, math.inf)])
def test_invalid_temperatures_are_refused(student: float, teacher: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.* must be above 0"):
        relational_cross_entropy(unit(N, C, seed=0), unit(N, C, seed=1), unit(K, C, seed=2), student, teacher)


def test_invalid_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the shapes"):
        relational_cross_entropy(unit(N, C, seed=0), unit(N - 1, C, seed=1), unit(K, C, seed=2), T, T_TEACHER)
