"""The service under load, beside servers that do nothing and the index called in a loop.

    python -m recsys.experiments.benchmarks.serve BUNDLE [BUNDLE …] [--seconds 5] [--rounds 3]
        [--connections 1 32 256] [--json FILE]

Each BUNDLE is served by `recsys serve` (one process) and asked over loopback by `wrk` (Debian:
apt-get install wrk) from another process, with ids drawn uniformly at random; nothing is cached.
Rounds alternate between the servers, and medians are written.
`recsys.experiments.benchmarks.synthetic` makes bundles of any size.

- similar: GET /v1/items/ID/similar?k=10, beside a Starlette and a FastAPI route that answer a body
  of the same size without looking at anything;
- recommend: POST /v1/recommendations with a history of 20 items, beside the user tower and the raw
  graph called in a loop in this process, one query after the other;
- latency: POST /v1/vectors at one connection, less the raw call of the index on the same vectors;
- start: from the command to the first /v1/ready, the first time (files perhaps not in memory) and
  the median of those after it; and resident memory after the load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HISTORY, K, DRAWN = 20, 10, 4096
UNIT = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}

SIMILAR = """
math.randomseed(os.time() * 1000 + {seed})
request = function()
  local item = string.format("i%07d", math.random(0, {items} - 1))
  return wrk.format("GET", "/v1/items/" .. item .. "/similar?k={k}")
