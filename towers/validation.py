"""What the validation side asks: queries, what was chosen, and the blocks they are ranked in.

Legend: Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recsys.features.batching.batch import Queries
from recsys.features.prepared.timeline import Timeline
from recsys.metrics import auc
from recsys.ragged import Ragged
from recsys.search import best_scores
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.two_tower import TwoTower


@dataclass(frozen=True)
class Validation:
    """Queries of the validation side and what each went on to choose.

    Args:
        queries: who asked; each at its own time or all at the cut-off.
        targets: item rows chosen.
        seen: item rows never to be answered, or None when repeats are allowed.
        timeline: from which item statistics are taken.
        moments: (Q,) moment of each query's item statistics, non-decreasing; None without clock.
        shown: lists to be put in order, where their AUC picks the epoch.
    """

    queries: Queries
    targets: Ragged
    seen: Ragged | None
    timeline: Timeline
    moments: np.ndarray | None
    shown: ShownLists | None = None

    def blocks(self, size: int = 4096) -> Iterator[tuple[np.ndarray, int | None]]:
        """Query rows that share a moment, at most `size` at once, and the moment."""
        everyone = np.arange(len(self.queries))
        groups: list[np.ndarray] = [everyone]
        moments: list[int | None] = [None]
        if self.moments is not None:
            distinct, first = np.unique(self.moments, return_index=True)
            groups, moments = np.split(everyone, first[1:]), [int(m) for m in distinct]
        for rows, moment in zip(groups, moments, strict=True):
            for start in range(0, len(rows), size):
                yield rows[start : start + size], moment


@dataclass(frozen=True)
class ShownLists:
    """Lists shown on the validation side that hold something clicked and something not.

    Args:
        queries: (Q,) who was shown each.
        items: Q ragged item rows shown.
        clicked: (T,) bool beside `items.values`.
        timeline: from which item statistics are taken.
        moments: (Q,) moment of each list's item statistics, non-decreasing.
    """

    queries: Queries
    items: Ragged
    clicked: np.ndarray
    timeline: Timeline
    moments: np.ndarray

    def auc(self, model: TwoTower) -> np.ndarray:
        """(Q,) AUC of each list as the towers order it."""
        scores = np.empty(len(self.items.values), np.float32)
        distinct, first = np.unique(self.moments, return_index=True)
        ends = np.append(first[1:], len(self.moments))
        for moment, low, high in zip(distinct.tolist(), first, ends, strict=True):
            part = np.arange(low, high)
            users = encode_users(model, self.queries.take(part), self.timeline, moment)
            items = self.items.take(part)
            rows, place = np.unique(items.values, return_inverse=True)
            vectors = encode_items(model, rows.astype(np.int64), self.timeline, moment)
            start, end = self.items.offsets[low], self.items.offsets[high]
            scores[start:end] = best_scores(users[items.row_of()], vectors[place.reshape(-1)])
        return auc(scores, self.clicked, self.items.offsets)


@dataclass(frozen=True)
class ValidationBlock:
    """Rows of a `Validation` that share a moment."""

    validation: Validation
    rows: np.ndarray
    moment: int | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ValidationBlock:
        """Nothing to move: blocks are made of row numbers."""
        return self


class Blocks:
    """The validation blocks as a loader with a length."""

    def __init__(self, validation: Validation) -> None:
        self._blocks = [ValidationBlock(validation, *block) for block in validation.blocks()]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[ValidationBlock]:
        return iter(self._blocks)
