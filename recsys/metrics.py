"""Ranking metrics, one value a query.

Legend: Q queries, k answers a query, T targets (or shown items) in all, R requests, N items.
NaN means "this query cannot be judged by this metric" (no target, no contrast); an interval
leaves it out, and `isnan` counts it. An empty answer to a query that has targets scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recsys.ragged import Ragged


def rank_of(ranked: np.ndarray, targets: Ragged) -> np.ndarray:
    """Where each target stands in the answer of its query.

    Args:
        ranked: (Q, k) int64 item rows, best first, padded with -1.
        targets: Q rows of item rows; 0 or less is a target that the model does not know.

    Returns:
        (T,) int64: 1 for the first place; 0 where the target is missing, unknown, or named before.
    """
    width = ranked.shape[1]
    rank = np.zeros(len(targets.values), np.int64)
    if len(ranked) != len(targets):
        raise ValueError(f"{len(ranked)} answers do not match {len(targets)} rows of targets.")
    first = _first_named(targets)
    if not len(first) or not width:
        return rank
    span = int(max(targets.values.max(), ranked.max())) + 1
    wanted = targets.row_of()[first] * span + targets.values[first].astype(np.int64)
    order = np.argsort(wanted, kind="stable")
    first, wanted = first[order], wanted[order]
    answered = np.where(ranked > 0, np.arange(len(ranked))[:, None] * span + ranked, -1).ravel()
    place = np.minimum(np.searchsorted(wanted, answered), len(wanted) - 1)
    hit = np.flatnonzero(wanted[place] == answered)
    # Written backwards, so that an item answered twice counts where it stands first.
    rank[first[place[hit[::-1]]]] = hit[::-1] % width + 1
    return rank


def _first_named(targets: Ragged) -> np.ndarray:
    """Positions of the known targets, a target named twice only once."""
    known = np.flatnonzero(targets.values > 0)
    if not len(known):
        return known
    values = targets.values[known].astype(np.int64)
    key = targets.row_of()[known] * (int(values.max()) + 1) + values
    return known[np.unique(key, return_index=True)[1]]


def target_count(targets: Ragged) -> np.ndarray:
    """Distinct targets of each query; every unknown one (0 or less) is an item of its own.

    Returns:
        (Q,) int64.
    """
    unknown = targets.values <= 0
    row = targets.row_of()
    counted = np.concatenate([row[unknown], row[_first_named(targets)]])
    return np.bincount(counted, minlength=len(targets))


class Hits:
    """The ranks of all targets, looked up once and then cut at any k.

    Args:
        ranked: (Q, width) int64 item rows, best first, padded with -1.
        targets: Q rows of item rows; 0 or less is unknown to the model, a miss that counts.
    """

    def __init__(self, ranked: np.ndarray, targets: Ragged) -> None:
        self.width = ranked.shape[1]
        self.wanted = target_count(targets)  # (Q,)
        rank = rank_of(ranked, targets)
        self._query, self._rank = targets.row_of()[rank > 0], rank[rank > 0]

    def _sum(self, k: int, gain: np.ndarray | None = None) -> np.ndarray:
        if not 1 <= k <= self.width:
            raise ValueError(f"A metric at {k} needs answers of {k} places, not {self.width}.")
        within = self._rank <= k
        weights = None if gain is None else gain[within]
        return np.bincount(self._query[within], weights, minlength=len(self.wanted))

    def recall(self, k: int) -> np.ndarray:
        """See `recall_at`."""
        return _ratio(self._sum(k), self.wanted)

    def capped_recall(self, k: int) -> np.ndarray:
        """See `capped_recall_at`."""
        return _ratio(self._sum(k), np.minimum(self.wanted, k))

    def precision(self, k: int) -> np.ndarray:
        """See `precision_at`."""
        return np.where(self.wanted > 0, self._sum(k) / k, np.nan)

    def hit_rate(self, k: int) -> np.ndarray:
        """See `hit_rate_at`."""
        return np.where(self.wanted > 0, (self._sum(k) > 0).astype(float), np.nan)

    def ndcg(self, k: int) -> np.ndarray:
        """See `ndcg_at`."""
        ideal = np.concatenate([[0.0], np.cumsum(_discount(np.arange(1, k + 1)))])
        return _ratio(self._sum(k, _discount(self._rank)), ideal[np.minimum(self.wanted, k)])

    def mrr(self, k: int) -> np.ndarray:
        """See `mrr_at`."""
        self._sum(k)
        best = np.full(len(self.wanted), np.inf)
        np.minimum.at(best, self._query, self._rank)
        return np.where(self.wanted > 0, np.where(best <= k, 1 / best, 0.0), np.nan)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """(Q,) quotient, NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)


