"""Encode a log: ids become rows in the order in which they are met.

The codes of this file are provisional (they depend on threads); `rows_of` turns them into rows that
depend on the ids alone.

Legend: R requests, T shown items.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl

from recsys.errors import DataError
from recsys.ragged import Ragged
from recsys.tables import CONTEXT, Kind, Log, Side


class Codes:
    """Ids of one sort and the codes given to them; Polars' own categories, so it is one pass."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self.dtype = pl.Categorical(self._categories)
        # Polars forgets categories that no series holds.
        self._held = pl.Series([], dtype=self.dtype)

    def code(self, column: str) -> pl.Expr:
        """The column as UInt32 codes."""
        return pl.col(column).cast(self.dtype).to_physical().alias(column)

    def flat(self, lists: pl.Series) -> np.ndarray:
        """Codes of all values of a List(String) column."""
        values = lists.explode(empty_as_null=False, keep_nulls=False)
        if values.null_count():
            raise DataError(
                f"A list of the column {lists.name!r} holds a null id. "
                "Drop it from the list, or give the item an id."
            )
        return values.cast(self.dtype).to_physical().to_numpy()

    def learn(self, ids: pl.Series) -> None:
        """Give codes to ids of a table."""
        ids.cast(pl.String).cast(self.dtype)

    @cached_property
    def ids(self) -> pl.Series:
        """The id of each code, once everything is read."""
        return self._categories.to_series().alias("id")


@dataclass(frozen=True)
class Requests:
    """Impression lists.

    Args:
        frame: R rows: request, user (code), time, perhaps side and `context.*`.
        shown: (R rows, T values) item codes.
        clicked: (T,) bool.
        position: (T,) int16, or None where the log declares none; -1 where it is null.
    """

    frame: pl.DataFrame
    shown: Ragged
    clicked: np.ndarray
    position: np.ndarray | None

    def where(self, keep: np.ndarray) -> Requests:
        """Only the shown items for which `keep` (T,) is true."""
        return replace(
            self,
            shown=self.shown.where(keep),
            clicked=self.clicked[keep],
            position=None if self.position is None else self.position[keep],
        )

    def take(self, order: np.ndarray) -> Requests:
        """The requests in another order."""
        places = Ragged(self.shown.offsets, np.arange(len(self.clicked))).take(order).values
        return Requests(
            self.frame[order],
            self.shown.take(order),
            self.clicked[places],
            None if self.position is None else self.position[places],
        )


@dataclass(frozen=True)
class Coded:
    """A log whose users and items are provisional codes.

    Args:
        frame: interactions: user, item (UInt32), time, weight, kind, row, perhaps side, request,
            position, bounce, `context.*`.
        requests: the impression lists, when there are any.
        users, items: the codes.
        timed: as `Log.timed`, false too when given sides do not follow each other in time.
        notes: what was noticed on the way.
    """

    frame: pl.DataFrame
    requests: Requests | None
    users: Codes
    items: Codes
    timed: bool
    notes: dict[str, int] = field(default_factory=dict)


_WANTED = ("user", "item", "time", "weight", "kind", "row", "side", "request", "position", "bounce")


def read(log: Log, given: bool) -> Coded:
    """Run the lazy log once, keeping only the columns that preparing needs.

    Args:
        log: of lazy frames.
        given: whether the sides that stand in the log are the ones to go by.

    Raises:
        DataError: an id or time is null, or the given sides of a log with impressions overlap.
    """
    users, items = Codes(), Codes()
    names = log.interactions.collect_schema().names()
    wanted = [name for name in names if name in _WANTED or name.startswith(CONTEXT)]
    frame = (
        log.interactions.select(wanted)
        .with_columns(users.code("user"), items.code("item"))
        .collect(engine="streaming")
    )
    for name in ("user", "item", "time"):
        if frame[name].null_count():
            row = int(frame["row"][int(frame[name].is_null().arg_true()[0])])
            raise DataError(
                f"Row {row + 1} of the log has no {name}. "
                f"Fill in the column {getattr(log.schema, name)!r}, or drop the row."
            )
    if not frame["row"].is_sorted():
        frame = frame.sort("row")
    schema = log.schema
    if "bounce" not in names and schema.short_dwell is not None:
        # Where nothing else makes a rejection, every rejection is a visit that was too short.
        bounce = not schema.rejected and schema.rejected_to is None
        frame = frame.with_columns(pl.lit(bounce).alias("bounce"))
    requests = _requests(log, users, items) if log.impressions is not None else None
    timed, notes = log.timed, {}
    if given:
        overlap = _overlap(frame)
        if overlap and (requests is not None or (frame["kind"] != Kind.POSITIVE).any()):
            raise DataError(
                f"{overlap} users have train events later than their first test or valid event, "
                "so the given sides do not follow each other in time, and what was shown cannot "
                'be told apart by side. Give files that do, or set split.kind = "time".'
            )
        if overlap and (log.timed or _overlap(frame, valid=False)):
            timed, notes["users_with_overlapping_sides"] = False, overlap
            frame = _positions(frame)
    if log.catalog is not None:
        items.learn(log.catalog.frame["item"])
    if log.users is not None:
        users.learn(log.users["user"])
    return Coded(frame, requests, users, items, timed, notes)


