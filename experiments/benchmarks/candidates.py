"""Candidates for all users of a shop the size of MicroLens: seconds, from a bundle to one file.

    python -m recsys.experiments.benchmarks.candidates [--k 100] [--repeats 3] [--json FILE]

The log is simulated (50k users, 19k items, 360k events), the towers are random: what an answer is
worth does not change what it costs. Measured are loading the bundle and `write_candidates` with
seen items left out, as `recsys candidates` does it. The same matrix products and `torch.topk` alone
stand beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.experiments.benchmarks.training import Case, log_of, module_of

if TYPE_CHECKING:
    from recsys.serving.recommender import Recommender

AT_MOST = 30.0
"""Seconds that are asked for."""


def make_bundle(case: Case, kind: str, path: Path) -> None:
    """Random towers over a simulated log, as a bundle in a folder."""
    import polars as pl

    from recsys.search import ExactIndex
    from recsys.serving import bundle as bundles
    from recsys.serving.index import IndexRules
    from recsys.towers.encode import encode_items
    from recsys.towers.rules import TrainingRules
    from recsys.vocab import Vocab

    timeline = log_of(case).timeline
    model = module_of(case, TrainingRules()).model.eval()
    ids = pl.Series(np.arange(1, timeline.n_items)).cast(pl.String)
    window = np.tile(np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max]), (len(ids) + 1, 1))
    vectors, rows = encode_items(model, np.arange(len(ids) + 1)), np.arange(1, len(ids) + 1)
    bundle = bundles.Bundle(
        model=model,
        items=Vocab(ids),
        users=Vocab(pl.Series(np.arange(1, timeline.n_users)).cast(pl.String)),
        catalog=pl.DataFrame({"item": ids, "title": "item " + ids}),
        window=window,
        timeline=timeline,
        vectors=vectors,
        rows=rows,
        index=ExactIndex(np.ascontiguousarray(vectors[rows])),
        cutoff=None,
    )
    rules = IndexRules.model_validate({"kind": kind})
    bundles.save(bundles.with_index(bundle, rules), path, rules=rules)


def raw(recommender: Recommender, k: int) -> float:
    """Seconds of the products and `torch.topk` alone, for as many users, of random vectors."""
    import torch

    vectors = torch.from_numpy(np.ascontiguousarray(recommender.bundle.vectors[1:]))
    users = torch.randn(recommender.bundle.users.size - 1, vectors.shape[1])
    start = time.perf_counter()
    for part in users.split(32):
        torch.topk(part @ vectors.T, k)
    return time.perf_counter() - start


def run(case: Case, kind: str, k: int, repeats: int) -> dict[str, Any]:
    """Load the bundle and write all candidates, several times."""
    import polars as pl

    from recsys.serving.candidates import write_candidates
    from recsys.serving.recommender import Recommender

    seconds: dict[str, list[float]] = {"load": [], "write": [], "raw": []}
    with tempfile.TemporaryDirectory(prefix="recsys-candidates-") as folder:
        bundle, out = Path(folder) / "bundle", Path(folder) / "candidates.parquet"
        make_bundle(case, kind, bundle)
        for _ in range(repeats):
            start = time.perf_counter()
            recommender = Recommender.load(bundle)
            loaded = time.perf_counter()
            written = write_candidates(recommender, out, k=k)
            seconds["write"].append(time.perf_counter() - loaded)
            seconds["load"].append(loaded - start)
            seconds["raw"].append(raw(recommender, k))
        rows = pl.scan_parquet(out).select(pl.len()).collect().item()
    return {
        "users": written.users,
        "items": case.items,
        "k": k,
        "index": kind,
        "rows": rows,
        "seconds": {name: round(median(values), 3) for name, values in seconds.items()},
        "runs": seconds,
    }


def main() -> None:
    """Parse the command line; see the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m recsys.experiments.benchmarks.candidates")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=19_000)
    parser.add_argument("--events", type=int, default=360_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--index", choices=("auto", "exact", "hnsw"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here too")
    asked = parser.parse_args()
    case = Case(asked.events, asked.users, asked.items, text=True)
    result = run(case, asked.index, asked.k, asked.repeats)
    seconds = result["seconds"]
    print(
        f"{result['rows']:,} rows for {result['users']:,} users, k = {asked.k}, {asked.index} index"
    )
    print(f"load {seconds['load']:.2f} s, write {seconds['write']:.2f} s (at most {AT_MOST:.0f} s)")
    print(f"products and top-k alone {seconds['raw']:.2f} s")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
