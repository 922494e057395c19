"""Queries and answers of the engine, as data classes.

Legend: D dimensions of the stored vector, k answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys.errors import QueryError

Kind = Literal["similar", "recommend", "search", "vector"]
Value = str | bool | int


class UnknownItem(QueryError):
    """An item was looked up by an id that nobody knows (404)."""


class CursorError(QueryError):
    """A cursor that cannot be followed.

    Args:
        message: what is wrong and the way out.
        gone: it was given by another model version (410); otherwise it was never one of ours or
            belongs to another question (400).
    """

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


@dataclass(frozen=True)
class Filter:
    """What an answer must be like; all given conditions must hold.

    Args:
        equals: column of the catalogue → any of these values; a column of lists, or of texts that
            name several categories, holds when one of its values is among them.
        ranges: number or time column → inclusive bounds, None: open; times in seconds since 1970.
        allow: only these item ids; None: all.
        deny: never these item ids.
    """

    equals: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it lets everything through."""
        return not (self.equals or self.ranges or self.deny) and self.allow is None

    def key(self) -> tuple[Any, ...]:
        """Equal for filters that mean the same; hashable."""
        return (
            tuple(sorted((name, _distinct(values)) for name, values in self.equals.items())),
            tuple(sorted(self.ranges.items(), key=lambda entry: entry[0])),
            None if self.allow is None else tuple(sorted(set(self.allow))),
            tuple(sorted(set(self.deny))),
        )


def _distinct(values: tuple[Value, ...]) -> tuple[tuple[str, Value], ...]:
    # True equals 1 in Python, but not in a catalogue.
    return tuple(sorted({(type(value).__name__, value) for value in values}, key=repr))


NO_FILTER = Filter()


@dataclass(frozen=True)
class Query:
    """One question.

    Args:
        kind: "similar" to items, "recommend" for a user or a history, "search" by text, or nearest
            to a "vector".
        items: similar: one seed or several.
        user: recommend: external id.
        history: recommend: item ids, oldest first, that count instead of what is known of `user`.
        context: recommend: value of each context column (device, hour, …); missing ones count as
            unknown.
        text: search.
        vector: vector: (D,) float32.
        k: answers wanted.
        filter: what the answers must be like.
        drop_seen: recommend: leave out what the user had.
        exact: search exactly even where a graph would do.
        fields: catalogue columns to tell of each answer; None: none; ("*",): all.
        paged: whether a cursor for the next page is wanted.
        cursor: of the page wanted, as the page before gave it.
        diversity: 0: by score alone; 1: by difference from what stands before alone (MMR).
        popularity: −1 … 1, times the standardised log popularity, is added to the standardised
            score.
        explain: tell of each answer what moved its score.
    """

    kind: Kind
    items: tuple[str, ...] = ()
    user: str | None = None
    history: tuple[str, ...] | None = None
    context: Mapping[str, str | float] = field(default_factory=dict)
    text: str | None = None
    vector: np.ndarray | None = None
    k: int = 10
    filter: Filter = NO_FILTER
    drop_seen: bool = True
    exact: bool = False
    fields: tuple[str, ...] | None = None
    paged: bool = False
    cursor: str | None = None
    diversity: float = 0.0
    popularity: float = 0.0
    explain: bool = False

    @property
    def plain_seed(self) -> str | None:
        """The only seed of a query for similar items with nothing beside `k`; None: it is none."""
        if self.kind != "similar" or len(self.items) != 1 or self.fields is not None:
            return None
        more = (self.exact, self.paged, self.cursor, self.explain, self.diversity, self.popularity)
        return None if any(more) or not self.filter.empty else self.items[0]


@dataclass(frozen=True)
class Answers:
    """Items of one question, best first.

    Args:
        ids: (k,) external ids, distinct.
        scores: (k,) float32, larger is better.
        fields: what the catalogue says of each answer, where it was asked for.
        fallback: what answered instead of what was asked for and why, or what was left out of the
            question; None: all as asked.
        next: cursor of the next page; None: the last page, or none was asked for.
        explanations: one an answer, see serving/engine/explain.py, where they were asked for.
        exact: whether the search was exact, so that no better item can have been missed.
        first: position of the first item, counted from 1; more on a later page.
    """

    ids: list[str]
    scores: np.ndarray
    fields: list[dict[str, Any]] | None = None
    fallback: str | None = None
    next: str | None = None
    explanations: list[dict[str, Any]] | None = None
    exact: bool = False
    first: int = 1

    @property
    def frame(self) -> pl.DataFrame:
        """A row an answer: item, score, and the fields that were asked for."""
        return pl.DataFrame(self.to_list(), infer_schema_length=None)

    def to_list(self) -> list[dict[str, Any]]:
        """One object an answer: item, score and the item's fields, as the command prints them."""
        fields = self.fields or [{}] * len(self.ids)
        return [
            # An item table may have a column of that name; the score is ours all the same.
            {"item": item, "score": 0.0} | known | {"item": item, "score": round(float(score), 6)}
            for item, score, known in zip(self.ids, self.scores, fields, strict=True)
        ]


__all__ = ["Answers", "CursorError", "Filter", "Kind", "Query", "UnknownItem", "Value"]