def _discount(rank: np.ndarray) -> np.ndarray:
    """1 / log2(1 + rank), rank 1 being the first place (Järvelin & Kekäläinen, 2002)."""
    return 1 / np.log2(1.0 + rank)


def recall_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """Share of the targets that are among the first k: hits / |targets| (as LightGCN reports it).

    With more than k targets it cannot reach 1; `capped_recall_at` divides by min(k, |targets|).

    Args:
        ranked: (Q, at least k) int64 item rows, best first, padded with -1.
        targets: Q rows of item rows; 0 or less is unknown to the model, a miss that counts;
            a target named twice counts once.
        k: places looked at.

    Returns:
        (Q,) float64, NaN where there is no target.
    """
    return Hits(ranked, targets).recall(k)


def capped_recall_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """Hits / min(k, |targets|), so that 1 can be reached; arguments as in `recall_at`."""
    return Hits(ranked, targets).capped_recall(k)


def precision_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """Hits / k, also where the answer is shorter than k; arguments as in `recall_at`."""
    return Hits(ranked, targets).precision(k)


def hit_rate_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """1 where any target is among the first k, else 0; arguments as in `recall_at`."""
    return Hits(ranked, targets).hit_rate(k)


def ndcg_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """Discounted gain of the hits over that of the best list of min(k, |targets|) hits.

    Gain is 0 or 1, discount 1 / log2(1 + rank); arguments as in `recall_at`.
    """
    return Hits(ranked, targets).ndcg(k)


