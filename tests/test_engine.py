"""The engine answers as the recommender does, and knows what came since."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.errors import QueryError
from recsys.serving.engine.engine import Engine, EngineRules
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Filter, Query, UnknownItem
from recsys.serving.live.updates import Event, LiveUpdates
from recsys.serving.recommender import Recommender
from tests.serving_cases import STILL, FakeOverlay, engine_of, no_view, reply_to, small, view_of


@pytest.fixture(scope="module")
def keeper(tiny: Any) -> LoadedModel:
    return LoadedModel.load(tiny.bundle)


@pytest.fixture(scope="module")
def trade(plain: Any) -> LoadedModel:
    return LoadedModel.load(plain.bundle)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return small(tmp_path_factory.mktemp("graph") / "bundle")


@pytest.fixture
def updates() -> Iterator[LiveUpdates]:
    with LiveUpdates(None) as one:
        yield one


def _error(engine: Engine, ask: Query) -> str:
    (error,) = engine.answer([ask])
    assert isinstance(error, QueryError)
    return str(error)


# --- as the recommender ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "towers",
    [
        'history = {inputs = ["recency", "weight"]}',
        'history = {kind = "transformer", table = "offset"}\nscore = "dot"\nuser_id = true',
        'history = "none"\nuser_id = true',
        'ensemble = 2\nhistory = {kind = "mean", table = "own"}\nexample_age = 3',
    ],
)
def test_all_kinds_of_towers_are_asked_as_the_recommender_asks_them(
    towers: str, build: Any, shop_run: str, tmp_path: Path
) -> None:
    toml = shop_run.replace("[towers]", f"[towers]\n{towers}")
    served = LoadedModel.load(build(toml, tmp_path).bundle)
    model = served.bundle.model
    with torch.no_grad():  # what starts at zero shall say something here
        for weight in model.user_tower.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.manual_seed(1)))
        for layer in model.user_tower.modules():
            if getattr(layer, "padding_idx", None) == 0:
                layer.weight[0] = 0  # type: ignore[index,operator]
    engine, items = engine_of(served), served.bundle.items.ids.to_list()
    users = served.bundle.users.ids.to_list()[:15]
    asks = [Query("recommend", user=user, k=9) for user in users]
    expected = [Recommender(served).recommend(user=user, k=9) for user in users]
    for history in (items[:4], items[7:8]):
        asks.append(Query("recommend", history=tuple(history), k=9))
        expected.append(Recommender(served).recommend(history=history, k=9))
    for item in items[:5]:
        asks.append(Query("similar", items=(item,), k=9))
        expected.append(Recommender(served).similar(item=item, k=9))
    for ask, reply, answers in zip(asks, engine.answer(asks), expected, strict=True):
        assert isinstance(reply, Answers), reply
        assert reply.ids == answers.ids and reply.fallback == answers.fallback, ask
        np.testing.assert_allclose(reply.scores, answers.scores, rtol=1e-4, atol=1e-5)
        paged = reply_to(engine, replace(ask, paged=True, explain=ask.kind == "recommend"))
        assert paged.ids == answers.ids


def test_a_search_by_text_is_the_recommenders(keeper: LoadedModel, graph: LoadedModel) -> None:
    engine = engine_of(keeper)
    for text in ("brass lamp", "a minimalist watering can"):
        expected = Recommender(keeper).similar(text=text, k=5)
        reply = reply_to(engine, Query("search", text=text, k=5))
        assert reply.ids == expected.ids
        np.testing.assert_allclose(reply.scores, expected.scores, rtol=1e-5, atol=1e-6)
    replies = engine.answer(
        [Query("search", text="brass lamp"), Query("search", text=" "),
         Query("search", text="東京"),
         Query("search", text="oak chair")]
    )  # fmt: skip
    assert [isinstance(reply, Answers) for reply in replies] == [True, False, False, True]
    assert "empty" in str(replies[1]) and "No word" in str(replies[2])
    assert "without item text" in _error(engine_of(graph), Query("search", text="lamp"))


def test_a_mistake_costs_nobody_else_his_answer(trade: LoadedModel) -> None:
    engine = engine_of(trade)
    wrong = [
        (Query("recommend"), "Say for whom"),
        (Query("similar"), "one item id or several"),
        (Query("search"), "a text"),
        (Query("vector"), "vector of 8 numbers"),
        (Query("vector", vector=np.ones(9, np.float32)), "shape"),
        (Query("vector", vector=np.full(8, np.nan, np.float32)), "NaN"),
        (Query("vector", vector=np.full(8, 1e30, np.float32)), "too large"),
        (Query("similar", items=("i00",), k=0), "k is 0"),
        (Query("similar", items=("i00",), k=True), "k is True"),
        (Query("similar", items=("i00",), diversity=1.1), "diversity"),
        (Query("similar", items=("i00",), diversity=float("nan")), "diversity"),
        (Query("similar", items=("i00",), popularity=-2), "popularity"),
        (Query("similar", items=("i00",), fields=("colour",)), "no field 'colour'"),
        (Query("similar", items=("i00",), filter=Filter(equals={"colour": ("red",)})), "no column"),
        (Query("recommend", user="u01", context={"device": "tv"}), "reads no context"),
    ]
    good = Query("similar", items=("i00",), k=3)
    replies = engine.answer([good, *(ask for ask, _ in wrong), good])
    assert isinstance(replies[0], Answers) and isinstance(replies[-1], Answers)
    for (ask, said), reply in zip(wrong, replies[1:-1], strict=True):
        assert isinstance(reply, QueryError) and said in str(reply), ask
    assert engine.answer([]) == []


def test_context_moves_the_user_and_unknown_values_do_not(keeper: LoadedModel) -> None:
    engine = engine_of(keeper)
    codes = engine.inputs.context_of
    vocab = keeper.bundle.contexts[0].vocab
    assert vocab is not None
    for value in (*vocab.ids.to_list(), "never met"):
        assert codes({"device": value}) == tuple(vocab.encode([value]).tolist())
    history = tuple(keeper.bundle.items.ids.to_list()[:3])
    plain, unknown, known = (
        reply_to(engine, Query("recommend", history=history, context=context)).scores
        for context in ({}, {"device": "never met"}, {"device": vocab.ids[0]})
    )
    np.testing.assert_array_equal(plain, unknown)
    assert not np.allclose(plain, known)


# --- several seeds, dials, filters ----------------------------------------------------------------


def test_several_seeds_are_the_mean_of_their_directions(trade: LoadedModel) -> None:
    engine, seeds = engine_of(trade), ("i01", "i02", "i09")
    vectors = trade.bundle.vectors[trade.bundle.items.encode(seeds)]
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    rows = [r for r in trade.bundle.rows if trade.bundle.items.ids[int(r) - 1] not in seeds]
    best = sorted(rows, key=lambda row: -float(trade.bundle.vectors[row] @ mean))[:6]
    reply = reply_to(engine, Query("similar", items=seeds, k=6))
    assert reply.ids == trade.bundle.items.decode(best).to_list() and reply.fallback is None
    some = reply_to(engine, Query("similar", items=(*seeds, "x"), k=6))
    assert some.ids == reply.ids and some.fallback == "1 of 4 items are unknown ('x')"
    none = reply_to(engine, Query("similar", items=("x", "y"), k=6))
    assert none.fallback == "2 of 2 items are unknown ('x'), so the most popular items answer"


def test_min_of_k_and_allowed_answers_come_with_any_filter(graph: LoadedModel) -> None:
    engine = engine_of(graph)
    catalog = graph.bundle.catalog
    some = catalog["item"].to_list()
    filters = [
        Filter(equals={"category": ("tea",)}),
        Filter(equals={"category": ("tea", "books")}, ranges={"price": (5, 20)}),
        Filter(ranges={"price": (None, 2.0)}),
        Filter(ranges={"price": (1e6, None)}),
        Filter(allow=tuple(some[:30]), deny=tuple(some[:7])),
        Filter(allow=tuple(some[:300]), equals={"category": ("toys",)}),
        Filter(allow=("nobody",)), Filter(allow=()),
        Filter(deny=tuple(some[:5])), Filter(deny=tuple(some[::2])),
        Filter(deny=tuple(some[::2]), ranges={"price": (10, 11)}),
    ]  # fmt: skip

    def allowed(filter: Filter) -> set[str]:
        kept = catalog
        for name, values in filter.equals.items():
            kept = kept.filter(kept[name].is_in(list(values)))
        for name, (low, high) in filter.ranges.items():
            kept = kept.filter(kept[name].is_between(low or -1e9, 1e9 if high is None else high))
        ids = set(kept["item"].to_list()) - set(filter.deny)
        return ids if filter.allow is None else ids & set(filter.allow)

    asks = []
    for filter in filters:
        for k in (5, 400, 5000):
            asks += [
                Query("similar", items=("i0000100",), k=k, filter=filter),
                Query("recommend", history=("i0000100", "i0000200"), k=k, filter=filter),
                Query("recommend", user="nobody", k=k, filter=filter),
                Query("vector", vector=graph.bundle.vectors[3], k=k, filter=filter),
            ]
    for ask, reply in zip(asks, engine.answer(asks), strict=True):
        assert isinstance(reply, Answers)
        may = allowed(ask.filter) - set(ask.items) - set(ask.history or ())
        assert set(reply.ids) <= may and len(reply.ids) == min(ask.k, len(may)), ask
        again = reply_to(engine, replace(ask, exact=True))
        np.testing.assert_allclose(reply.scores, again.scores, rtol=1e-4, atol=1e-5)


def test_a_filter_lets_nothing_through_that_was_deleted(graph: LoadedModel) -> None:
    some = graph.bundle.catalog["item"].to_list()
    engine = Engine(graph, FakeOverlay(view_of(graph, {}, some[::3])), rules=STILL)
    left = set(some) - set(some[::3])
    for filter in (
        Filter(ranges={"price": (0, None)}),
        Filter(deny=tuple(some[:200])),
        Filter(allow=tuple(some[:200])),
        Filter(ranges={"price": (0, None)}, deny=tuple(some[:9])),
    ):
        may = left - set(filter.deny) & left if filter.allow is None else left & set(filter.allow)
        for ask in (
            Query("vector", vector=graph.bundle.vectors[9], k=5000, filter=filter),
            Query("vector", vector=graph.bundle.vectors[9], k=50, filter=filter),
            Query("recommend", user="nobody", k=5000, filter=filter),
        ):
            ids = reply_to(engine, ask).ids
            assert set(ids) <= may and len(ids) == min(ask.k, len(may))


def test_dials_reorder_a_pool_and_leave_scores_alone(graph: LoadedModel) -> None:
    engine = engine_of(graph)
    plain = reply_to(engine, Query("similar", items=("i0000100",), k=100, exact=True))
    scores = dict(zip(plain.ids, plain.scores.tolist(), strict=True))
    varied = reply_to(engine, Query("similar", items=("i0000100",), k=10, diversity=0.9))
    assert varied.ids[0] == plain.ids[0] and varied.ids != plain.ids[:10]
    assert set(varied.ids) <= set(plain.ids)
    assert varied.scores.tolist() == pytest.approx([scores[id] for id in varied.ids], abs=1e-5)
    counts = np.bincount(graph.bundle.timeline.item, minlength=graph.bundle.items.size)

    def popularity(ids: list[str]) -> float:
        return float(counts[graph.bundle.items.encode(ids)].mean())

    more, less = (
        reply_to(engine, Query("similar", items=("i0000100",), k=10, popularity=p))
        for p in (1.0, -1.0)
    )
    assert popularity(more.ids) > popularity(plain.ids[:10]) >= popularity(less.ids)


# --- what came since ------------------------------------------------------------------------------


def test_a_live_item_is_found_by_text_filter_and_likeness_and_gone_when_deleted(
    keeper: LoadedModel, updates: LiveUpdates
) -> None:
    engine = Engine(keeper, updates.attach(keeper), rules=STILL)
    title = "Minimalist watering can, mustard yellow zinc"
    updates.put_item("new", {"title": title, "category": "Garden", "price": 31.94})
    cheap = Filter(ranges={"price": (31.9, 32.0)})
    found = reply_to(
        engine, Query("search", text=title, k=3, filter=cheap, fields=("title", "price"))
    )
    assert "new" in found.ids and found.fields is not None
    assert found.fields[found.ids.index("new")] == {"title": title, "price": 31.94}
    for fields, said in (((), {}), (("title", "title"), {"title": title})):
        again = reply_to(engine, Query("search", text=title, k=3, filter=cheap, fields=fields))
        assert again.fields is not None and len(again.fields) == len(again.ids) > 1
        assert again.fields[again.ids.index("new")] == said
    alike = reply_to(engine, Query("similar", items=("new",), k=5))
    assert alike.fallback is None and "new" not in alike.ids
    assert "new" in reply_to(engine, Query("recommend", user="nobody", k=1000)).ids
    other = found.ids[1 - found.ids.index("new")]
    assert "new" in reply_to(engine, Query("similar", items=(other,), k=100)).ids
    assert engine.item("new")["live"] and engine.item("new")["fields"]["category"] == "Garden"
    parts = Filter(equals={"category": ("Garden",)})
    assert "new" in reply_to(
        engine, Query("similar", items=(found.ids[0],), k=99, filter=parts)
    ).ids or (found.ids[0] == "new")
    updates.delete_item("new")
    gone = reply_to(engine, Query("search", text=title, k=1000))
    assert "new" not in gone.ids
    assert "unknown" in str(reply_to(engine, Query("similar", items=("new",))).fallback)
    with pytest.raises(UnknownItem, match="no item 'new'"):
        engine.item("new")


def test_a_replaced_item_stands_once_and_a_deleted_one_never(
    keeper: LoadedModel, updates: LiveUpdates
) -> None:
    engine = Engine(keeper, updates.attach(keeper), rules=STILL)
    first, second = keeper.bundle.items.decode(keeper.bundle.rows[:2]).to_list()
    updates.put_item(first, {"title": "Something else altogether", "price": 3.0})
    updates.delete_item(second)
    everything = reply_to(engine, Query("recommend", user="nobody", k=1000)).ids
    assert everything.count(first) == 1 and second not in everything
    assert engine.item(first)["fields"]["title"] == "Something else altogether"
    for id in keeper.bundle.items.decode(keeper.bundle.rows[2:30]).to_list():
        planned = reply_to(engine, Query("similar", items=(id,), k=5))
        assert planned.ids == reply_to(engine, Query("similar", items=(id,), k=5, exact=True)).ids
    facts = engine.facts()
    assert (facts["live_items"], facts["hidden_items"]) == (1, 2)
    assert facts["answerable"] == len(keeper.bundle.rows) - 1


def test_posted_events_count_at_once_and_are_not_recommended_again(
    trade: LoadedModel, updates: LiveUpdates
) -> None:
    engine = Engine(trade, updates.attach(trade), rules=STILL)
    before = reply_to(engine, Query("recommend", user="fresh", k=5))
    assert before.fallback and "unknown" in before.fallback
    as_of = (trade.bundle.cutoff or 0) + 1
    updates.post_events([Event("fresh", "i03", as_of), Event("fresh", "i04", as_of + 1)])
    after = reply_to(engine, Query("recommend", user="fresh", k=5))
    same = reply_to(engine, Query("recommend", history=("i03", "i04"), k=5))
    assert after.fallback is None and after.ids == same.ids and not {"i03", "i04"} & set(after.ids)
    user = trade.bundle.users.ids[0]
    old = engine.user(user)
    updates.post_events([Event(user, "i05", as_of + 2)])
    new = engine.user(user)
    assert new["known"] and new["history"] == [*old["history"], {"id": "i05", "time": as_of + 2}]
    assert new["events"] == [{"id": "i05", "time": as_of + 2, "strength": 1.0}]
    row = trade.bundle.users.encode([user])
    had = trade.bundle.items.decode(trade.bundle.timeline.histories(row).values).to_list()
    told = reply_to(engine, Query("recommend", history=(*had, "i05"), k=5)).ids
    assert reply_to(engine, Query("recommend", user=user, k=5)).ids == told
    assert engine.user("stranger") == {
        "id": "stranger", "known": False, "history": [], "events": []
    }  # fmt: skip


def test_a_history_may_name_live_items(graph: LoadedModel) -> None:
    vector = graph.bundle.vectors[7]  # what histories read of an item is its id vector here
    overlay = FakeOverlay(view_of(graph, {"other": graph.bundle.vectors[300], "twin": vector}))
    engine = Engine(graph, overlay, rules=STILL)
    by_twin = reply_to(engine, Query("recommend", history=("twin",), k=9, drop_seen=False))
    by_item = reply_to(engine, Query("recommend", history=("i0000006",), k=9, drop_seen=False))
    assert by_twin.ids == by_item.ids and by_twin.fallback is None
    assert by_twin.ids[:2] == ["i0000006", "twin"]  # equals by place
    dropped = reply_to(engine, Query("recommend", history=("i0000050", "twin"), k=2000))
    assert "twin" not in dropped.ids and "i0000006" in dropped.ids


def test_one_call_reads_one_state(graph: LoadedModel) -> None:
    class Turning:
        """Another view with every read."""

        def __init__(self) -> None:
            self.reads = 0

        @property
        def view(self) -> Any:
            self.reads += 1
            vector = graph.bundle.vectors[7]
            return view_of(graph, {f"v{self.reads}-{n}": vector for n in range(4)})

    overlay = Turning()
    engine = Engine(graph, overlay, rules=STILL)
    reads = overlay.reads
    replies = engine.answer([Query("similar", items=("i0000006",), k=5)] * 3)
    assert overlay.reads == reads + 1
    seen = {id.split("-")[0] for reply in replies for id in reply.ids if id[0] == "v"}  # type: ignore[union-attr]
    assert len(seen) == 1


def test_windows_are_as_of_the_clock(trade: LoadedModel) -> None:
    now = [trade.bundle.cutoff or 0]
    engine = Engine(trade, FakeOverlay(no_view(trade)), rules=EngineRules(clock=lambda: now[0]))
    ask = Query("recommend", user="nobody", k=99)
    before = set(reply_to(engine, ask).ids)
    now[0] += 2 * 86_400_000_000
    later = Recommender(trade).as_of(now[0])
    after = set(reply_to(engine, ask).ids)
    assert after == set(later.bundle.items.decode(later.bundle.rows).to_list()) != before
    assert "i07" in after - before
    assert engine.item("i07")["available"] and not engine.item("i06")["available"]
    assert engine.facts()["late_items"] == 1


# --- the table of neighbours ----------------------------------------------------------------------

ASK = Query("similar")


def test_the_table_answers_as_exact_search(keeper: LoadedModel, trade: LoadedModel) -> None:
    for served in (keeper, trade):
        engine = engine_of(served)
        for id in served.bundle.items.decode(served.bundle.rows).to_list():
            for k in (1, 4, 20):
                slow = reply_to(engine, Query("similar", items=(id,), k=k, exact=True))
                planned = reply_to(engine, replace(ASK, items=(id,), k=k))
                for quick in (engine.from_table(id, k), planned):
                    assert quick is not None and quick.ids == slow.ids
                    np.testing.assert_allclose(quick.scores, slow.scores, atol=2e-6)
        everything = len(served.bundle.rows)
        assert engine.from_table(id, everything) is None  # itself is left out
        assert engine.from_table(id, 0) is None and engine.from_table(id, 101) is None
        assert engine.from_table("x", 3) is None
    assert engine_of(trade).from_table("i06", 3) is None  # not for sale: not in the index


def test_the_table_gives_up_when_too_much_of_the_table_is_closed(keeper: LoadedModel) -> None:
    ids = keeper.bundle.items.decode(keeper.bundle.rows).to_list()
    engine = Engine(keeper, FakeOverlay(view_of(keeper, {}, ids[1:60])), rules=STILL)
    for id in (ids[0], *ids[60:]):
        quick = engine.from_table(id, 10)
        assert quick is not None
        slow = reply_to(engine, Query("similar", items=(id,), k=10, exact=True))
        assert quick.ids == slow.ids
    left = len(ids) - 59
    assert engine.from_table(ids[0], left - 1) is not None
    assert engine.from_table(ids[0], left) is None


def test_facts_name_the_model(keeper: LoadedModel) -> None:
    facts = engine_of(keeper).facts()
    assert facts["version"] == keeper.version and facts["items"] == len(keeper.bundle.items.ids)
    assert facts["neighbours"]["recall"] >= 0.99 and facts["text"] and facts["statistics"]
    assert facts["context"] == ["device"] and facts["fields"]["price"] == "Float64"
    json.dumps(facts)
