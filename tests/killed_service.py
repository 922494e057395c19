"""A service that takes items and publishes bundles of them to itself, made to be killed.

Run as a program it imports everything once, and forks a service for every line that it reads: a
start costs a fraction of a second then. It says the service's process id, its address, and how it
ended. `Killed` is the test's side of it.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.serving.index import GraphRules
from recsys.serving.live.journal import FILE
from recsys.serving.live.new_items import encode_described
from recsys.serving.models.publish import publish
from recsys.towers.embedding import FeatureTable
from recsys.towers.encode import encode_items
from recsys.towers.two_tower import TwoTower
from recsys.vocab import Vocab

ROOT = Path(__file__).parents[1]
LIMITS = np.iinfo(np.int64)


def folded(bundle: Bundle, state: dict[str, dict[str, Any] | None]) -> Bundle:
    """The bundle with the journal's items in it: new rows, new fields, and none that was deleted.

    Args:
        bundle: whose towers read nothing of an item but its id and its text.
        state: id → item, or None where it was deleted.
    """
    assert [name for name, _ in bundle.model.items.named_buffers()] == ["text"]
    assert bundle.coder is not None and bundle.model.items.text is not None
    row = {id: at for at, id in enumerate(bundle.items.ids, 1)}
    puts = {id: item for id, item in sorted(state.items()) if item is not None}
    new = [id for id in puts if id not in row]
    row |= {id: at for at, id in enumerate(new, bundle.items.size)}
    size, old = bundle.items.size + len(new), bundle.model
    kept = bundle.model.items.text
    text = torch.zeros(size, kept.shape[1], dtype=kept.dtype)
    text[: bundle.items.size] = kept
    if puts:
        described = [bundle.coder.describe(item) for item in puts.values()]
        read = encode_described(bundle, described, np.zeros(len(puts), np.int64)).table.text
        assert read is not None
        text[[row[id] for id in puts]] = read[1:]
    table = FeatureTable(size, text=text)
    model = TwoTower(old.rules, table, old.users, old.item_spec, old.user_spec, old.context)
    model.load_state_dict(old.state_dict())

    def longer(values: np.ndarray, rest: Any) -> np.ndarray:
        return np.concatenate([values, np.full((len(new), *values.shape[1:]), rest, values.dtype)])

    past = bundle.timeline
    timeline = replace(
        past,
        first_seen=longer(past.first_seen, LIMITS.max),
        exists_from=longer(past.exists_from, LIMITS.min),
    )
    window = longer(bundle.window, 0)
    said = {one["item"]: one for one in bundle.catalog.to_dicts()}
    for id, item in puts.items():
        window[row[id]] = LIMITS.min, LIMITS.max
        said[id] = {name: item.get(name) for name in bundle.catalog.columns} | {"item": id}
    gone = {row[id] for id in state.keys() - puts.keys() if id in row}
    rows = (set(bundle.rows.tolist()) | {row[id] for id in puts}) - gone
    ids = [*bundle.items.ids, *new]
    changed = replace(
        bundle,
        model=model.eval(),
        items=Vocab(pl.Series(bundle.items.ids.name, ids)),
        catalog=pl.DataFrame([said[id] for id in ids], schema=bundle.catalog.schema),
        window=window,
        timeline=timeline,
        vectors=encode_items(model.eval(), np.arange(size), timeline, bundle.cutoff or 0),
        rows=np.array(sorted(rows)),
    )
    return bundles.with_index(changed, GraphRules(**bundle.manifest["index"]["rules"]))


def publish_on(base: Path, journal: Path, made: Path, folder: Path) -> None:
    """Publish what the journal holds, again and again."""
    bundle = bundles.load(base)
    rules = GraphRules(**bundle.manifest["index"]["rules"])
    database = sqlite3.connect(f"file:{journal / FILE}?mode=ro", uri=True)
    turn = 0
    while True:
        turn += 1
        state = {
            id: None if body is None else json.loads(body)
            for id, body in database.execute("SELECT id, body FROM items ORDER BY id")
        }
        path = bundles.save(
            folded(bundle, state), made / "bundle", rules=rules, encoder=bundle.encoder
        )
        publish(path, folder, keep=2, link=turn % 2 == 0)


def _serve(base: Path, folder: Path, work: Path) -> None:
    """What `recsys serve FOLDER --journal … --open-writes` does, with a publisher beside it."""
    from recsys.experiments import serve
    from recsys.serving.api import server as running
    from recsys.serving.api.auth import Keys

    run = running.run

    def with_publisher(*given: Any, **named: Any) -> None:
        arguments = base, work / "journal", work / "made", folder
        threading.Thread(target=publish_on, args=arguments, daemon=True).start()
        run(*given, **named)

    running.run = with_publisher  # the journal is open and the model loaded by then
    serve._serve(
        serve.Plan(
            {serve.MAIN: str(folder)}, Keys(open_writes=True), port=0, journal=work / "journal",
            every=0.05, deadline=20, log_level="warning",
        )
    )  # fmt: skip


def main(base: Path, folder: Path, work: Path) -> None:
    """Fork a service for every line of stdin, and tell of it on stdout."""
    import sentence_transformers  # noqa: F401
    import transformers  # noqa: F401

    from recsys.serving.api import app  # noqa: F401
    from recsys.serving.models import manager  # noqa: F401

    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(work / "errors", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
                _serve(base, folder, work)
            finally:
                os._exit(70)
        print(json.dumps({"pid": child}), flush=True)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


@dataclass
class Killed:
    """Starts services and kills them.

    Args:
        base: the bundle that the journal's items are put into.
        folder: what the service watches and publishes to.
        work: gets the journal.
    """

    base: Path
    folder: Path
    work: Path
    pid: int | None = None
    _process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Killed:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.base), str(self.folder), str(self.work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        if self.pid is not None:
            with suppress(ProcessLookupError):  # it ended by itself, which was told already
                os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()

    def start(self) -> None:
        """Let a service begin; it is not up yet."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.pid = json.loads(self._line())["pid"]

    def url(self) -> str:
        """Where the service answers, as soon as it does."""
        line = self._line()
        assert line.startswith("http://"), (line, (self.work / "errors").read_text()[-2000:])
        return line

    def kill(self) -> None:
        """SIGKILL, which nothing in the process sees; whatever else ended it is a fault."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)
        line = self._line()
        while line.startswith("http://"):
            line = self._line()
        assert json.loads(line) == {"ended": -signal.SIGKILL}, self._errors()
        self.pid = None

    def _errors(self) -> str:
        return (self.work / "errors").read_text()[-2000:]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
