"""What only the graph has: build, recall, one query at a time, files."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from recsys.errors import BundleError
from recsys.ragged import Ragged
from recsys.search import ExactIndex
from recsys.serving.index import GraphRules, HnswIndex, build_index, distinct
from recsys.serving.recall import recall_against_exact


def clusters(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centre = random.normal(size=(40, d))
    x = centre[random.integers(40, size=n)] + 0.5 * random.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


GRAPH = GraphRules(exact_breadth=0.1)
"""Reach for the graph earlier than is fastest."""


@pytest.fixture(scope="module")
def big() -> HnswIndex:
    return HnswIndex(clusters(6000), GRAPH)


def test_a_graph_of_six_thousand_finds_what_exact_search_finds(big: HnswIndex) -> None:
    vectors = clusters(6000)
    assert recall_against_exact(big, vectors, k=10) > 0.99
    assert recall_against_exact(big, vectors, clusters(300, seed=1), k=50) > 0.95


def test_recall_counts_what_is_missing_and_not_which_of_equals_was_found() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2, 3]]

    class Backwards(ExactIndex):
        def search(self, queries, k, **options):
            rows, scores = super().search(queries, k, **options)
            return rows[:, ::-1], scores[:, ::-1]

    class Half(ExactIndex):
        def search(self, queries, k, **options):
            rows, scores = super().search(queries, k, **options)
            scores[:, k // 2 :] = -np.inf
            return rows, scores

    one = np.eye(4, dtype=np.float32)[:1]
    assert recall_against_exact(ExactIndex(vectors), vectors, k=2) == 1
    assert recall_against_exact(Backwards(vectors), vectors, k=2) == 1
    assert recall_against_exact(Half(vectors), vectors, one, k=2) == 0.5
    assert recall_against_exact(ExactIndex(vectors[:0]), vectors[:0]) == 1


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_an_item_bias_as_one_more_dimension_is_searched_well(spread: float) -> None:
    """Centred or not, a bias makes lengths differ; lifting keeps the graph whole."""
    random = np.random.default_rng(0)
    bias = -1 - spread * random.exponential(size=(6000, 1))
    vectors = np.column_stack([clusters(6000), bias]).astype(np.float32)
    queries = np.column_stack([clusters(200, seed=1), np.ones(200)]).astype(np.float32)
    index = HnswIndex(vectors, GRAPH)
    assert index._lifted == (spread > 0)
    assert recall_against_exact(index, vectors, queries, k=50) > 0.95


def test_a_short_answer_of_the_graph_is_completed_by_exact_search(big: HnswIndex) -> None:
    """The filter keeps half of the rows, but those farthest from the query."""
    vectors, query = clusters(6000), clusters(6000)[:1]
    away = np.argsort(vectors @ query[0])
    allowed = np.zeros(6000, bool)
    allowed[away[:3000]] = True
    rows, _ = big.search(query, 5, allowed=allowed)
    np.testing.assert_array_equal(rows, ExactIndex(vectors).search(query, 5, allowed=allowed)[0])


def test_queries_with_long_and_short_exclusions_meet_in_one_call(big: HnswIndex) -> None:
    vectors, queries = clusters(6000), clusters(60, seed=2)
    random = np.random.default_rng(3)
    lengths = [0, 3, 40, 90, 400, 5990] * 10
    exclude = Ragged.from_lists([random.permutation(6000)[:n] for n in lengths])
    rows, scores = big.search(queries, 12, exclude=exclude)
    exact_rows, exact_scores = ExactIndex(vectors).search(queries, 12, exclude=exclude)
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], atol=1e-6)
    assert (scores >= exact_scores[:, -1:] - 1e-6).mean() > 0.98
    long = np.array(lengths) == 5990
    np.testing.assert_array_equal(rows[long], exact_rows[long])
    assert (rows[long] >= 0).sum(1).tolist() == [10] * 10


@pytest.mark.parametrize("case", ["plain", "excluding", "filtered", "duplicates"])
def test_common_questions_are_answered_by_the_graph_alone(case: str, monkeypatch) -> None:
    """The fall-back would hide a graph that always gives too little, and cost its speed."""
    vectors, queries = clusters(3000), clusters(20, seed=1)
    if case == "duplicates":
        vectors = vectors[np.arange(3000) // 30]
    index = HnswIndex(vectors, GraphRules(ef=60, exact_breadth=0.5))
    wanted = index.exact.search(queries, 60)
    exclude = Ragged.from_lists(wanted[0]) if case == "excluding" else None
    allowed = np.arange(3000) % 10 > 2 if case == "filtered" else None
    monkeypatch.setattr(index, "exact", None)
    rows, scores = index.search(queries, 60, exclude=exclude, allowed=allowed)
    assert (rows >= 0).all()
    if case in ("plain", "duplicates"):
        assert (scores >= wanted[1][:, -1:] - 1e-6).mean() > 0.95


def test_a_broader_lookup_finds_more() -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 24)).astype(np.float32)
    recall = [
        recall_against_exact(HnswIndex(vectors, GraphRules(ef=ef, exact_breadth=1)), vectors, k=2)
        for ef in (2, 100)
    ]
    assert recall[0] < 0.9 < 0.98 < recall[1]
    # Twice the answers to be fetched is the least breadth.
    narrow = HnswIndex(vectors, GraphRules(ef=1, exact_breadth=1))
    assert narrow._breadth(50) == 100


def test_a_graph_that_gives_up_is_answered_exactly(big: HnswIndex, monkeypatch) -> None:
    """hnswlib raises when fewer nodes are within reach than were asked for."""

    class Unreachable:
        def knn_query(self, *_: object, **__: object) -> None:
            raise RuntimeError("Cannot return the results in a contiguous 2D array.")

    monkeypatch.setattr(big, "_graph", Unreachable())
    queries = clusters(5, seed=1)
    np.testing.assert_array_equal(big.search(queries, 9)[0], big.exact.search(queries, 9)[0])


def test_threads_that_ask_for_different_k_get_what_each_would_alone(big: HnswIndex) -> None:
    queries = clusters(40, seed=1)
    alone = {k: big.search(queries, k)[0] for k in (1, 10, 60)}
    with ThreadPoolExecutor(4) as pool:
        asked = [1, 10, 60] * 20
        for k, rows in zip(
            asked, pool.map(lambda k: big.search(queries, k)[0], asked), strict=True
        ):
            np.testing.assert_array_equal(rows, alone[k])


def test_small_catalogues_are_searched_exactly_unless_a_graph_is_asked_for() -> None:
    few = clusters(300)
    assert isinstance(build_index(few), ExactIndex)
    assert isinstance(build_index(few, GraphRules(kind="hnsw")), HnswIndex)
    assert isinstance(build_index(few, GraphRules(exact_breadth=0.5)), HnswIndex)
    exact = GraphRules(kind="exact", exact_breadth=0.5)
    assert isinstance(build_index(few, exact), ExactIndex)
    assert isinstance(build_index(few[:0]), ExactIndex)


def test_progress_adds_up_to_the_vectors() -> None:
    told: list[int] = []
    build_index(clusters(700), GraphRules(kind="hnsw"), told.append)
    assert sum(told) == 700


def test_distinct_vectors_are_numbered_by_their_first_row() -> None:
    vectors = np.array([[5, 1], [0, 0], [5, 1], [2, 2], [-0.0, 0], [5, 1]], np.float32)
    first, members = distinct(vectors)
    assert first.tolist() == [0, 1, 3]
    assert members is not None
    assert [members[node].tolist() for node in range(3)] == [[0, 2, 5], [1, 4], [3]]
    assert distinct(vectors[[0, 1, 3]])[1] is None


@pytest.mark.parametrize("kind", ["plain", "lifted", "duplicates"])
def test_a_loaded_index_answers_as_the_saved_one(kind: str, tmp_path: Path) -> None:
    vectors = clusters(2000)
    if kind == "duplicates":
        vectors[50:300] = vectors[7]
    rules = GraphRules(ef=40, exact_breadth=0.1, space="lifted" if kind == "lifted" else "auto")
    if kind == "lifted":
        vectors *= np.linspace(0.5, 1, 2000, dtype=np.float32)[:, None]
    index = HnswIndex(vectors, rules)
    index.save(tmp_path / "index.bin")
    again = HnswIndex.load(tmp_path / "index.bin", vectors, rules)
    queries = clusters(50, seed=1)
    for found, wanted in zip(again.search(queries, 9), index.search(queries, 9), strict=True):
        np.testing.assert_array_equal(found, wanted)
    # hnswlib forgets ef and goes back to 10.
    assert again._graph.ef == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.bin", "index.bin.json"]


def test_an_index_without_vectors_is_saved_and_loaded(tmp_path: Path) -> None:
    none = np.zeros((0, 4), np.float32)
    HnswIndex(none).save(tmp_path / "index.bin")
    assert HnswIndex.load(tmp_path / "index.bin", none).size == 0


def test_one_thread_and_one_seed_build_the_same_file_twice(tmp_path: Path) -> None:
    for name in "ab":
        HnswIndex(clusters(1500)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_an_index_of_other_vectors_is_refused(tmp_path: Path) -> None:
    """hnswlib would read such a file, and past the end of its own memory."""
    vectors = clusters(400)
    HnswIndex(vectors).save(tmp_path / "index.bin")
    other = vectors.copy()
    other[3, 3] += 0.001
    for wrong, what in (
        (clusters(400, d=25), "dimension 24.* have 25"),
        (vectors[:399], "size 400.* have 399"),
        (other, "vectors"),
    ):
        with pytest.raises(BundleError, match=what):
            HnswIndex.load(tmp_path / "index.bin", wrong)


def test_a_damaged_or_missing_file_is_refused_before_native_code(tmp_path: Path) -> None:
    path, vectors = tmp_path / "index.bin", clusters(400)
    HnswIndex(vectors).save(path)
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        b"",
    ):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match="SHA-256"):
            HnswIndex.load(path, vectors)
    path.unlink()
    with pytest.raises(BundleError, match="no index file"):
        HnswIndex.load(path, vectors)
    path.write_bytes(whole)
    sidecar = tmp_path / "index.bin.json"
    sidecar.write_text(json.dumps({"format": "another"}))
    with pytest.raises(BundleError, match="format"):
        HnswIndex.load(path, vectors)
    sidecar.write_text(json.dumps({"format": "recsys hnsw 1"}))
    with pytest.raises(BundleError, match="dimension None"):
        HnswIndex.load(path, vectors)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from recsys.errors import BundleError
from recsys.serving.index import HnswIndex
index = HnswIndex(np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    index.save(sys.argv[1])
except BundleError as error:
    print(error)
"""


