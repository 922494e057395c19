"""Scores of given pairs and impression lists, as of their time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError, DataError
from recsys.experiments.evaluation.evaluate import (
    test_side as later_side,  # the name is not that of a test
)
from recsys.experiments.evaluation.scorecard import judge
from recsys.features.batching.batch import Queries
from recsys.metrics import auc
from recsys.ragged import Ragged
from recsys.serving.recommender import Recommender
from recsys.serving.score import write_scores
from recsys.towers.encode import encode_users

SECOND = 1_000_000


@pytest.fixture(scope="module")
def shopkeeper(tiny: Any) -> Recommender:
    return Recommender.load(tiny.bundle)


@pytest.fixture(scope="module")
def trader(plain: Any) -> Recommender:
    return Recommender.load(plain.bundle)


def _row(recommender: Recommender, item: str) -> int:
    return int(recommender.bundle.items.encode([item])[0])


def _product(recommender: Recommender, user: int, history: list[int], item: str) -> float:
    """Score of one pair, one by one."""
    bundle = recommender.bundle
    queries = Queries(np.array([user]), Ragged.from_lists([history]))
    vector = encode_users(bundle.model, queries, bundle.timeline, bundle.cutoff)[0]
    return float(vector @ bundle.vectors[_row(recommender, item)])


def test_pairs_and_lists_get_inner_products(trader: Recommender, tmp_path: Path) -> None:
    bundle = trader.bundle
    pairs = pl.DataFrame(
        {
            "user": ["u01", "nobody", "u01", "u02"],
            "item": ["i03", "i03", "x", "i08"],
            "n": [1, 2, 3, 4],
        }
    )
    pairs.write_csv(tmp_path / "p.csv")
    scored = write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet")
    assert (scored.pairs, scored.unknown_users, scored.unknown_items) == (4, 1, 1)
    found = pl.read_parquet(tmp_path / "s.parquet")
    assert found.columns == ["user", "item", "n", "score"]
    assert found["score"].dtype == pl.Float32
    assert found["n"].to_list() == ["1", "2", "3", "4"]  # rows stay in order, columns as they were
    wanted = []
    for user, item in pairs.select("user", "item").iter_rows():
        row = int(bundle.users.encode([user])[0])
        history = bundle.timeline.histories(np.array([row])).values[-50:].tolist()
        wanted.append(_product(trader, row, history, item))
    np.testing.assert_allclose(found["score"].to_numpy(), wanted, rtol=1e-5)
    lists = pl.DataFrame(
        {"user": ["u01", "u02", "u03"], "shown": [["i03", "x"], ["i08"], []]},
        schema_overrides={"shown": pl.List(pl.String)},
    )
    lists.write_parquet(tmp_path / "l.parquet")
    scored = write_scores(trader, tmp_path / "l.parquet", tmp_path / "ls.parquet")
    assert (scored.pairs, scored.unknown_users, scored.unknown_items) == (3, 0, 1)
    many = pl.read_parquet(tmp_path / "ls.parquet")["score"].to_list()
    np.testing.assert_allclose(many[0], [wanted[0], wanted[2]], rtol=1e-5)
    np.testing.assert_allclose(many[1], [wanted[3]], rtol=1e-5)
    assert not many[2]


def test_a_given_history_is_read_as_it_stands(trader: Recommender, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('history,item\n"i01 i02",i05\ni02 x i01,i05\n,i05\n')
    write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet")
    found = pl.read_parquet(tmp_path / "s.parquet")["score"]
    one, two = _row(trader, "i01"), _row(trader, "i02")
    wanted = [_product(trader, 0, h, "i05") for h in ([one, two], [two, one], [])]
    np.testing.assert_allclose(found.to_numpy(), wanted, rtol=1e-5)


def test_an_item_that_nobody_knows_scores_as_one_without_content(
    trader: Recommender, tmp_path: Path, plain: Any
) -> None:
    """Whether a later log has met it or nobody ever has."""
    later = later_side(plain.dataset)
    vectors = trader.bundle.vectors.copy()
    vectors[0] = vectors[5]  # untrained, "nothing known" has no direction
    recommender = Recommender(replace(trader.bundle, vectors=vectors))
    (tmp_path / "p.csv").write_text("history,item\ni01,never heard of\ni01,i39\n")
    write_scores(recommender, tmp_path / "p.csv", tmp_path / "s.parquet", log=later)
    met, unmet = pl.read_parquet(tmp_path / "s.parquet")["score"].to_list()
    assert met == unmet != 0


def test_with_a_time_only_what_was_strictly_before_it_is_known(
    trader: Recommender, tmp_path: Path
) -> None:
    bundle = trader.bundle
    row = 1
    user = bundle.users.ids[0]
    start, end = bundle.timeline.user_offsets[1:3]
    times, items = bundle.timeline.time[start:end], bundle.timeline.item[start:end]
    asked = [int(times[0]), int(times[3]), int(times[3]) + SECOND, int(times[-1]) + SECOND]
    pl.DataFrame(
        {"user": [user] * 4, "item": ["i04"] * 4, "time": [t // SECOND for t in asked]}
    ).write_csv(tmp_path / "p.csv")
    write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet")
    found = pl.read_parquet(tmp_path / "s.parquet")["score"].to_numpy()
    wanted = [
        _product(
            trader,
            row,
            [int(i) for i, t in zip(items, times, strict=True) if t < as_of][-50:],
            "i04",
        )
        for as_of in asked
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(wanted)) == 4


def test_a_later_log_is_known_strictly_before_each_pair(
    trader: Recommender, plain: Any, tmp_path: Path
) -> None:
    later = later_side(plain.dataset)
    user, as_of = later.user[5], int(later.time[5])
    (tmp_path / "p.csv").write_text(
        f"user,item,time\n{user},i04,{as_of // SECOND}\n{user},i04,{as_of // SECOND + 1}\n"
    )
    write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet", log=later)
    at, after = pl.read_parquet(tmp_path / "s.parquet")["score"].to_list()
    assert at != after
    gone = later.since(as_of + 1)
    write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet", log=gone)
    # The event itself and whatever follows make no difference at its own time.
    earlier = later.user.filter(pl.Series(later.time < as_of)).to_list()
    if user not in earlier:
        assert pl.read_parquet(tmp_path / "s.parquet")["score"][0] == at


def test_the_scorecards_auc_comes_out_of_the_file_of_scores(
    shopkeeper: Recommender, tiny: Any, shop: Path, tmp_path: Path
) -> None:
    """Whoever wants may judge us with their own metrics: same requests, same numbers."""
    later = later_side(tiny.dataset)
    rules = tiny.config.evaluate
    card = judge(shopkeeper, later, rules, each_event=True, protocol={})["impressions"]
    log = pl.read_parquet(shop / "impressions.parquet")
    log = log.filter(
        pl.col("time").cast(pl.Datetime("us")).dt.epoch("us") >= tiny.dataset.test_from
    )
    log.write_parquet(tmp_path / "later.parquet")
    write_scores(shopkeeper, tmp_path / "later.parquet", tmp_path / "s.parquet", log=later)
    found = pl.read_parquet(tmp_path / "s.parquet").explode("shown", "score")
    clicked = (
        pl.read_parquet(tmp_path / "s.parquet")
        .explode("shown")
        .select(pl.col("shown").is_in(pl.col("clicked")))["shown"]
    )
    lengths = log["shown"].list.len().to_numpy().astype(np.int64)
    values = auc(
        found["score"].to_numpy(), clicked.to_numpy(), np.concatenate([[0], np.cumsum(lengths)])
    )
    assert int((~np.isnan(values)).sum()) == card["requests"]
    np.testing.assert_allclose(np.nanmean(values), card["model"]["auc"]["value"], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "p.csv"),
        ("user,itm\na,b\n", "p.csv has no column 'item'. Did you mean 'itm'?"),
        ("usr,item\na,b\n", "p.csv has no column 'user'. Did you mean 'usr'?"),
        ("user,item,time\na,b,noon\n", "p.csv.*noon"),
        ("user,item,time\na,b,5\na,c,\n", "no time in row 2"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused_and_nothing_is_written(
    trader: Recommender, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        write_scores(trader, tmp_path / "p.csv", tmp_path / "s.parquet")
    assert not (tmp_path / "s.parquet").exists()


def test_the_names_of_the_log_are_known_and_csv_is_csv(trader: Recommender, tmp_path: Path) -> None:
    columns = {"user": "who", "item": "what", "time": "at"}
    manifest = {**trader.bundle.manifest, "config": {"data": {"columns": columns}}}
    ours = Recommender(replace(trader.bundle, manifest=manifest))
    pl.DataFrame({"who": ["u01", "u02"], "what": ["i03", "i04"]}).write_csv(tmp_path / "p.csv")
    pl.DataFrame({"user": ["u01", "u02"], "item": ["i03", "i04"]}).write_csv(tmp_path / "o.csv")
    write_scores(ours, tmp_path / "p.csv", tmp_path / "s.csv")
    write_scores(ours, tmp_path / "o.csv", tmp_path / "o.parquet")
    found = pl.read_csv(tmp_path / "s.csv")
    assert found.columns == ["who", "what", "score"]
    wanted = pl.read_parquet(tmp_path / "o.parquet")["score"].to_list()
    assert found["score"].to_list() == pytest.approx(wanted)
    frame = ours.score(pl.read_csv(tmp_path / "p.csv"))
    assert frame["score"].to_list() == pytest.approx(wanted)
    with pytest.raises(ConfigError, match=r"neither \.parquet nor \.csv"):
        write_scores(ours, tmp_path / "p.csv", tmp_path / "s.txt")
