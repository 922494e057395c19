"""Pooling of a user's history: a mean with decay, or attention over content and position.

Everything runs on packed entries: the histories one after another in one flat array, without
padding.

Legend: R distinct item rows, U users, H history entries in all, Q queries, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.towers.embedding import small

if TYPE_CHECKING:
    from recsys.features.batching.batch import UserSide

RECENCY = 0.2
"""How much less, as a logit, each earlier history entry weighs before anything is learned."""
ELAPSED_BUCKETS, WEIGHT_BUCKETS = 34, 66
"""Codes of elapsed time (2³³ s are 272 years) and of event weight; 0 says that it is not known."""


def segment_softmax(score: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Softmax of each segment's scores.

    Args:
        score: (H,).
        segment: (H,) int64 in [0, n_segments).

    Returns:
        (H,) positive, summing to 1 within each segment that has any.
    """
    top = torch.full((n_segments,), -torch.inf, device=score.device, dtype=score.dtype)
    top = top.scatter_reduce(0, segment, score.detach(), "amax")
    shifted = (score - top[segment]).exp()
    total = shifted.new_zeros(n_segments).index_add(0, segment, shifted)
    return shifted / total[segment]


def elapsed_buckets(seconds: Tensor) -> Tensor:
    """Codes that grow by one with each doubling of 1 + seconds; 0 where they are NaN or negative.

    Args:
        seconds: (H,) floats.
    """
    known = seconds >= 0
    bucket = 1 + torch.where(known, seconds, 0).add(1).log2().floor()
    return torch.where(known, bucket.clamp(max=ELAPSED_BUCKETS - 1), 0).long()


def weight_buckets(weight: Tensor) -> Tensor:
    """Codes in quarters of log(1 + weight), which tell 1 from 2 from 3 and hold dwell in seconds.

    Args:
        weight: (H,) floats; NaN or negative: not known, code 0.
    """
    known = weight >= 0
    bucket = 1 + torch.where(known, weight, 0).log1p().mul(4).round()
    return torch.where(known, bucket.clamp(max=WEIGHT_BUCKETS - 1), 0).long()


def seconds_to_next(elapsed: Tensor, lengths: Tensor) -> Tensor:
    """Seconds from each entry to the user's next one, and from the last one to the query.

    Args:
        elapsed: (H,) seconds from each entry to its user's query; NaN where not known.
        lengths: (U,) entries of each user.
    """
    following = elapsed.roll(-1)
    following[lengths.cumsum(0)[lengths > 0] - 1] = 0
    return elapsed - following


