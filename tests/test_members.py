"""Members of an ensemble: against towers that stand alone, and that each learns by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_plans import world
from test_towers import N_ITEMS, side, towers
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.errors import ConfigError
from recsys.features.batching.batches import Batches
from recsys.towers.data import plan_of
from recsys.towers.ensemble import Members, side_by_side, unit_vectors
from recsys.towers.id_init import start
from recsys.towers.logits import Scores
from recsys.towers.losses import of_members, softmax
from recsys.towers.rules import TrainingRules
from recsys.towers.training import objective_of
from recsys.towers.two_tower import TowerRules, TwoTower

HISTORIES = [[3, 1, 4], [], [5], [2, 6, 7, 8], [1]]
MEMBERS, WIDTH = 3, 4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors(model: TwoTower) -> tuple[Tensor, Tensor]:
    """User and item vectors of all histories and items."""
    rows = torch.arange(N_ITEMS)
    users = model.encode_users(side(HISTORIES), model.embed_history(rows))
    return users, model.item_tower(model.embed_items(rows))


def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=rng))
    return model.eval()


def alone(several: TwoTower, number: int) -> TwoTower:
    """A tower by itself with what one member has: its part of what is wide, its own of the rest."""
    rules = several.rules.model_dump(exclude={"statistics"})
    one = towers(**rules | {"dimension": WIDTH, "members": 1})
    part = slice(number * WIDTH, (number + 1) * WIDTH)
    state, wide = one.state_dict(), several.state_dict()
    for name, weight in state.items():
        own = name.replace("deep.", f"deep.each.{number}.")
        own = own.replace("user_tower.history.", f"user_tower.history.each.{number}.")
        if own != name and own in wide:
            state[name] = wide[own]
        elif weight.shape[0] == WIDTH and wide[name].shape[0] == WIDTH * MEMBERS:
            state[name] = wide[name][part]  # a linear layer's rows
        else:
            state[name] = wide[name][:, part]  # a table's columns
    one.load_state_dict(state)
    return one.eval()


@pytest.mark.parametrize(
    "rules",
    [
        {"history": "attention"},
        {"history": "mean", "history_decay": 0.5, "history_table": "offset"},
        {"history": "transformer", "history_hidden": 5, "history_table": "own"},
        {"history": "none", "hidden": 0},
    ],
    ids=lambda rules: rules["history"],
)
def test_the_score_is_the_mean_of_the_cosines_of_towers_that_stand_alone(rules: dict) -> None:
    several = stirred(towers(dimension=MEMBERS * WIDTH, members=MEMBERS, **rules))
    users, items = vectors(several)
    torch.testing.assert_close(items.norm(dim=1), torch.ones(N_ITEMS))
    cosines = []
    for number in range(MEMBERS):
        u, i = vectors(alone(several, number))
        cosines.append(u @ i.T)
    torch.testing.assert_close(users @ items.T, torch.stack(cosines).mean(0), atol=1e-5, rtol=1e-4)


def test_vectors_start_as_long_in_each_part_as_they_would_alone() -> None:
    lengths = []
    for members in (1, 16):
        inputs = towers(dimension=64 * members, members=members).item_tower.inputs
        lengths.append(
            [
                vectors.unflatten(-1, (members, 64)).norm(dim=-1).mean().item()
                for vectors in (inputs.ids.weight[1:], inputs.text.weight.T)
            ]
        )
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)


def test_one_member_is_the_module_itself() -> None:
    layer = nn.Linear(2, 2)
    assert side_by_side(lambda: layer, 1) is layer
    assert isinstance(side_by_side(lambda: nn.Linear(2, 2), 2), Members)


def test_unit_vectors_by_hand() -> None:
    got = unit_vectors(torch.tensor([[3.0, 4.0, 0.0, -2.0]]), 2) * 2**0.5
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8, 0.0, -1.0]]))


def of_vectors(users: Tensor, items: Tensor, queued: Tensor | None = None) -> Scores:
    more = 0 if queued is None else len(queued)
    return Scores(
        users=users, items=items, target=torch.arange(len(users)), temperature=0.1,
        log_weight=torch.zeros(len(items) + more), queued=queued,
    )  # fmt: skip


def test_the_objective_is_the_mean_of_what_each_member_would_have_alone() -> None:
    torch.manual_seed(0)
    parts = [[F.normalize(torch.randn(n, 3), dim=1) for n in (4, 6, 2)] for _ in range(2)]
    users, items, queued = (torch.cat(pair, 1) / 2**0.5 for pair in zip(*parts, strict=True))
    got = of_members(of_vectors(users, items, queued), members=2, objective=softmax)
    wanted = [softmax(of_vectors(*part)) for part in parts]
    torch.testing.assert_close(got, (wanted[0] + wanted[1]) / 2)


def test_members_that_learn_together_share_the_objective_of_their_mean_score() -> None:
    torch.manual_seed(1)
    parts = [[F.normalize(torch.randn(n, 3), dim=1) for n in (4, 6)] for _ in range(2)]
    users, items = (torch.cat(pair, 1) / 2**0.5 for pair in zip(*parts, strict=True))
    scores = of_vectors(users, items)
    whole, apart = softmax(scores), of_members(scores, members=2, objective=softmax)
    assert (whole - apart).abs().max() > 0.1
    for together, wanted in ((1.0, whole), (0.25, 0.25 * whole + 0.75 * apart), (0.0, apart)):
        found = objective_of(TrainingRules(together=together), "cosine", 2)(scores)
        torch.testing.assert_close(found, wanted)


def test_what_one_member_ranks_wrongly_teaches_that_member_alone() -> None:
    """The first is right with certainty, the second wrong: as one tower both would learn."""
    right = torch.eye(2)
    users = torch.cat([right, right], 1).requires_grad_()
    items = torch.cat([right, right.flip(0)], 1) / 2**0.5
    rules = TrainingRules(temperature=0.05)
    objective_of(rules, "cosine", 2)(of_vectors(users / 2**0.5, items)).sum().backward()
    assert users.grad is not None
    learned = users.grad.abs()
    assert learned[:, :2].max() < 1e-3 < 1 < learned[:, 2:].max()


def test_what_does_not_go_with_members_is_refused() -> None:
    for rules, said in (
        ({"dimension": 64, "members": 3}, "multiple of the members"),
        ({"dimension": 4, "members": 4}, "at least twice"),
        ({"members": 2, "score": "dot"}, 'score = "dot"'),
        ({"members": 2, "look_back": True}, "look_back = true"),
        ({"members": 2, "history": "multi_interest"}, 'history = "multi_interest"'),
        ({"dimension": 24, "members": 3, "history": "transformer", "history_heads": 6}, "heads"),
    ):
        with pytest.raises(ValueError, match=said):
            TowerRules(**rules)
    with pytest.raises(ConfigError, match="matryoshka"):
        objective_of(TrainingRules(matryoshka=(16,)), "cosine", 2)
    with pytest.raises(ConfigError, match="start all 2 members alike"):
        start(
            towers(dimension=8, members=2), world(20, 0).timeline, TrainingRules(start="company"), 0
        )


# --- the age of an example ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["random", "sequences", "ahead"])
def test_an_example_is_told_how_many_events_of_its_user_came_after(plan: str) -> None:
    events = world(120, 3)
    batches = Batches(events, plan=plan, batch_size=7, max_history=50, example_age=4)
    offsets, ages = events.timeline.user_offsets, []
    for number, part in enumerate(batches._plan.epoch(np.random.default_rng(0))):
        batch = batches.make(part, np.random.default_rng(number))
        asked = batches.reading.ask(part.drawn, np.random.default_rng(number))
        assert batch.user.age is not None and len(batch.user.age) == batch.n_queries
        for query, age in enumerate(batch.user.age.tolist()):
            first = int(asked.first[query])
            user = int(np.searchsorted(offsets, first, "right")) - 1
            later = [
                event
                for event in range(len(events.timeline.item))
                if first < event < offsets[user + 1]
            ]
            assert age == min(len(later), 4)
            ages.append(age)
    assert len(set(ages)) > 1


def test_answers_lie_half_a_step_beyond_the_newest_examples() -> None:
    model = stirred(towers(example_age=4))
    table = model.user_tower.age.weight
    with torch.no_grad():
        table[0] = 0
    asked, rows = side(HISTORIES), torch.arange(N_ITEMS)
    entries = model.embed_history(rows)
    answering = model.encode_users(asked, entries)
    ages = torch.tensor([0, 1, 4, 3, 0])
    learning = model.encode_users(replace(asked, age=ages), entries)
    assert ((answering - learning).abs().amax(1) > 1e-3).all()
    with torch.no_grad():
        table[0] = -(table[1] + table[2] + table[3]) / 6
    newest = replace(asked, age=torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(answering, model.encode_users(newest, entries))


def test_now_says_nothing_however_long_it_learns() -> None:
    model = towers(example_age=3)
    rows = torch.arange(N_ITEMS)
    asked = replace(side(HISTORIES), age=torch.tensor([0, 1, 2, 3, 0]))
    optimizer = torch.optim.SGD(model.user_tower.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.encode_users(asked, model.embed_history(rows))[:, 0].sum().backward()
        optimizer.step()
    table = model.user_tower.age.weight
    assert table[0].abs().max() == 0
    assert (table[1:].abs().amax(1) > 0).all()


def test_by_user_has_no_after() -> None:
    with pytest.raises(ConfigError, match="nothing comes after"):
        plan_of(TrainingRules(batches="by_user"), TowerRules(example_age=2), False)
    with pytest.raises(ValueError, match="nothing comes after"):
        Batches(world(20, 0), plan="by_user", example_age=2)
