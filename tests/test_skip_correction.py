"""Skips weighed by how often they were shown, against loops over lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.batch import Batch
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.negatives import SHOWN_WITHIN
from recsys.features.batching.slices import Part
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.tables import DAY
from recsys.towers.logits import Scores
from recsys.towers.losses import skip_term

N_ITEMS = 7


def world(seed: int, shown: bool = True) -> tuple[TrainingEvents, list[tuple[int, int]]]:
    """Random events with skips over ten days, and what was shown as (item, time)."""
    rng = np.random.default_rng(seed)
    exposures = list(
        zip(
            rng.integers(1, N_ITEMS, 60).tolist(),
            (rng.integers(0, 10, 60) * DAY).tolist(),
            strict=True,
        )
    )
    item, time = np.array(exposures).T
    timeline = Timeline.build(
        rng.integers(1, 4, 20),
        rng.integers(1, N_ITEMS, 20).astype(np.int32),
        rng.integers(0, 10, 20) * DAY,
        n_users=4,
        first_seen=np.zeros(N_ITEMS, np.int64),
        shown_item=item if shown else None,
        shown_time=time if shown else None,
    )
    skips = Ragged.from_lists(
        [rng.integers(1, N_ITEMS, rng.integers(0, 4)).tolist() for _ in range(20)], np.int32
    )
    weight = np.full(len(skips.values), 0.5, np.float32)
    return TrainingEvents(timeline, None, skips, weight, None, np.arange(1, N_ITEMS)), exposures


def weights(batch: Batch) -> list[tuple[int, int, float]]:
    """(example, item row, weight) of the own negatives."""
    rows = batch.rows.tolist()
    found = zip(*batch.own.tolist(), batch.own_log_weight.exp().tolist(), strict=True)
    return [(example, rows[place], weight) for example, place, weight in found]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_a_skip_weighs_less_the_more_often_it_was_shown_than_the_choice(
    seed: int, power: float
) -> None:
    events, exposures = world(seed)
    assert events.skips is not None
    timeline, chosen = events.timeline, np.arange(20)
    made = Batches(events, skip_correction=power).make(Part(chosen), np.random.default_rng(0))
    wanted = []
    for event in chosen.tolist():
        at, own = int(timeline.time[event]), int(timeline.item[event])

        def shown(item: int, at: int = at) -> int:
            return sum(i == item and at - SHOWN_WITHIN <= t < at for i, t in exposures)

        wanted += [
            (event, item, pytest.approx(0.5 * ((shown(own) + 1) / (shown(item) + 1)) ** power))
            for item in events.skips[event].tolist()
            if item != own
        ]
    assert weights(made) == wanted


def test_without_correction_exposures_change_nothing() -> None:
    made = [
        Batches(world(3, shown)[0]).make(Part(np.arange(20)), np.random.default_rng(0))
        for shown in (True, False)
    ]
    assert weights(made[0]) == weights(made[1])


def test_a_log_without_exposures_says_so() -> None:
    with pytest.raises(ValueError, match="no impression lists"):
        Batches(world(0, shown=False)[0], skip_correction=1.0)


def test_corrected_the_best_scores_are_those_of_the_whole_catalogue() -> None:
    """Item a is shown nine times as often as b and liked as much: it is chosen nine times as often
    in all, and in lists that hold both each is chosen half the time. Uncorrected, the term wants
    equal scores; corrected, those that tell what is chosen in all: log 9 apart."""
    shown, users = np.array([90.0, 10.0]), torch.ones(2, 1)
    for power, gap in ((0.0, 0.0), (1.0, float(np.log(9)))):
        items = torch.zeros(2, 1, requires_grad=True)
        other = np.array([1, 0])
        log_weight = power * (np.log(shown) - np.log(shown[other]))
        optimizer = torch.optim.SGD([items], lr=1.0)
        for _ in range(500):
            scores = Scores(
                users=users, items=items, target=torch.tensor([0, 1]), temperature=1.0,
                log_weight=torch.zeros(2), own=torch.tensor([[0, 1], [1, 0]]),
                own_log_weight=torch.tensor(log_weight, dtype=torch.float32),
            )  # fmt: skip
            optimizer.zero_grad()
            skip_term(scores).mean().backward()
            optimizer.step()
        assert float((items[0] - items[1]).detach()) == pytest.approx(gap, abs=1e-2)
