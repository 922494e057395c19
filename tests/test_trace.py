"""How many files of the project a request and a training step enter (docs/ARCHITECTURE.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.experiments.benchmarks import synthetic, trace


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("trace") / "bundle"
    synthetic.make(path, items=1000, dimensions=16, users=20, threads=1, neighbours=20)
    app = trace.app_of(path)
    yield app
    app.close()


def test_a_row_of_the_table_goes_through_few_files(app: Any) -> None:
    found = trace.of_request(app, "GET", "/v1/items/i0000003/similar?k=10")
    assert "serving/neighbours.py" in found.files and "serving/index.py" not in found.files
    assert len(found.files) <= 8, found.files


def test_recommendations_of_a_posted_history_go_through_few_files(app: Any) -> None:
    body = b'{"history": ["i0000003", "i0000005"], "k": 10}'
    found = trace.of_request(app, "POST", "/v1/recommendations", body)
    assert "towers/two_tower.py" in found.files and "serving/engine/snapshot.py" in found.files
    assert len(found.files) <= 20, found.files


def test_a_batch_and_its_loss_go_through_few_files(
    build: Callable[..., Any], market_run: str, tmp_path: Path
) -> None:
    from recsys import InteractionData, TwoTowerModule
    from recsys.experiments.run import Untrained

    built = build(market_run, tmp_path)
    model = Untrained(built.config, built.dataset).make()
    rules = built.config.training.model_copy(update={"batch_size": 64})
    data = InteractionData(built.dataset, None, rules, towers=built.config.towers)
    found = trace.of_step(data, TwoTowerModule(model, rules))
    assert "towers/losses.py" in found.files and "features/batching/batches.py" in found.files
    assert len(found.files) <= 14, found.files
