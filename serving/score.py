"""Scores of given pairs or impression lists, as of their time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recsys.errors import ConfigError, DataError
from recsys.features.batching.batch import Queries
from recsys.features.readers.read import scan
from recsys.features.readers.times import clock
from recsys.files import atomic_write
from recsys.ragged import Ragged, slots
from recsys.serving.bundle import Bundle
from recsys.serving.later_events import Later, extend
from recsys.serving.user_lists import as_lists, need, rows_of_lists
from recsys.tables import SECOND, Schema
from recsys.towers.data import as_of_times_of

if TYPE_CHECKING:
    from recsys.serving.recommender import Recommender


@dataclass(frozen=True)
class Scored:
    """What `write_scores` did: the file, and how many (user, item) pairs it has.

    Args:
        path: the file.
        pairs: how many were scored.
        unknown_users, unknown_items: how many different ids nobody knows.
    """

    path: Path
    pairs: int
    unknown_users: int
    unknown_items: int


def score_frame(
    recommender: Recommender,
    pairs: pl.DataFrame,
    source: str,
    *,
    log: Later | None = None,
    refresh: int = 3_600 * SECOND,
) -> tuple[pl.DataFrame, Scored]:
    """Score every (user or history, item) pair of a table.

    It has `item`, or a list column `shown` (or `items`) of whole requests; `user`, `history` or
    both; and perhaps `time`; or the names that these columns have in the log. With a time,
    histories and item statistics are those strictly before it; columns of context that the bundle
    knows are read where the table has them. An item that nobody knows is scored as a new one
    without content.

    Args:
        recommender: scores.
        pairs: the table.
        source: names it in errors.
        log: events after the bundle's cut-off that may be known, each strictly before its pair.
        refresh: microseconds between two refreshes of item statistics, as `[evaluate] refresh`.

    Returns:
        The table's columns and `score`: a number beside an item, a list beside a list; and counts.

    Raises:
        DataError: a column is missing or cannot be read.
    """
    frame = pairs
    if log is not None:
        recommender = type(recommender)(extend(recommender.bundle, log)[0])
    bundle = recommender.bundle
    frame = _in_our_names(frame, bundle)
    lists = next((name for name in ("shown", "items") if name in frame.columns), "item")
    need(frame, lists, source)
    if "user" not in frame.columns and "history" not in frame.columns:
        need(frame, "user", source)
    single = lists == "item" and frame["item"].dtype not in (pl.List, pl.Array)
    listed = frame[lists].cast(pl.String).reshape((-1, 1)) if single else as_lists(frame[lists])
    items = _rows(listed, recommender)
    users = np.zeros(len(frame), np.int64)
    if "user" in frame.columns:
        users = bundle.users.encode(frame["user"].cast(pl.String)).astype(np.int64)
    times = None
    if "time" in frame.columns and bundle.timeline.timed:
        times = _times(frame["time"], source)
    history = None
    if "history" in frame.columns:
        history = rows_of_lists(as_lists(frame["history"]), bundle)
    context = _context(frame, bundle)
    scores = np.zeros(len(items.values), np.float32)
    as_of_times = None
    if times is not None:
        as_of_times = (
            as_of_times_of(times, refresh, cutoff=bundle.cutoff)
            if bundle.model.uses_statistics
            else None
        )
    groups = [(None, np.arange(len(frame)))]
    if as_of_times is not None:
        order = np.argsort(as_of_times, kind="stable")
        distinct, start = np.unique(as_of_times[order], return_index=True)
        groups = list(zip(distinct.tolist(), np.split(order, start[1:]), strict=True))
    for as_of, rows in groups:
        at = recommender if as_of is None else recommender.as_of(as_of)
        when = None if times is None else times[rows]
        codes = None if context is None else context[rows]
        queries = (
            at.queries(users[rows], when, codes)
            if history is None
            else Queries(users[rows], history.take(rows), when, codes)
        )
        these = items.take(rows)
        flat = slots(items.offsets[rows], these.lengths)
        scores[flat] = at.score_rows(queries, these)
    column = pl.Series("score", scores)
    if not single:
        flat_scores = pl.DataFrame({"row": items.row_of(), "score": scores})
        every = pl.DataFrame({"row": np.arange(len(frame))})
        grouped = flat_scores.group_by("row", maintain_order=True).agg("score")
        column = every.join(grouped, on="row", how="left", maintain_order="left")["score"]
    strangers = 0
    if "user" in frame.columns:
        strangers = frame["user"].filter(pl.Series(users == 0)).n_unique()
    new = listed.explode().drop_nulls().unique()
    unknown = int((bundle.items.encode(new) == 0).sum())
    scored = Scored(Path(source), len(items.values), strangers, unknown)
    return pairs.with_columns(column.alias("score")), scored


def _in_our_names(frame: pl.DataFrame, bundle: Bundle) -> pl.DataFrame:
    """The table with `user`, `item` and `time` for the names that these have in the log."""
    log = bundle.manifest.get("config", {}).get("data", {}).get("columns", {})
    names = {
        log[ours]: ours
        for ours in ("user", "item", "time")
        if log.get(ours) and ours not in frame.columns and log[ours] in frame.columns
    }
    return frame.rename(names)


def write_scores(
    recommender: Recommender,
    pairs: str | Path,
    out: str | Path,
    *,
    log: Later | None = None,
    refresh: int = 3_600 * SECOND,
) -> Scored:
    """Score the pairs of a file into another, see `score_frame`.

    Args:
        recommender: scores.
        pairs: CSV, TSV, NDJSON or Parquet.
        out: `.parquet`, or `.csv` where each row is one pair.
        log, refresh: as for `score_frame`.

    Raises:
        ConfigError: `out` has another suffix, or lists would have to be written as CSV.
        DataError: a column is missing or cannot be read.
    """
    out = Path(out)
    if out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"{out} is neither .parquet nor .csv; name a file of one of these forms.")
    frame = scan(str(pairs))[0].collect()
    frame, scored = score_frame(recommender, frame, str(pairs), log=log, refresh=refresh)
    if out.suffix == ".csv" and any(isinstance(t, pl.List | pl.Array) for t in frame.dtypes):
        raise ConfigError(f"{pairs} holds lists, which CSV cannot; write a .parquet file.")
    with atomic_write(out) as temporary:
        if out.suffix == ".csv":
            frame.write_csv(temporary)
        else:
            frame.write_parquet(temporary)
    return replace(scored, path=out)


def _context(frame: pl.DataFrame, bundle: Bundle) -> np.ndarray | None:
    """(n, C) codes of the context columns that the file has; None where it has none."""
    if not any(column.name in frame.columns for column in bundle.contexts):
        return None
    codes = [
        column.encode(frame[column.name])
        if column.name in frame.columns
        else np.zeros(len(frame), np.int32)
        for column in bundle.contexts
    ]
    return np.stack(codes, 1).astype(np.int64)


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
    schema, frame = Schema(), values.to_frame()
    reading = clock(values.name, values.dtype, values.head(1000), schema)
    reading = reading.widened() or reading
    largest = frame.select(reading.largest).item()
    times = frame.select(reading.microseconds(largest).alias("t")).to_series()
    wrong = times.is_null().arg_true()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{path}: the time of row {row + 1} {reading.complaint(values[row])}.")
    return times.to_numpy().astype(np.int64)
