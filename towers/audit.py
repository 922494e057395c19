"""Audit of a batch's negatives: sources, hardness, gradient shares, masks, sampling errors.

Legend: Q queries, B examples, t of them at once, M encoded items, N candidates, K queued columns,
C = N + K columns, D dimensions, S per-query negatives, T batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.features.batching.batch import Batch, Source
from recsys.files import write_json

SAMPLED = ("in_batch", "uniform", "queue")
PER_QUERY = tuple(source.name.lower() for source in Source)
SOURCES = (*SAMPLED, *PER_QUERY)
"""Where a negative comes from; a candidate that is somebody's target is "in_batch"."""
EDGES = (-20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0)
"""Bins of hardness: up to -20, (-20, -10], …, above 5. Zero is as good as the positive."""
ABOVE = EDGES.index(0.0) + 1
"""First bin of negatives that score more than the positive."""
LOGITS_AT_ONCE = 1 << 21
DECILES = 10


@dataclass(frozen=True)
class DrawErrors:
    """How far the estimated inclusion probabilities are from how often items were sampled.

    Args:
        batches: T, how many were watched.
        expected: sum of estimates over the columns' items, a batch.
        sampled: columns a batch.
        items: how many items were sampled often enough to be judged one by one.
        error: their mean of |log estimated − log empirical|; NaN where there is none.
        deciles: log of expected over sampled for ten groups of items, the least popular first; NaN
            for a group that was never sampled.
    """

    batches: int
    expected: float
    sampled: float
    items: int
    error: float
    deciles: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """What the negatives of a sample of examples do.

    Args:
        examples: how many were looked at.
        negatives: source → columns that stand as negatives, mean of an example.
        gradient: source → its share of what pushes the scores of negatives down; they sum to 1.
        push: all that pushes, mean of an example: 1 − the softmax's probability of the positive
            (and a separate skip term's probability of its skips, times its weight).
        hardness: source → number of negatives in each bin of logit minus the positive's logit.
        known: candidates masked because the user is known to like them, mean of an example.
        known_mass: probability they would have had, mean of an example.
        catalogue: items that the sampled columns together stand for.
        draws: see `Draws`; None where nothing was watched.
    """

    examples: int
    negatives: dict[str, float]
    gradient: dict[str, float]
    push: float
    hardness: dict[str, tuple[int, ...]]
    known: float
    known_mass: float
    catalogue: float
    draws: DrawErrors | None = None

    def metrics(self) -> dict[str, float]:
        """Flat numbers under audit/, of those sources that have any negative."""
        there = [source for source in SOURCES if self.negatives[source]]
        found = {
            "audit/push": self.push,
            "audit/known_masked": self.known,
            "audit/known_mass": self.known_mass,
            "audit/catalogue": self.catalogue,
        }
        for source in there:
            bins = self.hardness[source]
            found[f"audit/gradient/{source}"] = self.gradient[source]
            found[f"audit/negatives/{source}"] = self.negatives[source]
            found[f"audit/above_positive/{source}"] = sum(bins[ABOVE:]) / max(1, sum(bins))
        if self.draws is not None:
            deciles = [abs(error) for error in self.draws.deciles if not math.isnan(error)]
            found["audit/draws/expected"] = self.draws.expected
            found["audit/draws/sampled"] = self.draws.sampled
            found["audit/draws/error"] = self.draws.error
            found["audit/draws/worst_decile"] = max(deciles, default=math.nan)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Everything, with null for what is not known."""
        draws = None
        if self.draws is not None:
            draws = vars(self.draws) | {
                "error": _known(self.draws.error),
                "deciles": [_known(error) for error in self.draws.deciles],
            }
        return {
            **vars(self),
            "hardness": {
                "edges": list(EDGES),
                **{name: list(bins) for name, bins in self.hardness.items()},
            },
            "draws": draws,
        }

    def write(self, folder: Path, epoch: int) -> Path:
        """One file an epoch, epoch-003.json."""
        path = folder / f"epoch-{epoch:03d}.json"
        write_json(path, self.to_json())
        return path


@torch.no_grad()
def audit(
    users: Tensor,
    items: Tensor,
    batch: Batch,
    temperature: Tensor | float,
    *,
    queued: Tensor | None = None,
    log_weight: Tensor | None = None,
    skip_share: float = 0.0,
    most: int = 1024,
    draws: DrawErrors | None = None,
) -> Audit:
    """Audit the softmax over a batch's negatives.

    The gradient of the loss by a negative's logit is its softmax probability, so that the share of
    the gradient of a source is the share of its columns in the probability of all negatives. Other
    objectives weigh pairs otherwise; this says what the softmax would do with the same scores.

    Args:
        users: (Q, D).
        items: (M, D), the batch's first M rows.
        batch: who chose what, beside which columns.
        temperature: divides the score.
        queued: (K, D) vectors of the queue's columns; None: these are left out.
        log_weight: (N+K,) log of how many items a column stands for; -inf: it is no negative.
            None: minus `batch.log_inclusion`.
        skip_share: weight of the softmax of the positive against its skips.
        most: examples looked at, spread evenly over the batch.
        draws: to be kept beside the rest.
    """
    n, size = batch.n_candidates, len(batch)
    items = items.float()
    columns = items[:n] if queued is None else torch.cat([items[:n], queued.float()])  # (C, D)
    width = len(columns)
    weight = (-batch.log_inclusion if log_weight is None else log_weight)[:width].double()
    of_column = torch.ones(width, dtype=torch.int64, device=items.device)  # place in SAMPLED
    of_column[batch.target] = 0
    of_column[n:] = 2
    kind = torch.nn.functional.one_hot(of_column, len(SAMPLED)).double()  # (C, 3)
    queries = batch.n_queries
    owner = torch.arange(size, device=items.device) if batch.owner is None else batch.owner
    targets = _Edges(owner, queries)
    knper_query = _Edges(batch.positive_mask[0], queries)
    per_query = _Edges(batch.per_query[0], queries)

    chosen = torch.arange(min(size, most), device=items.device) * size // max(1, min(size, most))
    mass = torch.zeros(len(SOURCES), dtype=torch.float64, device=items.device)
    counts = torch.zeros(len(SOURCES), len(EDGES) + 1, dtype=torch.int64, device=items.device)
    edges = torch.tensor(EDGES, device=items.device)
    masked = torch.zeros(2, dtype=torch.float64, device=items.device)
    for part in chosen.split(max(1, LOGITS_AT_ONCE // max(1, width))):
        query = owner[part]  # (t,)
        asking = users[query].float()  # (t, D)
        logits = asking @ columns.T / temperature  # (t, C)
        positive = logits.gather(1, batch.target[part][:, None])  # (t, 1)
        mine = _marked(logits, *targets.of(query), batch.target)
        liked = _marked(logits, *knper_query.of(query), batch.positive_mask[1]) & ~mine
        negative = ~(mine | liked) & (weight > -torch.inf)
        row, edge = per_query.of(query)
        hard_logit = (asking[row] * items[batch.per_query[1, edge]]).sum(1) / temperature  # (s,)
        source = batch.per_query_source[edge].long()
        apart = source == Source.SKIPPED

        # Everything relative to the largest logit of the row, in float64: nothing overflows.
        sampled = logits.double() + weight
        given = hard_logit.double() + batch.per_query_log_weight[edge]
        top = torch.maximum(positive[:, 0].double(), sampled.amax(1))
        top = top.scatter_reduce(0, row, given, "amax")
        sampled = (sampled - top[:, None]).exp()  # (t, C)
        given = (given - top[row]).exp()  # (s,)
        itself = (positive[:, 0].double() - top).exp()
        by_sampled = (sampled * negative) @ kind  # (t, 3)
        by_query = torch.zeros(len(part), len(PER_QUERY), dtype=torch.float64, device=items.device)
        by_query.index_put_((row, source), given * ~apart, accumulate=True)
        total = itself + by_sampled.sum(1) + by_query.sum(1)
        share = torch.cat([by_sampled, by_query], 1) / total.clamp(min=1e-300)[:, None]  # (t, 7)
        behind = torch.zeros(len(part), dtype=torch.float64, device=items.device)
        behind.index_add_(0, row, given * apart)
        skipped = len(SAMPLED) + Source.SKIPPED
        share[:, skipped] += skip_share * behind / (itself + behind).clamp(min=1e-300)
        mass += (share * batch.weight[part].double()[:, None]).sum(0)
        lost = (sampled * liked).sum(1)
        masked[0] += liked.sum()
        masked[1] += (lost / (lost + total).clamp(min=1e-300)).sum()

        bin_ = torch.bucketize(logits - positive, edges)  # (t, C)
        _count(counts, of_column.expand_as(bin_)[negative], bin_[negative])
        _count(counts, source + len(SAMPLED), torch.bucketize(hard_logit - positive[row, 0], edges))
    looked = max(1, len(chosen))
    pushing, weights = float(mass.sum()), float(batch.weight[chosen].sum())
    return Audit(
        examples=len(chosen),
        negatives=_named(counts.sum(1).double() / looked),
        gradient=_named(mass / max(pushing, 1e-300)),
        push=pushing / max(weights, 1e-9),
        hardness={
            name: tuple(bins) for name, bins in zip(SOURCES, counts.tolist(), strict=True)
        },
        known=float(masked[0]) / looked,
        known_mass=float(masked[1]) / looked,
        catalogue=float(weight.exp().sum()),
        draws=draws,
    )  # fmt: skip


class _Edges:
    """Edges sorted by query, to be looked up for some of the queries, repeats allowed."""

    def __init__(self, query: Tensor, n_queries: int) -> None:
        self.order = query.argsort(stable=True)
        counts = torch.bincount(query, minlength=n_queries)
        self.end = counts.cumsum(0)
        self.start = self.end - counts

    def of(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(t,) queries → place in `query` and number of each of their edges, (e,) both."""
        start, length = self.start[query], self.end[query] - self.start[query]
        row = torch.repeat_interleave(length)
        before = (length.cumsum(0) - length)[row]
        place = start[row] + torch.arange(len(row), device=row.device) - before
        return row, self.order[place]


