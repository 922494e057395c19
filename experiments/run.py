"""The straight way, top to bottom: log → prepared dataset → towers → bundle → scorecard → MLflow."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from experiments.config import RunConfig, dump
from experiments.evaluate import each_event, protocol, test_side
from experiments.scorecard import judge
from experiments.spool import Spool
from experiments.track import Tracker, lightning_logger
from features import logs
from features.columns import ContextColumn
from features.dataset import Dataset
from features.examples import timeline_until, training_events
from features.prepare import prepare as prepare_log

from recsys.errors import DataError
from recsys.files import canonical_json, sha256_bytes
from recsys.search import ExactIndex
from recsys.split import duration
from recsys.tables import Side
from recsys.vocab import Vocab
from serving import bundle as bundles
from serving.bundle import Bundle
from serving.manifest import read_manifest
from serving.recommender import Recommender
from towers.blocks import FeatureTable
from towers.build import build_model, standardise, validation_side
from towers.encode import encode_items
from towers.training import InteractionData, TwoTowerModule
from towers.two_tower import TwoTower


if TYPE_CHECKING:
    from features.text import TextEncoder


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind."""

    run_id: str
    bundle: Path
    scorecard: dict[str, Any]
    folder: Path


def say(message: str) -> None:
    """Tell what is going on, on stderr; results go to stdout."""
    print(f"  {message}", file=sys.stderr, flush=True)


def prepare(config: RunConfig) -> Dataset:
    """Read the log as `[data]` says, split, label skips and write the prepared dataset.

    Its folder is named after the configuration of data, split and skips, so that runs that differ
    only in how they learn share one.
    """
    asked = config.model_dump(mode="json", include={"data", "split", "skips"})
    name = sha256_bytes(canonical_json(asked).encode())[:12]
    log = logs.read(config.data)
    dataset = prepare_log(
        log,
        config.split,
        config.skips,
        Path(config.out) / "prepared" / name,
        options=asked["data"],
        progress=say,
    )
    for note, count in sorted(log.notes.items()):
        say(f"{note}: {count:,}")
    say(f"{'wrote' if dataset.fresh else 'unchanged:'} {dataset.path}")
    return dataset


def text_vectors(
    config: RunConfig, dataset: Dataset
) -> tuple[TextEncoder | None, np.ndarray | None, np.ndarray | None]:
    """The text encoder, fitted on items known at the cut-off, and vectors of items and users."""
    texts = dataset.item_text
    if not any(texts):
        return None, None, None
    from features.text import encode_cached, fit_encoder

    known = np.flatnonzero(dataset.item_known)
    rules = config.text.model_copy(update={"seed": config.seed})
    encoder = fit_encoder([texts[row] for row in known if texts[row]], rules, progress=say)
    cache = Path(config.out) / "cache"
    items = encode_cached(encoder, texts, cache)
    users = None
    if any(dataset.user_text):
        users = encode_cached(encoder, dataset.user_text, cache)
    return encoder, items, users


