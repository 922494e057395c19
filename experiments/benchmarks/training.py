"""Training beside a bare hand-written loop: examples a second, the cost of batches, peak memory.

    python -m recsys.experiments.benchmarks.training [--logs large,small] [--json FILE]

Two simulated logs: `large` (2M events, 200k users, 100k items) and `small` (300k events, 50k users,
20k items, as MicroLens), each without and with text vectors. Both sides train the same towers with
the same batches and the same optimiser, in turn, and the medians count:

`bare`: tensors of all batches made beforehand, then embed, encode, cross-entropy over the batch's
    items, backward, step. No Lightning, masks, corrections, clipping, schedule or logging.
`ours`: `TwoTowerModule` and `InteractionData` in a Lightning Trainer, logging to a run of the
    embedded MLflow store, batches made as it goes.

Peak memory is that of a process of its own that does only what `ours` does. On a machine shared
with others, ask for one thread (OMP_NUM_THREADS=1) and for processor time (--cpu) rather than time
on the wall, or at least for threads that sleep while they wait (OMP_WAIT_POLICY=PASSIVE): threads
that spin for a core which somebody else has make a step ten times as long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.experiments.benchmarks.prepare import peak

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from recsys.features.batching.batch import Batch
    from recsys.features.batching.batches import Batches, TrainingEvents
    from recsys.towers.rules import TrainingRules
    from recsys.towers.training import TwoTowerModule

TEXT = 128
"""Dimensions of the text vectors."""
Clock = Callable[[], float]
WARM = 5
"""Steps before the clock starts: the optimiser makes its state in the first."""
AT_LEAST, BATCH_SHARE, ROOM = 0.85, 0.10, 1.0
"""What is asked for: ratio to the bare loop, batches' share of a step, GiB beside the tables."""


@dataclass(frozen=True)
class Case:
    """A simulated log and what is trained on it."""

    rows: int
    users: int
    items: int
    text: bool = False
    skew: float = 0.9
    batch_size: int = 1024
    dimension: int = 64
    max_history: int = 50


LOGS = {
    "large": Case(2_000_000, 200_000, 100_000),
    "small": Case(300_000, 50_000, 20_000),
}


def log_of(case: Case) -> TrainingEvents:
    """The simulated log as training events."""
    import polars as pl

    from recsys.experiments.shop.simulate import simulate_events
    from recsys.features.batching.batches import TrainingEvents
    from recsys.features.prepared.timeline import Timeline

    frame = simulate_events(case.rows, users=case.users, items=case.items, skew=case.skew)
    number = pl.all().str.slice(1).cast(pl.Int32)  # "u0000042"
    codes = frame.select("user", "item").select(number + 1)
    timeline = Timeline.build(
        codes["user"].to_numpy(),
        codes["item"].to_numpy(),
        frame["time"].to_physical().to_numpy(),
        n_users=case.users + 2,
        first_seen=np.zeros(case.items + 2, np.int64),
    )
    return TrainingEvents(timeline, None, None, None, None, np.arange(1, case.items + 2))


def module_of(case: Case, rules: TrainingRules) -> TwoTowerModule:
    """Towers of the default shape, with random text vectors where asked for."""
    import torch

    from recsys.towers.embedding import FeatureTable
    from recsys.towers.rules import AttentionHistory, TowerRules
    from recsys.towers.training import TwoTowerModule
    from recsys.towers.two_tower import TwoTower

    torch.manual_seed(0)
    text = None
    if case.text:
        text = torch.nn.functional.normalize(torch.randn(case.items + 2, TEXT))
    items, users = FeatureTable(case.items + 2, text=text), FeatureTable(case.users + 2)
    shape = TowerRules(dimension=case.dimension, history=AttentionHistory(length=case.max_history))
    towers = TwoTower(shape, items, users, items.spec(case.items + 2, {}), users.spec(0, {}))
    return TwoTowerModule(towers, rules)


def bare(module: TwoTowerModule, batches: list[Batch], now: Clock) -> float:
    """Seconds a step of the loop that one would write by hand."""
    import torch
    from torch.nn import functional as F

    from recsys.towers.optimizer import RowAdam

    model, temperature = module.model.train(), module.rules.temperature
    dense = [p for name, p in model.named_parameters() if "inputs.ids" not in name]
    groups: list[dict[str, Any]] = [
        {"params": [model.item_tower.inputs.ids.weight]},
        {"params": dense},
    ]
    optimizer = RowAdam(groups, lr=module.rules.learning_rate)
    start = 0.0
    for step, batch in enumerate(batches):
        if step == WARM:
            start = now()
        embedded = model.embed_items(batch.rows)
        users = model.encode_users(batch.user, embedded)
        items = model.item_tower(embedded[: batch.n_candidates])
        loss = F.cross_entropy(users @ items.T / temperature, batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = now() - start
    if not torch.isfinite(loss):
        raise RuntimeError("The bare loop diverged.")
    return seconds / (len(batches) - WARM)


class Clocked:
    """Batches that remember how long each took to make."""

    def __init__(self, batches: Batches, now: Clock) -> None:
        self.batches, self.now = batches, now
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self.batches)
        while True:
            start = self.now()
            batch = next(iterator, None)
            self.seconds.append(self.now() - start)
            if batch is None:
                return
            yield batch


