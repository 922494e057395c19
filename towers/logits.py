"""What an objective sees of a batch: how every query scores its own items and those it lost to.

Legend: Q queries, B examples (a query has one or more), N candidates, M items given (candidates
and those given as own negatives), K remembered columns, C = N + K columns, D dimensions, E known
edges, S own negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recsys.towers.logsumexp import (
    column_logsumexp,
    full,
    largest,
    product,
    ragged_logaddexp,
    repeat_ragged,
    row_logsumexp,
    row_sum,
)

Term = Callable[[Tensor], Tensor]
"""Of raw scores, elementwise."""

PairTerm = Callable[[Tensor, Tensor], Tensor]
"""Of raw scores of negatives and of the positives beside them, elementwise with broadcasting."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """Inner products of queries with their own items and with their negatives.

    The negatives of a query are all columns but the items that it chose itself and those its user
    is known to like, and, beside them, the items given to this query alone. Columns were drawn, so
    each has the weight of the catalogue items it stands for; a positive was not drawn and has no
    correction (corrected logQ; Khrylchenko et al., RecSys 2025), and what was given was not drawn
    either and has its own weight only. Weights are constants: no gradient reaches them. Scores are
    float32 at least, under autocast too.

    Args:
        users: (Q, D) vectors of the queries.
        items: (M, D) vectors, each row once; the first N are candidates for everybody.
        target: (B,) candidate that each example chose.
        temperature: divides a score to give a logit; smaller is sharper.
        log_weight: (N+K,) log of how many items a column stands for: minus the log probability
            that it is among the drawn negatives; zeros for no correction, -inf for no column.
        owner: (B,) query of each example; None: example b is query b.
        queued: (K, D) vectors of columns remembered from earlier steps.
        known: (2, E) query and column that the user is known to like: no negative there.
        own: (2, S) query and row of `items` of negatives for this query alone.
        own_log_weight: (S,) log weight of each; a weight of 1 counts as one full negative.
        own_source: (S,) kind of each, a number of `Source`; None: all 0 (skipped).
        joining: kinds of own negatives that stand beside the columns; None: all of them.
        user_log_weight: (Q,) as `log_weight`, of queries when they are columns (`transposed`).
        tile: so many rows of the score matrix at once, recomputed for the gradient, so that memory
            is tile × (N+K) whatever Q; None, or no fewer than there are rows: the whole matrix,
            nothing recomputed.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    users: Tensor
    items: Tensor
    target: Tensor
    temperature: Tensor | float
    log_weight: Tensor
    owner: Tensor | None = None
    queued: Tensor | None = None
    known: Tensor | None = None
    own: Tensor | None = None
    own_log_weight: Tensor | None = None
    own_source: Tensor | None = None
    joining: Collection[int] | None = None
    user_log_weight: Tensor | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        remembered = 0 if self.queued is None else len(self.queued)
        candidates = len(self.log_weight) - remembered
        if not 0 <= candidates <= len(self.items):
            raise ValueError(
                f"log_weight has {len(self.log_weight)} columns, but there are {len(self.items)} "
                f"items and {remembered} remembered columns. Give a weight for each candidate and "
                "each remembered column."
            )
        if self.owner is None and len(self.users) != len(self.target):
            raise ValueError(
                f"{len(self.target)} examples and {len(self.users)} queries: say in `owner` whose "
                "each example is."
            )
        if self.owner is not None and len(self.owner) != len(self.target):
            raise ValueError(f"{len(self.target)} targets, but {len(self.owner)} owners.")
        for name in ("own_log_weight", "own_source"):
            given = getattr(self, name)
            count = 0 if self.own is None else self.own.shape[1]
            if given is not None and len(given) != count:
                raise ValueError(f"{name} has {len(given)} entries for {count} own negatives.")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile is {self.tile}; a tile has at least one row, None means all.")

    def __len__(self) -> int:
        return len(self.target)

    # What has a gradient is not kept: first asked for under no_grad, it would never have one.

    @property
    def n_candidates(self) -> int:
        """N."""
        return len(self.log_weight) - (0 if self.queued is None else len(self.queued))

    @property
    def columns(self) -> Tensor:
        """(N+K, D) vectors of candidates, then of remembered columns."""
        candidates = full(self.items[: self.n_candidates])
        return candidates if self.queued is None else torch.cat([candidates, full(self.queued)])

    @property
    def positive_score(self) -> Tensor:
        """(B,) score of each example with its own item, before the temperature."""
        return (
            self.of_examples(full(self.users)) * full(self.items).index_select(0, self.target)
        ).sum(1)

    @property
    def positive(self) -> Tensor:
        """(B,) logit of each example with its own item."""
        return self.positive_score / self.temperature

    def of_examples(self, of_queries: Tensor) -> Tensor:
        """What a query has, for each of its examples: (Q, ...) to (B, ...)."""
        return of_queries if self.owner is None else of_queries.index_select(0, self.owner)

    def logsumexp(self) -> Tensor:
        """(Q,) log of the weighted sum of exp(logit) over negatives; -inf where there are none."""
        users = full(self.users) / self.temperature  # (Q, D), cheaper than dividing (Q, N+K)
        total = self._by_tiles(column_logsumexp, users)
        rows, scores, log_weight = self.own_scores(self.joining)
        return ragged_logaddexp(total, scores / self.temperature + log_weight, rows)

    def pairwise_logsumexp(self, term: PairTerm) -> Tensor:
        """(B,) as `logsumexp`, of a term of the negative's and the positive's score.

        Args:
            term: of raw scores (rows, columns) and (rows, 1), to logits (rows, columns).
        """
        each = self.per_example()
        positive = each.positive_score

        def work(users: Tensor, positive: Tensor, columns: Tensor, *rest: Tensor) -> Tensor:
            return row_logsumexp(term(product(users, columns), positive[:, None]), *rest)

        total = each._by_tiles(work, full(each.users), positive)
        rows, scores, log_weight = each.own_scores(self.joining)
        return ragged_logaddexp(total, term(scores, positive[rows]) + log_weight, rows)

    def mean(self, term: Term) -> Tensor:
        """(Q,) weighted mean over negatives of a term of the score; 0 where there are none.

        Args:
            term: of raw scores, elementwise.
        """

        def work(users: Tensor, columns: Tensor, *rest: Tensor) -> Tensor:
            return row_sum(term(product(users, columns)), *rest)

        total = self._by_tiles(work, full(self.users))
        rows, scores, log_weight = self.own_scores(self.joining)
        return self._over_mass(total, rows, term(scores), log_weight)

    def pairwise_mean(self, term: PairTerm) -> Tensor:
        """(B,) as `mean`, of a term of the negative's and the positive's score."""
        each = self.per_example()
        positive = each.positive_score

        def work(users: Tensor, positive: Tensor, columns: Tensor, *rest: Tensor) -> Tensor:
            return row_sum(term(product(users, columns), positive[:, None]), *rest)

        total = each._by_tiles(work, full(each.users), positive)
        rows, scores, log_weight = each.own_scores(self.joining)
        return each._over_mass(total, rows, term(scores, positive[rows]), log_weight)

    @torch.no_grad()
    def log_mass(self) -> Tensor:
        """(Q,) log of the summed weights of the negatives; -inf where there are none.

        No column is looked at: what is blocked is taken from the sum over all, in float64.
        """
        row, column = self._blocked_once
        weight = self.log_weight.double().exp()  # (N+K,)
        there = (weight > 0).double()
        left = there.sum() - self._sum_by_row(there[column], row)  # (Q,) columns that remain
        mass = weight.sum() - self._sum_by_row(weight[column], row)
        # Rounding must not empty a query that has a negative, nor fill one that has none.
        mass = torch.where(left > 0.5, mass.clamp(min=1e-300), 0)
        rows, _scores, log_weight = self.own_scores(self.joining)
        mass = mass + self._sum_by_row(log_weight.double().exp(), rows)
        return mass.log().to(full(self.log_weight).dtype)

    @torch.no_grad()
    def kth_largest(self, k: int) -> Tensor:
        """(Q,) k-th largest score of a query among all columns, known items and targets too.

        With fewer than k columns, the smallest.
        """
        users, columns = full(self.users), self.columns
        k = min(k, len(columns))
        return torch.cat(
            [
                product(rows, columns).topk(k, dim=1, sorted=False).values.amin(1)
                for rows in users.split(self.tile or max(1, len(users)))
            ]
        )

    def own_scores(self, sources: Collection[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The negatives given for single queries.

        Args:
            sources: kinds wanted; None: all.

        Returns:
            (S,) query, (S,) raw score and (S,) log weight of each.
        """
        if self.own is None:
            nothing = self.log_weight.new_zeros(0)
            return self.target.new_zeros(0), nothing, nothing
        (row, item), weight = self.own, self.own_log_weight
        if sources is not None:
            if self.own_source is not None:
                wanted = [self.own_source == int(source) for source in sources]
                kept = torch.stack([*wanted, torch.zeros_like(row, dtype=torch.bool)]).any(0)
            else:
                kept = torch.full_like(row, 0 in sources, dtype=torch.bool)
            row, item, weight = row[kept], item[kept], None if weight is None else weight[kept]
        scores = (
            full(self.users).index_select(0, row) * full(self.items).index_select(0, item)
        ).sum(1)
        return row, scores, torch.zeros_like(scores) if weight is None else full(weight).detach()

    def per_example(self) -> Scores:
        """The same, each example a query of its own; its siblings' targets stay blocked."""
        if self.owner is None:
            return self
        known = self._blocked_once
        _, known = repeat_ragged(known, self.owner, len(self.users))
        own = weight = source = None
        if self.own is not None:
            place, own = repeat_ragged(self.own, self.owner, len(self.users))
            weight = None if self.own_log_weight is None else self.own_log_weight[place]
            source = None if self.own_source is None else self.own_source[place]
        return replace(
            self,
            users=self.of_examples(self.users),
            owner=None,
            known=known,
            own=own,
            own_log_weight=weight,
            own_source=source,
            user_log_weight=None,
        )

    def transposed(self) -> Scores:
        """Item to user: each item chosen in the batch asks which of the queries chose it.

        Queries that know the item are no negatives for it. Own negatives belong to a query, and
        have no place here.
        """
        chosen, owner = self.target.unique(return_inverse=True)  # (R,), (B,)
        known = None
        if self.known is not None:
            place = torch.full_like(self.log_weight, -1, dtype=torch.long)
            place[chosen] = torch.arange(len(chosen), device=chosen.device)
            row = place[self.known[1]]
            known = torch.stack([row, self.known[0]])[:, row >= 0]
        count = len(self.users)
        return Scores(
            users=self.items.index_select(0, chosen),
            items=self.users,
            target=torch.arange(count, device=owner.device) if self.owner is None else self.owner,
            temperature=self.temperature,
            log_weight=self.log_weight.new_zeros(count)
            if self.user_log_weight is None
            else self.user_log_weight,
            owner=owner,
            known=known,
            tile=self.tile,
        )

    def truncated(self, dimensions: int, *, renormalise: bool = True, keep_last: int = 0) -> Scores:
        """The same of the first dimensions only (Matryoshka; Kusupati et al., NeurIPS 2022).

        Args:
            dimensions: how many are kept.
            renormalise: bring what is kept back to length 1, where the score is a cosine.
            keep_last: so many last dimensions stay as they are and are not counted: an item bias.

        Raises:
            ValueError: more dimensions than there are.
        """
        available = self.users.shape[1] - keep_last
        if not 1 <= dimensions <= available:
            raise ValueError(f"Vectors of {available} dimensions cannot be cut to {dimensions}.")

        def cut(vectors: Tensor) -> Tensor:
            front = full(vectors[:, :dimensions])
            front = F.normalize(front, dim=1) if renormalise else front
            return torch.cat([front, full(vectors[:, available:])], 1) if keep_last else front

        queued = None if self.queued is None else cut(self.queued)
        return replace(self, users=cut(self.users), items=cut(self.items), queued=queued)

    def of_member(self, number: int, members: int) -> Scores:
        """The same of one member's part of the dimensions, its vectors brought back to length 1."""

        def part(vectors: Tensor) -> Tensor:
            return full(vectors).chunk(members, -1)[number] * members**0.5

        queued = None if self.queued is None else part(self.queued)
        return replace(self, users=part(self.users), items=part(self.items), queued=queued)

    @cached_property
    def _blocked(self) -> Tensor:
        """(2, E) query and column that are no negatives: own targets and known ones."""
        row = self.owner
        if row is None:
            row = torch.arange(len(self.target), device=self.target.device)
        own = torch.stack([row, self.target])
        return own if self.known is None else torch.cat([own, self.known], dim=1)

    @cached_property
    def _blocked_once(self) -> Tensor:
        """(2, E) `_blocked`, by query, each edge once."""
        width = max(1, len(self.log_weight))
        edge = (self._blocked[0] * width + self._blocked[1]).unique()  # sorted
        return torch.stack([edge // width, edge % width])

    def _by_tiles(self, work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Give work(rows..., columns, log weight, blocked row, blocked column) for all rows.

        Args:
            work: to (rows,); looks at each row alone.
            rows: tensors with Q rows each.
        """
        count, columns, log_weight = len(rows[0]), self.columns, full(self.log_weight)
        if self.tile is None or self.tile >= count:
            return work(*rows, columns, log_weight, *self._blocked)
        row, column = self._blocked_once
        starts = torch.arange(0, count + self.tile, self.tile, device=row.device)
        edges = torch.searchsorted(row, starts).tolist()
        parts = [
            checkpoint(
                work,
                *(tensor[start : start + self.tile] for tensor in rows),
                columns,
                log_weight,
                row[first:last] - start,
                column[first:last],
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn
            )
            for start, first, last in zip(
                range(0, count, self.tile), edges[:-1], edges[1:], strict=True
            )
        ]
        return torch.cat(parts)

    def _over_mass(self, total: Tensor, row: Tensor, terms: Tensor, log_weight: Tensor) -> Tensor:
        """(Q,) mean from (total, log of its unit) over columns and the terms of own negatives."""
        shift = largest(full(self.log_weight))
        log_mass = self.log_mass()
        total = total.index_add(0, row, terms * (log_weight - shift).exp())
        mass = (log_mass - shift).exp()
        return total / mass.masked_fill(mass == 0, 1)

    def _sum_by_row(self, values: Tensor, row: Tensor) -> Tensor:
        return values.new_zeros(len(self.users)).index_add(0, row, values)
