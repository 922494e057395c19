"""Time to quality beside `implicit`: recall against seconds of training, in one run.

    python -m recsys.experiments.benchmarks.quality --train TRAIN --valid VALID --test TEST
        [--json FILE] [--dimensions 64 128 256 512 1024] [--factors 64 256] [--iterations 1 3 10]

The files are LightGCN adjacency lists. Both sides learn from TRAIN and VALID and rank all items
less the user's own for every user of TEST; seconds are those of learning alone, without reading the
files and without ranking. The towers are those of the recipe `gowalla.toml`, which reads the order
of the lists; `implicit` is its ALS, which does not, with settings chosen on a hold-out of the
training side (alpha 60, regularization 30).
Needs `pip install implicit`. On a shared machine compare within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from recsys.experiments.config import RunConfig
    from recsys.features.prepared.dataset import Dataset
    from recsys.towers.data import Validation

RECIPE = Path(__file__).parents[1] / "recipes" / "gowalla.toml"
K = 20
AT_ONCE = 4096


@dataclass(frozen=True)
class Point:
    """One training: what, how long, how good."""

    model: str
    seconds: float
    recall: float
    ndcg: float


def asked(config: RunConfig, dataset: Dataset) -> Validation:
    """Every user of the test side, with what it had and what it chose."""
    from recsys.features.batching.examples import ask, timeline_until
    from recsys.tables import Side
    from recsys.towers.data import Validation

    past = timeline_until(dataset, Side.VALID)
    chosen = np.flatnonzero(np.asarray(dataset.event_side) == Side.TEST)
    found = ask(
        past,
        np.asarray(dataset.event_user)[chosen],
        np.asarray(dataset.event_item)[chosen],
        np.asarray(dataset.event_time)[chosen],
        each_event=False,
        cutoff=None,
        max_history=config.towers.history.length,
        drop_seen=True,
    )
    seen = past.histories(found.queries.users)
    return Validation(found.queries, found.targets, seen, past, None)


def judged(users: np.ndarray, items: np.ndarray, validation: Validation) -> tuple[float, float]:
    """Recall and NDCG at 20 of user vectors, one a query, and vectors of all item rows."""
    from recsys.metrics import ndcg_at, recall_at
    from recsys.search import ExactIndex

    assert validation.seen is not None
    index, values = ExactIndex(items), []
    allowed = validation.timeline.alive(None)
    for start in range(0, len(users), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(users)))
        ranked, _ = index.search(
            users[rows], K, allowed=allowed, exclude=validation.seen.take(rows)
        )
        targets = validation.targets.take(rows)
        values.append(np.stack([recall_at(ranked, targets, K), ndcg_at(ranked, targets, K)]))
    recall, ndcg = np.concatenate(values, axis=1).mean(1)
    return float(recall), float(ndcg)


def towers(config: RunConfig, dataset: Dataset, validation: Validation, size: int) -> Point:
    """The recipe with vectors of so many dimensions."""
    from recsys.features.batching.examples import training_events
    from recsys.tables import Side
    from recsys.towers.build import build_model
    from recsys.towers.encode import encode_items, encode_users
    from recsys.towers.id_init import initialise
    from recsys.towers.rules import RandomInit

    events = training_events(dataset, skips=False, until=Side.VALID)
    shape = config.towers.model_copy(update={"dimension": size})
    began = time.perf_counter()
    model = build_model(dataset, shape, item_text=None, seed=config.seed, until=Side.VALID)
    assert not isinstance(config.training.id_init, RandomInit)  # the recipe
    initialise(model, events.timeline, config.training.id_init, config.seed)
    seconds = time.perf_counter() - began
    model.eval()
    items = encode_items(model, np.arange(dataset.n_items))
    users = encode_users(model, validation.queries)
    return Point(f"towers, {size} dimensions", seconds, *judged(users, items, validation))


def als(validation: Validation, factors: int, iterations: int, seed: int) -> Point:
    """`implicit`'s alternating least squares."""
    from implicit.als import AlternatingLeastSquares
    from scipy import sparse
    from threadpoolctl import threadpool_limits

    past = validation.timeline
    seen = sparse.csr_matrix(
        (np.ones(len(past.item), np.float32), (past.user, past.item)),
        shape=(past.n_users, past.n_items),
    )
    with threadpool_limits(1, "blas"):  # its own advice: BLAS threads beside its own are very slow
        began = time.perf_counter()
        model = AlternatingLeastSquares(
            factors=factors, alpha=60, regularization=30, iterations=iterations,
            random_state=seed, num_threads=len(os.sched_getaffinity(0)),
        )  # fmt: skip
        model.fit(seen, show_progress=False)
        seconds = time.perf_counter() - began
    users = np.asarray(model.user_factors)[validation.queries.users]
    name = f"ALS {factors}, {iterations} iterations"
    return Point(name, seconds, *judged(users, np.asarray(model.item_factors), validation))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    from recsys.experiments.config import load
    from recsys.experiments.run import prepare

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid")
    parser.add_argument("--test", required=True)
    parser.add_argument("--dimensions", nargs="*", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--factors", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--iterations", nargs="*", type=int, default=[1, 3, 10])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    config = load(RECIPE, [f"seed={chosen.seed}", f"out={json.dumps(chosen.out)}"])
    source = config.data.model_dump() | {
        "train": chosen.train, "valid": chosen.valid, "test": chosen.test,
    }  # fmt: skip
    config = config.model_copy(update={"data": type(config.data).model_validate(source)})
    dataset = prepare(config)
    validation = asked(config, dataset)
    points = []
    print("| model | seconds | recall@20 | ndcg@20 |\n|---|---|---|---|")
    for point in (
        *(als(validation, f, i, chosen.seed) for f in chosen.factors for i in chosen.iterations),
        *(towers(config, dataset, validation, size) for size in chosen.dimensions),
    ):
        points.append(point)
    for point in sorted(points, key=lambda one: one.seconds):
        print(f"| {point.model} | {point.seconds:.1f} | {point.recall:.4f} | {point.ndcg:.4f} |")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(point) for point in points], indent=1))


if __name__ == "__main__":
    main()
