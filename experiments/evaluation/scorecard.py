"""Scorecard: metrics of a bundle on later events, beside baselines, with paired intervals.

Everything is ranked in full, by the recommender that serves, with what was known at each query.
Legend: Q queries, N item rows, K the deepest rank looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from recsys.bootstrap import Estimate
from recsys.errors import ConfigError
from recsys.experiments.evaluation import slices as parts
from recsys.experiments.evaluation.comparison import Baselines, rank
from recsys.experiments.evaluation.queries import (
    RESAMPLES,
    EvaluateRules,
    questions_of,
    refresh_said,
    without_later_events,
)
from recsys.metrics import coverage, gini, mean_popularity, novelty, ranking_metrics
from recsys.ragged import Ragged
from recsys.serving.later_events import Later, extend
from recsys.serving.recommender import Recommender

__all__ = ["EvaluateRules", "judge", "verdict"]

Progress = Callable[[str], None]
SHALLOW = 20
"""Rank down to which coverage, novelty and popularity are read."""


def judge(
    recommender: Recommender,
    later: Later,
    rules: EvaluateRules,
    *,
    each_event: bool,
    protocol: dict[str, Any],
    seed: int = 0,
    rivals: Mapping[str, Recommender] | None = None,
    progress: Progress = lambda _: None,
    report: parts.Report | None = None,
) -> dict[str, Any]:
    """Judge a recommender on later events.

    Args:
        recommender: as it serves.
        later: what happened after its cut-off.
        rules: the protocol.
        each_event: a query at each positive; otherwise one a user at the cut-off.
        protocol: what else the scorecard should state (split, skips, data).
        seed: of samples and resamples.
        rivals: name → another recommender made from the same prepared data; it stands among the
            baselines, with paired differences, but the verdict does not speak of it.
        progress: told what is going on.
        report: is given the values of each query ("targets") and of each request ("impressions").

    Raises:
        ConfigError: a rival knows other items or users.

    Returns:
        The scorecard: `model`, `baselines`, `differences`, `slices`, `index`, `impressions`,
        `protocol`, `verdict`; every metric as {"value", "low", "high"}, null where nothing could
        be judged.
    """
    past = recommender.bundle.timeline
    bundle, coded = extend(recommender.bundle, later)
    if not each_event:
        bundle = without_later_events(bundle, past)
    extended = Recommender(bundle)
    questions, as_of_times = questions_of(bundle, coded, rules, each_event=each_event, seed=seed)
    queries = questions.queries
    progress(f"ranking all items for {len(queries):,} queries")
    others = {
        name: _rival(recommender, one, later, each_event) for name, one in (rivals or {}).items()
    }
    baselines = Baselines(extended, past, others)
    cold = np.ones(bundle.items.size, bool)
    cold[: recommender.bundle.manifest["warm_items"] + 1] = False
    ranking = rank(extended, baselines, questions, as_of_times, rules, cold)
    counts = np.zeros(bundle.items.size)
    counts[: past.n_items] = past.popularity()
    values = {
        name: _values(found, questions.targets, counts, rules)
        for name, found in ranking.ranked.items()
    }
    if report is not None:
        report("targets", values, queries.users)
    scorecard = parts.compared(values, queries.users, seed)
    n_candidates = int(np.count_nonzero(ranking.candidates))
    for name, found in ranking.ranked.items():
        card = scorecard["baselines"].get(name, scorecard["model"])
        card |= _spread(found, n_candidates, rules)
    depth = bundle.timeline.past(queries.users, queries.times)
    scorecard["slices"] = parts.slices(ranking, questions, depth, counts, cold, rules, seed)
    scorecard["index"] = parts.index_recall(recommender, questions, rules, seed)
    if len(coded.shown):
        progress("scoring what was shown")
    scorecard["impressions"] = parts.impressions(
        extended, baselines, coded, cold, rules, each_event=each_event, seed=seed, report=report
    )
    times = None if as_of_times is None else queries.times
    refresh = refresh_said(times, rules, each_event=each_event)
    scorecard["protocol"] = protocol | {
        "queries": "each event" if each_event else "one cut-off",
        "queries_judged": len(queries),
        "users_judged": len(np.unique(queries.users)),
        "targets": len(questions.targets.values),
        "repeats_left_out": questions.repeats,
        "cold_targets": int(cold[questions.targets.values].sum()),
        "candidates": n_candidates,
        "history": "everything strictly before the query",
        "items": "those that exist and are available at the query",
        "unknown_targets": "count as misses",
        "baselines": "rank the same items for the same queries with the same past",
        "refresh": refresh,
        "item_statistics": refresh if bundle.model.uses_statistics else "none",
        "search": "exact",
        "intervals": f"95 %, bootstrap over users, {RESAMPLES} resamples",
    }
    scorecard["verdict"] = verdict(scorecard, rules.primary, without=others)
    return scorecard


def _rival(
    recommender: Recommender, rival: Recommender, later: Later, each_event: bool
) -> Recommender:
    ours, theirs = recommender.bundle, rival.bundle
    for what, a, b in (("items", ours.items, theirs.items), ("users", ours.users, theirs.users)):
        if a.digest != b.digest:
            raise ConfigError(
                f"The two bundles know different {what} ({len(a.ids)} and {len(b.ids)}, digests "
                f"{a.digest[:12]} and {b.digest[:12]}). Only runs on the same prepared data can be "
                "paired query by query."
            )
    bundle = extend(theirs, later)[0]
    return Recommender(bundle if each_event else without_later_events(bundle, theirs.timeline))


def _values(
    ranked: np.ndarray, targets: Ragged, counts: np.ndarray, rules: EvaluateRules
) -> dict[str, np.ndarray]:
    """Metric → one value a query."""
    top = ranked[:, : min(SHALLOW, max(rules.ks))]
    return ranking_metrics(ranked, targets, rules.ks) | {
        f"novelty_at_{top.shape[1]}": novelty(top, counts),
        f"popularity_at_{top.shape[1]}": mean_popularity(top, counts),
    }


def _spread(ranked: np.ndarray, n_items: int, rules: EvaluateRules) -> dict[str, Any]:
    """How the answers spread over the items that could be answered."""
    top = ranked[:, : min(SHALLOW, max(rules.ks))]
    return parts.as_json(
        {
            f"coverage_at_{top.shape[1]}": Estimate(coverage(top, n_items)),
            f"gini_at_{top.shape[1]}": Estimate(gini(top, n_items)),
        }
    )


def verdict(scorecard: dict[str, Any], primary: str, without: Collection[str] = ()) -> str:
    """One plain sentence: do the towers beat every baseline on the primary metric?

    A baseline is beaten, or wins, when the 95 % interval of the paired difference says so.
    """
    ours = scorecard["model"][primary]["value"]
    if ours is None:
        repeats = scorecard.get("protocol", {}).get("repeats_left_out", 0)
        why = "there is no later positive"
        if repeats:
            why = f"all {repeats} later positives repeat what their users had (evaluate.drop_seen)"
        return f"Nothing was judged: {why}."
    names = [name for name in scorecard["baselines"] if name not in without]
    if not names:
        return f"The towers have {primary} {ours:.4f}; no baseline was asked for."
    theirs = {name: scorecard["baselines"][name][primary]["value"] for name in names}
    gaps = {name: scorecard["differences"][name][primary] for name in names}
    order = sorted(theirs, key=lambda name: -theirs[name])
    won = [name for name in order if (gaps[name]["high"] or 0) < 0]
    open_ = [name for name in order if not (gaps[name]["low"] or 0) > 0]
    best = (won or open_ or order)[0]
    gap = gaps[best]
    interval = (
        "too few users for an interval"
        if gap["low"] is None
        else f"95 % interval of the difference {gap['low']:+.4f} to {gap['high']:+.4f}"
    )
    numbers = f"{primary} {ours:.4f} against {theirs[best]:.4f} ({interval})"
    if won:
        return f"The baseline {best} wins: {numbers}. Use it, or look at the slices for why."
    if open_:
        return f"The towers and the baseline {best} cannot be told apart: {numbers}."
    return f"The towers beat every baseline; the best is {best}: {numbers}."
