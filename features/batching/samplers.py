"""Samplers: an epoch divided into batches at random, or into windows of time.

A sampler deals in units, which are events or whole users, each once an epoch. Over several ranks
it deals global batches, the same on every rank from the same generator; each rank
takes an equal part of each, and what does not divide is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recsys.features.batching.slices import BatchSlice


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process makes.

    Raises:
        ValueError: the rank is none of the world's.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank}, but {self.world} ranks count from 0.")

    def of(self, units: np.ndarray) -> np.ndarray:
        """This rank's units of a global batch, as many on every rank."""
        if self.world == 1:
            return units
        each = len(units) // self.world
        return units[self.rank * each : (self.rank + 1) * each]


class Sampler(Protocol):
    """Divides every epoch into the same number of batches, as a trainer needs."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        """The slices of one epoch, in order; each is made when it is asked for."""
        ...


class Shuffled:
    """Units in random order, cut into batches; the last may be smaller.

    Args:
        units: (n,) what is dealt out, or the number of units when they are 0 … n-1.
        size: units of a batch, on each rank.
        share: the part of this process.
    """

    def __init__(self, units: np.ndarray | int, size: int, share: Share = Share()) -> None:
        self.units, self.size, self.share = units, size * share.world, share
        self.total = units if isinstance(units, int) else len(units)

    def __len__(self) -> int:
        whole, rest = divmod(self.total, self.size)
        return whole + (rest >= self.share.world)

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        order = rng.permutation(self.total)
        if not isinstance(self.units, int):
            order = self.units[order]
        edges = self.size * np.arange(len(self) + 1)
        return _Slices(order, edges[:-1], edges[1:], self.share)


class Windows:
    """Consecutive events form a batch; the order of the windows is random, and so is where the
    first one ends, so that they fall differently in each epoch.

    Args:
        time: (E,) microseconds of each event, in any order.
        size: most events of a window, on each rank.
        share: the part of this process.
        reach: events on either side of a window, in windows, from which sampling probabilities are
            estimated.
        units: (n,) events that are dealt out; None: all.
    """

    def __init__(
        self,
        time: np.ndarray,
        size: int,
        share: Share = Share(),
        reach: int = 4,
        units: np.ndarray | None = None,
    ) -> None:
        if units is None:
            units = np.arange(len(time))
        self.by_time = units[np.argsort(np.asarray(time)[units], kind="stable")]
        self.time = np.asarray(time)[self.by_time]
        self.size, self.share, self.reach = size * share.world, share, reach

    @property
    def total(self) -> int:
        """Events dealt out."""
        return len(self.time)

    def __len__(self) -> int:
        if self.total < self.share.world:
            return 0
        whole, rest = divmod(self.total, self.size)
        if self.total <= self.size or self.size == 1:
            return whole + (rest > 0)
        # The same in every epoch, as a trainer needs; the two outer windows share what the inner
        # ones leave, and of two possible numbers the one that lets the edges move further is taken.
        return whole + 1 + (2 * rest > self.size)

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        total, size = self.total, self.size
        if total > size > 1:
            inner = len(self) - 2
            outer = total - inner * size
            first = int(rng.integers(max(1, outer - size), min(size, outer - 1), endpoint=True))
            edges = np.concatenate([[0], first + size * np.arange(inner + 1), [total]])
        else:
            edges = np.append(np.arange(0, total, size), total)
        low, high = _settled(edges[:-1], edges[1:], len(self), self.share.world)
        order = rng.permutation(len(low))
        return _Slices(self.by_time, low[order], high[order], self.share, self)


def _settled(
    low: np.ndarray, high: np.ndarray, wanted: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """So many windows, each of at least so many events: the largest are halved, and where nothing
    can be halved any more, the largest come again.

    Raises:
        ValueError: there is no window of so many events.
    """
    if len(low) == wanted and least == 1:
        return low, high
    windows = [(int(a), int(b)) for a, b in zip(low, high, strict=True) if b - a >= least][:wanted]
    while windows and len(windows) < wanted:
        at = int(np.argmax([b - a for a, b in windows]))
        a, b = windows[at]
        if b - a >= 2 * least:
            middle = a + (b - a) // 2
            windows[at : at + 1] = [(a, middle), (middle, b)]
        else:
            windows.append((a, b))
    if not windows:
        raise ValueError(
            f"No window of time holds an event for each of the {least} ranks. Take a larger "
            "batch_size."
        )
    edges = np.array(windows, np.int64)
    return edges[:, 0], edges[:, 1]


class _Slices(Sequence[BatchSlice]):
    """Slices of an order, cut when they are asked for."""

    def __init__(
        self,
        order: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        share: Share,
        windows: Windows | None = None,
    ) -> None:
        self.order, self.low, self.high = order, low, high
        self.share, self.windows = share, windows

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, number: int) -> BatchSlice:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} batches, none at {number}.")
        low, high = int(self.low[number]), int(self.high[number])
        units = self.share.of(self.order[low:high])
        if self.windows is None:
            return BatchSlice(units)
        # The time is that of the whole window, so that all ranks share it.
        reach = self.windows.reach * self.windows.size
        return BatchSlice(
            units,
            nearby=self.order[max(0, low - reach) : high + reach],
            as_of=int(self.windows.time[low]),
        )
