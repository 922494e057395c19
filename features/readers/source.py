"""The `[data]` section of a configuration: where a log lies and what its columns mean."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field, model_validator

from recsys.errors import ConfigError, nearest
from recsys.tables import CatalogSchema, Schema, Strict, UserSchema

FORMATS = ("events", "impressions", "sequences", "ebnerd", "mind", "movielens", "lightgcn")
UNITS = ("auto", "s", "ms", "us", "ns")

S = TypeVar("S", bound=Strict)


class DataSource(Strict):
    """Files, their format, and the columns. Paths are relative to the current folder.

    Raises:
        ConfigError: keys that contradict each other, or a value that is not known.
    """

    format: str = "events"
    """events: a row an event. impressions: a row a request, with lists of what was shown and
    clicked. sequences: a row a user, with items in order. ebnerd, mind, movielens, lightgcn: as
    published. Or a reader of your own, "package.module:function", called with this DataSource
    and answering a `recsys.tables.Log`."""
    log: str | tuple[str, ...] | None = None
    """File, glob, folder, or a list of them."""
    train: str | tuple[str, ...] | None = None
    """Instead of `log`: files that are already split."""
    valid: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    items: str | tuple[str, ...] | None = None
    """The item table."""
    users: str | tuple[str, ...] | None = None
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


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key} = {value!r} is not known. {nearest(value, known)}")


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
