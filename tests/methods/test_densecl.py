"""DenseCL against its equations as loops in float64, by finite differences, in closed form and by symmetry.

Legend: N batch, C embedding, D channels of the map, K queue length, P = G x G cells.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco.builder import KeyQueue, Output
from moco.config import ConfigError, TrainConfig, check
from moco.data.loader import Batch
from moco.methods.build import build_method
from moco.methods.densecl import DenseCL
from moco.methods.densecl_config import DenseCLConfig
from moco.models.dense import DenseEncoder
from moco.training.step import StepSettings, train_step

Array = NDArray[np.float64]
N, C, D, K, G, T, WEIGHT = 6, 4, 3, 10, 3, 0.3, 0.4
P = G * G


class Patches(nn.Module):
    """A linear map of 2 x 2 patches, (N, 3, 2 G, 2 G) -> (N, D, G, G), and its mean."""

    map_layer = "patches"

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.patches(x).mean(dim=(2, 3))
        return out


def made(seed: int = 0, grid: int = 0, **options: Any) -> DenseCL:
    torch.manual_seed(seed)
    encoder = DenseEncoder(Patches(), nn.Linear(D, C, bias=False), nn.Linear(D, C, bias=False), grid).double()
    mask = options.pop("mask", True)
    queues = [KeyQueue(K, C, mask_own_keys=mask).double() for _ in range(2)]
    method = DenseCL(encoder, queues[0], queues[1], T, WEIGHT, **options)
    for parameter in method.momentum_encoder.parameters():  # another network than f_q
        parameter.data += 0.2 * torch.randn_like(parameter)
    for queue in queues:
        queue.index[:3] = torch.tensor([0, 3, 3])  # older keys of images of the batch
    return method


def images(seed: int, size: int = 2 * G) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]


def some_places(seed: int = 0) -> Tensor:
    """Crops of 40 to 100 % of each side, some mirrored, (2, N, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.eye(3, dtype=torch.float64).repeat(2, N, 1, 1)
    side = 0.4 + 0.6 * torch.rand(2, N, 2, generator=generator, dtype=torch.float64)
    start = (1 - side) * torch.rand(2, N, 2, generator=generator, dtype=torch.float64)
    mirrored = torch.rand(2, N, generator=generator) < 0.5
    places[:, :, 0, 0], places[:, :, 1, 1] = torch.where(mirrored, -side[..., 0], side[..., 0]), side[..., 1]
    places[:, :, 0, 2], places[:, :, 1, 2] = start[..., 0] + mirrored * side[..., 0], start[..., 1]
    places[1, 0, :2, 2] += 5  # no overlap: an image without any match
    return places


def unit(x: Array) -> Array:
    return x / math.sqrt(float(x @ x))


def cells_of(image: Array, kernel: Array) -> list[Array]:
    """Return the features of the cells of an image (3, 2 G, 2 G), row by row."""
    found = []
    for row in range(G):
        for column in range(G):
            patch = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            found.append(np.array([float((patch * each).sum()) for each in kernel]))
    return found


def nce(q: Array, k: Array, queue: Array, of_queue: list[int], sample: int) -> float:
    logits = [float(q @ k) / T]
    logits += [float(q @ key) / T for key, shown in zip(queue, of_queue, strict=True) if shown != sample]
    return math.log(sum(math.exp(each) for each in logits)) - logits[0]


def reference(method: DenseCL, weights: list[Array], x: list[Array], match: list[list[int]] | None) -> float:
    """Return (1 - lambda) L_q + lambda L_r, one query at a time; `weights` are kernel, head and dense head of f_q."""
    kernel, head, dense_head = weights
    key_kernel, key_head, key_dense_head = (p.detach().numpy() for p in method.momentum_encoder.parameters())
    queue, dense_queue = method.queue.keys.numpy(), method.dense_queue.keys.numpy()
    shown = method.queue.index.tolist()
    total, dense_total, count = 0.0, 0.0, 0
    for i in range(N):
        features, key_features = cells_of(x[0][i], kernel), cells_of(x[1][i], key_kernel)
        q, k = unit(head @ (sum(features) / P)), unit(key_head @ (sum(key_features) / P))
        total += nce(q, k, queue, shown, i)
        for cell in range(P):
            if match is None:
                best = max(range(P), key=lambda other: float(unit(features[cell]) @ unit(key_features[other])))
            else:
                best = match[i][cell]
            if best < 0:
                continue
            r, t = unit(dense_head @ features[cell]), unit(key_dense_head @ key_features[best])
            dense_total += nce(r, t, dense_queue, shown, i)
            count += 1
    return (1 - WEIGHT) * total / N + WEIGHT * dense_total / count


def matches(places: Tensor) -> list[list[int]]:
    """Return the key's cell for each cell of each query, or -1."""
    found = []
    for query, key in zip(*places, strict=True):
        back, row_of = torch.linalg.inv(key), []
        for cell in range(P):
            row, column = divmod(cell, G)
            point = torch.tensor([(column + 0.5) / G, (row + 0.5) / G, 1.0], dtype=torch.float64)
            x, y, _ = (back @ (query @ point)).tolist()
            row_of.append(int(y * G) * G + int(x * G) if 0 <= x < 1 and 0 <= y < 1 else -1)
        found.append(row_of)
    return found


def step(method: DenseCL, number: int, accumulate: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(method.encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    places = some_places(number) if method.by_crops else None
    batch = Batch(torch.arange(N), images(number), places)
    shuffles = [np.random.default_rng(number).permutation(N) for _ in range(2)]
    return train_step(method, method, optimizer, scaler, batch, shuffles, StepSettings(0.1, 0.9, accumulate))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("by_crops", [False, True])
def test_loss_and_gradient_equal_the_loops_for_any_number_of_micro_batches(by_crops: bool, accumulate: int) -> None:
    method = made(by_crops=by_crops)
    before = copy.deepcopy(method)
    weights = [p.detach().numpy().copy() for p in method.encoder.parameters()]
    x = [view.numpy() for view in images(0)]
    match = matches(some_places()) if by_crops else None
    measures = step(method, 0, accumulate)
    assert measures["loss"].item() == pytest.approx(reference(before, weights, x, match), rel=1e-6)
    if match is not None:
        shares = [sum(each >= 0 for each in of_image) / P for of_image in match]
        assert measures["matched_cells"].item() == pytest.approx(sum(shares) / N)
        assert shares[0] == 0 < max(shares)
    for at, parameter in enumerate(method.encoder.parameters()):
        expected = np.zeros_like(weights[at])
        for entry in np.ndindex(*expected.shape):
            values = []
            for sign in (1, -1):
                changed = [each.copy() for each in weights]
                changed[at][entry] += sign * 1e-6
                values.append(reference(before, changed, x, match))
            expected[entry] = (values[0] - values[1]) / 2e-6
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-4, atol=1e-7)
        assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("by_crops", [False, True])
def test_the_queues_take_the_keys_of_images_and_the_mean_keys_of_their_cells_after_the_step(by_crops: bool) -> None:
    method = made(by_crops=by_crops)
    with torch.no_grad():
        embedding, cells, _ = method.momentum_encoder(images(0)[1], dense=True)
    step(method, 0)
    torch.testing.assert_close(method.queue.keys[:N], nn.functional.normalize(embedding, dim=1))
    torch.testing.assert_close(method.dense_queue.keys[:N], nn.functional.normalize(cells.mean(dim=1), dim=1))
    for queue in (method.queue, method.dense_queue):
        assert queue.index[:N].tolist() == list(range(N))
        assert int(queue.count) == N


@pytest.mark.parametrize("by_crops", [False, True])
def test_equal_views_and_networks_match_each_cell_with_itself(by_crops: bool) -> None:
    method = made(by_crops=by_crops)
    method.momentum_encoder.load_state_dict(method.encoder.state_dict())
    x = images(0)[0]
    places = torch.eye(3, dtype=torch.float64).repeat(2, N, 1, 1)
    keys = method.encode_keys([x, x], None, N, **({"places": places} if by_crops else {}))
    output: Output = method([x, x], keys, torch.arange(N))
    for name in ("dense_similarity", "positive_similarity", "matched_cells", "contrast_accuracy", "dense_accuracy"):
        assert output.measures[name].item() == pytest.approx(1, abs=1e-6), name


def test_a_mirrored_key_with_mirrored_places_has_the_same_loss() -> None:
    """The kernel is the same for all pixels of a patch, so that the features of a mirrored view are mirrored."""
    method = made(by_crops=True)
    for network in (method.encoder, method.momentum_encoder):
        kernel = network.get_parameter("backbone.patches.weight")
        kernel.data = kernel.data.mean(dim=(2, 3), keepdim=True).expand_as(kernel).clone()
    views, places = images(0), some_places()
    mirror = torch.tensor([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    mirrored = torch.stack([places[0], places[1] @ mirror])
    index = torch.arange(N)
    one = method(views, method.encode_keys(views, places=places), index).loss
    flipped = [views[0], views[1].flip(3)]
    torch.testing.assert_close(method(flipped, method.encode_keys(flipped, places=mirrored), index).loss, one)
    other = method(flipped, method.encode_keys(flipped, places=places), index).loss
    assert (other - one).abs() > 1e-4


def test_uniform_logits_have_the_loss_of_chance() -> None:
    """Heads that return one vector for all: log(1 + K) for both losses."""
    method = made(mask=False)
    for network in (method.encoder, method.momentum_encoder):
        for name, parameter in network.named_parameters():
            parameter.data.fill_(1.0 if "head" in name else 0.1)
    for queue in (method.queue, method.dense_queue):
        queue.load(torch.ones(K, C, dtype=torch.float64))
    views = [view.abs() for view in images(0)]
    output: Output = method(views, method.encode_keys(views), torch.arange(N))
    for value in (output.loss, *(output.measures[name] for name in ("global_loss", "dense_loss", "chance"))):
        assert value.item() == pytest.approx(math.log(1 + K))
    assert output.measures["dense_accuracy"] == 0


def test_the_weight_of_the_cells_starts_after_the_warm_up() -> None:
    method, views = made(dense_warmup_steps=2), images(0)
    keys = method.encode_keys(views)
    for number, weight in ((0, 0.0), (1, 0.0), (2, WEIGHT), (9, WEIGHT)):
        method.step = number
        output: Output = method(views, keys, torch.arange(N))
        parts = [output.measures[name].item() for name in ("global_loss", "dense_loss")]
        assert output.loss.item() == pytest.approx((1 - weight) * parts[0] + weight * parts[1])


def test_a_grid_pools_the_map_before_cells_are_matched_and_projected() -> None:
    method, x = made(grid=2), images(0, size=8)[0]
    embedding, cells, features = method.encoder(x, dense=True)
    pooled = nn.functional.avg_pool2d(method.encoder.get_submodule("backbone.patches")(x), 2)
    torch.testing.assert_close(features, pooled.flatten(2).transpose(1, 2))
    torch.testing.assert_close(cells, method.encoder.get_submodule("dense_head")(features))
    assert torch.equal(embedding, method.encoder(x))


@pytest.mark.parametrize("by_crops", [False, True])
def test_a_resumed_run_continues_bit_for_bit(by_crops: bool) -> None:
    first, second = made(by_crops=by_crops), made(seed=1, by_crops=by_crops)
    optimizers = [torch.optim.SGD(each.encoder.parameters(), lr=0.1, momentum=0.9) for each in (first, second)]
    step(first, 0, optimizer=optimizers[0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in (1, 2):
        one, other = step(first, number, 2, optimizers[0]), step(second, number, 2, optimizers[1])
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_losses_are_float32_and_close(dtype: torch.dtype) -> None:
    method, views = made().float(), [view.float() for view in images(0)]
    index = torch.arange(N)
    exact = method(views, method.encode_keys(views), index)
    with torch.autocast("cpu", dtype):
        half = method(views, method.encode_keys(views), index)
    assert half.loss.dtype == half.new_keys.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.05, atol=0)


def config_of(**fields: Any) -> TrainConfig:
    config = TrainConfig(method=DenseCLConfig(queue_size=64, **fields), batch_size=32)
    config.model.backbone, config.augment.size = "convnet", 16
    return config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augment.views", 3, r"augment\.views=3 must be 2 for densecl"),
        ("model.head_norm", True, r"model\.head_norm=true does not fit densecl"),
        ("method.dense_weight", 1.5, r"method\.dense_weight=1\.5 must be at least 0 and at most 1"),
        ("method.correspondence", "nearest", r"method\.correspondence='nearest' must be one of similarity, crops"),
        ("method.temperature_schedule", "learned", r"must be one of constant, cosine for densecl"),
        ("model.predictor_layers", 2, r"densecl has no predictor"),
    ],
)
def test_invalid_values_are_refused(field: str, value: Any, message: str) -> None:
    config = config_of()
    check(config)
    *group, name = field.split(".")
    setattr(getattr(config, group[0]), name, value)
    with pytest.raises(ConfigError, match=message):
        check(config)
    with pytest.raises(ConfigError, match=r"dense_warmup_steps=5 has no effect with method\.dense_weight=0"):
        check(config_of(dense_weight=0.0, dense_warmup_steps=5))


@pytest.mark.parametrize(
    ("size", "grid", "message"),
    [(16, 5, r"method\.grid=5 and augment\.size=16: .* has 4 x 4 cells"), (4, 0, r"augment\.size=4: .* has 1 x 1")],
)
def test_a_map_with_too_few_cells_is_refused(size: int, grid: int, message: str) -> None:
    config = config_of(grid=grid)
    config.augment.size = size
    with pytest.raises(ConfigError, match=message):
        build_method(config)


@pytest.mark.parametrize("correspondence", ["similarity", "crops"])
def test_the_configuration_decides_how_cells_are_matched(correspondence: str) -> None:
    config = config_of(correspondence=correspondence)
    assert config.method.uses_places == (correspondence == "crops")
    method = build_method(config)
    assert method.by_crops == config.method.uses_places
    assert (method.queue.size, method.dense_queue.size, method.dense_weight) == (64, 64, 0.5)
