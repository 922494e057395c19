"""The simulated shop: what is known about it holds in its log."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys.errors import ConfigError, DataError, QueryError
from recsys.experiments.run import best_epoch, fit, text_vectors
from recsys.experiments.shop import words
from recsys.experiments.shop.simulate import World, _intents, _race, simulate, simulate_events
from recsys.experiments.shop.world import ACCIDENT, START
from recsys.features.batching.examples import training_events
from recsys.files import read_json
from recsys.ragged import Ragged
from recsys.serving.recommender import Recommender
from recsys.tables import DAY, Side
from recsys.towers.build import build_model


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(users=700, items=600, requests_per_user=30, seed=3)


@pytest.fixture(scope="module")
def showings(world: World) -> pl.DataFrame:
    """One row a thing shown: rows of user, item and request, time, position, whether clicked."""
    items = {name: row for row, name in enumerate(world.items["item"])}
    users = {name: row for row, name in enumerate(world.users)}
    flat = world.impressions.explode(["shown", "position", "propensity"])
    return flat.select(
        "request",
        "position",
        "propensity",
        "device",
        user=pl.col("user").replace_strict(users, return_dtype=pl.Int64),
        item=pl.col("shown").replace_strict(items, return_dtype=pl.Int64),
        time=pl.col("time").cast(pl.Int64),
        clicked=pl.col("clicked").list.contains(pl.col("shown")),
    ).with_columns(
        seen=pl.col("position")
        <= pl.Series(world.truth["request_depth"]).gather(flat["request"]).cast(pl.Int32)
    )


def best_recall(ranked: np.ndarray, target: np.ndarray) -> float:
    return float((ranked == target[:, None]).any(1).mean())


def queries_of(showings: pl.DataFrame, after: float) -> tuple[np.ndarray, ...]:
    """User, item and time of the clicks after a share of the days, and what was clicked before."""
    clicks = showings.filter("clicked").sort("user", "time", "position")
    user, item, time = (clicks[c].to_numpy() for c in ("user", "item", "time"))
    late = np.nonzero(time >= START + int(after * 30) * DAY)[0]
    before = [item[(user == user[e]) & (time < time[e])] for e in late]
    past = item[time < time[late].min()]
    return user[late], item[late], time[late], Ragged.from_lists(before), past


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    small = {"users": 60, "items": 80, "days": 6, "requests_per_user": 5}
    simulate(**small, seed=1).write(tmp_path / "a")
    simulate(**small, seed=1).write(tmp_path / "b")
    simulate(**small, seed=2).write(tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["impressions.parquet", "items.parquet", "truth.npz", "world.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_a_world_says_that_it_is_simulated_and_comes_back_from_disk(tmp_path: Path) -> None:
    made = simulate(users=60, items=80, days=6, requests_per_user=5, seed=1)
    made.write(tmp_path / "shop")
    about = read_json(tmp_path / "shop" / "world.json")
    assert about["simulated"] is True and "No person" in about["note"]
    assert about["parameters"]["users"] == 60 and about["counts"] == made.counts()
    back = World.load(tmp_path / "shop")
    assert back.impressions.equals(made.impressions) and back.items.equals(made.items)
    times = np.full(60, START + 5 * DAY)
    assert np.array_equal(back.oracle(made.users, times), made.oracle(made.users, times))


def test_a_foreign_or_damaged_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"world\.json"):
        World.load(tmp_path)
    simulate(users=5, items=20, days=2, requests_per_user=2).write(tmp_path / "w")
    (tmp_path / "w" / "truth.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        World.load(tmp_path / "w")
    (tmp_path / "w" / "truth.npz").unlink()
    with pytest.raises(DataError, match=r"lacks truth\.npz"):
        World.load(tmp_path / "w")
    (tmp_path / "w" / "world.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="'other'"):
        World.load(tmp_path / "w")


def test_columns_are_those_that_readers_are_told(world: World) -> None:
    assert dict(world.impressions.schema) == {
        "request": pl.Int64,
        "user": pl.String,
        "time": pl.Datetime("us", "UTC"),
        "shown": pl.List(pl.String),
        "clicked": pl.List(pl.String),
        "position": pl.List(pl.Int32),
        "propensity": pl.List(pl.Float32),
        "device": pl.String,
    }
    assert dict(world.items.schema) == {
        "item": pl.String,
        "title": pl.String,
        "description": pl.String,
        "category": pl.String,
        "brand": pl.String,
        "price": pl.Float64,
        "published": pl.Datetime("us", "UTC"),
    }
    assert world.impressions["request"].to_list() == list(range(len(world.impressions)))
    assert world.impressions["time"].is_sorted()
    assert not world.items.select(pl.any_horizontal(pl.all().is_null().any())).item()


def test_what_can_be_disliked_can_be_read_in_the_item(world: World) -> None:
    t, items = world.truth, world.items
    text = (items["title"] + " " + items["description"]).str.to_lowercase().to_list()
    for row in range(0, len(items), 7):
        kind = words.KINDS[t["item_kind"][row]]
        assert items["category"][row].endswith("|" + kind) and kind in text[row]
        for names, fact in ((words.STYLES, "item_style"), (words.FINISHES, "item_finish")):
            assert names[t[fact][row]].lower() in text[row]
        assert words.MATERIALS[t["item_material"][row]] in text[row]
        assert words.FLAWS[t["item_flaw"][row]] in text[row]
        assert items["brand"][row] == words.BRANDS[t["item_brand"][row]]
        assert not re.search(r"[{}]|  ", text[row])
    assert items["title"].n_unique() > 0.8 * len(items)


def test_nothing_is_shown_before_it_is_published_or_after_it_was_clicked(
    world: World, showings: pl.DataFrame
) -> None:
    published = world.truth["item_published"][showings["item"]]
    assert (published <= showings["time"].to_numpy()).all()
    assert showings.select(pl.struct("request", "item").is_unique().all()).item()
    first = showings.filter("clicked").group_by("user", "item").agg(pl.col("request").min())
    later = showings.join(first, on=["user", "item"], suffix="_clicked")
    assert len(later) > 0 and (later["request"] <= later["request_clicked"]).all()


def test_position_changes_what_is_seen_and_nothing_else(
    world: World, showings: pl.DataFrame
) -> None:
    rates = showings.group_by("position").agg(pl.col("clicked").mean(), pl.len()).sort("position")
    assert rates["clicked"][0] > 1.5 * rates["clicked"][-1]
    assert not showings.filter(~pl.col("seen"))["clicked"].any()
    # Of what was seen, the last five places are clicked as often as the first five, user by user:
    # each device and user looks on with the same chance, so weigh clicks by the propensity.
    weighed = showings.with_columns(w=pl.col("clicked") / pl.col("propensity"))
    top, low = (weighed.filter(pl.col("position").is_between(*p)) for p in ((1, 5), (6, 10)))
    error = np.hypot(*(part["w"].std() / np.sqrt(len(part)) for part in (top, low)))
    assert abs(top["w"].mean() - low["w"].mean()) < 4 * error
    assert abs((showings["seen"] / showings["propensity"]).mean() - 1) < 0.02
    popularity = world.truth["item_popularity"][showings["item"]]
    assert abs(np.corrcoef(popularity, showings["position"])[0, 1]) < 0.01


def test_popularity_is_skewed_and_users_are_heavy_and_light(showings: pl.DataFrame) -> None:
    clicks = showings.filter("clicked")
    per_item = clicks.group_by("item").len()["len"].sort(descending=True).to_numpy()
    assert per_item[:60].sum() > 0.22 * per_item.sum()  # a tenth of 600 items; even would be 0.10
    per_user = clicks.group_by("user").len()["len"].to_numpy()
    assert np.quantile(per_user, 0.95) > 3 * np.median(per_user)


def test_items_appear_and_users_arrive_every_few_days(world: World, showings: pl.DataFrame) -> None:
    days = (world.truth["item_published"] - START) // DAY
    assert set(days[days >= 0]) == set(range(30)) and (days < 0).sum() > 200
    hours = world.items["published"].dt.hour()
    assert hours.n_unique() > 12
    new = showings.filter(pl.col("clicked") & pl.Series(days[showings["item"].to_numpy()] > 20))
    assert len(new) > 50
    first = (showings.group_by("user").agg(pl.col("time").min())["time"] - START) // DAY
    assert first.n_unique() > 20


def test_sessions_hold_several_requests_within_minutes(world: World) -> None:
    gaps = world.impressions.select(pl.col("time").diff().over("user")).drop_nulls()["time"]
    assert 0.4 < (gaps.dt.total_minutes() < 10).mean() < 0.8


def test_tastes_drift_for_those_who_turn_and_for_nobody_else(world: World) -> None:
    rows = np.arange(len(world.users))
    start, end = (world.moods(rows, np.full(len(rows), t)) for t in (START, START + 30 * DAY))
    moved = np.abs(end - start)[:, 0] > 0.25
    assert 0.2 < moved.mean() < 0.5
    share = world.truth["user_first_share"]
    assert (moved == (share[:, 0] != share[:, 1])).all()
    assert np.array_equal(start[~moved], end[~moved])


def test_skips_that_were_seen_are_mostly_dealbreakers_and_clicks_are_not(
    world: World, showings: pl.DataFrame
) -> None:
    t = world.truth
    user, item = showings["user"].to_numpy(), showings["item"].to_numpy()
    persona = t["request_persona"][showings["request"]].astype(int)
    wanted = t["persona_kinds"][persona, t["item_kind"][item]] > 0
    avoided = t["user_avoids_finish"][user, t["item_finish"][item]]
    avoided |= t["user_avoids_brand"][user, t["item_brand"][item]]
    avoided |= t["user_avoids_flaw"][user, t["item_flaw"][item]]
    avoided |= t["persona_avoids_style"][persona, t["item_style"][item]]
    frame = showings.with_columns(avoided=pl.Series(avoided)).filter(pl.Series(wanted))
    clicked = frame.filter("clicked")["avoided"].mean()
    skipped = frame.filter(pl.col("seen") & ~pl.col("clicked"))["avoided"].mean()
    assert clicked < 0.1 and skipped > 0.8
    rate = frame.filter(pl.col("seen") & pl.col("avoided"))["clicked"].mean()
    assert abs(rate - ACCIDENT) < 0.003


def test_the_oracle_counts_the_clicks_that_come(world: World, showings: pl.DataFrame) -> None:
    """Σ over items of expected clicks is what early requests got, before anything was clicked."""
    first = showings.group_by("user").agg(pl.col("request").min())["request"]
    counts = showings.group_by("request").agg(pl.col("clicked").sum()).sort("request")["clicked"]
    log = world.impressions[first.sort()]
    scores = world.oracle(log["user"].to_list(), log["time"].cast(pl.Int64).to_numpy())
    expected = np.where(np.isfinite(scores), scores, 0).sum(1)
    came = counts.to_numpy()[first.sort().to_numpy()]
    error = came.std() / np.sqrt(len(came))
    assert abs(came.mean() - expected.mean()) < 4 * error + 0.03 * expected.mean()


def test_the_oracle_is_what_many_requests_of_one_user_come_to(world: World) -> None:
    """Twin: the generator's own steps, 20,000 times for one user at one moment."""
    rng = np.random.default_rng(0)
    turning = world.truth["user_first_share"]
    chosen = int(np.argmax(turning[:, 0] - turning[:, 1]))  # somebody who turns: order matters
    user, time = np.full(20_000, chosen), np.full(20_000, START + 29 * DAY)
    persona, kind = _intents(rng, world, user, time)
    page = _race(rng, world.weights(time[:1]) * world.nearness[kind], 10)
    chance = world.chance(user[:, None], persona[:, None], time[:, None], page)
    phone = rng.random(len(user)) < 0.55
    further = world.truth["user_patience"][chosen] - 0.08 * phone
    chance = chance * further[:, None] ** np.arange(10)
    came = np.bincount(page.ravel(), chance.ravel(), minlength=600) / len(user)
    oracle = world.oracle([world.users[chosen]], time[:1])[0]
    top = np.argsort(-oracle)[:30]
    assert np.corrcoef(came[top], oracle[top])[0, 1] > 0.98
    assert abs(came[top] / oracle[top] - 1).mean() < 0.1
    assert abs(came.sum() / oracle[np.isfinite(oracle)].sum() - 1) < 0.05


