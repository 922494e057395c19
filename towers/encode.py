"""Encode many items and users, in blocks.

Legend: N item rows, Q queries, D dimensions of the stored vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from recsys.errors import DataError
from recsys.features.batching.batch import Queries, query_side
from recsys.features.prepared.timeline import Timeline
from recsys.towers.two_tower import TwoTower

ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Embeddings:
    """Vectors of items and what they were trained to be compared by.

    Args:
        ids: (N,) external ids.
        vectors: (N, D) float32, finite.
        score: "cosine", "dot" or "projection"; inner products rank in every case.

    Raises:
        DataError: the sizes differ, or a vector is not finite.
    """

    ids: pl.Series
    vectors: np.ndarray
    score: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.vectors):
            raise DataError(f"There are {len(self.ids)} ids, but {len(self.vectors)} vectors.")
        finite = np.isfinite(self.vectors).all(1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise DataError(
                f"The vector of item {self.ids[row]!r} holds NaN or infinity. Look at that item's "
                "numbers and vector in the item table, or lower the learning rate."
            )


@contextmanager
def _answering(model: TwoTower) -> Iterator[torch.device]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def encode_items(
    model: TwoTower,
    rows: np.ndarray,
    timeline: Timeline | None = None,
    as_of: int | None = None,
    texts: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors of item rows.

    Args:
        model: both towers.
        rows: (N,) item rows.
        timeline, moment: item statistics are those strictly before the moment; needed when the
            towers read statistics.
        texts: (N, T) text vectors to use instead of the table's.

    Returns:
        (N, D) float32.
    """
    out = np.empty((len(rows), model.vector_dimension), np.float32)
    with _answering(model) as device:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            embedded = _embed(
                model, part, timeline, as_of, device,
                None if texts is None else texts[start : start + ROWS_AT_ONCE],
            )  # fmt: skip
            out[start : start + ROWS_AT_ONCE] = model.item_tower(embedded).float().cpu().numpy()
    return out


def encode_users(
    model: TwoTower,
    queries: Queries,
    timeline: Timeline | None = None,
    as_of: int | None = None,
) -> np.ndarray:
    """(Q, D) float32 vectors of queries."""
    out = np.empty((len(queries), model.vector_dimension), np.float32)
    with _answering(model) as device:
        for start in range(0, len(queries), ROWS_AT_ONCE):
            part = queries.take(np.arange(start, min(start + ROWS_AT_ONCE, len(queries))))
            side, rows = query_side(part, model.rules.history.length)
            items = _embed(model, rows, timeline, as_of, device, None, history=True)
            encoded = model.encode_users(side.to(device), items)
            out[start : start + len(part)] = encoded.float().cpu().numpy()
    return out


def _embed(
    model: TwoTower,
    rows: np.ndarray,
    timeline: Timeline | None,
    as_of: int | None,
    device: torch.device,
    texts: np.ndarray | None,
    *,
    history: bool = False,
) -> torch.Tensor:
    statistics = None
    if model.uses_statistics:
        if timeline is None or as_of is None:
            raise ValueError("These towers read item statistics: pass a timeline and a moment.")
        statistics = torch.from_numpy(timeline.statistics(rows, as_of)).to(device)
    given = None if texts is None else torch.from_numpy(np.asarray(texts, np.float32)).to(device)
    embed = model.embed_history if history else model.embed_items
    return embed(torch.from_numpy(rows).to(device), statistics, given)
