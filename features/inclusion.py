"""How likely a column of the score matrix is there at all: what drawn negatives are corrected by.

Legend: C columns of a batch, candidates and queued ones; n draws of the plan, events or whole
users; N item rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from features.frequency import StreamingFrequency, exact_shares
from features.parts import Asked, Part, Reading
from features.timeline import Timeline


class Drawn(NamedTuple):
    """What a batch drew: (T,) item rows, repeats and all, by so many draws of the plan."""

    items: np.ndarray
    draws: int


class Inclusion:
    """Log probability that the draws of others, uniform draws and the queue hold an item.

    A column stands once however often it was drawn, so that the probability that it is there at
    all, not the expected count, is what has to be divided by (corrected logQ over all sources
    together; Khrylchenko et al., RecSys 2025): 1 - (1-p)^n · (1-1/pool)^m for n draws that bring
    the item in with probability p and m uniform ones. The query's own draw is none of the n.

    Args:
        timeline: the training side.
        reading: how a part becomes examples; a draw of whole users brings in all their targets.
        pool: number of rows that uniform negatives are drawn from.
        uniform: uniform draws of each batch.
        frequency: estimates p from the stream; None: counted beforehand.
    """

    def __init__(
        self,
        timeline: Timeline,
        reading: Reading,
        pool: int,
        uniform: int,
        frequency: StreamingFrequency | None,
    ) -> None:
        self.timeline, self.reading, self.pool, self.uniform = timeline, reading, pool, uniform
        self.frequency = frequency
        self._shares: np.ndarray | None = None
        if frequency is None:
            items, draws = timeline.item, None
            if reading.whole_users:
                asked = reading.ask(reading.units, np.random.default_rng(0))
                items = timeline.item[asked.events].astype(np.int64)
                draws = asked.query_users[asked.query_of(np.arange(len(items)))]
            self._shares = exact_shares(items, timeline.n_items, draws)

    def learn(self, asked: Asked, targets: np.ndarray, draws: int) -> None:
        """Let the streaming estimate see what a batch drew.

        Args:
            asked: the batch.
            targets: (B,) item row of each example.
            draws: n of the batch.
        """
        if self.frequency is None:
            return
        of_example = asked.query_of(np.arange(len(targets)))
        if asked.asker is not None:
            of_example = asked.asker[of_example]
        self.frequency.update(targets, of_example, draws)

    def log(self, columns: np.ndarray, part: Part, recent: Sequence[Drawn]) -> np.ndarray:
        """(C,) float32 log probability that each column is among the drawn negatives.

        Args:
            columns: (C,) item rows.
            part: what was drawn for the batch.
            recent: what the batches of the queue drew.
        """
        near = everywhere = self._share(columns)
        if self.frequency is None and part.around is not None:
            around = self.timeline.item[part.around]
            near = np.bincount(around, minlength=self.timeline.n_items)[columns] / len(around)
        absent = _log_missed(near, len(part.drawn) - 1)
        if recent:
            # The queue comes from everywhere in time.
            absent = absent + _log_missed(everywhere, sum(before.draws for before in recent))
        if self.uniform:
            uniform = self.uniform * (1 + len(recent))
            absent = absent + uniform * np.log1p(-1.0 / max(self.pool, 2))
        return np.log(np.maximum(-np.expm1(absent), 1e-12)).astype(np.float32)

    def _share(self, columns: np.ndarray) -> np.ndarray:
        if self.frequency is not None:
            return self.frequency.share(columns)
        assert self._shares is not None  # counted at birth
        return self._shares[columns]


def _log_missed(share: np.ndarray, draws: int) -> np.ndarray:
    """Log probability that so many draws, each with probability `share`, all miss."""
    return draws * np.log1p(-np.minimum(share, 1 - 1e-9))
