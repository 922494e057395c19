"""Skip labels: items that a user was shown or tried and did not want, with a reason each.

Everything happens inside one side of the split: a positive of a later side neither rescues nor
causes a label. A skip that was only shown is censored when its horizon reaches over the end of its
side, because the positive that would rescue it could no longer be seen; an explicit rejection
waits for nothing and is never censored.

Position rules: Joachims et al., "Accurately interpreting clickthrough data as implicit feedback"
(2005). A list is a ranking only where the log declares positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import polars as pl
from pydantic import Field, field_validator

from recsys.errors import nearest
from recsys.split import duration
from recsys.tables import Kind, Side, Strict


class Reason(IntEnum):
    """Why a shown item is a skip (below 64), or why it is none (64 and above)."""

    REJECTED = 1
    """The user said so: dislike, hide, skip, a low rating."""
    SHORT_DWELL = 2
    """Opened and left at once."""
    SKIP_ABOVE = 3
    """Declared position above the lowest click of the request."""
    SHOWN_BEFORE_LAST_CLICK = 4
    """Declared position equal to that of the lowest click (a neighbour in a grid)."""
    ONE_BELOW_LAST_CLICK = 5
    """The next declared position below the lowest click."""
    SAME_REQUEST = 6
    """No declared position: shown in a request in which something else was chosen."""
    REQUEST_WITHOUT_CLICK = 7
    """Nothing of the request was chosen; labelled only when `skips.confidence` gives it weight."""
    SHOWN = 8
    """A single "was shown" event with no positive within the horizon."""
    UNSEEN = 64
    """Dropped: too far below the lowest click, probably never looked at."""
    NO_CLICK = 65
    """Dropped: nothing of the request was chosen, so nobody knows whether it was looked at."""
    RESCUED = 66
    """Dropped: the user chose the item within the horizon after all, on the same side."""
    CENSORED = 67
    """Dropped: the horizon reaches over the end of the side."""
    ALONE = 68
    """Dropped: the user has no positive on this side to which the skip could belong."""


LABELS = tuple(reason for reason in Reason if reason < Reason.UNSEEN)
_CONFIDENCE = {
    "rejected": 1.0,
    "short_dwell": 0.8,
    "skip_above": 1.0,
    "shown_before_last_click": 0.8,
    "one_below_last_click": 0.5,
    "same_request": 0.5,
    "request_without_click": 0.0,
    "shown": 0.3,
}


class SkipRules(Strict):
    """[skips]: which shown items count as skipped."""

    enabled: Literal["auto"] | bool = "auto"
    """auto: whenever the log shows impressions or rejections."""
    horizon: str = "6h"
    """A positive on the same item this long after rescues it; so long before the end of a side
    shown items are censored. In EB-NeRD 83 % of the choices made within two days come in 6 h."""
    confidence: dict[str, float] = Field(default_factory=dict, validate_default=True)
    """Reason → how sure a label is, 0 to 1; 0 drops the reason."""

    @field_validator("horizon")
    @classmethod
    def _is_duration(cls, value: str) -> str:
        duration(value)
        return value

    @field_validator("confidence")
    @classmethod
    def _known_reasons(cls, value: dict[str, float]) -> dict[str, float]:
        for name, confidence in value.items():
            if name not in _CONFIDENCE:
                raise ValueError(f"{name!r} is no reason of a skip. {nearest(name, _CONFIDENCE)}")
            if not 0 <= confidence <= 1:
                raise ValueError(f"the confidence of {name} is {confidence}, not within 0 to 1.")
        return {**_CONFIDENCE, **value}


@dataclass(frozen=True)
class Skips:
    """Labels and what became of everything that was looked at.

    Args:
        labels: user, item, time, request (null for single events), side, reason, confidence;
            sorted by all of them.
        report: reason in small letters → number of shown items or events, dropped ones included,
            by side: {"train": {...}, "valid": {...}, "test": {...}}.
    """

    labels: pl.DataFrame
    report: dict[str, dict[str, int]]


def wanted(rules: SkipRules, interactions: pl.DataFrame, impressions: bool) -> bool:
    """Whether labels are to be made: as configured, or when the log has anything to label."""
    if rules.enabled != "auto":
        return bool(rules.enabled)
    return impressions or bool((interactions["kind"] != Kind.POSITIVE).any())


def label(
    interactions: pl.DataFrame,
    shown: pl.DataFrame | None,
    rules: SkipRules,
    *,
    timed: bool,
) -> Skips:
    """Label every shown item and rejected event.

    Args:
        interactions: user, item (any type), time, kind, side, `end` (where the row's side ends);
            perhaps request, position, `bounce` (a rejection by short dwell).
        shown: impression lists, one row a shown item: user, item, time, request, side, end,
            clicked; perhaps position.
        rules: [skips].
        timed: whether `time` is a clock; without one any later positive rescues and nothing is
            censored.
    """
    positive = interactions.filter(pl.col("kind") == Kind.POSITIVE)
    parts = [_events(interactions, rules), _requests(interactions, positive, shown, rules)]
    candidates = pl.concat([part for part in parts if part is not None], how="vertical_relaxed")
    candidates = _rescue(candidates, positive, duration(rules.horizon) if timed else None)
    if timed:
        waits = ~pl.col("reason").is_in([Reason.REJECTED, Reason.SHORT_DWELL])
        waits &= pl.col("reason") < Reason.UNSEEN
        late = pl.col("time") > pl.col("end") - duration(rules.horizon) - 1
        candidates = candidates.with_columns(_mark(waits & late, Reason.CENSORED))
    confidence = {reason: rules.confidence[reason.name.lower()] for reason in LABELS}
    candidates = candidates.with_columns(
        pl.col("reason")
        .replace_strict(confidence, default=0.0, return_dtype=pl.Float32)
        .alias("confidence")
    )
    labels = candidates.filter(pl.col("confidence") > 0).drop("end")
    columns = ["user", "time", "request", "item", "side", "reason", "confidence"]
    return Skips(labels.select(columns).sort(columns), count(candidates))


def count(candidates: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Reason → number, by side; every side and every reason that occurs anywhere is named."""
    report: dict[str, dict[str, int]] = {side.name.lower(): {} for side in Side}
    for side, reason, number in (
        candidates.group_by("side", "reason").len().sort("side", "reason").iter_rows()
    ):
        report[Side(side).name.lower()][Reason(reason).name.lower()] = number
    return report


_COLUMNS = ["user", "item", "time", "request", "side", "end", "reason"]


def _code(reason: Reason) -> pl.Expr:
    return pl.lit(int(reason), pl.UInt8)


def _mark(condition: pl.Expr, reason: Reason) -> pl.Expr:
    return pl.when(condition).then(_code(reason)).otherwise("reason").alias("reason")


def _request(frame: pl.DataFrame) -> pl.Expr:
    given = "request" in frame.columns
    return (pl.col("request") if given else pl.lit(None)).cast(pl.Int64).alias("request")


def _position(frame: pl.DataFrame) -> pl.Expr:
    given = "position" in frame.columns
    return (pl.col("position") if given else pl.lit(None)).cast(pl.Int32).alias("position")


def _events(interactions: pl.DataFrame, rules: SkipRules) -> pl.DataFrame:
    """Explicit rejections, and "was shown" events that belong to no request."""
    bounce = pl.col("bounce") if "bounce" in interactions.columns else pl.lit(False)
    reason = (
        pl.when(pl.col("kind") == Kind.SHOWN)
        .then(_code(Reason.SHOWN))
        .when(bounce.fill_null(False))
        .then(_code(Reason.SHORT_DWELL))
        .otherwise(_code(Reason.REJECTED))
    )
    alone = (pl.col("kind") == Kind.SHOWN) & pl.col("request").is_null()
    return (
        interactions.filter(pl.col("kind") != Kind.POSITIVE)
        .with_columns(_request(interactions))
        .filter(alone | (pl.col("kind") == Kind.REJECTED))
        .with_columns(reason.alias("reason"))
        .select(_COLUMNS)
    )


def _requests(
    interactions: pl.DataFrame,
    positive: pl.DataFrame,
    shown: pl.DataFrame | None,
    rules: SkipRules,
) -> pl.DataFrame | None:
    """What was shown in a request and not chosen in it."""
    columns = ["user", "item", "time", "request", "side", "end", "position", "clicked"]
    parts = []
    if shown is not None:
        parts.append(shown.with_columns(_position(shown)).select(columns))
    if "request" in interactions.columns:
        events = interactions.filter(
            (pl.col("kind") == Kind.SHOWN) & pl.col("request").is_not_null()
        )
        clicks = positive.filter(pl.col("request").is_not_null())
        if shown is not None or len(events):
            for frame, clicked in ((events, False), (clicks, True)):
                more = [_position(frame), _request(frame), pl.lit(clicked).alias("clicked")]
                parts.append(frame.with_columns(more).select(columns))
    if not parts:
        return None
    group = ["user", "request", "side"]
    rows = (
        pl.concat(parts, how="vertical_relaxed")
        .group_by(*group, "item")
        .agg(
            pl.col("time").min(),
            pl.col("end").min(),
            pl.col("position").min(),
            pl.col("clicked").any(),
        )
    )
    chosen = rows.filter("clicked").group_by(group).agg(pl.col("position").max().alias("lowest"))
    rows = rows.join(
        chosen.with_columns(pl.lit(True).alias("any")), on=group, how="left", nulls_equal=True
    ).filter(~pl.col("clicked"))
    ranked = pl.col("position").is_not_null() & pl.col("lowest").is_not_null()
    below = pl.when(pl.col("position") > pl.col("lowest")).then("position")
    rows = rows.with_columns(below.rank("dense").over(group).alias("depth"))
    said = rules.confidence["request_without_click"] > 0
    without = Reason.REQUEST_WITHOUT_CLICK if said else Reason.NO_CLICK
    reason = (
        pl.when(pl.col("any").is_null())
        .then(_code(without))
        .when(~ranked)
        .then(_code(Reason.SAME_REQUEST))
        .when(pl.col("position") < pl.col("lowest"))
        .then(_code(Reason.SKIP_ABOVE))
        .when(pl.col("position") == pl.col("lowest"))
        .then(_code(Reason.SHOWN_BEFORE_LAST_CLICK))
        .when(pl.col("depth") == 1)
        .then(_code(Reason.ONE_BELOW_LAST_CLICK))
        .otherwise(_code(Reason.UNSEEN))
    )
    return rows.with_columns(reason.alias("reason")).select(_COLUMNS)


def _rescue(candidates: pl.DataFrame, positive: pl.DataFrame, horizon: int | None) -> pl.DataFrame:
    """Mark what the user chose later on the same side.

    Shown items at or after the time they were shown, rejected ones strictly after the rejection.
    """
    key = ["user", "item", "side"]
    chosen = positive.select(*key, pl.col("time").alias("chosen")).unique()
    may = candidates.join(chosen.select(key).unique(), on=key, how="semi")
    rest = candidates.join(chosen.select(key).unique(), on=key, how="anti")
    strict = pl.col("reason").is_in([Reason.REJECTED, Reason.SHORT_DWELL])
    may = may.with_columns((pl.col("time") + strict.cast(pl.Int64)).alias("from"))
    may = may.sort("from").join_asof(
        chosen.sort("chosen"),
        left_on="from",
        right_on="chosen",
        by=key,
        strategy="forward",
        check_sortedness=False,
    )
    soon = pl.col("chosen").is_not_null()
    if horizon is not None:
        soon &= pl.col("chosen") - pl.col("time") <= horizon
    may = may.with_columns(_mark(soon & (pl.col("reason") < Reason.UNSEEN), Reason.RESCUED))
    return pl.concat([rest, may.select(rest.columns)])


def attach(labels: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Give each label the positive event it belongs to.

    That is the first positive of its own request; else the user's first positive at or after it on
    the same side; else the last one before it.

    Args:
        labels: as `Skips.labels`.
        events: the positives, one row each in their final order (user, time, …): user, time, side,
            `event` (Int32, their place); perhaps request.

    Returns:
        The labels with `event`, null where the user has no positive on that side.
    """
    labels = labels.with_row_index("place")
    own = pl.lit(None, pl.Int32).alias("own")
    if "request" in events.columns:
        first = (
            events.filter(pl.col("request").is_not_null())
            .group_by("user", "request", "side")
            .agg(pl.col("event").min().alias("own"))
        )
        labels = labels.join(
            first, on=["user", "request", "side"], how="left", maintain_order="left"
        )
    else:
        labels = labels.with_columns(own)
    shown_at = (
        events.group_by("user", "side", "time")
        .agg(pl.col("event").min().alias("next"), pl.col("event").max().alias("previous"))
        .sort("time")
    )
    rest = labels.filter(pl.col("own").is_null()).select("place", "user", "side", "time")
    rest = rest.sort("time")
    ways: tuple[tuple[Literal["forward", "backward"], str], ...]
    ways = (("forward", "next"), ("backward", "previous"))
    for strategy, name in ways:
        rest = rest.join_asof(
            shown_at.select("user", "side", "time", name),
            on="time",
            by=["user", "side"],
            strategy=strategy,
            check_sortedness=False,
        )
    labels = labels.join(rest.select("place", "next", "previous"), on="place", how="left")
    event = pl.coalesce("own", "next", "previous").cast(pl.Int32).alias("event")
    return labels.sort("place").with_columns(event).drop("place", "own", "next", "previous")
