"""Pages are complete and without repeats, whatever comes and goes between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import QueryError
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import LIVE, Cursor, cut, exact_scores, question_of
from recsys.serving.engine.query import Answers, CursorError, Filter, Query
from tests.serving_cases import FakeOverlay, no_view, small, view_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return small(tmp_path_factory.mktemp("pages") / "bundle", items=600)


# --- the cursor -----------------------------------------------------------------------------------

CURSOR = Cursor("one", b"8 bytes.", 7, 0.1, (LIVE, 0, "ä/b"), np.ones((2, 3), np.float32), 30)


def _decode(
    text: str, version: str = "one", question: bytes = b"8 bytes.", dimension: int = 3
) -> Cursor:
    return Cursor.decode(text, version=version, question=question, dimension=dimension)


def test_a_cursor_is_read_back_and_may_stand_in_a_url() -> None:
    text = CURSOR.encode()
    assert set(text) <= set(LETTERS)
    again = _decode(text)
    assert (again.generation, again.score, again.key) == (7, 0.1, (LIVE, 0, "ä/b"))
    assert again.before == 30
    np.testing.assert_array_equal(again.vectors, CURSOR.vectors)


@given(st.data())
def test_a_changed_cursor_is_refused(data: st.DataObject) -> None:
    text = CURSOR.encode()
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from(LETTERS + "=+/ é"))
    changed = data.draw(
        st.sampled_from(
            [text[:place] + letter + text[place + 1 :], text[:place], text + letter, letter]
        )
    )
    if changed != text:
        with pytest.raises(CursorError, match="damaged") as caught:
            _decode(changed)
        assert not caught.value.gone


def test_a_cursor_of_another_model_is_gone_and_of_another_question_wrong() -> None:
    with pytest.raises(CursorError, match="two answers now") as caught:
        _decode(CURSOR.encode(), version="two")
    assert caught.value.gone
    with pytest.raises(CursorError, match="another question") as caught:
        _decode(CURSOR.encode(), question=b"8 others")
    assert not caught.value.gone
    with pytest.raises(CursorError, match="does not fit"):
        _decode(CURSOR.encode(), dimension=4)
    with pytest.raises(CursorError, match="does not fit"):
        _decode(replace(CURSOR, score=float("nan")).encode())
    with pytest.raises(CursorError, match="does not fit"):  # no position that could be written down
        _decode(replace(CURSOR, before=2**32 - 1).encode())


def test_what_may_change_between_pages_and_what_may_not() -> None:
    ask = Query("recommend", user="u", history=("a",), context={"x": 1.0, "y": "z"}, paged=True)
    same = replace(
        ask, k=50, fields=("title",), cursor="x", explain=True, context={"y": "z", "x": 1.0}
    )
    assert question_of(same) == question_of(ask)
    others = [
        replace(ask, user="v"), replace(ask, history=("a", "b")), replace(ask, history=None),
        replace(ask, context={}), replace(ask, drop_seen=False),
        replace(ask, filter=Filter(deny=("a",))),
        Query("vector", vector=np.ones(2)), Query("vector", vector=np.zeros(2)),
    ]  # fmt: skip
    assert len({question_of(one) for one in (ask, *others)}) == 1 + len(others)


# --- the cut --------------------------------------------------------------------------------------


@given(st.data())
def test_pages_of_rough_scores_are_the_exact_ranking_cut_in_pieces(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    exact = rng.integers(0, data.draw(st.sampled_from([1, 3, 50])) + 1, size) / 4.0  # many ties
    slack = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
    ranks, k = rng.permutation(size), data.draw(st.integers(1, 7))
    expected = sorted(range(size), key=lambda i: (-exact[i], ranks[i]))
    found: list[int] = []
    after = None
    while True:
        rough = (exact + rng.uniform(-slack, slack, size)).astype(np.float32)
        rough = np.clip(rough, exact - slack, exact + slack).astype(np.float32)
        places, scores, more = cut(
            rough, slack + 1e-6, lambda i: exact[i], lambda i: ranks[i], k, after
        )
        np.testing.assert_array_equal(scores, exact[places])
        found += places.tolist()
        if not more:
            break
        assert len(places) == k
        after = float(scores[-1]), float(ranks[places[-1]])
    assert found == expected


def test_an_exact_score_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((501, 33)).astype(np.float32)
    queries = rng.standard_normal((3, 33)).astype(np.float32)
    together = exact_scores(vectors, queries)
    for row in (0, 1, 250, 500):
        assert exact_scores(vectors[row : row + 1], queries)[0] == together[row]
    np.testing.assert_array_equal(exact_scores(vectors[::-7], queries), together[::-7])


# --- pages of an engine ---------------------------------------------------------------------------


def _pages(engine: Engine, ask: Query, between: object = None) -> list[list[str]]:
    pages, cursor = [], None
    while True:
        reply = engine.answer([replace(ask, cursor=cursor)])[0]
        assert isinstance(reply, Answers), reply
        assert reply.exact and (np.diff(reply.scores) <= 0).all()
        assert reply.first == 1 + sum(len(page) for page in pages)
        pages.append(reply.ids)
        cursor = reply.next
        if cursor is None:
            return pages
        if callable(between):
            between(len(pages))


ASKS = [
    Query("recommend", history=("i0000005", "i0000009"), k=70, paged=True),
    Query("recommend", user="nobody", k=100, paged=True),
    Query("similar", items=("i0000050",), k=90, paged=True),  # has a twin
    Query("similar", items=("i0000001",), k=9, paged=True, filter=Filter(ranges={"price": (0, 8)})),
    Query("vector", vector=np.zeros(8, np.float32), k=99, paged=True),  # all scores are equal
    Query("similar", items=("i0000001",), k=3, paged=True,
        filter=Filter(allow=tuple(f"i{n:07}" for n in range(20)))),
]  # fmt: skip


@pytest.mark.parametrize("ask", ASKS)
def test_pages_are_the_whole_ranking(served: LoadedModel, ask: Query) -> None:
    engine = Engine(served, FakeOverlay(no_view(served)))
    whole = engine.answer([replace(ask, paged=False, k=10_000, exact=True)])[0]
    assert isinstance(whole, Answers)
    pages = _pages(engine, ask)
    together = [id for page in pages for id in page]
    assert all(len(page) == ask.k for page in pages[:-1]) and 1 <= len(pages[-1]) <= ask.k
    assert sorted(together) == sorted(whole.ids) and len(set(together)) == len(together)
    if ask.vector is None:  # up to the rounding of nearly equal ones
        assert np.mean([a == b for a, b in zip(together, whole.ids, strict=True)]) > 0.97


@settings(max_examples=40)
@given(data=st.data())
def test_nothing_repeats_and_nothing_that_stayed_is_lost(
    served: LoadedModel, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    ask = replace(data.draw(st.sampled_from(ASKS)), k=data.draw(st.integers(5, 150)))
    known = [f"i{n:07}" for n in range(600)]

    def vector() -> np.ndarray:
        one = rng.standard_normal(8).astype(np.float32)
        return one / np.linalg.norm(one)

    live = {f"old{n}": vector() for n in range(5)} | {known[7]: vector()}
    since, deleted = dict.fromkeys(live, 5), {known[9]}
    overlay = FakeOverlay(view_of(served, live, deleted, since=since))
    engine = Engine(served, overlay)
    changed = set(deleted)

    def happens(page: int) -> None:
        for _ in range(data.draw(st.integers(0, 3))):
            id = data.draw(st.sampled_from([*known[:40], *live, f"new{page}"]))
            changed.add(id)
            if data.draw(st.booleans()) or id.startswith("new"):
                live.pop(id, None)  # comes last
                live[id], since[id] = vector(), 5 + page
                deleted.discard(id)
            else:
                live.pop(id, None)
                deleted.add(id)
        overlay.view = view_of(
            served, live, deleted, since=since, generation=page + 1,
            events={"nobody": (("i0000100", page, 1.0),)},
        )  # fmt: skip

    first = engine.answer([replace(ask, paged=False, k=10_000, exact=True)])[0]
    assert isinstance(first, Answers)
    together = [id for page in _pages(engine, ask, happens) for id in page]
    assert len(set(together)) == len(together)
    # What the user did meanwhile counts as seen from then on.
    stayed = set(first.ids) - changed - {"i0000100"}
    assert stayed <= set(together)
    assert set(together) <= set(first.ids)


def test_an_item_that_sinks_between_two_pages_does_not_stand_on_both(served: LoadedModel) -> None:
    query = served.bundle.vectors[6]
    live, since = {"mine": query}, {"mine": 1}
    overlay = FakeOverlay(view_of(served, live, since=since))
    engine = Engine(served, overlay)
    ask = Query("vector", vector=query, k=3, paged=True)
    (first,) = engine.answer([ask])
    assert isinstance(first, Answers) and "mine" in first.ids
    overlay.view = view_of(
        served, {"mine": -query, "new": 0.5 * query}, since={"mine": 2, "new": 3}
    )
    later: list[str] = []
    reply = first
    while reply.next:
        (reply,) = engine.answer([replace(ask, k=100, cursor=reply.next)])  # type: ignore[assignment]
        assert isinstance(reply, Answers)
        later += reply.ids
    assert not {"mine", "new"} & set(later) and len(later) == 600 + 1 - 3


def test_a_click_between_two_pages_does_not_shuffle_them(served: LoadedModel) -> None:
    overlay = FakeOverlay(no_view(served))
    engine = Engine(served, overlay)
    ask = Query("recommend", user="u00003", k=20, paged=True)
    whole = engine.answer([replace(ask, k=40)])[0]
    (first,) = engine.answer([ask])
    assert isinstance(first, Answers) and isinstance(whole, Answers) and first.next
    clicked = (("i0000500", 2 * 10**15, 1.0),) * 9
    overlay.view = view_of(served, {}, events={"u00003": clicked})
    (second,) = engine.answer([replace(ask, cursor=first.next)])
    assert isinstance(second, Answers)
    assert second.ids == [id for id in whole.ids[20:] if id != "i0000500"]
    (anew,) = engine.answer([ask])
    assert isinstance(anew, Answers) and anew.ids != first.ids


def test_a_page_costs_one_pass_whichever_it_is(
    served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys.serving.engine import paging as pages

    engine = Engine(served, FakeOverlay(no_view(served)))
    looked: list[int] = []
    real = pages.exact_scores
    monkeypatch.setattr(
        "recsys.serving.engine.ranking.exact_scores",
        lambda v, q: looked.append(len(v)) or real(v, q),
    )
    _pages(engine, replace(ASKS[0], k=20))
    assert len(looked) == 30 and max(looked) < 40  # closely at little more than a page


def test_dials_have_no_pages_and_other_versions_no_cursor(served: LoadedModel) -> None:
    engine = Engine(served, FakeOverlay(no_view(served)))
    for dial in ({"diversity": 0.5}, {"popularity": -0.5}):
        (refused,) = engine.answer([replace(ASKS[0], **dial)])
        assert isinstance(refused, QueryError) and "no next page" in str(refused)
    (first,) = engine.answer([ASKS[0]])
    assert isinstance(first, Answers) and first.next
    other = Engine(LoadedModel(served.bundle, None, version="two"), FakeOverlay(no_view(served)))
    (refused,) = other.answer([replace(ASKS[0], cursor=first.next)])
    assert isinstance(refused, CursorError) and refused.gone
    (refused,) = engine.answer([replace(ASKS[0], history=("i0000006",), cursor=first.next)])
    assert isinstance(refused, CursorError) and not refused.gone
