"""The training pipeline, top to bottom: log → prepared → towers → bundle → scorecard → MLflow."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recsys.errors import ConfigError, DataError
from recsys.experiments.bundling import make_bundle
from recsys.experiments.config import RunConfig, absolute, dump, load
from recsys.experiments.evaluation.evaluate import each_event, protocol, test_side
from recsys.experiments.evaluation.scorecard import judge
from recsys.experiments.tracking.spool import Spool, flatten
from recsys.experiments.tracking.track import Tracker, lightning_logger
from recsys.features.batching.examples import consecutive, timeline_until, training_events
from recsys.features.batching.negatives_file import read_negatives
from recsys.features.prepared.columns import texts as texts_of
from recsys.features.prepared.dataset import Dataset
from recsys.features.prepared.prepare import prepare as prepare_log
from recsys.features.readers import read as logs
from recsys.features.readers.source import with_files
from recsys.features.text.rules import learns_cooccurrence
from recsys.files import canonical_json, read_json, sha256_bytes, write_json
from recsys.serving.manifest import read_manifest
from recsys.serving.recommender import Recommender
from recsys.split import duration
from recsys.tables import Side
from recsys.towers.build import build_model, standardise
from recsys.towers.data import InteractionData, Validation, validation_side
from recsys.towers.id_init import initialise
from recsys.towers.rules import RandomInit
from recsys.towers.training import Average, EpochLines, TwoTowerModule
from recsys.towers.two_tower import TwoTower

if TYPE_CHECKING:
    from recsys.features.text.encoder import TextEncoder
    from recsys.towers.text import TextTower


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


def read_config(config: str | Path | RunConfig) -> RunConfig:
    """A run's configuration, read if it is a file; frames in it become files under `out`."""
    if not isinstance(config, RunConfig):
        config = load(config)
    source = with_files(config.data, Path(config.out) / "frames")
    return config.model_copy(update={"data": source})


def prepare(config: str | Path | RunConfig) -> Dataset:
    """Read the log as `[data]` says, split, label skips and write the prepared dataset.

    Args:
        config: the run, or its TOML file.

    Its folder is named after the configuration of data, split and skips, so that runs that differ
    only in how they learn share one.
    """
    config = read_config(config)
    options = config.model_dump(mode="json", include={"data", "split", "skips"})
    name = sha256_bytes(canonical_json(options).encode())[:12]
    log = logs.read(config.data)
    dataset = prepare_log(
        log,
        config.split,
        config.skips,
        Path(config.out) / "prepared" / name,
        options=options["data"],
        progress=say,
    )
    for note, count in sorted(log.notes.items()):
        say(f"{note}: {count:,}")
    say(f"{'wrote' if dataset.fresh else 'unchanged:'} {dataset.path}")
    return dataset


def text_vectors(
    config: RunConfig, dataset: Dataset, until: Side = Side.TRAIN
) -> tuple[TextEncoder | None, np.ndarray | None, np.ndarray | None]:
    """The text encoder, fitted on items known at the cut-off, and vectors of items and users.

    An encoder that is to learn with the towers gives no item vectors beforehand; those of users
    stay what it gave before it learned.

    Args:
        config: the run.
        dataset: prepared.
        until: the last side whose events the view "cooccurrence" may know.
    """
    texts = dataset.item_text
    if not any(texts):
        return None, None, None
    from recsys.features.text.encoder import encode_cached, fit_encoder

    schema, catalog = config.data.catalog, dataset.catalog
    # Row 0 has no text, and neither has an item that the table does not name.
    written = pl.Series("text", texts)
    rows = np.flatnonzero(np.asarray(dataset.item_known).astype(bool) & (written != "").to_numpy())
    parts = dict.fromkeys(("title", *schema.text, *schema.categories))
    fields = [texts_of(catalog, (part,)).gather(rows) for part in parts if part in catalog.columns]
    rules = config.text
    cooccurrence = None
    if learns_cooccurrence(rules):
        place = np.full(dataset.n_items, -1)
        place[rows] = np.arange(len(rows))
        cooccurrence = place[consecutive(timeline_until(dataset, until))]
        cooccurrence = cooccurrence[:, (cooccurrence >= 0).all(axis=0)]
    encoder = fit_encoder(
        written.gather(rows),
        rules,
        seed=config.seed,
        fields=fields,
        cooccurrence=cooccurrence,
        progress=say,
    )
    cache = Path(config.out) / "cache"
    items = encode_cached(encoder, texts, cache) if rules.train == "frozen" else None
    users = None
    if any(dataset.user_text):
        users = encode_cached(encoder, dataset.user_text, cache)
    return encoder, items, users


