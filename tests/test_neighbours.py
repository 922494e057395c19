"""The table of neighbours holds what `similar` would answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import BundleError
from recsys.search import ExactIndex
from recsys.serving import bundle as bundles
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.index import GraphRules, HnswIndex
from recsys.serving.manifest import MANIFEST, write_manifest
from recsys.serving.neighbours import FIRST, Neighbours, write_neighbours
from recsys.serving.recommender import Recommender

RULES = GraphRules(kind="hnsw", exact_breadth=1.0, exact_below=0.0)


def clusters(n: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 20), dimension))
    x = centres[rng.integers(0, len(centres), n)] + 0.3 * rng.standard_normal((n, dimension))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def table_of(
    folder: Path, index: Any, vectors: np.ndarray, k: int
) -> tuple[Neighbours, dict[str, Any]]:
    said = write_neighbours(folder, index, vectors, k)
    assert said is not None
    found = Neighbours.load(folder, {"neighbours": said, "indexed": len(vectors)})
    assert found is not None
    return found, said


def naive(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Item by item: every other item, by product and then by position."""
    n = len(vectors)
    rows, scores = np.full((n, k), -1), np.full((n, k), -np.inf, np.float32)
    for item in range(n):
        product = vectors @ vectors[item]
        others = sorted((j for j in range(n) if j != item), key=lambda j: (-product[j], j))[:k]
        rows[item, : len(others)], scores[item, : len(others)] = others, product[others]
    return rows, scores


def test_four_items_by_hand(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [1, 0]], np.float32)
    table, said = table_of(tmp_path, ExactIndex(vectors), vectors, 3)
    # 0 and 3 are the same vector: each is the other's nearest, and none its own.
    assert table.rows.tolist() == [[3, 1, 2], [0, 3, 2], [1, 0, 3], [0, 1, 2]]
    np.testing.assert_allclose(table.scores[0], [1, 0.8, 0])
    np.testing.assert_allclose(table.scores[1], [0.8, 0.8, 0.6])
    assert table.rows.dtype == np.int32 and table.scores.dtype == np.float32
    assert said["recall"] == said["recall_10"] == 1 and said["enough"]


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 99))
def test_small_catalogues_are_padded_and_repeats_are_kept(n: int, k: int, seed: int) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (n, 2)).astype(np.float32)  # many equal, some zero
    with tempfile.TemporaryDirectory() as folder:
        table, said = table_of(Path(folder), ExactIndex(vectors), vectors, k)
        _, scores = naive(vectors, k)
        np.testing.assert_array_equal(table.scores, scores)
        for item in range(n):
            found = table.rows[item][: min(k, n - 1)]
            assert item not in found and len(set(found)) == len(found) and (found >= 0).all()
        assert (table.rows[:, n - 1 :] == -1).all()
        assert said["recall"] == 1


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_the_table_of_a_graph_is_that_of_a_loop(score: str, tmp_path: Path) -> None:
    vectors = clusters(701)
    if score == "dot":
        vectors *= np.random.default_rng(1).lognormal(0, 0.3, (701, 1)).astype(np.float32)
    vectors[100:160] = vectors[7]  # more repeats than are asked for
    index = HnswIndex(vectors, RULES)
    table, said = table_of(tmp_path, index, vectors, 25)
    _, scores = naive(vectors, 25)
    assert said["recall"] >= 0.99 and said["recall_10"] >= 0.99 and said["breadth"] is not None
    hits = (table.scores >= scores[:, -1:] - 1e-5).mean()  # equals count alike
    assert hits == pytest.approx(said["recall"], abs=1e-3)
    assert not (table.rows == np.arange(701)[:, None]).any()
    assert (np.sort(table.rows, 1)[:, 1:] != np.sort(table.rows, 1)[:, :-1]).all()
    assert (np.diff(table.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(
        table.scores,
        np.einsum("nd,nkd->nk", vectors, vectors[table.rows]),
        atol=1e-5,
    )
    assert table.first is not None and table.first.rows.shape == (701, FIRST)
    np.testing.assert_array_equal(table.first.rows, table.rows[:, :FIRST])
    np.testing.assert_array_equal(table.first.scores, table.scores[:, :FIRST])
    assert table.narrowest(FIRST) is table.first and table.narrowest(FIRST + 1) is table


def test_the_graph_is_searched_more_broadly_until_it_finds_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).standard_normal((2500, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = HnswIndex(vectors, RULES.model_copy(update={"m": 5, "ef_construction": 16, "ef": 8}))
    table, said = table_of(tmp_path, index, vectors, 10)
    assert said["breadth"] > 22 and said["enough"]
    assert index.rules.ef == 8  # lookups stay as they were
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*[
        t.rows[:300] for t in (table, table_of(tmp_path, ExactIndex(vectors), vectors, 10)[0])
    ], strict=True)])  # fmt: skip
    assert share == pytest.approx(said["recall"], abs=0.01) and share > 0.98
    monkeypatch.setattr("recsys.serving.neighbours.BROADEST", 30)
    with pytest.warns(UserWarning, match=r"holds \d+\.\d% of the exact"):
        _, said = table_of(tmp_path, index, vectors, 10)
    assert said["recall"] < 0.99 and said["enough"] is False and said["breadth"] == 30


