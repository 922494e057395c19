"""Train, validation and test split: by time, leave-one-out, last share, or as given.

By time, everything at or after a cut-off is later than everything before it, and rows of the same
time stay together, so no event of anyone's past lies in anyone else's future. Leave-one-out and
the last share of each user keep that promise only inside each user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal, TypeVar

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from recsys.errors import ConfigError, DataError
from recsys.tables import DAY, SECOND, Kind, Side, Strict

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)
_UNITS = {"s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND, "d": DAY, "w": 7 * DAY}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")


def duration(text: str) -> int:
    """Microseconds of a text like "1d", "36h", "90m", "45s", "2w" or "1d12h".

    Raises:
        ValueError: the text is no duration.
    """
    parts = _DURATION.findall(text)
    if not parts or _DURATION.sub("", text).strip():
        raise ValueError(f'{text!r} is no duration; write for example "1d", "36h" or "30m".')
    return sum(round(float(number) * _UNITS[unit]) for number, unit in parts)


def duration_text(time: int) -> str:
    """The text of microseconds in the largest unit that divides them: `duration` the other way."""
    for unit, size in reversed(_UNITS.items()):
        if time % size == 0:
            return f"{time // size}{unit}"
    return f"{time / SECOND:f}".rstrip("0") + "s"


def instant(text: str) -> int:
    """Microseconds since 1970 of an ISO time; without a zone it is UTC.

    Raises:
        ValueError: the text is no ISO time.
    """
    when = datetime.fromisoformat(text)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * SECOND + since.microseconds


def iso(time: int) -> str:
    """The ISO text of a time in microseconds; the bare number where no calendar reaches."""
    try:
        return datetime.fromtimestamp(time // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(time)


class SplitRules(Strict):
    """[split]: how the log is cut into train, valid and test."""

    kind: Literal["auto", "time", "leave_one_out", "last_share", "given"] = "auto"
    """auto: given when the log says the sides, else by time when it has a clock, else
    leave_one_out. last_share: the last `test` of each user's positives, and the `valid` before."""
    test: float | str = 0.1
    """Share of the positives, a duration before the end of the log ("1d"), or an ISO time; 0: none.
    Leave-one-out takes the last positive of each user whatever stands here; last_share takes at
    least one of each user that keeps one to learn from."""
    valid: float | str = 0.1
    """The same for the validation side; a duration counts back from where the test side begins."""
    cold_items: float = Field(0.0, ge=0, lt=1)
    """Share of the items whose train and valid events are all removed, so that they are new in
    the test."""

    @field_validator("test", "valid", mode="before")
    @classmethod
    def _calendar_to_text(cls, value: object) -> object:
        return value.isoformat() if isinstance(value, date | datetime) else value

    @field_validator("test", "valid")
    @classmethod
    def _readable(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            try:
                duration(value)
            except ValueError:
                try:
                    instant(value)
                except ValueError:
                    raise ValueError(
                        f"{value!r} is neither a share like 0.1, a duration like '1d' "
                        "nor an ISO time like '2024-05-01T00:00:00'."
                    ) from None
        elif not 0 <= value < 1:
            raise ValueError(f"{value} is no share; it must be at least 0 and below 1.")
        return value


@dataclass(frozen=True)
class Split:
    """A decided split; `sides` and `ends` apply it to any frame with `user` and `time`.

    Args:
        kind: time, leave_one_out, last_share or given.
        valid_from: microseconds; rows at or after it are no longer train. None: no global cut-off.
        test_from: microseconds; rows at or after it are test.
        last: the time at which each side's log ends, exclusive (by time and given).
        user_cuts: user, valid_time, valid_row, test_time, test_row: where each user's own sides
            begin; users that are not in it are all train (leave-one-out, last share and
            untimed given).
    """

    kind: str
    valid_from: int | None = None
    test_from: int | None = None
    last: tuple[int, int, int] | None = None
    user_cuts: pl.DataFrame | None = None

    def sides(self, frame: Frame) -> Frame:
        """The frame with the column `side` (UInt8, `Side`), rows in the same order.

        Args:
            frame: user and time; `kind` and `row` where positives are to be told apart by row;
                `side` where the split was given.
        """
        later = pl.lit(Side.TRAIN, pl.UInt8) if self.kind != "given" else pl.col("side")
        added = []
        if self.user_cuts is not None:
            added = [name for name in self.user_cuts.columns if name != "user"]
            frame = _with_cuts(frame, self.user_cuts)
            names = frame.collect_schema().names()
            for side, name in ((Side.VALID, "valid"), (Side.TEST, "test")):
                if f"{name}_time" in added:
                    since = _since(name, "row" in names)
                    if self.kind == "given":
                        since &= pl.col("side") == Side.TRAIN
                    later = _at_least(later, since, side)
        if self.kind == "given" and self.valid_from is not None:
            train = pl.col("side") == Side.TRAIN
            later = _at_least(later, train & (pl.col("time") >= self.valid_from), Side.VALID)
        elif self.kind == "time":
            for cut, side in ((self.valid_from, Side.VALID), (self.test_from, Side.TEST)):
                if cut is not None:
                    later = _at_least(later, pl.col("time") >= cut, side)
        return frame.with_columns(later.cast(pl.UInt8).alias("side")).drop(added)

    def ends(self, frame: Frame) -> Frame:
        """The frame, which has `side`, with `end`: no row at or after it is on the same side."""
        if self.user_cuts is None or self.kind == "given":
            last = self.last or (_FOREVER,) * 3
            end = pl.col("side").replace_strict(
                {side: last[side] for side in Side}, return_dtype=pl.Int64
            )
            return frame.with_columns(end.alias("end"))
        forever = self.last[Side.TEST] if self.last else _FOREVER
        end = (
            pl.when(pl.col("side") == Side.TRAIN)
            .then("valid_time")
            .when(pl.col("side") == Side.VALID)
            .then("test_time")
        )
        frame = _with_cuts(frame, self.user_cuts.select("user", "valid_time", "test_time"))
        end = end.fill_null(forever).alias("end")
        return frame.with_columns(end).drop("valid_time", "test_time")


_FOREVER = np.iinfo(np.int64).max


def _with_cuts(frame: Frame, cuts: pl.DataFrame) -> Frame:
    if isinstance(frame, pl.LazyFrame):
        return frame.join(cuts.lazy(), on="user", how="left", maintain_order="left")
    return frame.join(cuts, on="user", how="left", maintain_order="left")


def _at_least(side: pl.Expr, condition: pl.Expr, value: Side) -> pl.Expr:
    return pl.when(condition.fill_null(False)).then(pl.lit(value, pl.UInt8)).otherwise(side)


def _since(name: str, rows: bool) -> pl.Expr:
    """Whether a row is at or after the user's cut; only positives are told apart by source row."""
    time, cut = pl.col("time"), pl.col(f"{name}_time")
    if not rows:
        return time >= cut
    tie = (pl.col("kind") != Kind.POSITIVE) | (pl.col("row") >= pl.col(f"{name}_row"))
    return (time > cut) | ((time == cut) & tie)


def decide(
    interactions: pl.DataFrame | pl.LazyFrame,
    rules: SplitRules,
    *,
    timed: bool,
    given: bool,
) -> Split:
    """Choose the cut-offs from the positives.

    Args:
        interactions: user (any type), time, kind, row; `side` when `given`.
        rules: [split].
        timed: whether `time` is a clock.
        given: whether the column `side` is there.

    Raises:
        ConfigError: a split by time of a log without a clock, or a given split that nobody gave.
        DataError: there is no positive at all, or a side is left empty.
    """
    kind = rules.kind
    if kind == "auto":
        kind = "given" if given else "time" if timed else "leave_one_out"
    if kind == "time" and not timed:
        raise ConfigError(
            'split.kind = "time" needs a clock, but this log has no time column. '
            'Set split.kind = "leave_one_out" or "last_share", or name the column in '
            "data.columns.time."
        )
    if kind == "given" and not given:
        raise ConfigError(
            'split.kind = "given" needs train and test files (or a side column), but this log is '
            'one piece. Set split.kind = "time" or "leave_one_out".'
        )
    columns = ["user", "time", "row"] + (["side"] if given else [])
    frame = interactions.lazy().filter(pl.col("kind") == Kind.POSITIVE).select(columns).collect()
    if not len(frame):
        raise DataError(
            "The log has no positive event, so there is nothing to learn or to test. Check "
            "data.columns.event, data.columns.positive and data.columns.positive_from."
        )
    if kind == "time":
        last = interactions.lazy().select(pl.col("time").max()).collect().to_numpy()
        return _by_time(frame["time"].to_numpy(), rules, int(last[0, 0]))
    if kind == "given":
        return _as_given(frame, rules, timed)
    if kind == "last_share":
        cuts = _last_of_each(
            frame, valid=_share("valid", rules.valid), test=_share("test", rules.test)
        )
        _not_empty(len(cuts), "test", "the last share of each user with enough", len(frame))
    else:
        cuts = _last_of_each(frame, valid=pl.lit(1), test=pl.lit(1))
        where = "the last positive of each user with three or more"
        _not_empty(len(cuts), "test", where, len(frame))
    end = int(frame["time"].to_numpy().max()) + 1
    return Split(kind, last=(end, end, end) if timed else None, user_cuts=cuts)


def _by_time(times: np.ndarray, rules: SplitRules, last: int) -> Split:
    test_from = _cut(times, rules.test, times.size, last)
    before = times if test_from is None else times[times < test_from]
    end = last if test_from is None else test_from
    valid_from = _cut(before, rules.valid, times.size, end)
    train = before if valid_from is None else before[before < valid_from]
    span = f"positives run from {iso(int(times.min()))} to {iso(int(times.max()))}"
    for name, cut, asked, size in (
        ("test", test_from, rules.test, times.size - before.size),
        ("valid", valid_from, rules.valid, before.size - train.size),
        ("train", valid_from if valid_from is not None else test_from, 1, train.size),
    ):
        if asked != 0:
            where = "nothing is left" if cut is None else f"the cut is at {iso(cut)}"
            _not_empty(size, name, f"{where}, and the {span}", times.size)
    ends = (
        last + 1 if valid_from is None and test_from is None else _first(valid_from, test_from),
        last + 1 if test_from is None else test_from,
        last + 1,
    )
    return Split("time", valid_from, test_from, ends)


def _first(*cuts: int | None) -> int:
    return min(cut for cut in cuts if cut is not None)


def _cut(times: np.ndarray, size: float | str, total: int, end: int) -> int | None:
    """Where a side begins that takes `size` off the end of `times`; None: it takes nothing."""
    if isinstance(size, str):
        try:
            return end - duration(size)
        except ValueError:
            return instant(size)
    if size == 0 or not times.size:
        return None
    place = min(times.size - 1, max(0, times.size - max(1, round(size * total))))
    return int(np.partition(times, place)[place])


def _as_given(frame: pl.DataFrame, rules: SplitRules, timed: bool) -> Split:
    sizes = dict(frame["side"].value_counts().iter_rows())
    _not_empty(sizes.get(Side.TRAIN, 0), "train", "as given", len(frame))
    if rules.test != 0:
        _not_empty(sizes.get(Side.TEST, 0), "test", "as given", len(frame))
    train = frame.filter(pl.col("side") == Side.TRAIN)
    valid_from, cuts = None, None
    if not sizes.get(Side.VALID) and rules.valid != 0:
        if timed:
            times = train["time"].to_numpy()
            valid_from = _cut(times, rules.valid, times.size, int(times.max()))
            assert valid_from is not None
            where = f"cut from the given train side at {iso(valid_from)}"
            _not_empty(int((times < valid_from).sum()), "train", where, len(frame))
            _not_empty(int((times >= valid_from).sum()), "valid", where, len(frame))
        else:
            cuts = _last_of_each(train, valid=pl.lit(1)).drop("test_time", "test_row")
            _not_empty(len(cuts), "valid", "the last of each given train user", len(frame))
    if not timed:
        return Split("given", user_cuts=cuts)
    tops = dict(frame.group_by("side").agg(pl.col("time").max()).iter_rows())
    top = int(frame["time"].to_numpy().max())
    last = [int(tops.get(side, top)) + 1 for side in Side]
    if valid_from is not None:
        last[Side.TRAIN], last[Side.VALID] = valid_from, last[Side.TRAIN]
    return Split("given", valid_from, last=(last[0], last[1], last[2]))


def _share(side: str, size: float | str) -> pl.Expr:
    """How many of a user's positives a share of them is: at least one, unless it is 0."""
    if isinstance(size, str):
        raise ConfigError(
            f'split.kind = "last_share" takes a share of each user, and split.{side} is {size!r}. '
            'Write a number like 0.1, or set split.kind = "time".'
        )
    return (pl.len() * size).round().clip(1) if size else pl.lit(0)


def _last_of_each(
    positives: pl.DataFrame, *, valid: pl.Expr, test: pl.Expr = pl.lit(0)
) -> pl.DataFrame:
    """The (time, row) at which each user's sides begin.

    Args:
        positives: user, time, row.
        valid, test: how many of a user's last positives are on each side; a side of none begins
            where the next one does, and never where there is no next one.

    Returns:
        user, valid_time, valid_row, test_time, test_row of the users that keep a positive to learn
        from.
    """
    back = {"valid": valid + test, "test": test}

    def place(column: str, side: str) -> pl.Expr:
        at = pl.len().cast(pl.Int64) - back[side].cast(pl.Int64)
        return pl.col(column).get(at, null_on_oob=True).alias(f"{side}_{column}")

    return (
        positives.sort("user", "time", "row")
        .group_by("user", maintain_order=True)
        .agg(
            (pl.len() > back["valid"]).alias("kept"),
            *(place(column, side) for side in back for column in ("time", "row")),
        )
        .filter("kept")
        .drop("kept")
    )


def _not_empty(size: int, side: str, where: str, total: int) -> None:
    if size == 0:
        raise DataError(
            f"The {side} side of the split is empty: {where} ({total} positives in all). "
            "Move split.test or split.valid, or choose another split.kind."
        )


def cold_items(items: pl.Series, share: float, seed: int = 0) -> pl.Series:
    """The `share` of distinct item ids with the smallest seeded hash, sorted.

    The hash is of the id alone, so an item that was cold stays cold when the log grows a little.

    Args:
        items: distinct String ids.
        share: 0 to 1; any share above 0 takes at least one item.
        seed: another seed chooses other items.
    """
    count = min(len(items), max(1, round(share * len(items)))) if share > 0 else 0
    hashes = pl.Series("hash", _hash(items, seed), dtype=pl.UInt64)
    frame = pl.DataFrame([items.alias("item"), hashes]).sort("hash", "item")
    return frame["item"].head(count).sort()


def _hash(ids: pl.Series, seed: int) -> np.ndarray:
    """(n,) uint64: FNV-1a over the bytes, then the finaliser of splitmix64."""
    raw = np.array([text.encode() for text in ids.to_list()], dtype=np.bytes_)
    width = raw.dtype.itemsize
    columns = raw.view(np.uint8).reshape(len(raw), width)
    lengths = ids.str.len_bytes().to_numpy()
    state = np.full(len(raw), 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):
        state ^= np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        for place in range(columns.shape[1]):
            step = (state ^ columns[:, place]) * np.uint64(0x100000001B3)
            state = np.where(place < lengths, step, state)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
