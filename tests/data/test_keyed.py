"""Keyed randomness: known answers, uniformity, independence."""

import numpy as np
import pytest
from scipy import stats

from moco.data.keyed import keyed_uniform, permutation, philox

# The known-answer file of Random123, the authors' implementation: key, counter, output.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "output"), KNOWN)
def test_philox_known_answers(
    key: tuple[int, int], counter: tuple[int, int, int, int], output: tuple[int, ...]
) -> None:
    assert philox(key, counter).tolist() == list(output)


def test_philox_is_vectorized_over_counters() -> None:
    words = philox((1, 2), (np.arange(5), 3, np.arange(7)[:, None], 4))  # (7, 5, 4)
    assert words.shape == (7, 5, 4)
    assert words[6, 2].tolist() == philox((1, 2), (2, 3, 6, 4)).tolist()


def test_uniform() -> None:
    numbers = keyed_uniform(0, 0, np.arange(2_000), 0, 10)
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert np.array_equal(numbers * 2**24, np.floor(numbers * 2**24))
    # Neighboring draws and neighboring samples are uncorrelated: |r| sqrt(n) is a standard normal.
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size) < 3.5


def test_a_number_does_not_depend_on_the_other_numbers_or_samples() -> None:
    full = keyed_uniform(7, 3, np.arange(100), 1, 50)
    assert np.array_equal(full[:, :13], keyed_uniform(7, 3, np.arange(100), 1, 13))
    assert np.array_equal(full[[80, 3]], keyed_uniform(7, 3, [80, 3], 1, 50))


@pytest.mark.parametrize("other", [(8, 3, 1), (7, 4, 1), (7, 3, 2), (7 + 2**32, 3, 1)])
def test_every_part_of_the_key_counts(other: tuple[int, int, int]) -> None:
    seed, epoch, stream = other
    a, b = keyed_uniform(7, 3, np.arange(1_000), 1, 4), keyed_uniform(seed, epoch, np.arange(1_000), stream, 4)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size) < 3.5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refuses_a_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        keyed_uniform(seed, 0, [0], 0, 1)


@pytest.mark.parametrize("length", [0, 1, 2, 1_000])
def test_permutation_is_a_permutation(length: int) -> None:
    assert np.array_equal(np.sort(permutation(0, 0, length, 1_000)), np.arange(length))


def test_permutation_differs_by_epoch_and_is_uniform() -> None:
    orders = np.array([permutation(0, epoch, 3, 1_000) for epoch in range(1_200)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    assert not np.array_equal(permutation(0, 0, 100, 1_000), permutation(0, 1, 100, 1_000))
    assert np.array_equal(permutation(0, 1, 100, 1_000), permutation(0, 1, 100, 1_000))
