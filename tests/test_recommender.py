"""What is answered, what is never answered, and what is said when little is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys.errors import QueryError
from recsys.features.batching.batch import Queries
from recsys.ragged import Ragged
from recsys.serving import bundle as bundles
from recsys.serving.index import IndexRules
from recsys.serving.recommender import Answers, Recommender
from recsys.towers.encode import encode_users


@pytest.fixture(scope="module")
def shopkeeper(tiny: Any) -> Recommender:
    return Recommender.load(tiny.bundle)


@pytest.fixture(scope="module")
def trader(plain: Any) -> Recommender:
    return Recommender.load(plain.bundle)


def _ids(recommender: Recommender, mask: np.ndarray) -> set[str]:
    return set(recommender.bundle.items.decode(np.flatnonzero(mask)).to_list())


def _had(recommender: Recommender, user: str) -> set[str]:
    row = recommender.bundle.users.encode([user]).astype(np.int64)
    had = recommender.bundle.timeline.histories(row).values
    return set(recommender.bundle.items.decode(had).to_list())


def _popular(recommender: Recommender) -> list[str]:
    """Items that may be answered, by clicks before the cut-off, equals by row; a slow twin."""
    bundle = recommender.bundle
    counts = np.bincount(bundle.timeline.item, minlength=bundle.items.size)
    rows = sorted(bundle.rows, key=lambda row: (-counts[row], row))
    return bundle.items.decode(rows).to_list()


def test_the_best_inner_products_among_what_may_be_answered_and_was_not_had(
    trader: Recommender,
) -> None:
    bundle = trader.bundle
    for user in bundle.users.ids.to_list()[:9]:
        queries = trader.queries(bundle.users.encode([user]).astype(np.int64))
        vector = encode_users(bundle.model, queries)[0]
        had = _had(trader, user)
        scores = {
            bundle.items.ids[int(row) - 1]: float(bundle.vectors[row] @ vector)
            for row in bundle.rows
        }
        best = sorted(
            (i for i in scores if i not in had), key=lambda item: scores[item], reverse=True
        )
        answers = trader.recommend(user=user, k=8)
        assert answers.ids == best[:8] and answers.fallback is None
        np.testing.assert_allclose(answers.scores, [scores[i] for i in best[:8]], rtol=1e-5)
        everything = trader.recommend(user=user, k=8, drop_seen=False)
        assert everything.ids == sorted(scores, key=lambda item: -scores[item])[:8]
        assert trader.recommend(user=user, k=8, exact=True).ids == answers.ids


def test_what_the_item_table_forbids_is_never_answered(trader: Recommender) -> None:
    # i05 is over, i06 not for sale; i07 comes on the ninth day, and the cut-off is the ninth day's
    # start; i39 is met later.
    everything = set(trader.recommend(history=["i00"], k=99, drop_seen=False).ids)
    assert not everything & {"i05", "i06", "i39"}
    later = trader.as_of(trader.bundle.cutoff + 86_400_000_000)
    assert "i07" in later.recommend(history=["i00"], k=99).ids
    earlier = trader.as_of(1_704_067_200_000_000 + 86_400_000_000)
    assert "i05" in earlier.recommend(history=["i00"], k=99).ids
    assert "i07" not in earlier.recommend(history=["i00"], k=99).ids
    assert "i06" not in later.similar(item="i06", k=99).ids  # but it may be asked for
    assert len(later.similar(item="i06", k=99).ids) > 30


def test_k_beyond_the_catalogue_answers_what_there_is(trader: Recommender) -> None:
    n = len(trader.bundle.rows)
    for k in (n, n + 1, 10**12):  # the last would not fit into any memory
        assert len(trader.recommend(history=["i00"], k=k).ids) == n - 1
        assert len(trader.recommend(user="nobody", k=k).ids) == n
        assert len(trader.similar(item="i00", k=k).ids) == n - 1
        assert len(trader.similar(item="unheard of", k=k).ids) == n


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(trader: Recommender, k: int) -> None:
    for ask in ({"user": "u01"}, {"user": "nobody"}, {"history": ["i00"]}):
        with pytest.raises(QueryError, match=f"k is {k}"):
            trader.recommend(**ask, k=k)
    for item in ("i00", "unheard of"):
        with pytest.raises(QueryError, match=f"k is {k}"):
            trader.similar(item=item, k=k)


def test_an_unknown_user_gets_popular_items_and_is_told(trader: Recommender) -> None:
    answers = trader.recommend(user="nobody", k=5)
    assert answers.ids == _popular(trader)[:5]
    assert "user 'nobody' is unknown" in str(answers.fallback)
    assert "most popular items answer" in str(answers.fallback)
    assert trader.recommend(history=[], k=5).ids == answers.ids


def test_a_history_of_unknown_items_falls_back_and_a_mixed_one_says_what_was_left_out(
    trader: Recommender,
) -> None:
    nothing = trader.recommend(history=["x", "y"], k=5)
    assert nothing.ids == _popular(trader)[:5]
    assert "2 of 2 items are unknown ('x')" in str(nothing.fallback)
    mixed = trader.recommend(history=["i03", "x"], k=5)
    assert mixed.ids == trader.recommend(history=["i03"], k=5).ids
    assert mixed.fallback == "1 of 2 items are unknown ('x')"
    assert "i03" not in mixed.ids


def test_a_given_history_is_read_instead_of_the_known_one_and_both_count_as_seen(
    trader: Recommender,
) -> None:
    user = trader.bundle.users.ids[0]
    both = trader.recommend(user=user, history=["i09"], k=99)
    assert not set(both.ids) & (_had(trader, user) | {"i09"})
    alone = trader.recommend(history=["i09"], k=99)
    assert both.ids == [i for i in alone.ids if i not in _had(trader, user)]
    # Popular items leave out what the user had, too.
    popular = trader.recommend(user=user, history=[], k=99)
    assert popular.ids == [i for i in _popular(trader) if i not in _had(trader, user)]
    assert "most popular" in str(popular.fallback)


def test_nobody_and_everybody_at_once_are_refused(trader: Recommender) -> None:
    with pytest.raises(QueryError, match="Say for whom"):
        trader.recommend()
    for ask in ({}, {"item": "i00", "text": "lamp"}):
        with pytest.raises(QueryError, match="either an item id or a text"):
            trader.similar(**ask)


def test_similar_items_are_the_nearest_and_never_the_item_itself(trader: Recommender) -> None:
    bundle = trader.bundle
    row = int(bundle.items.encode(["i04"])[0])
    scores = bundle.vectors[bundle.rows] @ bundle.vectors[row]
    nearest = [r for r in bundle.rows[np.argsort(-scores)] if r != row][:6]
    assert trader.similar(item="i04", k=6).ids == bundle.items.decode(nearest).to_list()
    unknown = trader.similar(item="unheard of", k=4)
    assert unknown.ids == _popular(trader)[:4]
    assert "'unheard of' is unknown" in str(unknown.fallback)


def test_a_text_finds_items_through_the_item_tower(shopkeeper: Recommender) -> None:
    answers = shopkeeper.similar(text="copper skillet", k=5)
    assert len(answers.ids) == 5 and answers.fallback is None
    assert (np.diff(answers.scores) <= 0).all()
    assert answers.ids != shopkeeper.similar(text="leather backpack", k=5).ids
    with pytest.raises(QueryError, match="text is empty"):
        shopkeeper.similar(text="  ")


def test_a_text_is_refused_by_a_bundle_without_texts(trader: Recommender) -> None:
    silent = Recommender(replace(trader.bundle, encoder_folder=None))
    with pytest.raises(QueryError, match="trained without item text"):
        silent.similar(text="a lamp")


@pytest.mark.parametrize("score", ["dot", "projection"])
def test_other_scores_rank_by_the_inner_product_too(
    score: str, build: Callable[..., Any], market_run: str, tmp_path: Any
) -> None:
    run = market_run.replace("[towers]", f'[towers]\nscore = "{score}"')
    recommender = Recommender.load(build(run, tmp_path).bundle)
    bundle = recommender.bundle
    queries = recommender.queries(np.arange(1, 6))
    users = encode_users(bundle.model, queries)
    scores = recommender.recommend_rows(queries, 6, exact=True, drop_seen=False)[1]
    product = users @ bundle.vectors[bundle.rows].T
    np.testing.assert_allclose(scores, -np.sort(-product)[:, :6], rtol=1e-5)
    row = int(bundle.items.encode(["i02"])[0])
    wide = bundle.vectors[:, :8]
    alike = wide[bundle.rows] @ wide[row]
    nearest = [r for r in bundle.rows[np.argsort(-alike, kind="stable")] if r != row][:4]
    found = recommender.similar(item="i02", k=4, exact=True)
    assert found.ids == bundle.items.decode(nearest).to_list()


def test_answers_as_objects_have_item_score_and_the_chosen_fields(
    shopkeeper: Recommender,
) -> None:
    answers = shopkeeper.similar(item=shopkeeper.bundle.items.ids[0], k=3).to_list()
    assert [list(answer) for answer in answers] == [
        ["item", "score", "title", "category", "price"]
    ] * 3
    again = json.loads(json.dumps(answers))
    assert all(isinstance(a["item"], str) and isinstance(a["score"], float) for a in again)
    table = pl.read_parquet(shopkeeper_items(shopkeeper)).rows_by_key(
        "item", unique=True, named=True
    )
    for answer in answers:
        assert answer["title"] == table[answer["item"]]["title"]
        assert answer["price"] == table[answer["item"]]["price"]


def shopkeeper_items(recommender: Recommender) -> str:
    return recommender.bundle.manifest["config"]["data"]["items"]


def test_a_column_of_the_item_table_never_replaces_the_score(trader: Recommender) -> None:
    # The market's table has a column of this very name.
    answers = trader.recommend(history=["i09"], k=3)
    said = answers.to_list()
    assert [round(float(score), 6) for score in answers.scores] == [a["score"] for a in said]
    assert list(said[0]) == ["item", "score", "title"]
    one = Answers(["a"], np.array([0.5], np.float32), [{"score": 7, "x": None}])
    assert one.to_list() == [{"item": "a", "score": 0.5, "x": None}]


def test_many_queries_at_once_are_as_one_by_one(shopkeeper: Recommender) -> None:
    """Known users, strangers, empty and given histories in one call; a slow twin."""
    bundle = shopkeeper.bundle
    rows = np.array([3, 0, 5, 0, 1])
    history = Ragged.from_lists([[1, 2], [], [], [7], [4]])
    got, scores, popular = shopkeeper.recommend_rows(Queries(rows, history), 6)
    assert popular.tolist() == [False, True, True, False, False]
    for query, row in enumerate(rows):
        user = None if row == 0 else bundle.users.ids[int(row) - 1]
        items = bundle.items.decode(history[query]).to_list()
        one = shopkeeper.recommend(user=user, history=items, k=6)
        assert bundle.items.decode(got[query]).to_list() == one.ids
        np.testing.assert_allclose(scores[query], one.scores, rtol=1e-5)
        assert ("most popular" in str(one.fallback)) == popular[query]


def test_scores_of_given_rows_are_inner_products(shopkeeper: Recommender) -> None:
    queries = shopkeeper.queries(np.array([1, 4, 2]))
    items = Ragged.from_lists([[3, 9], [], [0, 5, 5]])
    users = encode_users(
        shopkeeper.bundle.model, queries, shopkeeper.bundle.timeline, shopkeeper.bundle.cutoff
    )
    wanted = [users[q] @ shopkeeper.bundle.vectors[i] for q in range(3) for i in items[q]]
    np.testing.assert_allclose(shopkeeper.score_rows(queries, items), wanted, rtol=1e-5)


def test_an_earlier_moment_knows_only_what_was_before_it(shopkeeper: Recommender) -> None:
    """The events at and after the moment may be any others: nothing changes."""
    bundle = shopkeeper.bundle
    timeline = bundle.timeline
    as_of = int(np.quantile(timeline.time, 0.6))
    rng = np.random.default_rng(0)
    late = timeline.time >= as_of
    changed = replace(
        timeline,
        item=np.where(late, rng.integers(1, bundle.items.size, len(late)), timeline.item),
        shown=None if timeline.shown is None else Ragged(
            timeline.shown.offsets,
            np.where(timeline.shown.values >= as_of, as_of, timeline.shown.values),
        ),
    )  # fmt: skip
    other = Recommender(replace(bundle, timeline=changed)).as_of(as_of)
    here = shopkeeper.as_of(as_of)
    users = np.arange(1, bundle.users.size)
    times = np.full(len(users), as_of)
    for a, b in zip(
        here.recommend_rows(here.queries(users, times), 9),
        other.recommend_rows(other.queries(users, times), 9),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    now = shopkeeper.recommend_rows(shopkeeper.queries(users), 9)[0]
    assert (now != here.recommend_rows(here.queries(users, times), 9)[0]).any()


def test_times_and_strengths_of_a_history_reach_the_towers_and_survive_the_bundle(
    build: Callable[..., Any], market_run: str, tmp_path: Any
) -> None:
    run = market_run.replace("[towers]", '[towers]\nhistory = {inputs = ["recency", "weight"]}')
    bundle = Recommender.load(build(run, tmp_path).bundle).bundle
    events = len(bundle.timeline.item)
    weight = np.random.default_rng(0).integers(1, 4, events).astype(np.float32)
    timeline = replace(bundle.timeline, event_weight=weight)
    with torch.no_grad():
        for table in ("recency", "weight"):
            getattr(bundle.model.user_tower.history.inputs, table).weight[1:].normal_()
    told = Recommender(replace(bundle, timeline=timeline))
    users = np.arange(1, bundle.users.size)
    queries = told.queries(users)
    assert queries.elapsed is not None and queries.event_weight is not None
    at = np.concatenate([np.arange(*timeline.user_offsets[u : u + 2])[-50:] for u in users])
    seconds = (bundle.cutoff - timeline.time[at]) / 1_000_000
    np.testing.assert_array_equal(queries.elapsed, seconds)
    np.testing.assert_array_equal(queries.event_weight, weight[at])
    again = Recommender.load(
        bundles.save(told.bundle, tmp_path / "again", rules=IndexRules(kind="exact"))
    )
    found = encode_users(again.bundle.model, again.queries(users))
    np.testing.assert_array_equal(found, encode_users(bundle.model, queries))
    # Half a day later the same history is older; typed in, it has no times.
    later = told.queries(users, np.full(len(users), bundle.cutoff + 43_200_000_000))
    assert (np.abs(encode_users(bundle.model, later) - found).max(1) > 1e-4).any()
    typed = encode_users(bundle.model, Queries(users, queries.history))
    assert (np.abs(typed - found).max(1) > 1e-4).all()
    assert again.recommend(history=["i01", "i02"], k=3).fallback is None


def test_before_anything_exists_nothing_is_answered(shopkeeper: Recommender) -> None:
    early = shopkeeper.as_of(0)
    assert not early.allowed.any()
    rows, scores, _ = early.recommend_rows(early.queries(np.array([1, 2])), 3)
    assert (rows == -1).all() and np.isneginf(scores).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"user": ["u01", "u02"]}, "user id .* is a list, and ids are text"),
        ({"user": 7}, "user id 7 is a int"),
        ({"history": [3, 4]}, "item id 3 is a int"),
        ({"history": "i03"}, "a list of item ids; 'i03' is one text"),
        ({"users": "u01"}, "`users` are many; 'u01' is one"),
        ({"users": ["u01", 2]}, "2 among `users` is a int"),
    ],
)
def test_what_is_no_id_is_refused_and_not_answered_with_popular_items(
    trader: Recommender, ask: dict[str, Any], message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        trader.recommend(**ask)


def test_similar_refuses_what_is_no_id_too(trader: Recommender) -> None:
    for ask, message in (
        ({"item": 7}, "item id 7 is a int"),
        ({"item": ["i01"]}, "is a list"),
        ({"items": "i01"}, "`items` are many"),
        ({"items": [1]}, "1 among `items`"),
    ):
        with pytest.raises(QueryError, match=message):
            trader.similar(**ask)


def test_frames_of_users_and_histories_are_answered_as_frames(trader: Recommender) -> None:
    frame = pl.DataFrame({"user": ["a", "b"], "history": [["i03", "i04"], ["i09"]]})
    found = trader.recommend(users=frame, k=4)
    assert found.filter(user="b")["item"].to_list() == trader.recommend(history=["i09"], k=4).ids
    rows = pl.DataFrame({"user": ["a", "a", "b"], "item": ["i03", "i04", "i09"]})
    assert trader.recommend(users=rows, k=4).equals(found)
    answers = trader.recommend("u01", k=3)
    assert answers.frame.columns[:2] == ["item", "score"] and len(answers.frame) == 3


def test_it_says_what_it_is(trader: Recommender) -> None:
    assert repr(trader).startswith("Recommender(version='") and "items=" in repr(trader)
