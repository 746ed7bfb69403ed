"""L2-regularized logistic regression: scikit-learn's solution, the strength chosen on validation samples."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from moco.evaluation.logistic_regression import STRENGTHS, Classifier, choose_and_fit, fit_path

Samples = tuple[torch.Tensor, NDArray[np.int64]]


def digits() -> tuple[Samples, Samples, Samples]:
    """Return 300 training, 150 validation and the other test scans, as features of very different sizes."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order].astype(np.float32)) * torch.linspace(0.05, 0.1, 64) + 1
    y = labels[order].astype(np.int64)
    return (x[:300], y[:300]), (x[300:450], y[300:450]), (x[450:], y[450:])


def accuracy(classifier: Classifier, samples: Samples) -> float:
    return 100 * float(np.mean(classifier(samples[0]).argmax(dim=1).numpy() == samples[1]))


def of_sklearn(samples: Samples, strength: float) -> LogisticRegression:
    fitted = LogisticRegression(C=1 / strength, tol=1e-6, max_iter=3000)
    return fitted.fit(samples[0].double().numpy(), samples[1])


def test_the_strengths_are_those_of_the_protocol() -> None:
    assert len(STRENGTHS) == 45
    assert STRENGTHS[::44] == pytest.approx((1e5, 1e-6))
    ratios = np.array(STRENGTHS[1:]) / STRENGTHS[:-1]
    np.testing.assert_allclose(ratios, 10 ** (-11 / 44))


def objective(weight: NDArray[np.float64], bias: NDArray[np.float64], samples: Samples, strength: float) -> float:
    logits = samples[0].double().numpy() @ weight.T + bias
    likelihood = logits[np.arange(len(logits)), samples[1]] - np.logaddexp.reduce(logits, axis=1)
    return float(-likelihood.sum() + strength / 2 * np.square(weight).sum())


def test_every_strength_gives_scikit_learns_accuracy() -> None:
    """Also with warm starts. For weaker penalties neither reaches the minimum, which is nearly flat."""
    train, _, test = digits()
    strengths = STRENGTHS[::6]
    for strength, fitted in zip(strengths, fit_path(*train, 10, strengths), strict=True):
        reference = of_sklearn(train, strength)
        theirs = objective(reference.coef_, reference.intercept_, train, strength)
        assert objective(fitted.weight.numpy(), fitted.bias.numpy(), train, strength) < 1.001 * theirs + 0.01
        if strength > 0.005:
            accuracies = accuracy(fitted, test), 100 * reference.score(test[0].double().numpy(), test[1])
            assert accuracies[0] == pytest.approx(accuracies[1], abs=0.2), strength


def test_the_solution_has_a_zero_gradient() -> None:
    (x, y), strength = digits()[0], 3.0
    (fitted,) = fit_path(x, y, 10, [strength])
    weight, bias = fitted.weight.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
    truth = torch.from_numpy(y)
    logits = x.double() @ weight.T + bias
    loss = sum(logits[i].logsumexp(0) - logits[i, truth[i]] for i in range(len(x))) + strength / 2 * (weight**2).sum()
    torch.as_tensor(loss).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4 * len(x) * float(x.abs().max())
    assert float(bias.grad.abs().max()) < 1e-4 * len(x)


def test_the_chosen_strength_is_the_best_on_validation_and_the_classifier_sees_both_parts() -> None:
    train, held, test = digits()
    strengths = STRENGTHS[4:24:4]

    def score(scores: torch.Tensor) -> float:
        return float(np.mean(scores.argmax(dim=1).numpy() == held[1]))

    classifier, choice = choose_and_fit((train, held), 10, score, strengths)
    references = [of_sklearn(train, strength).score(held[0].double().numpy(), held[1]) for strength in strengths]
    np.testing.assert_allclose(choice.scores, references, atol=0.011)  # 1.5 of the 150 images
    assert choice.strength == strengths[int(np.argmax(choice.scores))]  # the strongest of equal ones
    both = torch.cat([train[0], held[0]]), np.concatenate([train[1], held[1]])
    theirs = 100 * of_sklearn(both, choice.strength).score(test[0].double().numpy(), test[1])
    assert accuracy(classifier, test) == pytest.approx(theirs, abs=0.2)


def test_a_shift_and_a_scale_of_all_features_change_nothing() -> None:
    (x, y), _, (queries, _) = digits()
    (one,) = fit_path(x, y, 10, [1.0])
    (other,) = fit_path(10 * x + 3, y, 10, [100.0])  # the weights are a tenth
    torch.testing.assert_close(one(queries), other(10 * queries + 3), atol=2e-3, rtol=2e-3)


def test_constant_features_give_the_frequencies_of_the_classes() -> None:
    x, y = torch.ones(8, 3), np.array([0, 0, 0, 0, 1, 1, 2, 2])
    (fitted,) = fit_path(x, y, 3, [1.0])
    expected = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(fitted(x[:1]).softmax(dim=1), expected, atol=1e-4, rtol=0)
