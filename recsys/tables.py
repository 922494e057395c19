"""Schemas of logs and tables, and the canonical frames that readers give.

Canonical columns have one name everywhere: `user`, `item`, `time` (int64 microseconds since 1970,
UTC; in sequences without a clock the position 0, 1, 2, …), `weight`, `kind`, `row`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import polars as pl
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from recsys.errors import DataError

SECOND = 1_000_000
"""Microseconds in a second, the unit of every time."""
DAY = 86_400 * SECOND
CONTEXT = "context."
"""Prefix of the context columns that a log row carries (device, page, …)."""


class Kind(IntEnum):
    """What an interaction row means."""

    POSITIVE = 0
    SHOWN = 1
    REJECTED = 2


class Side(IntEnum):
    """Which side of the split an event lies on."""

    TRAIN = 0
    VALID = 1
    TEST = 2


class Strict(BaseModel):
    """A frozen value that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def of_kind(default: str) -> BeforeValidator:
    """A section may leave its `kind` out; a string alone names the kind."""

    def fill(value: object) -> object:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and "kind" not in value:
            return {"kind": default, **value}
        return value

    return BeforeValidator(fill)


AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Schema(Strict):
    """Column names of the log and what its events mean."""

    user: str = "user"
    """Column of user ids."""
    item: str = "item"
    """Column of item ids."""
    time: str | None = "time"
    """None (in TOML ""): rows are in order, and the order is all that is known of time."""
    time_unit: str = "auto"
    """For numbers: s, ms, us, ns, or auto (by magnitude, the same unit for the whole column)."""
    time_zone: str = "UTC"
    """Of times written without a zone."""
    event: str | None = None
    """Column of event names; None: every row is a positive unless `value` says otherwise."""
    positive: dict[str, float] = Field(default_factory=dict)
    """Event name → strength of a positive, e.g. {click = 1, buy = 3}."""
    shown_events: tuple[str, ...] = ()
    """Event names that only say "was shown"."""
    rejected: tuple[str, ...] = ()
    """Event names that say "not this": dislike, skip, hide."""
    value: str | None = None
    """Column of ratings."""
    positive_from: float | None = None
    """A rating of this or more is a positive."""
    rejected_to: float | None = None
    """A rating of this or less is an explicit rejection; between the two the row is left out."""
    weight: str | None = None
    """Column that multiplies the strength of a positive."""
    dwell: str | None = None
    """Column of seconds spent."""
    short_dwell: float | None = None
    """A positive with fewer seconds than this counts as a rejection (a bounce)."""
    request: str | None = None
    """Column that is equal for what was shown together."""
    position: str | None = None
    """Column of declared positions (a list column in impression lists); 1 or 0 is the top."""
    shown: str = "shown"
    """Impression lists: the list of items shown."""
    clicked: str = "clicked"
    """Impression lists: the list of items chosen."""
    items: str = "items"
    """Sequences: the list of items in order."""
    separator: str = " "
    """Between the items of a list that is written as text."""
    context_categories: tuple[str, ...] = ()
    """Columns that are known when the question is asked, as categories: device, page, …"""
    context_numbers: tuple[str, ...] = ()
    """The same, as numbers."""

    @property
    def context(self) -> tuple[str, ...]:
        return self.context_categories + self.context_numbers


class CatalogSchema(Strict):
    """Column names of the item table."""

    item: str = "item"
    """Column of item ids."""
    header: bool = True
    """false: text files of lines `id text …` without names of columns; the text is the column that
    `title` or `text` names."""
    title: str | None = None
    """What people see."""
    text: tuple[str, ...] = ()
    """Columns that the text encoder reads, the title included when it is named here."""
    categories: tuple[str, ...] = ()
    """Columns of one category or several (lists, or text with `category_separator`)."""
    category_separator: str = "|"
    """Between several categories in one text."""
    numbers: tuple[str, ...] = ()
    """Columns of numbers: price, length, …"""
    vector: str | None = None
    """A list column of floats: images, audio, another model."""
    published: str | None = None
    """When the item came into being; items later than a query are not candidates for it."""
    available_from: str | None = None
    """Column of the time from which an item may be recommended."""
    available_until: str | None = None
    """Column of the time from which it no longer may."""
    available: str | None = None
    """A boolean column; false: never recommended."""
    fields: tuple[str, ...] = ()
    """Further columns that answers carry along."""


class UserSchema(Strict):
    """Column names of the user table."""

    user: str = "user"
    """Column of user ids."""
    categories: tuple[str, ...] = ()
    """Columns of one category or several."""
    numbers: tuple[str, ...] = ()
    """Columns of numbers."""
    text: tuple[str, ...] = ()
    """Columns that the text encoder reads."""
    category_separator: str = "|"
    """Between several categories in one text."""


@dataclass(frozen=True)
class Catalog:
    """One row an item; the canonical column `item` is a distinct, non-empty string.

    Raises:
        DataError: an id is null, empty or stands twice.
    """

    frame: pl.DataFrame
    schema: CatalogSchema

    def __post_init__(self) -> None:
        ids = self.frame["item"]
        bad = ids.is_null() | (ids.cast(pl.String) == "")
        if bad.any():
            row = int(bad.arg_true()[0])
            raise DataError(
                f"Row {row + 1} of the item table has a null or empty {self.schema.item!r}. "
                "Every item needs an id: fill it in or drop the row."
            )
        if ids.n_unique() != len(ids):
            twice = ids.filter(ids.is_duplicated())[0]
            raise DataError(
                f"Item {twice!r} stands {int((ids == twice).sum())} times in the item table. "
                "Keep one row an item."
            )


@dataclass(frozen=True)
class Log:
    """What a reader hands on: lazy canonical frames.

    Args:
        interactions: user, item: String; time: Int64; weight: Float32; kind: UInt8 (`Kind`);
            row: Int64, the order of the source. May carry side (UInt8), request (Int64),
            position (Int32) and `context.*` columns.
        impressions: one row a request: request: Int64; user: String; time: Int64; shown, clicked:
            List(String). May carry position (lists beside `shown`), side, `context.*`.
            Its clicks stand in `interactions` too, as positives of that request.
        catalog: the item table, when there is one.
        users: the user table with the canonical column `user`, when there is one.
        timed: whether `time` is a clock.
        given_split: whether the column `side` says which side of the split a row is on.
        sources: every file that was read, sorted.
        notes: how many rows were dropped or mended, by reason.
    """

    interactions: pl.LazyFrame
    impressions: pl.LazyFrame | None
    catalog: Catalog | None
    users: pl.DataFrame | None
    timed: bool
    given_split: bool
    sources: tuple[Path, ...]
    schema: Schema
    user_schema: UserSchema = field(default_factory=UserSchema)
    notes: dict[str, int] = field(default_factory=dict)
