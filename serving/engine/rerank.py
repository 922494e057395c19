"""Re-ranking by diversity (MMR) and by popularity.

Both look at a pool of the best by score, so that no dial brings in what does not fit at all.
Legend: P candidates of the pool, best first, D dimensions, k answers.
"""

from __future__ import annotations

import numpy as np

LEAST_POOL, MOST_POOL = 100, 1000
EACH = 4
"""Candidates of the pool for each answer."""


def pool_size(k: int) -> int:
    """Candidates that k answers are chosen from: four an answer, 100 at least, 1,000 at most, and
    never fewer than k.
    """
    return max(k, min(MOST_POOL, max(LEAST_POOL, EACH * k)))


def standardised(values: np.ndarray) -> np.ndarray:
    """(P,) float64 with mean 0 and deviation 1; 0 where all are alike."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return values
    spread = values.std()
    # What rounding leaves of equal values is no spread.
    if spread <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return np.zeros_like(values)
    return (values - values.mean()) / spread


def with_popularity(scores: np.ndarray, counts: np.ndarray, weight: float) -> np.ndarray:
    """(P,) float64: standardised scores plus `weight` times the standardised log popularity.

    Args:
        scores: (P,) of the pool.
        counts: (P,) how often each candidate was chosen.
        weight: 1: popularity says as much as the score; −1: the less known the better; 0: the order
            of the scores.
    """
    return standardised(scores) + weight * standardised(np.log1p(counts))


def diversified(relevance: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998).

    One after another, the candidate with the largest
    `(1 − diversity) · relevance − diversity · largest cosine to what stands before`. Relevance is
    brought to 0 … 1 over the pool, so that both sides weigh alike whatever the score is.

    Args:
        relevance: (P,) larger is better.
        vectors: (P, D) of the candidates; a zero vector is like nothing.
        k: answers wanted.
        diversity: 0: by relevance alone; 1: by difference alone, after the most relevant.

    Returns:
        (min(k, P),) int64 places in the pool; equals by the smaller.
    """
    relevance = np.asarray(relevance, np.float64)
    count = min(k, len(relevance))
    chosen = np.empty(count, np.int64)
    if not count:
        return chosen
    low, high = relevance.min(), relevance.max()
    gain = (1 - diversity) * ((relevance - low) / (high - low) if high > low else 0 * relevance)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    nearest = np.full(len(relevance), -np.inf)
    left = np.ones(len(relevance), bool)
    chosen[0] = int(relevance.argmax())
    for place in range(1, count):
        left[chosen[place - 1]] = False
        np.maximum(nearest, units @ units[chosen[place - 1]], out=nearest)
        chosen[place] = int(np.where(left, gain - diversity * nearest, -np.inf).argmax())
    return chosen


__all__ = ["diversified", "pool_size", "standardised", "with_popularity"]
