"""Rows a second and peak memory of `recsys prepare`, beside raw Polars on the same columns.

    python -m recsys.experiments.benchmarks.prepare --rows 10000000 --repeats 3

The log is simulated: users drawn evenly, items by Zipf's law, times in order. Raw Polars reads,
encodes user, item and event as Enum, sorts by user and time and writes Parquet: no split, no
vocabularies of the training side, no digests, no sync to disk. Each run is a process of its own, in
turn, so that both meet the same noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

DAYS = 90


def simulate(rows: int, users: int, items: int, path: Path, seed: int = 0) -> None:
    """Write a log of `rows` events with string ids."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, items + 1)
    item = np.searchsorted(np.cumsum(chance / chance.sum()), rng.random(rows)).clip(0, items - 1)
    times = 1_700_000_000_000_000 + np.sort(rng.integers(0, DAYS * 86_400_000_000, rows))

    def names(word: str, count: int) -> pl.Series:
        scattered = (np.arange(count, dtype=np.uint64) * 2654435761) % 2**32
        return pl.Series([f"{word}-{number:010d}" for number in scattered.tolist()])

    pl.DataFrame(
        {
            "user": names("user", users).gather(rng.integers(0, users, rows)),
            "item": names("item", items).gather(item),
            "time": pl.Series(times).cast(pl.Datetime("us")),
            "event": pl.Series(["click", "buy"]).gather((rng.random(rows) < 0.05).astype(int)),
        }
    ).write_parquet(path)


def raw(log: Path, out: Path) -> None:
    """What Polars alone needs for encode, sort and write."""
    import polars as pl

    frame = pl.scan_parquet(log).select("user", "item", "time", "event").collect()
    ids = [pl.Enum(frame[name].unique().sort()) for name in ("user", "item", "event")]
    codes = [
        pl.col(name).cast(kind).to_physical()
        for name, kind in zip(("user", "item", "event"), ids, strict=True)
    ]
    frame = frame.with_columns(codes).sort("user", "time")
    out.mkdir()
    frame.write_parquet(out / "events.parquet")


def ours(log: Path, out: Path) -> None:
    """Read the log as the command does, and prepare it."""
    from recsys.features.prepared.prepare import prepare
    from recsys.features.prepared.skips import SkipRules
    from recsys.features.readers.read import DataSource, read
    from recsys.split import SplitRules
    from recsys.tables import Schema

    meaning = Schema(event="event", positive={"click": 1.0, "buy": 3.0})
    source = DataSource(log=str(log), columns=meaning)
    prepare(read(source), SplitRules(), SkipRules(), out)


def opening(out: Path) -> float:
    """Seconds to open a prepared dataset."""
    from recsys.features.prepared.dataset import Dataset

    start = time.perf_counter()
    Dataset.open(out)
    return time.perf_counter() - start


def peak() -> float:
    """GiB that this process held at most; of this process alone, where the system says so."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(kind: str, log: Path, out: Path) -> dict[str, float]:
    """Run one side in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", __spec__.name, "--only", kind, str(log), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def child(kind: str, log: Path, out: Path) -> dict[str, float]:
    """What a process of `measure` does."""
    import polars  # noqa: F401  (its import is not what is measured)

    start = time.perf_counter()
    {"raw": raw, "prepare": ours}[kind](log, out)
    result = {"seconds": time.perf_counter() - start, "peak_gib": peak()}
    if kind == "prepare":
        result["open_seconds"] = opening(out)
    return result


def run(rows: int, users: int, items: int, repeats: int) -> dict[str, Any]:
    """Measure both, in turn, and compare their medians."""
    with tempfile.TemporaryDirectory(prefix="recsys-prepare-") as folder:
        log = Path(folder) / "log.parquet"
        make = [sys.executable, "-m", __spec__.name, "--make", str(log)]
        make += ["--rows", str(rows), "--users", str(users), "--items", str(items)]
        subprocess.run(make, check=True)
        runs: dict[str, list[dict[str, float]]] = {"raw": [], "prepare": []}
        for _ in range(repeats):
            for kind, results in runs.items():
                results.append(measure(kind, log, Path(folder) / kind))
    pace = {kind: rows / median(r["seconds"] for r in results) for kind, results in runs.items()}
    return {
        "rows": rows,
        "rows_a_second": {kind: round(value) for kind, value in pace.items()},
        "ratio": round(pace["prepare"] / pace["raw"], 3),
        "peak_gib": {kind: round(max(r["peak_gib"] for r in rs), 2) for kind, rs in runs.items()},
        "open_seconds": round(median(r["open_seconds"] for r in runs["prepare"]), 4),
        "runs": runs,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':12}{'rows a second':>15}{'peak GiB':>10}"]
    for kind, pace in result["rows_a_second"].items():
        lines.append(f"{kind:12}{pace:>15,}{result['peak_gib'][kind]:>10.2f}")
    lines.append(f"prepare / raw {result['ratio']:.2f} (at least 0.40; peak at most 3 GiB)")
    lines.append(f"opening the result {result['open_seconds'] * 1000:.0f} ms (at most 100 ms)")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line; see the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m recsys.experiments.benchmarks.prepare")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        simulate(asked.rows, asked.users, asked.items, asked.make)
    elif asked.only:
        kind, log, out = asked.only
        sys.stdout.write(json.dumps(child(kind, Path(log), Path(out))))
    else:
        result = run(asked.rows, asked.users, asked.items, asked.repeats)
        if not asked.json:
            sys.stderr.write(table(result))
        sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