def test_the_oracle_beats_popularity_by_far_and_exposure_matters(
    world: World, showings: pl.DataFrame
) -> None:
    user, item, time, before, past = queries_of(showings, 0.8)
    names = [world.users[u] for u in user]
    clicks = best_recall(world.best(names, time, 20, exclude=before), item)
    taste = best_recall(world.best(names, time, 20, exclude=before, kind="taste"), item)
    counts = np.bincount(past, minlength=len(world.items)).astype(float)
    table = np.tile(counts, (len(user), 1))
    table[before.row_of(), before.values] = -1
    popular = best_recall(np.argsort(-table, axis=1, kind="stable")[:, :20], item)
    assert clicks > 3 * popular and clicks > taste > 2 * popular


def test_the_oracle_knows_what_is_published_and_answers_in_any_order_of_items(world: World) -> None:
    times = np.array([START, START + 15 * DAY, START + 40 * DAY])
    ids = world.items["item"].to_list()
    scores = world.oracle(["u0000", "u0001", "u0000"], times)
    assert scores.shape == (3, 600) and scores.dtype == np.float32
    assert ((scores == -np.inf) == (world.truth["item_published"] > times[:, None])).all()
    assert ((scores[np.isfinite(scores)] >= 0) & (scores[np.isfinite(scores)] <= 1)).all()
    turned = world.oracle(["u0000", "u0001", "u0000"], times, ids[::-1][:50])
    assert np.array_equal(turned, scores[:, ::-1][:, :50])
    with pytest.raises(QueryError, match="'u9999'"):
        world.oracle(["u9999"], times[:1])
    with pytest.raises(QueryError, match="item 'x'"):
        world.oracle(["u0000"], times[:1], ["x"])