def _overlap(frame: pl.DataFrame, *, valid: bool = True) -> int:
    """Number of users whose train side ends after their later sides begin, or valid after test.

    Args:
        frame: user, time, side.
        valid: whether the validation side has to follow; a reader that knows positions alone may
            have laid it between the training items on purpose.
    """
    time, side = pl.col("time"), pl.col("side")
    early = time.filter(side <= Side.VALID).max()
    test = time.filter(side == Side.TEST).min()
    bad = (early > test).fill_null(False)
    if valid:
        train = time.filter(side == Side.TRAIN).max()
        late = time.filter(side >= Side.VALID).min()
        bad = bad | (train > late).fill_null(False)
    return int(frame.group_by("user").agg(bad.alias("bad"))["bad"].sum())


def _positions(frame: pl.DataFrame) -> pl.DataFrame:
    """Times that are positions: train in order, then each later side as one moment.

    Sides drawn at random have no order among themselves, so what is to be found is no history for
    what else is to be found.
    """
    place = pl.int_range(pl.len(), dtype=pl.Int64).over("user")
    frame = frame.sort("user", "side", "time", "row").with_columns(place.alias("time"))
    train, time = pl.col("side") == Side.TRAIN, pl.col("time")
    together = pl.when(train).then(time).otherwise(time.min().over("user", "side"))
    return frame.with_columns(together.alias("time")).sort("row")


def _requests(log: Log, users: Codes, items: Codes) -> Requests:
    assert log.impressions is not None
    names = log.impressions.collect_schema().names()
    kept = ["request", "user", "time", "side", "shown", "clicked", "position"]
    wanted = [name for name in names if name in kept or name.startswith(CONTEXT)]
    frame = (
        log.impressions.select(wanted)
        .with_columns(
            users.code("user"),
            pl.col("shown").fill_null([]),
            pl.col("clicked").fill_null([]),
        )
        .collect(engine="streaming")
        .sort("request", maintain_order=True)
    )
    lengths = frame["shown"].list.len().to_numpy().astype(np.int64)
    shown = Ragged(np.concatenate([[0], np.cumsum(lengths)]), items.flat(frame["shown"]))
    chosen = items.flat(frame["clicked"]).astype(np.int64)
    of = np.repeat(np.arange(len(frame)), frame["clicked"].list.len().to_numpy())
    width = int(max(shown.values.max(initial=0), chosen.max(initial=0))) + 1
    clicked = np.isin(shown.row_of() * width + shown.values, of * width + chosen)
    position = beside_shown(frame, "position", lengths)
    return Requests(
        frame.select(pl.exclude("shown", "clicked", "position")),
        shown,
        clicked,
        None if position is None else np.where(np.isnan(position), -1, position).astype(np.int16),
    )


def beside_shown(frame: pl.DataFrame, name: str, lengths: np.ndarray) -> np.ndarray | None:
    """(T,) float64 numbers that stand beside what was shown, NaN where there is none.

    Args:
        frame: requests, with the column `request` and perhaps the list column `name`.
        name: of the column.
        lengths: (R,) how many items each request shows.

    Returns:
        None where there is no such column.

    Raises:
        DataError: a list is not as long as that of the items.
    """
    if name not in frame.columns:
        return None
    own = frame[name].list.len().fill_null(0).to_numpy()
    wrong = np.flatnonzero((own != lengths) & (own != 0))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"Request {frame['request'][row]} shows {lengths[row]} items, but its "
            f"{name!r} list has {own[row]} entries. Give one for each item shown."
        )
    # A request that declares nothing counts as one null for each item.
    values = np.full(int(lengths.sum()), np.nan, np.float64)
    flat = frame[name].explode(empty_as_null=False, keep_nulls=False)
    values[np.repeat(own == lengths, lengths)] = flat.cast(pl.Float64).fill_null(np.nan)
    return values


def rows_of(codes: Codes, since: np.ndarray) -> tuple[np.ndarray, pl.Series]:
    """The final row of each code, and the ids of rows 1, 2, …: those of the first side first, each
    part by id.

    Args:
        codes: of one sort of id.
        since: (codes,) int8, the first side that each is learned from.

    Raises:
        DataError: an id is empty.
    """
    ids = codes.ids
    if (ids == "").any():
        raise DataError("The log holds an empty user or item id. Fill it in, or drop those rows.")
    frame = pl.DataFrame({"id": ids, "since": since}).with_row_index("code").sort("since", "id")
    rows = np.empty(len(ids), np.int32)
    rows[frame["code"].to_numpy()] = np.arange(1, len(ids) + 1, dtype=np.int32)
    return rows, frame["id"]


def order_by(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """(E,) the stable order by user, then time.

    By time first, if need be, then by user with the place packed beneath it: sorting plain
    integers is several times faster than a lexicographic sort of two columns.
    """
    by_time = None
    if time.size and (time[1:] < time[:-1]).any():
        by_time = np.argsort(time, kind="stable")
    keys = (user if by_time is None else user[by_time]).astype(np.int64) << 32
    keys |= np.arange(user.size, dtype=np.int64)
    places = pl.Series(keys).sort().to_numpy() & 0xFFFFFFFF
    return places if by_time is None else by_time[places]
