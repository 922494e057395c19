"""What a bundle is judged on: its own test side, or a later log of the same form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import BundleError, ConfigError, DataError
from recsys.experiments.evaluation.evaluate import evaluate, later_log, protocol
from recsys.experiments.evaluation.evaluate import (
    test_side as later_side,  # the name is not that of a test
)
from recsys.experiments.evaluation.scorecard import judge
from recsys.serving.later_events import Later, extend
from recsys.serving.recommender import Recommender

DAY = 86_400


def _numbers(card: Any) -> Any:
    """All values and counts; intervals rest on the order of users, which another log may change."""
    hidden = ("low", "high", "protocol", "verdict")
    if isinstance(card, dict):
        return {k: _numbers(v) for k, v in card.items() if k not in hidden}
    return round(card, 9) if isinstance(card, float) else card


@pytest.mark.parametrize("world", ["plain", "tiny"])
def test_the_log_it_was_made_from_gives_its_own_scorecard(
    world: str, request: pytest.FixtureRequest
) -> None:
    """Own test side, the same by hand, and `--on` the whole log: what is before the cut-off falls
    away, and users, items and context are coded from their names."""
    built = request.getfixturevalue(world)
    own = evaluate(built.bundle)
    recommender = Recommender.load(built.bundle)
    by_hand = judge(
        recommender, later_side(built.dataset), built.config.evaluate, each_event=True,
        protocol=protocol(built.config, built.dataset),
    )  # fmt: skip
    assert own == by_hand
    on = evaluate(built.bundle, on=str(built.config.data.log))
    assert _numbers(on) == _numbers(own)
    assert (own["impressions"] is None) == (world == "plain")
    assert on["protocol"]["log"] == built.config.data.log
    assert on["protocol"]["trained"].items() <= own["protocol"].items()


def _later_events(folder: Path, rows: list[tuple[str, str, int]]) -> str:
    start = 1_704_067_200
    lines = [f"{user},{item},{start + second}" for user, item, second in rows]
    (folder / "later.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    return str(folder / "later.csv")


def test_users_and_items_never_seen_are_judged_too(plain: Any, tmp_path: Path) -> None:
    log = _later_events(
        tmp_path,
        [
            ("u01", "i03", 1 * DAY),  # before the cut-off: not judged
            ("u01", "new thing", 20 * DAY),
            ("newcomer", "i00", 20 * DAY + 1),
            ("newcomer", "i01", 20 * DAY + 7200),
            ("newcomer", "new thing", 21 * DAY),
        ],
    )
    card = evaluate(plain.bundle, on=log)
    said = card["protocol"]
    assert (said["targets"], said["users_judged"], said["queries_judged"]) == (4, 2, 4)
    assert said["cold_targets"] == 2
    assert card["slices"]["new_users"]["queries"] == 1
    assert card["slices"]["cold_items"]["model"]["recall_at_20"]["value"] == 0
    assert card["index"]["queries"] == 1  # of the newcomer, the bundle's index knows nothing


def test_a_log_of_strangers_only_is_judged(plain: Any, tmp_path: Path) -> None:
    log = _later_events(
        tmp_path, [("a", "x", 20 * DAY), ("b", "y", 21 * DAY), ("b", "x", 22 * DAY)]
    )
    card = evaluate(plain.bundle, on=log)
    assert card["protocol"]["targets"] == 3 and card["model"]["recall_at_20"]["value"] == 0
    assert card["index"]["queries"] == 0
    assert next(v for v in card["index"].values() if isinstance(v, dict))["value"] is None


def test_impressions_of_strangers_are_judged(tiny: Any, tmp_path: Path) -> None:
    """Towers that read item statistics answer with items that are new in the later log."""
    log = pl.read_parquet(tiny.config.data.log)
    late = log.filter(
        pl.col("time").cast(pl.Datetime("us")).dt.epoch("us") >= tiny.dataset.test_from
    )
    renamed = late.with_columns(
        pl.lit("new-").add(pl.col("user")).alias("user"),
        *[
            pl.col(name).list.eval(pl.lit("new-") + pl.element()).alias(name)
            for name in ("shown", "clicked")
        ],
    )
    renamed.write_parquet(tmp_path / "later.parquet")
    card = evaluate(tiny.bundle, on=str(tmp_path / "later.parquet"))
    own = evaluate(tiny.bundle)
    assert card["impressions"]["requests"] == own["impressions"]["requests"]
    assert card["protocol"]["cold_targets"] == card["protocol"]["targets"] > 20
    assert card["slices"]["cold_items"]["model"]["recall_at_100"]["value"] > 0
    assert set(card["impressions"]["slices"]) == {"cold"}


@pytest.fixture(scope="module")
def walks(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sequences without a clock: each user walks on from item to item."""
    folder = tmp_path_factory.mktemp("walks")
    rng = np.random.default_rng(5)
    starts = rng.integers(0, 20, 25)
    frame = pl.DataFrame(
        {
            "user": [f"w{n}" for n in range(25)],
            "items": [[f"s{(start + step) % 30}" for step in range(6)] for start in starts],
        }
    )
    frame.write_parquet(folder / "sequences.parquet")
    run = f"""
[data]
format = "sequences"
log = "{folder.as_posix()}/sequences.parquet"
[evaluate]
ks = [5, 20]
"""
    return build(run, folder / "out")


