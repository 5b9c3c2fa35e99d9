"""Which images come when, and every random number of a step: functions of the seed and the step alone.

Nothing is drawn from a generator that lives on. So a run that was cut short goes on as if it had not been, and several
processes that each take their part of a batch do what one process does with the whole of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def seed_of(*parts: int) -> int:
    """A seed for one purpose, from whole numbers; other numbers give an independent one."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 1, epoch)))


@dataclass(frozen=True)
class BatchSampler:
    """The order in which examples are learned from: shuffled anew for each epoch, without end.

    Attributes:
        seed: seed of the order and of all draws.
        groups: number of rows in each group of the data set, as (images,) or (instance images, class images); a batch
            takes `batch` from each.
        batch: images a process takes from each group at a time.
        process, processes: this process's number, and how many there are.
        repeats: times that a row of the first group counts in an epoch.
    """

    seed: int
    groups: tuple[int, ...]
    batch: int
    process: int = 0
    processes: int = 1
    repeats: int = 1

    @property
    def epoch(self) -> int:
        """Examples in an epoch: as many as the largest group has."""
        return max(self.groups[0] * self.repeats, *self.groups)

    @property
    def batches(self) -> int:
        """Batches in an epoch, the last one filled up from the next."""
        return -(-self.epoch // (self.batch * self.processes))

    def rows(self, number: int) -> Tensor:
        """The data set's rows in batch `number`, this process's part: `batch` of the first group, then of the next."""
        first = (number * self.processes + self.process) * self.batch
        places = [
            _permutation(self.seed, place // self.epoch, self.epoch)[place % self.epoch]
            for place in range(first, first + self.batch)
        ]
        starts = np.cumsum((0, *self.groups[:-1]))
        return torch.cat(
            [
                torch.stack(places) % size + start
                for start, size in zip(starts, self.groups, strict=True)
            ]
        )

    def rng(self, number: int, purpose: int) -> "Rng":
        """The random numbers of batch `number`, for one purpose."""
        return Rng(torch.Generator().manual_seed(seed_of(self.seed, 2, purpose, number)), self)


@dataclass
class Rng:
    """Random numbers for the rows of a batch: drawn for all processes, this one's part returned."""

    generator: torch.Generator
    order: BatchSampler

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape)."""
        return self._mine(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1, (rows, *shape)."""
        return self._mine(torch.rand, shape)

    def integers(self, stop: int) -> Tensor:
        """Whole numbers from 0 to `stop`, without it, (rows,)."""
        return self._mine(
            lambda shape, generator: torch.randint(stop, shape, generator=generator), ()
        )

    def _mine(self, draw, shape: tuple[int, ...]) -> Tensor:
        order = self.order
        drawn = draw(
            (len(order.groups), order.processes, order.batch, *shape), generator=self.generator
        )
        return drawn[:, order.process].flatten(0, 1)


@dataclass(frozen=True)
class BatchIndex:
    """A batch before it is read: rows, which are mirrored (0 or 1), and where they are cropped (0 to 1, twice)."""

    number: int
    rows: Tensor
    flips: Tensor
    places: Tensor


class Batches(Sampler):
    """The batches from one number to another, for a DataLoader."""

    def __init__(self, order: BatchSampler, start: int, stop: int, random_flip: bool):
        self.order, self.numbers, self.random_flip = order, range(start, stop), random_flip

    def __len__(self):
        return len(self.numbers)

    def __iter__(self) -> Iterator[BatchIndex]:
        for number in self.numbers:
            draws = self.order.rng(number, purpose=0)
            yield BatchIndex(
                number,
                self.order.rows(number),
                draws.integers(2) * self.random_flip,
                draws.uniform(2),
            )
