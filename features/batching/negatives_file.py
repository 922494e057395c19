"""Negatives file: user–item pairs known to be negative.

Legend: T pairs of the file, U user rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from recsys.errors import DataError, nearest
from recsys.features.batching.negatives import UserNegatives
from recsys.features.readers.files import open_parts, reading
from recsys.tables import Side

if TYPE_CHECKING:
    from recsys.features.prepared.dataset import Dataset

KEY = "training.negatives.file"


class NegativesFile(NamedTuple):
    """Negatives of each user, and what was done with the pairs of the file: counts by name."""

    negatives: UserNegatives
    notes: dict[str, int]


def read_negatives(path: str | Path, dataset: Dataset, until: Side = Side.TRAIN) -> NegativesFile:
    """Read pairs of user and item, in external ids, that are to be pushed apart.

    Left out, and counted, are ids that the dataset does not know, items that were not yet there at
    the cut-off or are held out as cold, and items that the user chose on the side learned from. A
    pair that stands twice counts twice: its weights are added.

    Args:
        path: CSV, TSV, NDJSON or Parquet with the columns `user`, `item` and perhaps `weight`: how
            many items a pair stands for; 1 where the file does not say.
        dataset: prepared.
        until: the last side that is learned from.

    Raises:
        DataError: there is no such file, a column is missing, or a weight is no number from 0 on.
    """
    user, item, weight = _columns(path, dataset)
    notes = {"pairs": len(user)}
    known = user > 0
    notes["of unknown users"] = int((~known).sum())
    there = np.asarray(dataset.item_known).astype(bool)[item]
    there &= item > 0
    notes["of items unknown at the cut-off"] = int((known & ~there).sum())
    known &= there
    pair = user * dataset.n_items + item
    learned = np.asarray(dataset.event_side) <= until
    chosen = np.asarray(dataset.event_user)[learned].astype(np.int64) * dataset.n_items
    liked = np.isin(pair, chosen + np.asarray(dataset.event_item)[learned])
    notes["chosen by the user"] = int((known & liked).sum())
    kept = known & ~liked & (weight > 0)
    distinct, place = np.unique(pair[kept], return_inverse=True)
    counts = np.bincount(distinct // dataset.n_items, minlength=dataset.n_users)
    negatives = UserNegatives(
        np.concatenate([[0], np.cumsum(counts)]),
        distinct % dataset.n_items,
        np.bincount(place.reshape(-1), weight[kept], len(distinct)).astype(np.float32),
    )
    notes["negatives"] = len(distinct)
    return NegativesFile(negatives, notes)


def _columns(path: str | Path, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) user rows, (T,) item rows, (T,) float64 weights."""
    frames = []
    for part in open_parts(path, ids=("user", "item")):
        names = part.frame.collect_schema().names()
        for wanted in ("user", "item"):
            if wanted not in names:
                raise DataError(
                    f"{part.path}, which {KEY} names, has no column {wanted!r}. "
                    f"{nearest(wanted, names)} It needs user and item, and may have weight."
                )
        weight = pl.col("weight") if "weight" in names else pl.lit(1.0)
        frames.append(
            part.frame.select(
                pl.col("user", "item").cast(pl.String), weight.alias("weight").cast(pl.String)
            )
        )
    with reading(str(path)):
        table = pl.concat(frames).collect()
    number = table["weight"].cast(pl.Float64, strict=False)
    wrong = ~(number.is_finite() & (number >= 0)).fill_null(False)
    if wrong.any():
        row = table.row(int(wrong.arg_true()[0]), named=True)
        raise DataError(
            f"{path}, which {KEY} names, has the weight {row['weight']!r} for user "
            f"{row['user']!r} and item {row['item']!r}. A weight is a number from 0 on: mend it, "
            "or leave the column out."
        )
    return (
        dataset.users.encode(table["user"]).astype(np.int64),
        dataset.items.encode(table["item"]).astype(np.int64),
        number.to_numpy(),
    )
