"""The prepared dataset: memory-mapped arrays and a manifest.

Legend: E positive events, U user rows, N item rows, R requests, T shown items, S skips,
C context columns, F number columns, V vector size. Row 0 of users and items is "nothing known".
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import BundleError, DataError
from recsys.files import read_json, sha256_file
from recsys.ragged import Ragged
from recsys.vocab import Vocab

FORMAT = "recsys.prepared"
FORMAT_VERSION = 4
"""Rises also when a reader gives other rows, so that nothing prepared before is taken for it."""
MANIFEST = "manifest.json"


class Dataset:
    """What `recsys.features.prepared.prepare.prepare` wrote.

    Attributes:
        path, manifest: the folder, and what its manifest.json says.
        fresh: whether this very call of `prepare` wrote it; False when it stood there unchanged.
        n_items, n_users: number of rows, row 0 included.
        n_warm_items, n_warm_users: rows 1 … n_warm (inclusive) have a positive on the train side.
        n_refit_items, n_refit_users: rows 1 … n_refit have one on the train or validation side.
        event_user, event_item: (E,) int32; event_time: (E,) int64; event_weight: (E,) float32;
            event_side: (E,) uint8: the positives of all sides, sorted by user, time, source row.
        event_past: (E,) int32, how many events of the same user have a strictly smaller time.
        user_offsets: (U+1,) int64, the events of user u are [user_offsets[u], user_offsets[u+1]).
        event_context: (E, C) int32 codes.
        skip_offsets: (E+1,) int64; skip_item: (S,) int32; skip_weight: (S,) float32: the
            skips that belong to each event, and how sure each is.
        request_user: (R,) int32; request_time: (R,) int64; request_side: (R,) uint8;
            request_offsets: (R+1,) int64; request_context: (R, C) int32: sorted by user and time.
        shown_item: (T,) int32; shown_clicked: (T,) uint8; shown_position: (T,) int16 or None;
        item_first_seen: (N,) int64, published or first met in the log, the greatest int64 if never.
        item_exists_from: (N,) int64, the same, but the least int64 for an item of a table that
            says nothing of publication.
        item_known: (N,) uint8, existed at the cut-off and is not held out as cold.
        item_available_from, item_available_until: (N,) int64 or None; item_available: (N,) uint8
            or None.
        item_numbers, user_numbers: (N or U, F) float32; item_vectors: (N, V) float32 or None.
    """

    event_user: np.ndarray
    event_item: np.ndarray
    event_time: np.ndarray
    event_weight: np.ndarray
    event_side: np.ndarray
    event_past: np.ndarray
    event_context: np.ndarray
    user_offsets: np.ndarray
    skip_offsets: np.ndarray
    skip_item: np.ndarray
    skip_weight: np.ndarray
    request_user: np.ndarray
    request_time: np.ndarray
    request_side: np.ndarray
    request_offsets: np.ndarray
    request_context: np.ndarray
    shown_item: np.ndarray
    shown_clicked: np.ndarray
    shown_position: np.ndarray | None
    item_first_seen: np.ndarray
    item_exists_from: np.ndarray
    item_known: np.ndarray
    item_available_from: np.ndarray | None
    item_available_until: np.ndarray | None
    item_available: np.ndarray | None
    item_numbers: np.ndarray
    item_vectors: np.ndarray | None
    user_numbers: np.ndarray

    OPTIONAL = (
        "shown_position",
        "item_available_from",
        "item_available_until",
        "item_available",
        "item_vectors",
    )

    def __init__(self, path: Path, manifest: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.manifest, self.fresh = path, manifest, fresh
        self.n_items: int = manifest["n_items"]
        self.n_users: int = manifest["n_users"]
        self.n_warm_items: int = manifest["n_warm_items"]
        self.n_warm_users: int = manifest["n_warm_users"]
        self.n_refit_items: int = manifest["n_refit_items"]
        self.n_refit_users: int = manifest["n_refit_users"]
        self.context_sizes: dict[str, int] = manifest["context_sizes"]
        self._arrays = {
            name.removesuffix(".npy"): self._map(name, entry)
            for name, entry in manifest["files"].items()
            if name.endswith(".npy")
        }
        for name in Dataset.__annotations__:
            if name not in self._arrays and name not in self.OPTIONAL:
                raise BundleError(
                    f"{path}/{MANIFEST} lists no {name}.npy. "
                    "Prepare the data again: recsys prepare."
                )
            setattr(self, name, self._arrays.get(name))

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Dataset:
        """Map a prepared folder; the arrays are read-only.

        Raises:
            BundleError: it is no prepared dataset, of another format version, or an array differs
                from what the manifest says.
        """
        path = Path(path)
        try:
            manifest = read_json(path / MANIFEST)
        except DataError as error:
            raise BundleError(f"{path} is no prepared dataset. {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise BundleError(
                f"{path}/{MANIFEST} says format {found!r}, but a prepared dataset says {FORMAT!r}. "
                "Name the folder that `recsys prepare` wrote."
            )
        if manifest.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {manifest.get('format_version')}, but this program "
                f"reads version {FORMAT_VERSION}. Prepare the data again: recsys prepare."
            )
        return Dataset(path, manifest)

    def _map(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        file = self.path / name
        if not file.exists():
            raise BundleError(f"{file} is missing. Prepare the data again: recsys prepare.")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(
                f"{file} has {size} bytes, but {MANIFEST} says {entry['bytes']}. "
                "Prepare the data again: recsys prepare."
            )
        try:
            # An empty array cannot be mapped.
            empty = 0 in entry["shape"]
            array = np.load(file, mmap_mode=None if empty else "r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BundleError(
                f"{file} is no NumPy array ({error}). Prepare the data again: recsys prepare."
            ) from None
        said = (entry["dtype"], entry["shape"])
        if (array.dtype.str, list(array.shape)) != said:
            raise BundleError(
                f"{file} holds {array.dtype.str} {list(array.shape)}, but {MANIFEST} says "
                f"{said[0]} {said[1]}. Prepare the data again: recsys prepare."
            )
        return array

    def verify(self) -> None:
        """Compare the digest of every file with the manifest.

        Raises:
            BundleError: a file is missing or its digest differs.
        """
        for name, entry in self.manifest["files"].items():
            if not (self.path / name).exists():
                raise BundleError(f"{self.path / name} is missing. Prepare the data again.")
            found = sha256_file(self.path / name)
            if found != entry["sha256"]:
                raise BundleError(
                    f"{self.path / name} has the SHA-256 {found[:16]}…, but {MANIFEST} says "
                    f"{entry['sha256'][:16]}…. Prepare the data again: recsys prepare."
                )

    @property
    def timed(self) -> bool:
        """Whether times are of a clock; else they are positions within each user."""
        return self.manifest["timed"]

    @property
    def valid_from(self) -> int | None:
        """Microseconds at which the train side ends, when the split has one cut-off for all."""
        return self.manifest["split"]["valid_from"]

    @property
    def test_from(self) -> int | None:
        return self.manifest["split"]["test_from"]

    @cached_property
    def items(self) -> Vocab:
        return Vocab(self._table("items.parquet", ["item"])["item"])

    @cached_property
    def users(self) -> Vocab:
        return Vocab(self._table("users.parquet", ["user"])["user"])

    @cached_property
    def catalog(self) -> pl.DataFrame:
        """Rows 1, 2, … of the items: `item`, perhaps `title`, and the table's other columns."""
        return self._table("items.parquet")

    @cached_property
    def item_text(self) -> list[str]:
        """Text of every item row; empty for row 0 and for items without one."""
        return self._table("item_text.parquet")["text"].to_list()

    @cached_property
    def user_text(self) -> list[str]:
        return self._table("user_text.parquet")["text"].to_list()

    @cached_property
    def item_categories(self) -> dict[str, tuple[Ragged, int]]:
        """Column → codes of every item row and the number of codes, 0 = unknown included."""
        return self._categories("item")

    @cached_property
    def user_categories(self) -> dict[str, tuple[Ragged, int]]:
        return self._categories("user")

    def category_vocab(self, table: str, name: str) -> Vocab:
        """The values behind the codes of a column of the table "item" or "user"."""
        place = self.manifest["categories"][table].index(name)
        return Vocab(self._table(f"{table}_category_{place}.parquet")["id"])

    def context_vocab(self, name: str) -> Vocab | None:
        """The values behind the codes of a context column; None for a column of numbers."""
        column = self.manifest["context"][name]
        if column["edges"] is not None:
            return None
        return Vocab(self._table(f"context_{column['place']}.parquet")["id"])

    def _categories(self, table: str) -> dict[str, tuple[Ragged, int]]:
        result = {}
        for place, name in enumerate(self.manifest["categories"][table]):
            stem = f"{table}_category_{place}"
            codes = Ragged(self._arrays[f"{stem}_offsets"], self._arrays[f"{stem}_codes"])
            result[name] = (codes, self.manifest["files"][f"{stem}.parquet"]["rows"] + 1)
        return result

    def _table(self, name: str, columns: list[str] | None = None) -> pl.DataFrame:
        entry = self.manifest["files"].get(name)
        file = self.path / name
        if entry is None or not file.exists():
            raise BundleError(f"{file} is missing. Prepare the data again: recsys prepare.")
        try:
            frame = pl.read_parquet(file, columns=columns)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise BundleError(f"{file} cannot be read ({error}). Prepare the data again.") from None
        if len(frame) != entry["rows"]:
            raise BundleError(
                f"{file} has {len(frame)} rows, but {MANIFEST} says {entry['rows']}. "
                "Prepare the data again: recsys prepare."
            )
        return frame