end
"""
POSTED = """
math.randomseed(os.time() * 1000 + {seed})
local bodies = {{}}
for line in io.lines("{file}") do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function() return wrk.format(nil, "{path}", nil, bodies[math.random(#bodies)]) end
"""
BAD = """
done = function(summary, latency, requests)
  io.write(string.format("bad %d\\n", summary.errors.status + summary.errors.connect
    + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


def wrk(url: str, script: Path, connections: int, seconds: float) -> dict[str, float]:
    """One load: requests a second, p50 and p99 in milliseconds, requests that failed."""
    command = [
        "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(script), url,
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        "rps": float(_one(r"Requests/sec:\s+([\d.]+)", said)[0]),
        "bad": float(_one(r"bad (\d+)", said)[0]),
    }
    for percent in (50, 99):
        value, unit = _one(rf"\s{percent}%\s+([\d.]+)(us|ms|s|m)", said)
        found[f"p{percent}_ms"] = float(value) * UNIT[unit]
    return found


def _one(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"wrk said nothing like {pattern!r}:\n{text}")
    return found.groups()


@contextmanager
def server(command: list[str], port: int, ready: str) -> Iterator[dict[str, float]]:
    """A server process; gives the seconds from its start until `ready` answered 200."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)])
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)
        yield {"pid": process.pid, "start_s": time.perf_counter() - began}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def memory(pid: int) -> dict[str, float]:
    """Resident MiB of a process: all, and what is not backed by a file."""
    said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {key: int(_one(rf"{key}:\s+(\d+) kB", said)[0]) for key in ("Rss", "Anonymous")}
    return {"rss_mib": kib["Rss"] / 1024, "anonymous_mib": kib["Anonymous"] / 1024}


def questions(bundle: Path, folder: Path) -> tuple[int, Any, Any, Any]:
    """Items of the bundle; histories and vectors to ask with, as files of bodies and as arrays."""
    import numpy as np

    from recsys.serving.engine.loaded_model import LoadedModel

    served = LoadedModel.load(bundle)
    rng = np.random.default_rng(0)
    count = len(served.bundle.rows)
    history = served.bundle.rows[rng.integers(0, count, (DRAWN, HISTORY))]
    vectors = served.bundle.vectors[served.bundle.rows[rng.integers(0, count, DRAWN)]]
    vectors = vectors + 0.05 * rng.standard_normal(vectors.shape).astype(np.float32)
    ids = np.asarray(served.bundle.items.decode(history.ravel()).to_list()).reshape(DRAWN, HISTORY)
    with open(folder / "histories", "w") as file:
        file.writelines(json.dumps({"history": own.tolist(), "k": K}) + "\n" for own in ids)
    with open(folder / "vectors", "w") as file:
        file.writelines(
            json.dumps({"vector": [float(f"{x:.6g}") for x in own], "k": K}) + "\n"
            for own in vectors[:512].tolist()
        )
    return count, served, history, np.ascontiguousarray(vectors, np.float32)


def in_a_loop(served: Any, history: Any, vectors: Any, seconds: float) -> dict[str, float]:
    """The user tower and the raw index in this process, one query after the other."""
    import numpy as np
    import torch

    from recsys.features.batching.batch import Queries
    from recsys.ragged import Ragged
    from recsys.serving.index import HnswIndex
    from recsys.towers.encode import encode_users

    torch.set_num_threads(1)
    bundle = served.bundle
    index = bundle.index
    ef = max(index.rules.ef, 2 * K) if isinstance(index, HnswIndex) else 0

    def nearest(vector: np.ndarray) -> None:
        if isinstance(index, HnswIndex):
            index._graph.knn_query(vector, ef, 1)
        else:
            index.search(vector, K)

    def recommend(own: np.ndarray) -> None:
        asked = Queries(np.zeros(1, np.int64), Ragged(np.array([0, HISTORY]), own))
        nearest(encode_users(bundle.model, asked, bundle.timeline, bundle.cutoff))

    found = {}
    for name, call, given in (
        ("recommend_rps", recommend, history.astype(np.int64)),
        ("index_rps", nearest, vectors[:, None]),
    ):
        spent, done = [], 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            call(given[done % len(given)])
            spent.append(time.perf_counter() - began)
            done += 1
        found[name] = 1 / statistics.mean(spent)
        found[name.replace("rps", "p50_ms")] = 1e3 * statistics.median(spent)
    return found


def measure(bundle: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """All loads on one bundle, medians over the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items, served, history, vectors = questions(bundle, folder)
        scripts = {"similar": SIMILAR.format(seed=items, k=K, items=items)}
        for name, path in (("histories", "/v1/recommendations"), ("vectors", "/v1/vectors")):
            scripts[name] = POSTED.format(seed=items, file=folder / name, path=path)
        for name, text in scripts.items():
            (folder / f"{name}.lua").write_text(text + BAD)
        loops = [in_a_loop(served, history, vectors, asked.seconds) for _ in range(asked.rounds)]
        del served
        ports = {"recsys": 8231, "starlette": 8232, "handwritten": 8233}
        serve = ["recsys", "serve", str(bundle)]
        starts = []
        for _ in range(1 + asked.rounds):
            with server(serve, ports["recsys"], "/v1/ready") as process:
                starts.append(process["start_s"])
        with server(serve, ports["recsys"], "/v1/ready") as process:
            url = f"http://127.0.0.1:{ports['recsys']}"
            with urllib.request.urlopen(f"{url}/v1/items/i{0:07}/similar?k={K}") as answer:
                size = len(answer.read())
            noops = [
                ["recsys.experiments.benchmarks.noop", "starlette", "--bytes", str(size)],
                ["recsys.experiments.benchmarks.noop", "handwritten", "--bundle", str(bundle)],
            ]
            rows: dict[str, list[dict[str, float]]] = {}
            probe = f"/v1/items/i{0:07}/similar"
            with (
                server(noops[0], ports["starlette"], probe),
                server(noops[1], ports["handwritten"], probe),
            ):
                for connections in asked.connections:
                    for _ in range(asked.rounds):
                        for kind, port in ports.items():
                            there, script = f"http://127.0.0.1:{port}", folder / "similar.lua"
                            rows.setdefault(f"similar {kind} {connections}", []).append(
                                wrk(there, script, connections, asked.seconds)
                            )
                        for kind in ("histories", "vectors"):
                            rows.setdefault(f"{kind} recsys {connections}", []).append(
                                wrk(url, folder / f"{kind}.lua", connections, asked.seconds)
                            )
            used = memory(int(process["pid"]))
    middle = {name: _median(found) for name, found in rows.items()}
    loop = _median(loops)
    report = {
        "bundle": str(bundle), "items": items, "body_bytes": size, "loads": middle, "loop": loop,
        "first_start_s": starts[0], "start_s": statistics.median(starts[1:]), **used,
        "bytes_an_item": used["rss_mib"] * 2**20 / items,
        "ratios": {
            f"{what} at {c}": value
            for c in asked.connections
            for what, value in {
                "similar / starlette": middle[f"similar recsys {c}"]["rps"]
                / middle[f"similar starlette {c}"]["rps"],
                "similar / handwritten": middle[f"similar recsys {c}"]["rps"]
                / middle[f"similar handwritten {c}"]["rps"],
                "similar p99 / starlette": middle[f"similar recsys {c}"]["p99_ms"]
                / middle[f"similar starlette {c}"]["p99_ms"],
                "recommend / loop": middle[f"histories recsys {c}"]["rps"] / loop["recommend_rps"],
            }.items()
        },
    }  # fmt: skip
    if 1 in asked.connections:
        report["added_ms_at_1"] = middle["vectors recsys 1"]["p50_ms"] - loop["index_p50_ms"]
    return report


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in found), 4) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: apt-get install wrk")
    os.environ["OMP_NUM_THREADS"] = "1"
    reports = []
    for bundle in asked.bundles:
        reports.append(measure(bundle, asked))
        print(json.dumps(reports[-1], indent=1), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
