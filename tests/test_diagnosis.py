"""Numbers of vectors by hand and against slow twins, and which finding follows from which."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.towers import diagnosis
from recsys.towers.diagnosis import Measured, Part, diagnose
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower


def rows(seed: int, n: int, d: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


# --- numbers --------------------------------------------------------------------------------------


def test_alignment_by_hand() -> None:
    users, items = np.array([[2.0, 0], [0, 1]]), np.array([[5.0, 0], [3, 0]])
    assert diagnosis.alignment(users, items) == pytest.approx((0 + 2) / 2)


def test_uniformity_by_hand_and_against_pairs() -> None:
    # Two opposite unit vectors are 2 apart: exp(-2 · 4).
    assert diagnosis.uniformity(np.array([[1.0, 0], [-3, 0]])) == pytest.approx(-8)
    assert diagnosis.uniformity(np.ones((4, 3))) == pytest.approx(0, abs=1e-9)
    x = rows(0, 7, 3)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [np.sum((unit[a] - unit[b]) ** 2) for a in range(7) for b in range(a)]
    assert diagnosis.uniformity(x) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(pairs)))))
    # Spread over a sphere of many dimensions: all distances are √2.
    assert diagnosis.uniformity(rows(1, 500, 300)) == pytest.approx(-4, abs=0.05)


def test_the_mean_cosine_equals_that_of_all_pairs() -> None:
    x = rows(2, 9, 4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [float(unit[a] @ unit[b]) for a in range(9) for b in range(a)]
    assert diagnosis.mean_cosine(x) == pytest.approx(np.mean(pairs))


def test_the_effective_rank_counts_equal_directions() -> None:
    assert diagnosis.effective_rank(np.eye(5)) == pytest.approx(5)
    assert diagnosis.effective_rank(np.outer(np.arange(1, 9), [1.0, 2, 3])) == pytest.approx(1)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert diagnosis.effective_rank(np.diag([3.0, 1.0, 0.0])) == pytest.approx(wanted)


def test_duplicates_are_rows_that_stand_where_another_stands() -> None:
    x = rows(3, 10, 4)
    assert diagnosis.duplicates(x) == 0
    x[7] = x[2]
    x[4] = x[2] + 1e-9
    assert diagnosis.duplicates(x) == pytest.approx(0.3)
    assert diagnosis.duplicates(x[:0]) == 0


def test_rank_correlation_of_what_is_constant_is_zero() -> None:
    assert diagnosis.rank_correlation(
        np.arange(5), np.array([1, 10, 20, 99, 1000])
    ) == pytest.approx(1)
    assert diagnosis.rank_correlation(np.arange(5), -np.arange(5)) == pytest.approx(-1)
    assert diagnosis.rank_correlation(np.ones(5), np.arange(5)) == 0


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 99))
def test_overlap_equals_that_of_all_pairs_of_askers(asked: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = np.stack([rng.permutation(8)[:k] for _ in range(asked)])
    pairs = [
        len(set(answers[a]) & set(answers[b])) / k for a in range(asked) for b in range(asked)
        if a != b
    ]  # fmt: skip
    assert diagnosis.overlap(answers) == pytest.approx(np.mean(pairs))


def test_kept_answers_are_of_the_same_asker() -> None:
    answers = np.array([[1, 2, 3], [4, 5, -1]])
    others = np.array([[3, 9, 1, 8], [1, 2, 3, 4]])
    assert diagnosis.kept(answers, others) == pytest.approx(3 / 5)
    assert diagnosis.kept(answers, answers) == 1
    assert diagnosis.kept(answers, answers[::-1]) == 0


def test_the_most_popular_are_a_percent_but_enough_for_an_answer() -> None:
    popularity, everything = np.arange(1000.0), np.arange(1000)
    assert diagnosis.most_popular(popularity, everything, 3).tolist() == list(range(999, 989, -1))
    assert len(diagnosis.most_popular(popularity, everything, 50)) == 50
    assert diagnosis.most_popular(popularity, np.array([5, 2]), 50).tolist() == [5, 2]


# --- parts ----------------------------------------------------------------------------------------


def test_a_hidden_part_is_unknown_and_comes_back() -> None:
    torch.manual_seed(0)
    items = FeatureTable(6, text=torch.randn(6, 3), vector=torch.randn(6, 2))
    model = TwoTower(
        TowerRules(dimension=4, hidden=4), items, FeatureTable(2), items.spec(6, {}), FeatureSpec()
    ).eval()
    with torch.no_grad():
        model.item_tower.inputs.ids.weight.normal_()
    everything = torch.arange(6)
    inputs = model.item_tower.inputs
    whole = model.embed_items(everything)
    assert diagnosis.parts(model) == ("ids", "text", "vector")
    for part, wanted in {
        "ids": whole - inputs.ids.weight + inputs.ids.weight[0],
        "text": whole - inputs.text(items.text),
        "vector": whole - inputs.vector(items.vector),
    }.items():
        with diagnosis.hidden(model, part):
            torch.testing.assert_close(model.embed_items(everything), wanted)
        torch.testing.assert_close(model.embed_items(everything), whole)
    with pytest.raises(RuntimeError), diagnosis.hidden(model, "ids"):
        raise RuntimeError
    torch.testing.assert_close(model.embed_items(everything), whole)


# --- findings -------------------------------------------------------------------------------------

HEALTHY = Measured(
    items=10_000, dimension=64, score="cosine", item_rank=50, user_rank=40, item_cosine=0.1,
    user_cosine=0.3, item_uniformity=-3.5, user_uniformity=-2.5, alignment=0.8, norm=1,
    norm_spread=0, norm_popularity=0, duplicates=0.01, score_popularity=0.4, same_for_all=0.1,
    popular_share=0.3, popular_choices=0.2, depth=20, k=20, recall=0.3, held_out=0.15,
    popularity_recall=0.1, parts={"ids": Part(0.6, 0.4, 0.15), "text": Part(0.8, 0.7, 0.25)},
    temperature=0.1,
)  # fmt: skip


def names(**changed: Any) -> list[str]:
    return [finding.name for finding in diagnose(replace(HEALTHY, **changed))]


def test_healthy_towers_have_no_finding() -> None:
    assert names() == []
    # What could not be measured is no finding either.
    assert names(recall=None, held_out=None, temperature=None, parts={}, alignment=None) == []


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"item_rank": 1.2}, "collapse"),
        ({"item_cosine": 0.95}, "collapse"),
        ({"user_cosine": 0.99}, "collapse"),
        ({"temperature": 0.01, "temperature_learned": True}, "dead temperature"),
        ({"temperature": 1.0, "temperature_learned": True}, "dead temperature"),
        ({"temperature": 0.5}, "dead temperature"),  # 2/0.5 < log 10,000
        ({"same_for_all": 0.9, "score_popularity": 0.8}, "popularity domination"),
        ({"popular_share": 0.9}, "popularity domination"),
        ({"recall": 0.9, "held_out": 0.05}, "id overfit"),
        ({"recall": 0.9, "held_out": 0.25, "popularity_recall": 0.26}, "id overfit"),
        ({"parts": {"text": Part(1.0, 1.0, 0.3)}}, "text ignored"),
        ({"parts": {"vector": Part(1.0, 1.0, 0.3)}}, "vector ignored"),
        ({"duplicates": 0.5}, "duplicates"),
    ],
)
def test_each_illness_has_its_name_a_cause_and_a_remedy(changed: dict[str, Any], name: str) -> None:
    assert names(**changed) == [name]
    (finding,) = diagnose(replace(HEALTHY, **changed))
    assert all(part.endswith(".") for part in (finding.evidence, finding.cause, finding.remedy))


near_misses = pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.012, "temperature_learned": True},
        {"temperature": 0.01},  # chosen, not run into
        {"temperature": 0.5, "score": "dot"},  # a dot product has no bound
        {"same_for_all": 0.9},  # all alike, but not because of popularity
        {"popular_share": 0.9, "popular_choices": 0.7},  # so are the choices
        {"recall": 0.9, "held_out": 0.2},  # remembers much, and still foretells
        {"recall": 0.05, "held_out": 0.001},
        {"recall": 0.9, "held_out": 0.01, "parts": {}},  # no ids to blame
        {"recall": 0.9, "held_out": 0.01, "parts": {"ids": Part(0.9, 0.9, 0.8)}},
        {"item_cosine": 0.95, "popularity_recall": 0.05},  # news: one list, and the right one
        {"same_for_all": 0.9, "score_popularity": 0.8, "popularity_recall": 0.05},
        {"parts": {"text": Part(0.9, 1.0, 0.3)}},
        {"parts": {"text": Part(1.0, 0.9, 0.3)}},
    ],
)


def test_chance_is_no_use_even_where_popularity_is_worse() -> None:
    assert not replace(HEALTHY, items=100, held_out=0.3, popularity_recall=0.01).useful
    assert replace(HEALTHY, items=100, held_out=0.4, popularity_recall=0.01).useful
    assert names(item_cosine=0.95, items=100, held_out=0.3, popularity_recall=0.01) == ["collapse"]


@near_misses
def test_near_misses_have_none(changed: dict[str, Any]) -> None:
    assert names(**changed) == []
