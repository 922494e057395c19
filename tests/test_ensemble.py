"""Ensemble: against towers that stand alone; and the age of an example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_samplers import world
from test_towers import N_ITEMS, side, towers
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.features.batching.batches import Batches
from recsys.towers.data import sampler_of
from recsys.towers.ensemble import Ensemble, side_by_side, unit_vectors
from recsys.towers.id_init import initialise
from recsys.towers.rules import CooccurrenceInit, TowerRules, TrainingRules
from recsys.towers.two_tower import TwoTower

HISTORIES = [[3, 1, 4], [], [5], [2, 6, 7, 8], [1]]
TOWERS, WIDTH = 3, 4


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
    one = towers(**rules | {"dimension": WIDTH, "ensemble": 1})
    part = slice(number * WIDTH, (number + 1) * WIDTH)
    state, wide = one.state_dict(), several.state_dict()
    for name, weight in state.items():
        own = name.replace("deep.", f"deep.towers.{number}.")
        own = own.replace("user_tower.history.", f"user_tower.history.towers.{number}.")
        if own != name and own in wide:
            state[name] = wide[own]
        elif weight.shape[0] == WIDTH and wide[name].shape[0] == WIDTH * TOWERS:
            state[name] = wide[name][part]  # a linear layer's rows
        else:
            state[name] = wide[name][:, part]  # a table's columns
    one.load_state_dict(state)
    return one.eval()


@pytest.mark.parametrize(
    "rules",
    [
        {"history": "attention"},
        {"history": {"kind": "mean", "decay": 0.5, "table": "offset"}},
        {"history": {"kind": "transformer", "hidden": 5, "table": "own"}},
        {"history": "none", "hidden": 0},
    ],
)
def test_the_score_is_the_mean_of_the_cosines_of_towers_that_stand_alone(rules: dict) -> None:
    several = stirred(towers(dimension=TOWERS * WIDTH, ensemble=TOWERS, **rules))
    users, items = vectors(several)
    torch.testing.assert_close(items.norm(dim=1), torch.ones(N_ITEMS))
    cosines = []
    for number in range(TOWERS):
        u, i = vectors(alone(several, number))
        cosines.append(u @ i.T)
    torch.testing.assert_close(users @ items.T, torch.stack(cosines).mean(0), atol=1e-5, rtol=1e-4)


def test_vectors_start_as_long_in_each_part_as_they_would_alone() -> None:
    lengths = []
    for members in (1, 16):
        inputs = towers(dimension=64 * members, ensemble=members).item_tower.inputs
        lengths.append(
            [
                vectors.unflatten(-1, (members, 64)).norm(dim=-1).mean().item()
                for vectors in (inputs.ids.weight[1:], inputs.text.weight.T)
            ]
        )
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)


def test_an_ensemble_of_one_is_the_module_itself() -> None:
    layer = nn.Linear(2, 2)
    assert side_by_side(lambda: layer, 1) is layer
    assert isinstance(side_by_side(lambda: nn.Linear(2, 2), 2), Ensemble)


def test_unit_vectors_by_hand() -> None:
    got = unit_vectors(torch.tensor([[3.0, 4.0, 0.0, -2.0]]), 2) * 2**0.5
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8, 0.0, -1.0]]))


def test_what_does_not_go_with_an_ensemble_is_refused() -> None:
    heads = {"kind": "transformer", "heads": 6}
    for rules, message in (
        ({"dimension": 64, "ensemble": 3}, "multiple of the ensemble"),
        ({"dimension": 4, "ensemble": 4}, "at least twice"),
        ({"ensemble": 2, "score": "dot"}, 'score = "dot"'),
        ({"dimension": 24, "ensemble": 3, "history": heads}, "heads"),
    ):
        with pytest.raises(ValueError, match=message):
            TowerRules(**rules)
    with pytest.raises(ConfigError, match="start all 2 towers alike"):
        initialise(towers(dimension=8, ensemble=2), world(20, 0).timeline, CooccurrenceInit(), 0)


# --- the age of an example ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["random", "sequences"])
def test_an_example_is_told_how_many_events_of_its_user_came_after(plan: str) -> None:
    events = world(120, 3)
    batches = Batches(events, sampler=plan, batch_size=7, max_history=50, example_age=4)
    offsets, ages = events.timeline.user_offsets, []
    for number, part in enumerate(batches._sampler.epoch(np.random.default_rng(0))):
        batch = batches.make(part, np.random.default_rng(number))
        asked = batches.query_kind.queries(part.units, np.random.default_rng(number))
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
        sampler_of(TrainingRules(batches="by_user"), TowerRules(example_age=2), False)
    with pytest.raises(ValueError, match="nothing comes after"):
        Batches(world(20, 0), sampler="by_user", example_age=2)
