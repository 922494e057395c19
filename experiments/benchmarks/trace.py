"""Which files of the project one batch, one training step and one request enter, in order.

    python -m recsys.experiments.benchmarks.trace BUNDLE

A file counts when one of its functions is called; those of classes that only hold values count too.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("recsys", "features", "towers", "serving", "experiments")


class Trace:
    """Files in the order in which they are first entered, and how often the way moves on."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.moves = 0
        self._last = ""
        self._known: dict[str, str | None] = {}

    def clear(self) -> None:
        """Forget what was seen until now."""
        self.files.clear()
        self.moves, self._last = 0, ""

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """A profile function, see `sys.setprofile`."""
        if event != "call":
            return
        name = frame.f_code.co_filename
        if name not in self._known:
            path = Path(name).resolve()
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FLOORS
            self._known[name] = str(path.relative_to(ROOT)) if inside else None
        file = self._known[name]
        if file is None or file.startswith("experiments/benchmarks") or file == self._last:
            return
        self._last = file
        self.moves += 1
        if file not in self.files:
            self.files.append(file)


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace every thread while the block runs; threads that ran before are not seen."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def of_request(app: Any, method: str, target: str, body: bytes = b"") -> Trace:
    """One request to the service's ASGI application, answered once before to be warm."""

    async def once() -> int:
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": query.encode(), "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8100),
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                        (b"content-length", b"%d" % len(body))],
        }  # fmt: skip
        status = 0

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)

        await app(scope, receive, send)
        return status

    with traced() as trace:
        asyncio.run(once())  # what is made once, such as threads, is made here
        trace.clear()
        status = asyncio.run(once())
    assert status == 200, f"{method} {target} was answered {status}"
    return trace


def of_step(data: Any, module: Any) -> Trace:
    """One batch of the training events, its logits, loss and gradient."""
    batches = iter(data.batches)
    next(batches)
    with traced() as trace:
        users, items = module.encode(batch := next(batches))
        module.loss(module.logits(batch, users, items)).mean().backward()
    return trace


def app_of(path: Path) -> Any:
    """The service's ASGI application over one bundle, as `recsys serve` makes it."""
    from recsys.serving.api.app import make_app
    from recsys.serving.engine.engine import Engine
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.live.overlay import Overlay

    model = LoadedModel.load(path)
    engine = Engine(model, Overlay(model))
    models = SimpleNamespace(
        ready=True, choose=lambda unit, variant=None: ("main", engine), facts=list
    )
    return make_app(models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--item", default="i0000000")
    asked = parser.parse_args()
    app = app_of(asked.bundle)
    show("GET similar", of_request(app, "GET", f"/v1/items/{asked.item}/similar?k=10"))
    body = b'{"history": ["%b"], "k": 10}' % asked.item.encode()
    show("POST recommendations", of_request(app, "POST", "/v1/recommendations", body))
    app.close()


def show(name: str, trace: Trace) -> None:
    print(f"{name}: {len(trace.files)} files, {trace.moves} moves")
    for file in trace.files:
        print(f"  {file}")


if __name__ == "__main__":
    main()
