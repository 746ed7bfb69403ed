"""Random numbers without state: each is a function of the five integers that identify it (law 2 of CONTRIBUTING.md).

The generator is Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), a bijection on
128-bit counters: it needs no state, vectorizes over a batch, and returns the same bits on every machine. A number is
identified by

    (seed, epoch, sample index, stream, draw)

where `stream` is the number of a view, or stands for another use of random numbers, such as the order of the samples.

Legend: N samples, D draws per sample.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Streams 0, 1, 2, ... are the views of a sample; all others are listed here, so that no two uses share numbers.
ORDER = 1_000  # the order of the samples in an epoch
SHUFFLE = 1_001  # the shuffle of the batch for MoCo's key encoder; one stream per view: SHUFFLE + view
MIX = 2_000  # mixed negatives, by step and position in the batch; one stream per view of the query: MIX + view
SPLIT = 3_000  # the held-out images of the digits data set
BANK = 3_001  # the images that a limited kNN reference set keeps
HOLD_OUT = 3_002  # the labeled images that an evaluation holds out
VALIDATION = 3_003  # the labeled images for selecting hyperparameters (learning rate, k)
FEW_LABELS = 3_004  # the labeled images for fine-tuning, or for a probe, with few labels
SEARCH = 3_010  # the query images of a search
REPORT = 3_011  # the images in a report
SUBSTITUTE = 3_020  # the substitutes of an unreadable image
SHARDS = 3_030  # the order in which a pass over a streamed data set reads its shards
STEPS = 4_000  # augmentation steps of plug-ins; one stream per view: STEPS + view
CHANNELS = 4_500  # numbers for each channel of a view; one stream per view: CHANNELS + view
MIXING = 5_000  # the shuffling of a streamed data set in a worker's buffer; one stream per worker: MIXING + worker
PARTS = 6_000  # the images that an epoch draws from a part of the data set; one stream per part: PARTS + part
EPISODES = 7_000  # the classes of a few-shot episode; the images of its n-th class: EPISODES + 1 + n
BOX_SAMPLES = 8_000  # the boxes of an image that a detector samples for its loss
DRAW_LABELS = 10_000  # the labeled images drawn for kNN, or to split a data set; one stream per draw

# The constants of Philox-4x32: multipliers, and the numbers that are added to the key after each round.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]) -> NDArray[np.uint64]:
    """Compute Philox-4x32-10: four 32-bit words for each counter, shape (..., 4).

    Args:
        key: the generator's key, two 32-bit words.
        counter: four arrays of 32-bit words; they broadcast against each other.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def _philox_key(seed: int) -> tuple[int, int]:
    """Split the seed into the generator's key: two 32-bit words."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must lie in 0 ... 2**64 - 1")
    return seed & 0xFFFFFFFF, seed >> 32


def keyed_uniform(seed: int, epoch: int, index: ArrayLike, stream: int, draws: int) -> NDArray[np.float32]:
    """Return uniform numbers in [0, 1), one row per sample.

    Args:
        seed: 0 <= seed < 2**64.
        epoch: 0-based.
        index: sample indices, shape (N,), each below 2**32.
        stream: the view, or one of the named streams of this module.
        draws: D, the numbers per sample. Number d does not depend on D.

    Returns:
        Shape (N, D), multiples of 2^-24, exact in float32, so equal on every device.

    Raises:
        ValueError: if the seed is negative or does not fit in 64 bits.
    """
    rows = np.asarray(index, dtype=np.uint64).reshape(-1, 1)  # (N, 1)
    blocks = np.arange(-(-draws // 4), dtype=np.uint64)  # (ceil(D / 4),)
    words = philox(_philox_key(seed), (blocks, stream, rows, epoch))  # (N, ceil(D / 4), 4)
    words = words.reshape(len(rows), 4 * len(blocks))[:, :draws]  # (N, D)
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def permutation(seed: int, epoch: int, length: int, stream: int) -> NDArray[np.int64]:
    """Return a random order of `length` items, shape (length,); it depends on the arguments only.

    The items are sorted by random 64-bit numbers. Items with equal numbers (probability below length^2 / 2^65) keep
    their order. Raises a ValueError if the seed is negative or does not fit in 64 bits.
    """
    words = philox(_philox_key(seed), (0, stream, np.arange(length, dtype=np.uint64), epoch))
    return np.argsort(words[:, 0] << _32 | words[:, 1], kind="stable")


def step_seed(seed: int, number: int) -> int:
    """Return the `number`-th seed for torch's own generator, below 2**63.

    Each use in a run needs a `number` of its own.
    """
    return (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**63  # 2**64 / golden ratio: multiples are far apart
