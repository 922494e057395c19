"""Hard negatives from the model's own ranking, and the memory bank of a queue."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from recsys.errors import ConfigError
from recsys.features.batching.batch import Source
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.examples import asking
from recsys.features.prepared.timeline import Timeline
from recsys.search import ExactIndex
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.memory_bank import MemoryBank
from recsys.towers.mining import draw, from_state, mine, mine_again, to_state
from recsys.towers.rules import MiningRules, TowerRules
from recsys.towers.two_tower import TwoTower

N_ITEMS, PEOPLE = 41, 13


def scene(seed: int = 0, timed: bool = True, **rules: Any) -> tuple[TwoTower, Timeline]:
    """Random towers and a random log; the last three users have had nothing."""
    rng = np.random.default_rng(seed)
    size = 90
    timeline = Timeline.build(
        rng.integers(1, PEOPLE - 3, size), rng.integers(1, N_ITEMS, size).astype(np.int32),
        rng.integers(0, 1000, size), n_users=PEOPLE, first_seen=np.zeros(N_ITEMS, np.int64),
        timed=timed,
    )  # fmt: skip
    items = FeatureTable(N_ITEMS)
    settled = TowerRules(**{"dimension": 8, "hidden": 8, "history": {"length": 5}, **rules})
    torch.manual_seed(seed)
    model = TwoTower(settled, items, FeatureTable(PEOPLE), items.spec(N_ITEMS, {}), FeatureSpec())
    with torch.no_grad():
        model.item_tower.inputs.ids.weight.normal_()
    return model.eval(), timeline


def ranks(model: TwoTower, timeline: Timeline, user: int) -> list[int]:
    """Items that the user has not had, best first; a slow twin of the search."""
    vectors = encode_items(model, np.arange(N_ITEMS))
    asked = asking(timeline, np.array([user]), last=5, as_of=int(timeline.time.max()) + 1)
    scores = vectors @ encode_users(model, asked)[0]
    had = set(timeline.by_user[user].tolist())
    return sorted(set(range(1, N_ITEMS)) - had, key=lambda item: -scores[item])


def found_for(mined: Any, user: int) -> list[int]:
    return mined.items[mined.offsets[user] : mined.offsets[user + 1]].tolist()


# --- mining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["mean", "attention"])
@pytest.mark.parametrize("timed", [True, False])
def test_everything_in_the_window_is_mined_best_first(history: str, timed: bool) -> None:
    model, timeline = scene(timed=timed, history={"kind": history, "length": 5})
    mined = mine(model, timeline, MiningRules(per_query=50, from_rank=3, to_rank=11))
    assert mined.n_users == PEOPLE
    for user in range(PEOPLE):
        wanted = ranks(model, timeline, user)[3:11] if len(timeline.by_user[user]) else []
        assert found_for(mined, user) == wanted, user
    assert (mined.weights == 1).all() and mined.weights.dtype == np.float32


def test_what_a_user_has_had_is_never_mined_for_it() -> None:
    model, timeline = scene()
    mined = mine(model, timeline, MiningRules(per_query=50, from_rank=0, to_rank=N_ITEMS))
    for user in range(PEOPLE):
        had, found = set(timeline.by_user[user].tolist()), found_for(mined, user)
        assert not had & set(found) and len(found) == len(set(found))
        assert not had or len(found) == N_ITEMS - 1 - len(had)  # and nothing else is left out


def test_only_so_many_of_the_window_are_drawn_anew_each_epoch_and_alike_for_a_seed() -> None:
    model, timeline = scene()
    rules = MiningRules(per_query=3, from_rank=2, to_rank=12, weight=2.5)
    first = mine(model, timeline, rules, epoch=1)
    for user in range(1, PEOPLE - 3):
        window = ranks(model, timeline, user)[2:12]
        found = found_for(first, user)
        assert len(found) == 3 and set(found) <= set(window)
        assert found == sorted(found, key=window.index)
    assert (first.weights == 2.5).all()
    np.testing.assert_array_equal(first.items, mine(model, timeline, rules, epoch=1).items)
    assert not np.array_equal(first.items, mine(model, timeline, rules, epoch=2).items)
    assert not np.array_equal(first.items, mine(model, timeline, rules, epoch=1, seed=1).items)


def test_blocks_of_users_change_nothing_that_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, timeline = scene()
    rules = MiningRules(per_query=50, from_rank=3, to_rank=11)
    whole = mine(model, timeline, rules)
    monkeypatch.setattr("recsys.towers.mining.USERS_AT_ONCE", 4)
    blocks = mine(model, timeline, rules)
    np.testing.assert_array_equal(whole.items, blocks.items)
    np.testing.assert_array_equal(whole.offsets, blocks.offsets)


def test_draws_are_without_replacement_and_all_alike() -> None:
    rng = np.random.default_rng(0)
    eligible = np.zeros((4000, 9), bool)
    eligible[:, [1, 3, 4, 8]] = True
    drawn = draw(eligible, 2, rng)
    assert (drawn.sum(1) == 2).all() and not drawn[~eligible].any()
    np.testing.assert_allclose(drawn[:, [1, 3, 4, 8]].mean(0), 0.5, atol=0.04)
    few = draw(eligible[:5], 7, rng)
    np.testing.assert_array_equal(few, eligible[:5])


def test_only_candidates_that_exist_are_mined() -> None:
    model, timeline = scene()
    later = timeline.exists_from.copy()
    later[[7, 8, 9]] = 10**9
    timeline = Timeline(
        timeline.user_offsets, timeline.item, timeline.time, timeline.first_seen, later, None, True
    )
    rules = MiningRules(per_query=50, from_rank=0, to_rank=N_ITEMS)
    assert set(mine(model, timeline, rules).items) == set(range(1, N_ITEMS)) - {7, 8, 9}
    some = mine(model, timeline, rules, candidates=np.arange(5, 20))
    assert set(some.items) == set(range(5, 20)) - {7, 8, 9}


def test_the_search_goes_through_the_index_that_was_handed_down() -> None:
    model, timeline = scene()
    asked: list[int] = []

    class Watched(ExactIndex):
        def search(self, queries: np.ndarray, k: int, **filters: Any) -> Any:
            asked.append(k)
            return super().search(queries, k, **filters)

    rules = MiningRules(per_query=3, from_rank=2, to_rank=12)
    mined = mine(model, timeline, rules, make_index=Watched)
    assert asked == [12]
    np.testing.assert_array_equal(mined.items, mine(model, timeline, rules).items)


def test_a_catalogue_that_is_too_small_is_told() -> None:
    model, timeline = scene()
    with pytest.raises(ConfigError, match=r"from_rank is 100, but there are 40 items"):
        mine(model, timeline, MiningRules(per_query=3))
    with pytest.raises(ValidationError, match="nothing is between"):
        MiningRules(from_rank=500)


def test_the_batches_of_an_epoch_get_what_was_mined_before_it() -> None:
    model, timeline = scene()
    candidates = np.arange(1, 30)
    batches = Batches(TrainingEvents(timeline, None, None, None, None, candidates), batch_size=32)
    rules = MiningRules(per_query=2, from_rank=1, to_rank=12)
    assert not mine_again(model, batches, rules, 0) and batches.mined is None
    assert not len(next(iter(batches)).per_query_source)
    assert mine_again(model, batches, rules, 1)
    assert batches.mined is not None and set(batches.mined.items) <= set(candidates)
    batch = next(iter(batches))
    mined = batch.per_query_source == Source.MINED
    assert mined.all() and len(mined) > 32
    users = batch.user.users[batch.per_query[0]].tolist()
    for user, item in zip(users, batch.rows[batch.per_query[1]].tolist(), strict=True):
        assert item in found_for(batches.mined, user)
    before = batches.mined
    assert not mine_again(model, batches, rules, 2) and batches.mined is before


def test_a_checkpoint_keeps_what_was_mined() -> None:
    model, timeline = scene()
    mined = mine(model, timeline, MiningRules(per_query=2, from_rank=1, to_rank=12))
    file = io.BytesIO()
    torch.save(to_state(mined), file)
    file.seek(0)
    again = from_state(torch.load(file, weights_only=True))
    assert again is not None
    for name in ("offsets", "items", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mined, name))
        assert getattr(again, name).dtype == getattr(mined, name).dtype
    assert to_state(None) == {} and from_state({}) is None


# --- remembered vectors ---------------------------------------------------------------------------


def test_what_was_written_last_is_read_and_what_never_was_is_told() -> None:
    memory = MemoryBank(6, 3)
    first, second = torch.randn(3, 3), torch.randn(2, 3)
    memory.write(torch.tensor([1, 4, 2]), first)
    memory.write(torch.tensor([4, 5]), second)
    vectors, there = memory.read(torch.tensor([5, 3, 4, 1]))
    assert there.tolist() == [True, False, True, True]
    torch.testing.assert_close(vectors[[0, 2, 3]], torch.stack([second[1], second[0], first[0]]))
    assert memory.read(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3)


def test_remembered_vectors_have_no_gradient_and_a_read_is_a_copy() -> None:
    memory = MemoryBank(4, 2)
    weight = torch.randn(2, 2, requires_grad=True)
    memory.write(torch.tensor([0, 1]), weight * 3)
    assert not memory.vectors.requires_grad
    user = torch.ones(2, requires_grad=True)
    read, _ = memory.read(torch.tensor([0, 1]))
    kept = read.clone()
    loss = (read @ user).sum()
    memory.write(torch.tensor([0, 1]), torch.zeros(2, 2))  # before the backward pass
    loss.backward()
    torch.testing.assert_close(user.grad, kept.sum(0))
    torch.testing.assert_close(read, kept)
    assert weight.grad is None


def test_a_checkpoint_of_the_memory_is_exact() -> None:
    memory, again = MemoryBank(5, 2), MemoryBank(5, 2)
    memory.write(torch.tensor([1, 3]), torch.randn(2, 2).to(torch.bfloat16))
    again.load_state_dict(memory.state_dict())
    rows = torch.arange(5)
    for one, other in zip(memory.read(rows), again.read(rows), strict=True):
        assert torch.equal(one, other)
    assert again.vectors.dtype == torch.float32
