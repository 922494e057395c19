"""[training] that does not go together, or asks for what the log has not, is refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.errors import ConfigError
from recsys.features.batching.batches import TrainingEvents
from recsys.features.prepared.timeline import Timeline
from recsys.towers.data import InteractionData, sampler_of
from recsys.towers.rules import TowerRules, TrainingRules

CAUSAL = TowerRules(history={"kind": "transformer", "length": 2})


def events(*times: int, timed: bool = True, shown: bool = False) -> TrainingEvents:
    """Two users, each with one event at each of the times."""
    n = len(times)
    nothing = np.empty(0, np.int64) if shown else None
    timeline = Timeline.build(
        np.repeat([1, 2], n), np.tile(np.arange(1, n + 1, dtype=np.int32), 2), np.tile(times, 2),
        n_users=3, first_seen=np.zeros(n + 1, np.int64), timed=timed,
        shown_item=nothing, shown_time=nothing,
    )  # fmt: skip
    return TrainingEvents(timeline, None, None, None, None, np.arange(1, n + 1))


def data(of: TrainingEvents, towers: TowerRules | None = None, **rules: Any) -> InteractionData:
    return InteractionData(of, None, TrainingRules(batch_size=2, **rules), towers=towers)


# ------------------------------------------------------------------------- nothing to learn from


@pytest.mark.parametrize(
    ("plan", "towers", "times", "wanted"),
    [
        ("sequences", CAUSAL, (5, 5, 5), 'newest 3, which training.batches = "sequences" needs'),
        ("auto", CAUSAL, (5, 5, 5), 'training.batches = "sequences" needs'),
        ("sequences", CAUSAL, (1, 5, 5, 5), "two times among its newest 3"),
        ("random", None, (), "the training side has no positive event"),
        ("by_user", None, (), "the training side has no positive event"),
    ],
)
def test_batches_without_an_example_are_refused(
    plan: str, towers: TowerRules | None, times: tuple[int, ...], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        data(events(*times), towers, batches=plan)


@pytest.mark.parametrize(("plan", "towers"), [("sequences", CAUSAL)])
def test_two_moments_are_enough(plan: str, towers: TowerRules | None) -> None:
    assert len(data(events(4, 5, 5), towers, batches=plan).batches) == 1
    assert len(data(events(5, 5), towers, batches="random").batches) == 2


# ----------------------------------------------------------------- what does not go together


@pytest.mark.parametrize("name", ["since"])
@pytest.mark.parametrize("span", ["0s", "0d0h", "0.0000001s"])
def test_a_span_of_no_time_is_refused(name: str, span: str) -> None:
    with pytest.raises(ValidationError, match="is no time at all"):
        TrainingRules(**{name: span})
    assert getattr(TrainingRules(**{name: "0.000001s"}), name) == "0.000001s"


@pytest.mark.parametrize(
    ("plan", "towers", "named"),
    [
        ("by_user", None, "by_user"),
        ("sequences", CAUSAL, "sequences"), ("auto", CAUSAL, "sequences"),
    ],
)  # fmt: skip
def test_whole_users_cannot_be_taken_since_a_time(
    plan: Any, towers: TowerRules | None, named: str
) -> None:
    learned = replace(events(4, 5), learned=np.array([1, 3]))
    with pytest.raises(ConfigError, match=f'since = "5d".*training.batches = "{named}"'):
        data(learned, towers, batches=plan, since="5d")
    for other in ("random", "in_time"):
        rules = TrainingRules(batches=other, since="5d")
        assert sampler_of(rules, towers or TowerRules(), False) == other


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({"since": "5d"}, 'training.since = "5d" is a span of time'),
        ({"batches": "in_time"}, 'training.batches = "in_time" makes windows of time'),
    ],
)
def test_what_counts_time_needs_a_clock(rules: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"{wanted}.*no clock.*\[data\.columns\]"):
        data(events(4, 5, timed=False), **rules)
    assert len(data(events(4, 5), **rules).batches) > 0
