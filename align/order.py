"""One global order of rows, an epoch at a time, that goes on exactly where it stood."""

from collections.abc import Mapping
from typing import TypeVar

import torch

from align.errors import UserError

T = TypeVar("T")


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation of the global row numbers, the same for any number of processes."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator).tolist()


def evenly(rows: list[T], count: int) -> list[T]:
    """`count` rows, evenly spaced over the file, so that every source in it has its share; all when 0."""
    count = min(count, len(rows)) or len(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


class Cursor:
    """An endless walk over rows, reshuffled each epoch, that continues from its `state` exactly where it stood."""

    def __init__(self, num_rows: int, seed: int, position: int = 0):
        if num_rows < 1:
            raise UserError("the data set has no rows: give a file that has some")
        self.num_rows, self.seed, self.position = num_rows, seed, position  # position counts over all epochs
        self._order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> int:
        return self.position // self.num_rows

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers; they may span epochs."""
        taken: list[int] = []
        while len(taken) < count:
            if self._order is None or self._order[0] != self.epoch:
                self._order = (self.epoch, epoch_order(self.num_rows, self.seed, self.epoch))
            start = self.position % self.num_rows
            part = self._order[1][start : start + count - len(taken)]
            taken += part
            self.position += len(part)
        return taken

    def state(self) -> dict[str, int]:
        return {"num_rows": self.num_rows, "seed": self.seed, "position": self.position}

    def load(self, state: Mapping[str, int]) -> None:
        """Raises UserError when the data set no longer has the rows that the state was saved with."""
        if self.num_rows != state["num_rows"]:
            what = f"the data set has {self.num_rows} rows, the checkpoint was written with {state['num_rows']}"
            raise UserError(f"{what}: resume with the same data and filters")
        self.seed, self.position = state["seed"], state["position"]
