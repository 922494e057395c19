"""A bundle made ready for questions: ids to rows in half a microsecond, ids as JSON, fields.

Legend: N item rows (row 0 is "nothing known"), n indexed items, K neighbours of each.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import QueryError
from recsys.serving import bundle as bundles
from recsys.serving.bundle import ITEM_IDS, USER_IDS, Bundle
from recsys.serving.id_table import IdTable
from recsys.serving.manifest import Check
from recsys.serving.neighbours import Neighbours
from recsys.serving.recommender import Recommender

MAPS = "/proc/self/maps"
"""What lies where in this process's memory."""


class LoadedModel:
    """A bundle made ready for questions; immutable.

    Args:
        bundle: what is known.
        neighbours: the nearest items of every indexed one, or None.
        version: of the model; the first 12 digits of the manifest's content digest when absent.
        ids, user_ids: tables of the items and users; made here when absent.

    Attributes:
        recommender: answers from the bundle.
        position: (N,) int32 index position of each item row, -1 for those not in the index.
        ids: item ids.
        row_of: external id → item row; 0: unknown.
        fragment: item row → JSON string of its id, quotes included; `b"null"` of row 0.
    """

    def __init__(
        self,
        bundle: Bundle,
        neighbours: Neighbours | None = None,
        *,
        version: str | None = None,
        ids: IdTable | None = None,
        user_ids: IdTable | None = None,
    ) -> None:
        self.bundle = bundle
        self.recommender = Recommender(bundle)
        self.neighbours = neighbours
        self.version = version or str(bundle.manifest.get("content", ""))[:12]
        self.position = self.recommender.position
        self.ids = IdTable.of(bundle.items.ids) if ids is None else ids
        self.user_ids = IdTable.of(bundle.users.ids) if user_ids is None else user_ids
        # Asked for every item of every request: a call less each.
        self.row_of, self.fragment = self.ids.row_of, self.ids.fragment

    @staticmethod
    def load(path: str | Path, *, verify: bool = True, begun: Check | None = None) -> LoadedModel:
        """Read a bundle, its table of neighbours and its tables of ids.

        Args:
            path: the bundle's folder.
            verify: compare the digests of all files with the manifest first.
            begun: of `recsys.serving.manifest.begin`, some time ago; else it begins here.

        Raises:
            BundleError: it is damaged, foreign or does not match itself.
        """
        path = Path(path)
        bundle = bundles.load(path, verify=verify, begun=begun)
        ids, user_ids = (
            IdTable.load(path / name, len(vocab.ids)) if (path / name).is_file() else None
            for name, vocab in ((ITEM_IDS, bundle.items), (USER_IDS, bundle.users))
        )
        return LoadedModel(
            bundle, Neighbours.load(path, bundle.manifest), ids=ids, user_ids=user_ids
        )

    def seldom_read(self) -> list[np.ndarray]:
        """What is read to be judged and laid out when a model starts, and little of it later."""
        bundle, table = self.bundle, self.neighbours
        times = bundle.timeline.first_seen, bundle.timeline.exists_from
        wide = () if table is None or table.first is None else (table.rows, table.scores)
        return [bundle.vectors, bundle.window, *times, *wide]

    @property
    def field_names(self) -> list[str]:
        """What the catalogue says of each item, beside its id."""
        return [name for name in self.bundle.catalog.columns if name != "item"]

    def fields(self, rows: np.ndarray, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What the catalogue says of items, as JSON takes it.

        Args:
            rows: (R,) item rows, none below 1.
            names: columns wanted, in that order; None: all.

        Returns:
            One object a row: dates and times in ISO 8601, durations in seconds, decimals as
            floats; null for NaN and infinity.

        Raises:
            QueryError: a column that the catalogue has not.
        """
        known = self.field_names
        wanted = known if names is None else list(dict.fromkeys(names))  # each named once
        if missing := [name for name in wanted if name not in known]:
            raise QueryError(
                f"There is no field {missing[0]!r}. Known fields: {', '.join(known) or 'none'}."
            )
        if not wanted:
            return [{} for _ in rows]
        return json_rows(self.bundle.catalog.select(wanted)[np.asarray(rows, np.int64) - 1])


def give_back(*mapped: np.ndarray) -> None:
    """Give the system back what was read only to be judged, and what was freed on the way.

    Args:
        mapped: arrays that were read as a whole, and will be in parts: where they lie in a file,
            their pages are read again when they are wanted.
    """
    if not Path(MAPS).is_file():  # Linux has it
        return
    library = ctypes.CDLL(None)
    page = mmap.PAGESIZE
    for array in mapped:
        # Whole pages, so that nothing beside the array is touched.
        start = -(-array.ctypes.data // page) * page
        length = (array.ctypes.data + array.nbytes - start) // page * page
        if length > 0 and _of_a_file(start, length):
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    if trim := getattr(library, "malloc_trim", None):  # glibc
        trim(0)


def _of_a_file(start: int, length: int) -> bool:
    """Whether memory mirrors a file; what is given back of any other comes again as zeros."""
    with open(MAPS, encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            low, high = (int(edge, 16) for edge in span.split("-"))
            if low <= start and start + length <= high:
                return inode != "0"
    return False


def json_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as objects of JSON values, see `Served.fields`."""
    awkward = [name for name, dtype in frame.schema.items() if not _plain(dtype)]
    rows = frame.to_dicts()
    for row in rows:
        for name in awkward:
            row[name] = json_value(row[name])
    return rows


def _plain(dtype: pl.DataType) -> bool:
    """Whether Python values of the type are JSON values as they are."""
    return dtype.is_integer() or dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Null)


def json_value(value: Any) -> Any:
    """A Python value as JSON takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return json_value(float(value))
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: json_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(one) for one in value]
    return value
