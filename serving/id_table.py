"""Id table: external ids → rows and rows → JSON, memory-mapped.

Legend: N ids, M slots of the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

import numpy as np
import orjson
import polars as pl
from safetensors.numpy import save_file
from safetensors.torch import load_file

from recsys.errors import BundleError

ESCAPED = r'[\x00-\x1f"\\]'
"""Characters that JSON writes otherwise than they are."""


class IdTable:
    """External ids ↔ rows, in about 25 bytes an id beside the id itself.

    A dictionary of strings takes 140. Ids lie in one text of JSON strings; rows are found by open
    addressing with linear probing, from a hash that is the same in every process. Row 0 is unknown.

    Args:
        text: JSON list of the ids; the k-th string begins after k commas and a bracket.
        start: (N + 2,) where the string of each row begins; the next one is a comma later.
        table: (M,) row of each slot, 0 where it is empty. The slot of an id is its hash modulo a
            power of two, the largest below M, or the first empty one after it.
    """

    def __init__(self, text: bytes, start: np.ndarray, table: np.ndarray) -> None:
        self._text = text
        self._arrays = start, table
        # Plain views: an array pays for its class with every number.
        self._start, self._table = start.data, table.data
        self._mask = (1 << (len(table) - 1).bit_length() - 1) - 1

    @staticmethod
    def of(ids: pl.Series) -> IdTable:
        """The table of distinct ids, none null; `ids[0]` is row 1."""
        names = ids.to_list()
        lengths = (ids.str.len_bytes() + 2).to_numpy().astype(np.int64)
        for row in ids.str.contains(ESCAPED).arg_true().to_list() if len(ids) else ():
            lengths[row] = len(orjson.dumps(names[row]))
        text = orjson.dumps(names)
        start = np.ones(len(names) + 2, np.int64)
        np.cumsum(lengths + 1, out=start[2:])
        start[2:] += 1
        start = start.astype(np.int32 if len(text) < 2**31 else np.int64)

        slots = 1 << max(1, 2 * len(names) - 1).bit_length()
        bounds = zip(start[1:-1].tolist(), (start[2:] - 1).tolist(), strict=True)
        hashes = np.fromiter((crc32(text[a:b]) for a, b in bounds), np.int64, len(names))
        hashes &= slots - 1
        # Slots of sorted hashes are `max(hash, slot before + 1)`, so that all are laid at once; the
        # table goes on behind its last slot, and has no end to wrap around.
        order = np.argsort(hashes, kind="stable")
        step = np.arange(len(names))
        place = np.maximum.accumulate(hashes[order] - step) + step
        table = np.zeros(max(slots, int(place.max(initial=0)) + 1) + 1, np.int32)
        table[place] = order + 1
        return IdTable(text, start, table)

    def save(self, path: Path) -> None:
        """Write the table."""
        start, table = self._arrays
        text = np.frombuffer(self._text, np.uint8)
        save_file({"text": text, "start": start, "table": table}, path)

    @staticmethod
    def load(path: Path, size: int) -> IdTable:
        """Read a table, of which all but the text is mapped.

        Args:
            path: of a file that `save` wrote.
            size: ids that it must have, N.

        Raises:
            BundleError: it has more or fewer.
        """
        parts = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        if len(parts["start"]) != size + 2:
            raise BundleError(
                f"{path} has {len(parts['start']) - 2} ids, but there are {size}. They were not "
                "made together; make the bundle again."
            )
        return IdTable(parts["text"].tobytes(), parts["start"], parts["table"])

    def row_of(self, id: str) -> int:
        """Row of the id; 0: unknown."""
        try:
            fragment = orjson.dumps(id)
        except TypeError:  # a lone surrogate, which no id holds
            return 0
        table, start, text = self._table, self._start, self._text
        place = crc32(fragment) & self._mask
        while row := table[place]:
            if text[start[row] : start[row + 1] - 1] == fragment:
                return row
            place += 1
        return 0

    def fragment(self, row: int) -> bytes:
        """The JSON string of the row's id; `b"null"` of row 0."""
        if row <= 0:
            return b"null"
        return self._text[self._start[row] : self._start[row + 1] - 1]

    def fragments(self, rows: Iterable[int]) -> list[bytes]:
        """The JSON strings of the ids of rows, none below 1."""
        text, start = self._text, self._start
        return [text[start[row] : start[row + 1] - 1] for row in rows]

    def decode(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows, none below 1; quicker than `Vocab.decode` for a few."""
        return orjson.loads(b"[" + b",".join(self.fragments(rows)) + b"]")


__all__ = ["IdTable"]
