"""Sums of exponentials over negatives: exact, stable, and with nothing where there is nothing.

Legend: Q rows (queries), C columns, D dimensions, E blocked entries, S terms of single rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def row_logsumexp(values: Tensor, log_weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(rows,) log of the weighted sum of exp(value) over what is not blocked."""
    result: Tensor = _RowLogSumExp.apply(values, log_weight, row, column)
    return result


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


class _RowLogSumExp(torch.autograd.Function):
    """log Σ exp(value + log weight) of every row, the blocked columns left out."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, log_weight: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        matrix = values + log_weight
        matrix[row, column] = -torch.inf
        result = _to_shares(matrix)
        ctx.save_for_backward(matrix)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (shares,) = ctx.saved_tensors
        return shares * gradient[:, None], None, None, None


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