def test_best_leaves_out_what_is_excluded_and_pads(world: World) -> None:
    time = np.array([START + 20 * DAY])
    top = world.best(["u0003"], time, 5)
    without = world.best(["u0003"], time, 4, exclude=Ragged.from_lists([[top[0, 0]]]))
    assert without[0].tolist() == top[0, 1:].tolist()
    everything = world.best(["u0003"], np.array([START]), 10_000)
    assert everything.shape == (1, 600)
    assert (everything[0] >= 0).sum() == (world.truth["item_published"] <= START).sum()


def test_what_a_user_likes_can_be_read_in_the_best_items(world: World) -> None:
    times = np.full(30, START + 15 * DAY)
    best = world.best(world.users[:30], times, 10, kind="taste")
    for user, rows in zip(world.users[:30], best, strict=True):
        taste = world.taste(user)
        assert len(taste["finishes"]) == 3 and len(taste["styles"]) >= 3
        found = world.items[rows]
        kinds = found["category"].str.split("|").list.last()
        assert kinds.is_in(taste["kinds"]).all()
        text = (found["title"] + " " + found["description"]).str.to_lowercase().to_list()
        liked = [any(finish in one for finish in taste["finishes"]) for one in text]
        assert all(liked)
        assert not found["brand"].is_in([str(one) for one in taste["avoided"]]).any()


