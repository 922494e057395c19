"""What a graph holds of vectors: a node for all that are equal, perhaps lifted onto a sphere.

Legend: N rows, D dimensions, G distinct vectors, b queries, w rows found for each, k answers.
"""

from __future__ import annotations

import numpy as np

from recsys.ragged import Ragged, gather

UNIT_TOLERANCE = 1e-3
"""Vectors whose lengths differ by less, relatively, count as equally long."""
LIFT_SPREAD = 3.0
"""Longest vector over the median up to which lifting onto a sphere finds more than plain inner
products (20k × 64 at breadth 200, k = 100: biases .99 → 1.00 and .28 → 1.00; a dot product with
lognormal lengths, spread 24: .94 → .33)."""
NOTHING = 1e-30
"""A vector as short as this has no direction."""


def lengths_of(vectors: np.ndarray) -> np.ndarray:
    """(n,) Euclidean lengths, in float64 because squares of float32 may vanish or overflow."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def lifts(lengths: np.ndarray, space: str) -> bool:
    """Whether vectors of these lengths are lifted, see `GraphRules.space`."""
    if not len(lengths) or space == "plain":
        return False
    longest, median = float(lengths.max()), float(np.median(lengths))
    # A zero vector beside unit vectors scores 0 wherever it lies: not a reason to lift.
    positive = lengths[lengths > NOTHING]
    if not len(positive) or longest - float(positive.min()) <= UNIT_TOLERANCE * longest:
        return False
    return space == "lifted" or longest <= LIFT_SPREAD * median


def distinct(vectors: np.ndarray) -> tuple[np.ndarray | None, Ragged | None]:
    """First row of each distinct vector, in row order (G,), and the rows of each; None if N = G.

    Then every row is a node of its own. Zero and minus zero are equal.

    Args:
        vectors: (N, D) float32, finite.
    """
    key = np.zeros(len(vectors), np.uint64)
    random = np.random.default_rng(0)
    constants = random.integers(1, 2**64, (vectors.shape[1],), dtype=np.uint64) | np.uint64(1)
    for column, constant in enumerate(constants):  # over dimensions, not rows
        bits = (vectors[:, column] + np.float32(0)).view(np.uint32)  # -0 is 0
        key += (bits.astype(np.uint64) + np.uint64(column + 1)) * constant
        key ^= key >> np.uint64(29)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    if len(first) == len(vectors):
        return None, None
    if not np.array_equal(vectors, vectors[first[group]]):  # two vectors with one key: sort them
        _, first, group = np.unique(
            vectors + np.float32(0), axis=0, return_index=True, return_inverse=True
        )
        group = group.ravel()
    order = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(len(first))
    node = number[group]  # (N,)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(node), dtype=np.int64)])
    return first[order], Ragged(offsets, np.argsort(node, kind="stable"))


def members_of(nodes: np.ndarray, members: Ragged, width: int) -> np.ndarray:
    """The first `width` rows of the nodes (b, g), each node's in order; (b, width) with -1."""
    lengths = members.lengths[nodes]  # (b, g)
    before = np.cumsum(lengths, 1) - lengths
    taken = np.clip(width - before, 0, lengths)
    start = members.offsets[nodes]
    flat = gather(members.values, start.ravel(), (start + taken).ravel()).values
    out = np.full((len(nodes), width), -1, np.int64)
    out[np.arange(width) < taken.sum(1, keepdims=True)] = flat
    return out


def first_kept(rows: np.ndarray, keep: np.ndarray, k: int) -> np.ndarray:
    """(b, k) the first k kept rows of each query, padded with -1."""
    if rows.shape[1] >= k and keep[:, :k].all():
        return rows[:, :k].copy()
    place = np.cumsum(keep, 1) - 1  # (b, w)
    query, column = np.nonzero(keep & (place < k))
    out = np.full((len(rows), k), -1, np.int64)
    out[query, place[query, column]] = rows[query, column]
    return out


__all__ = ["NOTHING", "distinct", "first_kept", "lengths_of", "lifts", "members_of"]
