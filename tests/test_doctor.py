"""`recsys doctor`: towers broken on purpose get the finding they deserve, healthy ones get none.

A world of six tastes, each with twenty items and text that tells them apart; every user chooses
within one taste. The towers learn it here in a few dozen steps of a full softmax, so that the
doctor is tested apart from the house's own training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys.errors import BundleError, DataError
from recsys.experiments import cli
from recsys.experiments.doctor import examine
from recsys.experiments.tracking.spool import Spool
from recsys.features.batching.batch import Queries, query_side
from recsys.features.prepared.timeline import Timeline
from recsys.files import write_json
from recsys.search import ExactIndex
from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.serving.index import IndexRules
from recsys.serving.recommender import Recommender
from recsys.towers.embedding import FeatureTable
from recsys.towers.encode import encode_items
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower
from recsys.vocab import Vocab

TASTES, EACH, PEOPLE, CHOICES = 6, 20, 150, 8
ITEMS = TASTES * EACH


@dataclass(frozen=True)
class World:
    """What people chose; `held_out` is what each chose last, and is not in the timeline."""

    timeline: Timeline
    held_out: np.ndarray
    text: np.ndarray


def world(tasteful: bool = True) -> World:
    rng = np.random.default_rng(0)
    appeal = rng.zipf(2.5, ITEMS).clip(max=8).astype(float)
    taste = np.arange(ITEMS) % TASTES
    of_user = np.arange(PEOPLE)[:, None] % TASTES
    liked = np.where((taste == of_user) | (not tasteful), np.log(appeal), -np.inf)
    # The largest of perturbed logs is a draw without replacement.
    order = np.argsort(-(liked + rng.gumbel(size=liked.shape)), axis=1)[:, : CHOICES + 1] + 1
    chosen = order[:, :-1]
    timeline = Timeline.build(
        np.repeat(np.arange(1, PEOPLE + 1), CHOICES), chosen.reshape(-1).astype(np.int32),
        np.tile(np.arange(CHOICES), PEOPLE) * 1_000_000,
        n_users=PEOPLE + 1, first_seen=np.zeros(ITEMS + 1, np.int64),
    )  # fmt: skip
    text = np.eye(TASTES)[taste] + 0.3 * rng.normal(size=(ITEMS, TASTES))
    text = np.vstack([np.zeros(TASTES), text / np.linalg.norm(text, axis=1, keepdims=True)])
    return World(timeline, order[:, -1], text.astype(np.float32))


def towers(seen: World, **rules: Any) -> TwoTower:
    settled = TowerRules(
        **{"dimension": 16, "hidden": 0, "history": "mean", "dropout": 0.0, **rules}
    )
    items = FeatureTable(ITEMS + 1, text=torch.from_numpy(seen.text))
    users = FeatureTable(PEOPLE + 1)
    torch.manual_seed(0)
    ids = ITEMS + 1 if settled.item_ids else 0
    return TwoTower(
        settled, items, users, items.spec(ids, {}),
        users.spec(PEOPLE + 1 if settled.user_id else 0, {}),
    )  # fmt: skip


def learn(model: TwoTower, seen: World, steps: int, temperature: float = 0.1) -> TwoTower:
    """All events at once against all items; nothing is drawn, so that nothing is corrected."""
    timeline = seen.timeline
    history = timeline.histories(timeline.user, timeline.time)
    side, _ = query_side(Queries(timeline.user, history), CHOICES)
    # Every item is embedded, so that a history's places are item rows.
    side = replace(side, history=torch.from_numpy(history.values.astype(np.int64)))
    parameters = [p.requires_grad_() for p in model.parameters()]
    for table in model.modules():
        if isinstance(table, torch.nn.Embedding):
            table.sparse = False
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    target = torch.from_numpy(timeline.item.astype(np.int64))
    model.train()
    for _ in range(steps):
        embedded = model.embed_items(torch.arange(ITEMS + 1))
        users = model.encode_users(side, embedded)
        logits = users @ model.item_tower(embedded).T / temperature
        logits[:, 0] = -torch.inf
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save(
    model: TwoTower, seen: World, run: Path, *, vectors: np.ndarray | None = None,
    training: dict[str, Any] | None = None, curves: dict[str, float] | None = None,
) -> Path:  # fmt: skip
    """A run's folder with a bundle, a scorecard and curves."""
    timeline, everything = seen.timeline, np.arange(ITEMS + 1)
    if vectors is None:
        vectors = encode_items(model, everything)
    ids = [f"i{row}" for row in range(1, ITEMS + 1)]
    bundle = Bundle(
        model=model, items=Vocab(pl.Series(ids)),
        users=Vocab(pl.Series([f"u{row}" for row in range(1, PEOPLE + 1)])),
        catalog=pl.DataFrame({"item": ids}),
        window=np.tile([[np.iinfo(np.int64).min, np.iinfo(np.int64).max]], (ITEMS + 1, 1)),
        timeline=timeline, vectors=vectors, rows=everything[1:],
        index=ExactIndex(np.ascontiguousarray(vectors[1:])), cutoff=CHOICES * 1_000_000,
        manifest={
            "warm_items": ITEMS,
            "config": {
                "evaluate": {"ks": [5], "drop_seen": True},
                "training": {"temperature": 0.1, **(training or {})},
            },
        },
    )  # fmt: skip
    spool = Spool.begin(run, run_id=None, run_name="test", params={}, tags={})
    for step in range(3):
        spool.add_point({"train/loss": 3.0 - step, **(curves or {})}, step)
    spool.add_point({"val/ndcg_at_20": 0.1}, 3)  # a curve's last point is not the run's last one
    bundles.save(bundle, run / "bundle", rules=IndexRules(kind="exact"))
    recommender = Recommender(bundle)
    people = np.arange(1, PEOPLE + 1)
    found, _, _ = recommender.recommend_rows(recommender.queries(people), 5)
    popular = np.argsort(-timeline.popularity(), kind="stable")[:5]
    hits = {
        "model": (found == seen.held_out[:, None]).any(1).mean(),
        "popularity": np.isin(seen.held_out, popular).mean(),
    }
    write_json(
        run / "scorecard.json",
        {
            "model": {"recall_at_5": {"value": float(hits["model"])}},
            "baselines": {"popularity": {"recall_at_5": {"value": float(hits["popularity"])}}},
        },
    )
    return run