@pytest.mark.parametrize(
    "shape", [{"users": 1, "items": 1, "days": 1}, {"users": 3, "items": 7, "days": 2, "page": 20}]
)
def test_the_smallest_shops_open(shape: dict[str, int]) -> None:
    made = simulate(**shape, requests_per_user=4, seed=5)
    assert len(made.items) == shape["items"] and made.users
    assert (made.impressions["shown"].list.len() <= shape["items"]).all()
    assert (made.impressions["clicked"].list.len() <= made.impressions["shown"].list.len()).all()


def test_a_shop_that_nobody_visits_has_an_empty_log() -> None:
    made = simulate(users=3, items=5, days=2, requests_per_user=0)
    assert len(made.impressions) == 0 and made.impressions.schema["shown"] == pl.List(pl.String)


@pytest.mark.parametrize("wrong", [{"users": 0}, {"days": 1.5}, {"requests_per_user": -1.0}])
def test_an_argument_out_of_range_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        simulate(**wrong)


def test_plain_events_are_zipf_in_time_order_and_repeat() -> None:
    events = simulate_events(50_001, users=900, items=400, seed=2)
    assert events.columns == ["user", "item", "time", "event"] and len(events) == 50_001
    assert events["time"].is_sorted() and events.schema["time"] == pl.Datetime("us", "UTC")
    counts = events["item"].value_counts()["count"].sort(descending=True)
    assert counts[0] > 1.5 * counts[1] and counts[0] > 20 * counts[200]
    assert set(events["event"].unique()) == {"view", "cart", "buy"}
    assert events.equals(simulate_events(50_001, users=900, items=400, seed=2))


def test_the_generator_shares_no_code_with_the_model() -> None:
    """Nothing but the ground floor is imported, and no torch."""
    code = "import sys, recsys.experiments.shop.simulate; print([m for m in sys.modules if m in "
    code += "('torch', 'recsys.features', 'recsys.towers', 'recsys.serving')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- from log to answers: the hidden tastes have to come back


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
