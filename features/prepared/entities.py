"""Writing items and users: what is known of each row, from the tables and from the log.

Legend: N item rows, U user rows; row 0 is "nothing known".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.features.prepared.columns import (
    BEGINNING,
    LISTED,
    NEVER,
    aligned,
    categories,
    instants,
    joined_text,
    numbers,
    texts,
    vectors,
)
from recsys.files import sha256_file
from recsys.tables import CatalogSchema, Log, UserSchema


@dataclass
class Writer:
    """Writes arrays and tables into a folder and keeps the list of them."""

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def array(self, name: str, array: np.ndarray, dtype: type) -> None:
        array = np.ascontiguousarray(array, dtype)
        np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        self._note(f"{name}.npy", {"dtype": array.dtype.str, "shape": list(array.shape)})

    def table(self, name: str, frame: pl.DataFrame) -> None:
        frame.write_parquet(self.folder / f"{name}.parquet", compression="zstd", statistics=False)
        self._note(f"{name}.parquet", {"rows": len(frame)})

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        file = self.folder / name
        entry |= {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        self.files[name] = entry


@dataclass(frozen=True)
class Known:
    """What the log says of its items.

    Args:
        first: item row and the first time it stands in the log, chosen or shown.
        on_train: rows of items that appear on the train side.
        cold: (N,) bool, held out.
        cutoff: microseconds at which the train side ends, if that is one moment.
        timed: whether times are of a clock.
    """

    first: pl.DataFrame
    on_train: np.ndarray
    cold: np.ndarray
    cutoff: int | None
    timed: bool


def write_tables(
    writer: Writer, log: Log, items: pl.Series, users: pl.Series, known: Known, warm_users: int
) -> dict[str, Any]:
    """Write everything that has one row an item or a user.

    Args:
        writer: of the folder.
        log: with the item and user tables.
        items: (N-1,) ids of rows 1, 2, ….
        users: (U-1,) likewise.
        known: of the items.
        warm_users: rows 1 to this have a positive on the train side.

    Returns:
        Entries of the manifest.
    """
    catalog = log.catalog
    schema = catalog.schema if catalog is not None else CatalogSchema()
    frame = aligned(catalog.frame if catalog is not None else None, "item", items)
    fit = _times(writer, log, schema, frame, items, known)
    if catalog is not None and schema.vector:
        writer.array("item_vectors", vectors(frame[schema.vector], items), np.float32)
    if catalog is None:
        schema = CatalogSchema()
    item_entry = _features(writer, "item", frame, schema, fit, joined_text(schema))
    frame = frame.select(name for name in frame.columns if name not in (LISTED, schema.vector))
    if schema.title and schema.title != "title":
        frame = frame.with_columns(pl.col(schema.title).alias("title"))
    writer.table("items", frame)

    people = log.user_schema if log.users is not None else UserSchema()
    frame = aligned(log.users, "user", users)
    warm = np.arange(len(users)) < warm_users
    user_entry = _features(writer, "user", frame, people, warm, people.text)
    writer.table("users", frame.select("user"))
    return {
        key: {"item": item_entry[key], "user": user_entry[key]} for key in ("categories", "numbers")
    }


def _times(
    writer: Writer,
    log: Log,
    schema: CatalogSchema,
    frame: pl.DataFrame,
    ids: pl.Series,
    known: Known,
) -> np.ndarray:
    """When each item came into being and may be answered.

    Returns:
        (N-1,) bool, the items that existed at the cut-off: what may be fitted on.
    """
    listed = np.concatenate([[False], frame[LISTED].to_numpy()])
    published = np.full(len(listed), NEVER, np.int64)
    if log.catalog is not None and schema.published:
        published = instants(frame[schema.published], log.schema, NEVER, ids)
    first = np.full(len(listed), NEVER, np.int64)
    first[known.first["item"].to_numpy()] = known.first["time"].to_numpy()
    first = np.minimum(first, published)
    # An item that only its own first event tells of is known after that event, not at it.
    met = np.where(first < published, np.minimum(first, NEVER - 1) + 1, first)
    exists = np.where(listed & (published == NEVER), BEGINNING, met)
    early = published == NEVER
    if known.cutoff is None or not known.timed:
        early[:] = True
    else:
        early |= published <= known.cutoff
    there = listed & early
    there[known.on_train] = True
    there &= ~known.cold
    if not known.timed:
        # Positions within a user say nothing of when an item came into being.
        first[1:], exists[1:] = 0, BEGINNING
    writer.array("item_first_seen", first, np.int64)
    writer.array("item_exists_from", exists, np.int64)
    writer.array("item_known", there, np.uint8)
    if log.catalog is not None:
        for name, missing in (("available_from", BEGINNING), ("available_until", NEVER)):
            column = getattr(schema, name)
            if column:
                times = instants(frame[column], log.schema, missing, ids)
                writer.array(f"item_{name}", times, np.int64)
        if schema.available:
            flag = frame[schema.available].cast(pl.Boolean).fill_null(True).to_numpy()
            writer.array("item_available", np.concatenate([[False], flag]), np.uint8)
    return there[1:]


def _features(
    writer: Writer,
    table: str,
    frame: pl.DataFrame,
    schema: CatalogSchema | UserSchema,
    fit: np.ndarray,
    text: tuple[str | None, ...],
) -> dict[str, Any]:
    """Categories, numbers and text of items or users; all empty where the schema names none."""
    for place, name in enumerate(schema.categories):
        codes, vocab = categories(frame[name], schema.category_separator, fit)
        stem = f"{table}_category_{place}"
        writer.array(f"{stem}_offsets", codes.offsets, np.int64)
        writer.array(f"{stem}_codes", codes.values, np.int32)
        writer.table(stem, vocab.ids.to_frame())
    standard = numbers(frame, schema.numbers, fit, table)
    writer.array(f"{table}_numbers", standard.values, np.float32)
    writer.table(f"{table}_text", texts(frame, text).to_frame())
    return {
        "categories": list(schema.categories),
        "numbers": {
            "names": list(schema.numbers),
            "means": standard.means,
            "deviations": standard.deviations,
        },
    }
