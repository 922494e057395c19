"""A service that is killed while it writes and publishes has, at its start, all it acknowledged."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from killed_service import Killed
from swapping import until

from recsys.serving.client import Client, ServiceError
from recsys.serving.manifest import check, read_manifest
from recsys.serving.models.publish import current, publish, versions

Item = dict[str, Any] | None


@dataclass
class Writer:
    """Puts and deletes its own items over HTTP, and remembers what was acknowledged.

    Args:
        ids: its items; nobody else writes them.
        random: what it does.
        sure: id → the item as it is for sure, None where it is deleted.
        open: id → what was asked when the answer did not come: that, or what was before.
    """

    ids: list[str]
    random: random.Random
    sure: dict[str, Item] = field(default_factory=dict)
    open: dict[str, Item] = field(default_factory=dict)
    acknowledged: int = 0

    def write(self, url: str, stop: threading.Event) -> None:
        """Write until the service is gone, or it stops for another reason."""
        with Client(url, retries=0, timeout=60) as shop:
            while not stop.is_set():
                id, item = self.random.choice(self.ids), None
                number = self.acknowledged
                if self.random.random() < 0.7:
                    item = {"title": f"{id}, the {number}th time", "score": float(number)}
                self.open[id] = item
                try:
                    if item is None:
                        shop.delete_item(id)
                    else:
                        shop.put_item(id, item)
                except ServiceError as error:
                    if error.code == "unreachable":  # killed
                        return
                    raise
                self.sure[id] = self.open.pop(id)
                self.acknowledged += 1

    def look(self, shop: Client, seen: Counter[str]) -> None:
        """Hold that everything acknowledged is there; learn what became of the rest."""
        for id in self.sure.keys() | self.open.keys():
            found = there(shop, id, seen)
            allowed = [one[id] for one in (self.sure, self.open) if id in one]
            if id not in self.sure:  # never acknowledged: as it was in the bundle, too
                self.sure[id] = found
            else:
                assert found in allowed, f"{id}: {found} is none of {allowed}"
                self.sure[id] = found
        self.open.clear()


def there(shop: Client, id: str, seen: Counter[str]) -> Item:
    """What the service says of an item; None: it is not found."""
    try:
        item = shop.item(id)
    except ServiceError as error:
        assert error.code == "unknown_item"
        seen["gone"] += 1
        return None
    seen["live" if item["live"] else "folded"] += 1
    return item["fields"]


def whole(folder: Path) -> str:
    """The version of the current bundle; raises unless it and all others that count are whole."""
    found = current(folder)
    listed = versions(folder)
    assert found in [version.path for version in listed]
    for version in listed:
        manifest = read_manifest(version.path)
        check(version.path, manifest)
        assert manifest["content"].startswith(version.name)
    return found.name


def killed(bundle: Path, work: Path, rounds: int, seed: int) -> Counter[str]:
    """Kill a service again and again; what was seen of items and bundles."""
    rng, folder, seen = random.Random(seed), work / "shop", Counter[str]()
    published = {publish(bundle, folder).name}
    ids = [*(f"i{n:02}" for n in range(8, 24)), *(f"new/{n}" for n in range(16))]
    writers = [Writer(ids[part::3], random.Random(seed + part)) for part in range(3)]
    with Killed(bundle, folder, work) as service:
        for turn in range(rounds):
            if turn % 5 == 4:  # once more, before anybody can be told anything
                service.start()
                time.sleep(rng.random() * 0.3)
                service.kill()
            service.start()
            url = service.url()
            with Client(url, timeout=60) as shop:
                for writer in writers:
                    writer.look(shop, seen)
            faults: list[BaseException] = []
            stop = threading.Event()

            def write(writer: Writer, url: str = url, stop: threading.Event = stop) -> None:
                try:
                    writer.write(url, stop)
                except BaseException as error:
                    faults.append(error)  # noqa: B023

            threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
            for thread in threads:
                thread.start()
            if turn == 0:  # however slow the machine is
                until(lambda: current(folder).name not in published, 60)
                until(lambda: all(writer.acknowledged for writer in writers), 60)
            time.sleep(rng.uniform(0.05, 0.8))
            service.kill()
            stop.set()
            for thread in threads:
                thread.join()
            assert not faults, faults
            published.add(whole(folder))
            seen["half"] += len(list((folder / "versions").glob(".half-*")))
        service.start()
        with Client(service.url(), timeout=60) as shop:
            for writer in writers:
                writer.look(shop, seen)
            assert there(shop, "i25", seen) == {"title": "Thing number 25", "score": 25.0}
    seen["acknowledged"] = sum(writer.acknowledged for writer in writers)
    seen["published"] = len(published)
    return seen


def test_killed_twice_while_writing_and_publishing(plain: Any, tmp_path: Path) -> None:
    seen = killed(plain.bundle, tmp_path, 2, seed=1)
    assert seen["acknowledged"] > 2 and seen["published"] > 1, seen


@pytest.mark.slow
def test_killed_fifty_times_while_writing_and_publishing(plain: Any, tmp_path: Path) -> None:
    seen = killed(plain.bundle, tmp_path, 50, seed=2)
    assert seen["acknowledged"] > 300 and seen["published"] > 10, seen
    # It was at work when it was killed, and what was published held what had been written.
    assert seen["half"] > 1, seen
    assert min(seen[what] for what in ("folded", "live", "gone")) > 5, seen
