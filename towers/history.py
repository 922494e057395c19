"""From a user's earlier items to one vector, or to several interests.

Everything runs on packed entries: the histories one after another in one flat array, without
padding. The causal transformer has a file of its own, causal.py.

Legend: R distinct item rows, U users, H history entries in all, Q queries, K interests,
D dimensions.
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
ELAPSED_BUCKETS, STRENGTH_BUCKETS = 34, 66
"""Codes of elapsed time (2³³ s are 272 years) and of strength; 0 says that it is not known."""


def segment_softmax(score: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Softmax of each segment's scores.

    Args:
        score: (H,), or (H, K) for K softmaxes beside each other.
        segment: (H,) int64 in [0, n_segments).

    Returns:
        Like `score`: positive, summing to 1 within each segment that has any.
    """
    shape = (n_segments, *score.shape[1:])
    top = torch.full(shape, -torch.inf, device=score.device, dtype=score.dtype)
    index = segment.reshape(-1, *[1] * (score.ndim - 1)).expand_as(score)
    top = top.scatter_reduce(0, index, score.detach(), "amax")
    shifted = (score - top[segment]).exp()
    total = torch.zeros(shape, device=score.device, dtype=shifted.dtype)
    return shifted / total.index_add(0, segment, shifted)[segment]


def elapsed_buckets(seconds: Tensor) -> Tensor:
    """Codes that grow by one with each doubling of 1 + seconds; 0 where they are NaN or negative.

    Args:
        seconds: (H,) floats.
    """
    known = seconds >= 0
    bucket = 1 + torch.where(known, seconds, 0).add(1).log2().floor()
    return torch.where(known, bucket.clamp(max=ELAPSED_BUCKETS - 1), 0).long()


