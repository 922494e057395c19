"""The simulated shop from log to answers: its hidden tastes are known, and have to come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys.experiments.run import best_epoch, fit, text_vectors
from recsys.experiments.shop.simulate import simulate
from recsys.features.batching.examples import training_events
from recsys.serving.recommender import Recommender
from recsys.tables import Side
from recsys.towers.build import build_model


@pytest.fixture(scope="module")
def learned(
    build: Callable[..., Any], shop_run: str, shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """A shop large enough to learn from, and towers trained on it."""
    folder = tmp_path_factory.mktemp("world")
    world = simulate(users=600, items=300, days=15, requests_per_user=25, seed=3)
    world.write(folder / "shop")
    toml = shop_run.replace(shop.as_posix(), (folder / "shop").as_posix())
    toml = toml.replace(
        "epochs = 2\nbatch_size = 256", "epochs = 8\nbatch_size = 128\npatience = 8"
    )
    toml = toml.replace("dimension = 16\nhidden = 16", "dimension = 32\nhidden = 64")
    return world, build(toml, folder, trained=True)


def test_what_users_like_comes_back_and_what_they_cannot_stand_stays_away(
    learned: tuple[Any, Any],
) -> None:
    world, built = learned
    recommender = Recommender.load(built.bundle)
    kind = dict(world.items.select("item", pl.col("category").str.split("|").list.last()).rows())
    bundle = recommender.bundle
    clicks = np.diff(bundle.timeline.user_offsets)
    busy = bundle.users.decode(np.argsort(-clicks, kind="stable")[:100]).to_list()
    wanted, among = [], []
    for user in busy:
        liked = set(world.taste(user)["kinds"])
        answers = [kind[item] for item in recommender.recommend(user=user, k=10).ids]
        wanted.append(np.mean([answer in liked for answer in answers]))
        among.append(np.mean([k in liked for k in kind.values()]))
    # Of kinds that the user wants at all: nearly all answers, but few of all items.
    assert np.mean(wanted) > 0.8
    assert np.mean(wanted) > 1.5 * np.mean(among)


def test_recommended_items_have_far_higher_true_click_rates_than_popular_ones(
    learned: tuple[Any, Any],
) -> None:
    world, built = learned
    recommender = Recommender.load(built.bundle)
    bundle = recommender.bundle
    users = np.arange(1, min(200, bundle.users.size))
    names = bundle.users.decode(users).to_list()
    when = np.full(len(users), bundle.cutoff)
    truth = world.oracle(names, when, bundle.items.ids.to_list())
    ours = recommender.recommend_rows(recommender.queries(users), 10)[0] - 1
    popular = np.argsort(-bundle.timeline.popularity()[1:], kind="stable")[:10]
    rate_ours = np.take_along_axis(truth, ours, 1).mean()
    assert rate_ours > 1.5 * truth[:, popular][np.isfinite(truth[:, popular])].mean()


def test_refitted_towers_have_learned_from_the_validation_side(
    learned: tuple[Any, Any], tmp_path: Path
) -> None:
    _, built = learned
    config, dataset = built.config, built.dataset
    torch.set_num_threads(1)
    _, items, users = text_vectors(config, dataset)

    def make() -> Any:
        return build_model(
            dataset, config.towers, item_text=items, user_text=users, seed=config.seed
        )

    rules = config.training.model_copy(update={"epochs": 2})
    config = config.model_copy(update={"training": rules})
    fit(config, dataset, make, folder=tmp_path)
    last = torch.load(tmp_path / "checkpoints/refit/last.ckpt", weights_only=True)
    assert last["epoch"] + 1 == best_epoch(tmp_path / "checkpoints")
    both = training_events(dataset, skips=True, until=Side.VALID)
    train = training_events(dataset, skips=True)
    sides = np.asarray(dataset.event_side)
    assert both.size == (sides <= Side.VALID).sum() > train.size == (sides == Side.TRAIN).sum()
    steps = -(-both.size // 128)
    assert abs(last["global_step"] / (last["epoch"] + 1) - steps) <= 1