def text_tower(
    config: RunConfig, dataset: Dataset, encoder: TextEncoder | None
) -> Callable[[], TextTower] | None:
    """Gives the text encoder as a part of the item tower, untrained at each call; None: frozen."""
    if encoder is None or config.text.train == "frozen":
        return None
    from recsys.features.text.tokens import tokenise
    from recsys.towers.text import TextTower

    tokens = tokenise(encoder, dataset.item_text)
    return partial(TextTower, encoder, tokens, train=config.text.train)


class Untrained:
    """Gives untrained towers, the same at each call, over texts as they are read.

    Args:
        config: the run.
        dataset: prepared.
    """

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.encoder: TextEncoder | None = None
        """The text encoder of the towers given last."""
        self._texts: dict[Side, tuple[TextEncoder | None, np.ndarray | None, np.ndarray | None]]
        self._texts = {}

    def make(self) -> TwoTower:
        """Towers that know nothing of the validation side."""
        return self._towers(Side.TRAIN, Side.TRAIN)

    def remake(self) -> TwoTower:
        """Towers that are to learn from the validation side, too: what it is the first to know has
        ids, and its co-occurrence says more of texts. Where it says nothing, they are read once.
        """
        texts = Side.VALID if learns_cooccurrence(self.config.text) else Side.TRAIN
        return self._towers(texts, Side.VALID)

    def _towers(self, texts: Side, until: Side) -> TwoTower:
        if texts not in self._texts:
            self._texts[texts] = text_vectors(self.config, self.dataset, texts)
        self.encoder, items, users = self._texts[texts]
        return build_model(
            self.dataset,
            self.config.towers,
            item_text=items,
            user_text=users,
            texts=text_tower(self.config, self.dataset, self.encoder),
            seed=self.config.seed,
            until=until,
        )


def fit(
    config: RunConfig,
    dataset: Dataset,
    make: Callable[[], TwoTower],
    *,
    remake: Callable[[], TwoTower] | None = None,
    folder: Path,
    logger: Any = False,
    resume: bool = False,
) -> TwoTowerModule:
    """Train the towers for the number of epochs that ranks the validation side best.

    With `training.refit` they then start again and learn from train and validation side together,
    for as many epochs; otherwise the weights of the best epoch stay.

    Args:
        config: the run.
        dataset: prepared.
        make: gives untrained towers, the same at each call, which know nothing of the validation
            side.
        remake: gives those that are to learn from it, too; None: `make`.
        folder: of checkpoints.
        logger: Lightning logger, or False.
        resume: go on from the last checkpoints in the folder.
    """
    import torch

    rules, folder = config.training, folder / "checkpoints"
    remake = remake or make
    if rules.epochs == 0:
        say(f"the {rules.id_init.kind} initialisation alone, without learning")
        return _learn(config, dataset, remake(), None, 0, folder, logger=False, resume=False)[0]
    model = make()
    validation = validation_of(config, dataset, model)
    refolder, chosen = folder / "refit", folder / "chosen.json"
    # A checkpoint says for how long nothing had become better, but not that this had been the end:
    # going on from the last one would train an epoch more, and might choose another.
    schedule = {"epochs": rules.epochs, "patience": rules.patience}
    earlier = read_json(chosen) if resume and chosen.exists() else {}
    if resume and ((refolder / "last.ckpt").exists() or earlier.items() >= schedule.items()):
        module = TwoTowerModule(model, rules).eval()
        epochs = earlier.get("best_epoch") or best_epoch(folder)
    else:
        chosen.unlink(missing_ok=True)  # it spoke of another training
        module, epochs = _learn(
            config, dataset, model, validation, rules.epochs, folder, logger=logger, resume=resume
        )
        if validation is not None:
            write_json(chosen, {**schedule, "best_epoch": epochs})
    if validation is None:
        return module
    if rules.refit:
        say(f"learning again from train and validation side, {epochs} epochs")
        again = _learn(
            config, dataset, remake(), None, epochs, refolder, logger=False, resume=resume
        )
        return again[0]
    best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
    module.load_state_dict(best["state_dict"])
    return module


