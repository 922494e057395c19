"""What keeps a bad model from answering."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from swapping import renamed

from recsys.errors import DataError
from recsys.search import ExactIndex
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Filter, Query
from recsys.serving.index import GraphRules, HnswIndex
from recsys.serving.models.gate import GateRules, check, golden_questions, write_golden
from recsys.serving.models.publish import publish
from recsys.serving.neighbours import Neighbours
from recsys.serving.recommender import Recommender

GRAPH = GraphRules(kind="hnsw", exact_breadth=1, exact_below=0)


@pytest.fixture(scope="module")
def good(plain: Any) -> LoadedModel:
    return LoadedModel.load(plain.bundle)


def indexed(served: LoadedModel, break_: Callable[[np.ndarray], np.ndarray]) -> LoadedModel:
    """The model with a graph over vectors that were tampered with."""
    bundle = served.bundle
    vectors = np.ascontiguousarray(bundle.vectors[bundle.rows])
    graph = HnswIndex(break_(vectors.copy()), GRAPH)
    return LoadedModel(replace(bundle, index=graph), None)


def test_a_good_model_passes_and_says_what_was_measured(good: LoadedModel) -> None:
    verdict = check(good, good, GateRules())
    assert verdict.passed
    assert verdict.measured["items"] == len(good.bundle.rows)
    assert verdict.measured["neighbour_recall"] == 1.0
    graph = check(indexed(good, lambda v: v), None, GateRules(k=5))
    assert graph.passed and graph.measured["recall"] == 1.0


def test_a_graph_over_other_vectors_is_refused(good: LoadedModel) -> None:
    verdict = check(indexed(good, lambda v: v[::-1].copy()), None, GateRules(k=5))
    assert not verdict.passed
    assert len(verdict.refusals) == 1
    assert verdict.refusals[0].startswith("The index finds 0.")
    # The index's own exact search is fooled like the graph: it is judged by the bundle's vectors.
    assert verdict.measured["recall"] < 0.95


def table(served: LoadedModel, change: Callable[[np.ndarray], np.ndarray]) -> LoadedModel:
    assert served.neighbours is not None
    rows = change(np.array(served.neighbours.rows))
    return LoadedModel(served.bundle, Neighbours(rows, np.array(served.neighbours.scores), 1.0))


def test_a_table_of_neighbours_that_is_wrong_is_refused(good: LoadedModel) -> None:
    n = len(good.bundle.rows)

    def with_first(row: int) -> Callable[[np.ndarray], np.ndarray]:
        def change(rows: np.ndarray) -> np.ndarray:
            rows[:, 0] = row
            return rows

        return change

    wrong: list[tuple[Callable[[np.ndarray], np.ndarray], str]] = [
        (lambda rows: rows[:-1], f"has {n - 1} rows for {n} items"),
        (lambda rows: np.roll(rows, 1, axis=0), "itself|own neighbour|finds 0"),
        (lambda rows: rows[:, ::-1], "finds 0"),
        (lambda rows: np.repeat(rows[:, :1], rows.shape[1], axis=1), "finds 0"),
        (with_first(n), "items that the index has not"),
        (with_first(-2), "items that the index has not"),
        (lambda rows: np.full_like(rows, -1), "finds 0.000"),
    ]
    for change, said in wrong:
        verdict = check(table(good, change), None, GateRules())
        assert not verdict.passed
        assert re.search(said, verdict.refusals[0])


def test_recall_is_judged_as_a_naive_loop_would(good: LoadedModel) -> None:
    bundle, k = good.bundle, 7
    vectors = np.ascontiguousarray(bundle.vectors[bundle.rows])
    random = np.random.default_rng(3)
    assert good.neighbours is not None
    rows = np.array(good.neighbours.rows)
    spoiled = random.random(rows.shape) < 0.2
    rows[spoiled] = -1
    tampered = LoadedModel(bundle, Neighbours(rows, np.array(good.neighbours.scores), 1.0))
    share = []
    for place in range(len(vectors)):
        query = vectors[place].copy()
        if bundle.model.rules.score == "cosine_bias":
            query[-1] = 0
        scores = vectors @ query
        scores[place] = -np.inf
        last = np.sort(scores)[-k]
        share.append(np.mean([row >= 0 and scores[row] >= last - 1e-5 for row in rows[place, :k]]))
    rules = GateRules(k=k, sample=10_000, neighbour_recall=0)
    assert check(tampered, None, rules).measured["neighbour_recall"] == pytest.approx(
        np.mean(share), abs=1e-9
    )


def test_the_luck_of_a_sample_refuses_nobody(good: LoadedModel) -> None:
    """A table with a recall of .99 is measured below that in half of all samples."""
    random = np.random.default_rng(0)
    assert good.neighbours is not None
    refused = 0
    for seed in range(100):
        rows = np.array(good.neighbours.rows)
        rows[random.random(rows.shape) < 0.01] = -1
        tampered = LoadedModel(good.bundle, Neighbours(rows, np.array(good.neighbours.scores), 1.0))
        refused += not check(tampered, None, GateRules(seed=seed)).passed
        rows[random.random(rows.shape) < 0.2] = -1
        assert not check(tampered, None, GateRules(seed=seed)).passed
    assert refused <= 3


def test_a_catalogue_that_shrank_is_refused(good: LoadedModel) -> None:
    rows = good.bundle.rows[:10]
    exact = ExactIndex(np.ascontiguousarray(good.bundle.vectors[rows]))
    small = LoadedModel(replace(good.bundle, rows=rows, index=exact), None)
    verdict = check(small, good, GateRules())
    assert "shrank from" in verdict.refusals[0] and "to 10 items" in verdict.refusals[0]
    assert check(small, good, GateRules(catalogue=0.1)).passed
    assert check(small, None, GateRules()).passed
    nothing = LoadedModel(
        replace(good.bundle, rows=rows[:0], index=ExactIndex(np.empty((0, 8), np.float32))), None
    )
    assert check(nothing, None, GateRules()).refusals == (
        "The bundle has no item that may be answered.",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(good: LoadedModel, value: float) -> None:
    vectors = good.bundle.vectors.copy()
    vectors[3, 1] = value
    verdict = check(LoadedModel(replace(good.bundle, vectors=vectors), None), None, GateRules())
    assert len(verdict.refusals) == 1 and "holds NaN or infinity" in verdict.refusals[0]


# --- golden questions -----------------------------------------------------------------------------


def test_what_a_model_answers_is_golden_for_it(good: LoadedModel, tmp_path: Path) -> None:
    count = write_golden(good, tmp_path / "golden.json", questions=12)
    assert count == 12
    entries = json.loads((tmp_path / "golden.json").read_text())
    kinds = [entry["ask"]["kind"] for entry in entries]
    assert (kinds.count("similar"), kinds.count("recommend")) == (6, 6)
    strict = [{**entry, "min_overlap": 1.0} for entry in entries]
    (tmp_path / "golden.json").write_text(json.dumps(strict))
    verdict = check(good, None, GateRules(golden=tmp_path / "golden.json"))
    assert verdict.passed and verdict.measured["golden"] == 12


def test_a_model_with_other_answers_is_refused_by_name(good: LoadedModel, tmp_path: Path) -> None:
    ids = good.bundle.items.decode(good.bundle.rows).to_list()
    ask = {"kind": "similar", "items": [ids[0]], "k": 3}
    answers = Recommender(good).similar(item=ids[0], k=3).ids
    other = next(id for id in ids[1:] if id not in answers)
    file = tmp_path / "golden.json"

    def refusals(*entries: dict[str, Any]) -> tuple[str, ...]:
        file.write_text(json.dumps(entries))
        return check(good, None, GateRules(golden=file)).refusals

    assert refusals({"ask": ask, "must_include": answers}) == ()
    (said,) = refusals({"ask": ask, "must_include": [other]})
    assert said.startswith(f"Golden question 1 (similar {ids[0]}) must answer '{other}', but")
    (said,) = refusals({"ask": ask, "expected": [*answers[:1], "x", "y"]})
    assert "answers 0.33 of the expected items, below the 0.5 demanded" in said
    assert refusals({"ask": ask, "expected": [*answers[:1], "x", "y"], "min_overlap": 0.3}) == ()
    (said,) = refusals({"ask": {"kind": "search", "text": "tea"}})
    assert "is not answered: " in said
    many = refusals(*[{"ask": ask, "must_include": [other]}] * 9)
    assert len(many) == 4 and many[-1] == "6 more of the 9 golden questions fail."


def test_golden_files_are_found_in_a_bundle_beside_it_and_beside_current(tmp_path: Path) -> None:
    bundle = tmp_path / "versions" / "abc"
    bundle.mkdir(parents=True)
    (tmp_path / "CURRENT").write_text("versions/abc")
    assert golden_questions(bundle, GateRules()) == []
    entry = [{"ask": {"kind": "recommend", "user": "u"}}]
    for place in (bundle, bundle.parent, tmp_path):
        (place / "golden.json").write_text(json.dumps(entry))
    assert len(golden_questions(bundle, GateRules())) == 3
    (tmp_path / "CURRENT").unlink()
    assert len(golden_questions(bundle, GateRules())) == 2
    with pytest.raises(DataError, match="There is no file"):
        golden_questions(bundle, GateRules(golden=tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not JSON"),
        ("{}", "the body: "),
        ("[[]]", "0: "),
        ('[{"ask": {"kind": "recommend"}, "mustinclude": []}]', "0.mustinclude: Extra"),
        ('[{"ask": {"kind": "recommend", "users": "a"}}]', "users: Extra"),
        ('[{"ask": {"user": "a"}}]', "0.ask: .*kind"),
        ('[{"ask": {"kind": "recommend"}, "expected": "a"}]', "0.expected: .* array"),
        ('[{"ask": {"kind": "recommend"}, "min_overlap": 3}]', "0.min_overlap: .* 1"),
    ],
)
def test_a_golden_file_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "golden.json"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        golden_questions(None, GateRules(golden=file))


def test_golden_questions_are_written_as_requests_are(tmp_path: Path) -> None:
    ask = {"kind": "similar", "items": ["a", "b"], "k": 3, "filter": {"ranges": {"price": [0, 3]}}}
    (tmp_path / "golden.json").write_text(json.dumps([{"ask": ask, "min_overlap": 1}]))
    (question,) = golden_questions(tmp_path, GateRules())
    assert question.min_overlap == 1
    assert question.ask.to_query() == Query(
        "similar", items=("a", "b"), k=3, filter=Filter(ranges={"price": (0, 3)})
    )


def test_the_gate_takes_less_than_a_second_at_a_hundred_thousand_items(good: LoadedModel) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((100_001, 8)).astype(np.float32)
    rows = np.arange(1, 100_001)
    big = replace(
        good.bundle,
        vectors=vectors,
        rows=rows,
        items=type(good.bundle.items)(pl.Series([f"i{n}" for n in rows])),
        index=ExactIndex(vectors[1:]),
    )
    nearest = np.zeros((100_000, 10), np.int32)
    served = LoadedModel(big, Neighbours(nearest, nearest.astype(np.float32), 1.0))
    verdict = check(served, None, GateRules())
    assert not verdict.passed
    assert verdict.measured["seconds"] < 1.0


def test_the_command_writes_questions_that_the_gate_asks(
    plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the gate looks for them: beside a bundle, and beside CURRENT."""
    from recsys.experiments import cli

    def run(*arguments: object) -> tuple[int | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["golden", *(str(argument) for argument in arguments)])
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    bundle = renamed(plain.bundle, tmp_path / "run" / "bundle", "")
    folder = tmp_path / "shop"
    published = publish(bundle, folder)
    code, out, _ = run(bundle, "--questions", 6, "-k", 4, "--min-overlap", 1, "--json")
    told = json.loads(out)
    assert (code, told["questions"]) == (0, 6)
    assert Path(told["path"]) == bundle.parent / "golden.json"
    code, out, _ = run(folder)
    assert (code, out) == (0, f"{folder}/golden.json: 20 questions, answered by {published.name}\n")
    for path, count in ((bundle, 6), (published, 20)):
        verdict = check(LoadedModel.load(path), None, GateRules(), folder=path)
        assert verdict.passed and verdict.measured["golden"] == count
    # A model with other items does not pass.
    foreign = LoadedModel.load(renamed(plain.bundle, tmp_path / "foreign", "x"))
    assert not check(foreign, None, GateRules(), folder=bundle).passed
    # What somebody may have written by hand is not written over unasked.
    before = (folder / "golden.json").read_text()
    code, _, err = run(bundle, "--out", folder / "golden.json")
    assert code == 2 and "is there already" in err
    assert (folder / "golden.json").read_text() == before
    assert run(bundle, "--out", folder / "golden.json", "--force", "--seed", 1)[0] == 0
    assert (folder / "golden.json").read_text() != before
    assert run(tmp_path / "nowhere")[0] == 2
