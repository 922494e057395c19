"""Two recipes over several seeds: the mean of their paired differences, and its interval.

    python -m experiments.benchmarks.seeds NEW-0/bundle=OLD-0/bundle NEW-1/bundle=OLD-1/bundle

Each pair learned from the same seed, all pairs from the same prepared data. Of each query the
difference is the mean over the seeds, and the interval is one over users. Queries whose target has
no id in any new bundle are told apart ("cold"), where each query has one target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.contest import MODEL
from experiments.evaluate import evaluate_bundle, test_side
from features.dataset import Dataset
from recsys.errors import ConfigError
from recsys.intervals import Bootstrap
from serving.later import extend
from serving.recommender import Recommender


def values_of(new: Path, old: Path, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Q,) of the new bundle, (Q,) of the old one, (Q,) user rows, as `recsys evaluate` judges."""
    found: dict[str, Any] = {}

    def told(what: str, values: Any, users: np.ndarray) -> None:
        found.setdefault(what, (values, users))

    evaluate_bundle(new, against=[old], told=told)
    values, users = found["targets"]
    (other,) = (name for name in values if name.startswith("against_"))
    return values[MODEL][metric], values[other][metric], users


def cold_queries(bundle: Path, users: np.ndarray) -> np.ndarray | None:
    """(Q,) whether the target of each user has no id; None where a user has several targets."""
    loaded = Recommender.load(bundle).bundle
    coded = extend(loaded, test_side(Dataset.open(Path(loaded.manifest["prepared"]))))[1]
    if len(np.unique(coded.user)) < len(coded.user):
        return None
    cold = np.zeros(int(max(coded.user.max(), users.max())) + 1, bool)
    cold[coded.user] = coded.item > loaded.manifest["warm_items"]
    return cold[users]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of all, warm and cold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("pairs", nargs="+", help="NEW=OLD, folders of bundles")
    parser.add_argument("--metric", default="recall_at_20")
    chosen = parser.parse_args(arguments)
    pairs = [tuple(map(Path, pair.split("=", 1))) for pair in chosen.pairs]
    if any(len(pair) != 2 for pair in pairs):
        sys.exit("Give each pair as NEW=OLD.")
    judged = [values_of(new, old, chosen.metric) for new, old in pairs]
    users = judged[0][2]
    if any(not np.array_equal(users, one[2]) for one in judged):
        raise ConfigError("The bundles were asked different queries: pair runs on the same data.")
    new, old = (np.mean([one[i] for one in judged], axis=0) for i in (0, 1))
    cold = cold_queries(pairs[0][0], users)
    parts = {"all": np.ones(len(users), bool)}
    if cold is not None:
        parts |= {"warm": ~cold, "cold among all": cold}
    print(
        f"| {chosen.metric} | queries | old | new | ratio | difference |\n|---|---|---|---|---|---|"
    )
    for name, some in parts.items():
        if some.any():
            gap = Bootstrap(users[some]).estimate((new - old)[some])
            before, after = old[some].mean(), new[some].mean()
            print(
                f"| {name} | {some.sum():,} | {before:.4f} | {after:.4f} | {after / before:.3f} "
                f"| {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] |"
            )


if __name__ == "__main__":
    main()
