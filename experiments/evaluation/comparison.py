"""Rankings of the towers and of baselines for the same queries over the same items.

Legend: Q queries, N item rows, K the deepest rank looked at, T shown items in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.baselines import Popularity, newest_first
from recsys.experiments.evaluation.queries import EvaluateRules, by_as_of
from recsys.features.batching.batch import Queries
from recsys.features.batching.examples import Questions
from recsys.features.prepared.timeline import Timeline
from recsys.item_baselines import CoOccurrence, TextSimilarity
from recsys.ragged import Ragged, slots
from recsys.serving.recommender import Recommender
from recsys.tables import DAY

MODEL = "model"


class Baselines:
    """What the towers must beat, each with what it may know at a time.

    Args:
        recommender: extended with the later events.
        past: events before the cut-off, which co-occurrence is fitted on.
        rivals: name → other towers over the same rows, extended with the same events.
    """

    def __init__(
        self,
        recommender: Recommender,
        past: Timeline,
        rivals: Mapping[str, Recommender] | None = None,
    ) -> None:
        self.bundle, self.rivals = recommender.bundle, dict(rivals or {})
        n_items = self.bundle.items.size
        counts = np.zeros(n_items, np.float32)
        counts[: past.n_items] = past.popularity()
        self._static: dict[str, Any] = {
            "co_occurrence": CoOccurrence.fit(past.user, past.item, n_items, popularity=counts)
        }
        text = dict(self.bundle.model.items.named_buffers()).get("text")
        if text is not None:
            self._static["text"] = TextSimilarity(text.cpu().numpy(), counts)
        self._counts = Popularity(counts)

    def at(self, as_of: int | None, *, shown: bool = False) -> dict[str, Any]:
        """Name → baseline as of a time.

        Args:
            as_of: microseconds; None without a clock.
            shown: whether given items are to be scored. One of them that nobody had met before
                that time has just been shown, so that it is the newest; among all items of a
                table it may be old stock that nobody ever met.
        """
        if as_of is None:
            return {"popularity": self._counts, **self._static}
        timeline = self.bundle.timeline
        total, recent = timeline.popularity(as_of), timeline.popularity(as_of, DAY)
        unmet = as_of if shown else np.iinfo(np.int64).min
        born = np.where(timeline.first_seen < as_of, timeline.first_seen, unmet)
        return {
            "popularity": Popularity(total),
            # Equal in the window: by all-time count, so that a quiet window is not arbitrary.
            "recent_popularity": Popularity(recent + total / (total.max() + 1)),
            "newest": Popularity(newest_first(born)),
            **self._static,
        }


@dataclass(frozen=True)
class Ranking:
    """What every contestant answers.

    Args:
        ranked: name → (Q, K) item rows.
        among_cold: name → (Q, K) item rows when only cold items may be answered; -1 for queries
            without a cold target.
        cold_candidates: (Q,) how many cold items there were to choose from.
        candidates: (N,) bool, the items that could be answered to any query.
    """

    ranked: dict[str, np.ndarray]
    among_cold: dict[str, np.ndarray]
    cold_candidates: np.ndarray
    candidates: np.ndarray


def rank(
    extended: Recommender,
    baselines: Baselines,
    questions: Questions,
    as_of_times: np.ndarray | None,
    rules: EvaluateRules,
    cold: np.ndarray,
) -> Ranking:
    """Every contestant's first K items for every query, over all items and among cold ones.

    Args:
        extended: the recommender, its tables extended to the later items and users.
        baselines: the other contestants, rival towers among them.
        questions: who asks.
        as_of_times: (Q,) at which items stood for each query, or None without a clock.
        rules: how deep, and whether seen items are left out.
        cold: (N,) bool, items that the towers never saw chosen.
    """
    k, queries = max(rules.ks), questions.queries
    towers = {MODEL: extended, **baselines.rivals}
    names = [*towers, *baselines.at(extended.bundle.cutoff)]
    ranked, among = (
        {name: np.full((len(queries), k), -1, np.int64) for name in names} for _ in range(2)
    )
    # Only queries with a cold target are asked again among the cold items.
    cold_query = np.zeros(len(queries), bool)
    cold_query[questions.targets.row_of()[cold[questions.targets.values]]] = True
    cold_candidates = np.zeros(len(queries), np.int64)
    candidates = np.zeros(extended.bundle.items.size, bool)
    for as_of, rows in by_as_of(as_of_times, len(queries)):
        at = {name: one.as_of(as_of) for name, one in towers.items()}
        allowed = at[MODEL].allowed
        candidates |= allowed
        everybody, chilled = queries.take(rows), rows[cold_query[rows]]
        tasks = [(ranked, rows, everybody, allowed)]
        if len(chilled):
            tasks.append((among, chilled, queries.take(chilled), allowed & cold))
            cold_candidates[chilled] = np.count_nonzero(allowed & cold)
        others = baselines.at(as_of)
        for store, to, part, these in tasks:
            seen = at[MODEL].seen(part) if rules.drop_seen else None
            for name, one in at.items():
                own = part if name == MODEL else _by_itself(one, part)
                # The towers answer for everybody: what they are worth is judged here, and how
                # good the most popular items are has a row of its own.
                answers = one.recommend_rows(
                    own, k, exact=True, drop_seen=rules.drop_seen, allowed=these, fallback=False
                )[0]
                store[name][to, : answers.shape[1]] = answers
            for name, baseline in others.items():
                store[name][to] = baseline.search(part.history, k, allowed=these, exclude=seen)[0]
    return Ranking(ranked, among, cold_candidates, candidates)


def _by_itself(rival: Recommender, queries: Queries) -> Queries:
    """The same users and times, with what the rival's own towers read of them."""
    return rival.queries(queries.users, queries.times, queries.context)


def score_shown(
    extended: Recommender,
    baselines: Baselines,
    users: np.ndarray,
    times: np.ndarray,
    context: np.ndarray | None,
    as_of_times: np.ndarray | None,
    items: Ragged,
) -> dict[str, np.ndarray]:
    """Every contestant's scores of what was shown.

    Args:
        extended, baselines: the contestants.
        users, times, context: (Q,), (Q,), (Q, C) of each request.
        as_of_times: (Q,) at which items stood for each.
        items: Q ragged item rows shown.

    Returns:
        name → (T,) float32.
    """
    scores: dict[str, np.ndarray] = {}
    for as_of, rows in by_as_of(as_of_times, len(users)):
        at = extended.as_of(as_of)
        part = at.queries(users[rows], times[rows], None if context is None else context[rows])
        these = items.take(rows)
        flat = slots(items.offsets[rows], these.lengths)
        scored = {MODEL: at.score_rows(part, these)}
        for name, rival in baselines.rivals.items():
            then = rival.as_of(as_of)
            scored[name] = then.score_rows(_by_itself(then, part), these)
        for name, baseline in baselines.at(as_of, shown=True).items():
            scored[name] = baseline.score(part.history, these)
        for name, score in scored.items():
            scores.setdefault(name, np.zeros(len(items.values), np.float32))[flat] = score
    return scores
