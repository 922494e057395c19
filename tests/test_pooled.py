"""The mean gain over seeds, paired query by query."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.errors import ConfigError
from recsys.experiments.benchmarks.pooled import averaged, pooled


def test_values_are_averaged_query_by_query() -> None:
    values = {
        "a": {"auc": np.array([0.0, 1.0, np.nan])},
        "b": {"auc": np.array([1.0, 1.0, 0.5])},
        "c": {"auc": np.array([9.0, 9.0, 9.0])},
    }
    np.testing.assert_array_equal(averaged(values, ["a", "b"])["auc"], [0.5, 1.0, np.nan])


def renamed(bundle: Path, run: Path) -> Path:
    return Path(shutil.copytree(bundle, run / "bundle"))


def test_gains_are_of_our_bundles_over_theirs(tiny: Any, tmp_path: Path) -> None:
    """Two copies of a bundle gain nothing over a third, until its answers are spoiled."""
    one, two = (renamed(tiny.bundle, tmp_path / name) for name in ("one", "two"))
    gains = pooled([tiny.bundle, one], [two])
    assert set(gains) == {"targets", "impressions"}
    assert gains["targets"]["recall_at_20"].value == 0 == gains["impressions"]["auc"].value
    from recsys.serving.recommender import Recommender

    answers, worse = Recommender.recommend_rows, str(two)

    def spoiled(self: Recommender, queries: Any, *given: Any, **named: Any) -> Any:
        rows, *rest = answers(self, queries, *given, **named)
        bundle = self.bundle
        return (rows * 0 if str(bundle.manifest.get("spoiled")) == worse else rows), *rest

    with pytest.MonkeyPatch.context() as patch:
        load = Recommender.load
        patch.setattr(Recommender, "recommend_rows", spoiled)

        def marked(path: Any) -> Recommender:
            found = load(path)
            found.bundle.manifest["spoiled"] = str(path)
            return found

        patch.setattr(Recommender, "load", staticmethod(marked))
        gain = pooled([tiny.bundle, one], [two])["targets"]["recall_at_20"]
        loss = pooled([two], [tiny.bundle, one])["targets"]["recall_at_20"]
    assert gain.value > 0.05 and gain.value == pytest.approx(-loss.value)
    assert gain.low is not None and gain.low > 0


def test_runs_of_one_name_cannot_be_told_apart(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="different names"):
        pooled([tiny.bundle], [tiny.bundle, tiny.bundle])
