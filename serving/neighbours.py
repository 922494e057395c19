"""Table of nearest neighbours of every item, computed when a bundle is made.

The most frequent question, what is like this item, is then one row of a memory-mapped file.
Legend: n indexed items, K neighbours of each, D dimensions, b items of a block.
"""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from recsys.errors import BundleError
from recsys.search import ExactIndex, Index
from recsys.serving.index import HnswIndex

ROWS, SCORES = "neighbours.rows.npy", "neighbours.scores.npy"
FIRST_ROWS, FIRST_SCORES = "neighbours.first.rows.npy", "neighbours.first.scores.npy"
FIRST = 12
"""Neighbours of each item that stand in a table of their own, too: most questions want no more, and
then only an eighth of the bytes is ever in memory."""
LEAST_RECALL = 0.99
"""Share of the exact neighbours that a table must hold, of all K and of the first 10."""
BROADEST = 4096
"""Broadest search of the graph tried for it."""
SAMPLE = 1000
"""Items whose exact neighbours are found to measure the recall."""
AT_ONCE = 8192


@dataclass(frozen=True)
class Neighbours:
    """What `Recommender.similar` answers for every indexed item, found beforehand.

    Args:
        rows: (n, K) int32 index positions of the nearest of each index position, best first, the
            item itself left out, padded with -1.
        scores: (n, K) float32, padded with -inf.
        recall: share of the exact neighbours that the table holds, on a sample.
        first: the first columns of the same, when they are in files of their own.
    """

    rows: np.ndarray
    scores: np.ndarray
    recall: float
    first: Neighbours | None = None

    def narrowest(self, k: int) -> Neighbours:
        """The smallest table with at least k neighbours of each item, else the widest."""
        return self.first if self.first is not None and k <= self.first.rows.shape[1] else self

    @staticmethod
    def load(path: str | Path, manifest: dict[str, Any]) -> Neighbours | None:
        """The table of a bundle, memory-mapped; None where the bundle has none.

        Raises:
            BundleError: it has another size than the manifest says.
        """
        said = manifest.get("neighbours")
        if not said:
            return None
        path = Path(path)
        shape = manifest["indexed"], said["k"]
        first = None
        if said.get("first"):
            narrow = _table(path, FIRST_ROWS, FIRST_SCORES, (shape[0], said["first"]))
            first = Neighbours(*narrow, said["recall"])
        rows, scores = _table(path, ROWS, SCORES, shape, seldom=first is not None)
        if first is not None:
            some = np.linspace(0, shape[0] - 1, min(64, shape[0])).astype(np.int64)
            if not np.array_equal(first.rows[some], rows[some, : said["first"]]):
                raise BundleError(
                    f"The table of neighbours in {path} and its first columns differ. They were "
                    "not made together; make the bundle again."
                )
        return Neighbours(rows, scores, said["recall"], first)