def names(report: dict[str, Any]) -> list[str]:
    return [finding["name"] for finding in report["findings"]]


@pytest.fixture(scope="module")
def healthy() -> tuple[TwoTower, World]:
    torch.set_num_threads(1)
    seen = world()
    return learn(towers(seen, id_dropout=0.3), seen, 40), seen


@pytest.fixture(scope="module")
def run(healthy: tuple[TwoTower, World], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(*healthy, tmp_path_factory.mktemp("healthy") / "run")


@pytest.fixture
def broken(healthy: tuple[TwoTower, World], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Break a copy of the healthy towers, and examine what is left of them."""

    def examined(harm: Callable[[TwoTower], None] | None = None, **options: Any) -> dict[str, Any]:
        model, seen = healthy
        copy = towers(seen, id_dropout=0.3)
        copy.load_state_dict(model.state_dict())
        copy.eval()
        if harm is not None:
            with torch.no_grad():
                harm(copy)
        return examine(save(copy, seen, tmp_path / "run", **options))

    return examined


def test_a_healthy_small_model_has_no_finding(run: Path) -> None:
    report = examine(run)
    assert report["findings"] == [] and report["not_judged"] == []
    measured = report["measured"]
    # It learned something, or being healthy would mean little.
    assert measured["recall"] > 0.4 > 0.2 > measured["popularity_recall"]
    assert measured["held_out"] > 0.25
    assert 0 < measured["parts"]["text"]["kept"] < 0.95
    assert report["bundle"] == str(run / "bundle")


def test_the_same_run_is_examined_alike_each_time(run: Path) -> None:
    assert examine(run) == examine(run)


def test_collapsed_vectors_are_found(broken: Callable[..., dict[str, Any]]) -> None:
    def collapse(model: TwoTower) -> None:
        inputs = model.item_tower.inputs
        inputs.text.weight.mul_(0.01)
        inputs.ids.weight.mul_(0.01).add_(1.0)

    report = broken(collapse)
    assert "collapse" in names(report)
    assert report["measured"]["item_cosine"] > 0.99
    assert report["measured"]["item_uniformity"] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("value", [0.01, 1.0])
def test_a_learned_temperature_at_its_bound_is_found(
    broken: Callable[..., dict[str, Any]], value: float
) -> None:
    report = broken(training={"temperature": "learned"}, curves={"train/temperature": value})
    assert names(report) == ["dead temperature"]


def test_a_text_projection_of_zeros_is_found(broken: Callable[..., dict[str, Any]]) -> None:
    report = broken(lambda model: model.item_tower.inputs.text.weight.zero_())
    assert "text ignored" in names(report)
    left = report["measured"]["parts"]["text"]
    assert left["kept"] == 1 and left["recall"] == report["measured"]["recall"]


def test_ids_that_learned_noise_by_heart_are_found(tmp_path: Path) -> None:
    seen = world(tasteful=False)
    model = learn(towers(seen, user_id=True, id_dropout=0.0), seen, 150)
    report = examine(save(model, seen, tmp_path / "run"))
    assert "id overfit" in names(report)
    measured = report["measured"]
    assert measured["recall"] > 0.5 > 0.2 > measured["held_out"]


def test_a_bundle_alone_says_what_is_not_judged(run: Path, tmp_path: Path) -> None:
    import shutil

    alone = tmp_path / "elsewhere"
    shutil.copytree(run / "bundle", alone)
    report = examine(alone)
    assert report["findings"] == []
    assert report["measured"]["held_out"] is None
    assert len(report["not_judged"]) == 1 and "overfit" in report["not_judged"][0]
    # Named inside its run, the run is found above it.
    assert examine(run / "bundle")["measured"]["held_out"] is not None


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match="neither a run with a bundle nor a bundle"):
        examine(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        examine(tmp_path)


def test_the_command_prints_findings_or_json_and_ends_well(
    run: Path, broken: Callable[..., dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def ended(*arguments: str) -> str:
        with pytest.raises(SystemExit) as code:
            cli.main(["doctor", *arguments])
        assert code.value.code == 0
        return capsys.readouterr().out

    assert "Nothing is wrong" in ended(str(run))
    broken(
        training={"temperature": "learned"},
        curves={"train/temperature": 0.01, "audit/gradient/mined": 0.25},
    )
    said = ended(str(tmp_path / "run"))
    assert "dead temperature" in said and "remedy" in said and "temperature = 0.1" in said
    assert "gradient/mined" in said
    report = json.loads(ended(str(tmp_path / "run"), "--json"))
    assert names(report) == ["dead temperature"]
    assert report["audit"] == {"audit/gradient/mined": 0.25}


def test_users_without_a_past_are_told(healthy: tuple[TwoTower, World], tmp_path: Path) -> None:
    model, seen = healthy
    nobody = np.zeros(PEOPLE + 2, np.int64)
    empty = replace(
        seen.timeline, user_offsets=nobody, item=seen.timeline.item[:0], time=seen.timeline.time[:0]
    )
    folder = save(model, replace(seen, timeline=empty), tmp_path / "run")
    with pytest.raises(DataError, match="0 users with a history"):
        examine(folder)
