"""Read a log: a `[data]` section becomes a `Log` of lazy canonical frames.

A reader of one's own is a function from a `DataSource` to a `recsys.tables.Log`:

    [data]
    format = "mypackage.readers:warehouse"

or, from Python, `read(source, reader=warehouse)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import polars as pl

from recsys.errors import ConfigError
from recsys.features.readers import (
    ebnerd,
    events,
    impressions,
    lightgcn,
    mind,
    movielens,
    sequences,
)
from recsys.features.readers.files import Paths, open_parts
from recsys.features.readers.source import DataSource
from recsys.tables import Log

__all__ = ["DataSource", "Reader", "read", "scan"]

Reader = Callable[[DataSource], Log]

READERS: dict[str, Reader] = {
    "events": events.read,
    "impressions": impressions.read,
    "sequences": sequences.read,
    "ebnerd": ebnerd.read,
    "mind": mind.read,
    "movielens": movielens.read,
    "lightgcn": lightgcn.read,
}


def read(source: DataSource, reader: Reader | None = None) -> Log:
    """Read a log as its configuration says.

    All rows are looked at once, to check them and to count what is left out; the frames of the
    Log are lazy, so that whoever uses them reads the files once more, streaming.

    Args:
        source: the `[data]` section.
        reader: instead of the one that `source.format` names.

    Raises:
        DataError: the files cannot be read as the schema says.
        ConfigError: `format` names no reader.
    """
    chosen = reader or READERS.get(source.format) or _imported(source.format)
    log = chosen(source)
    if not isinstance(log, Log):
        raise ConfigError(
            f"The reader {source.format!r} answered a {type(log).__name__}. "
            "It must answer a recsys.tables.Log."
        )
    return log


def scan(paths: Paths, separator: str | None = None) -> tuple[pl.LazyFrame, tuple[Path, ...]]:
    """Scan tables lazily: files, globs and folders of CSV, TSV, NDJSON or Parquet.

    Args:
        paths: one or several; `key=value` folders become columns.
        separator: between the columns of text tables; None: looked at in the first line.

    Returns:
        The rows, files below one another, every column of a text table String; and the files.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    parts = open_parts(paths, separator=separator)
    frames = [part.frame for part in parts]
    return pl.concat(frames, how="diagonal_relaxed"), tuple(part.path for part in parts)


def _imported(name: str) -> Reader:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"data.format = {name!r} cannot be imported: {error}. "
            'Write "package.module:function" of a module that Python finds.'
        ) from None
