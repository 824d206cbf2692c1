"""Which examples each rank trains on in each step: a pure function of seed, epoch and step.

The number of ranks does not change the order: a step's global batch is a slice of the epoch's
permutation, and each rank takes a contiguous part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitfall.distributed import share

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class BatchPlan:
    """Sizes are in examples; train_batch_size = micro_batch_size * accumulation * world_size."""

    num_examples: int
    train_batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last, smaller batch of an epoch counts as a step."""
        return math.ceil(self.num_examples / self.train_batch_size)

    def total_steps(self, num_train_epochs: float, max_steps: int) -> int:
        """Optimizer steps of a run: `max_steps` if positive, else those of the epochs."""
        if max_steps > 0:
            return max_steps
        return math.ceil(num_train_epochs * self.steps_per_epoch)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Permutation of the examples in `epoch`.

        Sorts raw Philox numbers, whose stream is fixed for all versions of numpy (the methods of
        its Generator are not).
        """
        numbers = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_examples)
        return np.argsort(numbers, kind="stable")

    def micro_batches(
        self, order: npt.NDArray[np.int64], step_in_epoch: int, rank: int, world_size: int
    ) -> list[tuple[npt.NDArray[np.int64], range]]:
        """(examples, sample keys) of each micro-batch of `rank` in a step of the epoch.

        A sample key is the example's position in the global batch of the step. In the last step of
        an epoch the parts are smaller, and a rank may have none.
        """
        begin = step_in_epoch * self.train_batch_size
        size = min(self.train_batch_size, self.num_examples - begin)
        mine = share(size, rank, world_size)
        parts = []
        for first in range(mine.start, mine.stop, self.micro_batch_size):
            keys = range(first, min(first + self.micro_batch_size, mine.stop))
            parts.append((order[begin + keys.start : begin + keys.stop], keys))
        return parts
