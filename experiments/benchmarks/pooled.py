"""The mean gain over seeds, paired query by query, with one interval over users.

    python -m recsys.experiments.benchmarks.pooled A-0 A-1 A-2 --against B-0 B-1 B-2

Bundles A and B were trained alike from the same prepared data but for one setting, each with
several seeds. All of them are judged on the same queries; each query's values are averaged over the
seeds of a side, and the difference of the averages has a bootstrap interval over users. Seeds are
taken as they are: the interval says what other users would change, not what other seeds would.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.bootstrap import Bootstrap, Estimate
from recsys.errors import ConfigError
from recsys.experiments.evaluation.comparison import MODEL
from recsys.experiments.evaluation.evaluate import evaluate, test_side
from recsys.experiments.evaluation.scorecard import Values
from recsys.features.prepared.dataset import Dataset
from recsys.serving.later_events import extend
from recsys.serving.recommender import Recommender

METRICS = {
    "targets": ("recall_at_20", "recall_at_100", "ndcg_at_20"),
    "impressions": ("auc", "ndcg_at_5"),
}


def averaged(values: Values, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric → (Q,) mean of the named contestants' values of each query."""
    return {
        metric: np.mean([values[name][metric] for name in names], axis=0)
        for metric in values[names[0]]
    }


def cold_queries(bundle: Path, users: np.ndarray) -> np.ndarray | None:
    """(Q,) whether the target of each user has no id; None where a user has several targets."""
    loaded = Recommender.load(bundle).bundle
    coded = extend(loaded, test_side(Dataset.open(Path(loaded.manifest["prepared"]))))[1]
    if len(np.unique(coded.user)) < len(coded.user):
        return None
    cold = np.zeros(int(max(coded.user.max(), users.max())) + 1, bool)
    cold[coded.user] = coded.item > loaded.manifest["warm_items"]
    return cold[users]


def pooled(
    ours: Sequence[Path], theirs: Sequence[Path], seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Mean gain of our bundles over theirs: part of the scorecard → metric → estimate.

    Raises:
        ConfigError: two bundles lie in folders of the same name, by which they are report apart.
        BundleError: the prepared data is gone, or is not what a bundle was made from.
    """
    first, *others = [*ours, *theirs]
    runs = [path.resolve().parent.name for path in others]
    if len(set(runs)) < len(runs):
        raise ConfigError(f"The runs {', '.join(runs)} have to have different names.")
    found: dict[str, dict[str, Estimate]] = {}

    def report(part: str, values: Mapping[str, Any], users: np.ndarray) -> None:
        rivals = [f"against_{run}" for run in runs]
        sides = [MODEL, *rivals[: len(ours) - 1]], rivals[len(ours) - 1 :]
        bootstrap = Bootstrap(users, seed=seed)
        new, old = (averaged(values, side) for side in sides)
        found[part] = bootstrap.differences(new, old)
        cold = cold_queries(first, users) if part == "targets" else None
        if cold is not None and cold.any() and not cold.all():
            for name, some in (("warm", ~cold), ("cold", cold)):
                mine, other = ({m: v[some] for m, v in side.items()} for side in (new, old))
                found[name] = Bootstrap(users[some], seed=seed).differences(mine, other)

    evaluate(first, against=others, report=report)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours", nargs="+", type=Path)
    parser.add_argument("--against", nargs="+", type=Path, required=True)
    asked = parser.parse_args()
    for part, gains in pooled(asked.ours, asked.against).items():
        for metric in METRICS.get(part, METRICS["targets"]):
            if metric in gains:
                gain = gains[metric]
                print(
                    f"{part:12} {metric:14} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
                )


if __name__ == "__main__":
    main()
