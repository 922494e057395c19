"""Slices of a scorecard: kinds of items and users, impression ranking, index recall.

Every metric is {"value", "low", "high"}. Legend: Q queries, N item rows, R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from recsys.bootstrap import Bootstrap, Estimate
from recsys.experiments.evaluation.comparison import MODEL, Baselines, Ranking, score_shown
from recsys.experiments.evaluation.queries import (
    MOST_QUERIES,
    RESAMPLES,
    EvaluateRules,
    refresh_said,
)
from recsys.features.batching.examples import Questions
from recsys.metrics import impression_metrics, recall_at
from recsys.ragged import Ragged
from recsys.serving.later_events import CodedLater
from recsys.serving.recommender import Recommender
from recsys.split import duration
from recsys.towers.data import as_of_times_of

Values = Mapping[str, Mapping[str, np.ndarray]]
"""Contestant → metric → one value a query."""

Report = Callable[[str, Values, np.ndarray], object]
"""Is given a part of the scorecard, the values behind it, and the user of each query."""


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
    others = {name: found for name, found in values.items() if name != MODEL}
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
        ranking: what everybody answered.
        questions: targets and users.
        depth: (Q,) how many positives each asker had before.
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
                f"recall_at_{k}": recall_at(found[judged], chosen.take(judged), k) for k in rules.ks
            }
            for contestant, found in (ranking.among_cold if among else ranking.ranked).items()
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
    asked = questions.queries.users
    known = np.unique(asked[(asked > 0) & (asked < bundle.users.size)])
    rng = np.random.default_rng([seed, 17])
    users = np.sort(rng.choice(known, min(1000, len(known)), replace=False))
    k = max(1, min(max(rules.ks), len(bundle.rows)))
    hits = np.empty(0)
    if len(users):
        queries = recommender.queries(users)
        exact, found = (
            recommender.recommend_rows(
                queries, k, exact=exactly, drop_seen=rules.drop_seen, fallback=False
            )[0]
            for exactly in (True, False)
        )
        wanted = Ragged(np.arange(len(users) + 1) * k, exact.ravel())
        hits = recall_at(found, wanted.where(wanted.values > 0), k)
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
                    {n: {m: v[mask] for m, v in found.items()} for n, found in values.items()},
                    users[mask], seed,
                ),
            }
            for name, mask in parts.items()
            if mask.any()
        },
    }  # fmt: skip
