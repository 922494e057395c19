"""Evaluate a bundle on its own test side or on a later log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recsys.errors import BundleError, DataError
from recsys.experiments.evaluation.scorecard import Report, judge
from recsys.features.prepared.dataset import Dataset
from recsys.features.readers import read as logs
from recsys.features.readers.files import Paths
from recsys.features.readers.source import as_table
from recsys.ragged import Ragged
from recsys.serving.later_events import Later, Requests, from_log
from recsys.serving.recommender import Recommender
from recsys.tables import Side

if TYPE_CHECKING:
    from recsys.experiments.config import RunConfig


def each_event(config: RunConfig, dataset: Dataset) -> bool:
    """Whether a query stands at each positive's own time, as `[evaluate] queries` says."""
    split = dataset.manifest["split"]["kind"]
    return config.evaluate.each_event(timed=dataset.timed, split=split)


def test_side(dataset: Dataset) -> Later:
    """The test side in external ids, as a later log would come."""
    events = np.flatnonzero(np.asarray(dataset.event_side) == Side.TEST)
    requests = np.flatnonzero(np.asarray(dataset.request_side) == Side.TEST)
    impressions = None
    if len(requests):
        shown = Ragged(np.asarray(dataset.request_offsets), dataset.shown_item).take(requests)
        clicked = Ragged(np.asarray(dataset.request_offsets), dataset.shown_clicked).take(requests)
        rows, place = np.unique(shown.values, return_inverse=True)
        impressions = Requests(
            user=dataset.users.decode(dataset.request_user[requests]),
            time=np.asarray(dataset.request_time)[requests],
            shown=Ragged(shown.offsets, place.reshape(-1)),
            items=dataset.items.decode(rows),
            clicked=clicked.values.astype(bool),
            context=np.asarray(dataset.request_context)[requests].astype(np.int64),
            position=None
            if dataset.shown_position is None
            else Ragged(np.asarray(dataset.request_offsets), dataset.shown_position)
            .take(requests)
            .values,
        )
    return Later(
        user=dataset.users.decode(dataset.event_user[events]),
        item=dataset.items.decode(dataset.event_item[events]),
        time=np.asarray(dataset.event_time)[events],
        context=np.asarray(dataset.event_context)[events].astype(np.int64),
        requests=impressions,
        event_weight=np.asarray(dataset.event_weight)[events],
    )


def protocol(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What the scorecard says of the data it was made on."""
    split = dataset.manifest["split"]
    used = len(dataset.skip_item) > 0 and config.training.skip_weight > 0
    return {
        "data": config.data.format,
        "split": split,
        "skips": {
            "used": used,
            "weight": config.training.skip_weight if used else 0,
            "report": dataset.manifest.get("skips"),
        },
    }


def bundle_config(recommender: Recommender) -> RunConfig:
    """The configuration that a bundle was trained with."""
    from recsys.experiments.config import RunConfig

    return RunConfig.model_validate(recommender.bundle.manifest["config"])


def later_log(recommender: Recommender, log: Paths) -> Later:
    """Read a log of the form that the bundle was trained on; only what is after its cut-off.

    Args:
        recommender: of the bundle.
        log: files, or a frame.

    Raises:
        DataError: nothing in the log is after the cut-off.
    """
    source = bundle_config(recommender).data
    fresh = {"log": log, "train": None, "valid": None, "test": None}
    read = logs.read(source.model_copy(update=fresh))
    later = from_log(read, recommender.bundle)
    cutoff = recommender.bundle.cutoff
    if cutoff is None:
        return later
    if not (later.time >= cutoff).any():
        raise DataError(
            f"{_named(log)} has no positive after the bundle's cut-off "
            f"({np.datetime64(cutoff, 'us')} UTC). Judge it on a later log."
        )
    return later.since(cutoff)


def _named(log: Paths) -> str:
    return "The frame" if isinstance(log, pl.DataFrame) else str(log)


def evaluate(
    bundle: str | Path | Recommender,
    on: Paths | None = None,
    against: Sequence[str | Path] = (),
    progress: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """The scorecard of a bundle, on its own test side or on a later log.

    Args:
        bundle: its folder, or a recommender of it.
        on: a later log of the same form, files or a Polars or pandas frame; None: the prepared
            dataset that it was trained on.
        against: other bundles made from the same prepared data, to be compared query by query;
            each stands among the baselines under "against_" and the name of its run's folder.
        progress: told what is going on.
        report: is given the values of each query, see `judge`.

    Raises:
        BundleError: the prepared dataset is gone or is not the one that the bundle was made from.
    """
    recommender = bundle if isinstance(bundle, Recommender) else Recommender.load(bundle)
    config, manifest = bundle_config(recommender), recommender.bundle.manifest
    options: dict[str, Any] = {"seed": config.seed, "report": report}
    options["rivals"] = {
        f"against_{Path(path).resolve().parent.name}": Recommender.load(path) for path in against
    }
    if progress is not None:
        options["progress"] = progress
    if on is not None:
        on = as_table(on)
        at_each = config.evaluate.each_event(
            timed=recommender.bundle.timeline.timed, split=manifest["data"]["split"]["kind"]
        )
        stated = {"data": config.data.format, "log": _named(on), "trained": manifest["protocol"]}
        return judge(
            recommender, later_log(recommender, on), config.evaluate,
            each_event=at_each, protocol=stated, **options,
        )  # fmt: skip
    path = Path(manifest["prepared"])
    if not path.exists():
        raise BundleError(
            f"The prepared data {path}, which holds this bundle's test side, is gone. "
            "Run recsys prepare again, or judge on a later log: --on LOG."
        )
    dataset = Dataset.open(path)
    digest, expected = dataset.manifest["input"]["digest"], manifest["prepared_digest"]
    if digest != expected:
        raise BundleError(
            f"{path} was prepared from other input ({digest[:12]}) than this bundle was trained on "
            f"({expected[:12]}). Train again, or judge on a later log: --on LOG."
        )
    return judge(
        recommender, test_side(dataset), config.evaluate,
        each_event=each_event(config, dataset), protocol=manifest["protocol"], **options,
    )  # fmt: skip
