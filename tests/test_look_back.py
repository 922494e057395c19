"""Looking back at each entry: against loops, at every position, and what a random code starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from history_cases import LENGTHS, N_ITEMS, SEED, D, entries_of, side, stirred
from hypothesis import given, settings
from torch.nn import functional as F

from recsys.errors import ConfigError
from recsys.features.batching.batch import Queries
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.history import LookBack
from recsys.towers.id_init import CODE_LENGTH, company, start
from recsys.towers.rules import TrainingRules
from recsys.towers.two_tower import TowerRules, TwoTower


def naive(look: LookBack, answer: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """(D,) the answer and what each entry says, one after the other."""
    said = answer.clone()
    for entry in entries:
        cosine = F.cosine_similarity(answer, entry, dim=0)
        weight = torch.sigmoid(look.sharpness * (cosine - look.threshold))
        said += answer.norm() * weight * (look.says.weight @ (entry / entry.norm()))
    return said


@given(lengths=LENGTHS, seed=SEED)
@settings(max_examples=25, deadline=None)
def test_looking_back_is_a_loop_over_the_entries(lengths: list[int], seed: int) -> None:
    look, asked = stirred(LookBack(D), seed), side(lengths, seed)
    rng = torch.Generator().manual_seed(seed)
    items = torch.randn(N_ITEMS, D, generator=rng, dtype=torch.float64)
    answers = torch.randn(len(lengths), D, generator=rng, dtype=torch.float64)
    got = look.float()(answers, items, asked)
    for user, entries in enumerate(entries_of(asked)):
        wanted = naive(look, answers[user].float(), items[entries].float())
        torch.testing.assert_close(got[user], wanted, rtol=1e-3, atol=1e-4)


@given(lengths=LENGTHS.filter(any), seed=SEED)
@settings(max_examples=25, deadline=None)
def test_at_every_position_it_sees_what_stands_up_to_there(lengths: list[int], seed: int) -> None:
    look, whole = stirred(LookBack(D), seed).float(), side(lengths, seed)
    rng = torch.Generator().manual_seed(seed)
    items = torch.randn(N_ITEMS, D, generator=rng)
    at = torch.arange(sum(lengths))[torch.rand(sum(lengths), generator=rng) < 0.6]
    answers = torch.randn(len(at), D, generator=rng)
    got = look(answers, items, replace(whole, at=at))
    ends = whole.lengths.cumsum(0)
    for query, place in enumerate(at.tolist()):
        first = max([0, *(end for end in ends.tolist() if end <= place)])
        entries = items[whole.history[first : place + 1]]
        torch.testing.assert_close(
            got[query], naive(look, answers[query], entries), rtol=1e-3, atol=1e-4
        )


def test_two_entries_by_hand() -> None:
    """An entry in the answer's direction speaks against itself, one across says next to nothing."""
    look = LookBack(2)
    asked = replace(side([2]), history=torch.tensor([0, 1]))
    items, answer = torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([[3.0, 0.0]])
    assert torch.equal(look(answer, items, asked), answer)
    with torch.no_grad():
        look.says.weight.copy_(-torch.eye(2))
    near, across = 1 / (1 + np.exp(-7.0)), 1 / (1 + np.exp(3.0))
    assert look(answer, items, asked)[0].tolist() == pytest.approx(
        [3 - 3 * near, -3 * across], abs=1e-5
    )


@pytest.mark.parametrize("history", ["none", "multi_interest"])
def test_without_one_answer_of_a_history_there_is_nothing_to_look_back_with(history: str) -> None:
    with pytest.raises(ValueError, match="look_back needs one answer made of a history"):
        TowerRules.model_validate({"history": history, "look_back": True})


# ------------------------------------------------------------------ random codes

USERS, ITEMS, TASTE = 40, 24, 8


def tastes(seed: int = 0) -> Timeline:
    """Each user has six of the eight items of one of three tastes."""
    rng = np.random.default_rng(seed)
    item = np.concatenate(
        [1 + TASTE * (user % 3) + rng.permutation(TASTE)[:6] for user in range(1, USERS)]
    )
    return Timeline.build(
        np.repeat(np.arange(1, USERS), 6), item.astype(np.int32), np.tile(np.arange(6), USERS - 1),
        n_users=USERS, first_seen=np.zeros(ITEMS + 1, np.int64), timed=False,
    )  # fmt: skip


def started(code: int, **rules: object) -> TwoTower:
    torch.manual_seed(0)
    items = FeatureTable(ITEMS + 1)
    model = TwoTower(
        TowerRules.model_validate({"dimension": 67, "hidden": 0, "history": "mean", **rules}),
        items, FeatureTable(USERS), items.spec(ITEMS + 1, {}), FeatureSpec(),
    )  # fmt: skip
    start(model, tastes(), TrainingRules(start="company", start_code=code), 0)
    return model.eval()


def test_a_code_stands_behind_company_and_is_of_one_length() -> None:
    table = started(64).item_tower.inputs.ids.weight[1:].detach().numpy()
    near, codes = table[:, :3], table[:, 3:]
    share = np.linalg.norm(codes, axis=1) / np.linalg.norm(near, axis=1)
    np.testing.assert_allclose(share, CODE_LENGTH, rtol=1e-5)
    wanted = company(tastes(), 3, 0)[1:]
    np.testing.assert_allclose(
        near / np.linalg.norm(near, axis=1, keepdims=True), wanted, atol=1e-5
    )
    cosine = codes @ codes.T / np.square(np.linalg.norm(codes[0]))
    assert np.abs(cosine - np.eye(ITEMS)).max() < 0.6  # of items of one taste, too


def test_what_a_user_had_starts_behind_what_is_like_it() -> None:
    """With the code first come the two items of the taste that the user did not have."""
    timeline = tastes()
    users = np.arange(1, USERS)
    queries = Queries(users, timeline.histories(users))

    def missing_first(model: TwoTower) -> float:
        scores = encode_users(model, queries) @ encode_items(model, np.arange(ITEMS + 1)).T
        best = np.argsort(-scores[:, 1:], axis=1)[:, :2] + 1
        hits = []
        for user, ranked in zip(users, best, strict=True):
            had = set(queries.history[user - 1].tolist())
            mine = {1 + TASTE * (int(user) % 3) + i for i in range(TASTE)}
            hits.append(set(ranked.tolist()) == mine - had)
        return float(np.mean(hits))

    assert missing_first(started(64, look_back=True)) > 0.9
    assert missing_first(started(64)) < 0.1
    assert missing_first(started(0, look_back=True)) < 0.1


def test_a_code_needs_company_and_room_beside_it() -> None:
    with pytest.raises(ValueError, match='start_code is of start = "company"'):
        TrainingRules(start="spectral", start_code=4)
    with pytest.raises(ConfigError, match=r"start_code is 67, and towers.dimension is 67"):
        started(67)


def test_the_history_of_one_user_is_ragged_like_that_of_many() -> None:
    """What is asked alone is answered as among others."""
    model, timeline = started(64, look_back=True), tastes()
    users = np.arange(1, USERS)
    together = encode_users(model, Queries(users, timeline.histories(users)))
    alone = encode_users(model, Queries(users[:1], Ragged.from_lists([timeline.by_user[1]])))
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
