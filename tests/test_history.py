"""Histories: pooled against a loop, what may not be seen, times and event weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from history_cases import LENGTHS, N_ITEMS, SEED, D, entries_of, side
from hypothesis import given, settings

from recsys.errors import ConfigError
from recsys.features.batching.batch import Queries, UserSide
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.examples import asking
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.towers.build import build_model
from recsys.towers.causal_transformer import CausalTransformer
from recsys.towers.embedding import FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.history import (
    EntryInputs,
    PooledHistory,
    elapsed_buckets,
    seconds_to_next,
    weight_buckets,
)
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ pooling


def test_a_history_that_is_pooled_answers_only_after_its_last_entry() -> None:
    asked = replace(side([3]), at=torch.tensor([0, 2]))
    for pool in (
        PooledHistory(D, 5, decay=0.0),
        PooledHistory(D, 5),
    ):
        with pytest.raises(ValueError, match="at every position"):
            pool(torch.randn(N_ITEMS, D), asked)


def test_a_decaying_mean_by_hand() -> None:
    pool, items = PooledHistory(D, 5, decay=1.25), torch.randn(N_ITEMS, D)
    asked = side([3, 0, 1])
    first, _, last = entries_of(asked)
    weight = torch.tensor([3.0, 2.0, 1.0]) ** -1.25
    wanted = (items[first] * weight[:, None]).sum(0) / weight.sum()
    got = pool(items, asked)
    torch.testing.assert_close(got[0], wanted)
    torch.testing.assert_close(got[1], pool.empty)
    torch.testing.assert_close(got[2], items[last[0]])
    got.sum().backward()
    assert torch.isfinite(pool.empty.grad).all()


def test_a_mean_reads_a_history_as_long_as_is_wanted() -> None:
    queries = Queries(np.zeros(1, np.int64), Ragged(np.array([0, 5000]), np.arange(5000) % 9))
    for most in (1000, 10**9):
        model = towers(history={"kind": "mean", "length": most}, dropout=0.0)
        read = queries.history.values[-most:]
        with torch.inference_mode():
            pooled = model.embed_items(torch.from_numpy(read)).mean(0)
            wanted = model.user_tower.deep(pooled + model.user_tower.features(
                torch.zeros(1).long(), model.users
            ))  # fmt: skip
        found = torch.from_numpy(encode_users(model, queries))
        torch.testing.assert_close(
            found, torch.nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5
        )


# ------------------------------------------------------------------ times and strengths


def test_buckets_by_hand() -> None:
    nan = math.nan
    seconds = torch.tensor([nan, -1.0, 0.0, 0.9, 1.0, 3.0, 3600.0, 1e30], dtype=torch.float64)
    assert elapsed_buckets(seconds).tolist() == [0, 0, 1, 1, 2, 3, 12, 33]
    weight = torch.tensor([nan, -1.0, 0.0, 1.0, 2.0, 3.0, 60.0, 1e30])
    assert weight_buckets(weight).tolist() == [0, 0, 1, 4, 5, 7, 17, 65]


@given(LENGTHS, SEED)
@settings(max_examples=25, deadline=None)
def test_seconds_to_the_next_entry_add_up_to_those_to_the_query(
    lengths: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    gaps = [rng.integers(0, 100, n).astype(float) for n in lengths]
    elapsed = [g[::-1].cumsum()[::-1] for g in gaps]
    found = seconds_to_next(torch.tensor(np.concatenate(elapsed)), torch.tensor(lengths))
    assert found.tolist() == np.concatenate(gaps).tolist()


@pytest.mark.parametrize(
    "pool",
    [
        PooledHistory(D, 9, decay=0.0, inputs=("recency", "weight")),
        PooledHistory(D, 9, inputs=("recency", "weight")),
        CausalTransformer(D, 9, inputs=("recency", "weight")),
    ],
    ids=["mean", "attention", "transformer"],
)
def test_times_and_strengths_are_added_to_the_entries(pool: torch.nn.Module) -> None:
    pool.eval()
    asked, items = side([3, 2]), torch.randn(N_ITEMS, D)
    elapsed = torch.tensor([900.0, 60.0, 5.0, 70.0, math.nan])
    weight = torch.tensor([1.0, math.nan, 2.0, 3.0, 1.0])
    told = replace(asked, elapsed=elapsed, event_weight=weight)
    used = elapsed
    if isinstance(pool, CausalTransformer):
        used = torch.tensor([840.0, 55.0, 5.0, math.nan, math.nan])
    entries = (
        items[asked.history]
        + pool.inputs.recency.weight[elapsed_buckets(used)]
        + pool.inputs.weight.weight[weight_buckets(weight)]
    )
    plain = replace(asked, history=torch.arange(5))
    torch.testing.assert_close(pool(items, told), pool(entries, plain))
    # What is not known adds nothing, and learns nothing.
    unknown = torch.full((5,), math.nan)
    hidden = replace(asked, elapsed=unknown, event_weight=unknown)
    torch.testing.assert_close(pool(items, hidden), pool(items, asked))
    assert not torch.equal(pool(items, told), pool(items, asked))
    pool(items, hidden).sum().backward()
    for table in (pool.inputs.recency, pool.inputs.weight):
        assert table.weight.grad is None or not table.weight.grad[0].any()


def test_in_training_all_times_of_some_users_are_hidden() -> None:
    inputs = EntryInputs(2, ("recency",), hidden=0.3)
    with torch.no_grad():
        inputs.recency.weight.fill_(1.0)
        inputs.recency.weight[0] = 0
    users = 4000
    asked = replace(side([3] * users), elapsed=torch.ones(3 * users))
    torch.manual_seed(0)
    entries, _ = inputs(torch.zeros(N_ITEMS, 2), asked)
    shown = entries.view(users, 6)
    assert ((shown == 0).all(1) | (shown == 1).all(1)).all()
    assert shown[:, 0].mean().item() == pytest.approx(0.7, abs=0.03)
    assert (inputs.eval()(torch.zeros(N_ITEMS, 2), asked)[0] == 1).all()


# ------------------------------------------------------------------ in the towers


def towers(seed: int = 0, **rules: object) -> TwoTower:
    torch.manual_seed(seed)
    items, users = FeatureTable(N_ITEMS, text=torch.randn(N_ITEMS, 3)), FeatureTable(5)
    settled = TowerRules(**{"dimension": D, "history": {"length": 6}, "hidden": 8, **rules})
    model = TwoTower(settled, items, users, items.spec(7, {}), users.spec(4, {}), (3,))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


QUERIES = Queries(
    np.array([1, 0, 3]), Ragged.from_lists([[1, 2, 3, 4, 5, 6, 7, 8], [], [8]]),
    context=np.array([[1], [0], [2]]),
)  # fmt: skip


def test_at_every_position_the_tower_knows_whose_query_it_is() -> None:
    model = towers(history={"kind": "transformer", "length": 9})
    lists = [[1, 2, 3], [4], [5, 6, 7, 8]]
    users = torch.tensor([3, 1, 2])
    flat = torch.tensor([i for row in lists for i in row])
    context = torch.tensor([1, 2, 0, 1, 2, 0, 1, 2])[:, None]
    embedded = model.embed_items(torch.arange(N_ITEMS))
    everywhere = model.encode_users(
        UserSide(users, flat, torch.tensor([3, 1, 4]), context, at=torch.arange(8)), embedded
    )
    at = 0
    for user, row in zip(users, lists, strict=True):
        for end in range(1, len(row) + 1):
            one = UserSide(
                user[None], torch.tensor(row[:end]), torch.tensor([end]), context[at : at + 1]
            )
            torch.testing.assert_close(model.encode_users(one, embedded)[0], everywhere[at])
            at += 1


def test_a_table_of_their_own_is_what_histories_read_and_items_do_not() -> None:
    model = towers(history={"kind": "mean", "table": "own", "length": 6})
    items, users = encode_items(model, np.arange(N_ITEMS)), encode_users(model, QUERIES)
    own = model.user_tower.history_ids
    assert own is not None and own.sparse and own.weight.shape == (7, D)
    with torch.no_grad():
        own.weight.add_(1)
    assert np.array_equal(encode_items(model, np.arange(N_ITEMS)), items)
    changed = np.abs(encode_users(model, QUERIES) - users).max(1)
    assert changed[0] > 1e-3 and changed[1] == 0 and changed[2] > 1e-3
    moved = encode_users(model, QUERIES)
    with torch.no_grad():
        model.item_tower.inputs.ids.weight.add_(1)
    assert np.array_equal(encode_users(model, QUERIES), moved)
    # The content is read by both.
    with torch.no_grad():
        model.item_tower.inputs.text.weight.add_(1)
    assert not np.array_equal(encode_users(model, QUERIES), moved)
    rows = torch.arange(N_ITEMS)
    embedded = model.embed_items(rows)
    assert not torch.equal(model.embed_history(rows, embedded=embedded), embedded)
    shared = towers(history={"kind": "mean"})
    embedded = shared.embed_items(rows)
    assert shared.embed_history(rows, embedded=embedded) is embedded


def test_rules_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"change history\.heads or dimension"):
        TowerRules(dimension=12, history={"kind": "transformer", "heads": 4})
    with pytest.raises(ValueError, match=r"id_dropout = 1 leaves them out"):
        TowerRules(history={"table": "own"}, id_dropout=1)


@pytest.mark.parametrize("history", ["transformer", "attention"])
def test_half_precision_works(history: str) -> None:
    model = towers(history={"kind": history, "inputs": ("recency",)}, dropout=0.1).train()
    asked = replace(side([3, 0, 9]), elapsed=torch.rand(12), context=torch.ones(3, 1).long())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        users = model.encode_users(asked, model.embed_items(torch.arange(N_ITEMS)))
    users.sum().backward()
    assert users.dtype == torch.float32
    assert torch.isfinite(users).all()


def test_histories_that_are_all_empty_need_no_item() -> None:
    for pool in (CausalTransformer(D, 4), PooledHistory(D, 4)):
        out = pool(torch.zeros(0, D), side([0, 0]))
        assert torch.equal(out, pool.empty.expand(2, *pool.empty.shape))


def test_times_are_refused_where_the_log_has_no_clock() -> None:
    untimed = SimpleNamespace(manifest={"timed": False})
    with pytest.raises(ConfigError, match=r"history\.inputs names recency"):
        build_model(untimed, TowerRules(history={"inputs": ("recency",)}), item_text=None, seed=0)


@pytest.mark.parametrize(
    ("plan", "history"),
    [
        ("sequences", "transformer"),
        ("random", "attention"),
    ],
)
def test_what_is_learned_from_is_what_is_asked_when_serving(plan: str, history: str) -> None:
    """Every query of an epoch has the vector that serving gives the user just before its event."""
    rng = np.random.default_rng(4)
    user = np.repeat(np.arange(1, 5), [8, 1, 5, 3])
    item = np.concatenate([rng.permutation(np.arange(1, N_ITEMS))[:n] for n in (8, 1, 5, 3)])
    time = 10**15 + rng.integers(0, 12, len(user)) * 400_000_000  # some at the same moment
    timeline = Timeline.build(
        user, item, time, n_users=5, first_seen=np.zeros(N_ITEMS, np.int64),
        event_weight=rng.integers(1, 4, len(user)).astype(np.float32),
    )  # fmt: skip
    events = TrainingEvents(
        timeline, timeline.event_weight, None, None, None, np.arange(1, N_ITEMS)
    )
    model = towers(history={"kind": history, "length": 20, "inputs": ("recency", "weight")})
    batches = Batches(
        events, sampler=plan, batch_size=99, max_history=20, elapsed=True, event_weight=True
    )
    seen = 0
    for batch in batches:
        vectors = model.encode_users(batch.user, model.embed_history(batch.rows)).detach()
        query = torch.arange(len(batch)) if batch.owner is None else batch.owner
        users = batch.user.users
        if batch.user.at is not None:
            users = users[torch.repeat_interleave(batch.user.lengths)[batch.user.at]]
        users = users[query].numpy()
        targets = batch.rows[batch.target].numpy()
        event = [
            int(np.flatnonzero((timeline.user == u) & (timeline.item == i))[0])
            for u, i in zip(users, targets, strict=True)
        ]
        asked = asking(timeline, users, timeline.time[event], last=20)
        assert asked.elapsed is not None and asked.event_weight is not None
        np.testing.assert_allclose(
            vectors[query].numpy(), encode_users(model, asked), rtol=1e-4, atol=1e-5
        )
        seen += len(batch)
    assert seen >= 10
