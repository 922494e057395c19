"""Histories: packed against a loop, what may not be seen, interests, times and strengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from history_cases import LENGTHS, N_ITEMS, SEED, D, entries_of, side, stirred
from hypothesis import given, settings
from hypothesis import strategies as st

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
    History,
    MultiInterest,
    choose_interest,
    elapsed_buckets,
    seconds_to_next,
    strength_buckets,
)
from recsys.towers.history import segment_softmax as softmax_of_segments
from recsys.towers.two_tower import TowerRules, TwoTower


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ pooling and interests


def test_a_history_that_is_pooled_answers_only_after_its_last_entry() -> None:
    asked = replace(side([3]), at=torch.tensor([0, 2]))
    for pool in (History(D, "mean", 5), History(D, "attention", 5), MultiInterest(D, 2, 5)):
        with pytest.raises(ValueError, match="at every position"):
            pool(torch.randn(N_ITEMS, D), asked)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0])
def test_a_decaying_mean_by_hand(norm: float) -> None:
    pool, items = History(D, "mean", 5, norm=norm, decay=1.25), torch.randn(N_ITEMS, D)
    asked = side([3, 0, 1])
    first, _, last = entries_of(asked)
    weight = torch.tensor([3.0, 2.0, 1.0]) ** -1.25
    wanted = (items[first] * weight[:, None]).sum(0) / weight.sum() ** norm
    got = pool(items, asked)
    torch.testing.assert_close(got[0], wanted)
    torch.testing.assert_close(got[1], pool.empty)
    torch.testing.assert_close(got[2], items[last[0]])
    got.sum().backward()
    assert torch.isfinite(pool.empty.grad).all()


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0])
def test_the_norm_of_a_mean_by_hand(norm: float) -> None:
    pool, items = History(D, "mean", 5, norm=norm), torch.randn(N_ITEMS, D)
    asked = side([4, 0, 1])
    first = items[asked.history[:4]].sum(0) / 4**norm
    wanted = torch.stack([first, pool.empty, items[asked.history[4]]])
    torch.testing.assert_close(pool(items, asked), wanted)


def test_a_mean_reads_a_history_as_long_as_is_wanted() -> None:
    queries = Queries(np.zeros(1, np.int64), Ragged(np.array([0, 5000]), np.arange(5000) % 9))
    for most in (1000, 10**9):
        model = towers(history="mean", max_history=most, dropout=0.0)
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


@given(LENGTHS, st.integers(1, 4), st.integers(1, 30), SEED)
@settings(max_examples=20, deadline=None)
def test_interests_are_pooled_as_by_a_loop(
    lengths: list[int], interests: int, most: int, seed: int
) -> None:
    pool, asked = stirred(MultiInterest(D, interests, most), seed).float(), side(lengths, seed)
    items = torch.randn(N_ITEMS, D, requires_grad=True)
    out = []
    for rows in entries_of(asked):
        place = torch.arange(len(rows)).flip(0).clamp(max=most - 1)
        weight = (pool.content(items[rows]) + pool.place[place]).softmax(0)
        out.append(weight.T @ items[rows] if len(rows) else pool.empty)
    found, wanted = pool(items, asked), torch.stack(out)
    assert found.shape == (len(lengths), interests, D)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    mix = torch.randn_like(found)
    learned = [items, pool.place, pool.empty]
    for ours, theirs in zip(
        torch.autograd.grad((found * mix).sum(), learned, allow_unused=True),
        torch.autograd.grad((wanted * mix).sum(), learned, allow_unused=True),
        strict=True,
    ):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_first_interest_starts_with_what_came_last_and_each_further_one_farther_back() -> None:
    pool, asked = MultiInterest(N_ITEMS, 3, 9), side([5])
    asked = replace(asked, history=torch.arange(5))
    with torch.no_grad():
        pool.content[2].weight.zero_()  # places alone
    weight = pool(torch.eye(N_ITEMS), asked)[0, :, :5]  # (K, entries)
    assert (weight.diff(dim=1) > 0).all()
    assert (weight[:, -1].diff() < 0).all()


def test_two_dimensional_softmax_is_one_softmax_a_column() -> None:
    score, segment = torch.randn(9, 3), torch.tensor([2, 0, 0, 2, 1, 0, 2, 2, 1])
    found = softmax_of_segments(score, segment, 4)
    for column in range(3):
        alone = softmax_of_segments(score[:, column], segment, 4)
        torch.testing.assert_close(found[:, column], alone)


def test_the_interest_nearest_to_the_examples_own_item_is_chosen_and_learns_alone() -> None:
    users = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    users.requires_grad_()
    items = torch.tensor([[0.1, 0.9], [0.9, 0.1], [-0.2, -0.9]])
    chosen = choose_interest(users, items, torch.tensor([0, 0, 1]))
    assert chosen.tolist() == [[0, 1], [1, 0], [0, -1]]
    assert choose_interest(users, items[[0, 2]]).tolist() == [[0, 1], [0, -1]]
    chosen[[0, 2]].sum().backward()
    assert users.grad is not None
    assert users.grad.abs().sum(2).tolist() == [[0, 2], [0, 2]]


# ------------------------------------------------------------------ times and strengths


def test_buckets_by_hand() -> None:
    nan = math.nan
    seconds = torch.tensor([nan, -1.0, 0.0, 0.9, 1.0, 3.0, 3600.0, 1e30], dtype=torch.float64)
    assert elapsed_buckets(seconds).tolist() == [0, 0, 1, 1, 2, 3, 12, 33]
    strength = torch.tensor([nan, -1.0, 0.0, 1.0, 2.0, 3.0, 60.0, 1e30])
    assert strength_buckets(strength).tolist() == [0, 0, 1, 4, 5, 7, 17, 65]


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
        History(D, "mean", 9, inputs=("recency", "strength")),
        History(D, "attention", 9, inputs=("recency", "strength")),
        MultiInterest(D, 2, 9, inputs=("recency", "strength")),
        CausalTransformer(D, 9, inputs=("recency", "strength")),
    ],
    ids=["mean", "attention", "multi_interest", "transformer"],
)
def test_times_and_strengths_are_added_to_the_entries(pool: torch.nn.Module) -> None:
    pool.eval()
    asked, items = side([3, 2]), torch.randn(N_ITEMS, D)
    elapsed = torch.tensor([900.0, 60.0, 5.0, 70.0, math.nan])
    strength = torch.tensor([1.0, math.nan, 2.0, 3.0, 1.0])
    told = replace(asked, elapsed=elapsed, strength=strength)
    used = elapsed
    if isinstance(pool, CausalTransformer):
        used = torch.tensor([840.0, 55.0, 5.0, math.nan, math.nan])
    entries = (
        items[asked.history]
        + pool.inputs.recency.weight[elapsed_buckets(used)]
        + pool.inputs.strength.weight[strength_buckets(strength)]
    )
    plain = replace(asked, history=torch.arange(5))
    torch.testing.assert_close(pool(items, told), pool(entries, plain))
    # What is not known adds nothing, and learns nothing.
    unknown = torch.full((5,), math.nan)
    hidden = replace(asked, elapsed=unknown, strength=unknown)
    torch.testing.assert_close(pool(items, hidden), pool(items, asked))
    assert not torch.equal(pool(items, told), pool(items, asked))
    pool(items, hidden).sum().backward()
    for table in (pool.inputs.recency, pool.inputs.strength):
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
    settled = TowerRules(**{"dimension": D, "max_history": 6, "hidden": 8, **rules})
    model = TwoTower(settled, items, users, items.spec(7, {}), users.spec(4, {}), (3,))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


QUERIES = Queries(
    np.array([1, 0, 3]), Ragged.from_lists([[1, 2, 3, 4, 5, 6, 7, 8], [], [8]]),
    context=np.array([[1], [0], [2]]),
)  # fmt: skip


@pytest.mark.parametrize("score", ["cosine", "dot", "projection", "cosine_bias"])
def test_users_with_interests_have_one_vector_each(score: str) -> None:
    model = towers(history="multi_interest", interests=3, score=score)
    found = encode_users(model, QUERIES)
    assert found.shape == (3, 3, model.vector_dimension) == (3, *model.user_shape)
    if score != "dot":
        np.testing.assert_allclose(np.linalg.norm(found[..., :D], axis=-1), 1, atol=1e-5)
    if score == "cosine_bias":
        assert (found[..., D] == 1).all()
    newest = replace(QUERIES, history=QUERIES.history.last(6))
    np.testing.assert_allclose(encode_users(model, newest), found, atol=1e-6)
    other = replace(QUERIES, context=np.zeros((3, 1), np.int64))
    assert np.abs(encode_users(model, other) - found).max(axis=(1, 2))[[0, 2]].min() > 1e-3


def test_at_every_position_the_tower_knows_whose_query_it_is() -> None:
    model = towers(history="transformer", max_history=9)
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
    model = towers(history="mean", history_table="own")
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
    shared = towers(history="mean")
    embedded = shared.embed_items(rows)
    assert shared.embed_history(rows, embedded=embedded) is embedded


def test_rules_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="change history_heads or dimension"):
        TowerRules(dimension=12, history="transformer", history_heads=4)
    with pytest.raises(ValueError, match="item_id is false"):
        TowerRules(history_table="own", item_id=False)


@pytest.mark.parametrize("history", ["transformer", "multi_interest"])
def test_half_precision_works(history: str) -> None:
    model = towers(history=history, dropout=0.1, history_inputs=("recency",)).train()
    asked = replace(side([3, 0, 9]), elapsed=torch.rand(12), context=torch.ones(3, 1).long())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        users = model.encode_users(asked, model.embed_items(torch.arange(N_ITEMS)))
    users.sum().backward()
    assert users.dtype == torch.float32
    assert torch.isfinite(users).all()


def test_histories_that_are_all_empty_need_no_item() -> None:
    for pool in (CausalTransformer(D, 4), MultiInterest(D, 2, 4)):
        out = pool(torch.zeros(0, D), side([0, 0]))
        assert torch.equal(out, pool.empty.expand(2, *pool.empty.shape))


def test_times_are_refused_where_the_log_has_no_clock() -> None:
    untimed = SimpleNamespace(manifest={"timed": False})
    with pytest.raises(ConfigError, match="history_inputs names recency"):
        build_model(untimed, TowerRules(history_inputs=("recency",)), item_text=None, seed=0)


@pytest.mark.parametrize(
    ("plan", "history"),
    [
        ("sequences", "transformer"),
        ("random", "attention"),
        ("random", "multi_interest"),
        ("sequences", "transformer looking back"),
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
        strength=rng.integers(1, 4, len(user)).astype(np.float32),
    )  # fmt: skip
    events = TrainingEvents(timeline, timeline.strength, None, None, None, np.arange(1, N_ITEMS))
    history, look_back, _ = history.partition(" looking back")
    model = towers(
        history=history, max_history=20, history_inputs=("recency", "strength"),
        look_back=bool(look_back),
    )  # fmt: skip
    if model.user_tower.look_back is not None:
        torch.nn.init.normal_(model.user_tower.look_back.says.weight)
    batches = Batches(events, plan=plan, batch_size=99, max_history=20, elapsed=True, strength=True)
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
        assert asked.elapsed is not None and asked.strength is not None
        np.testing.assert_allclose(
            vectors[query].numpy(), encode_users(model, asked), rtol=1e-4, atol=1e-5
        )
        seen += len(batch)
    assert seen >= 10
