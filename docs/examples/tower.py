"""A tower of one's own: a recurrent network in place of attention over the user's history.

Name it in the run file, with this file where Python finds it (`PYTHONPATH=docs/examples`), both
where it is trained and where its bundle answers:

    [towers.history]
    kind = "custom"
    module = "tower:GRUHistory"
    length = 20

Legend: R distinct items, U users, H history entries in all, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.features.batching.batch import UserSide


class GRUHistory(nn.Module):
    """The last state of a gated recurrent unit over the items in order (GRU4Rec, 2016).

    Args:
        dimension: D.
        length: most entries of a history; not needed here.
    """

    def __init__(self, dimension: int, length: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dimension, dimension, batch_first=True)
        self.empty = nn.Parameter(torch.randn(dimension) / dimension**0.5)

    def forward(self, items: Tensor, side: UserSide) -> Tensor:
        """Users from their histories.

        Args:
            items: (R, D) embedded distinct items.
            side: `history` (H,) rows of `items`, users one after another, oldest first; `lengths`
                (U,) entries of each.

        Returns:
            (U, D); a learned vector where the history is empty.
        """
        out = self.empty.to(items.dtype).repeat(len(side.lengths), 1)
        some = side.lengths > 0
        if not some.any():
            return out
        entries = items[side.history].split(side.lengths[some].tolist())
        packed = nn.utils.rnn.pack_sequence(entries, enforce_sorted=False)
        last = self.gru(packed)[1][0]  # (users with a history, D)
        return out.masked_scatter(some[:, None], last.to(out.dtype))