def _marked(logits: Tensor, row: Tensor, edge: Tensor, column: Tensor) -> Tensor:
    """(t, C) bool, true where an edge points; columns that are left out have no mark."""
    marked = torch.zeros_like(logits, dtype=torch.bool)
    column = column[edge]
    inside = column < logits.shape[1]
    marked[row[inside], column[inside]] = True
    return marked


def _count(counts: Tensor, source: Tensor, bin_: Tensor) -> None:
    width = counts.shape[1]
    counts += torch.bincount(source * width + bin_, minlength=counts.numel()).view_as(counts)


def _named(values: Tensor) -> dict[str, float]:
    return dict(zip(SOURCES, values.tolist(), strict=True))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Draws:
    """Watches which items stand as columns, and what their probability was said to be.

    Watch whole epochs: there every item of the training side comes by about as often as it was
    chosen, so that none is judged only by the batches it happened to be sampled in.

    Args:
        n_items: item rows.
    """

    def __init__(self, n_items: int) -> None:
        self.batches = 0
        self.count = np.zeros(n_items, np.int64)
        self.estimate = np.zeros(n_items)

    def add(self, batch: Batch) -> None:
        """Watch a batch, which should not have left the main memory yet."""
        rows = torch.cat([batch.rows[: batch.n_candidates], batch.queued]).cpu().numpy()
        self.batches += 1
        self.count[rows] += 1
        self.estimate[rows] += np.exp(batch.log_inclusion.cpu().double().numpy())

    def errors(self, popularity: np.ndarray, least: int = 10) -> DrawErrors:
        """What has been seen so far.

        Args:
            popularity: (n_items,) by which the deciles are made.
            least: times that an item has to be sampled to be judged by itself; fewer say little of
                how often it is sampled in truth.
        """
        seen = np.flatnonzero(self.count)
        count, batches = self.count[seen], max(1, self.batches)
        expected = self.estimate[seen] / np.maximum(count, 1) * batches
        often = count >= min(least, batches)
        error = np.abs(np.log(expected[often]) - np.log(count[often]))
        rank = np.empty(len(seen), np.int64)
        rank[np.argsort(popularity[seen], kind="stable")] = np.arange(len(seen))
        group = rank * DECILES // max(1, len(seen))
        sums = [np.bincount(group, values, DECILES) for values in (expected, count)]
        with np.errstate(invalid="ignore"):
            deciles = np.log(sums[0] / sums[1])
        return DrawErrors(
            batches=self.batches,
            expected=float(expected.sum() / batches),
            sampled=float(count.sum() / batches),
            items=int(often.sum()),
            error=float(error.mean()) if often.any() else math.nan,
            deciles=tuple(deciles.tolist()),
        )
