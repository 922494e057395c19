"""Item context: embeddings of co-occurrence, counts and latent time of an item.

An id vector that a handful of events have made says little. More say what stood before an item in
histories, and how often and how near to their ends it stands itself (`ItemContext`); and, of new
items too, those whose texts are like its own (`TextNeighbours`). A bundle holds what both say as
plain vectors, so that what answers reads neither the log nor everybody's texts.

Legend: R rows asked for, I item rows with an id, N item rows, M entries, E events, D dimensions,
T text dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.features.prepared.cooccurrence import CooccurrenceGraph
from recsys.features.prepared.item_time import PRIOR

USUAL = 5.0
"""Events of the usual kind that are added to an item's own, where shares of few are compared."""
KNOTS = 16
"""Knots at which an item's place in time is read."""
KNOTS_REACH = 2.5
"""Standard deviations from the middle to the outermost of them."""
SHARPNESS = 10.0
"""1 / temperature of the weights of likenesses."""
ROWS_AT_ONCE = 4096
AMONG_AT_ONCE = 65_536

Vectors = Callable[[Tensor], Tensor]
"""Rows → their id vectors."""


def spans(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """All places of ranges, one range after another, and which range each is of."""
    owner = torch.repeat_interleave(lengths)
    first = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(len(owner), device=starts.device) + first[owner], owner


class ItemContext(nn.Module):
    """What the log says of items with an id, by everybody but those who are asked for.

    The mean id vector of an item's neighbours is one step of a graph convolution (GraphSAGE;
    Hamilton et al., 2017). In training the users of the batch are left out of all that is said:
    otherwise the target's neighbours would be the history itself, and its counts would count the
    example, which no item of tomorrow can offer.

    Args:
        around: neighbours and events of the I item rows with an id.
        dimension: D.
        hidden: probability, in training, that nothing of an item is known, its id included, as it
            is of a new one.
    """

    offsets: Tensor
    item: Tensor
    user: Tensor
    weight: Tensor
    user_offsets: Tensor
    event_item: Tensor
    event_says: Tensor
    counts: Tensor
    place: Tensor
    usual: Tensor
    log_scale: Tensor
    place_scale: Tensor
    knots: Tensor

    def __init__(self, around: CooccurrenceGraph, dimension: int, hidden: float) -> None:
        super().__init__()
        self.hidden = hidden
        after, order = torch.from_numpy(around.event_after), around.order
        says = [torch.ones_like(after), (after == 0).float(), after]
        says += [torch.from_numpy(order.pull), torch.from_numpy(order.hold)]
        for name, values in {
            "offsets": torch.from_numpy(around.offsets),
            "item": torch.from_numpy(around.item),
            "user": torch.from_numpy(around.user),
            "weight": torch.from_numpy(around.weight),
            "user_offsets": torch.from_numpy(around.user_offsets),
            "event_item": torch.from_numpy(around.event_item),
            "event_says": torch.stack(says, dim=1),
            "place": torch.from_numpy(order.place).float(),
        }.items():
            self.register_buffer(name, values, persistent=False)
        counts = torch.zeros(around.n_items, len(says)).index_add_(
            0, self.event_item, self.event_says
        )
        self.register_buffer("counts", counts, persistent=False)
        usual = self.event_says[:, :3].mean(0) if len(after) else after.new_ones(3)
        self.register_buffer("usual", usual, persistent=False)
        known = counts[:, 0] > 0
        self.register_buffer("log_scale", _scale(counts[known, 0].log1p()), persistent=False)
        self.register_buffer("place_scale", _scale(self.place[known]), persistent=False)
        knots = torch.linspace(-KNOTS_REACH, KNOTS_REACH, KNOTS)
        self.register_buffer("knots", knots, persistent=False)
        self.share = nn.Parameter(torch.tensor(0.5))
        self.standing = nn.Linear(3 + KNOTS, dimension)

    def forward(
        self, rows: Tensor, ids: Vectors, left_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is said of rows.

        Args:
            rows: (R,) item rows below I.
            ids: gives the id vectors of rows.
            left_out: (U,) user rows, also more than once, of whose events nothing is known.

        Returns:
            (R,) bool, whether any event of the row is known, and (R, D) what is said of it.
        """
        counts = self.counts if left_out is None else self._counts_without(left_out)
        counts = counts[rows]
        said = self.share * self._neighbours(rows, ids, left_out)
        stands = torch.cat([self._stands(counts), self._moments(rows, counts)], dim=1)
        return counts[:, 0] > 0, said + self.standing(stands)

    def _counts_without(self, users: Tensor) -> Tensor:
        users = users.unique()
        starts = self.user_offsets[users]
        events, _ = spans(starts, self.user_offsets[users + 1] - starts)
        return self.counts.index_add(0, self.event_item[events], self.event_says[events], alpha=-1)

    def _stands(self, counts: Tensor) -> Tensor:
        """(R, 3) how many events, how many of them the last of their user, and how far from it."""
        events, last, after = counts[:, :3].unbind(1)
        _, usual_last, usual_after = self.usual.unbind()
        mean, spread = self.log_scale.unbind()
        late = (last + USUAL * usual_last) / ((events + USUAL) * usual_last)
        numbers = [
            (events.log1p() - mean) / spread,
            2 * late.log(),
            1.5 * ((after + USUAL * usual_after) / (events + USUAL) - usual_after),
        ]
        return torch.stack(numbers, dim=1) * (events > 0)[:, None]

    def places(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(R,) places of rows in time, as what is counted of them has it.

        Without the users who are left out the fit would be another one: a Newton step of each place
        by itself leads near it, and what has no events left to the prior's middle.
        """
        pull, hold = counts[:, 3:].unbind(1)
        place = self.place[rows]
        # All pulls and the prior are in balance, pull = 2λ place, unless some are left out.
        return place + (pull - 2 * PRIOR * place) / (hold.clamp(min=0) + 2 * PRIOR)

    def _moments(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(R, KNOTS) when the rows are chosen: a bump over each of the knots near their place."""
        mean, spread = self.place_scale.unbind()
        step = self.knots[1] - self.knots[0]
        most = KNOTS_REACH + step
        place = ((self.places(rows, counts) - mean) / spread).clamp(-most, most)
        bumps = torch.exp(-0.5 * ((place[:, None] - self.knots) / step) ** 2)
        return bumps * (counts[:, 0] > 0)[:, None]

    def _neighbours(self, rows: Tensor, ids: Vectors, left_out: Tensor | None) -> Tensor:
        """(R, D) weighted mean of the neighbours' id vectors, less where there are few."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        entries, owner = spans(starts, lengths)
        weight = self.weight[entries]
        if left_out is not None:
            known = torch.ones(len(self.user_offsets) - 1, device=rows.device)
            known[left_out] = 0
            weight = weight * known[self.user[entries]]
        first = lengths.cumsum(0) - lengths
        said = sums_of(self.item[entries], weight, first, ids, len(self.counts))
        total = weight.new_zeros(len(rows)).index_add(0, owner, weight)
        return said / (total + 1)[:, None]


class TextNeighbours(nn.Module):
    """Id vectors of the items whose texts are most like an item's own, for items with few events of
    their own, or none.

    Args:
        texts: (N, T) unit text vectors of all item rows, zero where there is no text.
        n_ids: I; rows from 1 to below it have ids.
        most: k, how many.
    """

    nearest: Tensor
    weight: Tensor

    def __init__(self, texts: Tensor, n_ids: int, most: int) -> None:
        super().__init__()
        self.most, self.n_ids = most, n_ids
        nearest, weight = alike(texts, texts[:n_ids], most, own=True)
        self.register_buffer("nearest", nearest, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, rows: Tensor, ids: Vectors) -> Tensor:
        """(R,) item rows → (R, D); `ids` gives the id vectors of rows."""
        nearest, weight = self.nearest[rows], self.weight[rows]
        starts = torch.arange(len(rows), device=rows.device) * nearest.shape[1]
        return self.share * sums_of(nearest.flatten(), weight.flatten(), starts, ids, self.n_ids)


def _scale(values: Tensor) -> Tensor:
    """(2,) mean and standard deviation, which is never 0."""
    found = [float(values.mean()), float(values.std())] if len(values) > 1 else [0.0, 0.0]
    return torch.tensor(found).clamp(min=torch.tensor([-torch.inf, 1e-3]))


def sums_of(items: Tensor, weight: Tensor, starts: Tensor, ids: Vectors, n_ids: int) -> Tensor:
    """(R, D) weighted sums of id vectors, one for each run of `items`.

    Each item's vector is read once: its gradient is then a row, in however many sums it stands.
    Marks in a table of all items find them several times as fast as sorting does.

    Args:
        items: (M,) rows.
        weight: (M,).
        starts: (R,) where each run begins.
        ids: gives the id vectors of rows.
        n_ids: I.
    """
    marks = torch.zeros(n_ids, dtype=torch.bool, device=items.device)
    marks[items] = True
    place = (marks.cumsum(0) - 1)[items]
    return F.embedding_bag(
        place, ids(marks.nonzero().squeeze(1)), starts, mode="sum", per_sample_weights=weight
    )


def alike(texts: Tensor, among: Tensor, most: int, *, own: bool = False) -> tuple[Tensor, Tensor]:
    """Whose texts are nearest, and how much each of them weighs.

    Args:
        texts: (R, T) unit vectors; of zeros nothing is near, and all weights are 0.
        among: (I, T) of rows that may be found; row 0, "nothing known", never is.
        most: k.
        own: row r of `texts` is row r of `among`, too, and not found for itself.

    Returns:
        (R, k) int64 rows and (R, k) float32 weights that sum to 1.
    """
    k = max(1, min(most, len(among) - 1))
    found = torch.zeros(len(texts), k, dtype=torch.long, device=texts.device)
    weights = torch.zeros(len(texts), k, device=texts.device)
    for start in range(0, len(texts), ROWS_AT_ONCE):
        block = slice(start, min(start + ROWS_AT_ONCE, len(texts)))
        part = texts[block].float()
        best, rows = part.new_full((len(part), 0), 0.0), found[block, :0]
        for first in range(0, len(among), AMONG_AT_ONCE):
            others = among[first : first + AMONG_AT_ONCE].float()
            likeness = (part @ others.T).masked_fill_(~others.any(1), -torch.inf)
            if first == 0:
                likeness[:, 0] = -torch.inf
            if own:
                here = torch.arange(block.start, block.stop, device=texts.device)
                here = here[(here >= first) & (here < first + len(others))]
                likeness[here - block.start, here - first] = -torch.inf
            top, place = likeness.topk(min(k, len(others)), dim=1)
            best, rows = torch.cat([best, top], 1), torch.cat([rows, place + first], 1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, kept)
        said = part.any(1, keepdim=True) & ~best.isneginf()
        weight = (best * SHARPNESS).masked_fill(~said, -torch.inf).softmax(1)
        weights[block] = torch.nan_to_num(weight, nan=0.0)
        found[block] = torch.where(said, rows, 0)
    return found, weights