def validation_of(config: RunConfig, dataset: Dataset, model: TwoTower) -> Validation | None:
    """The validation side as the run asks for it; None where there is none."""
    return validation_side(
        dataset,
        config.training,
        each_event=each_event(config, dataset),
        refresh=duration(config.evaluate.refresh),
        max_history=config.towers.history.length,
        drop_seen=config.evaluate.drop_seen,
        statistics=model.uses_statistics,
        seed=config.seed,
        progress=say,
    )


def _learn(
    config: RunConfig,
    dataset: Dataset,
    model: TwoTower,
    validation: Validation | None,
    epochs: int,
    folder: Path,
    *,
    logger: Any,
    resume: bool,
) -> tuple[TwoTowerModule, int]:
    """One training; the module as it is at the end, and the best epoch, counted from 1."""
    import pytorch_lightning as lightning
    import torch
    from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint

    rules = config.training
    precision: Any = rules.precision  # Lightning names the values that it takes
    # Without a side to choose on there is nothing to keep apart.
    until = Side.TRAIN if validation is not None else Side.VALID
    events = training_events(
        dataset,
        skips=rules.skip_weight > 0,
        until=until,
        since=None if rules.since is None else duration(rules.since),
    )
    standardise(model, events, config.seed)
    if not isinstance(rules.id_init, RandomInit):
        initialise(model, events.timeline, rules.id_init, config.seed)
    module = TwoTowerModule(model, rules, audits=folder.parent / "audit")
    if epochs == 0:
        return module.eval(), 0
    user_negatives, file = None, rules.negatives.file
    if file is not None:
        user_negatives, counts = read_negatives(file, dataset, until)
        kept = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        say(f"negatives of {file}: {kept}")
    data = InteractionData(
        events,
        validation,
        rules,
        towers=config.towers,
        statistics=model.uses_statistics,
        seed=config.seed,
        user_negatives=user_negatives,
    )
    watched = f"val/{rules.monitor}"
    callbacks: list[Callback] = [EpochLines(say)]
    if rules.average:
        callbacks.insert(0, Average(rules))
    if validation is not None:
        best = ModelCheckpoint(
            folder, filename="best", monitor=watched, mode="max", enable_version_counter=False
        )
        callbacks += [best, EarlyStopping(watched, patience=rules.patience, mode="max")]
    # A checkpoint that watches a metric is written only when it rose; resuming needs every epoch.
    # After the other one: it has to say which epoch was the best until now, this one included.
    callbacks.append(ModelCheckpoint(folder, filename="last", enable_version_counter=False))
    with torch.random.fork_rng(devices=[]), _without_chatter():
        torch.manual_seed(config.seed)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator=rules.accelerator,
            devices=1,
            precision=precision,
            logger=logger,
            callbacks=callbacks,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, min(20, len(data.batches))),  # a short run has a curve too
            default_root_dir=folder,
        )
        last = folder / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return module.cpu().eval(), epochs if validation is None else best_epoch(folder)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Lightning advertises products and warns of its own internals; errors still come through."""
    chatter = logging.getLogger("pytorch_lightning")
    level = chatter.level
    chatter.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*LeafSpec.*",
                ".*across ranks is zero.*",
                ".*exists and is not empty.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        chatter.setLevel(level)


def best_epoch(folder: Path) -> int:
    """How many epochs the best checkpoint in a folder has seen."""
    import torch

    return torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["epoch"] + 1


def train(config: str | Path | RunConfig, *, resume: Path | None = None) -> TrainResult:
    """Train, bundle, judge and record.

    Args:
        config: the run, or its TOML file.
        resume: folder of a run that was stopped; it goes on from its last checkpoint.

    Raises:
        ConfigError: the run to be resumed was another one.
    """
    began = time.perf_counter()
    config = read_config(config)
    previous = None
    if resume is not None:
        _check_same(config, resume)
        previous = Spool.open(resume).record["run_id"]
    dataset = prepare(config)
    if config.training.negatives.file is not None:
        read_negatives(
            config.training.negatives.file, dataset
        )  # if it cannot be read, there is no run
    run = resume or _new_folder(config)
    with Tracker(
        config.track,
        run,
        run_name=config.name,
        params=config.model_dump(mode="json", exclude={"track", "out"}),
        tags={"prepared": dataset.manifest["input"]["digest"]},
        out=config.out,
        run_id=previous,
    ) as tracker:
        (run / "run.toml").write_text(dump(absolute(config)), encoding="utf-8")
        tracker.log_file(run / "run.toml")
        tracker.log_dict(dataset.manifest, "data.json")
        towers = Untrained(config, dataset)
        module = fit(
            config, dataset, towers.make, remake=towers.remake,
            folder=run, logger=lightning_logger(tracker), resume=resume is not None,
        )  # fmt: skip
        say(f"trained in {time.perf_counter() - began:.0f} s")
        path = make_bundle(config, dataset, module.model, towers.encoder, run / "bundle")
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


def _check_same(config: RunConfig, folder: Path) -> None:
    """A run can only go on as what it was: its checkpoint fits no other data or towers.

    Raises:
        ConfigError: a key that decides what is learned has another value now.
    """
    if not (folder / "run.toml").is_file():
        raise ConfigError(f"{folder} holds no run: it has no run.toml. Name a run's folder.")
    free = {"name", "out", "index", "evaluate", "track"}
    then, now = (
        flatten(absolute(one).model_dump(mode="json", exclude=free))
        for one in (load(folder / "run.toml"), config)
    )
    may_differ = {"training.epochs", "training.patience"}
    absent = object()
    other = [
        key
        for key in sorted(then.keys() | now.keys())
        if key not in may_differ and then.get(key, absent) != now.get(key, absent)
    ]
    for key in other:
        if any(deeper.startswith(f"{key}.") for deeper in other):
            continue  # a table came or went, and what stands in it says more
        was, is_now = (repr(flat[key]) if key in flat else "not set" for flat in (then, now))
        raise ConfigError(
            f"{folder} was started with {key} = {was}, and now it is {is_now}. "
            f"Go on with {folder}/run.toml, or start a new run."
        )


def record_scorecard(tracker: Tracker, scorecard: dict[str, Any], bundle: Path) -> None:
    """The scorecard as metrics, JSON and pictures, and the bundle as artifact and model version."""
    from recsys.experiments.evaluation.pictures import draw, training_curves

    tracker.log_dict(scorecard, "scorecard.json")
    numbers = {
        f"test/{name}": metric["value"]
        for name, metric in scorecard["model"].items()
        if metric["value"] is not None
    }
    tracker.log_metrics(numbers)
    pictures = tracker.folder / "pictures"
    learned = [
        {"step": point["step"], **{n: v for n, v in point["metrics"].items() if "/" in n}}
        for point in Spool.open(tracker.folder).points()
        if not any(name.startswith("test/") for name in point["metrics"])
    ]
    curves = training_curves(learned, pictures / "training.png")
    if curves is not None:
        tracker.log_file(curves, "pictures")
    for picture in draw(scorecard, pictures):
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
