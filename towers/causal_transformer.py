"""Causal transformer over packed histories, with relative-distance attention.

Linear layers, norms and feed-forward layers run on packed entries, without padding. Only attention
needs a block, and gets one for users of about equally long histories at a time.

Attention sees how many entries lie between two, by a learned logit for each distance, which learns
to look at what came last within an epoch. That is causal, and it does not depend on where a long
history was cut off, while a position counted from the oldest kept entry moves with the cut.
Positions counted from the newest entry would tell an entry how many are still to come.

Legend: R distinct item rows, U users, H history entries in all, P padded positions, Q queries,
D dimensions, d dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.towers.history import EntryInputs, user_of_entry

if TYPE_CHECKING:
    from recsys.features.batching.batch import UserSide

SHORTEST_CLASS = 4
"""Histories up to this length share a block: more blocks cost more than the padding they spare."""


@dataclass(frozen=True)
class Blocks:
    """How packed entries become padded blocks of users of about equally long histories, and back.

    Padding stands behind a user's entries and repeats the last one. Where attention looks back
    only, no entry sees it, so that no mask is needed.

    Args:
        users: users with a history, those of a block after another.
        shapes: users and positions of each block; P is the sum of their products.
        entries: (P,) the packed entry at each position of the blocks, block after block.
        back: (H,) where in the blocks each packed entry stands.
    """

    users: Tensor
    shapes: list[tuple[int, int]]
    entries: Tensor
    back: Tensor

    @staticmethod
    def of(
        lengths: Tensor, user: Tensor, position: Tensor, shortest: int = SHORTEST_CLASS
    ) -> Blocks:
        """Blocks by length: up to `shortest`, up to twice that, and so on by doubling.

        Each is as wide as its longest history, so that in all but the first less than half of it
        is padding.

        Args:
            lengths: (U,) int64; users without any are in no block.
            user, position: (H,) whose each entry is, and how many of the same user stand before it.
            shortest: longest history of the first block; 0: one block for all.
        """
        device = lengths.device
        edges = [shortest * 2**i for i in range(40)] if shortest else []
        ordered, order = torch.sort(lengths, stable=True)
        block = torch.bucketize(ordered, torch.tensor(edges, dtype=torch.int64, device=device))
        counts, widths = torch.zeros(2, len(edges) + 1, dtype=torch.int64, device=device)
        counts = counts.index_add(0, block, (ordered > 0).long())
        widths = widths.scatter_reduce(0, block, ordered, "amax")
        # The one thing that the host has to wait for.
        shapes = [(n, w) for n, w in torch.stack([counts, widths], 1).tolist() if n]
        users = order[len(order) - sum(n for n, _ in shapes) :]
        start = lengths.cumsum(0) - lengths
        entries, corner = [], torch.zeros_like(lengths)
        first = 0
        for (n, width), part in zip(
            shapes, users.split([n for n, _ in shapes]) if shapes else (), strict=True
        ):
            column = torch.arange(width, device=device)
            within = torch.minimum(column, lengths[part, None] - 1)  # (n, w)
            entries.append((start[part, None] + within).reshape(-1))
            corner[part] = first + width * torch.arange(n, device=device)
            first += n * width
        return Blocks(
            users, shapes, torch.cat(entries) if entries else position, corner[user] + position
        )


class CausalTransformer(nn.Module):
    """Each entry reads itself and what came before: one pass answers after every entry.

    Pre-norm blocks as in SASRec (Kang and McAuley, 2018) and eSASRec (Tikhonovich et al., 2025).
    All but the attention itself runs on the packed entries.

    Args:
        dimension: D, divisible by twice the heads.
        length: distances that can be told apart, each with a learned logit a head (as the relative
            bias of T5; Raffel et al., 2020).
        layers, heads: how many.
        hidden: width of the feed-forward layers.
        dropout: probability, behind each layer.
        entry_dropout: probability, of the entries' dimensions.
        inputs: see `EntryInputs`; times count from each entry to the next.
    """

    def __init__(
        self,
        dimension: int,
        length: int,
        *,
        layers: int = 1,
        heads: int = 1,
        hidden: int = 256,
        dropout: float = 0.0,
        entry_dropout: float = 0.0,
        inputs: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.entry_dropout, self.shortest = entry_dropout, SHORTEST_CLASS
        self.empty = nn.Parameter(torch.randn(dimension) / dimension**0.5)
        self.distance = nn.Parameter(torch.zeros(heads, length))
        self.layers = nn.ModuleList(
            _CausalLayer(dimension, heads, hidden, dropout) for _ in range(layers)
        )
        self.norm, self.last = nn.LayerNorm(dimension), nn.Linear(dimension, dimension)
        nn.init.eye_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.inputs = EntryInputs(dimension, inputs, dropout)

    def forward(self, items: Tensor, side: UserSide) -> Tensor:
        """Read the histories.

        Args:
            items: (R, D) embedded distinct items.
            side: the histories.

        Returns:
            (Q, D) after the entries `side.at`; without, (U, D) after each user's last entry, the
            learned empty vector where there is none.
        """
        rows, entries = self.inputs(items, side, to_next=True)
        # At length √D, as layers expect their inputs: whatever length item vectors have come to,
        # what the layers add weighs the same beside them.
        unit = F.normalize(rows.to(self.empty.dtype), dim=-1, eps=1e-6)
        x = unit[entries] * unit.shape[-1] ** 0.5  # (H, D)
        lengths = side.lengths
        user = user_of_entry(side)
        position = torch.arange(len(user), device=user.device) - (lengths.cumsum(0) - lengths)[user]
        x = F.dropout(x, self.entry_dropout, self.training)
        blocks = Blocks.of(lengths, user, position, self.shortest)
        queried = lengths.cumsum(0)[blocks.users] - 1 if side.at is None else side.at
        for number, layer in enumerate(self.layers, 1):
            # Behind the last attention, only what is queried for goes on.
            x = layer(x, blocks, self.distance, queried if number == len(self.layers) else None)
        x = self.last(self.norm(x))
        if side.at is not None:
            return x
        return self.empty.expand(len(lengths), -1).index_copy(0, blocks.users, x)


class _CausalLayer(nn.Module):
    """x + attention, then x + feed-forward; both start at 0, so that an entry says its item."""

    def __init__(self, dimension: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_forward = (nn.LayerNorm(dimension) for _ in range(2))
        self.queries_keys_values = nn.Linear(dimension, 3 * dimension, bias=False)
        self.out = nn.Linear(dimension, dimension, bias=False)
        self.up, self.down = nn.Linear(dimension, hidden), nn.Linear(hidden, dimension)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.down.bias)

    def forward(
        self,
        x: Tensor,
        blocks: Blocks,
        distance: Tensor,
        queried: Tensor | None,
    ) -> Tensor:
        """(H, D) → (H, D), or only the entries `queried` (Q,) → (Q, D)."""
        attended = self.out(self._attend(self.before_attention(x), blocks, distance))
        if queried is not None:
            x, attended = x[queried], attended[queried]
        x = x + F.dropout(attended, self.dropout, self.training)
        wide = F.dropout(F.gelu(self.up(self.before_forward(x))), self.dropout, self.training)
        return x + F.dropout(self.down(wide), self.dropout, self.training)

    def _attend(self, x: Tensor, blocks: Blocks, distance: Tensor) -> Tensor:
        """(H, D) → (H, D): attention of each entry to those of its user up to itself."""
        if not len(x):
            return x
        entries = self.queries_keys_values(x).view(len(x), 3, self.heads, -1)
        sizes = [users * width for users, width in blocks.shapes]
        attended = []
        for part, (users, width) in zip(
            entries.index_select(0, blocks.entries).split(sizes), blocks.shapes, strict=True
        ):
            padded = part.view(users, width, *entries.shape[1:]).permute(2, 0, 3, 1, 4)
            # (3, users, heads, width, d). Attention weights are not dropped out: that takes the
            # slow way, with all of them in memory.
            out = F.scaled_dot_product_attention(
                padded[0], padded[1], padded[2], attn_mask=causal_bias(distance, width)
            )
            attended.append(out.transpose(1, 2).reshape(users * width, -1))
        return torch.cat(attended).index_select(0, blocks.back)


def causal_bias(distance: Tensor, width: int) -> Tensor:
    """(heads, width, width) logits of looking so far back; -inf for looking ahead.

    Args:
        distance: (heads, P) logit for each number of entries back; what is further counts as the
            furthest.
        width: of the block.
    """
    position = torch.arange(width, device=distance.device)
    back = position[:, None] - position
    known = distance[:, back.clamp(0, distance.shape[1] - 1)]
    return known.masked_fill(back < 0, -torch.inf)
