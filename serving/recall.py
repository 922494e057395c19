"""Recall of an index against exact search.

Legend: N rows, Q queries, D dimensions, k answers.
"""

from __future__ import annotations

import numpy as np

from recsys.search import ExactIndex, Index


def recall_against_exact(
    index: Index,
    vectors: np.ndarray,
    queries: np.ndarray | None = None,
    *,
    k: int = 100,
    sample: int = 1000,
    seed: int = 0,
) -> float:
    """Share of the exact answers that the index finds.

    An answer that scores as high as the exact k-th one counts, whichever of equals it is.

    Args:
        index: over `vectors`.
        vectors: (N, D) float32.
        queries: (Q, D) float32; the vectors themselves when absent.
        k: answers of each query.
        sample: queries drawn without replacement.
        seed: of the draw.
    """
    queries = vectors if queries is None else queries
    if not len(queries) or not len(vectors):
        return 1.0
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(queries), min(sample, len(queries)), replace=False))
    queries, k = queries[chosen], min(k, len(vectors))
    _, best = ExactIndex(vectors).search(queries, k)  # (Q, k)
    _, found = index.search(queries, k)
    # Sums of products in another order differ in the last bits of the largest terms.
    slack = 1e-6 * np.linalg.norm(queries, axis=1) * np.linalg.norm(vectors, axis=1).max()
    return float((found >= best[:, -1:] - slack[:, None]).mean())
