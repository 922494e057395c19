"""Initial id vectors: factors that give the interactions back, and tables set from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Built

from recsys.errors import ConfigError
from recsys.features.batching.examples import timeline_until
from recsys.features.prepared.timeline import Timeline
from recsys.serving import bundle as bundles
from recsys.tables import Side
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.id_init import LENGTH, cooccurrence, initialise, spectral
from recsys.towers.rules import CooccurrenceInit, SpectralInit, TowerRules, TrainingRules
from recsys.towers.two_tower import TwoTower

PEOPLE, ITEMS = 30, 12
SPECTRAL, COOCCURRENCE = SpectralInit(), CooccurrenceInit()


def two_tastes(seed: int = 0) -> Timeline:
    """Users of even rows have items 1 to 6, those of odd rows 7 to 12, each five of the six."""
    rng = np.random.default_rng(seed)
    item = np.concatenate(
        [
            rng.permutation(np.arange(6) + 1 + 6 * (person % 2))[:5]
            for person in range(1, PEOPLE + 1)
        ]
    )
    user = np.repeat(np.arange(1, PEOPLE + 1), 5)
    return Timeline.build(
        user, item.astype(np.int32), np.tile(np.arange(5), PEOPLE),
        n_users=PEOPLE + 1, first_seen=np.zeros(ITEMS + 2, np.int64), timed=False,
    )  # fmt: skip


def dense(timeline: Timeline) -> np.ndarray:
    seen = np.zeros((timeline.n_users, timeline.n_items))
    seen[timeline.user, np.asarray(timeline.item)] = 1
    return seen


def uneven() -> Timeline:
    """Users with one to eight events, so that who and what is had more often weighs more."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 9, PEOPLE)
    item = [rng.permutation(ITEMS)[:n] ** 2 // ITEMS + 1 for n in counts]
    return Timeline.build(
        np.repeat(np.arange(1, PEOPLE + 1), counts), np.concatenate(item).astype(np.int32),
        np.concatenate([np.arange(n) for n in counts]),
        n_users=PEOPLE + 1, first_seen=np.zeros(ITEMS + 2, np.int64), timed=False,
    )  # fmt: skip


@pytest.mark.parametrize("powers", [(0.5, 0.5, 0.0), (0.35, 0.45, 0.5), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("dimension", [ITEMS + 2, 3])
def test_factors_give_the_filter_of_the_paper(
    powers: tuple[float, float, float], dimension: int
) -> None:
    """(v_j/d_j^b)·(σ^c v_i d_i^b) over a history is row u of R D^-b V Σ^c Vᵀ D^b, up to scale."""
    timeline = uneven()
    found = spectral(timeline, dimension, seed=0, powers=powers)
    seen = dense(timeline)
    per_user = np.maximum(seen.sum(1, keepdims=True), 1) ** powers[0]
    per_item = np.maximum(seen.sum(0), 1) ** powers[1]
    _, s, vt = np.linalg.svd(seen / per_user / per_item)
    rank = min((s > 1e-6).sum(), dimension)
    v = vt[:rank].T
    wanted = seen / per_item @ (v * s[:rank] ** powers[2]) @ v.T * per_item  # (U, I)
    got = seen @ found.history @ found.item.T
    scale = (got * wanted).sum() / (wanted**2).sum()
    assert scale > 0
    np.testing.assert_allclose(got, wanted * scale, atol=1e-4)


def test_histories_have_length_one_on_average_and_unknown_rows_are_zero() -> None:
    timeline = two_tastes()
    found = spectral(timeline, 4, seed=0)
    seen = dense(timeline)[1:]
    means = seen @ found.history / seen.sum(1, keepdims=True)
    assert np.linalg.norm(means, axis=1).mean() == pytest.approx(1, rel=1e-5)
    assert not found.history[0].any() and not found.item[0].any() and not found.user[0].any()
    assert np.linalg.norm(found.item[1 : ITEMS + 1], axis=1).mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", ["spectral", "cooccurrence"])
def test_items_of_one_taste_are_near_and_others_are_not(kind: str) -> None:
    timeline = two_tastes()
    vectors = spectral(timeline, 2, 0).item if kind == "spectral" else cooccurrence(timeline, 2, 0)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cosine = vectors[1 : ITEMS + 1] @ vectors[1 : ITEMS + 1].T
    assert cosine[:6, :6].min() > 0.9 and cosine[6:, 6:].min() > 0.9
    assert abs(cosine[:6, 6:]).max() < 0.1


def test_the_factors_of_cooccurrence_give_the_normalised_co_occurrence_back() -> None:
    """Twin: all pairs of a user's entries by loops; positive eigenvalues only."""
    rng = np.random.default_rng(3)
    # Neighbours in number are neighbours in the log, so that how far apart two stand shows.
    walks = (rng.integers(0, ITEMS, PEOPLE)[:, None] + np.arange(5)) % ITEMS + 1
    timeline = Timeline.build(
        np.repeat(np.arange(1, PEOPLE + 1), 5), walks.reshape(-1).astype(np.int32),
        np.tile(np.arange(5), PEOPLE), n_users=PEOPLE + 1,
        first_seen=np.zeros(ITEMS + 2, np.int64), timed=False,
    )  # fmt: skip
    near = np.zeros((timeline.n_items, timeline.n_items))
    item, offsets = np.asarray(timeline.item), np.asarray(timeline.user_offsets)
    for person in range(timeline.n_users):
        own = item[offsets[person] : offsets[person + 1]]
        for later in range(len(own)):
            for earlier in range(later):
                near[own[earlier], own[later]] += 0.8 ** (later - earlier - 1)
                near[own[later], own[earlier]] += 0.8 ** (later - earlier - 1)
    scale = np.maximum(near.sum(1), 1e-6) ** -0.5
    values, vectors = np.linalg.eigh(near * scale[:, None] * scale)
    best = np.argsort(-values)[:3]
    wanted = vectors[:, best] * np.sqrt(np.maximum(values[best], 0))
    length = np.linalg.norm(wanted, axis=1)
    there = near.any(1)
    wanted = (wanted @ wanted.T) / np.maximum(np.outer(length, length), 1e-9)
    got = cooccurrence(timeline, 3, seed=0)
    np.testing.assert_allclose((got @ got.T)[there][:, there], wanted[there][:, there], atol=2e-3)
    assert not got[~there].any()


def towers(**rules: object) -> TwoTower:
    items = FeatureTable(ITEMS + 2)
    return TwoTower(
        TowerRules.model_validate({"dimension": 4, "hidden": 0, "history": "mean", **rules}),
        items, FeatureTable(PEOPLE + 1), items.spec(ITEMS + 1, {}), FeatureSpec(ids=PEOPLE + 1),
    )  # fmt: skip


@pytest.mark.parametrize("table", ["shared", "own"])
def test_a_history_of_the_started_towers_is_the_sum_that_was_factored(table: str) -> None:
    timeline, model = two_tastes(), towers(history={"kind": "mean", "table": table}).eval()
    initialise(model, timeline, SPECTRAL, 0)
    rows = torch.arange(ITEMS + 1)
    entries = model.embed_history(rows).detach().numpy()
    np.testing.assert_allclose(entries[1:], spectral(timeline, 4, 0).history[1:-1], atol=1e-5)


def test_rows_without_an_id_keep_what_they_had() -> None:
    timeline, model = two_tastes(), towers()
    before = model.item_tower.inputs.ids.weight[0].clone()
    initialise(model, timeline, COOCCURRENCE, 0)
    assert torch.equal(model.item_tower.inputs.ids.weight[0], before)
    assert model.item_tower.inputs.ids.weight[1:].norm(dim=1).min() > 0.99 * LENGTH


def test_without_item_ids_there_is_nothing_to_start() -> None:
    items = FeatureTable(ITEMS + 2, numbers=torch.ones(ITEMS + 2, 1))
    model = TwoTower(
        TowerRules(dimension=4, id_dropout=1), items, FeatureTable(PEOPLE + 1),
        items.spec(0, {}), FeatureSpec(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"id_dropout = 1 leaves them out"):
        initialise(model, two_tastes(), SPECTRAL, 0)


@pytest.mark.parametrize("score", ["dot", "projection"])
@pytest.mark.parametrize("table", ["own", "offset"])
def test_with_inner_products_the_towers_start_as_the_filter(table: str, score: str) -> None:
    timeline, model = (
        two_tastes(),
        towers(history={"kind": "mean", "table": table}, score=score).eval(),
    )
    initialise(model, timeline, SPECTRAL, 0)
    rows, found = torch.arange(1, ITEMS + 1), spectral(timeline, 4, 0)
    items = model.item_tower(model.embed_items(rows)).detach().numpy()
    entries = model.embed_history(rows).detach().numpy()
    np.testing.assert_allclose(items, found.item[1:-1], atol=1e-5)
    np.testing.assert_allclose(entries, found.history[1:-1], atol=1e-5)


def test_a_start_alone_is_no_noise() -> None:
    with pytest.raises(ValueError, match="is noise"):
        TrainingRules(epochs=0)
    assert TrainingRules(epochs=0, id_init=SPECTRAL).epochs == 0


def test_without_epochs_the_towers_stay_as_they_start(
    build: Callable[..., Built], market_run: str, tmp_path: Path
) -> None:
    """Set from train and validation side together: nothing is left to be chosen."""
    rules = (
        '[towers.history]\nkind = "mean"\ntable = "own"\n'
        '[training]\nepochs = 0\n[training.id_init]\nkind = "spectral"\n'
    )
    toml = market_run.replace("hidden = 8", "hidden = 0")
    built = build(toml + rules, tmp_path, trained=True)
    loaded = bundles.load(built.bundle)
    found = spectral(timeline_until(built.dataset, Side.VALID), 8, built.config.seed)
    tower = loaded.model.user_tower
    assert tower.history_ids is not None
    rows = len(tower.history_ids.weight)
    np.testing.assert_allclose(
        tower.history_ids.weight[1:].detach().float(),
        found.history[1:rows],
        rtol=1e-3,  # a bundle keeps 11 bits of each number
        atol=1e-5,
    )
