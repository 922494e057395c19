"""Scorecard: metrics of a bundle on later events, beside baselines, with paired intervals.

Everything is ranked in full, by the recommender that serves, with what was known at each query.
Every metric is {"value", "low", "high"}. Legend: Q queries, N item rows, R requests, K the deepest
rank looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from recsys.bootstrap import Bootstrap, Estimate
from recsys.errors import ConfigError
from recsys.experiments.evaluation.comparison import (
    MODEL,
    Baselines,
    Ranking,
    rank,
    score_shown,
)
from recsys.experiments.evaluation.queries import (
    MOST_QUERIES,
    RESAMPLES,
    EvaluateRules,
    questions_of,
    refresh_said,
    without_later_events,
)
from recsys.features.batching.examples import Questions
from recsys.metrics import (
    coverage,
    gini,
    impression_metrics,
    mean_popularity,
    novelty,
    ranking_metrics,
    recall_at,
)
from recsys.ragged import Ragged
from recsys.serving.later_events import CodedLater, Later, extend
from recsys.serving.recommender import Recommender
from recsys.split import duration
from recsys.towers.data import as_of_times_of

Progress = Callable[[str], None]

Values = Mapping[str, Mapping[str, np.ndarray]]
"""Contestant → metric → one value a query."""

Report = Callable[[str, Values, np.ndarray], object]
"""Is given a part of the scorecard, the values behind it, and the user of each query."""

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
    report: Report | None = None,
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
        name: _values(ranked, questions.targets, counts, rules)
        for name, ranked in ranking.ranked.items()
    }
    if report is not None:
        report("targets", values, queries.users)
    scorecard = compared(values, queries.users, seed)
    n_candidates = int(np.count_nonzero(ranking.candidates))
    for name, ranked in ranking.ranked.items():
        card = scorecard["baselines"].get(name, scorecard["model"])
        card |= _spread(ranked, n_candidates, rules)
    depth = bundle.timeline.past(queries.users, queries.times)
    scorecard["slices"] = slices(ranking, questions, depth, counts, cold, rules, seed)
    scorecard["index"] = index_recall(recommender, questions, rules, seed)
    if len(coded.shown):
        progress("scoring what was shown")
    scorecard["impressions"] = impressions(
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
    return as_json(
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


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Every estimate as {"value", "low", "high"}."""
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def compared(values: Values, users: np.ndarray, seed: int) -> dict[str, Any]:
    """`model`, `baselines`, and the paired `differences` of the model from each.

    Args:
        values: of the model and of every baseline.
        users: (Q,) the user of each query, who is resampled with all queries.
        seed: of the resamples.
    """
    bootstrap = Bootstrap(users, samples=RESAMPLES, seed=seed)
    others = {name: v for name, v in values.items() if name != MODEL}
    return {
        "model": as_json(bootstrap.estimates(values[MODEL])),
        "baselines": {name: as_json(bootstrap.estimates(v)) for name, v in others.items()},
        "differences": {
            name: as_json(bootstrap.differences(values[MODEL], v)) for name, v in others.items()
        },
    }


def slices(
    ranking: Ranking,
    questions: Questions,
    depth: np.ndarray,
    train_counts: np.ndarray,
    cold: np.ndarray,
    rules: EvaluateRules,
    seed: int,
) -> dict[str, Any]:
    """Recall on parts: targets that are warm, cold or in the tail; users new, light or heavy.

    Args:
        ranking: what every contestant answers.
        questions: targets and users.
        depth: (Q,) how many positives each user had before.
        train_counts: (N,) positives of each item before the cut-off.
        cold: (N,) bool, items that the towers never saw chosen.
        rules: depths.
        seed: of the resamples.
    """
    warm = ~cold
    warm[0] = False
    typical = np.median(train_counts[warm]) if warm.any() else 0
    targets = questions.targets
    parts = {
        name: targets.where(mask[targets.values])
        for name, mask in {
            "warm_items": warm,
            "cold_items": cold,
            "tail_items": warm & (train_counts <= typical),
        }.items()
    }
    parts |= {
        name: targets.where(mask[targets.row_of()])
        for name, mask in {
            "new_users": depth == 0,
            "light_users": (depth > 0) & (depth < 10),
            "heavy_users": depth >= 10,
        }.items()
    }
    parts["cold_items_among_cold"] = parts["cold_items"]
    out = {}
    for name, chosen in parts.items():
        judged = np.flatnonzero(chosen.lengths > 0)
        if not len(judged):
            continue
        among = name == "cold_items_among_cold"
        values = {
            contestant: {
                f"recall_at_{k}": recall_at(ranked[judged], chosen.take(judged), k)
                for k in rules.ks
            }
            for contestant, ranked in (ranking.among_cold if among else ranking.ranked).items()
        }
        users = questions.queries.users[judged]
        out[name] = {"queries": len(judged), **compared(values, users, seed)}
        if among:
            there = np.maximum(ranking.cold_candidates[judged], 1)
            out[name]["candidates"] = round(float(there.mean()))
            out[name]["chance"] = {
                f"recall_at_{k}": float(np.minimum(1.0, k / there).mean()) for k in rules.ks
            }
    return out


