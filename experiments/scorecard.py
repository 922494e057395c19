"""The scorecard: how good a bundle is on later events, beside what is free.

Everything is ranked in full, by the recommender that serves, with what was known at each query.
Legend: Q queries, N item rows, R requests, K the deepest rank looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from features.examples import Questions, ask
from features.timeline import Timeline
from recsys.baselines import CoOccurrence, Popularity, TextSimilarity, newest_first
from recsys.intervals import Bootstrap, Estimate
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
from recsys.split import duration
from recsys.tables import SECOND, Strict
from serving.later import CodedLater, Later, extend
from serving.recommender import Recommender
from towers.build import moments_of

Progress = Callable[[str], None]


class EvaluateRules(Strict):
    """[evaluate]: the protocol of the scorecard, and of validation while training."""

    queries: Literal["auto", "each_event", "cutoff"] = "auto"
    """each_event: a query at the time of each positive; cutoff: one a user, at the split.
    auto: cutoff for given files without a clock, each_event otherwise."""
    ks: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Ranks at which metrics are read."""
    primary: str = "recall_at_20"
    """The metric that the verdict speaks of."""
    drop_seen: bool = True
    """Seen items are never answered, and are no targets; false where people come back for them."""
    refresh: str = "1h"
    """How often item statistics and new items reach the answers, as a service would refresh them."""
    recent: str = "1d"
    """Window of the recent-popularity baseline."""
    most_queries: int = Field(100_000, ge=1)
    """A seeded sample is judged when there are more."""
    resamples: int = Field(1000, ge=100)
    """Of the bootstrap over users that gives the 95 % intervals."""
    baselines: tuple[str, ...] = (
        "popularity", "recent_popularity", "newest", "co_occurrence", "text",
    )  # fmt: skip

    @field_validator("ks")
    @classmethod
    def _sorted(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1:
            raise ValueError("name at least one k, each 1 or more")
        return tuple(sorted(set(ks)))

    @field_validator("refresh", "recent")
    @classmethod
    def _duration(cls, value: str) -> str:
        duration(value)
        return value


@dataclass(frozen=True)
class Contestant:
    """Ranked rows of each query and scores of each shown item, of one model or baseline."""

    ranked: np.ndarray
    among_cold: np.ndarray
    shown_scores: np.ndarray


class Baselines:
    """What the towers must beat, each with what it may know at a moment.

    Args:
        recommender: extended with the later events.
        past: events before the cut-off, which co-occurrence is fitted on.
        rules: which baselines, and the window of the recent one.
        train_popularity: (N,) positives of each item before the cut-off.
    """

    def __init__(self, recommender: Recommender, past: Timeline, rules: EvaluateRules) -> None:
        self.bundle, self.rules = recommender.bundle, rules
        n_items = self.bundle.items.size
        counts = np.zeros(n_items, np.float32)
        counts[: past.n_items] = past.popularity()
        self._static: dict[str, Any] = {}
        if "co_occurrence" in rules.baselines:
            self._static["co_occurrence"] = CoOccurrence.fit(
                past.user, past.item, n_items, popularity=counts
            )
        text = self.bundle.model.items.text
        if "text" in rules.baselines and text is not None:
            self._static["text"] = TextSimilarity(text.cpu().numpy(), counts)
        self._counts = Popularity(counts)

    def at(self, moment: int | None) -> dict[str, Any]:
        """Name → baseline as of the moment."""
        timeline, rules = self.bundle.timeline, self.rules
        found: dict[str, Any] = {}
        if "popularity" in rules.baselines:
            found["popularity"] = (
                self._counts if moment is None else Popularity(timeline.popularity(moment))
            )
        if moment is not None:
            if "recent_popularity" in rules.baselines:
                recent = timeline.popularity(moment, duration(rules.recent))
                # Equal in the window: by all-time count, so that a quiet window is not arbitrary.
                total = timeline.popularity(moment)
                found["recent_popularity"] = Popularity(recent + total / (total.max() + 1))
            if "newest" in rules.baselines:
                born = np.where(
                    timeline.first_seen <= moment, timeline.first_seen, np.iinfo(np.int64).min
                )
                found["newest"] = Popularity(newest_first(born))
        return {**found, **self._static}


def judge(
    recommender: Recommender,
    later: Later,
    rules: EvaluateRules,
    *,
    each_event: bool,
    protocol: dict[str, Any],
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Judge a recommender on later events.

    Args:
        recommender: as it serves.
        later: what happened after its cut-off.
        rules: the protocol.
        each_event: a query at each positive; otherwise one a user at the cut-off.
        protocol: what else the scorecard should state (split, skips, data).
        seed: of samples and resamples.
        progress: told what is going on.

    Returns:
        The scorecard: `model`, `baselines`, `differences`, `slices`, `index`, `impressions`,
        `protocol`, `verdict`; every metric as {"value", "low", "high"}.
    """
    past = recommender.bundle.timeline
    bundle, coded = extend(recommender.bundle, later)
    extended = Recommender(bundle)
    asked = _questions(extended, past, coded, rules, each_event, seed)
    questions, moments = asked
    progress(f"ranking all items for {len(questions.queries):,} queries")
    baselines = Baselines(extended, past, rules)
    cold = np.ones(bundle.items.size, bool)
    cold[1 : recommender.bundle.manifest["warm_items"] + 1] = False
    cold[0] = False
    contestants = _rank(extended, baselines, questions, moments, rules, cold)
    users = questions.queries.users
    bootstrap = Bootstrap(users, samples=rules.resamples, seed=seed)
    values = {
        name: _values(found.ranked, questions, bundle.timeline, past, rules)
        for name, found in contestants.items()
    }
    n_candidates = int((extended.bundle.timeline.exists_from[1:] < np.iinfo(np.int64).max).sum())
    scorecard: dict[str, Any] = {
        "model": _json(bootstrap.estimates(values["model"]))
        | _catalogue(contestants["model"].ranked, n_candidates, rules),
        "baselines": {
            name: _json(bootstrap.estimates(value))
            | _catalogue(contestants[name].ranked, n_candidates, rules)
            for name, value in values.items()
            if name != "model"
        },
        "differences": {
            name: _json(bootstrap.differences(values["model"], value))
            for name, value in values.items()
            if name != "model"
        },
        "slices": _slices(contestants, questions, past, cold, rules, seed),
        "index": _index(recommender, questions, rules, seed),
        "impressions": _impressions(
            extended, baselines, coded, cold, rules, each_event, seed, progress
        ),
        "protocol": protocol
        | {
            "queries": "each event" if each_event else "one cut-off",
            "queries_judged": len(questions.queries),
            "users_judged": len(np.unique(users)),
            "targets": len(questions.targets.values),
            "repeats_left_out": questions.repeats,
            "cold_targets": int(cold[questions.targets.values].sum()),
            "candidates": n_candidates,
            "history": "everything strictly before the query",
            "items": "those that exist and are available at the query",
            "unknown_targets": "count as misses",
            "baselines": "rank the same items for the same queries with the same past",
            "item_statistics": rules.refresh if bundle.model.uses_statistics else "none",
            "search": "exact",
            "intervals": f"95 %, bootstrap over users, {rules.resamples} resamples",
        },
    }
    scorecard["verdict"] = verdict(scorecard, rules.primary)
    return scorecard


def _questions(
    extended: Recommender,
    past: Timeline,
    coded: CodedLater,
    rules: EvaluateRules,
    each_event: bool,
    seed: int,
) -> tuple[Questions, np.ndarray | None]:
    bundle = extended.bundle
    known = bundle.timeline
    if not each_event:
        # At one cut-off nothing of the later log is known: no events, only longer tables.
        known = Timeline(
            np.append(past.user_offsets, np.full(bundle.users.size - past.n_users, len(past.item))),
            past.item, past.time, known.first_seen, known.exists_from, past.shown, past.timed,
        )  # fmt: skip
    questions = ask(
        known,
        coded.user,
        coded.item,
        coded.time,
        each_event=each_event,
        cutoff=bundle.cutoff,
        max_history=bundle.model.rules.max_history,
        drop_seen=rules.drop_seen,
        context=coded.context if coded.context.shape[1] else None,
    )
    if len(questions.queries) > rules.most_queries:
        rng = np.random.default_rng([seed, 13])
        some = np.sort(rng.choice(len(questions.queries), rules.most_queries, replace=False))
        questions = Questions(
            questions.queries.take(some), questions.targets.take(some), questions.repeats,
            questions.event[some],
        )  # fmt: skip
    times = questions.queries.times
    if not bundle.timeline.timed:
        return questions, None
    if not each_event:
        return questions, np.full(len(questions.queries), bundle.cutoff)
    return questions, moments_of(times, duration(rules.refresh))


def _groups(moments: np.ndarray | None, size: int) -> Iterator[tuple[int | None, np.ndarray]]:
    if moments is None:
        yield None, np.arange(size)
        return
    order = np.argsort(moments, kind="stable")
    distinct, start = np.unique(moments[order], return_index=True)
    for moment, rows in zip(distinct, np.split(order, start[1:]), strict=True):
        yield int(moment), rows


def _rank(
    extended: Recommender,
    baselines: Baselines,
    questions: Questions,
    moments: np.ndarray | None,
    rules: EvaluateRules,
    cold: np.ndarray,
) -> dict[str, Contestant]:
    """Every contestant's first K items for every query, over all items and among cold ones."""
    k, queries = max(rules.ks), questions.queries
    ranked: dict[str, np.ndarray] = {}
    among: dict[str, np.ndarray] = {}
    # Only queries with a cold target are asked again among the cold items.
    cold_query = np.zeros(len(queries), bool)
    cold_query[questions.targets.row_of()[cold[questions.targets.values]]] = True
    for moment, rows in _groups(moments, len(queries)):
        at = extended.as_of(moment)
        part = queries.take(rows)
        seen = at.seen(part) if rules.drop_seen else None
        alive = at.allowed
        chilled = np.flatnonzero(cold_query[rows])
        cold_part = part.take(chilled)
        cold_seen = None if seen is None else seen.take(chilled)

        def place(
            name: str, found: np.ndarray, store: dict[str, np.ndarray], to: np.ndarray
        ) -> None:
            if name not in store:
                store[name] = np.full((len(queries), k), -1, np.int64)
            store[name][to] = found

        options = {"exact": True, "drop_seen": rules.drop_seen}
        place("model", at.recommend_rows(part, k, **options)[0], ranked, rows)
        if len(chilled):
            found = at.recommend_rows(cold_part, k, allowed=cold, **options)[0]
            place("model", found, among, rows[chilled])
        for name, baseline in baselines.at(moment).items():
            place(
                name, baseline.search(part.history, k, allowed=alive, exclude=seen)[0], ranked, rows
            )
            if len(chilled):
                found = baseline.search(
                    cold_part.history, k, allowed=alive & cold, exclude=cold_seen
                )[0]
                place(name, found, among, rows[chilled])
    nothing = np.empty(0, np.float32)
    empty = np.full((len(queries), k), -1, np.int64)
    return {
        name: Contestant(found, among.get(name, empty), nothing) for name, found in ranked.items()
    }


def _values(
    ranked: np.ndarray,
    questions: Questions,
    timeline: Timeline,
    past: Timeline,
    rules: EvaluateRules,
) -> dict[str, np.ndarray]:
    counts = np.zeros(timeline.n_items)
    counts[: past.n_items] = past.popularity()
    deepest = max(rules.ks)
    values = ranking_metrics(ranked, questions.targets, rules.ks)
    top = ranked[:, : min(20, deepest)]
    values[f"novelty_at_{top.shape[1]}"] = novelty(top, counts)
    values[f"popularity_at_{top.shape[1]}"] = mean_popularity(top, counts)
    return values


def _catalogue(ranked: np.ndarray, n_items: int, rules: EvaluateRules) -> dict[str, Any]:
    k = min(20, max(rules.ks))
    top = ranked[:, :k]
    return _json(
        {
            f"coverage_at_{k}": Estimate(coverage(top, n_items)),
            f"gini_at_{k}": Estimate(gini(top, n_items)),
        }
    )


def _json(estimates: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def _slices(
    contestants: dict[str, Contestant],
    questions: Questions,
    past: Timeline,
    cold: np.ndarray,
    rules: EvaluateRules,
    seed: int,
) -> dict[str, Any]:
    """Recall on parts: targets that are warm, cold or in the tail; users new, light or heavy."""
    counts = np.zeros(len(cold))
    counts[: past.n_items] = past.popularity()
    warm = ~cold
    warm[0] = False
    typical = np.median(counts[warm]) if warm.any() else 0
    of_target = {
        "warm_items": warm,
        "cold_items": cold,
        "tail_items": warm & (counts <= typical),
    }
    depth = questions.queries.history.lengths
    of_query = {
        "new_users": depth == 0,
        "light_users": (depth > 0) & (depth < 10),
        "heavy_users": depth >= 10,
    }
    parts = {
        name: (questions.targets.where(mask[questions.targets.values]), False)
        for name, mask in of_target.items()
    }
    everything = questions.targets
    parts |= {
        name: (everything.where(mask[everything.row_of()]), False)
        for name, mask in of_query.items()
    }
    parts["cold_items_among_cold"] = (parts["cold_items"][0], True)
    out = {}
    for name, (targets, among) in parts.items():
        judged = np.flatnonzero(targets.lengths > 0)
        if not len(judged):
            continue
        bootstrap = Bootstrap(questions.queries.users[judged], samples=rules.resamples, seed=seed)
        values = {}
        for contestant, found in contestants.items():
            ranked = (found.among_cold if among else found.ranked)[judged]
            values[contestant] = {
                f"recall_at_{k}": recall_at(ranked, targets.take(judged), k) for k in rules.ks
            }
        out[name] = {
            "queries": len(judged),
            "model": _json(bootstrap.estimates(values["model"])),
            "baselines": {
                n: _json(bootstrap.estimates(v)) for n, v in values.items() if n != "model"
            },
            "differences": {
                n: _json(bootstrap.differences(values["model"], v))
                for n, v in values.items()
                if n != "model"
            },
        }
        if among:
            out[name]["candidates"] = int(cold.sum())
            out[name]["chance"] = {f"recall_at_{k}": min(1.0, k / cold.sum()) for k in rules.ks}
    return out


def _index(
    recommender: Recommender, questions: Questions, rules: EvaluateRules, seed: int
) -> dict[str, Any]:
    """Recall of the index against exact search for real queries, apart from the model's own."""
    bundle = recommender.bundle
    manifest = bundle.manifest["index"]
    known = np.flatnonzero(questions.queries.users < bundle.users.size)
    rng = np.random.default_rng([seed, 17])
    some = np.sort(rng.choice(known, min(1000, len(known)), replace=False))
    users = np.unique(questions.queries.users[some])
    k = min(max(rules.ks), len(bundle.rows))
    queries = recommender.queries(users)
    exact = recommender.recommend_rows(queries, k, exact=True)[0]
    found = recommender.recommend_rows(queries, k)[0]
    hits = recall_at(found, Ragged.from_lists([row[row > 0] for row in exact]), k)
    estimate = Bootstrap(np.arange(len(users)), samples=rules.resamples, seed=seed).estimate(hits)
    return {
        "kind": manifest["kind"],
        "queries": len(users),
        f"recall_at_{k}": estimate.to_json(),
        "recall_of_items": {
            "value": manifest["recall"], "low": None, "high": None, "k": manifest["recall_k"],
        },
    }  # fmt: skip


def _impressions(
    extended: Recommender,
    baselines: Baselines,
    coded: CodedLater,
    cold: np.ndarray,
    rules: EvaluateRules,
    each_event: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Any] | None:
    """How well what was shown is ordered: AUC, MRR, NDCG a request, warm and cold clicks apart."""
    shown = coded.shown
    clicks = Ragged(shown.offsets, coded.clicked.astype(np.int64))
    sums = np.add.reduceat(np.append(clicks.values, 0), clicks.offsets[:-1]) * (clicks.lengths > 0)
    mixed = np.flatnonzero((sums > 0) & (sums < clicks.lengths))
    if not len(mixed):
        return None
    if len(mixed) > rules.most_queries:
        rng = np.random.default_rng([seed, 19])
        mixed = np.sort(rng.choice(mixed, rules.most_queries, replace=False))
    progress(f"scoring what was shown in {len(mixed):,} requests")
    items, clicked = shown.take(mixed), clicks.take(mixed).values > 0
    users, times = coded.request_user[mixed], coded.request_time[mixed]
    context = coded.request_context[mixed] if coded.request_context.shape[1] else None
    timed = extended.bundle.timeline.timed
    moments = moments_of(times, duration(rules.refresh)) if timed else None
    scores: dict[str, np.ndarray] = {}
    for moment, rows in _groups(moments, len(mixed)):
        at = extended.as_of(moment)
        part = at.queries(users[rows], times[rows], None if context is None else context[rows])
        these = items.take(rows)
        to = np.concatenate([[0], np.cumsum(these.lengths)])
        flat = np.arange(to[-1]) + np.repeat(items.offsets[rows] - to[:-1], these.lengths)
        found = {"model": at.score_rows(part, these)}
        for name, baseline in baselines.at(moment).items():
            found[name] = baseline.score(part.history, these)
        for name, score in found.items():
            scores.setdefault(name, np.zeros(len(items.values), np.float32))[flat] = score
    lowest = np.float32(np.finfo(np.float32).min)
    values = {
        name: impression_metrics(np.maximum(score, lowest), clicked, items.offsets)
        for name, score in scores.items()
    }
    query = items.row_of()
    clicked_cold = np.bincount(query[clicked], cold[items.values[clicked]], len(mixed))
    clicked_all = np.bincount(query[clicked], minlength=len(mixed))
    parts = {
        "warm": clicked_cold == 0,
        "cold": clicked_cold == clicked_all,
    }
    out = {"requests": len(mixed), **_paired(values, users, np.arange(len(mixed)), rules, seed)}
    out["slices"] = {
        name: {
            "requests": int(mask.sum()),
            **_paired(values, users, np.flatnonzero(mask), rules, seed),
        }
        for name, mask in parts.items()
        if mask.any()
    }
    return out


def _paired(
    values: dict[str, dict[str, np.ndarray]],
    users: np.ndarray,
    rows: np.ndarray,
    rules: EvaluateRules,
    seed: int,
) -> dict[str, Any]:
    bootstrap = Bootstrap(users[rows], samples=rules.resamples, seed=seed)
    kept = {n: {m: v[rows] for m, v in metrics.items()} for n, metrics in values.items()}
    others = {n: v for n, v in kept.items() if n != "model"}
    return {
        "model": _json(bootstrap.estimates(kept["model"])),
        "baselines": {n: _json(bootstrap.estimates(v)) for n, v in others.items()},
        "differences": {
            n: _json(bootstrap.differences(kept["model"], v)) for n, v in others.items()
        },
    }


def verdict(scorecard: dict[str, Any], primary: str) -> str:
    """One plain sentence: do the towers beat every baseline on the primary metric?"""
    ours = scorecard["model"][primary]["value"]
    if not scorecard["baselines"]:
        return f"The towers have {primary} {ours:.4f}; no baseline was asked for."
    best = max(
        scorecard["baselines"], key=lambda n: scorecard["baselines"][n][primary]["value"] or 0
    )
    theirs = scorecard["baselines"][best][primary]["value"]
    gap = scorecard["differences"][best][primary]
    interval = (
        "too few users for an interval"
        if gap["low"] is None
        else f"95 % interval of the difference {gap['low']:+.4f} to {gap['high']:+.4f}"
    )
    numbers = f"{primary} {ours:.4f} against {theirs:.4f} ({interval})"
    if gap["low"] is not None and gap["low"] > 0:
        return f"The towers beat every baseline; the best is {best}: {numbers}."
    if gap["high"] is not None and gap["high"] < 0:
        return f"The baseline {best} wins: {numbers}. Use it, or look at the slices for why."
    return f"The towers and the baseline {best} cannot be told apart: {numbers}."
