"""MoCo v3 against its Algorithm 1: by hand in numpy, in plain torch with BN, and in closed form.

Legend: N batch, C embedding, P pixels of an image.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import Output
from moco.config import OptimConfig
from moco.data.loader import Batch
from moco.methods.moco_v3 import MoCoV3
from moco.models.encoder import build_encoder, build_predictor
from moco.models.norm import set_calls_per_step
from moco.optim.optimizers import build_optimizer
from moco.training.step import StepSettings, train_step
from tests.distributed.test_topology import smooth

Array = NDArray[np.float64]
N, C, P = 5, 3, 12
LR, MOMENTUM, DECAY, M, T = 0.3, 0.9, 0.01, 0.8, 0.3  # the optimizer's three, the momentum encoder's, the temperature


def linear(fan_in: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(fan_in, C, bias=False))


def method(temperature: float = T, predictor: nn.Module | None = None, decoupled: bool = False) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(linear(P), linear(C) if predictor is None else predictor, temperature, decoupled)


def weight(module: nn.Module) -> Tensor:
    (only,) = module.parameters()
    return only.detach()


def images(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))  # P = 12


def loss_of(method: MoCoV3, views: Sequence[Tensor], index: Tensor | None = None) -> Output:
    index = torch.arange(len(views[0])) if index is None else index
    output: Output = method(views, method.encode_keys(views, None, len(index)), index)
    return output


# ---- Algorithm 1 by hand ----


class Algorithm1:
    """The paper's Algorithm 1 with linear networks: numpy in float64, loops, no autograd."""

    def __init__(self, method: MoCoV3, optimizer: str) -> None:
        self.f_q: Array = weight(method.encoder).double().numpy().copy()  # (C, P)
        self.predictor: Array = weight(method.predictor).double().numpy().copy()  # (C, C)
        self.f_k: Array = weight(method.momentum_encoder).double().numpy().copy()
        self.velocity: dict[str, Array] = {"f_q": np.zeros_like(self.f_q), "predictor": np.zeros_like(self.predictor)}
        self.optimizer = optimizer

    def ctr(self, x_q: Array, keys: list[Array]) -> tuple[float, dict[str, Array], float, float]:
        """Return ctr(q, k) of one direction, its gradients, the contrast accuracy and the positives' similarity."""
        loss, correct, similarity = 0.0, 0.0, 0.0
        gradients = {"f_q": np.zeros_like(self.f_q), "predictor": np.zeros_like(self.predictor)}
        for i, x in enumerate(x_q):
            h = self.f_q @ x
            z = self.predictor @ h
            length = math.sqrt(float(z @ z))
            q = z / length
            logits = [float(q @ k) / T for k in keys]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            loss += 2 * T * (log_sum - logits[i]) / len(x_q)
            at_q = -keys[i] / T
            for logit, k in zip(logits, keys, strict=True):
                at_q = at_q + math.exp(logit - log_sum) * k / T
            at_q = 2 * T * at_q / len(x_q)
            at_z = (at_q - q * float(q @ at_q)) / length
            gradients["predictor"] += np.outer(at_z, h)
            gradients["f_q"] += np.outer(self.predictor.T @ at_z, x)
            correct += all(logits[i] > logit for j, logit in enumerate(logits) if j != i) / len(x_q)
            similarity += float(q @ keys[i]) / len(x_q)
        return loss, gradients, correct, similarity

    def gradients(self, views: Sequence[Tensor]) -> tuple[float, dict[str, Array], dict[str, float]]:
        x: list[Array] = [view.flatten(1).double().numpy() for view in views]  # (N, P) each
        keys: list[list[Array]] = []
        for view in x:
            embedded = [self.f_k @ image for image in view]
            keys.append([k / math.sqrt(float(k @ k)) for k in embedded])
        one, other = self.ctr(x[0], keys[1]), self.ctr(x[1], keys[0])
        total = {name: one[1][name] + other[1][name] for name in one[1]}
        measures = {
            "contrast_accuracy": (one[2] + other[2]) / 2,
            "positive_similarity": (one[3] + other[3]) / 2,
            "negatives": len(x[0]) - 1.0,
        }
        return one[0] + other[0], total, measures

    def step(self, views: Sequence[Tensor]) -> tuple[float, dict[str, float]]:
        loss, gradients, measures = self.gradients(views)
        for name, gradient in gradients.items():
            w: Array = getattr(self, name)
            update = gradient + DECAY * w
            if self.optimizer == "lars":  # moco-v3, moco/optimizer.py, with its coefficient of 0.001
                update = update * 0.001 * float(np.linalg.norm(w)) / float(np.linalg.norm(update))
            self.velocity[name] = MOMENTUM * self.velocity[name] + update
            setattr(self, name, w - self.lr * self.velocity[name])
        self.f_k = M * self.f_k + (1 - M) * self.f_q
        return loss, measures

    @property
    def lr(self) -> float:
        return 100 * LR if self.optimizer == "lars" else LR


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_steps_are_algorithm_1(optimizer: str) -> None:
    ours = method()
    reference = Algorithm1(ours, optimizer)
    optim = build_optimizer(
        ours, OptimConfig(name=optimizer, momentum=MOMENTUM, weight_decay=DECAY, exclude=["bias", "norm"])
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    start = {name: weight(getattr(ours, name)).clone() for name in ("encoder", "predictor", "momentum_encoder")}
    for number in range(6):
        views = [images(2 * number), images(2 * number + 1)]
        loss, measures = reference.step(views)
        measured = train_step(
            ours, ours, optim, scaler, Batch(torch.arange(N), views), None, StepSettings(reference.lr, M)
        )
        assert measured["loss"].item() == pytest.approx(loss, rel=1e-4)
        for name, value in measures.items():
            assert measured[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
        np.testing.assert_allclose(weight(ours.encoder), reference.f_q, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(weight(ours.predictor), reference.predictor, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(weight(ours.momentum_encoder), reference.f_k, rtol=1e-3, atol=1e-5)
    assert all((weight(getattr(ours, name)) - value).abs().max() > 0.01 for name, value in start.items())


def test_gradients_equal_those_by_hand() -> None:
    ours = method()
    with torch.no_grad():  # keys of another encoder than the queries'
        weight(ours.momentum_encoder).add_(0.3)
    views = [images(0), images(1)]
    loss, expected, _ = Algorithm1(ours, "sgd").gradients(views)
    output = loss_of(ours, views)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    for module, name in ((ours.encoder, "f_q"), (ours.predictor, "predictor")):
        (parameter,) = module.parameters()
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in ours.momentum_encoder.parameters())


# ---- with BN and convolutions, in plain torch ----


def with_norms(bn: Any) -> tuple[nn.Module, nn.Module]:
    """A convnet with v3's heads; SiLU for ReLU, whose kink would amplify rounding."""
    torch.manual_seed(0)
    encoder = build_encoder("convnet", {"width": 2}, 2, 12, 6, bn, 0, head_norm=True)
    return smooth(encoder), smooth(build_predictor(6, 12, 2, False, bn, 0))


def test_steps_with_batch_norm_follow_the_paper() -> None:
    ours = MoCoV3(*with_norms("sync"), temperature=T)
    set_calls_per_step(ours, 2)
    optim = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], LR, MOMENTUM, weight_decay=DECAY)
    f_q, predictor = with_norms("batch")  # torch's own BN
    f_k = copy.deepcopy(f_q)
    reference = torch.optim.SGD([*f_q.parameters(), *predictor.parameters()], LR, MOMENTUM, weight_decay=DECAY)

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q) @ F.normalize(k).T / T
        return 2 * T * F.cross_entropy(logits, torch.arange(len(q)))

    for number in range(4):
        x1, x2 = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2 * number + v)) for v in range(2))
        measured = train_step(
            ours,
            ours,
            optim,
            torch.amp.GradScaler("cpu", enabled=False),
            Batch(torch.arange(8), [x1, x2]),
            None,
            StepSettings(0.02, M),
        )
        for group in reference.param_groups:
            group["lr"] = 0.02
        with torch.no_grad():
            k1, k2 = f_k(x1), f_k(x2)
        q1, q2 = predictor(f_q(x1)), predictor(f_q(x2))
        loss = ctr(q1, k2) + ctr(q2, k1)
        reference.zero_grad()
        loss.backward()
        reference.step()
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                k.copy_(M * k + (1 - M) * q)
        assert measured["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        for mine, theirs in ((ours.encoder, f_q), (ours.predictor, predictor), (ours.momentum_encoder, f_k)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            # Each BN is called twice per step, which updates its statistics twice.
            official = dict(theirs.named_buffers())
            for name, buffer in mine.named_buffers():
                if name in official:  # torch's BN has no `compiled_call`
                    torch.testing.assert_close(buffer, official[name], rtol=1e-3, atol=1e-4)


# ---- symmetries and closed forms ----


def test_swapping_the_views_changes_nothing() -> None:
    ours = method()
    one, other = loss_of(ours, [images(0), images(1)]), loss_of(ours, [images(1), images(0)])
    torch.testing.assert_close(one.loss, other.loss)
    for name, value in one.measures.items():
        torch.testing.assert_close(value, other.measures[name])


def test_the_order_of_the_batch_does_not_matter() -> None:
    ours, order = method(), torch.tensor([3, 0, 4, 1, 2])
    one = loss_of(ours, [images(0), images(1)])
    torch.testing.assert_close(one.loss, loss_of(ours, [images(0)[order], images(1)[order]]).loss)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("n", [2, 5, 16])
def test_chance_is_the_loss_of_equal_keys(n: int, temperature: float, decoupled: bool) -> None:
    equal = images(0, 1).expand(n, -1, -1, -1)
    output = loss_of(method(temperature, decoupled=decoupled), [equal, equal])
    assert output.loss.item() == pytest.approx(2 * 2 * temperature * math.log(n - decoupled), rel=1e-5, abs=1e-5)
    assert output.measures["chance"].item() == pytest.approx(output.loss.item(), rel=1e-5, abs=1e-5)
    assert output.measures["negatives"].item() == n - 1
    assert output.measures["contrast_accuracy"].item() == 0  # a tie is no success


@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_of_orthogonal_keys_in_closed_form(decoupled: bool) -> None:
    """Each query equal to its key and orthogonal to the others: log(1 + (N - 1) e^(-1/T)) per query.

    Decoupled, log(N - 1) - 1/T.
    """
    identity = nn.Sequential(nn.Flatten())
    ours = MoCoV3(identity, nn.Identity(), T, decoupled)
    basis = 7 * torch.eye(P)[:4].view(4, 3, 2, 2)
    output = loss_of(ours, [basis, 3 * basis])
    each = math.log(3) - 1 / T if decoupled else math.log(1 + 3 * math.exp(-1 / T))
    assert output.loss.item() == pytest.approx(4 * T * each, rel=1e-5)
    assert output.measures["contrast_accuracy"].item() == 1
    assert output.measures["positive_similarity"].item() == pytest.approx(1)


# ---- the momentum encoder, the keys, the state ----


def test_the_momentum_encoder_is_a_copy_without_predictor() -> None:
    ours = method()
    assert torch.equal(weight(ours.encoder), weight(ours.momentum_encoder))
    assert weight(ours.encoder).data_ptr() != weight(ours.momentum_encoder).data_ptr()
    assert {name.split(".")[0] for name in ours.state_dict()} == {"encoder", "momentum_encoder", "predictor"}
    views = [images(0), images(1)]
    keys = ours.encode_keys(views, None, 2)
    with torch.no_grad():
        next(ours.predictor.parameters()).add_(1.0)
    for view, key in ours.encode_keys(views, None, N).items():  # whatever the micro-batch and the predictor
        torch.testing.assert_close(key, keys[view])
        torch.testing.assert_close(key, F.normalize(ours.momentum_encoder(views[view]), dim=1))


def test_a_micro_batch_is_compared_with_all_keys_of_the_batch() -> None:
    ours = method()
    views = [images(0, 6), images(1, 6)]
    keys = ours.encode_keys(views, None, 2)
    parts = [ours([view[at : at + 2] for view in views], keys, torch.arange(at, at + 2), at) for at in (0, 2, 4)]
    all_at_once = ours(views, keys, torch.arange(6), 0)
    torch.testing.assert_close(torch.stack([part.loss for part in parts]).mean(), all_at_once.loss)
    for name, value in all_at_once.measures.items():
        torch.testing.assert_close(torch.stack([part.measures[name] for part in parts]).mean(), value)


def test_under_bf16_autocast_the_loss_is_float32_and_close() -> None:
    ours, views = method(), [images(0), images(1)]
    exact = loss_of(ours, views).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = loss_of(ours, views).loss
    assert low.dtype == torch.float32
    assert low.item() != exact.item()
    assert low.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.temperature=0\.0 must be above 0"):
        method(temperature=0.0)
