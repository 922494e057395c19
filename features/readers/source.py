"""The `[data]` section of a configuration: files, format and columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, TypeVar

import polars as pl
from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from recsys.errors import ConfigError, nearest
from recsys.files import atomic_write, sha256_bytes
from recsys.tables import CatalogSchema, Schema, Strict, UserSchema

FORMATS = ("events", "impressions", "sequences", "ebnerd", "mind", "movielens", "lightgcn")
UNITS = ("auto", "s", "ms", "us", "ns")

_ROWS = {
    "user", "time", "time_unit", "time_zone", "weight", "dwell", "short_dwell", "position",
    "context_categories", "context_numbers",
}  # fmt: skip
READS = {
    "events": _ROWS
    | {"item", "event", "positive", "shown_events", "rejected", "value", "positive_from"}
    | {"rejected_to", "request"},
    "impressions": _ROWS | {"shown", "clicked", "separator"},
    "sequences": {"user", "items", "separator", "time"},
}
"""Which of data.columns each format reads; published formats bring their own columns."""
FILES = ("log", "train", "valid", "test", "items", "users")
NEEDS = {
    "positive_from": "value", "rejected_to": "value", "short_dwell": "dwell", "positive": "event",
    "shown_events": "event", "rejected": "event",
}  # fmt: skip
"""Keys of data.columns that speak of a column which another key names."""

S = TypeVar("S", bound=Strict)


def as_table(value: Any) -> Any:
    """A Polars frame of a pandas or lazy one; anything else as it is."""
    if isinstance(value, pl.LazyFrame):
        return value.collect()
    if hasattr(value, "iloc"):
        return pl.from_pandas(value)
    return tuple(value) if isinstance(value, list) else value


Frame = Annotated[
    InstanceOf[pl.DataFrame],
    PlainSerializer(lambda frame: f"a frame of {frame.height} rows", when_used="json"),
    WithJsonSchema({"type": "string"}),
]
Table = Annotated[str | tuple[str, ...] | Frame | None, BeforeValidator(as_table)]
"""File, glob, folder or a list of them; from Python a Polars or pandas frame, too."""


class DataSource(Strict):
    """Files, their format, and the columns.

    Raises:
        ConfigError: keys that contradict each other, or a value that is not known.
    """

    format: str = "events"
    """events: a row an event. impressions: a row a request, with lists of what was shown and
    clicked. sequences: a row a user, with items in order. ebnerd, mind, movielens, lightgcn: as
    published. Or a reader of your own, "package.module:function", called with this DataSource
    and answering a `recsys.tables.Log`."""
    log: Table = None
    """File, glob, folder, or a list of them."""
    train: Table = None
    """Instead of `log`: files that are already split."""
    valid: Table = None
    """Files of the validation side; none: it is cut from the end of `train`."""
    test: Table = None
    """Files of the test side."""
    items: Table = None
    """The item table."""
    users: Table = None
    """The user table."""
    columns: Schema = Field(default_factory=Schema)
    catalog: CatalogSchema = Field(default_factory=CatalogSchema)
    user_table: UserSchema = Field(default_factory=UserSchema)
    unknown_items: str = "keep"
    """Events on items that the item table lacks: keep or drop. Counted either way."""

    @model_validator(mode="after")
    def _check(self) -> DataSource:
        if ":" not in self.format:
            _one_of("data.format", self.format, FORMATS)
        _one_of("data.unknown_items", self.unknown_items, ("keep", "drop"))
        _one_of("data.columns.time_unit", self.columns.time_unit, UNITS)
        given = [key for key in ("train", "valid", "test") if getattr(self, key) is not None]
        if self.log is not None and given:
            raise ConfigError(
                f"[data] has both log and {given[0]}. Name one log to be split, or train, "
                "(valid,) and test files that are split already."
            )
        if ":" not in self.format and self.log is None and not {"train", "test"} <= set(given):
            raise ConfigError(
                "[data] names no log: set data.log, or data.train and data.test when the files "
                "are split already."
            )
        frames = [key for key in FILES if isinstance(getattr(self, key), pl.DataFrame)]
        if frames and self.format not in READS and ":" not in self.format:
            raise ConfigError(
                f"data.{frames[0]} is a frame, and format = {self.format!r} is read from files as "
                f"published. Name the files, or set data.format to {', '.join(READS)}."
            )
        if self.format in READS:
            self._refuse_what_has_no_effect()
        columns = self.columns
        low, high = columns.rejected_to, columns.positive_from
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"data.columns.rejected_to = {low} is not below positive_from = {high}; a rating "
                "would be both. Lower rejected_to."
            )
        for event in columns.positive:
            if event in columns.shown_events or event in columns.rejected:
                raise ConfigError(
                    f"Event {event!r} is in data.columns.positive and in another list as well. "
                    "Give it one meaning."
                )
        return self

    def _refuse_what_has_no_effect(self) -> None:
        for key in sorted(_changed(self.columns)):
            if key not in READS[self.format]:
                reading = " or ".join(f'"{name}"' for name, keys in READS.items() if key in keys)
                raise ConfigError(
                    f'data.columns.{key} has no effect: format = "{self.format}" does not read it. '
                    f"Leave it out, or set data.format to {reading}."
                )
            if key in NEEDS and getattr(self.columns, NEEDS[key]) is None:
                raise ConfigError(
                    f"data.columns.{key} has no effect without data.columns.{NEEDS[key]}, the "
                    f"column that it speaks of. Name that column, or leave {key} out."
                )
        for table, section in (("items", self.catalog), ("users", self.user_table)):
            name = "catalog" if table == "items" else "user_table"
            if getattr(self, table) is None and (keys := sorted(_changed(section))):
                raise ConfigError(
                    f"data.{name}.{keys[0]} has no effect: data.{table} names no table. Name it, "
                    f"or leave [data.{name}] out."
                )


def _changed(section: Strict) -> set[str]:
    """Keys of a section that are not at their default."""
    fields = type(section).model_fields.items()
    return {
        key
        for key, field in fields
        if getattr(section, key) != field.get_default(call_default_factory=True)
    }


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key} = {value!r} is not known. {nearest(value, known)}")


def with_files(source: DataSource, folder: Path) -> DataSource:
    """The source with every frame written to a Parquet file named after its content."""
    files = {}
    for key in FILES:
        frame = getattr(source, key)
        if isinstance(frame, pl.DataFrame):
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            path = folder / f"{key}-{sha256_bytes(buffer.getbuffer())[:12]}.parquet"
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(buffer.getbuffer())
            files[key] = str(path)
    return source.model_copy(update=files)


def with_defaults(schema: S, **defaults: Any) -> S:
    """The schema with a format's own defaults wherever it says no more than the general default.

    Values are compared rather than asked whether they were written, so that a configuration that
    was written out in full and read again means the same.
    """
    fields = type(schema).model_fields
    unsaid = {
        key: value
        for key, value in defaults.items()
        if getattr(schema, key) == fields[key].get_default(call_default_factory=True)
    }
    return schema.model_copy(update=unsaid)