def strength_buckets(strength: Tensor) -> Tensor:
    """Codes in quarters of log(1 + strength), which tell 1 from 2 from 3 and hold dwell in seconds.

    Args:
        strength: (H,) floats; NaN or negative: not known, code 0.
    """
    known = strength >= 0
    bucket = 1 + torch.where(known, strength, 0).log1p().mul(4).round()
    return torch.where(known, bucket.clamp(max=STRENGTH_BUCKETS - 1), 0).long()


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
    """What is known of the entries beside the items: how long ago, and how strong.

    A learned vector of each code is added to the entry's item. Where times are not known, as in a
    history that somebody types in, nothing is added.

    Args:
        dimension: D.
        inputs: "recency", "strength", both or none of them.
        hidden: probability that all times, or all strengths, of a user are hidden in training, so
            that histories without them work, too.
    """

    def __init__(self, dimension: int, inputs: tuple[str, ...], hidden: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.recency = self.strength = None
        if "recency" in inputs:
            self.recency = small(nn.Embedding(ELAPSED_BUCKETS, dimension, padding_idx=0))
        if "strength" in inputs:
            self.strength = small(nn.Embedding(STRENGTH_BUCKETS, dimension, padding_idx=0))

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
        if self.strength is not None and side.strength is not None:
            codes.append((self.strength, strength_buckets(side.strength)))
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


def places_from_newest(side: UserSide, user: Tensor, most: int) -> Tensor:
    """(H,) how many entries of the same user come after each, at most `most` - 1."""
    last = side.lengths.cumsum(0)[user] - 1
    return (last - torch.arange(len(user), device=user.device)).clamp(max=most - 1)


def _only_after_the_last(side: UserSide, name: str) -> None:
    if side.at is not None:
        raise ValueError(
            f'A "{name}" history answers once a user, after the last entry; only a "transformer" '
            "can be trained at every position."
        )


class History(nn.Module):
    """Pool a history of embedded items: weights by recency and, with attention, by content.

    Args:
        dimension: D.
        pooling: "mean": every entry alike; "attention": a softmax over a score of the entry's
            content plus a learned score of its place, the newest first.
        max_history: places that can be told apart.
        norm: a mean divides the sum by (sum of weights) ** norm: 1 forgets how many entries there
            were, 0 is the sum.
        decay: a mean weighs an entry by (1 + entries after it) ** -decay; 0: all alike.
        inputs, hidden: see `EntryInputs`.
    """

    def __init__(
        self,
        dimension: int,
        pooling: str,
        max_history: int,
        *,
        norm: float = 1.0,
        decay: float = 0.0,
        inputs: tuple[str, ...] = (),
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling, self.max_history = pooling, max_history
        self.norm, self.decay = norm, decay
        # Not zero: a cosine has no direction there, and its gradient no bound.
        self.empty = nn.Parameter(torch.randn(dimension) / dimension**0.5)
        if pooling == "attention":
            self.content = nn.Sequential(
                nn.Linear(dimension, dimension), nn.Tanh(), nn.Linear(dimension, 1, bias=False)
            )
            # Start as a decay of a fifth an item: what came last says most until learned otherwise.
            self.place = nn.Parameter(-RECENCY * torch.arange(max_history, dtype=torch.float32))
        self.inputs = EntryInputs(dimension, inputs, hidden)

    def forward(self, items: Tensor, side: UserSide) -> Tensor:
        """Pool.

        Args:
            items: (R, D) embedded distinct items.
            side: the histories; `at` is not for this one.

        Returns:
            (U, D); the learned empty vector where the history is empty.
        """
        _only_after_the_last(side, self.pooling)
        rows, entries = self.inputs(items, side)
        lengths = side.lengths
        weights = self._weights(rows, entries, side)
        plain = weights is None and self.norm == 1
        pooled = F.embedding_bag(
            entries, rows.float(), lengths.cumsum(0) - lengths,
            mode="mean" if plain else "sum", per_sample_weights=weights,
        )  # (U, D)  # fmt: skip
        if not plain and self.pooling == "mean":
            total = lengths.to(pooled.dtype)
            if weights is not None:
                total = torch.zeros_like(total).index_add(0, user_of_entry(side), weights)
            pooled = pooled / torch.where(lengths > 0, total, 1.0)[:, None] ** self.norm
        return torch.where((lengths > 0)[:, None], pooled, self.empty.to(pooled.dtype))

    def _weights(self, rows: Tensor, entries: Tensor, side: UserSide) -> Tensor | None:
        """(H,) float32 weight of each entry; None: all alike."""
        if self.pooling == "mean" and not self.decay:
            return None
        user = user_of_entry(side)
        place = places_from_newest(side, user, self.max_history)
        if self.pooling == "mean":
            return (1.0 + place) ** -self.decay
        score = self.content(rows)[entries, 0] + self.place[place]
        return segment_softmax(score.float(), user, len(side.lengths))


class MultiInterest(nn.Module):
    """Several vectors a user: self-attentive pooling with K heads (ComiRec-SA; Cen et al., 2020).

    Each interest has its own score of an entry's content and of its place. The first starts by
    reading what came last, each further one twice as far back, so that no two start alike.

    Args:
        dimension: D.
        interests: K.
        max_history: places that can be told apart.
        inputs, hidden: see `EntryInputs`.
    """

    def __init__(
        self,
        dimension: int,
        interests: int,
        max_history: int,
        *,
        inputs: tuple[str, ...] = (),
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.interests, self.max_history = interests, max_history
        self.empty = nn.Parameter(torch.randn(interests, dimension) / dimension**0.5)
        self.content = nn.Sequential(
            nn.Linear(dimension, dimension), nn.Tanh(),
            nn.Linear(dimension, interests, bias=False),
        )  # fmt: skip
        decay = RECENCY / 2.0 ** torch.arange(interests)
        self.place = nn.Parameter(-torch.arange(max_history)[:, None] * decay)  # (P, K)
        self.inputs = EntryInputs(dimension, inputs, hidden)

    def forward(self, items: Tensor, side: UserSide) -> Tensor:
        """Pool K times.

        Args:
            items: (R, D) embedded distinct items.
            side: the histories; `at` is not for this one.

        Returns:
            (U, K, D); the learned empty vectors where the history is empty.
        """
        _only_after_the_last(side, "multi_interest")
        rows, entries = self.inputs(items, side)
        users, user = len(side.lengths), user_of_entry(side)
        score = (
            self.content(rows)[entries]
            + self.place[places_from_newest(side, user, self.max_history)]
        )  # (H, K)
        weights = segment_softmax(score.float(), user, users)
        # One bag for each interest and user: all users' first interests, then the second ones.
        start = side.lengths.cumsum(0) - side.lengths
        ahead = len(entries) * torch.arange(self.interests, device=start.device)
        pooled = F.embedding_bag(
            entries.repeat(self.interests), rows.float(), (ahead[:, None] + start).reshape(-1),
            mode="sum", per_sample_weights=weights.T.reshape(-1),
        )  # (K·U, D)  # fmt: skip
        pooled = pooled.view(self.interests, users, -1).transpose(0, 1)
        return torch.where((side.lengths > 0)[:, None, None], pooled, self.empty.to(pooled.dtype))


class LookBack(nn.Module):
    """What a user tower answers looks back at each entry on its own, and hears what each says.

    Entry e weighs sigmoid(k (cos(answer, e) - θ)) and says a linear function of its direction. In
    attention all weights share a sum of one, so that an entry of many drowns, and an entry asks;
    here each counts in full, and the answer itself asks. So it can be learned that what the user
    had is not what comes next, or that it is, one item at a time.

    Args:
        dimension: D.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.threshold = nn.Parameter(torch.tensor(0.3))
        self.says = nn.Linear(dimension, dimension, bias=False)
        nn.init.zeros_(self.says.weight)

    def forward(self, answers: Tensor, items: Tensor, side: UserSide) -> Tensor:
        """Add what the entries say, in units of the answer's length.

        Args:
            answers: (Q, D).
            items: (R, D) embedded distinct items.
            side: the histories.

        Returns:
            (Q, D); the answer itself where there is no entry.
        """
        lengths = side.lengths
        first, count = lengths.cumsum(0) - lengths, lengths
        if side.at is not None:
            first = first[user_of_entry(side)[side.at]]
            count = side.at + 1 - first
        query = torch.repeat_interleave(count)  # (P,) pairs of a query and an entry before it
        pair = torch.arange(len(query), device=query.device)
        row = side.history[pair + (first + count - count.cumsum(0))[query]]
        length = answers.float().norm(dim=-1, keepdim=True).clamp(min=0.01)
        asking = answers.float() / length
        unit = F.normalize(items.float(), dim=-1, eps=0.01)
        near = (asking.index_select(0, query) * unit.index_select(0, row)).sum(1)  # (P,)
        weight = torch.sigmoid(self.sharpness * (near - self.threshold))
        said = self.says(unit).index_select(0, row) * weight[:, None]
        return length * asking.index_add(0, query, said)


def choose_interest(users: Tensor, items: Tensor, owner: Tensor | None = None) -> Tensor:
    """The interest that stands for each example in training: the one nearest to its own item.

    A hard choice, as ComiRec makes it: only that interest learns from the example. Different
    examples of a query may take different ones, so that the result has one row an example.

    Args:
        users: (Q, K, D) interests of each query.
        items: (B, D) vectors of the examples' own items.
        owner: (B,) int64 query of each example; None: example b is query b.

    Returns:
        (B, D).
    """
    if owner is not None:
        users = users[owner]  # (B, K, D)
    with torch.no_grad():
        best = torch.einsum("bkd,bd->bk", users, items).argmax(1)
    return users[torch.arange(len(users), device=users.device), best]
