"""The catalogue snapshot: exact and graph search over index, live items and filters in any mix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.ragged import Ragged
from recsys.serving.engine.availability import FOREVER, Windows
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot
from recsys.serving.index import HnswIndex
from tests.serving_cases import EAGER, no_view, small, view_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return small(tmp_path_factory.mktemp("small") / "bundle")


def _stock(served: LoadedModel, live: int = 0, deleted: tuple[str, ...] = ()) -> CatalogSnapshot:
    rng = np.random.default_rng(live)
    vectors = rng.standard_normal((live, served.bundle.vectors.shape[1])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Every third replaces an item of the bundle.
    ids = [f"i{j:07}" if j % 3 == 0 else f"new{j}" for j in range(live)]
    view = view_of(served, dict(zip(ids, vectors, strict=True)), deleted)
    return CatalogSnapshot(served, view, Windows(served.bundle, served.position), None)


def _twin(
    stock: CatalogSnapshot, query: np.ndarray, k: int, choice: AllowedItems, exclude: set[int]
) -> list[tuple[float, int]]:
    """Score everything, one by one."""
    allowed = set(range(stock.n)) if choice.mask is None else set(np.flatnonzero(choice.mask))
    if choice.given is not None:
        allowed = set(choice.given.tolist())
    allowed |= {stock.n + int(j) for j in np.flatnonzero(choice.extra)}
    places = np.array(sorted(allowed - exclude), np.int64)
    if not len(places):
        return []
    queries = query.reshape(-1, query.shape[-1])
    scores = (stock.vectors_of(places) @ queries.T).max(1)
    order = np.lexsort((places, -scores))[:k]
    return [(float(scores[i]), int(places[i])) for i in order]


@settings(max_examples=60)
@given(data=st.data())
def test_min_of_k_and_allowed_best_answers_at_every_selectivity(
    served: LoadedModel, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    stock = _stock(served, data.draw(st.sampled_from([0, 1, 40])))
    k = data.draw(st.sampled_from([1, 3, 10, 60, 2000]))
    share = data.draw(st.sampled_from([0.0, 0.002, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]))
    choice = stock.open
    if share < 1:
        mask = rng.random(stock.n) < share
        if data.draw(st.booleans()):  # a filter that goes with the query: half of the space
            mask = stock.exact_index.vectors[:, 0] > np.quantile(
                stock.exact_index.vectors[:, 0], 1 - share
            )
        mask &= stock.open.mask if stock.open.mask is not None else True
        choice = AllowedItems(
            mask, int(mask.sum()), stock.open.extra & (rng.random(stock.size - stock.n) < share)
        )
        if data.draw(st.booleans()):
            choice = replace(choice, mask=None, given=np.flatnonzero(mask))
    count = data.draw(st.sampled_from([1, 4]))
    queries = rng.standard_normal((count, stock.extra.shape[1])).astype(np.float32)
    near = rng.integers(0, stock.n, count)  # half of the queries lie where items are
    queries[::2] = stock.exact_index.vectors[near[::2]]
    out = [rng.choice(stock.size, data.draw(st.sampled_from([0, 1, 30]))) for _ in range(count)]
    exclude = Ragged.from_lists([one.tolist() for one in out])
    places, scores, sure = stock.search(queries, k, choice, exclude)
    for row in range(count):
        expected = _twin(stock, queries[row], k, choice, set(out[row].tolist()))
        found = places[row][places[row] >= 0]
        assert len(found) == len(expected) and len(set(found.tolist())) == len(found)
        everything = _twin(stock, queries[row], stock.size, choice, set(out[row].tolist()))
        assert set(found.tolist()) <= {place for _, place in everything}
        got = scores[row][: len(found)]
        assert (np.diff(got) <= 0).all()
        np.testing.assert_allclose(got, _scores(stock, queries[row], found), rtol=1e-5, atol=1e-5)
        if sure:
            np.testing.assert_allclose(got, [score for score, _ in expected], rtol=1e-5, atol=1e-5)


def _scores(stock: CatalogSnapshot, query: np.ndarray, places: np.ndarray) -> np.ndarray:
    return (stock.vectors_of(places) @ query.reshape(-1, query.shape[-1]).T).max(1, initial=-9)


@pytest.fixture(scope="module")
def distinct(served: LoadedModel) -> LoadedModel:
    """No two items are alike, so that the graph may be asked for one query at a time."""
    bundle = served.bundle
    stored, vectors = bundle.vectors.copy(), bundle.vectors[bundle.rows]
    vectors[::50] += np.random.default_rng(1).normal(0, 0.01, vectors[::50].shape)
    stored[bundle.rows] = vectors
    return LoadedModel(replace(bundle, vectors=stored, index=HnswIndex(vectors, EAGER)), None)


@pytest.mark.parametrize("live", [0, 30])
@pytest.mark.parametrize("excluded", [0, 7, 200])
def test_one_query_is_answered_as_among_others(
    distinct: LoadedModel, live: int, excluded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(live + excluded)
    news = rng.standard_normal((live, 8)).astype(np.float32)
    view = view_of(distinct, {f"new{j}": vector for j, vector in enumerate(news)})
    stock = CatalogSnapshot(distinct, view, Windows(distinct.bundle, distinct.position), None)
    asked: list[bool] = []
    nearest = HnswIndex.nearest

    def watched(self: HnswIndex, *given: Any) -> Any:
        found = nearest(self, *given)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(HnswIndex, "nearest", watched)
    right, k = 0, 10
    for query in rng.standard_normal((40, 1, 8)).astype(np.float32):
        # The best are left out, and others.
        best = [place for _, place in _twin(stock, query, excluded, stock.open, set())]
        out = {*best[::2], *rng.choice(stock.size, excluded - len(best[::2])).tolist()}
        places, scores, _ = stock.search(query, k, None, Ragged.from_lists([sorted(out)]))
        expected = _twin(stock, query, k, stock.open, out)
        np.testing.assert_allclose(scores[0], _scores(stock, query, places[0]), rtol=1e-5)
        assert not out & set(places[0].tolist())
        right += len({place for _, place in expected} & set(places[0].tolist()))
    assert asked == [True] * 40
    assert right >= 0.98 * 40 * k


@pytest.mark.parametrize("with_query", [False, True])
def test_recall_is_that_of_exact_search_at_every_selectivity(
    served: LoadedModel, with_query: bool
) -> None:
    stock, rng, k = _stock(served, 20), np.random.default_rng(1), 10
    vectors = stock.exact_index.vectors
    queries = vectors[rng.integers(0, stock.n, 100)] + 0.1 * rng.standard_normal((100, 8))
    queries = queries.astype(np.float32)
    for share in (0.005, 0.02, 0.1, 0.3, 0.6, 0.95):
        mask = rng.random(stock.n) < share
        if with_query:  # the filter's items lie together, mostly far from the query
            mask = vectors[:, 1] > np.quantile(vectors[:, 1], 1 - share)
        choice = AllowedItems(mask, int(mask.sum()), stock.open.extra)
        _, found, _ = stock.search(queries, k, choice)
        _, exact, sure = stock.search(queries, k, choice, exact=True)
        assert sure
        assert (found >= exact[:, -1:] - 1e-6).mean() >= 0.99


def test_the_planner_asks_the_graph_only_where_that_pays(
    served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, asked = _stock(served), []
    index = stock.index
    real = index.search
    monkeypatch.setattr(index, "search", lambda *a, **k: asked.append(a[1]) or real(*a, **k))
    query = stock.exact_index.vectors[:1]
    stock.search(query, 5)
    assert asked == [5]
    for share in (0.01, 0.2):  # 40 k n is above the square of these
        mask = np.arange(stock.n) < share * stock.n
        stock.search(query, 5, AllowedItems(mask, int(mask.sum()), stock.open.extra))
    assert asked == [5]
    mask = np.arange(stock.n) < 0.5 * stock.n
    _, _, sure = stock.search(query, 5, AllowedItems(mask, int(mask.sum()), stock.open.extra))
    assert asked == [5, 19] and not sure  # (5 + 2 √5) / .5
    assert stock.search(query, 5, exact=True)[2] and len(asked) == 2


def test_what_was_replaced_or_deleted_is_never_answered_and_its_successor_is(
    served: LoadedModel,
) -> None:
    stock = _stock(served, 9, ("i0000001",))
    everything = stock.search(stock.exact_index.vectors[:1], stock.size)[0][0]
    ids = stock.ids_of(everything[everything >= 0])
    assert len(ids) == len(set(ids)) == stock.n + 9 - 3 - 1
    assert "i0000001" not in ids and "new4" in ids
    assert stock.place_of("i0000003") == stock.n + 3 and stock.place_of("i0000001") == -1
    assert stock.place_of("i0000002") == 1 + 1 and stock.place_of("nobody") == -1
    # Who had the old one does not get the new one.
    assert stock.places_of(np.array([served.row_of("i0000003")])).tolist()[-1] == stock.n + 3


def test_places_rows_ids_and_vectors_tell_the_same(served: LoadedModel) -> None:
    stock = _stock(served, 5)
    places = np.array([stock.n + 1, 7, stock.n + 4, 0])
    assert stock.ids_of(places) == ["new1", "i0000007", "new4", "i0000000"]
    assert stock.rows_of(places).tolist() == [0, 8, 0, 1]
    for place, id, vector in zip(
        places, stock.ids_of(places), stock.vectors_of(places), strict=True
    ):
        if id.startswith("new"):
            np.testing.assert_array_equal(vector, stock.view.vectors[stock.view.place[id]])
        else:
            np.testing.assert_array_equal(vector, served.bundle.vectors[served.row_of(id)])
        key = stock.key_of(int(place))
        assert stock.rank_of(key) == stock.ranks(np.array([place]))[0]


def test_windows_open_and_close(served: LoadedModel) -> None:
    window = served.bundle.window.copy()
    window[3, 1] = 1_000_000_000  # over from then on
    window[5, 0] = 2_000_000_000  # later than that
    bundle = served.bundle
    rows = np.delete(bundle.rows, 4)  # row 5 is not indexed: it was not there at the cut-off
    position = np.full(bundle.items.size, -1, np.int32)
    position[rows] = np.arange(len(rows))
    timeline = replace(bundle.timeline, exists_from=np.zeros(bundle.items.size, np.int64))
    windows = Windows(replace(bundle, window=window, rows=rows, timeline=timeline), position)
    over, late, until = windows.at(1)
    assert not len(over) and not len(late) and until == 1_000_000_000
    over, late, until = windows.at(1_000_000_000)
    assert over.tolist() == [2] and not len(late)
    over, late, until = windows.at(2_000_000_000)
    assert over.tolist() == [2] and late.tolist() == [5] and until == FOREVER
    assert windows.at(None)[2] == FOREVER


def test_late_rows_are_answered_beside_the_index(served: LoadedModel) -> None:
    bundle = served.bundle
    rows = np.delete(bundle.rows, [4, 9])
    vectors = np.ascontiguousarray(bundle.vectors[rows])
    from recsys.serving.index import HnswIndex

    other = LoadedModel(
        replace(bundle, rows=rows, index=HnswIndex(vectors, EAGER)), None, version="x"
    )
    as_of = int(bundle.cutoff or 0)
    stock = CatalogSnapshot(other, no_view(other), Windows(other.bundle, other.position), as_of)
    assert stock.late.tolist() == [5, 10] and stock.size == len(bundle.rows)
    query = bundle.vectors[10][None]
    places, scores, _ = stock.search(query, 3)
    assert stock.ids_of(places[0])[0] == "i0000009" and scores[0, 0] == pytest.approx(1.0)
    assert stock.places_of(np.array([5, 1])).tolist() == [0, stock.n]
    assert stock.rank_of(stock.key_of(stock.n + 1)) == stock.n + 1