def ours(
    module: TwoTowerModule,
    events: TrainingEvents,
    case: Case,
    steps: int,
    logger: Logger | bool,
    now: Clock = time.perf_counter,
) -> tuple[float, float]:
    """Seconds a step of the Trainer, and the share of them in which batches are made."""
    import pytorch_lightning as lightning

    from recsys.towers.data import InteractionData

    data = InteractionData(
        events, None, module.rules, towers=module.model.rules, statistics=False, seed=0
    )
    batches = Clocked(data.train_dataloader(), now)
    data.train_dataloader = lambda: batches  # type: ignore[method-assign, assignment, return-value]

    class Watch(lightning.Callback):
        start = end = 0.0

        def on_train_batch_end(self, *args: Any) -> None:
            self.end = now()
            if args[-1] == WARM - 1:
                self.start = self.end

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = lightning.Trainer(
            max_epochs=1, limit_train_batches=steps, accelerator="cpu", devices=1, logger=logger,
            callbacks=[watch], enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, num_sanity_val_steps=0, log_every_n_steps=20,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
    seconds = watch.end - watch.start
    return seconds / (steps - WARM), sum(batches.seconds[WARM:steps]) / seconds


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on the hardware and on loaders."""
    import logging

    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


NAMES = ("pytorch_lightning", "lightning.pytorch")


@contextmanager
def run_logger() -> Iterator[Logger]:
    """A logger as `recsys train` has it, to a store that is thrown away."""
    from recsys.experiments.tracking.track import Tracker, TrackRules, lightning_logger

    with (
        tempfile.TemporaryDirectory(prefix="recsys-training-") as folder,
        Tracker(TrackRules(), Path(folder) / "run", run_name="benchmark", out=folder) as tracker,
    ):
        yield lightning_logger(tracker)


def compare(case: Case, steps: int, repeats: int, now: Clock) -> dict[str, Any]:
    """Both sides in turn on one log."""
    from recsys.features.batching.batches import Batches
    from recsys.towers.rules import TrainingRules

    rules = TrainingRules(batch_size=case.batch_size)
    events = log_of(case)
    modules = module_of(case, rules), module_of(case, rules)
    made = list(
        islice(Batches(events, batch_size=case.batch_size, max_history=case.max_history), steps)
    )
    runs: dict[str, list[float]] = {"bare": [], "ours": [], "batches": []}
    with run_logger() as logger:
        for _ in range(repeats):
            runs["bare"].append(bare(modules[0], made, now))
            seconds, share = ours(modules[1], events, case, steps, logger, now)
            runs["ours"].append(seconds)
            runs["batches"].append(share)
    pace = {side: case.batch_size / median(runs[side]) for side in ("bare", "ours")}
    return {
        "examples_a_second": {side: round(value) for side, value in pace.items()},
        "ratio": round(pace["ours"] / pace["bare"], 3),
        "batch_share": round(median(runs["batches"]), 4),
        "runs": runs,
    }


def memory(case: Case, events: TrainingEvents, steps: int) -> dict[str, float]:
    """GiB that a process that only trains held at most, and what its tables and optimiser take."""
    timeline = events.timeline
    with tempfile.TemporaryDirectory(prefix="recsys-training-") as folder:
        for name in ("user_offsets", "item", "time", "first_seen"):
            np.save(Path(folder) / f"{name}.npy", getattr(timeline, name))
        command = [sys.executable, "-m", __spec__.name, "--only", folder]
        command += ["--case", json.dumps(asdict(case)), "--steps", str(steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def child(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """What the process of `memory` does."""
    from recsys.features.batching.batches import TrainingEvents
    from recsys.features.prepared.timeline import Timeline
    from recsys.towers.rules import TrainingRules

    def mapped(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    seen = np.array(mapped("first_seen"))
    timeline = Timeline(
        np.array(mapped("user_offsets")), mapped("item"), mapped("time"), seen, seen, None, True
    )
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, len(seen)))
    module = module_of(case, TrainingRules(batch_size=case.batch_size))
    with run_logger() as logger:
        ours(module, events, case, steps, logger)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    features = sum(b.numel() * b.element_size() for b in module.model.items.buffers())
    # Two moments of every weight.
    return {"peak_gib": peak(), "tables_gib": (3 * weights + features) / 2**30}


def table(results: list[dict[str, Any]]) -> str:
    """The results for people."""
    lines = [
        f"{'log':7}{'text':>5}{'bare ex/s':>11}{'ours ex/s':>11}{'ratio':>7}{'batches':>9}"
        f"{'peak GiB':>10}{'beside tables':>15}"
    ]
    for r in results:
        pace = r["examples_a_second"]
        lines.append(
            f"{r['log']:7}{'yes' if r['text'] else 'no':>5}{pace['bare']:>11,}{pace['ours']:>11,}"
            f"{r['ratio']:>7.2f}{r['batch_share']:>9.1%}{r['peak_gib']:>10.2f}{r['beside_gib']:>15.2f}"
        )
    lines.append(
        f"wanted: ratio at least {AT_LEAST}, batches at most {BATCH_SHARE:.0%} of a step, "
        f"at most {ROOM:.0f} GiB beside tables and optimiser state"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line; see the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m recsys.experiments.benchmarks.training")
    parser.add_argument("--logs", default="large,small")
    parser.add_argument("--text", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--steps", type=int, default=45, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="processor time, with one thread")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(child(Case(**asked.case), asked.only, asked.steps)))
        return
    now = time.process_time if asked.cpu else time.perf_counter
    results = []
    for name in asked.logs.split(","):
        for text in {"both": (False, True), "yes": (True,), "no": (False,)}[asked.text]:
            case = replace(LOGS[name], text=text)
            result = {"log": name, **asdict(case)}
            result |= compare(case, asked.steps, asked.repeats, now)
            used = memory(case, log_of(case), 2 * asked.steps) if not asked.skip_memory else {}
            result |= used or {"peak_gib": float("nan"), "tables_gib": float("nan")}
            result["beside_gib"] = result["peak_gib"] - result["tables_gib"]
            results.append(result)
    print(table(results), end="")
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
