"""The queue, own negatives, full softmax and draw probabilities, against loops and by counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.batch import Batch, Source
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.logq import Sampled
from recsys.features.batching.negatives import UserNegatives
from recsys.features.batching.samplers import BatchSlice
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged

SEED = st.integers(0, 2**32 - 1)
PLANS = ["random", "in_time", "by_user", "sequences"]
N_USERS, N_ITEMS = 7, 25


def world(events: int = 60, seed: int = 0, born: bool = False) -> TrainingEvents:
    """Random events with ties, repeats and skips; later items are born later where asked for."""
    rng = np.random.default_rng(seed)
    timeline = Timeline.build(
        rng.integers(1, N_USERS, events),
        rng.integers(1, N_ITEMS, events).astype(np.int32),
        rng.integers(0, 30, events) * 1_000_000,
        n_users=N_USERS,
        first_seen=np.arange(N_ITEMS) * 1_000_000 * born,
    )
    skips = Ragged.from_lists(
        [rng.integers(0, N_ITEMS, rng.integers(0, 4)).tolist() for _ in range(events)], np.int32
    )
    weight = (rng.integers(0, 4, len(skips.values)) / 4).astype(np.float32)
    return TrainingEvents(timeline, None, skips, weight, None, np.arange(1, N_ITEMS))


def table(rng: np.random.Generator, most: int = 9) -> UserNegatives:
    """Random negatives of every user, each item at most once a user, some of weight 0."""
    rows = [
        rng.permutation(np.arange(1, N_ITEMS))[: rng.integers(0, most)].tolist()
        for _ in range(N_USERS)
    ]
    ragged = Ragged.from_lists(rows, np.int32)
    weights = (rng.integers(0, 5, len(ragged.values)) / 4).astype(np.float32)
    return UserNegatives(ragged.offsets, ragged.values, weights)


def pasts(events: TrainingEvents, batch: Batch, batches: Batches) -> tuple[list[int], list[set]]:
    """User of each query, and what it is known to like by the rule, by loops."""
    side = batch.user
    users = side.users.tolist()
    if side.at is not None:
        ends = side.lengths.cumsum(0).tolist()
        users = [users[sum(end <= at for end in ends)] for at in side.at.tolist()]
    timeline = events.timeline
    mine = {
        user: {int(i) for i, u in zip(timeline.item, timeline.user, strict=True) if u == user}
        for user in set(users)
    }
    return users, [mine[user] for user in users]


def own_of(batch: Batch) -> list[tuple[int, int, float, Source]]:
    rows = batch.rows.tolist()
    return [
        (query, rows[place], round(weight, 5), Source(source))
        for query, place, weight, source in zip(
            *batch.per_query.tolist(), batch.per_query_log_weight.exp().tolist(),
            batch.per_query_source.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def targets_of(batch: Batch) -> list[set[int]]:
    rows = batch.rows[batch.target].tolist()
    owner = range(len(batch)) if batch.owner is None else batch.owner.tolist()
    found: list[set[int]] = [set() for _ in range(batch.n_queries)]
    for query, item in zip(owner, rows, strict=True):
        found[query].add(item)
    return found


@pytest.mark.parametrize("plan", PLANS)
@given(seed=SEED, size=st.integers(1, 13))
@settings(max_examples=12)
def test_own_negatives_are_those_of_the_tables_that_are_neither_liked_nor_chosen(
    plan: Any, seed: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    events, mined, given_ = world(seed=seed), table(rng), table(rng)
    batches = Batches(
        events, sampler=plan, batch_size=size, seed=seed, user_negatives=given_, skips=False
    )
    batches.mined = mined
    for batch in batches:
        users, liked = pasts(events, batch, batches)
        wanted = [
            (query, int(item), float(weight), source)
            for source, negatives in ((Source.MINED, mined), (Source.FILE, given_))
            for query, user in enumerate(users)
            for item, weight in zip(
                Ragged(negatives.offsets, negatives.items)[user],
                Ragged(negatives.offsets, negatives.weights)[user], strict=True,
            )
            if weight > 0 and item not in liked[query]
        ]  # fmt: skip
        assert own_of(batch) == wanted
        only = set(batch.rows[batch.n_candidates : batch.n_encoded].tolist())
        candidates = set(batch.rows[: batch.n_candidates].tolist())
        assert only == {item for _, item, *_ in wanted} - candidates


@pytest.mark.parametrize("plan", ["by_user", "sequences"])
def test_the_skips_of_whole_users_are_those_of_all_their_examples(plan: Any) -> None:
    events = world(seed=4)
    assert events.skips is not None
    skipped, n = 0, 0
    for batch in Batches(events, sampler=plan, batch_size=3):
        chosen = targets_of(batch)
        for query, item, _, source in own_of(batch):
            assert source == Source.SKIPPED
            assert item not in chosen[query]
            n += 1
    # By hand: of every event that is an example, what was passed over but not chosen by its query.
    timeline = events.timeline
    for event, (user, time) in enumerate(zip(timeline.user, timeline.time, strict=True)):
        mine = timeline.user == user
        if plan == "sequences":
            if not (mine & (timeline.time < time)).any():
                continue
            mine &= timeline.time == time
        span = slice(events.skips.offsets[event], events.skips.offsets[event + 1])
        for item, weight in zip(
            events.skips.values[span], events.skip_weight[span], strict=True
        ):  # fmt: skip
            skipped += item > 0 and weight > 0 and item not in timeline.item[mine]
    assert n == skipped > 0


def test_a_query_draws_so_many_of_its_users_negatives_each_as_likely() -> None:
    negatives = UserNegatives(
        np.array([0, 0, 5, 7]), np.array([11, 12, 13, 14, 15, 21, 22]), np.ones(7, np.float32)
    )
    rng, times = np.random.default_rng(0), 3000
    count = np.zeros(23)
    for _ in range(times):
        query, item, _ = negatives.draw(np.array([2, 1, 1, 0]), 2, rng)
        assert query.tolist() == [0, 0, 1, 1, 2, 2]
        assert len(set(zip(query.tolist(), item.tolist(), strict=True))) == 6
        np.add.at(count, item, 1 / times)
    assert count[[21, 22]].tolist() == pytest.approx([1, 1])
    assert np.abs(count[11:16] - 4 / 5).max() < 0.04
    assert len(negatives.draw(np.array([1]), None, rng)[0]) == 5


def test_tables_of_another_number_of_users_are_refused() -> None:
    batches = Batches(world())
    with pytest.raises(ValueError, match="of 2 user rows, but the training side has 7"):
        batches.mined = UserNegatives(np.zeros(3, np.int64), np.empty(0, int), np.empty(0))
    with pytest.raises(ValueError, match="the three have to be equal"):
        UserNegatives(np.array([0, 2]), np.array([1, 2]), np.ones(1, np.float32))


@pytest.mark.parametrize("plan", PLANS)
@given(seed=SEED, size=st.integers(2, 9), queue=st.integers(1, 3), uniform=st.integers(0, 4))
@settings(max_examples=10)
def test_the_queue_holds_what_the_last_batches_drew_and_this_one_did_not(
    plan: Any, seed: int, size: int, queue: int, uniform: int
) -> None:
    events = world(seed=seed)

    def new(queue: int = queue, **options: Any) -> list[Batch]:
        batches = Batches(
            events, sampler=plan, batch_size=size, uniform_negatives=uniform, queue=queue,
            seed=seed,
            skips=False, **options,
        )  # fmt: skip
        return list(batches)

    plain, queued = new(0), new()
    late = new(queue_after=2)
    for number, batch in enumerate(queued):
        assert torch.equal(batch.rows, plain[number].rows)
        before = [
            set(old.rows[: old.n_candidates].tolist())
            for old in plain[max(0, number - queue) : number]
        ]
        candidates = set(batch.rows[: batch.n_candidates].tolist())
        items = batch.queued.tolist()
        assert len(set(items)) == len(items)
        assert set(items) == set().union(*before) - candidates
        assert len(batch.log_inclusion) == batch.n_candidates + len(items)
        assert torch.equal(late[number].queued, batch.queued[: 0 if number < 2 else None])
        columns = batch.rows[: batch.n_candidates].tolist() + items
        _, liked = pasts(events, batch, None)
        found = {(q, columns[c]) for q, c in zip(*batch.positive_mask.tolist(), strict=True)}
        own = targets_of(batch)
        wanted = {(q, i) for q, mine in enumerate(liked) for i in mine & set(columns) - own[q]}
        assert {(q, i) for q, i in found if i not in own[q]} == wanted


def test_queued_items_that_are_not_born_yet_are_no_columns() -> None:
    events = world(80, seed=1, born=True)
    batches = Batches(events, sampler="in_time", batch_size=8, queue=9, uniform_negatives=5)
    times = []
    for batch, part in zip(
        batches, batches._sampler.epoch(np.random.default_rng([0, 0])), strict=True
    ):
        assert (events.timeline.exists_from[batch.queued] <= part.as_of).all()
        times.append(part.as_of)
    assert times != sorted(times)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stop", [1, 3])
def test_going_on_in_mid_epoch_gives_the_same_queue(plan: Any, stop: int) -> None:
    def new() -> Batches:
        return Batches(
            world(), sampler=plan, batch_size=9 if plan in ("random", "in_time") else 1,
            uniform_negatives=3, queue=2, seed=4, user_negatives=table(rng), per_query=2,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    whole = new()
    list(whole)
    wanted = list(whole)[stop:]
    rng = np.random.default_rng(0)
    stopped = new()
    list(stopped)
    running = iter(stopped)
    for _ in range(stop):
        next(running)
    rng = np.random.default_rng(0)
    later = new()
    later.load_state_dict(stopped.state_dict())
    remaining = list(later)
    assert len(remaining) == len(wanted) > 0
    assert any(len(batch.queued) for batch in wanted)
    for left, right in zip(remaining, wanted, strict=True):
        for name in (
            "rows",
            "queued",
            "log_inclusion",
            "positive_mask",
            "per_query",
            "per_query_log_weight",
        ):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
        assert torch.equal(left.user.history, right.user.history)


@pytest.mark.parametrize("plan", PLANS)
def test_with_all_negatives_every_item_that_exists_is_a_candidate_uncorrected(plan: Any) -> None:
    events = world(seed=2, born=plan == "in_time")
    some = np.arange(2, N_ITEMS, 2)
    fewer = TrainingEvents(events.timeline, None, None, None, None, some)
    batches = Batches(fewer, sampler=plan, batch_size=5, negatives="all")
    parts = batches._sampler.epoch(np.random.default_rng([0, 0]))
    for batch, part in zip(batches, parts, strict=True):
        exists = [
            i for i in some if part.as_of is None or events.timeline.exists_from[i] <= part.as_of
        ]
        candidates = batch.rows[: batch.n_candidates].tolist()
        assert set(candidates) == {*exists, *batch.rows[batch.target].tolist()}
        assert len(set(candidates)) == len(candidates)
        assert batch.log_inclusion.tolist() == [0] * len(candidates)
        _, liked = pasts(events, batch, batches)
        own = targets_of(batch)
        found = {(q, candidates[c]) for q, c in zip(*batch.positive_mask.tolist(), strict=True)}
        wanted = {(q, i) for q, mine in enumerate(liked) for i in mine & set(candidates) - own[q]}
        assert {(q, i) for q, i in found if i not in own[q]} == wanted


@pytest.mark.parametrize("plan", ["random", "by_user", "sequences"])
@pytest.mark.parametrize(("queue", "uniform"), [(0, 0), (2, 0), (0, 8), (2, 8)])
def test_inclusion_is_the_frequency_with_which_the_draws_of_others_hold_a_column(
    plan: Any, queue: int, uniform: int
) -> None:
    """Batches and queues are drawn many times; the first unit, whose items are set apart, stays."""
    rng = np.random.default_rng(3)
    users, n_items, size, times = 150, 30, 5, 900
    counts = rng.integers(2, 7, users)
    user = np.repeat(np.arange(1, users + 1), counts)
    item = np.minimum(rng.geometric(0.15, len(user)), n_items - 1).astype(np.int32)
    timeline = Timeline.build(
        user, item, np.arange(len(user)), n_users=users + 1, first_seen=np.zeros(n_items, np.int64)
    )
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, n_items))
    batches = Batches(events, sampler=plan, max_history=3, uniform_negatives=uniform, queue=queue)
    units = np.arange(len(user)) if plan == "random" else batches.query_kind.units
    mine = set(item.tolist()) if plan != "random" else {int(item[0])}
    if plan != "random":
        mine = set(item[user == units[0]].tolist())
    frequency, said = np.zeros(n_items), np.full(n_items, np.nan)
    for _ in range(times):
        others = rng.choice(units[1:], (1 + queue) * size - 1, replace=False)
        recent = []
        for part in others[size - 1 :].reshape(-1, size):
            asked = batches.query_kind.queries(part, rng)
            drawn = [timeline.item[asked.events], rng.choice(events.candidates, uniform)]
            recent.append(Sampled(np.concatenate(drawn).astype(np.int64), len(part)))
        batch = batches.make(BatchSlice(np.append(units[0], others[: size - 1])), rng, recent)
        columns = np.concatenate([batch.rows[: batch.n_candidates], batch.queued])
        frequency[columns] += 1 / times
        said[columns] = batch.log_inclusion.exp().numpy()
    free = np.array([i not in mine for i in range(n_items)]) & ~np.isnan(said)
    assert free.sum() >= 12
    assert np.abs(frequency - said)[free].max() < 0.06
    assert np.abs(frequency - said)[free].mean() < 0.02
    # Mostly neither 0 nor 1, so that this says something.
    assert ((said[free] > 0.05) & (said[free] < 0.95)).sum() >= 8
