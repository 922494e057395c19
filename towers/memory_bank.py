"""Memory bank: the vectors that items had at earlier steps, for cross-batch negatives.

Legend: N item rows, D dimensions, K rows asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """The last vector of every item that was encoded (cross-batch negatives; Wang et al., 2021).

    A buffer of the checkpoint, so that a run that goes on reads what it would have read.

    Args:
        n_items: N.
        dimension: D of the stored vector.
    """

    vectors: Tensor
    written: Tensor

    def __init__(self, n_items: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(n_items, dimension))
        self.register_buffer("written", torch.zeros(n_items, dtype=torch.bool))

    @torch.no_grad()
    def write(self, rows: Tensor, vectors: Tensor) -> None:
        """Keep the vectors of one step.

        Args:
            rows: (K,) int64 distinct item rows.
            vectors: (K, D); no gradient is kept.
        """
        self.vectors[rows] = vectors.to(self.vectors.dtype)
        self.written[rows] = True

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors as they were last written.

        Args:
            rows: (K,) int64 item rows.

        Returns:
            (K, D) copies without gradient, which later writes leave alone, and (K,) bool: which of
            them may be used: a row never written may not.
        """
        return self.vectors[rows], self.written[rows]
