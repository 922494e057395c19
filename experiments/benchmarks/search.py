"""Exact search and the graph beside the bare libraries they stand on, in one run.

    python -m recsys.experiments.benchmarks.search [--sizes 20000,100000] [--json FILE]

Every method answers the same queries in turn, the rounds interleaved, and the fastest round of
each counts. On a machine shared with others, ask for one thread (OMP_NUM_THREADS=1) and for
processor time (--cpu) rather than time on the wall. `raw torch` is one matrix
product and `torch.topk` with nothing checked, `raw numpy` the same with argpartition, `raw hnswlib`
a graph of the same parameters. Recall is against exact search, ties counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import torch

from recsys.ragged import Ragged
from recsys.search import ExactIndex
from recsys.serving.index import GraphRules, HnswIndex

DIMENSION = 64
BATCH = 32
"""Queries at once of the raw products, where they are fastest (PEERS)."""
EXCLUDED = 50
"""Seen items of each query in the rows that exclude."""

Answer = Callable[[np.ndarray, int], Any]


def clusters(n: int, seed: int, centres: int = 500) -> np.ndarray:
    """(n, 64) unit vectors around common centres, which is what towers make."""
    centre = np.random.default_rng(0).normal(size=(centres, DIMENSION))
    random = np.random.default_rng(seed)
    x = centre[random.integers(centres, size=n)] + 0.6 * random.normal(size=(n, DIMENSION))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def raw_torch(vectors: np.ndarray) -> Answer:
    table = torch.from_numpy(vectors)

    def answer(queries: np.ndarray, k: int) -> np.ndarray:
        parts = torch.from_numpy(queries).split(BATCH)
        return torch.cat([torch.topk(part @ table.T, k).indices for part in parts]).numpy()

    return answer


def raw_numpy(vectors: np.ndarray) -> Answer:
    def answer(queries: np.ndarray, k: int) -> np.ndarray:
        parts = []
        for start in range(0, len(queries), BATCH):
            scores = queries[start : start + BATCH] @ vectors.T
            best = np.argpartition(-scores, k, 1)[:, :k]
            order = np.argsort(-np.take_along_axis(scores, best, 1), 1)
            parts.append(np.take_along_axis(best, order, 1))
        return np.concatenate(parts)

    return answer


def raw_hnswlib(vectors: np.ndarray, rules: GraphRules) -> Answer:
    graph = hnswlib.Index("ip", DIMENSION)
    graph.init_index(
        len(vectors), M=rules.m, ef_construction=rules.ef_construction, random_seed=rules.seed
    )
    graph.add_items(vectors, num_threads=1)

    def answer(queries: np.ndarray, k: int) -> np.ndarray:
        graph.set_ef(max(rules.ef, 2 * k))  # as broad as ours
        found, _ = graph.knn_query(queries, k, num_threads=torch.get_num_threads())
        return found.astype(np.int64)

    return answer


def methods(
    vectors: np.ndarray, excluded: Ragged, clock: Callable[[], float]
) -> tuple[dict[str, Answer], dict[str, float]]:
    """Every way to answer, and the seconds that building the graphs took."""
    # Never hand over to exact search: here the graph itself is measured.
    rules = GraphRules(kind="hnsw", exact_breadth=1)
    exact = ExactIndex(vectors)
    start = clock()
    graph = HnswIndex(vectors, rules)
    middle = clock()
    bare = raw_hnswlib(vectors, rules)
    built = {"hnsw": middle - start, "raw hnswlib": clock() - middle}

    def first(queries: np.ndarray) -> Ragged:
        return excluded.take(np.arange(len(queries)))

    answers: dict[str, Answer] = {
        "raw torch": raw_torch(vectors),
        "raw numpy": raw_numpy(vectors),
        "exact": lambda queries, k: exact.search(queries, k)[0],
        "raw hnswlib": bare,
        "hnsw": lambda queries, k: graph.search(queries, k)[0],
        "exact excluding": lambda queries, k: exact.search(queries, k, exclude=first(queries))[0],
        "hnsw excluding": lambda queries, k: graph.search(queries, k, exclude=first(queries))[0],
    }
    return answers, built


RAW = {
    "raw torch": "raw torch", "raw numpy": "raw torch", "exact": "raw torch",
    "exact excluding": "raw torch", "raw hnswlib": "raw hnswlib", "hnsw": "raw hnswlib",
    "hnsw excluding": "raw hnswlib",
}  # fmt: skip
"""What each method is compared with."""


def measure(
    n: int, batch: int, single: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """One row a method, k and way of asking: queries a second, ratio to raw, recall."""
    vectors, queries = clusters(n, 1), clusters(batch, 2)
    random = np.random.default_rng(3)
    # Half of what is seen is what would be found, as with real histories.
    near = ExactIndex(vectors).search(queries, EXCLUDED // 2)[0]
    far = random.integers(0, n, (batch, EXCLUDED - EXCLUDED // 2))
    offsets = np.arange(batch + 1, dtype=np.int64) * EXCLUDED
    excluded = Ragged(offsets, np.column_stack([near, far]).ravel())
    answers, built = methods(vectors, excluded, clock)
    rows = []
    for k in (10, 100):
        right = {name: answers[name](queries, k) for name in ("exact", "exact excluding")}
        for way, count in (("batch", batch), ("single", single)):
            best = dict.fromkeys(answers, float("inf"))
            for _ in range(rounds):
                for name, answer in answers.items():
                    asked = [queries] if way == "batch" else np.split(queries[:count], count)
                    start = clock()
                    for part in asked:
                        answer(part, k)
                    best[name] = min(best[name], (clock() - start) / count)
            for name, answer in answers.items():
                truth = right["exact excluding" if "excluding" in name else "exact"]
                found = answer(queries, k)
                rows.append({
                    "items": n, "k": k, "asked": way, "method": name,
                    "queries_per_second": round(1 / best[name]),
                    "milliseconds": round(1000 * best[name], 4),
                    "ratio_to_raw": round(best[RAW[name]] / best[name], 3),
                    "recall": round(recall(vectors, queries, found, truth), 4),
                    "build_seconds": round(built[name], 2) if name in built else None,
                })  # fmt: skip
    return rows


def recall(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray, truth: np.ndarray) -> float:
    """Share of answers that score as high as the last true one."""
    last = np.einsum("qd,qd->q", vectors[truth[:, -1]], queries)
    scores = np.einsum("qkd,qd->qk", vectors[found], queries)
    return float((scores >= last[:, None] - 1e-6).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="20000,100000", help="numbers of items")
    parser.add_argument("--batch", type=int, default=2000, help="queries asked together")
    parser.add_argument("--single", type=int, default=200, help="queries asked one by one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--cpu", action="store_true", help="processor time, with one thread")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    print(f"{torch.get_num_threads()} threads, {DIMENSION} dimensions, {EXCLUDED} excluded")
    print(f"{'items':>7} {'k':>4} {'asked':7} {'method':16} {'queries/s':>10} {'ms':>8} "
          f"{'of raw':>7} {'recall':>7} {'build s':>8}")  # fmt: skip
    rows = []
    for size in map(int, options.sizes.split(",")):
        for row in measure(size, options.batch, options.single, options.rounds, clock):
            build = "" if row["build_seconds"] is None else f"{row['build_seconds']:.2f}"
            print(f"{row['items']:>7} {row['k']:>4} {row['asked']:7} {row['method']:16} "
                  f"{row['queries_per_second']:>10} {row['milliseconds']:>8.3f} "
                  f"{row['ratio_to_raw']:>7.2f} {row['recall']:>7.4f} {build:>8}",
                  flush=True)  # fmt: skip
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
