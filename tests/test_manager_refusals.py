"""A model that must not get in: the one that answers goes on, and why is said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swapping import (
    Heard,
    golden_fails,
    point,
    pointer_to_nothing,
    renamed,
    serving,
    until,
    version,
)
from swapping import host as host
from swapping import models as models
from swapping import root as root

from recsys.errors import BundleError, QueryError
from recsys.search import ExactIndex
from recsys.serving.engine.engine import Engine
from recsys.serving.live.updates import LiveUpdates
from recsys.serving.manifest import read_manifest
from recsys.serving.models import manager as hosts
from recsys.serving.models.manager import FolderSource, ModelManager


def corrupt(root: Path) -> None:
    file = root / "versions" / "b" / "towers.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    point(root, "b")


def half_copied(root: Path) -> None:
    (root / "versions" / "b" / "vectors.safetensors").unlink()
    point(root, "b")


def golden_is_none(root: Path) -> None:
    (root / "golden.json").write_text("{")
    point(root, "b")


def shrunk(root: Path) -> None:
    def few(bundle: Any) -> Any:
        rows = bundle.rows[:5]
        return replace(
            bundle, rows=rows, index=ExactIndex(np.ascontiguousarray(bundle.vectors[rows]))
        )

    renamed(root / "versions" / "b", root / "versions" / "few", "f-", few)
    point(root, "few")


def neighbours_lie(root: Path) -> None:
    """A whole bundle by its digests, whose table of neighbours is one row off."""
    from recsys.serving.manifest import MANIFEST, write_manifest

    folder = root / "versions" / "b"
    rows = np.load(folder / "neighbours.rows.npy")
    np.save(folder / "neighbours.rows.npy", np.roll(rows, 1, axis=0))
    said = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, {k: v for k, v in said.items() if k not in ("self", "files")})
    point(root, "b")


def pointer_half_written(root: Path) -> None:
    (root / "CURRENT").write_text("")


def pointer_outside(root: Path) -> None:
    point(root, "../../elsewhere")


def pointer_gone(root: Path) -> None:
    (root / "CURRENT").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (corrupt, "damaged or replaced"),
        (half_copied, "lacks vectors"),
        (golden_fails, "Golden question 1 .* must answer 'a-i00'"),
        (golden_is_none, "not JSON"),
        (shrunk, "shrank from"),
        (neighbours_lie, "table of neighbours"),
        (pointer_to_nothing, "no bundle is there"),
        (pointer_half_written, "says ''"),
        (pointer_outside, "no folder below"),
        (pointer_gone, "neither a bundle nor a folder"),
    ],
)
def test_whatever_fails_the_old_model_answers_on_and_the_next_good_one_takes_over(
    host: Callable[..., ModelManager], root: Path, spoil: Callable[[Path], None], said: str
) -> None:
    heard = Heard()
    one = host(on_event=heard)
    engine = one.choose(None)[1]
    spoil(root)
    until(lambda: any(event == "failed" for event, _ in heard))
    assert one.choose(None)[1] is engine and one.ready
    facts = one.facts()[0]
    assert facts["failures"] >= 1 and facts["swaps"] == 0
    assert re.search(said, facts["last_error"])
    told = next(told for event, told in heard if event == "failed")
    assert (told["variant"], told["error"]) == ("main", facts["last_error"])
    (root / "golden.json").unlink(missing_ok=True)
    point(root, "c")
    until(lambda: serving(one) == version(root, "c"))
    facts = one.facts()[0]
    assert facts["last_error"] is None and facts["failures"] >= 1 and facts["swaps"] == 1


def test_a_broken_bundle_is_not_loaded_again_every_time_but_when_it_is_mended(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (root / "versions" / "b" / "towers.safetensors").read_bytes()
    one = host(every=0.02)
    corrupt(root)
    time.sleep(1.0)
    failures = one.facts()[0]["failures"]
    assert 2 <= failures <= 7  # after .02, .04, .08, … seconds: not 50 times
    (root / "versions" / "b" / "towers.safetensors").write_bytes(good)
    until(lambda: serving(one) == version(root, "b"))


def test_going_back_to_the_model_that_answers_clears_the_error(
    host: Callable[..., ModelManager], root: Path
) -> None:
    one = host()
    corrupt(root)
    until(lambda: one.facts()[0]["failed_token"])
    assert one.facts()[0]["failed_token"] == "versions/b"
    point(root, "a")
    until(lambda: one.facts()[0]["last_error"] is None)
    assert one.facts()[0]["swaps"] == 0


def test_an_engine_that_cannot_answer_is_not_swapped_in(
    host: Callable[..., ModelManager], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updates = LiveUpdates(None)
    detached: list[Any] = []
    detach = updates.detach
    updates.detach = lambda overlay: (detached.append(overlay), detach(overlay))[1]  # type: ignore

    class Broken(Engine):
        def answer(self, asks: Any) -> Any:
            if self.model.version == version(root, "b"):
                raise ZeroDivisionError("a bug")
            return super().answer(asks)

    one = host(updates=updates, engine=Broken)
    point(root, "b")
    until(lambda: one.facts()[0]["last_error"])
    assert one.facts()[0]["last_error"] == "ZeroDivisionError: a bug"
    assert serving(one) == version(root, "a")
    assert len(detached) >= 1
    until(lambda: "Traceback" in caplog.text)  # ours to mend, so the log has all of it


def test_a_model_that_fails_at_the_last_step_is_detached(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = LiveUpdates(None)
    one = host(updates=updates)

    def broken(*mapped: Any) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(hosts, "give_back", broken)
    point(root, "b")
    until(lambda: one.facts()[0]["failures"] >= 2 and len(updates._overlays) == 1)
    assert serving(one) == version(root, "a")
    monkeypatch.undo()
    until(lambda: serving(one) == version(root, "b"))


def test_start_raises_what_is_wrong_with_the_first_model(root: Path) -> None:
    corrupt(root)
    one = ModelManager({"main": FolderSource(root)}, LiveUpdates(None))
    with pytest.raises(BundleError, match="damaged or replaced"):
        one.start()
    assert not one.ready
    with pytest.raises(QueryError, match="loaded yet"):
        one.choose(None)
    one.stop()


def test_a_listener_that_fails_stops_nothing(
    host: Callable[..., ModelManager], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: str, said: Mapping[str, Any]) -> None:
        raise RuntimeError("deaf")

    one = host(on_event=listener)
    point(root, "b")
    until(lambda: serving(one) == version(root, "b"))
    assert "The listener fails" in caplog.text
