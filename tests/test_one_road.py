"""One road to an answer: the same query by every door has the same items in the same order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from service_cases import asked
from serving_cases import FakeOverlay, no_view

from recsys.experiments import cli
from recsys.experiments.benchmarks import synthetic
from recsys.serving.api.app import make_app
from recsys.serving.engine.engine import Engine, EngineRules
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Query
from recsys.serving.recommender import Recommender

ITEMS, QUERIES = 12_000, 520


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a graph and a table of neighbours."""
    path = tmp_path_factory.mktemp("road") / "bundle"
    synthetic.make(path, items=ITEMS, dimensions=16, users=200, threads=1, neighbours=40)
    return path


@pytest.fixture(scope="module")
def model(bundle: Path) -> LoadedModel:
    model = LoadedModel.load(bundle)
    assert model.bundle.manifest["index"]["kind"] == "hnsw" and model.neighbours is not None
    return model


@pytest.fixture(scope="module")
def recommender(model: LoadedModel) -> Recommender:
    return Recommender(model)


@pytest.fixture(scope="module")
def app(model: LoadedModel) -> Iterator[Any]:
    engine = Engine(model, FakeOverlay(no_view(model)), rules=EngineRules(clock=None))
    models = SimpleNamespace(
        ready=True, choose=lambda unit, variant=None: ("main", engine), facts=list
    )
    app = make_app(models)
    yield app
    app.close()


def queries(count: int = QUERIES) -> list[dict[str, Any]]:
    """Random plain queries of the kinds that every door knows."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(count):
        k = int(rng.choice([1, 3, 10, 25, 39, 40, 60]))
        items = [f"i{j:07d}" for j in rng.integers(0, ITEMS, 60)]
        kind = number % 4
        if kind in (0, 1):
            made.append({"kind": "similar", "items": items[:1], "k": k})
        elif kind == 2:
            history = items[: int(rng.integers(1, 50))]
            made.append({"kind": "recommend", "history": history, "k": k})
        else:
            made.append({"kind": "recommend", "user": f"u{int(rng.integers(0, 200)):05d}", "k": k})
    return made


def in_python(recommender: Recommender, query: dict[str, Any]) -> Answers:
    rest = {name: value for name, value in query.items() if name not in ("kind", "items")}
    if query["kind"] == "similar":
        answers: Answers = recommender.similar(query["items"][0], **rest)
    else:
        answers = recommender.recommend(**rest)
    return answers


def test_every_door_has_the_same_items_in_the_same_order(
    recommender: Recommender, app: Any
) -> None:
    made = queries()
    wanted = [in_python(recommender, query) for query in made]
    engine = recommender.engine

    async def over_http() -> list[dict[str, list[str]]]:
        found = []
        batches = []
        for start in range(0, len(made), 40):  # companions of every kind
            body = {"requests": made[start : start + 40]}
            got = await asked(app, "POST", "/v1/batch", body)
            batches += [[one["id"] for one in a["items"]] for a in got.json()["answers"]]
        for number, query in enumerate(made):
            kind, k = query["kind"], query["k"]
            body = {name: value for name, value in query.items() if name != "kind"}
            path = "/v1/similar" if kind == "similar" else "/v1/recommendations"
            everything = {"filter": {"deny": ["no such item"]}}
            doors = {"batch": batches[number]}
            requests = {
                "post": ("POST", path, body, {}),
                "post unseen": ("POST", path, body, {"x-exposure": "none"}),
                "explain": ("POST", path, body | {"explain": True}, {}),
                "fields": ("POST", path, body | {"fields": ["*"]}, {}),
                "filter": ("POST", path, body | everything, {}),
            }
            if kind == "similar":
                target = f"/v1/items/{query['items'][0]}/similar?k={k}"
                requests["get"] = ("GET", target, None, {})
                requests["get unseen"] = ("GET", target, None, {"x-exposure": "none"})
                requests["get long"] = ("GET", f"{target}&explain=false", None, {})
            elif "user" in query:
                target = f"/v1/users/{query['user']}/recommendations?k={k}"
                requests["get"] = ("GET", target, None, {})
            for name, (method, where, what, headers) in requests.items():
                got = await asked(app, method, where, what, headers)
                assert got.status == 200, (name, got.body)
                doors[name] = [item["id"] for item in got.json()["items"]]
            found.append(doors)
        return found

    for query, answers, doors in zip(made, wanted, asyncio.run(over_http()), strict=True):
        for name, ids in doors.items():
            assert ids == answers.ids, (name, query)
    # All at once in the engine: nobody's companions change an answer.
    for answers, together in zip(wanted, engine.answer([as_query(q) for q in made]), strict=True):
        assert isinstance(together, Answers) and together.ids == answers.ids


def as_query(query: dict[str, Any]) -> Query:
    history = query.get("history")
    return Query(
        query["kind"], items=tuple(query.get("items", ())), user=query.get("user"), k=query["k"],
        history=None if history is None else tuple(history),
    )  # fmt: skip


def test_many_users_and_items_at_once_are_as_one_by_one(
    recommender: Recommender, tmp_path: Path
) -> None:
    users = [f"u{j:05d}" for j in range(60)] + ["nobody"]
    frame = recommender.recommend(users=users, k=20)
    assert frame.columns == ["user", "item", "rank", "score", "fallback"]
    items = [f"i{j:07d}" for j in range(0, 3000, 60)]
    similar = recommender.similar(items=items, k=10)
    assert similar.columns == ["seed", "item", "rank", "score", "fallback"]
    for name, table, one in (
        ("user", frame, lambda id: recommender.recommend(id, k=20)),
        ("seed", similar, lambda id: recommender.similar(id, k=10)),
    ):
        for (id,), rows in table.group_by(name, maintain_order=True):
            answers = one(id)
            assert rows["item"].to_list() == answers.ids
            assert rows["rank"].to_list() == list(range(1, len(answers.ids) + 1))
            assert rows["fallback"][0] == answers.fallback
    assert "user 'nobody' is unknown" in frame.filter(user="nobody")["fallback"][0]
    written = recommender.candidates(tmp_path / "c.parquet", k=20)
    assert written.users == 200
    kept = pl.read_parquet(written.path).filter(pl.col("user").is_in(users))
    assert kept.equals(frame.filter(pl.col("user") != "nobody").drop("fallback"))


def test_the_command_answers_alike(
    bundle: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    for query in queries(12):
        given = ["--item", query["items"][0]] if query["kind"] == "similar" else []
        for item in query.get("history", ()):
            given += ["--history", item]
        given += ["--user", query["user"]] if "user" in query else []
        command = [query["kind"], str(bundle), *given, "-k", str(query["k"]), "--json"]
        with pytest.raises(SystemExit) as code:
            cli.main(command)
        assert code.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["item"] for one in found["items"]] == in_python(recommender, query).ids
