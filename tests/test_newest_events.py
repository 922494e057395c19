"""Learning from the newest events alone, and lists whose order picks the epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys.features.batching.batch import Queries
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.towers.data import ShownLists
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower

SIZE, N_ITEMS, N_USERS = 40, 41, 6


def timeline() -> Timeline:
    """Item i is chosen once, at time i, so that an example says which event it is."""
    return Timeline.build(
        1 + np.arange(SIZE) % (N_USERS - 1), np.arange(1, N_ITEMS, dtype=np.int32),
        np.arange(SIZE) * 1000, n_users=N_USERS, first_seen=np.zeros(N_ITEMS, np.int64),
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["random", "in_time"])
def test_older_events_are_history_and_no_examples(plan: str) -> None:
    past = timeline()
    learned = np.flatnonzero(np.asarray(past.time) >= 25_000)
    events = TrainingEvents(past, None, None, None, None, np.arange(1, N_ITEMS), learned)
    batches = list(Batches(events, sampler=plan, batch_size=4))  # type: ignore[arg-type]
    targets = [row for one in batches for row in one.rows[one.target].tolist()]
    assert sorted(targets) == list(range(26, N_ITEMS)) and events.size == 15
    read = {row for one in batches for row in one.rows[one.user.history].tolist()}
    assert set(range(1, 26)) <= read
    if plan == "random":
        # Each of the 15 is drawn by any of the other three with 1/15, and not counted among all 40.
        assert batches[0].log_inclusion.exp().tolist() == pytest.approx(
            [1 - (1 - 1 / 15) ** 3] * 4, rel=1e-4
        )


def test_whole_users_cannot_be_cut_by_time() -> None:
    events = TrainingEvents(timeline(), None, None, None, None, np.arange(1, 5), np.arange(3))
    with pytest.raises(ValueError, match="whole users"):
        Batches(events, sampler="by_user")


def test_lists_are_judged_by_pairs_of_clicked_and_passed() -> None:
    past, items = timeline(), FeatureTable(N_ITEMS)
    torch.manual_seed(3)
    model = TwoTower(
        TowerRules(dimension=4), items, FeatureTable(N_USERS), items.spec(N_ITEMS, {}),
        FeatureSpec(),
    ).eval()  # fmt: skip
    users, as_of_times = np.array([1, 2, 3]), np.array([30_000, 30_000, 38_000])
    queries = Queries(users, past.histories(users, as_of_times), as_of_times)
    shown = Ragged.from_lists([[3, 9, 27], [9, 4], [40, 5, 6, 9]])
    clicked = np.array([0, 1, 0, 1, 0, 0, 1, 0, 1], bool)
    vectors, people = encode_items(model, np.arange(N_ITEMS)), encode_users(model, queries)
    wanted = []
    for row in range(3):
        score = vectors[shown[row]] @ people[row]
        mine = clicked[shown.offsets[row] : shown.offsets[row + 1]]
        wanted.append(np.mean([float(a > b) for a in score[mine] for b in score[~mine]]))
    found = ShownLists(queries, shown, clicked, past, as_of_times).auc(model)
    assert found.tolist() == pytest.approx(wanted)
    assert len(set(wanted)) > 1  # a scorer that says the same of all would be seen
