"""An explanation is what the score lacks when a part is unknown, measured another way here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.serving.engine.engine import Engine, EngineRules
from recsys.serving.engine.explain import EXPLAINED
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Query
from tests.serving_cases import FakeOverlay, no_view, view_of


@pytest.fixture(scope="module", params=[0.0, 0.4], ids=["learned", "text_share"])
def keeper(
    request: Any,
    tiny: Any,
    build: Callable[..., Any],
    shop_run: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> LoadedModel:
    if not request.param:
        return LoadedModel.load(tiny.bundle)
    toml = shop_run.replace("[towers]\n", f"[towers]\ntext_share = {request.param}\n")
    return LoadedModel.load(build(toml, tmp_path_factory.mktemp("share"), trained=True).bundle)


def _reply(served: LoadedModel, ask: Query) -> Answers:
    engine = Engine(served, FakeOverlay(no_view(served)), rules=EngineRules(clock=None))
    (reply,) = engine.answer([ask])
    assert isinstance(reply, Answers) and reply.explanations is not None
    return reply


def _vector(served: LoadedModel, row: int, part: str) -> np.ndarray:
    """The item's vector with a part of the feature table blanked."""
    bundle = served.bundle
    model, table = bundle.model, bundle.model.items
    rows = torch.tensor([row])
    statistics = torch.from_numpy(bundle.timeline.statistics(np.array([row]), bundle.cutoff or 0))
    inputs = model.item_tower.inputs
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def blank(values: torch.Tensor) -> None:
        kept.append((values, values.clone()))
        values[row] = 0

    with torch.no_grad():
        if part == "id" and row < model.item_spec.ids:
            kept.append((inputs.ids.weight, inputs.ids.weight.clone()))
            inputs.ids.weight[row] = inputs.ids.weight[0]
        elif part == "text":
            blank(table.text)  # type: ignore[arg-type]
        elif part == "price":
            blank(table.numbers)  # type: ignore[arg-type]
        elif part in table.category_names:
            blank(table.codes(part))
        elif part == "statistics":
            statistics = inputs.statistic_mean[None]
        try:
            return model.item_tower(model.embed_items(rows, statistics))[0].numpy().copy()
        finally:
            for values, before in kept:
                values.copy_(before)


def test_parts_are_what_the_score_lacks_without_them(keeper: LoadedModel) -> None:
    items = keeper.bundle.items.ids.to_list()
    reply = _reply(keeper, Query("similar", items=(items[4],), k=6, explain=True, exact=True))
    query = keeper.bundle.vectors[5]
    for id, said in zip(reply.ids, reply.explanations or [], strict=True):
        row = keeper.row_of(id)
        whole = float(_vector(keeper, row, "") @ query)
        assert set(said["parts"]) - {"id"} == {"text", "price", "category", "brand", "statistics"}
        assert ("id" in said["parts"]) == (row < keeper.bundle.model.item_spec.ids)
        for part, pull in said["parts"].items():
            assert pull == pytest.approx(
                whole - float(_vector(keeper, row, part) @ query), abs=1e-5
            ), part


def test_history_entries_pull_by_what_the_score_lacks_without_them(keeper: LoadedModel) -> None:
    items = keeper.bundle.items.ids.to_list()
    history = (items[3], items[17], items[50], items[17])
    ask = Query("recommend", history=history, k=5, explain=True, exact=True)
    reply = _reply(keeper, ask)
    everything = replace(ask, k=1000, explain=False, drop_seen=False)
    scores = []
    for left in range(4):
        engine = Engine(keeper, FakeOverlay(no_view(keeper)), rules=EngineRules(clock=None))
        short = tuple(id for place, id in enumerate(history) if place != left)
        (one,) = engine.answer([replace(everything, history=short)])
        assert isinstance(one, Answers)
        scores.append(dict(zip(one.ids, one.scores.tolist(), strict=True)))
    for id, score, said in zip(reply.ids, reply.scores, reply.explanations or [], strict=True):
        expected = sorted(
            ((float(score) - scores[left][id], history[left]) for left in range(4)), reverse=True
        )
        assert [one["pull"] for one in said["history"]] == pytest.approx(
            [pull for pull, _ in expected], abs=1e-5
        )
        assert said["history"][0]["id"] == expected[0][1]


def test_explanations_have_bounds(keeper: LoadedModel) -> None:
    reply = _reply(keeper, Query("recommend", history=("i00003",), k=EXPLAINED + 5, explain=True))
    assert reply.explanations is not None and len(reply.explanations) == EXPLAINED + 5
    assert all(one for one in reply.explanations[:EXPLAINED])
    assert reply.explanations[EXPLAINED:] == [{}] * 5
    nobody = _reply(keeper, Query("recommend", user="nobody", k=3, explain=True))
    assert nobody.explanations == [{}] * 3


def test_a_live_answer_says_what_is_at_hand(keeper: LoadedModel) -> None:
    row = keeper.bundle.rows[3]
    view = view_of(keeper, {"twin": keeper.bundle.vectors[row]})
    view = replace(view, entries=np.zeros_like(view.entries))
    engine = Engine(keeper, FakeOverlay(view), rules=EngineRules(clock=None))
    id = keeper.bundle.items.ids[int(row) - 1]
    (reply,) = engine.answer([Query("similar", items=(id,), k=2, explain=True)])
    assert isinstance(reply, Answers) and reply.explanations is not None
    assert reply.ids[0] == "twin" and reply.explanations[0] == {"parts": {}, "shared": {}}
    (reply,) = engine.answer([Query("recommend", history=("twin", "i00003"), k=2, explain=True)])
    assert isinstance(reply, Answers) and reply.explanations is not None
    assert {one["id"] for one in reply.explanations[0]["history"]} == {"twin", "i00003"}


def test_what_two_items_share_is_told(keeper: LoadedModel) -> None:
    first = keeper.bundle.items.decode(keeper.bundle.rows[:1])[0]
    reply = _reply(keeper, Query("similar", items=(first,), k=20, explain=True, fields=("*",)))
    (mine,) = keeper.fields(np.array([keeper.row_of(first)]))
    for fields, said in zip(reply.fields or [], reply.explanations or [], strict=True):
        assert said["shared"] == {n: v for n, v in fields.items() if v == mine[n]}
