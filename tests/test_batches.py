"""Batches against loops over lists, their epochs, and what a query may read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.batch import Batch, Queries, query_side
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.negatives import Distinct
from recsys.features.batching.samplers import BatchSlice
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged

N_USERS, N_ITEMS = 6, 15
SEED = st.integers(0, 2**32 - 1)
PLANS = st.sampled_from(["random", "in_time"])


def world(events: int = 60, seed: int = 0, as_of_times: int = 40) -> TrainingEvents:
    """Random events with ties in time, repeats, skips, weights and context."""
    rng = np.random.default_rng(seed)
    first_seen = rng.integers(0, as_of_times // 2, N_ITEMS) * 1_000_000
    timeline = Timeline.build(
        rng.integers(1, N_USERS, events),
        rng.integers(1, N_ITEMS, events).astype(np.int32),
        rng.integers(0, as_of_times, events) * 1_000_000,
        n_users=N_USERS,
        first_seen=first_seen,
    )
    skips = Ragged.from_lists(
        [rng.integers(0, N_ITEMS, rng.integers(0, 4)).tolist() for _ in range(events)], np.int32
    )
    return TrainingEvents(
        timeline=timeline,
        weight=rng.random(events).astype(np.float32) + 0.5,
        skips=skips,
        skip_weight=(rng.integers(0, 4, len(skips.values)) / 3).astype(np.float32),
        context=rng.integers(0, 5, (events, 2)).astype(np.int32),
        candidates=np.arange(1, N_ITEMS),
    )


def expect(events: TrainingEvents, chosen: np.ndarray, max_history: int) -> list[dict]:
    """What must stand in a batch, example by example, by loops over lists."""
    timeline = events.timeline
    log = list(
        zip(timeline.user.tolist(), timeline.item.tolist(), timeline.time.tolist(), strict=True)
    )
    rows = []
    for event in chosen.tolist():
        user, item, time = log[event]
        past = [i for u, i, t in log if u == user and t < time]
        liked = {i for u, i, _ in log if u == user}
        skips = zip(
            events.skips[event].tolist(),
            events.skip_weight[
                events.skips.offsets[event] : events.skips.offsets[event + 1]
            ].tolist(),
            strict=True,
        )
        rows.append(
            {
                "user": user,
                "target": item,
                "history": past[-max_history:],
                "known": liked - {item},
                "skips": [(i, w) for i, w in skips if i > 0 and w > 0 and i != item],
                "weight": float(events.weight[event]),
                "context": events.context[event].tolist(),
            }
        )
    return rows


def read(batch: Batch) -> list[dict]:
    """A batch, back to lists of item rows."""
    rows = batch.rows.tolist()
    ends = batch.user.lengths.cumsum(0).tolist()
    history = [rows[place] for place in batch.user.history.tolist()]
    skips = list(
        zip(
            *batch.per_query.tolist(),
            batch.per_query_log_weight.double().exp().tolist(),
            strict=True,
        )
    )
    known = list(zip(*batch.positive_mask.tolist(), strict=True))
    return [
        {
            "user": int(batch.user.users[b]),
            "target": rows[batch.target[b]],
            "history": history[ends[b] - int(batch.user.lengths[b]) : ends[b]],
            "known": {rows[column] for example, column in known if example == b},
            "skips": [(rows[column], weight) for example, column, weight in skips if example == b],
            "weight": float(batch.weight[b]),
            "context": batch.user.context[b].tolist(),
        }
        for b in range(len(batch))
    ]


def same(left: Batch, right: Batch) -> bool:
    return left.n_candidates == right.n_candidates and all(
        torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True)
    )


def tensors(batch: Batch) -> list[torch.Tensor]:
    parts: list[Any] = [*vars(batch).values(), *vars(batch.user).values()]
    return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("uniform", [0, 3])
@given(seed=SEED, size=st.integers(1, 23))
@settings(max_examples=25)
def test_a_batch_holds_what_loops_over_lists_say(uniform: int, seed: int, size: int) -> None:
    events = world(events=31, seed=seed)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(31, size, replace=False)
    batches = Batches(events, max_history=4, uniform_negatives=uniform, seed=seed)
    batch = batches.make(BatchSlice(chosen), np.random.default_rng(seed))
    drawn = np.random.default_rng(seed).choice(events.candidates, uniform) if uniform else []
    rows, n, m = batch.rows.tolist(), batch.n_candidates, batch.n_encoded
    wanted = expect(events, chosen, max_history=4)

    assert len(set(rows)) == len(rows)
    assert set(rows[:n]) == {row["target"] for row in wanted} | set(map(int, drawn))
    assert set(rows[n:m]) == {i for row in wanted for i, _ in row["skips"]} - set(rows[:n])
    assert set(rows[m:]) == {i for row in wanted for i in row["history"]} - set(rows[:m])
    for row in wanted:
        row["known"] &= set(rows[:n])
        row["skips"] = [(i, pytest.approx(w, rel=1e-5)) for i, w in row["skips"]]
    assert read(batch) == wanted

    others = size - 1
    for column, item in enumerate(rows[:n]):
        share = events.timeline.item.tolist().count(item) / 31
        absent = (1 - share) ** others * (1 - 1 / len(events.candidates)) ** uniform
        found = math.exp(float(batch.log_inclusion[column]))
        assert found == pytest.approx(1 - absent, rel=1e-4, abs=1e-11)


def test_a_batch_made_twice_is_the_same_batch() -> None:
    """The scratch table is left as it was found."""
    batches = Batches(world(), uniform_negatives=5)
    first, again = (
        batches.make(BatchSlice(np.arange(3, 20)), np.random.default_rng(1)) for _ in range(2)
    )
    assert same(first, again)


@given(SEED)
@settings(max_examples=20)
def test_the_target_is_never_masked_and_never_its_own_skip(seed: int) -> None:
    events = world(events=50, seed=seed)
    for batch in Batches(events, batch_size=16, seed=seed):
        assert (batch.positive_mask[1] != batch.target[batch.positive_mask[0]]).all()
        assert (batch.per_query[1] != batch.target[batch.per_query[0]]).all()


@pytest.mark.parametrize("uniform", [0, 6])
def test_inclusion_is_the_frequency_with_which_a_candidate_is_drawn(uniform: int) -> None:
    """The events of a batch are drawn many times; example 0 stays."""
    rng = np.random.default_rng(3)
    total, size, draws = 2000, 12, 1500
    item = np.minimum(rng.geometric(0.25, total), N_ITEMS - 1).astype(np.int32)
    timeline = Timeline.build(
        rng.integers(1, N_USERS, total), item, np.arange(total),
        n_users=N_USERS, first_seen=np.zeros(N_ITEMS, np.int64),
    )  # fmt: skip
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, N_ITEMS))
    batches = Batches(events, uniform_negatives=uniform)
    own = int(timeline.item[0])
    frequency, said = np.zeros(N_ITEMS), np.full(N_ITEMS, np.nan)
    for _ in range(draws):
        chosen = np.append(0, 1 + rng.choice(total - 1, size - 1, replace=False))
        batch = batches.make(BatchSlice(chosen), rng)
        rows = batch.rows[: batch.n_candidates].numpy()
        frequency[rows] += 1 / draws
        said[rows] = batch.log_inclusion.exp().numpy()
    others = (np.arange(N_ITEMS) != own) & ~np.isnan(said)
    assert others.sum() >= 10
    assert np.abs(frequency - said)[others].max() < 0.04


def test_a_candidate_near_in_time_is_likelier_than_the_whole_log_says() -> None:
    """100 events: item 1 in the first half, item 2 in the second; a batch of the first half."""
    item = np.repeat([1, 2], 50).astype(np.int32)
    timeline = Timeline.build(
        np.ones(100, np.int64), item, np.arange(100), n_users=2, first_seen=np.zeros(3, np.int64)
    )
    events = TrainingEvents(timeline, None, None, None, None, np.array([1, 2]))
    batches = Batches(events, batch_size=3, sampler="in_time")
    batch = batches.make(BatchSlice(np.arange(3), np.arange(50)), np.random.default_rng(0))
    assert batch.log_inclusion.exp().tolist() == pytest.approx([1.0])
    whole = batches.make(BatchSlice(np.arange(3)), np.random.default_rng(0))
    assert whole.log_inclusion.exp().tolist() == pytest.approx([1 - 0.5**2])


def test_statistics_are_those_of_the_first_moment_of_the_batch() -> None:
    events = world()
    batches = Batches(events, batch_size=7, sampler="in_time", statistics=True, uniform_negatives=4)
    times = {
        t: events.timeline.statistics(np.arange(N_ITEMS), t) for t in set(events.timeline.time)
    }
    by_time = np.sort(events.timeline.time)
    for batch in batches:
        fits = [
            t for t, said in times.items() if np.array_equal(said[batch.rows], batch.statistics)
        ]
        assert fits
        assert min(fits) <= by_time.max()
    chosen = np.argsort(events.timeline.time, kind="stable")[20:27]
    as_of = int(by_time[20])
    batch = batches.make(BatchSlice(chosen, None, as_of), np.random.default_rng(0))
    assert np.array_equal(batch.statistics, times[by_time[20]][batch.rows])
    drawn_only = set(batch.rows[: batch.n_candidates].tolist()) - set(
        events.timeline.item[chosen].tolist()
    )
    assert all(events.timeline.exists_from[row] <= by_time[20] for row in drawn_only)


@given(st.integers(1, 60), st.integers(2, 20), PLANS, SEED)
@settings(max_examples=60)
def test_every_event_comes_once_an_epoch_in_as_many_batches_as_the_length_says(
    total: int, size: int, plan: str, seed: int
) -> None:
    events = world(events=total, seed=seed, as_of_times=2**20)
    batches = Batches(events, batch_size=size, sampler=plan, seed=seed, skips=False)
    for epoch in range(3):
        parts = [part.units for part in batches._sampler.epoch(np.random.default_rng(epoch))]
        assert len(parts) == len(batches)
        assert sorted(np.concatenate(parts).tolist()) == list(range(total))
        assert all(1 <= len(chosen) <= size for chosen in parts)
        if plan == "in_time":
            ranks = np.argsort(np.argsort(events.timeline.time, kind="stable"))
            assert all((np.diff(ranks[chosen]) == 1).all() for chosen in parts)
    assert [len(list(batches)) for _ in range(3)] == [len(batches)] * 3


def test_windows_fall_differently_in_each_epoch() -> None:
    batches = Batches(world(64), batch_size=16, sampler="in_time")
    firsts = {
        min(len(part.units) for part in batches._sampler.epoch(np.random.default_rng(seed)))
        for seed in range(20)
    }
    assert len(firsts) > 3


@pytest.mark.parametrize("plan", ["random", "in_time"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_going_on_in_mid_epoch_gives_the_same_remaining_batches(stop: int, plan: str) -> None:
    def new() -> Batches:
        return Batches(world(), batch_size=9, uniform_negatives=3, sampler=plan, seed=4)

    whole = new()
    list(whole)
    wanted = list(whole)  # the second epoch
    stopped = new()
    list(stopped)
    running = iter(stopped)
    for _ in range(stop):
        next(running)
    later = new()
    later.load_state_dict(stopped.state_dict())
    remaining = list(later)
    after = wanted[stop:] if stop else wanted
    assert len(remaining) == len(after)
    assert all(same(a, b) for a, b in zip(remaining, after, strict=True))
    assert all(same(a, b) for a, b in zip(later, whole, strict=True))


def test_each_iteration_is_the_next_epoch_even_when_nobody_asked_for_the_end() -> None:
    """Lightning asks for `len` batches and never for the one that is not there."""
    read_to_the_end, cut = (Batches(world(), batch_size=20, seed=1) for _ in range(2))
    for _ in range(3):
        running = iter(cut)
        taken = [next(running) for _ in range(len(cut))]
        wanted = list(read_to_the_end)
        assert len(taken) == len(wanted) == 3
        assert all(same(a, b) for a, b in zip(taken, wanted, strict=True))
    next(iter(cut))
    next(iter(read_to_the_end))
    next(iter(cut))
    assert (cut.epoch, cut.done) == (4, 1)


def test_a_stop_after_the_last_batch_goes_on_with_the_next_epoch() -> None:
    batches = Batches(world(), batch_size=20, seed=1)
    first = list(batches)
    later = Batches(world(), batch_size=20, seed=1)
    later.load_state_dict(batches.state_dict())
    resumed = list(later)
    assert len(resumed) == len(first)
    assert all(same(a, b) for a, b in zip(resumed, batches, strict=True))
    assert not same(resumed[0], first[0])


def test_seeds_repeat_and_differ() -> None:
    one, again, other = (next(iter(Batches(world(), seed=seed))) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)


def test_a_batch_moves_whole() -> None:
    batch = next(iter(Batches(world(), batch_size=8)))
    moved = batch.to("meta")
    assert all(part.is_meta for part in tensors(moved))
    assert len(tensors(moved)) == len(tensors(batch)) == 14
    assert (moved.n_candidates, moved.n_encoded, len(moved)) == (
        batch.n_candidates, batch.n_encoded, 8,
    )  # fmt: skip


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6))
def test_distinct_places_are_dense_and_taken_back(groups: list[list[int]]) -> None:
    distinct = Distinct(10)
    met: list[int] = []
    for group in groups:
        new = distinct.add(np.array(group, np.int64), len(met))
        assert set(new.tolist()) == set(group) - set(met)
        met += new.tolist()
        assert len(set(met)) == len(met)
    assert distinct.place[met].tolist() == list(range(len(met)))
    distinct.forget(np.array(met, np.int64))
    assert (distinct.place == -1).all()


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), st.integers(1, 4))
def test_queries_read_the_newest_of_each_history(history: list[list[int]], newest: int) -> None:
    users = np.arange(len(history))
    side, rows = query_side(Queries(users, Ragged.from_lists(history)), newest)
    parts = torch.split(side.history, side.lengths.tolist()) if len(history) else []
    assert [rows[part.numpy()].tolist() for part in parts] == [row[-newest:] for row in history]
    assert side.context.shape == (len(history), 0)


def test_taking_queries_takes_every_part() -> None:
    queries = Queries(
        np.array([3, 4, 5]),
        Ragged.from_lists([[1], [], [2, 3]]),
        np.array([7, 8, 9]),
        np.array([[1], [2], [3]]),
    )
    taken = queries.take(np.array([2, 0]))
    assert taken.users.tolist() == [5, 3]
    assert [taken.history[q].tolist() for q in range(2)] == [[2, 3], [1]]
    assert taken.times.tolist() == [9, 7]
    assert taken.context.tolist() == [[3], [1]]
