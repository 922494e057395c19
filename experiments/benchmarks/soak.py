"""The service under load while models are swapped and items written: nothing fails, nothing mixes.

    python -m recsys.experiments.benchmarks.soak BUNDLE_A BUNDLE_B [--seconds 60] [--every 2]
        [--clients 8] [--json FILE]

Two bundles of the same items, of `recsys.experiments.benchmarks.synthetic` with two seeds, are
published in turn every few seconds into one folder, which `recsys serve` watches. Clients ask for
similar items of random ids and compare each answer with the neighbours of the very model that it
names; one writer puts items, asks for each right after, and deletes every second one. First the
same load runs for a third of the time with nothing else going on: p99 is compared with that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from recsys.experiments.benchmarks.serve import server

K, PORT = 10, 8241


class Truth:
    """What each model answers for each item, from its table of neighbours."""

    def __init__(self, bundle: Path) -> None:
        from recsys.serving.engine.loaded_model import LoadedModel

        served = LoadedModel.load(bundle)
        assert served.neighbours is not None
        self.version = served.version
        self.items = served.bundle.items.decode(served.bundle.rows).to_list()
        self.rows = np.array(served.neighbours.rows[:, : 2 * K])

    def nearest(self, place: int) -> list[str]:
        return [self.items[row] for row in self.rows[place]]


class Load:
    """Clients that ask and compare until they are told to stop."""

    def __init__(self, truths: dict[str, Truth], clients: int, seed: int) -> None:
        self.truths, self.stop = truths, threading.Event()
        self.spent: list[list[float]] = [[] for _ in range(clients)]
        self.wrong: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.threads = [
            threading.Thread(target=self._ask, args=(n, seed + n)) for n in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, number: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        count = len(next(iter(self.truths.values())).items)
        connection = HTTPConnection("127.0.0.1", PORT, timeout=10)
        while not self.stop.is_set():
            place = int(rng.integers(count))
            began = time.perf_counter()
            try:
                connection.request("GET", f"/v1/items/i{place:07}/similar?k={K}")
                answer = connection.getresponse()
                body = answer.read()
            except OSError as error:
                self.wrong[f"{type(error).__name__}"] += 1
                connection.close()
                continue
            self.spent[number].append(time.perf_counter() - began)
            if answer.status != 200:
                self.wrong[f"status {answer.status}: {body[:80]!r}"] += 1
                continue
            self._compare(place, json.loads(body))

    def _compare(self, place: int, said: dict[str, Any]) -> None:
        self.versions[said["model"]] += 1
        truth = self.truths.get(said["model"])
        if truth is None:
            self.wrong["unknown model"] += 1
            return
        # What was put meanwhile may stand anywhere among them, and pushes the last ones out.
        own = [item["id"] for item in said["items"] if not item["id"].startswith("live")]
        if own != truth.nearest(place)[: len(own)] or len(said["items"]) != K:
            self.wrong["answers of another model"] += 1

    def milliseconds(self) -> dict[str, float]:
        spent = 1e3 * np.concatenate([np.array(own) for own in self.spent])
        return {
            "requests": len(spent),
            "p50_ms": round(float(np.quantile(spent, 0.5)), 3),
            "p99_ms": round(float(np.quantile(spent, 0.99)), 3),
            "max_ms": round(float(spent.max()), 1),
        }


def write(stop: threading.Event, wrong: Counter[str], done: Counter[str], rate: float) -> None:
    """Put items, ask for each, delete every second one."""
    connection = HTTPConnection("127.0.0.1", PORT, timeout=10)

    def call(method: str, path: str, body: bytes | None = None) -> int:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    number = 0
    while not stop.wait(1 / rate):
        path = f"/v1/items/live{number}"
        item = json.dumps({"title": f"live thing {number}", "price": 1.5}).encode()
        for method, body, wanted in (("PUT", item, (200, 201, 204)), ("GET", None, (200,))):
            try:
                status = call(method, path, body)
            except OSError as error:
                wrong[f"{method} {type(error).__name__}"] += 1
                connection.close()
                continue
            done[method] += 1
            if status not in wanted:
                wrong[f"{method} status {status}"] += 1
        if number % 2:
            status = call("DELETE", path)
            done["DELETE"] += 1
            if status not in (200, 204):
                wrong[f"DELETE status {status}"] += 1
        number += 1


def facts() -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/model", timeout=10) as answer:
        return json.loads(answer.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs=2, type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--writes", type=float, default=20, help="items put a second")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    from recsys.serving.models.publish import publish

    truths = {truth.version: truth for truth in map(Truth, asked.bundles)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "published"
        publish(asked.bundles[0], folder)
        command = ["recsys", "serve", str(folder), "--journal", f"{name}/journal", "--open-writes"]
        with server(command, PORT, "/v1/ready"):
            with Load(truths, asked.clients, 0) as calm:
                time.sleep(asked.seconds / 3)
            wrong: Counter[str] = Counter()
            done: Counter[str] = Counter()
            stop = threading.Event()
            writer = threading.Thread(target=write, args=(stop, wrong, done, asked.writes))
            published = 0
            with Load(truths, asked.clients, 100) as busy:
                writer.start()
                end = time.perf_counter() + asked.seconds
                while time.perf_counter() < end:
                    time.sleep(asked.every)
                    published += 1
                    publish(asked.bundles[published % 2], folder)
                stop.set()
                writer.join()
            report = {
                "calm": calm.milliseconds(),
                "busy": busy.milliseconds(),
                "p99_ratio": busy.milliseconds()["p99_ms"] / calm.milliseconds()["p99_ms"],
                "published": published,
                "answers_of_each_model": dict(busy.versions),
                "writes": dict(done),
                "wrong": {**calm.wrong, **busy.wrong, **wrong},
                "model": facts(),
            }
    print(json.dumps(report, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
