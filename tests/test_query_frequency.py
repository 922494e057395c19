"""How often a user asks: what item → user is corrected by, by hand and by counting batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from recsys.features.batching.batch import Batch
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.logq import QueryFrequency
from recsys.features.prepared.timeline import Timeline
from recsys.towers.logits import BatchLogits
from recsys.towers.losses import softmax


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def busy(seed: int = 0, users: int = 60, items: int = 15, events: int = 900) -> TrainingEvents:
    """User u chooses about 1/u of what user 1 does, over and over, in random order."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, users + 1)
    user = 1 + np.concatenate(
        [np.arange(users), rng.choice(users, events - users, p=share / share.sum())]
    )
    taste = np.sort(rng.integers(1, items, (users + 1, 3)), axis=1)
    item = taste[user, rng.integers(0, 3, events)].astype(np.int32)
    timeline = Timeline.build(
        user, item, rng.permutation(events) * 1_000_000, n_users=users + 1,
        first_seen=np.zeros(items, np.int64),
    )  # fmt: skip
    return TrainingEvents(timeline, None, None, None, None, np.arange(1, items))


def columns_of(batch: Batch) -> np.ndarray:
    """User of each query of a batch."""
    side = batch.user
    if side.at is None:
        return side.users.numpy()
    return np.repeat(side.users.numpy(), side.lengths.numpy())[side.at.numpy()]


@pytest.mark.parametrize("plan", ["random", "in_time", "by_user", "sequences"])
def test_weighted_by_how_often_they_ask_the_others_of_a_batch_are_every_user_once(
    plan: str,
) -> None:
    """Sum of the weights of all columns of other users: on average the number of other users."""
    events, size = busy(), 40 if plan in ("random", "in_time") else 9
    batches = Batches(events, sampler=plan, batch_size=size, symmetric=True, max_history=8)
    total, count, uncorrected = 0.0, 0, Counter()
    for _ in range(60 if plan in ("by_user", "sequences") else 20):
        for batch in batches:
            user = columns_of(batch)
            weight = np.exp(-batch.user_log_inclusion.numpy().astype(float))
            assert len(weight) == batch.n_queries == len(user)
            # Each unit that was drawn looks at the columns of the other users.
            for one in np.unique(user) if plan in ("by_user", "sequences") else user[::7]:
                total += weight[user != one].sum()
                count += 1
            uncorrected.update(user.tolist())
    assert total / count == pytest.approx(59, rel=0.12 if plan == "in_time" else 0.05)
    if plan != "by_user":
        assert max(uncorrected.values()) > 3 * min(uncorrected.values())


def test_expected_queries_of_a_user_by_hand() -> None:
    timeline = Timeline.build(
        np.array([1, 1, 1, 2, 2, 3]), np.array([1, 2, 3, 1, 2, 1], np.int32), np.arange(6),
        n_users=5, first_seen=np.zeros(4, np.int64), timed=False,
    )  # fmt: skip
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, 4))
    users = np.array([1, 2, 3])
    wanted = {
        "random": [3 / 6, 2 / 6, 1 / 6],  # events of all events
        "by_user": [1 / 3, 1 / 3, 1 / 3],  # each asks once
        "sequences": [2 / 2, 1 / 2, 0],  # user 3 has nothing before its only event
    }
    for plan, share in wanted.items():
        batches = Batches(events, sampler=plan, batch_size=3, symmetric=True)
        asking = QueryFrequency(timeline, batches.query_kind)
        np.testing.assert_allclose(asking.share[users], share)
        (batch,) = list(batches)[:1]
        drawn = 3 if plan != "sequences" else 2
        np.testing.assert_allclose(
            batch.user_log_inclusion.exp(),
            np.array(share)[columns_of(batch) - 1] * (drawn - 1), rtol=1e-5,
        )  # fmt: skip
    assert next(iter(Batches(events, batch_size=3))).user_log_inclusion is None


def test_the_correction_of_users_brings_item_to_user_nearer_to_all_users() -> None:
    """Gradient of the item vectors, over many batches, against a softmax over every user once."""
    events = busy()
    timeline = events.timeline
    torch.manual_seed(0)
    users = nn.functional.normalize(torch.randn(61, 4), dim=1)
    tables = {name: torch.nn.Parameter(torch.randn(15, 4)) for name in ("all", True, False)}
    with torch.no_grad():
        for table in tables.values():
            table.copy_(tables["all"])
    known = torch.zeros(61, 15, dtype=torch.bool)
    known[torch.from_numpy(timeline.user), torch.from_numpy(timeline.item).long()] = True
    every = (tables["all"] @ users.T).T / 0.5  # (users, items)
    every = every.masked_fill(known, -torch.inf)[1:]
    item = torch.from_numpy(timeline.item).long()
    mass = torch.logsumexp(every, 0)[item]
    positive = (tables["all"][item] * users[timeline.user]).sum(1) / 0.5
    (torch.logaddexp(mass, positive) - positive).mean().backward()
    wanted = tables["all"].grad
    batches = Batches(events, batch_size=90, symmetric=True)
    rounds = 25
    for _ in range(rounds):
        for batch in batches:
            for corrected in (True, False):
                table = tables[corrected]
                scores = BatchLogits(
                    users=users[batch.user.users], items=table[batch.rows[: batch.n_candidates]],
                    target=batch.target, temperature=0.5, log_weight=-batch.log_inclusion,
                    positive_mask=batch.positive_mask,
                    user_log_weight=-batch.user_log_inclusion if corrected else None,
                )  # fmt: skip
                (softmax(scores.transposed()).sum() / (rounds * events.size)).backward()
    bias = {name: (tables[name].grad - wanted).norm() / wanted.norm() for name in (True, False)}
    assert bias[True] < 0.5 * bias[False], bias