def fit(
    config: RunConfig,
    dataset: Dataset,
    model: TwoTower,
    *,
    folder: Path,
    logger: Any = False,
    resume: bool = False,
) -> TwoTowerModule:
    """Train the towers; the epoch that ranks the validation side best is what stays.

    Args:
        config: the run.
        dataset: prepared.
        model: towers as `towers.build.build_model` made them.
        folder: of checkpoints.
        logger: Lightning logger, or False.
        resume: go on from the last checkpoint in the folder.
    """
    import pytorch_lightning as lightning
    import torch
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    rules = config.training
    events = training_events(dataset, skips=rules.skip_weight > 0)
    standardise(model, events, config.seed)
    validation = validation_side(
        dataset,
        rules,
        each_event=each_event(config, dataset),
        refresh=duration(config.evaluate.refresh),
        max_history=config.towers.max_history,
        drop_seen=config.evaluate.drop_seen,
        statistics=model.uses_statistics,
        seed=config.seed,
    )
    module = TwoTowerModule(model, rules)
    data = InteractionData(
        events,
        validation,
        rules,
        max_history=config.towers.max_history,
        statistics=model.uses_statistics,
        seed=config.seed,
    )
    watched = f"val/{rules.monitor}"
    callbacks: list[Any] = []
    if validation is not None:
        best = ModelCheckpoint(
            folder / "checkpoints", filename="best", monitor=watched, mode="max",
            save_last=True, enable_version_counter=False,
        )  # fmt: skip
        callbacks = [best, EarlyStopping(watched, patience=rules.patience, mode="max")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trainer = lightning.Trainer(
            max_epochs=rules.epochs,
            accelerator=rules.accelerator,
            devices=1,
            precision=rules.precision,
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=bool(callbacks),
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            log_every_n_steps=20,
            default_root_dir=folder,
        )
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if callbacks and callbacks[0].best_model_path:
        state = torch.load(callbacks[0].best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"])
    return module.cpu().eval()


def make_bundle(
    config: RunConfig, dataset: Dataset, model: TwoTower, encoder: TextEncoder | None, path: Path
) -> Path:
    """Everything known before the test side, in one folder."""
    timeline = timeline_until(dataset, Side.VALID)
    cutoff = _cutoff(dataset, timeline.time)
    # Items and users that only the test side knows are left out; rows move up.
    catalog = dataset.catalog
    described = [name for name in catalog.columns if name != "item"]
    met = np.zeros(dataset.n_items, bool)
    met[timeline.item] = True
    if timeline.shown is not None:
        met |= timeline.shown.lengths > 0
    if described:
        met[1:] |= (
            catalog.select(pl.any_horizontal(pl.col(described).is_not_null()))
            .to_series()
            .to_numpy()
        )
    met[0] = True
    items = np.flatnonzero(met)
    users = np.diff(timeline.user_offsets) > 0
    # A user table describes users who have not come yet.
    users |= bool(
        dataset.user_numbers.shape[1] or dataset.user_categories or any(dataset.user_text)
    )
    users[0] = True
    kept_users = np.flatnonzero(users)
    place = np.full(dataset.n_items, -1, np.int64)
    place[items] = np.arange(len(items))
    timeline = replace(
        timeline,
        user_offsets=np.append(np.asarray(timeline.user_offsets)[kept_users], len(timeline.item)),
        item=place[timeline.item].astype(np.int32),
        first_seen=timeline.first_seen[items],
        exists_from=timeline.exists_from[items],
        shown=None if timeline.shown is None else timeline.shown.take(items),
    )
    with_tables = _with_rows(model, items, kept_users)
    shown = ["item", *(n for n in ("title", *config.data.catalog.fields) if n in catalog.columns)]
    catalog = catalog[items[1:] - 1].select(list(dict.fromkeys(shown)))
    window = _window(dataset)[items]
    allowed = timeline.alive(cutoff) & bundles.available(window, cutoff)
    rows = np.flatnonzero(allowed)
    vectors = encode_items(with_tables, np.arange(len(items)), timeline, cutoff)
    bundle = Bundle(
        model=with_tables,
        items=Vocab(dataset.items.ids.gather(items[1:] - 1)),
        users=Vocab(dataset.users.ids.gather(kept_users[1:] - 1)),
        catalog=catalog,
        window=window,
        timeline=timeline,
        vectors=vectors,
        rows=rows,
        index=ExactIndex(np.ascontiguousarray(vectors[rows])),
        cutoff=cutoff,
        contexts=contexts(dataset),
        manifest={
            "config": config.model_dump(mode="json"),
            "warm_items": dataset.n_warm_items,
            "prepared": str(dataset.path.resolve()),
            "prepared_digest": dataset.manifest["input"]["digest"],
            "protocol": protocol(config, dataset),
            "data": {k: dataset.manifest[k] for k in ("split", "skips", "counts")},
        },
    )
    bundle = bundles.with_index(bundle, config.index)
    return bundles.save(bundle, path, rules=config.index, encoder=encoder, seed=config.seed)


def contexts(dataset: Dataset) -> tuple[ContextColumn, ...]:
    """How the context columns became codes."""
    return tuple(
        ContextColumn(name, dataset.context_vocab(name), dataset.manifest["context"][name]["edges"])
        for name in dataset.context_sizes
    )


def _window(dataset: Dataset) -> np.ndarray:
    """(N, 2) int64, from when on and until when each item may be recommended."""
    window = np.empty((dataset.n_items, 2), np.int64)
    bounds = (dataset.item_available_from, dataset.item_available_until)
    limits = np.iinfo(np.int64)
    for side, (array, free) in enumerate(zip(bounds, (limits.min, limits.max), strict=True)):
        window[:, side] = free if array is None else array
    if dataset.item_available is not None:
        window[~np.asarray(dataset.item_available).astype(bool)] = 0
    return window


def _cutoff(dataset: Dataset, times: np.ndarray) -> int | None:
    if not dataset.timed:
        return None
    return dataset.test_from if dataset.test_from is not None else int(times.max()) + 1


def _with_rows(model: TwoTower, items: np.ndarray, users: np.ndarray) -> TwoTower:
    """The same towers over some rows of their tables."""

    def some(table: FeatureTable, rows: np.ndarray) -> FeatureTable:
        def of(buffer: Any) -> Any:
            return None if buffer is None else buffer[rows]

        return FeatureTable(
            len(rows),
            text=of(table.text),
            vector=of(table.vector),
            numbers=of(table.numbers),
            categories={name: of(table.codes(name)) for name in table.category_names},
        )

    kept = TwoTower(
        model.rules, some(model.items, items), some(model.users, users),
        model.item_spec, model.user_spec, model.context,
    )  # fmt: skip
    kept.load_state_dict(model.state_dict())
    return kept.eval()


def train(config: RunConfig, *, resume: Path | None = None) -> TrainResult:
    """Train, bundle, judge and record.

    Args:
        config: the run.
        resume: folder of a run that was stopped; it goes on from its last checkpoint.
    """
    began = time.perf_counter()
    dataset = prepare(config)
    run = resume or _new_folder(config)
    previous = None if resume is None else Spool.open(resume).record["run_id"]
    with Tracker(
        config.track,
        run,
        run_name=config.name,
        params=config.model_dump(mode="json", exclude={"track", "out"}),
        tags={"prepared": dataset.manifest["input"]["digest"]},
        out=config.out,
        run_id=previous,
    ) as tracker:
        (run / "run.toml").write_text(dump(config), encoding="utf-8")
        tracker.log_file(run / "run.toml")
        tracker.log_dict(dataset.manifest, "data.json")
        encoder, item_text, user_text = text_vectors(config, dataset)
        model = build_model(
            dataset, config.towers, item_text=item_text, user_text=user_text, seed=config.seed
        )
        module = fit(
            config, dataset, model,
            folder=run, logger=lightning_logger(tracker), resume=resume is not None,
        )  # fmt: skip
        say(f"trained in {time.perf_counter() - began:.0f} s")
        path = make_bundle(config, dataset, module.model, encoder, run / "bundle")
        scorecard = judge(
            Recommender.load(path),
            test_side(dataset),
            config.evaluate,
            each_event=each_event(config, dataset),
            protocol=protocol(config, dataset),
            seed=config.seed,
            progress=say,
        )
        record_scorecard(tracker, scorecard, path)
    return TrainResult(tracker.run_id, path, scorecard, run)


def record_scorecard(tracker: Tracker, scorecard: dict[str, Any], bundle: Path) -> None:
    """The scorecard as metrics, JSON and pictures, and the bundle as artifact and model version."""
    from experiments.pictures import draw

    tracker.log_dict(scorecard, "scorecard.json")
    numbers = {
        f"test/{name}": metric["value"]
        for name, metric in scorecard["model"].items()
        if metric["value"] is not None
    }
    tracker.log_metrics(numbers)
    for picture in draw(scorecard, tracker.folder / "pictures"):
        tracker.log_file(picture, "pictures")
    tracker.log_bundle(bundle, {"fingerprint": read_manifest(bundle)["fingerprint"]})


def _new_folder(config: RunConfig) -> Path:
    """runs/NAME, runs/NAME-2, …: a run never writes over another."""
    base = Path(config.out) / config.name
    for number in range(1, 1_000_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise DataError(f"{config.out} holds a million runs named {config.name!r}. Choose another out.")