def mrr_at(ranked: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """1 / rank of the first hit among the first k, else 0; arguments as in `recall_at`."""
    return Hits(ranked, targets).mrr(k)


def ranking_metrics(
    ranked: np.ndarray, targets: Ragged, ks: Sequence[int] = (5, 10, 20, 50, 100)
) -> dict[str, np.ndarray]:
    """Recall, NDCG, MRR and hit rate at every k, under the names of the scorecard.

    Args:
        ranked: as in `recall_at`.
        targets: as in `recall_at`.
        ks: places looked at.

    Returns:
        {"recall_at_20": (Q,) float64, "ndcg_at_20": …, "mrr_at_20": …, "hit_rate_at_20": …, …}.
    """
    hits = Hits(ranked, targets)
    kinds = {
        "recall": hits.recall,
        "ndcg": hits.ndcg,
        "mrr": hits.mrr,
        "hit_rate": hits.hit_rate,
    }
    return {f"{name}_at_{k}": metric(k) for name, metric in kinds.items() for k in ks}


class Shown:
    """Requests whose shown items are ordered by score; items with equal scores share their places.

    A share of the mean of what their places are worth is the expected value over all orders of
    the tied items (McSherry & Najork, 2008): a log that lists the clicked item first cannot
    flatter a model that gives every item the same score.

    Args:
        scores: (T,) of the shown items, request after request; larger is better.
        clicked: (T,) bool or 0/1.
        offsets: (R+1,) where each request starts, as in `Ragged`.

    Raises:
        ValueError: lengths that do not match, or NaN scores.
    """

    def __init__(self, scores: np.ndarray, clicked: np.ndarray, offsets: np.ndarray) -> None:
        if not len(scores) == len(clicked) == offsets[-1]:
            raise ValueError(
                f"{len(scores)} scores, {len(clicked)} clicked flags and offsets that end at "
                f"{offsets[-1]} do not match."
            )
        if np.isnan(scores).any():
            raise ValueError(f"Score {int(np.isnan(scores).argmax())} of the shown items is NaN.")
        self._requests = len(offsets) - 1
        lengths = np.diff(offsets)
        request = np.repeat(np.arange(self._requests), lengths)
        scores = np.asarray(scores)
        scores = scores if scores.dtype.kind == "f" else scores.astype(float)
        order = np.lexsort((-scores, request))
        sorted_scores = scores[order]
        self._request = request  # lexsort keeps requests together, so also that of the sorted
        self._clicked = np.asarray(clicked, bool)[order]
        self._rank = np.arange(len(scores)) - np.repeat(offsets[:-1], lengths) + 1
        new = np.ones(len(scores), bool)  # the first of each group of ties
        new[1:] = (request[1:] != request[:-1]) | (sorted_scores[1:] != sorted_scores[:-1])
        self._tie = np.cumsum(new) - 1
        self._clicks = np.bincount(request[self._clicked], minlength=self._requests)  # (R,)
        self._others = lengths - self._clicks
        self.judged = (self._clicks > 0) & (self._others > 0)
        """(R,) bool: something was clicked and something was not; the rest are NaN."""

    def _earned(self, worth: np.ndarray) -> np.ndarray:
        """(R,) sum over the clicked items of what their places are worth, shared among ties."""
        if not len(worth):
            return np.zeros(self._requests)
        shared = np.bincount(self._tie, worth) / np.bincount(self._tie)
        gain = np.where(self._clicked, shared[self._tie], 0.0)
        return np.bincount(self._request, gain, minlength=self._requests)

    def _over(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.divide(above, below, out=np.full(len(below), np.nan), where=self.judged)

    def auc(self) -> np.ndarray:
        """Share of (clicked, not clicked) pairs in the right order, ties half (Mann–Whitney)."""
        lengths = self._clicks + self._others
        below = self._clicks * lengths - self._earned(self._rank.astype(float))  # items below each
        above_clicked = self._clicks * (self._clicks - 1) / 2
        return self._over(below - above_clicked, self._clicks * self._others)

    def mrr(self) -> np.ndarray:
        """Mean of 1 / rank over the clicked items, as MIND and EB-NeRD define it."""
        return self._over(self._earned(1 / self._rank), self._clicks)

    def ndcg(self, k: int) -> np.ndarray:
        """Gain 0 or 1, ideal over min(k, clicks)."""
        worth = np.where(self._rank <= k, _discount(self._rank), 0.0)
        ideal = np.concatenate([[0.0], np.cumsum(_discount(np.arange(1, k + 1)))])
        return self._over(self._earned(worth), ideal[np.minimum(self._clicks, k)])


def auc(scores: np.ndarray, clicked: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each request, ties half; arguments as in `Shown`.

    Returns:
        (R,) float64, NaN where everything or nothing was clicked.
    """
    return Shown(scores, clicked, offsets).auc()


def impression_metrics(
    scores: np.ndarray, clicked: np.ndarray, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """How well scores order what was shown, request by request; arguments as in `Shown`.

    Returns:
        {"auc", "mrr", "ndcg_at_5", "ndcg_at_10"}: (R,) float64 each, NaN in all four where
        everything or nothing was clicked, so that all four speak of the same requests.
    """
    shown = Shown(scores, clicked, offsets)
    return {
        "auc": shown.auc(),
        "mrr": shown.mrr(),
        "ndcg_at_5": shown.ndcg(5),
        "ndcg_at_10": shown.ndcg(10),
    }


def coverage(ranked: np.ndarray, n_items: int) -> float:
    """Share of the items that are answered to anybody.

    Args:
        ranked: (Q, k) int64 item rows padded with -1.
        n_items: how many items could be answered; row 0 is none of them.
    """
    return len(np.unique(ranked[ranked > 0])) / n_items if n_items else float("nan")


def gini(ranked: np.ndarray, n_items: int) -> float:
    """Inequality of exposure over the items: 0 all alike, towards 1 one item takes all.

    Args:
        ranked: as in `coverage`.
        n_items: as in `coverage`.
    """
    exposed = np.sort(np.unique(ranked[ranked > 0], return_counts=True)[1]).astype(float)
    if not len(exposed):
        return float("nan")
    place = np.arange(n_items - len(exposed) + 1, n_items + 1)  # those never answered come first
    return float(((2 * place - n_items - 1) * exposed).sum() / (n_items * exposed.sum()))


def mean_popularity(ranked: np.ndarray, item_count: np.ndarray) -> np.ndarray:
    """Mean count of the items answered to each query.

    Args:
        ranked: (Q, k) int64 item rows padded with -1.
        item_count: (N,) interactions of each item row.

    Returns:
        (Q,) float64, NaN where nothing was answered.
    """
    answered = ranked > 0
    total = np.where(answered, item_count[np.where(answered, ranked, 0)], 0).sum(1, dtype=float)
    return _ratio(total, answered.sum(1))


def novelty(ranked: np.ndarray, item_count: np.ndarray) -> np.ndarray:
    """Mean bits of surprise, −log2 of an item's share of the interactions (Zhou et al., 2010).

    Every item is given one interaction more than it had, so that a new one is not infinitely new.

    Args:
        ranked: as in `mean_popularity`.
        item_count: (N,) interactions of each item row; row 0 is no item.
    """
    count = item_count.astype(float) + 1
    return mean_popularity(ranked, -np.log2(count / count[1:].sum()))
