"""Pictures: every one that can be drawn is drawn, and shows the numbers it was given."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from recsys.experiments.evaluation import pictures


def estimate(value: float | None, width: float | None = 0.01) -> dict[str, float | None]:
    if value is None or width is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - width, "high": value + width}


def metrics(scale: float) -> dict[str, Any]:
    return {
        f"{kind}_at_{k}": estimate(scale * k / 100) for kind in ("recall", "ndcg") for k in (5, 20)
    } | {"coverage": estimate(0.3, None)}


def scorecard() -> dict[str, Any]:
    baselines = {"popularity": metrics(0.2), "co_occurrence": metrics(0.9)}
    both = {"model": metrics(1.0), "baselines": baselines}
    auc = {"model": {"auc": estimate(0.6)}, "baselines": {"popularity": {"auc": estimate(0.52)}}}
    return both | {
        "differences": {name: metrics(0.1) for name in baselines},
        "slices": {
            "warm_items": both | {"queries": 70},
            "cold_items_among_cold": both | {"chance": {"recall_at_20": 0.01}},
        },
        "index": {"recall_at_20": estimate(0.99)},
        "impressions": auc | {"requests": 9, "slices": {"cold": auc | {"requests": 2}}},
        "protocol": {"queries": "each event", "queries_judged": 4812, "users_judged": 31},
    }


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


def words(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


ALL = ["comparison", "recall_at_k", "differences", "slices", "impressions"]


def test_a_whole_scorecard_gives_five_pictures(tmp_path):
    written = pictures.draw(scorecard(), tmp_path / "new", title="a shop")
    assert [path.stem for path in written] == ALL
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in written
    )
    for path in written:
        wide, high = png_size(path)
        assert 500 < wide < 2000
        assert 200 < high < 2500


def test_equal_scorecards_give_equal_files(tmp_path):
    for one, other in zip(
        pictures.draw(scorecard(), tmp_path / "a"),
        pictures.draw(scorecard(), tmp_path / "b"),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


def test_a_scorecard_without_impressions_baselines_or_slices_gives_what_it_has(tmp_path):
    bare = {"model": metrics(1.0), "baselines": {}, "slices": {}, "impressions": None}
    assert [path.stem for path in pictures.draw(bare, tmp_path)] == ["comparison", "recall_at_k"]
    assert pictures.draw({}, tmp_path) == []


def test_the_comparison_names_everybody_best_last_up_and_prints_the_values():
    figure = pictures.comparison(scorecard())
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["popularity", "co-occurrence", "model"]
    assert {"0.2000", "0.0400", "Recall@20", "NDCG@20"} <= set(words(figure))


def test_a_part_says_how_many_queries_it_rests_on_and_where_chance_is_known():
    said = words(pictures.slices(scorecard()))
    assert "warm items\n70 queries" in said
    assert "Recall@20 (dotted: chance)" in said


def test_missing_values_and_intervals_leave_a_gap_and_no_error(tmp_path):
    card = scorecard()
    card["model"]["recall_at_20"] = estimate(None)
    card["baselines"]["popularity"]["recall_at_20"] = estimate(0.04, None)
    del card["baselines"]["co_occurrence"]["recall_at_20"]
    assert [path.stem for path in pictures.draw(card, tmp_path)] == ALL
    assert "0.0400" in words(pictures.comparison(card))


def test_a_simulated_world_is_said_to_be_one_in_every_picture(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: said.append(words(figure)) or path)
    card = scorecard()
    card["protocol"]["simulated"] = True
    pictures.draw(card, tmp_path)
    assert len(said) == len(ALL)
    assert all(any("simulated" in text for text in texts) for texts in said)


def test_without_20_the_nearest_k_is_shown():
    found = {f"recall_at_{k}": estimate(0.1) for k in (1, 10, 100)}
    assert pictures._favourites(found) == ["recall_at_10"]


def test_training_curves_hold_every_number_in_order_of_steps(tmp_path, monkeypatch):
    points = [
        {"step": 20, "train/loss": 1.0},
        {"step": 0, "train/loss": 3.0, "valid/recall_at_20": 0.1},
        {"step": 10, "train/loss": math.nan, "valid/recall_at_20": None},
    ]
    figures = []
    write = pictures._write
    monkeypatch.setattr(pictures, "_write", lambda f, path: figures.append(f) or write(f, path))
    path = pictures.training_curves(points, tmp_path / "curves.png", title="run 1")
    png_size(path)
    lines = {axis.get_title(): axis.lines[0].get_xydata().tolist() for axis in figures[0].axes}
    assert lines == {"train/loss": [[0, 3], [20, 1]], "valid/recall_at_20": [[0, 0.1]]}


@pytest.mark.parametrize("points", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_a_run_without_numbers_has_no_curves(points, tmp_path):
    assert pictures.training_curves(points, tmp_path / "curves.png") is None
    assert not list(tmp_path.iterdir())
