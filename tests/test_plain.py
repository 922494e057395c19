"""One plain question is answered as any other; what is not plain is left to the engine."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from recsys.serving.engine.engine import Engine
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Query
from tests.serving_cases import STILL, FakeOverlay, engine_of, reply_to, small, view_of


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Items of which no two are equal, so that each node of the graph is one."""
    return small(tmp_path_factory.mktemp("single") / "bundle", twins=False)


def _plain(engine: Engine, ask: Query) -> tuple[list[str], list[float]] | None:
    said = engine.answer_fast(ask)
    if said is None:
        return None
    found = json.loads(b"[" + said + b"]")
    return [one["id"] for one in found], [one["score"] for one in found]


def test_a_plain_question_is_answered_as_any_other(single: LoadedModel) -> None:
    engine = engine_of(single)
    items, users = single.bundle.items.ids.to_list(), single.bundle.users.ids.to_list()
    random = np.random.default_rng(0)
    asks = [Query("recommend", user=user, k=k) for user in users[:8] for k in (1, 10)]
    asks += [Query("recommend", history=tuple(items[j : j + 7]), k=9) for j in range(0, 70, 7)]
    asks += [Query("recommend", history=(items[3],), drop_seen=False, k=5)]
    # Everything near was had: what is left out makes room for as many.
    asks += [Query("recommend", history=tuple(items[:40]), k=12)]
    for vector in random.standard_normal((8, 8)).astype(np.float32):
        asks += [Query("vector", vector=vector * 3, k=k) for k in (1, 10, 20)]
    answered = 0
    for ask in asks:
        found = _plain(engine, ask)
        if found is None:
            continue
        answered += 1
        reply = reply_to(engine, ask)
        assert found[0] == reply.ids
        np.testing.assert_allclose(found[1], reply.scores, atol=2e-6)
    assert answered > 0.9 * len(asks)


@pytest.mark.parametrize(
    "ask",
    [
        Query("vector", vector=np.ones(7, np.float32)),
        Query("vector", vector=np.full(8, np.nan, np.float32)),
        Query("vector", vector=np.full(8, 1e30, np.float32)),
        Query("vector", vector=np.zeros(8, np.float32)),
        Query("vector"),
        Query("vector", vector=np.ones(8, np.float32), fields=("*",)),
        Query("vector", vector=np.ones(8, np.float32), k=2000),
        Query("recommend"),
        Query("recommend", user="nobody"),
        Query("recommend", history=("nothing",)),
        Query("recommend", history=("i0000001", "nothing")),
        Query("recommend", history=("i0000001",), context={"hour": 3}),
        Query("similar", items=("i0000001",)),
        Query("search", text="lamp"),
    ],
    ids=lambda ask: f"{ask.kind}-{ask.k}",
)
def test_what_is_not_plain_or_not_well_asked_is_left_to_the_engine(
    single: LoadedModel, ask: Query
) -> None:
    assert _plain(engine_of(single), ask) is None


def test_a_catalogue_that_changed_has_no_plain_questions(single: LoadedModel) -> None:
    ask = Query("vector", vector=np.ones(8, np.float32))
    found = _plain(engine_of(single), ask)
    assert found is not None
    best = found[0][0]
    gone = Engine(single, FakeOverlay(view_of(single, {}, [best])), rules=STILL)
    assert _plain(gone, ask) is None and best not in reply_to(gone, ask).ids


def test_without_a_graph_there_are_no_plain_questions(tiny: Any) -> None:
    served = LoadedModel.load(tiny.bundle)
    user = served.bundle.users.ids[0]
    assert _plain(engine_of(served), Query("recommend", user=user)) is None
