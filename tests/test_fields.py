"""What an item's field may hold is put, what it may not is refused by name, and writing goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from threading import Thread
from typing import Any

import polars as pl
import pytest
from conftest import Built
from service_cases import OPEN, FakeHost, ask
from serving_cases import NEW

from recsys.errors import QueryError
from recsys.serving import bundle as bundles
from recsys.serving.api.app import make_app
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.live.journal import Event
from recsys.serving.live.overlay import Overlay
from recsys.serving.live.updates import LiveUpdates

BERLIN = "Europe/Berlin"
MORE = {
    "day": pl.Date(), "naive": pl.Datetime("ms"), "utc": pl.Datetime("us", "UTC"),
    "berlin": pl.Datetime("ns", BERLIN), "dur": pl.Duration("ms"), "small": pl.Int8(),
    "days": pl.List(pl.Date()),
}  # fmt: skip
"""Columns that the shop has not, beside its own."""


@pytest.fixture(scope="module")
def served(tiny: Built) -> LoadedModel:
    bundle = bundles.load(tiny.bundle)
    nothing = [pl.lit(None, dtype).alias(name) for name, dtype in MORE.items()]
    return LoadedModel(replace(bundle, catalog=bundle.catalog.with_columns(nothing)))


@pytest.fixture
def updates() -> Iterator[LiveUpdates]:
    with LiveUpdates(None) as updates:
        yield updates


@pytest.fixture
def overlay(updates: LiveUpdates, served: LoadedModel) -> Overlay:
    return updates.attach(served)


@pytest.fixture
def app(updates: LiveUpdates, overlay: Overlay) -> Any:
    app = make_app(FakeHost(), updates, keys=OPEN)
    yield app
    app.close()


def put(app: Any, id: str, **fields: Any) -> tuple[int, str]:
    got = ask(app, "PUT", f"/v1/items/{id}", NEW | fields)
    return got.status, got.body.decode()


def held(overlay: Overlay, id: str, name: str) -> Any:
    return overlay.view.fields[name][overlay.view.place[id]]


def test_times_beyond_all_calendars_leave_the_threads_that_write(
    app: Any, overlay: Overlay
) -> None:
    for wrong in ({"day": 1704067200}, {"naive": 9007199254740992}, {"day": 2**31 - 1}) * 2:
        status, said = put(app, "a", **wrong)
        (name,) = wrong
        assert status == 400 and f"'{name}' holds" in said and "since 1970" in said
    assert put(app, "b", day=19_723)[0] == 200
    assert overlay.view.ids == ("b",) and held(overlay, "b", "day") == date(2024, 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"day": ["2024-01-01"]}, {"day": []}, {"day": {}}, {"day": {"a": 1}}, {"day": 1.5},
        {"naive": "soon"}, {"naive": [1]}, {"utc": "0001-01-01T00:00:00+14:00"},
        {"naive": "0001-01-01T00:00:00+14:00"}, {"naive": "9999-12-31T23:59:59-14:00"},
        {"berlin": "9999-12-31"}, {"dur": "2024-01-01"}, {"dur": []}, {"small": 300},
        {"small": [1]}, {"days": [2**31 - 1]}, {"days": [["x"]]}, {"days": {"a": 1}},
    ],
)  # fmt: skip
def test_what_a_column_cannot_hold_is_refused_by_name(
    wrong: dict[str, Any], updates: LiveUpdates, overlay: Overlay
) -> None:
    (name,) = wrong
    with pytest.raises(QueryError, match=f"'{name}' holds"):
        updates.put_item("a", NEW | wrong)
    assert not overlay.view.ids


def test_times_are_held_in_the_zone_of_their_column(app: Any, overlay: Overlay) -> None:
    """Without an offset they are UTC."""
    clock = datetime(2024, 1, 1, 10)
    for at, text in enumerate(("2024-01-01T10:00", "2024-01-01T10:00Z", "2024-01-02T00:00+14:00")):
        fields = dict.fromkeys(("naive", "utc", "berlin"), text)
        assert put(app, f"i{at}", **fields, days=["2024-01-01"])[0] == 200
        assert held(overlay, f"i{at}", "naive") == clock
        for name in ("utc", "berlin"):
            assert held(overlay, f"i{at}", name) == clock.replace(tzinfo=UTC)
        assert held(overlay, f"i{at}", "days").to_list() == [date(2024, 1, 1)]


class Panic(BaseException):
    """As Polars raises it: no Exception."""


@pytest.mark.parametrize("error", [ZeroDivisionError("7"), Panic("7")])
@pytest.mark.parametrize("stage", ["describe", "encode"])
def test_a_writer_that_breaks_a_model_costs_its_commit_nothing(
    error: BaseException, stage: str, updates: LiveUpdates, overlay: Overlay,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, failed = getattr(Overlay, stage), dict[str, BaseException]()

    def breaking(self: Overlay, given: Any, *more: Any) -> Any:
        said = given.get("title") if stage == "describe" else [one[0] for one in given]
        if "i7" in said:
            raise error
        return real(self, given, *more)

    def put(id: str) -> None:
        try:
            updates.put_item(id, {**NEW, "title": id})
        except BaseException as error:
            failed[id] = error

    monkeypatch.setattr(Overlay, stage, breaking)
    ids = {f"i{n}" for n in range(10)}
    threads = [Thread(target=put, args=(id,)) for id in ids]
    threads.append(Thread(target=updates.post_events, args=([Event("u", "i1", 1)],)))
    with updates._lock:  # so that they gather
        for thread in threads:
            thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert list(failed) == ["i7"] and isinstance(failed["i7"], (ZeroDivisionError, RuntimeError))
    assert set(overlay.view.ids) == ids - {"i7"}
    assert overlay.view.events["u"] == (("i1", 1, 1.0),)


def test_what_fails_after_it_is_written_is_not_written_again(
    updates: LiveUpdates, overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    failed = []

    def post(user: str) -> None:
        try:
            updates.post_events([Event(user, "i1", 1)])
        except ZeroDivisionError:
            failed.append(user)

    threads = [Thread(target=post, args=(user,)) for user in "abc"]
    with monkeypatch.context() as patch:
        patch.setattr(Overlay, "change", broken)
        with updates._lock:
            for thread in threads:
                thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
    assert sorted(failed) == ["a", "b", "c"] and updates._seq == 3
