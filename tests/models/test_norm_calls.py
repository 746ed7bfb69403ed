"""Several calls of BN in groups per step: views, micro-batches, evaluation in between, untracked calls."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from moco.models.norm import BatchNormKind, GroupedBatchNorm, convert_batch_norm, set_calls_per_step, untracked
from tests.models.norm_layers import GROUP, C, N, close, grouped, images, of, official

pytestmark = pytest.mark.usefixtures("norm_devices")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("view_by_view", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_move_the_statistics_as_calls_of_batch_norm(
    views: int, micro_batches: int, view_by_view: bool, compiled: bool
) -> None:
    """One call of torch's BN per view, with the mean over the view's groups; whatever the order of the calls."""
    ours = grouped(official())
    set_calls_per_step(ours, views, micro_batches, view_by_view)
    call = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    expected = {name: of(ours, name).clone() for name in ("running_mean", "running_var")}
    for step in range(3):
        batches = [images(10 * step + view) for view in range(views)]
        for x in batches:
            each = [official() for _ in range(N // GROUP)]
            for layer, group in zip(each, x.split(GROUP), strict=True):
                layer.load_state_dict(expected | {"num_batches_tracked": torch.tensor(0)}, strict=False)
                layer(group)
            expected = {name: torch.stack([of(layer, name) for layer in each]).mean(dim=0) for name in expected}
        calls = [(view, part) for view in range(views) for part in range(micro_batches)]
        for view, part in calls if view_by_view else sorted(calls, key=lambda each: each[1]):
            call(batches[view].split(N // micro_batches)[part])
        for name, value in expected.items():
            torch.testing.assert_close(of(ours, name), value, rtol=1e-5, atol=1e-6)
        assert of(ours, "num_batches_tracked").item() == views * (step + 1)
    torch.compiler.reset()


@pytest.mark.parametrize("calls", [1, 3])
def test_micro_batches_equal_one_call(calls: int) -> None:
    global_batch, parts = grouped(official()), grouped(official())
    set_calls_per_step(parts, 1, calls)
    for seed in range(3):
        expected = global_batch(images(seed))
        out = torch.cat([parts(part) for part in images(seed).split(N // calls)])
        torch.testing.assert_close(out, expected)
        close(parts, global_batch)
    assert of(parts, "num_batches_tracked").item() == 3


def test_evaluation_between_steps_does_not_change_the_count() -> None:
    global_batch, parts = grouped(official()), grouped(official())
    set_calls_per_step(parts, 1, 2)
    for seed in range(2):
        global_batch(images(seed))
        for part in (images(seed)[:8], images(seed)[8:]):
            parts(part)
        parts.eval()
        parts(images(7, 3))
        parts.train()
    # groups 8 and 4: the calls have equal weight, so only the count is the same
    assert torch.equal(of(parts, "num_batches_tracked"), of(global_batch, "num_batches_tracked"))
    assert parts.call == 0


def test_set_calls_reaches_every_layer() -> None:
    network = convert_batch_norm(torchvision.models.resnet18(weights=None), "grouped", 2)
    set_calls_per_step(network, 2, 3)
    calls = [(layer.views, layer.micro_batches) for layer in network.modules() if isinstance(layer, GroupedBatchNorm)]
    assert calls == [(2, 3)] * 20


def test_the_calls_of_a_network_are_counted_in_every_layer() -> None:
    network = convert_batch_norm(nn.Sequential(official(), nn.ReLU(), official()), "grouped", GROUP)
    network(images(0))  # before anything is set, each layer counts its own calls
    set_calls_per_step(network, 2, 3)
    copied = copy.deepcopy(network)  # counts for itself
    for each in [network] * 6 + [copied] * 12:
        each(images(0))
    for of_network, steps in ((network, 1), (copied, 2)):
        counts = [x for name, x in of_network.state_dict().items() if name.endswith("num_batches_tracked")]
        assert counts == [1 + 2 * steps] * 2


@pytest.mark.parametrize("kind", ["grouped", "sync", "batch"])
def test_untracked_calls_change_nothing(kind: BatchNormKind) -> None:
    """Statistics, counters and the count of calls are the same bits: in the middle of a step, and after an error."""
    network = convert_batch_norm(nn.Sequential(official(), nn.ReLU(), official(0.3)), kind, GROUP)
    network.add_module("plain", nn.BatchNorm2d(C, track_running_stats=False))  # nothing to keep
    set_calls_per_step(network, 1, 3)
    network(images(0))  # a step of three calls has begun
    before = {name: x.clone() for name, x in network.state_dict().items()}
    calls = [layer.call for layer in network.modules() if isinstance(layer, GroupedBatchNorm)]
    assert calls == ([] if kind == "batch" else [1, 1])
    with untracked(network):
        out = network(images(1))
        assert not torch.equal(network.state_dict()["0.running_mean"], before["0.running_mean"])
    network.add_module("last", nn.Linear(7, 7))  # does not fit
    with pytest.raises(RuntimeError), untracked(network):
        network(images(2))
    del network.last
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert [layer.call for layer in network.modules() if isinstance(layer, GroupedBatchNorm)] == calls
    torch.testing.assert_close(network(images(1)), out, rtol=0, atol=0)  # training mode: the batch's own statistics
