"""Exported vectors, read back by others, rank as exact search over the bundle does."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError
from recsys.experiments import cli
from recsys.search import ExactIndex
from recsys.serving import export as exports
from recsys.serving.export import export
from recsys.serving.recommender import Recommender
from recsys.towers.encode import encode_users

K = 10


@pytest.fixture(scope="module", params=["cosine", "dot"])
def recommender(
    request: Any, build: Callable[..., Any], market_run: str, tmp_path_factory: Any
) -> Recommender:
    """Every kind of score; the towers need no training to have vectors."""
    built = build(f'{market_run}score = "{request.param}"\n', tmp_path_factory.mktemp("export"))
    return Recommender.load(built.bundle)


def _asked(recommender: Recommender) -> tuple[np.ndarray, list[list[str]]]:
    """Vectors of all users, (Q, D), and what exact search answers to each."""
    bundle = recommender.bundle
    queries = recommender.queries(np.arange(1, bundle.users.size))
    vectors = encode_users(bundle.model, queries, bundle.timeline, bundle.cutoff)
    rows, _ = ExactIndex(bundle.vectors[bundle.rows]).search(vectors, K)
    return vectors, [bundle.items.decode(bundle.rows[row]).to_list() for row in rows]


def _best(ids: list[str], vectors: np.ndarray, asked: np.ndarray) -> list[list[str]]:
    order = np.argsort(-(asked @ vectors.T), axis=1, kind="stable")[:, :K]
    return [[ids[i] for i in row] for row in order]


def test_a_table_ranks_as_the_bundle_does(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 16)
    done = export(recommender, tmp_path / "out", "parquet", users=True)
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    assert items.columns == ["row", "item", "vector", "title", "score"]
    assert items["vector"].dtype == pl.Array(pl.Float32, recommender.bundle.vectors.shape[1])
    vectors = items["vector"].to_numpy()
    np.testing.assert_array_equal(vectors, recommender.bundle.vectors[recommender.bundle.rows])
    asked, expected = _asked(recommender)
    users = pl.read_parquet(tmp_path / "out/users.parquet")
    np.testing.assert_array_equal(users["vector"].to_numpy(), asked)
    assert users["user"].equals(recommender.bundle.users.ids, check_names=False)
    assert _best(items["item"].to_list(), vectors, users["vector"].to_numpy()) == expected
    assert (done.items, done.users) == (len(items), len(users))
    wanted = recommender.bundle.catalog.join(items, on="item", how="semi").sort("item")
    assert items.sort("item").select(wanted.columns).equals(wanted)


@pytest.mark.parametrize("graph", [False, True])
def test_faiss_answers_with_the_same_items(
    recommender: Recommender, tmp_path: Path, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 16)
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    done = export(recommender, tmp_path / "out", "faiss", graph=graph)
    index = faiss.read_index(str(tmp_path / "out/items.faiss"))
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    assert "vector" not in items.columns and done.recall == 1.0
    names = dict(zip(items["row"], items["item"], strict=True))
    asked, expected = _asked(recommender)
    _, rows = index.search(asked, K)
    assert [[names[row] for row in found] for found in rows.tolist()] == expected


def test_qdrant_gets_whole_points_under_a_fitting_distance(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "POINTS_AT_ONCE", 7)
    monkeypatch.setattr(exports, "ROWS_AT_ONCE", 16)
    export(recommender, tmp_path / "out", "qdrant", users=True)
    collection = json.loads((tmp_path / "out/items.collection.json").read_text())["vectors"]
    score = recommender.bundle.model.rules.score
    assert collection["distance"] == ("Cosine" if score == "cosine" else "Dot")
    lines = [json.loads(line) for line in (tmp_path / "out/items.points.jsonl").open()]
    assert all(set(line) == {"points"} and 0 < len(line["points"]) <= 7 for line in lines)
    points = [point for line in lines for point in line["points"]]
    assert all(set(point) == {"id", "vector", "payload"} for point in points)
    assert len({uuid.UUID(point["id"]) for point in points}) == len(recommender.bundle.rows)
    vectors = np.array([point["vector"] for point in points], np.float32)
    np.testing.assert_array_equal(vectors, recommender.bundle.vectors[recommender.bundle.rows])
    assert vectors.shape[1] == collection["size"]
    asked, expected = _asked(recommender)
    if collection["distance"] == "Cosine":  # as Qdrant does on both sides
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert _best([p["payload"]["item"] for p in points], vectors, asked) == expected
    indexes = [json.loads(line) for line in (tmp_path / "out/items.indexes.jsonl").open()]
    assert {i["field_name"]: i["field_schema"] for i in indexes} == {
        "item": "keyword", "title": "keyword", "score": "float",
    }  # fmt: skip
    users = [json.loads(line) for line in (tmp_path / "out/users.points.jsonl").open()]
    assert sum(len(line["points"]) for line in users) == len(asked)


def test_the_upload_script_sends_every_line_in_order(tmp_path: Path, plain: Any) -> None:
    export(Recommender.load(plain.bundle), tmp_path / "out", "qdrant", users=True)
    calls = tmp_path / "calls"
    fake = tmp_path / "curl"
    # Like a Qdrant without collections: a look fails, a write is taken down.
    fake.write_text(
        '#!/bin/sh\nfor last; do :; done\ncase "$*" in *PUT*) ;; *) exit 22;; esac\n'
        f'echo "$last $(wc -c)" >> {calls}\n'
    )
    fake.chmod(0o755)
    subprocess.run(
        [tmp_path / "out/upload.sh"], check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "QDRANT_URL": "http://q", "QDRANT_API_KEY": "k"},
    )  # fmt: skip
    sent = [line.split() for line in calls.read_text().splitlines()]
    paths = [path.removeprefix("http://q/collections/") for path, _ in sent]
    points = sum(1 for _ in (tmp_path / "out/items.points.jsonl").open())
    assert paths[:4] == ["items", "items/index", "items/index", "items/index"]
    assert paths[4 : 4 + points] == ["items/points"] * points
    assert paths[4 + points] == "users" and paths[-1] == "users/points"
    written = sum(
        file.stat().st_size - (file.suffix == ".jsonl") * file.read_text().count("\n")
        for file in (tmp_path / "out").glob("*.json*")
        if file.name != "export.json"
    )
    assert sum(int(size) for _, size in sent) == written


def test_dates_lists_and_gaps_of_a_catalogue_become_a_payload() -> None:
    from datetime import datetime

    frame = pl.DataFrame(
        {
            "item": ["a", "b"],
            "vector": pl.Series(np.eye(2, dtype=np.float32)),
            "tags": [["x", "y"], None],
            "price": [float("nan"), 2.5],
            "from": [datetime(2024, 1, 2, 3, 4, 5, 6), None],
        }
    )
    line = exports._points(frame, "item", ["item", "tags", "price", "from"]).write_ndjson()
    first, second = (point["payload"] for point in json.loads(line)["points"])
    assert first == {
        "item": "a", "tags": ["x", "y"], "price": None, "from": "2024-01-02T03:04:05.000006Z",
    }  # fmt: skip
    assert second == {"item": "b", "tags": None, "price": 2.5, "from": None}
    kinds = {n: exports._payload_type(frame.schema[n]) for n in ("tags", "price", "from", "vector")}
    assert kinds == {"tags": "keyword", "price": "float", "from": "datetime", "vector": None}


def test_an_own_id_other_zones_and_decimals_of_a_catalogue_stay_what_they_are() -> None:
    from datetime import UTC, datetime
    from decimal import Decimal
    from zoneinfo import ZoneInfo

    summer = datetime(2024, 7, 2, 1, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    frame = pl.DataFrame(
        {
            "item": ["a"],
            "vector": pl.Series(np.ones((1, 2), np.float32)),
            "id": ["its own"],
            "here": pl.Series([summer], dtype=pl.Datetime("us", "Europe/Berlin")),
            "utc": pl.Series([summer.astimezone(UTC)], dtype=pl.Datetime("ms", "UTC")),
            "price": pl.Series([Decimal("1.50")], dtype=pl.Decimal(10, 2)),
            "prices": pl.Series([[Decimal("1.50"), None]], dtype=pl.List(pl.Decimal(10, 2))),
            "dates": pl.Series([[summer]], dtype=pl.List(pl.Datetime("us", "Europe/Berlin"))),
        }
    )
    payload = [name for name in frame.columns if name != "vector"]
    line = exports._points(frame, "item", payload).write_ndjson()
    (point,) = json.loads(line)["points"]
    assert uuid.UUID(point["id"])
    utc = "2024-07-01T23:30:00.000000Z"
    assert point["payload"] == {
        "item": "a", "id": "its own", "here": utc, "utc": utc,
        "price": 1.5, "prices": [1.5, None], "dates": [utc],
    }  # fmt: skip
    floats = {n for n in payload if exports._payload_type(frame.schema[n]) == "float"}
    assert floats == {"price", "prices"}


def test_an_item_keeps_its_id_in_qdrant() -> None:
    """A golden value: another one would leave old points beside new ones."""
    frame = pl.DataFrame({"item": ["i1"], "vector": pl.Series(np.ones((1, 2), np.float32))})
    points = json.loads(exports._points(frame, "item", ["item"]).write_ndjson())["points"]
    assert points[0]["id"] == "bbac075b-8a7d-5134-ad01-2652422b40f0"


def test_users_of_whom_nothing_is_known_are_left_out(tiny: Any, tmp_path: Path) -> None:
    recommender = Recommender.load(tiny.bundle)
    nobody = recommender.engine.nothing_known(
        recommender.queries(np.arange(1, recommender.bundle.users.size))
    )
    heard: list[tuple[int, int]] = []
    done = export(
        recommender, tmp_path / "out", "parquet", users=True, progress=lambda *a: heard.append(a)
    )
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert done.left_out == about["users_left_out"] == nobody.sum()
    assert done.users == about["users"] == (~nobody).sum()
    assert about["bundle"] == recommender.bundle.manifest["content"]
    assert heard[-1][0] == heard[-1][1] == len(recommender.bundle.rows) + len(nobody)


def test_only_an_export_is_replaced_and_a_failure_leaves_the_old_one(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = Recommender.load(plain.bundle)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine/thesis.txt", plain.bundle):
        with pytest.raises(ConfigError, match="no export"):
            export(recommender, out, "parquet")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    export(recommender, tmp_path / "out", "parquet")
    before = (tmp_path / "out/items.parquet").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "_points", full)
    with pytest.raises(OSError, match="No space"):
        export(recommender, tmp_path / "out", "qdrant")
    assert (tmp_path / "out/items.parquet").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    monkeypatch.undo()
    export(recommender, tmp_path / "out", "qdrant")
    assert not (tmp_path / "out/items.parquet").exists()


def test_mistakes_name_the_way_out(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = Recommender.load(plain.bundle)
    with pytest.raises(ConfigError, match="Did you mean 'qdrant'"):
        export(recommender, tmp_path / "out", "quadrant")
    with pytest.raises(ConfigError, match="for FAISS only"):
        export(recommender, tmp_path / "out", "parquet", graph=True)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'recsys\[faiss\]'"):
        export(recommender, tmp_path / "out", "faiss")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(
    plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(plain.bundle), str(tmp_path / "out"), "--users", *more])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    items = pl.read_parquet(tmp_path / "out/items.parquet").height
    assert f"out: {items} items, 30 users\n" in out and f'"items": {items}' in out