def _table(
    path: Path, rows: str, scores: str, shape: tuple[int, int], *, seldom: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays of a table, memory-mapped; what is `seldom` read takes no more than is read."""
    try:
        arrays = [
            np.load(path / name, mmap_mode="r", allow_pickle=False) for name in (rows, scores)
        ]
    except (OSError, ValueError) as error:
        raise BundleError(f"The table of neighbours in {path} cannot be read: {error}.") from None
    if any(a.shape != shape for a in arrays) or [a.dtype for a in arrays] != [np.int32, np.float32]:
        found = ", ".join(f"{a.dtype} {a.shape}" for a in arrays)
        raise BundleError(
            f"{path / rows} and its scores are {found}; the manifest says int32, float32 and "
            f"{shape}. Make the bundle again."
        )
    if seldom:
        for array in arrays:
            array._mmap.madvise(mmap.MADV_RANDOM)  # else a page brings fifteen others along
    # Plain views: a np.memmap pays for its class with every slice.
    return arrays[0].view(np.ndarray), arrays[1].view(np.ndarray)


def write_neighbours(
    folder: Path, index: Index, vectors: np.ndarray, k: int, *, seed: int = 0
) -> dict[str, Any] | None:
    """Find the neighbours of all items and write them into a bundle's folder.

    The graph is searched ever more broadly until it gives `LEAST_RECALL` of the exact neighbours
    of a sample; where that is nearly all of a small catalogue, the exact product is asked instead.

    Args:
        folder: of the bundle that is being made.
        index: over `vectors`.
        vectors: (n, D) float32 stored vectors of the indexed items.
        k: neighbours of each item, K.
        seed: of the sample.

    Returns:
        What the manifest says of the table; None: nothing is indexed, and nothing was written.

    Warns:
        UserWarning: the recall stays below `LEAST_RECALL`; the manifest says so too.
    """
    n = len(vectors)
    if not n:
        return None
    sample = np.sort(np.random.default_rng(seed).permutation(n)[:SAMPLE])
    exact = _best(ExactIndex(vectors), vectors, sample, k)[1]
    index, breadth = _broad_enough(index, vectors, sample, k, exact)
    rows = open_memmap(folder / ROWS, "w+", np.int32, (n, k))
    scores = open_memmap(folder / SCORES, "w+", np.float32, (n, k))
    for start in range(0, n, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, n))
        rows[part], scores[part] = _best(index, vectors, np.arange(n)[part], k)
    if k > FIRST:
        np.save(folder / FIRST_ROWS, np.ascontiguousarray(rows[:, :FIRST]))
        np.save(folder / FIRST_SCORES, np.ascontiguousarray(scores[:, :FIRST]))
    recall, first = _recalls(scores[sample], exact, vectors, sample)
    if min(recall, first) < LEAST_RECALL:
        warnings.warn(
            f"The table of neighbours holds {recall:.1%} of the exact ones (of the first ten "
            f"{first:.1%}), less than {LEAST_RECALL:.0%}. Raise index.m and "
            'index.ef_construction, or set index.kind = "exact".',
            stacklevel=2,
        )
    rows.flush()
    scores.flush()
    return {
        "k": k,
        "first": FIRST if k > FIRST else None,
        "recall": recall,
        "recall_10": first,
        "enough": min(recall, first) >= LEAST_RECALL,
        "sample": len(sample),
        "breadth": breadth,
    }


def _broad_enough(
    index: Index, vectors: np.ndarray, sample: np.ndarray, k: int, exact: np.ndarray
) -> tuple[Index, int | None]:
    """The index, searching so broadly that the sample is well answered; None: exactly."""
    if not isinstance(index, HnswIndex):
        return index, None
    breadth = max(index.rules.ef, 2 * (k + 1))
    while True:
        broad = index.with_breadth(breadth)
        if breadth > index.rules.exact_breadth * index.size:
            return broad, None  # the planner takes the exact product
        found = _best(broad, vectors, sample, k)[1]
        if min(_recalls(found, exact, vectors, sample)) >= LEAST_RECALL or breadth >= BROADEST:
            return broad, breadth
        breadth = min(2 * breadth, BROADEST)


def _best(
    index: Index, vectors: np.ndarray, part: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(b, k) best positions of each item of `part` but itself, and their scores."""
    rows, scores = index.search(np.array(vectors[part], np.float32, order="C"), k + 1)
    # Itself is nearly always among them, though not always first: equals by the smaller row.
    keep = rows != part[:, None]
    keep[keep.all(1), -1] = False
    shape = len(part), k
    return rows[keep].reshape(shape).astype(np.int32), scores[keep].reshape(shape)


def _recalls(
    found: np.ndarray, exact: np.ndarray, vectors: np.ndarray, sample: np.ndarray
) -> tuple[float, float]:
    """Share of the exact answers found, of all and of the first ten; equals count alike."""
    lengths = np.linalg.norm(vectors[sample], axis=1)
    slack = 1e-6 * lengths * (np.linalg.norm(vectors, axis=1).max() if len(vectors) else 0.0)

    def share(k: int) -> float:
        there = np.isfinite(exact[:, :k])  # a small catalogue has fewer than k others
        if not there.any():
            return 1.0
        last = np.where(there, exact[:, :k], np.inf).min(1) - slack
        hit = (found[:, :k] >= last[:, None]) & np.isfinite(found[:, :k])
        return float(np.minimum(hit.sum(1), there.sum(1)).sum() / there.sum())

    return share(found.shape[1]), share(10)


__all__ = ["Neighbours", "write_neighbours"]
