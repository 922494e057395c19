"""Plans, and what stands in a part of one, against loops over lists."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.batch import Batch, Queries, query_side
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.samplers import Share, Shuffled, UserQueries, Windows
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged

SEED = st.integers(0, 2**32 - 1)
N_USERS, N_ITEMS, SECOND = 7, 15, 1_000_000


def world(events: int, seed: int, as_of_times: int = 12) -> TrainingEvents:
    """Random events with ties in time, repeats, weights and context; user 0 has none."""
    rng = np.random.default_rng(seed)
    timeline = Timeline.build(
        rng.integers(1, N_USERS, events),
        rng.integers(1, N_ITEMS, events).astype(np.int32),
        rng.integers(0, as_of_times, events) * SECOND,
        n_users=N_USERS,
        first_seen=np.zeros(N_ITEMS, np.int64),
    )
    return TrainingEvents(
        timeline, rng.random(events).astype(np.float32) + 0.5, None, None,
        rng.integers(1, 5, (events, 2)).astype(np.int32), np.arange(1, N_ITEMS),
    )  # fmt: skip


def log_of(events: TrainingEvents) -> dict[int, list[tuple[int, int, float, list[int]]]]:
    """User → item, seconds, weight and context of each event, in order."""
    timeline, log = events.timeline, {}
    for event, user in enumerate(timeline.user.tolist()):
        log.setdefault(user, []).append(
            (
                int(timeline.item[event]), int(timeline.time[event]) // SECOND,
                float(events.weight[event]), events.context[event].tolist(),
            )
        )  # fmt: skip
    return log


def read(batch: Batch) -> list[dict[str, Any]]:
    """Every example of a batch, back to item rows, by loops."""
    rows, side = batch.rows.tolist(), batch.user
    ends = side.lengths.cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, side.lengths.tolist(), strict=True)]
    n = batch.n_queries
    stand = ends if side.at is None else [at + 1 for at in side.at.tolist()]
    asker = [sum(end < s for end in ends) for s in stand] if side.at is not None else range(n)
    owner = range(len(batch)) if batch.owner is None else batch.owner.tolist()
    known = list(zip(*batch.positive_mask.tolist(), strict=True))
    columns = rows[: batch.n_candidates] + batch.queued.tolist()
    found = []
    for example, query in enumerate(owner):
        user = asker[query]
        span = slice(starts[user], stand[query])
        found.append(
            {
                "user": int(side.users[user]),
                "target": rows[batch.target[example]],
                "history": [rows[place] for place in side.history[span].tolist()],
                "elapsed": None if side.elapsed is None else side.elapsed[span].tolist(),
                "event_weight": None
                if side.event_weight is None
                else side.event_weight[span].tolist(),
                "known": {columns[c] for q, c in known if q == query},
                "context": side.context[query].tolist(),
                "weight": float(batch.weight[example]),
            }
        )
    return found


def in_order(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(examples, key=lambda e: (e["user"], e["target"], e["weight"]))


@given(seed=SEED, total=st.integers(8, 50), most=st.integers(1, 6), size=st.integers(1, 7))
@settings(max_examples=25)
def test_sequences_ask_at_every_position_for_what_comes_next(
    seed: int, total: int, most: int, size: int
) -> None:
    events = world(total, seed)
    batches = Batches(
        events, sampler="sequences", batch_size=size, max_history=most, seed=seed,
        elapsed=True, event_weight=True,
    )  # fmt: skip
    wanted = []
    for user, log in log_of(events).items():
        window = log[-most - 1 :]
        for item, time, weight, _ in window:
            before = [entry for entry in window if entry[1] < time]
            if before:
                times = [entry[1] for entry in before] + [time]
                everything = {i for i, *_ in log}
                said = next(entry[3] for entry in window if entry[1] == time)
                wanted.append(
                    {
                        "user": user, "target": item, "history": [i for i, *_ in before],
                        "elapsed": [later - t for t, later in pairwise(times)],
                        "event_weight": [w for _, _, w, _ in before], "weight": weight,
                        "known": everything,
                        "context": said,
                    }
                )  # fmt: skip
    found = []
    for batch in batches:
        items = set(batch.rows[: batch.n_candidates].tolist())
        lengths = batch.user.lengths.tolist()
        assert lengths == sorted(lengths)
        assert len(lengths) <= size
        assert max(lengths) <= most
        for example in read(batch):
            # Own targets may stand among the known; the loss masks them anyway.
            example["known"] -= {example["target"]}
            found.append(example)
            match = [
                w for w in wanted
                if all(
                    w[k] == example[k] for k in w if k not in ("known", "elapsed", "event_weight")
                )
            ]  # fmt: skip
            assert any(w["known"] & items - {w["target"]} == example["known"] for w in match)
    for example in wanted + found:
        del example["known"]
    assert in_order(found) == in_order(wanted)


def test_a_causal_side_reads_each_entry_once() -> None:
    """One user, five events at different times: four examples at four entries, by hand."""
    timeline = Timeline.build(
        np.ones(5, np.int64), np.array([3, 1, 4, 1, 5], np.int32),
        np.array([0, 1, 4, 9, 16]) * SECOND, n_users=2, first_seen=np.zeros(6, np.int64),
    )  # fmt: skip
    weight = np.arange(1, 6, dtype=np.float32)
    events = TrainingEvents(timeline, weight, None, None, None, np.arange(1, 6))
    (batch,) = Batches(events, sampler="sequences", max_history=9, elapsed=True, event_weight=True)
    rows = batch.rows
    assert rows[batch.user.history].tolist() == [3, 1, 4, 1]
    assert rows[batch.target].tolist() == [1, 4, 1, 5]
    assert batch.user.at is not None
    assert batch.user.at.tolist() == [0, 1, 2, 3]
    assert batch.owner is None
    assert batch.user.elapsed is not None
    assert batch.user.elapsed.tolist() == [1, 3, 5, 7]
    assert batch.user.event_weight is not None
    assert batch.user.event_weight.tolist() == [1, 2, 3, 4]


@given(seed=SEED, total=st.integers(1, 50), most=st.integers(1, 9), size=st.integers(1, 7))
@settings(max_examples=40)
def test_by_user_every_item_is_asked_for_and_a_part_of_them_is_history(
    seed: int, total: int, most: int, size: int
) -> None:
    events = world(total, seed)
    log = log_of(events)
    batches = Batches(
        events, sampler="by_user", batch_size=size, max_history=most,
        history_dropout=0.3, seed=seed,
        elapsed=True, event_weight=True,
    )  # fmt: skip
    asked: dict[int, list[int]] = {}
    for batch in batches:
        assert batch.n_queries == len(batch.user.users) <= size
        items = set(batch.rows[: batch.n_candidates].tolist())
        for example in read(batch):
            mine = log[example["user"]]
            asked.setdefault(example["user"], []).append(example["target"])
            entries = [(i, w) for i, _, w, _ in mine]
            kept = iter(entries)
            history = list(zip(example["history"], example["event_weight"], strict=True))
            assert all(entry in kept for entry in history), "kept in the user's order"
            assert len(history) <= most
            last = mine[-1][1]
            by_weight = {w: last - t for _, t, w, _ in mine}
            assert example["elapsed"] == [by_weight[w] for _, w in history]
            assert example["known"] == {i for i, *_ in mine} & items
            assert example["context"] == [0, 0]
    assert asked == {user: [i for i, *_ in mine] for user, mine in log.items()}


def test_each_entry_is_kept_with_the_same_probability_and_a_random_choice_fits() -> None:
    """Two users of 6 and 3 events, many times."""
    user = np.array([1] * 6 + [2] * 3)
    timeline = Timeline.build(
        user, np.arange(1, 10, dtype=np.int32), np.arange(9), n_users=3,
        first_seen=np.zeros(10, np.int64), timed=False,
    )  # fmt: skip
    rng, times = np.random.default_rng(0), 4000
    for most, wanted in ((50, [0.75] * 9), (2, None)):
        reading = UserQueries(timeline, most, dropout=0.25)
        kept, lengths = np.zeros(9), np.zeros(2)
        for _ in range(times):
            asked = reading.queries(np.array([1, 2]), rng)
            kept[asked.history] += 1 / times
            lengths += asked.lengths / times
            assert asked.lengths.max() <= most
        if wanted is None:
            wanted = [lengths[0] / 6] * 6 + [lengths[1] / 3] * 3
            assert 1.9 < lengths[0] <= 2
        assert np.abs(kept - wanted).max() < 0.03
    assert UserQueries(timeline, 50, 0.0).queries(np.array([2, 1]), rng).lengths.tolist() == [3, 6]


@given(
    st.integers(1, 80), st.integers(1, 6), st.integers(1, 4),
    st.sampled_from(["shuffled", "users", "windows"]), SEED,
)  # fmt: skip
@settings(max_examples=100)
def test_ranks_have_disjoint_equal_parts_that_cover_the_epoch_up_to_the_remainder(
    total: int, size: int, world: int, kind: str, seed: int
) -> None:
    time = np.random.default_rng(seed).integers(0, 50, total)

    def plan(size: int, share: Share) -> Shuffled | Windows:
        if kind == "shuffled":
            return Shuffled(total, size, share)
        if kind == "users":
            return Shuffled(3 * np.arange(total), size, share)
        # Windows this wide hold an event for every rank.
        return Windows(time, size, share)

    plans = [plan(size, Share(rank, world)) for rank in range(world)]
    epochs = [list(p.epoch(np.random.default_rng(seed))) for p in plans] if len(plans[0]) else []
    assert {len(p) for p in plans} == {len(epoch) for epoch in epochs} or not epochs
    seen: list[int] = []
    for parts in zip(*epochs, strict=True):
        assert len({len(part.units) for part in parts}) == 1
        assert 1 <= len(parts[0].units) <= size
        assert len({part.as_of for part in parts}) == 1
        seen += np.concatenate([part.units for part in parts]).tolist()
    if world == 1 or kind in ("shuffled", "users") or total >= 4 * world * size >= 8 * world:
        assert len(seen) == len(set(seen))
        left = max(1, len(epochs[0]) if epochs else 1) * (world - 1)
        assert total - len(seen) <= left
    if kind == "shuffled":
        whole = plan(size * world, Share()).epoch(np.random.default_rng(seed))
        for number, parts in enumerate(zip(*epochs, strict=True)):
            union = np.concatenate([part.units for part in parts])
            assert union.tolist() == whole[number].units[: len(union)].tolist()


def test_a_rank_that_is_none_of_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 2, but 2 ranks count from 0"):
        Share(2, 2)


@pytest.mark.parametrize("plan", ["random", "in_time", "by_user", "sequences"])
def test_two_ranks_share_the_examples_and_draw_for_themselves(plan: Any) -> None:
    events = world(60, 3, as_of_times=2**20)
    one, two = (
        list(
            Batches(
                events, sampler=plan, batch_size=2, rank=rank, world=2, seed=5, uniform_negatives=4
            )
        )
        for rank in range(2)
    )
    assert len(one) == len(two) > 1
    weights = [set(batch.weight.tolist()) for batch in one + two]
    assert sum(map(len, weights)) == len(set.union(*weights))  # no event twice
    drawn = [set(b.rows[: b.n_candidates].tolist()) - set(b.rows[b.target].tolist()) for b in one]
    other = [set(b.rows[: b.n_candidates].tolist()) - set(b.rows[b.target].tolist()) for b in two]
    assert drawn != other


def test_an_unknown_plan_is_refused_and_so_is_what_does_not_go_together() -> None:
    events = world(20, 0)
    for options, said in (
        ({"sampler": "by_item"}, "'by_item' is no sampler"),
        ({"statistics": True}, 'need the sampler "in_time"'),
        ({"negatives": "all", "queue": 2}, "every item is a candidate"),
    ):
        with pytest.raises(ValueError, match=said):
            Batches(events, **options)  # type: ignore[arg-type]
    untimed = Timeline.build(
        np.ones(3, np.int64), np.ones(3, np.int32), np.arange(3), n_users=2,
        first_seen=np.zeros(2, np.int64), timed=False,
    )  # fmt: skip
    for options in ({"elapsed": True},):
        with pytest.raises(ValueError, match="no clock"):
            Batches(TrainingEvents(untimed, None, None, None, None, np.array([1])), **options)


@given(st.integers(1, 4), SEED)
@settings(max_examples=20)
def test_events_carry_the_time_and_strength_of_their_history(most: int, seed: int) -> None:
    events = world(40, seed)
    batches = Batches(events, batch_size=9, max_history=most, elapsed=True, event_weight=True)
    log = log_of(events)
    for batch in batches:
        for example in read(batch):
            mine = log[example["user"]]
            time = next(
                t for i, t, w, _ in mine if i == example["target"] and w == example["weight"]
            )
            before = [(time - t, w) for _, t, w, _ in mine if t < time][-most:]
            assert example["elapsed"] == [t for t, _ in before]
            assert example["event_weight"] == [w for _, w in before]


def test_queries_hand_on_the_time_and_strength_of_the_newest_entries() -> None:
    queries = Queries(
        np.array([1, 2, 3]), Ragged.from_lists([[5, 6, 7], [], [8]]),
        elapsed=np.array([3.0, 2, 1, 9]), event_weight=np.array([1.0, 2, 3, 4]),
    )  # fmt: skip
    taken = queries.take(np.array([2, 0]))
    assert taken.elapsed is not None
    assert taken.event_weight is not None
    assert taken.elapsed.tolist() == [9, 3, 2, 1]
    assert taken.event_weight.tolist() == [4, 1, 2, 3]
    side, rows = query_side(taken, 2)
    assert side.elapsed is not None
    assert side.event_weight is not None
    assert rows[side.history].tolist() == [8, 6, 7]
    assert side.elapsed.tolist() == [9, 2, 1]
    assert side.event_weight.tolist() == [4, 2, 3]
    assert side.elapsed.dtype == side.event_weight.dtype == torch.float32
