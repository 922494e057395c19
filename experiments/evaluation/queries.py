"""Evaluation protocol: queries, targets and the times as of which they stand.

Legend: Q queries, N item rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import field_validator, model_validator

from recsys.features.batching.examples import Questions, ask
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.serving.bundle import Bundle
from recsys.serving.later_events import CodedLater
from recsys.split import duration, duration_text
from recsys.tables import Strict
from recsys.towers.data import as_of_times_of, refresh_of

RANKED = ("recall", "ndcg", "mrr", "hit_rate")
MOST_QUERIES = 100_000
"""A seeded sample is judged when there are more."""
RESAMPLES = 1000
"""Of the bootstrap over users that gives the 95 % intervals."""


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
    """How often item statistics and new items reach the answers, as a service would do it."""

    @field_validator("ks")
    @classmethod
    def _sorted(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or min(ks) < 1:
            raise ValueError("name at least one k, each 1 or more")
        return tuple(sorted(set(ks)))

    @field_validator("refresh")
    @classmethod
    def _duration(cls, value: str) -> str:
        if duration(value) < 1:
            raise ValueError(f"{value!r} is no time at all; write for example '1h'")
        return value

    @model_validator(mode="after")
    def _primary_is_measured(self) -> EvaluateRules:
        stem, _, k = self.primary.rpartition("_at_")
        if stem not in RANKED or k not in map(str, self.ks):
            raise ValueError(
                f"primary = {self.primary!r} is not measured; write "
                f"{', '.join(f'{name}_at_K' for name in RANKED)} with K one of ks = {self.ks}"
            )
        return self

    def each_event(self, *, timed: bool, split: str) -> bool:
        """Whether a query stands at each positive's own time.

        Args:
            timed: whether the log has a clock.
            split: how the data was split.
        """
        if self.queries != "auto":
            return self.queries == "each_event"
        return timed or split not in ("given", "last_share")


def without_later_events(extended: Bundle, past: Timeline) -> Bundle:
    """The extended bundle with longer tables, and nothing of what happened after its cut-off.

    Args:
        extended: as `recsys.serving.later_events.extend` made it.
        past: the timeline before it was extended.
    """
    births = extended.timeline
    shown = past.shown
    if shown is not None:
        more = np.full(births.n_items - past.n_items, len(shown.values))
        shown = Ragged(np.append(shown.offsets, more), shown.values)
    users = np.full(births.n_users - past.n_users, len(past.item))
    timeline = replace(
        births,
        user_offsets=np.append(past.user_offsets, users),
        item=past.item,
        time=past.time,
        shown=shown,
    )
    return replace(extended, timeline=timeline)


def questions_of(
    bundle: Bundle, coded: CodedLater, rules: EvaluateRules, *, each_event: bool, seed: int
) -> tuple[Questions, np.ndarray | None]:
    """The queries, and the time as of which items stand for each.

    Args:
        bundle: extended; its timeline is all that queries may see, each strictly before its time.
        coded: the later events in its rows.
        rules: the protocol.
        each_event: a query for each user and time; otherwise one a user at the cut-off.
        seed: of the sample, when there are too many.

    Returns:
        questions; (Q,) microseconds, or None without a clock.
    """
    questions = ask(
        bundle.timeline,
        coded.user,
        coded.item,
        coded.time,
        each_event=each_event,
        cutoff=bundle.cutoff,
        max_history=bundle.model.rules.history.length,
        drop_seen=rules.drop_seen,
        context=coded.context if coded.context.shape[1] else None,
    )
    if len(questions.queries) > MOST_QUERIES:
        rng = np.random.default_rng([seed, 13])
        some = np.sort(rng.choice(len(questions.queries), MOST_QUERIES, replace=False))
        questions = Questions(
            questions.queries.take(some), questions.targets.take(some), questions.repeats,
            questions.event[some],
        )  # fmt: skip
    if not bundle.timeline.timed:
        return questions, None
    if not each_event:
        return questions, np.full(len(questions.queries), bundle.cutoff)
    return questions, as_of_times_of(
        questions.queries.times, duration(rules.refresh), cutoff=bundle.cutoff
    )


def refresh_said(times: np.ndarray | None, rules: EvaluateRules, *, each_event: bool) -> str:
    """How often items and their statistics were refreshed for queries, as a scorecard says it.

    Args:
        times: (Q,) of the queries; None without a clock.
        rules: what was asked for.
        each_event: each is asked at its own time; otherwise all at the cut-off.
    """
    if times is None:
        return "none"
    if not each_event:
        return "once, at the cut-off"
    asked = duration(rules.refresh)
    used = refresh_of(times, asked)
    if used == asked:
        return rules.refresh
    return f"{rules.refresh} asked, {duration_text(used)} used"


def by_as_of(as_of_times: np.ndarray | None, size: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """Each as-of time and the queries that share it; None and all of them without a clock."""
    if not size:
        return
    if as_of_times is None:
        yield None, np.arange(size)
        return
    order = np.argsort(as_of_times, kind="stable")
    distinct, start = np.unique(as_of_times[order], return_index=True)
    for as_of, rows in zip(distinct, np.split(order, start[1:]), strict=True):
        yield int(as_of), rows
