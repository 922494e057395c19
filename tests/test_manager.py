"""A new model is loaded beside the old, judged and swapped in; the old one is freed."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swapping import (
    NAMES,
    Heard,
    UserInputs,
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

from recsys.errors import ConfigError, QueryError
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Filter, Query
from recsys.serving.live.updates import LiveUpdates
from recsys.serving.models import manager as hosts
from recsys.serving.models.manager import FolderSource, GateRules, ModelManager


def test_a_new_pointer_swaps_and_a_roll_back_swaps_back(
    host: Callable[..., ModelManager], root: Path
) -> None:
    heard = Heard()
    one = host(on_event=heard)
    assert one.ready and serving(one) == version(root, "a")
    for name in ("b", "a"):
        point(root, name)
        until(lambda name=name: serving(one) == version(root, name))
    (facts,) = one.facts()
    assert (facts["name"], facts["share"], facts["swaps"], facts["failures"]) == ("main", 1, 2, 0)
    assert facts["version"] == version(root, "a") and facts["last_error"] is None
    assert facts["gate"]["neighbour_recall"] >= 0.99
    assert json.loads(json.dumps(facts)) == facts
    assert [name for name in heard.names() if name == "loaded"] == ["loaded"] * 3


def test_nothing_new_costs_a_stat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(root)
    first = source.latest()
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("it was read again"))
    assert all(source.latest() == first for _ in range(100))


def test_a_bundle_replaced_in_its_place_is_a_new_model(
    host: Callable[..., ModelManager], plain: Any, tmp_path: Path
) -> None:
    renamed(plain.bundle, tmp_path / "bundle", "a-")
    one = host(FolderSource(tmp_path / "bundle"))
    before = serving(one)
    renamed(plain.bundle, tmp_path / "bundle", "b-")
    until(lambda: serving(one) != before)
    reply = one.choose(None)[1].answer([Query("recommend", user="nobody", k=3)])[0]
    assert all(id.startswith("b-") for id in reply.ids)  # type: ignore[union-attr]


def test_under_load_no_question_fails_and_no_answer_mixes_two_models(
    host: Callable[..., ModelManager], root: Path, plain: Any
) -> None:
    one = host()
    ids = [id.removeprefix("a-") for id in one.choose(None)[1].model.bundle.items.ids[:20]]
    prefix = {version(root, name): f"{name}-" for name in NAMES}
    with UserInputs(one, prefix, ids) as askers:
        for name in ("b", "c", "a", "b", "a", "c"):
            point(root, name)
            until(lambda name=name: serving(one) == version(root, name))
            time.sleep(0.05)
    assert askers.faults == []
    assert len(askers.took) > 100
    assert {version for _, _, version in askers.took} == set(prefix)


# --- memory and threads ---------------------------------------------------------------------------


def test_the_old_model_lives_as_long_as_a_request_holds_it_and_no_longer(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COLLECT_AFTER", 1e9)
    gc.collect()
    gc.disable()  # references alone must do
    try:
        heard = Heard()
        updates = LiveUpdates(None)
        one = host(updates=updates, on_event=heard)
        request = one.choose(None)[1]
        served = weakref.ref(request.model)
        vectors = weakref.ref(request.model.bundle.vectors)
        point(root, "b")
        until(lambda: serving(one) == version(root, "b"))
        point(root, "c")
        time.sleep(0.4)
        # Two models at most: c waits until the request is done.
        assert serving(one) == version(root, "b")
        assert one.facts()[0]["old_model_held"] and "freed" not in heard.names()
        reply = request.answer([Query("recommend", user="nobody", k=3)])[0]
        assert all(id.startswith("a-") for id in reply.ids)  # type: ignore[union-attr]
        del request, reply
        until(lambda: "freed" in heard.names())
        assert served() is None and vectors() is None
        until(lambda: serving(one) == version(root, "c"))
        until(lambda: heard.names().count("freed") == 2)
    finally:
        gc.enable()


def test_nothing_of_a_model_with_all_features_is_a_cycle(tiny: Any) -> None:
    served, updates = LoadedModel.load(tiny.bundle), LiveUpdates(None)
    gc.collect()
    gc.disable()
    try:
        overlay = updates.attach(served)
        engine = Engine(served, overlay)
        item = served.bundle.items.ids[0]
        told: dict[str, Any] = {"explain": True, "fields": ("*",), "popularity": 0.3}
        told |= {"diversity": 0.3, "filter": Filter(ranges={"price": (0, None)}, deny=("x",))}
        asks = [
            Query("similar", items=(item,), **told),
            Query("recommend", user=served.bundle.users.ids[0], context={"device": "app"}, **told),
            Query("search", text="tea", **told),
            Query("vector", vector=served.bundle.vectors[1].copy(), **told),
            Query("similar", items=(item,), paged=True),
            Query("similar", items=()),
        ]
        answers = engine.answer(asks)
        assert [type(answer) for answer in answers] == [Answers] * 5 + [QueryError], answers
        engine.from_table(item, 5)
        engine.item(item)
        engine.user("nobody")
        engine.facts()
        watched = [weakref.ref(one) for one in (engine, overlay, served, served.bundle)]
        try:
            updates.put_item("new", {"no such column": 1})
            raise AssertionError("it was taken")
        except QueryError:
            pass
        updates.detach(overlay)
        del engine, overlay, served, answers
        assert [one() for one in watched] == [None] * 4
    finally:
        gc.enable()
        updates.close()


def test_a_refused_model_leaves_nothing_in_memory(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    load = hosts.LoadedModel.load

    def watched(path: Any, **more: Any) -> Any:
        served = load(path, **more)
        made.append(weakref.ref(served))
        return served

    monkeypatch.setattr(hosts.LoadedModel, "load", staticmethod(watched))
    one = host()
    golden_fails(root)
    until(lambda: one.facts()[0]["failures"] >= 3)
    one.stop()
    assert [ref() is not None for ref in made] == [True] + [False] * (len(made) - 1)


def test_a_request_that_never_ends_is_told_of(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COLLECT_AFTER", 0.05)
    one = host()
    request = one.choose(None)[1]
    point(root, "b")
    until(lambda: serving(one) == version(root, "b"))
    point(root, "c")
    until(lambda: one.facts()[0]["last_error"])
    assert "still in use" in one.facts()[0]["last_error"]
    del request
    until(lambda: serving(one) == version(root, "c"))


def test_a_cycle_that_holds_the_old_model_is_collected(
    host: Callable[..., ModelManager], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COLLECT_AFTER", 0.1)
    heard = Heard()
    one = host(on_event=heard)
    engine = one.choose(None)[1]
    engine.itself = engine  # type: ignore[attr-defined]
    del engine
    gc.disable()
    try:
        point(root, "b")
        until(lambda: "freed" in heard.names())
        assert "held" in heard.names()
    finally:
        gc.enable()


def test_stop_joins_and_models_go_on_answering(
    host: Callable[..., ModelManager], root: Path
) -> None:
    one = host()
    threads = [thread for thread in threading.enumerate() if thread.name == "recsys-host"]
    one.stop()
    assert threads and not any(thread.is_alive() for thread in threads)
    point(root, "b")
    time.sleep(0.2)
    assert serving(one) == version(root, "a")
    one.stop()


# --- variants -------------------------------------------------------------------------------------


def test_two_models_side_by_side_by_a_hashed_split(
    host: Callable[..., ModelManager], root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    point(other, "b")
    one = host(
        sources={"old": FolderSource(root), "new": FolderSource(other)},
        split={"old": 0.8, "new": 0.2},
    )
    units = [f"u{number}" for number in range(4000)]
    got = [one.choose(unit)[0] for unit in units]
    assert abs(got.count("new") / len(got) - 0.2) < 0.03
    assert got == [one.choose(unit)[0] for unit in units]
    for name, expected in (("old", "a"), ("new", "b")):
        chosen, engine = one.choose("u1", name)
        assert (chosen, engine.model.version) == (name, version(root, expected))
    assert [facts["share"] for facts in one.facts()] == [0.8, 0.2]
    # One fails, the other goes on being replaced.
    pointer_to_nothing(root)
    point(other, "c")
    until(lambda: one.choose(None, "new")[1].model.version == version(root, "c"))
    until(lambda: one.facts()[0]["last_error"])
    assert one.facts()[1]["last_error"] is None
    assert one.choose(None, "old")[1].model.version == version(root, "a")


def test_unknown_variants_and_splits_are_refused(
    host: Callable[..., ModelManager], root: Path
) -> None:
    one = host()
    with pytest.raises(QueryError, match="Did you mean 'main'"):
        one.choose(None, "mian")
    with pytest.raises(ConfigError, match="Give each variant both"):
        ModelManager({"a": FolderSource(root)}, LiveUpdates(None), split={"b": 1.0})
    with pytest.raises(ConfigError, match=r"sum to 0\.9"):
        ModelManager({"a": FolderSource(root)}, LiveUpdates(None), split={"a": 0.9})
    with pytest.raises(ConfigError, match="no variant"):
        ModelManager({}, LiveUpdates(None))


# --- the soak -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_seconds_of_swaps_and_writes_under_load(
    host: Callable[..., ModelManager], root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    updates = LiveUpdates(tmp_path / "journal")
    one = host(updates=updates, every=0.5, gate=GateRules())
    ids = [id.removeprefix("a-") for id in one.choose(None)[1].model.bundle.items.ids[:20]]
    prefix = {version(root, name): f"{name}-" for name in NAMES}
    done = threading.Event()
    faults: list[str] = []
    written = [0]

    def write() -> None:
        from recsys.serving.live.journal import Event

        while not done.is_set():
            id = f"live-{written[0] % 50}"
            try:
                updates.put_item(id, {"title": f"Thing {id}"})
                updates.post_events([Event("u00", id, 1_705_000_000_000_000 + written[0])])
                if written[0] % 3 == 2:
                    updates.delete_item(id)
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
            written[0] += 1
            time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    swaps = 0
    try:
        with UserInputs(one, prefix, ids, updates=True) as askers:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                swaps, again = swaps + 1, min(end, time.monotonic() + 2)
                name = NAMES[swaps % 3]
                point(root, name)
                until(lambda name=name: serving(one) == version(root, name))
                time.sleep(max(0.0, again - time.monotonic()))
    finally:
        done.set()
        writer.join()
    assert askers.faults == [] and faults == []
    assert swaps >= 8 and written[0] > 50
    facts = one.facts()[0]
    assert facts["failures"] == 0 and facts["swaps"] == swaps
    until(lambda: not one.facts()[0]["old_model_held"])
    updates.close()
