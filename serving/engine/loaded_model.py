"""A bundle made ready for queries: id tables, exact search, popularity, text vectors, fields.

Legend: N item rows (row 0 is "nothing known"), n indexed items, K neighbours of each.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys.baselines import Popularity
from recsys.errors import QueryError
from recsys.search import ExactIndex
from recsys.serving import bundle as bundles
from recsys.serving.bundle import ITEM_IDS, USER_IDS, Bundle
from recsys.serving.id_table import IdTable
from recsys.serving.index import HnswIndex
from recsys.serving.manifest import Check
from recsys.serving.neighbours import Neighbours
from recsys.towers.two_tower import added

MAPS = "/proc/self/maps"
"""What lies where in this process's memory."""


class LoadedModel:
    """A bundle made ready for queries; immutable.

    Args:
        bundle: what is known.
        neighbours: the nearest items of every indexed one, or None.
        version: of the model; the first 12 digits of the manifest's content digest when absent.
        ids, user_ids: tables of the items and users; made here when absent.
        as_of: microseconds as of which item statistics stand; None: the bundle's cut-off.

    Attributes:
        position: (N,) int32 index position of each item row, -1 for those not in the index.
    """

    def __init__(
        self,
        bundle: Bundle,
        neighbours: Neighbours | None = None,
        *,
        version: str | None = None,
        ids: IdTable | None = None,
        user_ids: IdTable | None = None,
        as_of: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.as_of = bundle.cutoff if as_of is None else as_of
        self.neighbours = neighbours
        self.version = version or str(bundle.manifest.get("content", ""))[:12]
        self.position = np.full(bundle.items.size, -1, np.int32)
        self.position[bundle.rows] = np.arange(len(bundle.rows), dtype=np.int32)
        self._ids, self._user_ids = ids, user_ids

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

    @cached_property
    def ids(self) -> IdTable:
        """Item ids ↔ rows."""
        return IdTable.of(self.bundle.items.ids) if self._ids is None else self._ids

    @cached_property
    def user_ids(self) -> IdTable:
        """User ids ↔ rows."""
        return IdTable.of(self.bundle.users.ids) if self._user_ids is None else self._user_ids

    @cached_property
    def row_of(self) -> Callable[[str], int]:
        """External id → item row; 0: unknown."""
        return self.ids.row_of

    @cached_property
    def exact(self) -> ExactIndex:
        """Exact search over what the index holds, in the same memory where that can be."""
        index = self.bundle.index
        if isinstance(index, HnswIndex):
            return index.exact
        if isinstance(index, ExactIndex):
            return index
        return ExactIndex(np.ascontiguousarray(self.bundle.vectors[self.bundle.rows]))

    @cached_property
    def popularity(self) -> Popularity:
        """Counts of each item row's events, what answers when nothing is known of who asks."""
        return Popularity(self.bundle.timeline.popularity(self.as_of))

    @cached_property
    def told_apart(self) -> int:
        """User rows from 1 up to here, not included, have a vector or features of their own."""
        model = self.bundle.model
        described = any(True for _ in model.users.named_buffers())
        return self.bundle.users.size if described else model.user_spec.ids

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(Q, D) stored vectors of items with these texts, otherwise unknown.

        Raises:
            QueryError: the bundle has no text encoder, or a text is empty or none of its words is
                known.
        """
        encoder, model = self.bundle.encoder, self.bundle.model
        if encoder is None or not model.item_spec.text:
            raise QueryError(
                "This bundle was trained without item text, so a text cannot be looked up. "
                "Name text columns in [data.catalog] and train again."
            )
        if not all(text.strip() for text in texts):
            raise QueryError("The text is empty; give at least a word.")
        encoded = encoder.encode(list(texts))
        for row in np.flatnonzero(~encoded.any(1)).tolist():
            raise QueryError(
                f"No word of {texts[row]!r} is known to the text encoder; try other words."
            )
        with torch.inference_mode():
            vectors = torch.from_numpy(np.asarray(encoded, np.float32))
            statistics = self._unknown_statistics
            if statistics is not None:
                statistics = statistics.expand(len(vectors), -1)
            rows = torch.zeros(len(vectors), dtype=torch.int64)
            embedded = model.embed_items(rows, statistics, vectors)
            if model.item_spec.text_neighbours:
                start = model.item_tower.inputs.start_of(vectors, model.items)
                embedded = added(embedded, start)
            return model.item_tower(embedded).float().numpy()

    @cached_property
    def _unknown_statistics(self) -> torch.Tensor | None:
        """(1, S) statistics of an item never seen; they cost a pass over the newest events."""
        if not self.bundle.model.uses_statistics or self.as_of is None:
            return None
        nothing = np.zeros(1, np.int64)
        return torch.from_numpy(self.bundle.timeline.statistics(nothing, self.as_of))

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
