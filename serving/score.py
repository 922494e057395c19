"""Scores for given pairs or whole impression lists, as of their time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from features.batches import Queries
from features.columns import instants
from features.logs import scan
from recsys.errors import DataError
from recsys.files import atomic_write
from recsys.ragged import Ragged
from recsys.tables import SECOND, Schema
from serving.later import Later, extend
from serving.people import as_lists, need, rows_of_lists
from serving.recommender import Recommender
from towers.build import moments_of


@dataclass(frozen=True)
class Scored:
    """What `write_scores` did: the file, its rows, and how many users and items were unknown."""

    path: Path
    pairs: int
    unknown_users: int
    unknown_items: int


def write_scores(
    recommender: Recommender,
    pairs: str | Path,
    out: str | Path,
    *,
    log: Later | None = None,
    refresh: int = 600 * SECOND,
) -> Scored:
    """Score every (user or history, item) pair of a file.

    The file has `item`, or a list column `shown` (or `items`) of whole requests; `user`, `history`
    or both; and perhaps `time`. With a time, histories and item statistics are those strictly
    before it. The answer has the file's columns and `score`: a number beside an item, a list
    beside a list. An item that nobody knows is scored as a new one without content.

    Args:
        recommender: scores.
        pairs: CSV, TSV, NDJSON or Parquet.
        out: Parquet file.
        log: events after the bundle's cut-off that may be known, each strictly before its pair.
        refresh: microseconds between two refreshes of item statistics.

    Raises:
        DataError: a column is missing or cannot be read.
    """
    if log is not None:
        recommender = Recommender(extend(recommender.bundle, log)[0])
    bundle = recommender.bundle
    frame = scan(str(pairs))[0].collect()
    lists = next((name for name in ("shown", "items", "item") if name in frame.columns), None)
    if lists is None:
        need(frame, "item", pairs)
    if "user" not in frame.columns and "history" not in frame.columns:
        need(frame, "user", pairs)
    single = lists == "item" and frame["item"].dtype not in (pl.List, pl.Array)
    asked = frame[lists].cast(pl.String).reshape((-1, 1)) if single else as_lists(frame[lists])
    items = _rows(asked, recommender)
    users = np.zeros(len(frame), np.int64)
    if "user" in frame.columns:
        users = bundle.users.encode(frame["user"].cast(pl.String)).astype(np.int64)
    times = None
    if "time" in frame.columns and bundle.timeline.timed:
        times = _times(frame["time"], str(pairs))
    history = rows_of_lists(as_lists(frame["history"]), bundle) if "history" in frame.columns else None
    scores = np.zeros(len(items.values), np.float32)
    moments = None
    if times is not None:
        moments = moments_of(times, refresh) if bundle.model.uses_statistics else None
    groups = [(None, np.arange(len(frame)))]
    if moments is not None:
        order = np.argsort(moments, kind="stable")
        distinct, start = np.unique(moments[order], return_index=True)
        groups = list(zip(distinct.tolist(), np.split(order, start[1:]), strict=True))
    for moment, rows in groups:
        at = recommender if moment is None else recommender.as_of(moment)
        when = None if times is None else times[rows]
        queries = (
            at.queries(users[rows], when)
            if history is None
            else Queries(users[rows], history.take(rows), when)
        )
        these = items.take(rows)
        to = np.concatenate([[0], np.cumsum(these.lengths)])
        flat = np.arange(to[-1]) + np.repeat(items.offsets[rows] - to[:-1], these.lengths)
        scores[flat] = at.score_rows(queries, these)
    column = pl.Series("score", scores)
    if not single:
        column = pl.DataFrame({"row": items.row_of(), "score": scores})
        empty = pl.DataFrame({"row": np.arange(len(frame))})
        grouped = column.group_by("row", maintain_order=True).agg("score")
        column = empty.join(grouped, on="row", how="left", maintain_order="left")["score"]
    with atomic_write(out) as temporary:
        frame.with_columns(column.alias("score")).write_parquet(temporary)
    return Scored(
        Path(out), len(items.values), int((users == 0).sum()) if history is None else 0,
        int((items.values == 0).sum()),
    )  # fmt: skip


def _rows(lists: pl.Series, recommender: Recommender) -> Ragged:
    lists = lists.cast(pl.List(pl.String))
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = lists.filter(lists.list.len() > 0).explode()
    rows = recommender.bundle.items.encode(flat).astype(np.int64)
    return Ragged(np.concatenate([[0], np.cumsum(lengths)]), rows)


def _times(values: pl.Series, path: str) -> np.ndarray:
    empty = values.is_null().arg_true()
    if len(empty):
        raise DataError(f"{path} has no time in row {int(empty[0]) + 1}. Fill it in.")
    numbered = pl.int_range(1, len(values) + 1, eager=True).cast(pl.String)
    return instants(values, Schema(), 0, "row " + numbered)[1:]
