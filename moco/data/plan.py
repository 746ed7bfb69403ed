"""The order of the samples, and the samples of each step of training.

The order is a function of (seed, epoch) and does not depend on the number of processes (laws 2 and 3 of
CONTRIBUTING.md): step s of an epoch uses the samples s * B ... (s + 1) * B - 1 of that epoch's permutation, and rank r
uses the r-th part of these B samples. So a run can resume at any step, on any number of processes.

An epoch can draw an image several times. Each repetition is a sample of its own, with its own random numbers and so
with other views: sample i is image i % N, repetition i // N, of a data set with N images.

Legend: B global batch, n = B / W samples per rank, W processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moco.data.keyed import ORDER, PARTS, SHUFFLE, permutation


@dataclass(frozen=True)
class Plan:
    """The samples of each step: a function of these fields and the step."""

    length: int  # images in the data set, N
    batch_size: int  # B
    epochs: int
    seed: int
    rank: int = 0
    processes: int = 1  # W
    draws: tuple[tuple[int, int], ...] = ()  # see `Source`

    @property
    def samples_per_epoch(self) -> int:
        """Samples in the order of an epoch, including an incomplete last batch, which is not used."""
        return sum(draws for _, draws in self.draws) if self.draws else self.length

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; the rest of the permutation is dropped, as in the official code."""
        return self.samples_per_epoch // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def share(self) -> int:
        """Samples per rank and step, n."""
        return self.batch_size // self.processes

    def samples(self, start: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (epoch, this rank's sample indices (n,)) for each step from `start` to the end of training."""
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self._order(epoch)
            first = position * self.batch_size + self.rank * self.share
            yield epoch, order[first : first + self.share]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in their order, (samples_per_epoch,).

        If `draws` takes k samples from a part of M images, each image is drawn floor(k / M) times, and k mod M random
        images once more.
        """
        order = permutation(self.seed, epoch, self.samples_per_epoch, ORDER)
        if not self.draws:
            return order
        samples, first = list[NDArray[np.int64]](), 0
        for part, (images, draws) in enumerate(self.draws):
            repetitions, rest = divmod(draws, images)
            chosen = np.sort(permutation(self.seed, epoch, images, PARTS + part)[:rest])
            samples += [first + np.arange(images) + self.length * repetition for repetition in range(repetitions)]
            samples.append(first + chosen + self.length * repetitions)
            first += images
        return np.concatenate(samples)[order]

    def shuffles(self, step: int, views: int) -> list[NDArray[np.int64]]:
        """Return, for each view, the permutation in which the key encoder sees the global batch (shuffling BN)."""
        return [permutation(self.seed, step, self.batch_size, SHUFFLE + view) for view in range(views)]
