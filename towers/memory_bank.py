"""Vectors that items had at earlier steps: what the columns of a cross-batch queue are made of.

Legend: N item rows, D dimensions, K rows asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Remembered(nn.Module):
    """The last vector of every item that was encoded (cross-batch negatives; Wang et al., 2021).

    A buffer of the checkpoint, so that a run that goes on reads what it would have read.

    Args:
        n_items: N.
        dimension: D of the stored vector.
        after: steps to be written before anything is read: vectors have to settle first.
    """

    vectors: Tensor
    written: Tensor
    steps: Tensor

    def __init__(self, n_items: int, dimension: int, after: int = 0) -> None:
        super().__init__()
        self.after = after
        self.register_buffer("vectors", torch.zeros(n_items, dimension))
        self.register_buffer("written", torch.zeros(n_items, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def write(self, rows: Tensor, vectors: Tensor) -> None:
        """Keep the vectors of one step.

        Args:
            rows: (K,) int64 distinct item rows.
            vectors: (K, D); no gradient is kept.
        """
        self.vectors[rows] = vectors.to(self.vectors.dtype)
        self.written[rows] = True
        self.steps += 1

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors as they were last written.

        Args:
            rows: (K,) int64 item rows.

        Returns:
            (K, D) copies without gradient, which later writes leave alone, and (K,) bool: which of
            them may be used. A row never written may not, and before `after` steps none may.
        """
        return self.vectors[rows], self.written[rows] & (self.steps >= self.after)
