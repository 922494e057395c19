"""What the tests of the page share: a shop without towers behind the real service, and a browser.

The shop answers by simple rules, so that a test can say beforehand what the page must show.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import service_cases

from recsys.errors import QueryError
from recsys.serving.engine.query import Answers, CursorError, Filter, Query, UnknownItem

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
KINDS = ["lamp", "chair", "rug", "desk"]
EVIL = '<img src=x onerror="window.hacked=1">'
EVIL_ID = '"><b>x</b>/../?#&%'
NIGHT = 1_704_067_200_000_000


def _catalog() -> dict[str, dict[str, Any]]:
    items = {
        f"i{n:02}": {
            "title": f"Oak {KINDS[n % 4]} no {n}", "category": KINDS[n % 4],
            "price": 10.0 + n, "published": "2024-01-05T10:30:00", "in_stock": n % 3 != 0,
            "tags": ["wood", "new"] if n % 2 else ["wood"],
        }
        for n in range(40)
    }  # fmt: skip
    evil = {"title": EVIL, "category": "<script>window.hacked=2</script>", "price": 1.0}
    return {**items, EVIL_ID: evil}


class Shop:
    """An engine: items whose title holds a word, in the order of their ids; scores fall from 1."""

    def __init__(self, text: bool = True) -> None:
        self.items = _catalog()
        self.model = SimpleNamespace(version="0123456789ab")
        self.asks: list[Query] = []
        self.text = text
        self.slow = 0.0
        self.broken: Exception | None = None

    def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
        self.asks.extend(asks)
        if self.broken is not None:
            raise self.broken
        time.sleep(self.slow)
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Query) -> Answers | QueryError:
        ids = [id for id in self.items if self._fits(id, ask.filter)]
        fallback = None
        if ask.kind == "search":
            if not self.text:
                return QueryError("This bundle was trained without item text.")
            words = (ask.text or "").lower().split()
            ids = [i for i in ids if all(w in self.items[i]["title"].lower() for w in words)]
        elif ask.kind == "similar":
            kind = self.items.get(ask.items[0], {}).get("category")
            ids = [i for i in ids if i not in ask.items and self.items[i]["category"] == kind]
        elif ask.user == "nobody":
            fallback = "user 'nobody' is unknown"
        if ask.cursor == "gone":
            return CursorError("The cursor belongs to another version.", gone=True)
        start = int(ask.cursor or 0)
        page = ids[start : start + ask.k]
        more = start + ask.k < len(ids)
        scores = 1 - 0.01 * np.arange(start, start + len(page), dtype=np.float32)
        return Answers(
            page, scores,
            fields=[self.items[i] for i in page] if ask.fields else None,
            fallback=fallback,
            next=str(start + ask.k) if ask.paged and more else None,
            explanations=[self._why(ask)] * len(page) if ask.explain else None,
        )  # fmt: skip

    def _fits(self, id: str, filter: Filter) -> bool:
        item = self.items[id]
        for name, values in filter.equals.items():
            held = item.get(name)
            if not set(held if isinstance(held, list) else [held]) & set(values):
                return False
        for name, (least, most) in filter.ranges.items():
            held = item.get(name)
            if isinstance(held, str):
                held = datetime.fromisoformat(f"{held}+00:00").timestamp()
            if held is None or not (least or 0) <= held <= (np.inf if most is None else most):
                return False
        return True

    def _why(self, ask: Query) -> dict[str, Any]:
        why: dict[str, Any] = {
            "parts": {"id": 0.21, "text": 0.34, "category": 0.05, "price": -0.02}
        }
        if ask.kind == "recommend":
            why["history"] = [{"id": "i03", "pull": 0.4}, {"id": "i02", "pull": 0.1}]
        else:
            why["shared"] = {"category": self.items.get(ask.items[0], {}).get("category")}
        return why

    def from_table(self, id: str, k: int) -> None:
        return None

    def item(self, id: str) -> dict[str, Any]:
        if id not in self.items:
            raise UnknownItem(f"There is no item {id!r}.")
        return {"id": id, "fields": self.items[id]}

    def user(self, id: str) -> dict[str, Any]:
        history = [{"id": f"i{n:02}", "time": NIGHT + n * 3_600_000_000} for n in range(5)]
        known = id == "u1"
        events = [{"id": "i04", "time": history[4]["time"], "strength": 1.0}] if known else []
        return {"id": id, "known": known, "history": history if known else [], "events": events}

    def facts(self) -> dict[str, Any]:
        return {
            "version": self.model.version, "text": self.text, "dimension": 64, "score": "cosine",
            "recall": 0.998, "recall_k": 100, "index": "hnsw", "cutoff": NIGHT, "users": 2,
            "context": [], "neighbours": {"k": 100, "recall": 1.0}, "items": 41,
            "fields": {
                "title": "String", "category": "String", "price": "Float64",
                "published": "Datetime(time_unit='us', time_zone=None)", "in_stock": "Boolean",
                "tags": "List(String)",
            },
        }  # fmt: skip


class OneModel:
    """A host of one engine."""

    ready = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def choose(self, unit: str | None, variant: str | None = None) -> tuple[str, Any]:
        return "main", self.engine

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "main", "share": 1.0, "version": self.engine.model.version, "swaps": 2,
                "failures": 1, "last_error": "the digest of index.bin differs",
                "loaded_at": NIGHT / 1e6, "items": 41,
            }
        ]  # fmt: skip


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an ASGI application that runs in a thread."""
    with service_cases.served(app) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium on this machine (apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