def test_a_full_disk_is_noticed_and_leaves_nothing(tmp_path: Path) -> None:
    """hnswlib says nothing when the disk is full; a limit on the size of files stands for one."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "index.bin")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert "The disk is full" in run.stdout, run.stderr
    assert list(tmp_path.iterdir()) == []


# One query at a time.


@pytest.mark.parametrize("space", ["plain", "lifted"])
@pytest.mark.parametrize("seed", range(4))
def test_one_query_at_a_time_finds_what_search_finds(space: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = clusters(3000, seed=seed)
    if space == "lifted":
        vectors = vectors * random.uniform(0.7, 1.0, (3000, 1)).astype(np.float32)
    index = HnswIndex(vectors, GRAPH.model_copy(update={"space": space}))
    assert index._lifted == (space == "lifted")
    for query in clusters(20, seed=seed + 9) * np.float32(3):
        out = set(ExactIndex(vectors).search(query[None], 6)[0][0, ::2].tolist())
        near = index.nearest(query, 10, out, room=len(out))
        assert near is not None
        rows, scores = index.search(query[None], 13)
        kept = [place for place, row in enumerate(rows[0].tolist()) if row not in out][:10]
        np.testing.assert_array_equal(near[0], rows[0, kept])
        np.testing.assert_allclose(near[1], scores[0, kept], rtol=1e-5)


def test_equals_of_one_query_come_by_the_smaller_row() -> None:
    vectors = np.concatenate([np.eye(24, dtype=np.float32), clusters(2000)])
    near = HnswIndex(vectors, GRAPH).nearest(np.eye(24, dtype=np.float32)[3], 1)
    assert near is not None and near[0] == [3]
    index = HnswIndex(np.abs(vectors[:400]).round(2), GRAPH.model_copy(update={"exact_breadth": 1}))
    near = index.nearest(np.ones(24, np.float32), 50)
    assert near is not None
    pairs = [(-score, row) for row, score in zip(*near, strict=True)]
    assert sorted(pairs) == pairs


@pytest.mark.parametrize(
    ("query", "k", "out"),
    [
        (np.zeros(24), 5, ()),  # without a direction
        (np.full(24, np.nan), 5, ()),
        (np.full(24, 1e30), 5, ()),  # its square is infinite
        (np.ones(24), 400, ()),  # broader than exact search is slow
        (np.ones(24), 5, range(6000)),  # nothing is left
    ],
    ids=["zero", "nan", "huge", "broad", "all out"],
)
def test_what_is_unusual_about_one_query_is_left_to_search(
    big: HnswIndex, query: np.ndarray, k: int, out: range
) -> None:
    with np.errstate(over="ignore"):
        assert big.nearest(query.astype(np.float32), k, out) is None


def test_a_graph_whose_nodes_stand_for_several_rows_leaves_one_query_to_search() -> None:
    vectors = clusters(3000)
    vectors[7] = vectors[8]
    assert HnswIndex(vectors, GRAPH).nearest(vectors[0], 5) is None


def test_unit_vectors_are_read_from_the_graph_alone(tmp_path: Path) -> None:
    vectors, queries = clusters(3000), clusters(8, seed=1) * np.float32(3)
    made = HnswIndex(vectors, GRAPH)
    made.save(tmp_path / "index")
    loaded = HnswIndex.load(tmp_path / "index", vectors.copy(), GRAPH, digest=made.vectors_digest)
    loaded._vectors[:] = np.nan
    for index in (made, loaded):
        rows, scores = index.search(queries, 9)
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, 1), 1e-5)
        assert (np.diff(scores) <= 0).all()
        for query, row, score in zip(queries, rows, scores, strict=True):
            near = index.nearest(query, 9)
            assert near is not None and near[0] == row.tolist()
            np.testing.assert_allclose(near[1], score, 1e-6)


def test_vectors_of_other_lengths_have_their_exact_scores() -> None:
    vectors = clusters(3000) * np.float32(1.7)
    index = HnswIndex(vectors, GRAPH)
    query = clusters(1, seed=1)[0]
    near = index.nearest(query, 9)
    assert near is not None
    np.testing.assert_allclose(near[1], vectors[near[0]] @ query, rtol=1e-6)
