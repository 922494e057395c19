"""Models for tests that swap them: copies of one bundle under other ids, published by a pointer.

Fixtures are taken in by `from swapping import host as host`, with those that they need.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.files import atomic_write
from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.serving.engine.query import Answers, Query
from recsys.serving.index import GraphRules
from recsys.serving.live.updates import LiveUpdates
from recsys.serving.manifest import read_manifest
from recsys.serving.models.manager import FolderSource, ModelManager
from recsys.vocab import Vocab

NAMES = ["a", "b", "c"]


def renamed(
    source: Path, path: Path, prefix: str, change: Callable[[Bundle], Bundle] = lambda b: b
) -> Path:
    """A bundle like `source` whose item ids all begin with `prefix`."""
    bundle = bundles.load(source)
    ids = prefix + bundle.items.ids
    catalog = bundle.catalog.with_columns(item=pl.lit(prefix) + pl.col("item"))
    bundle = change(replace(bundle, items=Vocab(ids), catalog=catalog))
    rules = GraphRules(**bundle.manifest["index"]["rules"])
    return bundles.save(bundle, path, rules=rules, encoder=bundle.encoder, recall_k=10)


def point(root: Path, name: str) -> None:
    """Let CURRENT name a version."""
    with atomic_write(root / "CURRENT") as temporary:
        temporary.write_text(f"versions/{name}\n")


def golden_fails(root: Path) -> None:
    entry = {"ask": {"kind": "recommend", "user": "nobody"}, "must_include": ["a-i00"]}
    (root / "versions" / "b" / "golden.json").write_text(json.dumps([entry]))
    point(root, "b")


def pointer_to_nothing(root: Path) -> None:
    point(root, "none")


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def models(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of versions a, b and c of the same model, whose items are called a-…, b-…, c-…."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        renamed(plain.bundle, root / "versions" / name, f"{name}-")
    return root


@pytest.fixture
def root(models: Path, tmp_path: Path) -> Path:
    """The same, for one test to spoil; a serves."""
    shutil.copytree(models / "versions", tmp_path / "models" / "versions")
    point(tmp_path / "models", "a")
    return tmp_path / "models"


def version(root: Path, name: str) -> str:
    return str(read_manifest(root / "versions" / name)["content"])[:12]


@pytest.fixture
def host(root: Path) -> Iterator[Callable[..., ModelManager]]:
    made: list[ModelManager] = []

    def make(source: Any = None, **more: Any) -> ModelManager:
        sources = more.pop("sources", None) or {"main": source or FolderSource(root)}
        more.setdefault("every", 0.05)
        one = ModelManager(sources, more.pop("updates", None) or LiveUpdates(None), **more)
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        one.stop()


def serving(host: ModelManager) -> str:
    return host.choose(None)[1].model.version


class Heard(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, said: Mapping[str, Any]) -> None:
        self.append((event, dict(said)))

    def names(self) -> list[str]:
        return [event for event, _ in self]


@dataclass
class UserInputs:
    """Threads that ask all the time, and hold that all ids of an answer are of one model.

    Args:
        host: is asked.
        prefix: version → what its item ids begin with.
        ids: what items are called without the prefix.
        living: whether an id with `live-` may be in any answer.
    """

    host: ModelManager
    prefix: dict[str, str]
    ids: list[str]
    updates: bool = False
    threads: int = 4
    faults: list[str] = field(default_factory=list)
    took: list[tuple[float, float, str]] = field(default_factory=list)  # when, seconds, version
    _stop: threading.Event = field(default_factory=threading.Event)
    _running: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> UserInputs:
        for number in range(self.threads):
            thread = threading.Thread(target=self._ask, args=(number,))
            self._running.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._running:
            thread.join()

    def _ask(self, number: int) -> None:
        random = np.random.default_rng(number)
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                version = self._once(str(random.choice(self.ids)), int(random.integers(4)))
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")
                continue
            self.took.append((begin, time.monotonic() - begin, version))

    def _once(self, id: str, kind: int) -> str:
        _, engine = self.host.choose(None)
        version = engine.model.version
        prefix = self.prefix[version]
        item = prefix + id
        if kind == 0:
            asks = [Query("similar", items=(item,), k=5), Query("recommend", history=(item,), k=5)]
        elif kind == 1:
            asks = [Query("similar", items=(item,), k=5, exact=True)]
        elif kind == 2:
            asks = [Query("recommend", user="nobody", k=5)]
        else:
            asks = []
            quick = engine.from_table(item, 5)
            if quick is not None:
                self._held(prefix, quick.ids)
        for answer in engine.answer(asks) if asks else []:
            if not isinstance(answer, Answers):
                raise AssertionError(f"refused: {answer}")
            self._held(prefix, answer.ids)
        return version

    def _held(self, prefix: str, ids: list[str]) -> None:
        if not ids:
            raise AssertionError("an empty answer")
        for id in ids:
            if not (id.startswith(prefix) or (self.updates and id.startswith("live-"))):
                raise AssertionError(f"{id} in an answer of the model with {prefix}")
