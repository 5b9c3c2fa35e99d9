"""Which images come when, and every random number of a step: functions of the seed and the step.

No generator lives from one step to the next. So a run that was cut short goes on as if it had not
been, and several processes that each take their rows of a batch do what one does with all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """A seed for one purpose, from whole numbers; other numbers give an independent one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 1, epoch)))


@dataclass(frozen=True)
class BatchIndex:
    """A batch before it is read."""

    number: int  # since the start of training
    rows: Tensor  # of the data set, (rows,)
    flips: Tensor  # which are mirrored, 0 or 1, (rows,)
    crops: Tensor  # where they are cropped, 0 to 1 from the top and from the left, (rows, 2)

    def __iter__(self) -> Iterator[tuple[int, int, list[float]]]:
        """Row, flip and crop of each image."""
        return zip(self.rows.tolist(), self.flips.tolist(), self.crops.tolist(), strict=True)


@dataclass(frozen=True)
class BatchSampler:
    """The order in which images are learned from: shuffled anew for each epoch, without end."""

    seed: int  # of the order and of all random numbers
    groups: tuple[int, ...]  # rows in each: (images,) or (instance images, class images)
    batch: int  # images that a process takes from each group at a time
    process: int = 0
    processes: int = 1
    repeats: int = 1  # times that a row of the first group counts in an epoch

    @property
    def epoch(self) -> int:
        """Images in an epoch: as many as the largest group has."""
        return max(self.groups[0] * self.repeats, *self.groups)

    @property
    def batches(self) -> int:
        """Batches in an epoch, the last one filled up from the next."""
        return -(-self.epoch // (self.batch * self.processes))

    def rows(self, number: int) -> Tensor:
        """This process's rows of batch `number`: `batch` of the first group, then of the next."""
        first = (number * self.processes + self.process) * self.batch
        places = [divmod(place, self.epoch) for place in range(first, first + self.batch)]
        images = [_permutation(self.seed, epoch, self.epoch)[place] for epoch, place in places]
        positions, starts = torch.stack(images), np.cumsum((0, *self.groups)).tolist()
        return torch.cat(
            [positions % size + start for start, size in zip(starts, self.groups, strict=False)]
        )

    def rng(self, number: int, purpose: int) -> "Rng":
        """The random numbers of batch `number`, for one purpose."""
        return Rng(torch.Generator().manual_seed(seed_of(self.seed, 2, purpose, number)), self)

    def indices(self, start: int, stop: int, random_flip: bool) -> Iterator[BatchIndex]:
        """The batches from one number to another, as rows with their flips and crops."""
        for number in range(start, stop):
            rng = self.rng(number, purpose=0)
            flips = rng.integers(2) * random_flip
            yield BatchIndex(number, self.rows(number), flips, rng.uniform(2))


@dataclass
class Rng:
    """Random numbers for the rows of a batch: made for all processes, this one's returned."""

    generator: torch.Generator
    sampler: BatchSampler

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape)."""
        return self._own(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1, (rows, *shape)."""
        return self._own(torch.rand, shape)

    def integers(self, stop: int) -> Tensor:
        """Whole numbers from 0 to `stop`, without it, (rows,)."""
        return self._own(partial(torch.randint, stop), ())

    def _own(self, make: Callable, shape: tuple[int, ...]) -> Tensor:
        sampler = self.sampler
        size = (len(sampler.groups), sampler.processes, sampler.batch, *shape)
        return make(size, generator=self.generator)[:, sampler.process].flatten(0, 1)