def test_neighbours_are_what_similar_answers(tiny: Any, plain: Any) -> None:
    for built in (tiny, plain):
        served = LoadedModel.load(built.bundle)
        table, rows = served.neighbours, served.bundle.rows
        assert table is not None and table.rows.shape == (len(rows), 100)
        for place, row in enumerate(rows):
            name = served.bundle.items.ids[int(row) - 1]
            answers = Recommender(served).similar(item=name, k=100, exact=True)
            found = table.rows[place][table.rows[place] >= 0]
            assert served.bundle.items.decode(rows[found]).to_list() == answers.ids
            np.testing.assert_allclose(table.scores[place][: len(found)], answers.scores, atol=1e-6)


def test_items_that_are_not_available_are_no_neighbours(plain: Any) -> None:
    served = LoadedModel.load(plain.bundle)
    over = [served.row_of(name) for name in ("i05", "i06")]
    assert all(over) and (served.position[over] == -1).all()
    bundle = served.bundle
    # Rows with a gap lie in the file a second time, rather than in memory.
    np.testing.assert_array_equal(bundle.index._vectors, bundle.vectors[bundle.rows])  # type: ignore[attr-defined]


def test_a_bundle_says_what_its_table_holds_and_may_go_without(
    build: Callable[..., Any], market_run: str, tmp_path: Path
) -> None:
    few = build(f"{market_run}[index]\nneighbours = 5\n", tmp_path / "few").bundle
    said = json.loads((few / MANIFEST).read_text())
    assert said["neighbours"] == {
        "k": 5, "first": None, "recall": 1.0, "recall_10": 1.0, "enough": True,
        "sample": said["indexed"], "breadth": None,
    }  # fmt: skip
    assert {"neighbours.rows.npy", "neighbours.scores.npy"} <= set(said["files"])
    none = bundles.save(bundles.load(few), tmp_path / "none", rules=GraphRules(neighbours=0))
    assert not list(none.glob("neighbours*"))
    assert LoadedModel.load(none).neighbours is None


def _sign(folder: Path, **changes: Any) -> None:
    said = {**json.loads((folder / MANIFEST).read_text()), **changes}
    for name in ("format", "format_version", "libraries", "files", "content", "self"):
        said.pop(name, None)
    write_manifest(folder, said)


def test_a_bundle_of_before_tables_and_checks_is_read(plain: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain.bundle, tmp_path / "bundle"))
    for file in copy.glob("neighbours*"):
        file.unlink()
    said = json.loads((copy / MANIFEST).read_text())
    index = {k: v for k, v in said["index"].items() if k != "vectors"}
    del index["rules"]["neighbours"]
    del said["neighbours"]
    (copy / MANIFEST).write_text(json.dumps(said))
    _sign(copy, index=index)
    old, new = LoadedModel.load(copy), LoadedModel.load(plain.bundle)
    assert old.neighbours is None
    np.testing.assert_array_equal(old.bundle.vectors, new.bundle.vectors)
    assert Recommender(old).similar(item="i01").to_list() == (
        Recommender(new).similar(item="i01").to_list()
    )


def test_a_table_of_another_size_or_of_two_bundles_is_refused(plain: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain.bundle, tmp_path / "bundle"))
    rows = np.load(copy / "neighbours.rows.npy")
    for wrong in (rows[:-1], rows.astype(np.int64), rows[:, :7]):
        np.save(copy / "neighbours.rows.npy", wrong)
        _sign(copy)
        with pytest.raises(BundleError, match="the manifest says int32"):
            LoadedModel.load(copy)
    np.save(copy / "neighbours.rows.npy", np.roll(rows, 1, axis=0))
    _sign(copy)
    with pytest.raises(BundleError, match="first columns differ"):
        LoadedModel.load(copy)
    (copy / "neighbours.rows.npy").write_bytes(b"no array")
    _sign(copy)
    with pytest.raises(BundleError, match=r"table of neighbours in .* cannot be read"):
        LoadedModel.load(copy)


def test_nothing_indexed_has_no_table(plain: Any, tmp_path: Path) -> None:
    bundle = bundles.load(plain.bundle)
    none = np.empty(0, np.int64)
    bare = replace(bundle, rows=none, index=ExactIndex(bundle.vectors[none]))
    saved = bundles.save(bare, tmp_path / "bare", rules=GraphRules())
    assert LoadedModel.load(saved).neighbours is None