def test_later_sequences_go_on_where_each_user_stood(walks: Any, tmp_path: Path) -> None:
    own = evaluate(walks.bundle)
    assert own["protocol"]["queries"] == "each event" and own["protocol"]["targets"] == 25
    pl.DataFrame(
        {"user": ["w0", "stranger"], "items": [["s29", "never", "s28"], ["s1", "s2"]]}
    ).write_parquet(tmp_path / "later.parquet")
    recommender = Recommender.load(walks.bundle)
    later = later_log(recommender, str(tmp_path / "later.parquet"))
    bundle, coded = extend(recommender.bundle, later)
    had = recommender.bundle.timeline.histories(recommender.bundle.users.encode(["w0"]))
    rows = bundle.timeline.histories(bundle.users.encode(["w0", "stranger"]))
    assert bundle.items.decode(rows[0]).to_list() == [
        *recommender.bundle.items.decode(had[0]).to_list(), "s29", "never", "s28",
    ]  # fmt: skip
    assert bundle.items.decode(rows[1]).to_list() == ["s1", "s2"]
    # The third event of w0 is asked with everything before it.
    at = np.flatnonzero(coded.user == bundle.users.encode(["w0"])[0])[2:3]
    third = bundle.timeline.histories(coded.user[at], coded.time[at])[0]
    assert bundle.items.decode(third).to_list()[-2:] == ["s29", "never"]
    card = evaluate(walks.bundle, on=str(tmp_path / "later.parquet"))
    assert card["protocol"]["queries_judged"] == 5 and card["slices"]["new_users"]["queries"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "later.csv"),
        ("user,item,time\nu01,i03,1704067300\n", "no positive after the bundle's cut-off"),
        ("usr,item,time\nu01,i03,1704967300\n", "user"),
        ("user,item,time\nu01,,1804967300\n", "item"),
    ],
)
def test_a_log_that_cannot_be_judged_on_is_refused(
    plain: Any, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "later.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        evaluate(plain.bundle, on=str(tmp_path / "later.csv"))


def test_prepared_data_that_is_gone_or_another_is_refused_with_the_way_out(
    build: Callable[..., Any], market: Path, market_run: str, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(market, own)
    built = build(market_run.replace(market.as_posix(), own.as_posix()), tmp_path / "out")
    path = built.dataset.path
    path.rename(path.with_name("away"))
    with pytest.raises(BundleError, match=r"is gone.*--on LOG"):
        evaluate(built.bundle)
    path.with_name("away").rename(path)
    evaluate(built.bundle)
    # The same configuration, another log in the same place: prepared anew under the same name.
    events = pl.read_csv(own / "events.csv")
    events.head(590).write_csv(own / "events.csv")
    from recsys.experiments.run import prepare

    assert prepare(built.config).path == path
    with pytest.raises(BundleError, match=r"was prepared from other input .* than this bundle"):
        evaluate(built.bundle)


def test_a_bundle_against_itself_differs_by_nothing_and_is_not_in_the_verdict(tiny: Any) -> None:
    card = evaluate(tiny.bundle, against=[tiny.bundle])
    name = f"against_{tiny.bundle.parent.name}"
    for metric, value in card["differences"][name].items():
        assert value["value"] in (0, None), metric
    shown = card["impressions"]
    assert shown["baselines"][name] == shown["model"]
    assert card["slices"]["warm_items"]["differences"][name]["recall_at_20"]["value"] == 0
    assert card["verdict"] == evaluate(tiny.bundle)["verdict"]


def test_only_bundles_of_the_same_data_can_be_paired(tiny: Any, plain: Any) -> None:
    with pytest.raises(ConfigError, match=r"know different items \(\d+ and \d+"):
        evaluate(tiny.bundle, against=[plain.bundle])


def test_the_refresh_that_was_used_is_stated_where_it_is_not_the_one_asked_for(plain: Any) -> None:
    """A query a minute for 1,100 minutes: 500 moments are the most that items are made for."""
    recommender = Recommender.load(plain.bundle)
    users, items = (recommender.bundle.users.ids, recommender.bundle.items.ids)
    n = np.arange(1100)
    later = Later(
        users.gather(n % len(users)),
        items.gather(n % len(items)),
        recommender.bundle.cutoff + n * 60_000_000,
        np.empty((len(n), 0), np.int64),
    )
    asked = {"refresh": "1m", "drop_seen": False}
    rules = plain.config.evaluate.model_copy(update=asked)
    card = judge(recommender, later, rules, each_event=True, protocol={})
    assert card["protocol"]["refresh"] == "1m asked, 4m used"
    assert card["protocol"]["item_statistics"] == "none"  # items are born all the same
