"""Logits of a batch: positives, shared sampled negatives, per-query negatives, masks.

Legend: Q queries, B examples (a query has one or more), N candidates, M encoded items (candidates
and per-query negatives), K queued columns, C = N + K columns, D dimensions, E masked edges,
S per-query negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from recsys.features.batching.batch import Source

NOT_SKIPPED = tuple(source for source in Source if source != Source.SKIPPED)

PairTerm = Callable[[Tensor, Tensor], Tensor]
"""Of raw scores of negatives and of the positives beside them, elementwise with broadcasting."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchLogits:
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
        queued: (K, D) vectors of candidates of earlier steps, from the memory bank.
        positive_mask: (2, E) query and column that the user is known to like: no negative there.
        per_query: (2, S) query and row of `items` of negatives for this query alone.
        per_query_log_weight: (S,) log weight of each; a weight of 1 counts as one full negative.
        per_query_source: (S,) kind of each, a number of `Source`; None: all 0 (skipped).
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
    positive_mask: Tensor | None = None
    per_query: Tensor | None = None
    per_query_log_weight: Tensor | None = None
    per_query_source: Tensor | None = None
    user_log_weight: Tensor | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        queued = 0 if self.queued is None else len(self.queued)
        candidates = len(self.log_weight) - queued
        if not 0 <= candidates <= len(self.items):
            raise ValueError(
                f"log_weight has {len(self.log_weight)} columns, but there are {len(self.items)} "
                f"items and {queued} queued columns. Give a weight for each candidate and "
                "each queued column."
            )
        if self.owner is None and len(self.users) != len(self.target):
            raise ValueError(
                f"{len(self.target)} examples and {len(self.users)} queries: say in `owner` whose "
                "each example is."
            )
        if self.owner is not None and len(self.owner) != len(self.target):
            raise ValueError(f"{len(self.target)} targets, but {len(self.owner)} owners.")
        for name in ("per_query_log_weight", "per_query_source"):
            given = getattr(self, name)
            count = 0 if self.per_query is None else self.per_query.shape[1]
            if given is not None and len(given) != count:
                raise ValueError(
                    f"{name} has {len(given)} entries for {count} per-query negatives."
                )
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
        """(N+K, D) vectors of candidates, then of queued columns."""
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
        rows, scores, log_weight = self.per_query_scores()
        return ragged_logaddexp(total, scores / self.temperature + log_weight, rows)

    def pairwise_mean(self, term: PairTerm) -> Tensor:
        """(B,) as `mean`, of a term of the negative's and the positive's score."""
        each = self.per_example()
        positive = each.positive_score

        def work(users: Tensor, positive: Tensor, columns: Tensor, *rest: Tensor) -> Tensor:
            return row_sum(term(product(users, columns), positive[:, None]), *rest)

        total = each._by_tiles(work, full(each.users), positive)
        rows, scores, log_weight = each.per_query_scores()
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
        rows, _scores, log_weight = self.per_query_scores()
        mass = mass + self._sum_by_row(log_weight.double().exp(), rows)
        return mass.log().to(full(self.log_weight).dtype)

    def per_query_scores(
        self, sources: Collection[int] = NOT_SKIPPED
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The negatives given for single queries.

        Args:
            sources: kinds wanted; without skips, which have a softmax of their own.

        Returns:
            (S,) query, (S,) raw score and (S,) log weight of each.
        """
        if self.per_query is None:
            nothing = self.log_weight.new_zeros(0)
            return self.target.new_zeros(0), nothing, nothing
        (row, item), weight = self.per_query, self.per_query_log_weight
        if self.per_query_source is None:
            kept = torch.full_like(row, int(Source.SKIPPED) in sources, dtype=torch.bool)
        else:
            wanted = [self.per_query_source == int(source) for source in sources]
            kept = torch.stack([*wanted, torch.zeros_like(row, dtype=torch.bool)]).any(0)
        row, item, weight = row[kept], item[kept], None if weight is None else weight[kept]
        scores = (
            full(self.users).index_select(0, row) * full(self.items).index_select(0, item)
        ).sum(1)
        return row, scores, torch.zeros_like(scores) if weight is None else full(weight).detach()

    def per_example(self) -> BatchLogits:
        """The same, each example a query of its own; its siblings' targets stay blocked."""
        if self.owner is None:
            return self
        known = self._blocked_once
        _, known = repeat_ragged(known, self.owner, len(self.users))
        per_query = weight = source = None
        if self.per_query is not None:
            place, per_query = repeat_ragged(self.per_query, self.owner, len(self.users))
            weight = None if self.per_query_log_weight is None else self.per_query_log_weight[place]
            source = None if self.per_query_source is None else self.per_query_source[place]
        return replace(
            self,
            users=self.of_examples(self.users),
            owner=None,
            positive_mask=known,
            per_query=per_query,
            per_query_log_weight=weight,
            per_query_source=source,
            user_log_weight=None,
        )

    def transposed(self) -> BatchLogits:
        """Item to user: each item chosen in the batch asks which of the queries chose it.

        Queries that know the item are no negatives for it. Per-query negatives have no place here.
        """
        chosen, owner = self.target.unique(return_inverse=True)  # (R,), (B,)
        known = None
        if self.positive_mask is not None:
            place = torch.full_like(self.log_weight, -1, dtype=torch.long)
            place[chosen] = torch.arange(len(chosen), device=chosen.device)
            row = place[self.positive_mask[1]]
            known = torch.stack([row, self.positive_mask[0]])[:, row >= 0]
        count = len(self.users)
        return BatchLogits(
            users=self.items.index_select(0, chosen),
            items=self.users,
            target=torch.arange(count, device=owner.device) if self.owner is None else self.owner,
            temperature=self.temperature,
            log_weight=self.log_weight.new_zeros(count)
            if self.user_log_weight is None
            else self.user_log_weight,
            owner=owner,
            positive_mask=known,
            tile=self.tile,
        )

    def dense(self) -> Tensor:
        """(Q, N+K) logits of all columns plus their log weights, blocked entries at -inf.

        For losses that want the matrix; `logsumexp` never makes all of it at once.
        """
        logits = product(full(self.users) / self.temperature, self.columns) + full(self.log_weight)
        return logits.index_put(tuple(self._blocked), logits.new_full((), -torch.inf))

    @cached_property
    def _blocked(self) -> Tensor:
        """(2, E) query and column that are no negatives: own targets and known ones."""
        row = self.owner
        if row is None:
            row = torch.arange(len(self.target), device=self.target.device)
        own = torch.stack([row, self.target])
        return own if self.positive_mask is None else torch.cat([own, self.positive_mask], dim=1)

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
        """(Q,) mean from the total over columns and the terms of per-query negatives."""
        shift = largest(full(self.log_weight))
        log_mass = self.log_mass()
        total = total.index_add(0, row, terms * (log_weight - shift).exp())
        mass = (log_mass - shift).exp()
        return total / mass.masked_fill(mass == 0, 1)

    def _sum_by_row(self, values: Tensor, row: Tensor) -> Tensor:
        return values.new_zeros(len(self.users)).index_add(0, row, values)


def ragged_logaddexp(total: Tensor, terms: Tensor, row: Tensor) -> Tensor:
    """log(exp(total[q]) + Σ over the terms of row q of exp(term)), without overflow.

    Args:
        total: (Q,), -inf for nothing.
        terms: (S,).
        row: (S,) int64 row of each term.

    Returns:
        (Q,), -inf, without gradient, where there is nothing.
    """
    if not len(terms):
        return total
    top = total.detach().scatter_reduce(0, row, terms.detach(), "amax")
    nothing = top == -torch.inf
    top = top.masked_fill(nothing, 0)
    mass = (total - top).exp().index_add(0, row, (terms - top[row]).exp())
    # A logarithm of 0 would have NaN as gradient even where it is not chosen.
    return (top + mass.masked_fill(nothing, 1).log()).masked_fill(nothing, -torch.inf)


def full(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already."""
    return values if values.dtype == torch.float64 else values.float()


def _exact(device: torch.device) -> torch.autocast:
    """Autocast would do the product in 8 bits of mantissa: a logit of 14 would be off by .03."""
    return torch.autocast(device.type, enabled=False)


def product(users: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) raw scores."""
    with _exact(users.device):
        return users @ columns.T


def largest(log_weight: Tensor) -> Tensor:
    """() the largest log weight, or -60: the unit of sums of weights."""
    return torch.cat([log_weight, log_weight.new_full((1,), -60.0)]).amax()


def row_sum(values: Tensor, log_weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(rows,) weighted sum of values that are not blocked, in units of the largest weight."""
    values = values.index_put((row, column), values.new_zeros(()))
    weight = (log_weight - largest(log_weight)).exp()
    with _exact(values.device):
        return values @ weight


def column_logsumexp(
    users: Tensor, columns: Tensor, log_weight: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """(rows,) log of the weighted sum of exp(inner product) over what is not blocked."""
    result: Tensor = _ColumnLogSumExp.apply(users, columns, log_weight, row, column)
    return result


def _to_shares(logits: Tensor) -> Tensor:
    """Turn rows of logits into their softmax where they stand; a row of -inf becomes 0.

    Returns:
        (rows,) log-sum-exp of each.
    """
    if not logits.shape[1]:
        return logits.new_full((len(logits),), -torch.inf)
    top = logits.amax(1)
    # In place the softmax needs no second matrix; of it the largest share is one over the sum.
    torch.softmax(logits, 1, out=logits)
    empty = top == -torch.inf
    logits[empty] = 0
    return torch.where(empty, top, top - logits.amax(1).log())


class _ColumnLogSumExp(torch.autograd.Function):
    """log Σ exp(users · column + log weight) of every row, the blocked columns left out.

    The matrix is written once, then blocked and turned into shares in place, and is kept as it is:
    the gradient is two products with it, and no other pass over it.
    """

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, columns: Tensor, log_weight: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        with _exact(users.device):
            matrix = torch.addmm(log_weight, users, columns.T)
        matrix[row, column] = -torch.inf
        result = _to_shares(matrix)
        ctx.save_for_backward(users, columns, matrix)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        users, columns, shares = ctx.saved_tensors
        to_users = to_columns = None
        with _exact(users.device):
            if ctx.needs_input_grad[0]:
                to_users = (shares @ columns) * gradient[:, None]
            if ctx.needs_input_grad[1]:
                to_columns = shares.T @ (users * gradient[:, None])
        return to_users, to_columns, None, None, None


def repeat_ragged(edges: Tensor, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Edges of queries as edges of their examples.

    Args:
        edges: (2, E) query and something.
        owner: (B,) query of each example.
        count: Q.

    Returns:
        (E',) place in `edges` and (2, E') example and something.
    """
    order = edges[0].argsort(stable=True)
    length = torch.bincount(edges[0], minlength=count)
    start = length.cumsum(0) - length
    mine = length[owner]  # (B,)
    example = torch.repeat_interleave(torch.arange(len(owner), device=owner.device), mine)
    within = torch.arange(len(example), device=owner.device) - (mine.cumsum(0) - mine)[example]
    place = order[start[owner[example]] + within]
    return place, torch.stack([example, edges[1, place]])