def index_recall(
    recommender: Recommender, questions: Questions, rules: EvaluateRules, seed: int
) -> dict[str, Any]:
    """Recall of the index against exact search for real queries, apart from the model's own."""
    bundle = recommender.bundle
    manifest = bundle.manifest["index"]
    users = questions.queries.users
    known = np.unique(users[(users > 0) & (users < bundle.users.size)])
    rng = np.random.default_rng([seed, 17])
    users = np.sort(rng.choice(known, min(1000, len(known)), replace=False))
    k = max(1, min(max(rules.ks), len(bundle.rows)))
    hits = np.empty(0)
    if len(users):
        queries = recommender.queries(users)
        exact, approximate = (
            recommender.recommend_rows(
                queries, k, exact=exactly, drop_seen=rules.drop_seen, fallback=False
            )[0]
            for exactly in (True, False)
        )
        wanted = Ragged(np.arange(len(users) + 1) * k, exact.ravel())
        hits = recall_at(approximate, wanted.where(wanted.values > 0), k)
    estimate = Bootstrap(users, samples=RESAMPLES, seed=seed).estimate(hits)
    return {
        "kind": manifest["kind"],
        "queries": len(users),
        f"recall_at_{k}": estimate.to_json(),
        f"item_recall_at_{manifest['recall_k']}": Estimate(manifest["recall"]).to_json(),
    }


def impressions(
    extended: Recommender,
    baselines: Baselines,
    coded: CodedLater,
    cold: np.ndarray,
    rules: EvaluateRules,
    *,
    each_event: bool,
    seed: int,
    report: Report | None = None,
) -> dict[str, Any] | None:
    """How well what was shown is ordered: AUC, MRR, NDCG a request, warm and cold clicks apart.

    Args:
        extended, baselines: the contestants.
        coded: the requests.
        cold: (N,) bool, items that the towers never saw chosen.
        rules: the protocol.
        each_event: each request is asked at its own time; otherwise all at the cut-off.
        seed: of samples and resamples.
        report: is given the values of each request.

    Returns:
        None where no request has something clicked and something not.
    """
    clicks = Ragged(coded.shown.offsets, coded.clicked.astype(np.int64))
    clicked_of = np.bincount(clicks.row_of(), clicks.values, len(clicks))
    mixed = np.flatnonzero((clicked_of > 0) & (clicked_of < clicks.lengths))
    if not len(mixed):
        return None
    if len(mixed) > MOST_QUERIES:
        rng = np.random.default_rng([seed, 19])
        mixed = np.sort(rng.choice(mixed, MOST_QUERIES, replace=False))
    items, clicked = coded.shown.take(mixed), clicks.take(mixed).values > 0
    users, times = coded.request_user[mixed], coded.request_time[mixed]
    context = coded.request_context[mixed] if coded.request_context.shape[1] else None
    if not each_event:
        times = np.full(len(mixed), extended.bundle.cutoff)
    timed = extended.bundle.timeline.timed
    as_of_times = (
        as_of_times_of(times, duration(rules.refresh), cutoff=extended.bundle.cutoff)
        if timed
        else None
    )
    if timed and not each_event:
        as_of_times = times
    scores = score_shown(extended, baselines, users, times, context, as_of_times, items)
    lowest = np.float32(np.finfo(np.float32).min)
    values = {
        name: impression_metrics(np.maximum(score, lowest), clicked, items.offsets)
        for name, score in scores.items()
    }
    if report is not None:
        report("impressions", values, users)
    query = items.row_of()
    clicked_cold = np.bincount(query[clicked], cold[items.values[clicked]], len(mixed))
    clicked_all = np.bincount(query[clicked], minlength=len(mixed))
    parts = {"warm": clicked_cold == 0, "cold": clicked_cold == clicked_all}
    return {
        "requests": len(mixed),
        # Other times than those of the targets may need another one.
        "refresh": refresh_said(times if timed else None, rules, each_event=each_event),
        **compared(values, users, seed),
        "slices": {
            name: {
                "requests": int(mask.sum()),
                **compared(
                    {n: {m: v[mask] for m, v in of.items()} for n, of in values.items()},
                    users[mask], seed,
                ),
            }
            for name, mask in parts.items()
            if mask.any()
        },
    }  # fmt: skip