class EntryInputs(nn.Module):
    """What is known of the entries beside the items: how long ago, and how much the event
    weighs.

    A learned vector of each code is added to the entry's item. Where times are not known, as in a
    history that somebody types in, nothing is added.

    Args:
        dimension: D.
        inputs: "recency", "weight", both or none of them.
        hidden: probability that all times, or all weights, of a user are hidden in training, so
            that histories without them work, too.
    """

    def __init__(self, dimension: int, inputs: tuple[str, ...], hidden: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.recency = self.weight = None
        if "recency" in inputs:
            self.recency = small(nn.Embedding(ELAPSED_BUCKETS, dimension, padding_idx=0))
        if "weight" in inputs:
            self.weight = small(nn.Embedding(WEIGHT_BUCKETS, dimension, padding_idx=0))

    def forward(
        self, items: Tensor, side: UserSide, *, to_next: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows that a history's entries stand for, and which row each entry is.

        Args:
            items: (R, D) embedded distinct items.
            side: the histories.
            to_next: times count to the user's next entry, not to the query.

        Returns:
            `items` and the history itself where nothing is added, otherwise (H, D) and 0 … H-1.
        """
        codes: list[tuple[nn.Embedding, Tensor]] = []
        if self.recency is not None and side.elapsed is not None:
            elapsed = side.elapsed
            if to_next and side.at is None:
                elapsed = seconds_to_next(elapsed, side.lengths)
            codes.append((self.recency, elapsed_buckets(elapsed)))
        if self.weight is not None and side.event_weight is not None:
            codes.append((self.weight, weight_buckets(side.event_weight)))
        if not codes:
            return items, side.history
        entries = items[side.history]  # (H, D)
        for table, code in codes:
            if self.training and self.hidden:
                shown = torch.rand(len(side.lengths), device=code.device) >= self.hidden
                code = code * shown[user_of_entry(side)]
            entries = entries + table(code)
        return entries, torch.arange(len(entries), device=entries.device)


def user_of_entry(side: UserSide) -> Tensor:
    """(H,) which user each history entry belongs to."""
    return torch.repeat_interleave(side.lengths, output_size=len(side.history))


def entries_after(side: UserSide, user: Tensor, most: int) -> Tensor:
    """(H,) how many entries of the same user come after each, at most `most` - 1."""
    last = side.lengths.cumsum(0)[user] - 1
    return (last - torch.arange(len(user), device=user.device)).clamp(max=most - 1)


class PooledHistory(nn.Module):
    """A weighted mean of a history's embedded items.

    Args:
        dimension: D.
        length: positions that can be told apart.
        decay: a mean weighs an entry by (1 + entries after it) ** -decay; 0: all alike. None:
            attention, a softmax over a score of the entry's content plus a learned score of its
            position, the newest first.
        inputs, hidden: see `EntryInputs`.
    """

    def __init__(
        self,
        dimension: int,
        length: int,
        *,
        decay: float | None = None,
        inputs: tuple[str, ...] = (),
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.length, self.decay = length, decay
        # Not zero: a cosine has no direction there, and its gradient no bound.
        self.empty = nn.Parameter(torch.randn(dimension) / dimension**0.5)
        if decay is None:
            self.content = nn.Sequential(
                nn.Linear(dimension, dimension), nn.Tanh(), nn.Linear(dimension, 1, bias=False)
            )
            # Start as a decay of a fifth an item: what came last says most until learned otherwise.
            self.position = nn.Parameter(-RECENCY * torch.arange(length, dtype=torch.float32))
        self.inputs = EntryInputs(dimension, inputs, hidden)

    def forward(self, items: Tensor, side: UserSide) -> Tensor:
        """Pool.

        Args:
            items: (R, D) embedded distinct items.
            side: the histories; `at` is not for this one.

        Returns:
            (U, D); the learned empty vector where the history is empty.

        Raises:
            ValueError: queries at every position, which only a causal transformer answers.
        """
        if side.at is not None:
            raise ValueError(
                "A pooled history answers once a user, after the last entry; only a causal "
                "transformer can be trained at every position."
            )
        rows, entries = self.inputs(items, side)
        lengths = side.lengths
        weights = self._weights(rows, entries, side)
        pooled = F.embedding_bag(
            entries, rows.float(), lengths.cumsum(0) - lengths,
            mode="mean" if weights is None else "sum", per_sample_weights=weights,
        )  # (U, D)  # fmt: skip
        if self.decay and weights is not None:
            total = lengths.to(pooled.dtype)
            total = torch.zeros_like(total).index_add(0, user_of_entry(side), weights)
            pooled = pooled / torch.where(lengths > 0, total, 1.0)[:, None]
        return torch.where((lengths > 0)[:, None], pooled, self.empty.to(pooled.dtype))

    def _weights(self, rows: Tensor, entries: Tensor, side: UserSide) -> Tensor | None:
        """(H,) float32 weight of each entry; None: all alike."""
        if self.decay == 0:
            return None
        user = user_of_entry(side)
        age = entries_after(side, user, self.length)
        if self.decay is not None:
            return (1.0 + age) ** -self.decay
        score = self.content(rows)[entries, 0] + self.position[age]
        return segment_softmax(score.float(), user, len(side.lengths))
