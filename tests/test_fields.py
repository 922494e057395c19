"""What an item's field may hold is put, what it may not is refused by name, and writing goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from typing import Any

import polars as pl
import pytest
from conftest import Built
from service_cases import OPEN, FakeHost, ask
from serving_cases import NEW

from serving import bundle as bundles
from serving.answers.served import Served
from serving.http.service import make_app
from serving.living.live import Living, Overlay

BERLIN = "Europe/Berlin"
MORE = {
    "day": pl.Date(), "naive": pl.Datetime("ms"), "utc": pl.Datetime("us", "UTC"),
    "berlin": pl.Datetime("ns", BERLIN), "dur": pl.Duration("ms"), "small": pl.Int8(),
    "days": pl.List(pl.Date()),
}  # fmt: skip
"""Columns that the shop has not, beside its own."""


@pytest.fixture(scope="module")
def served(tiny: Built) -> Served:
    bundle = bundles.load(tiny.bundle)
    nothing = [pl.lit(None, dtype).alias(name) for name, dtype in MORE.items()]
    return Served(replace(bundle, catalog=bundle.catalog.with_columns(nothing)))


@pytest.fixture
def living() -> Iterator[Living]:
    with Living(None) as living:
        yield living


@pytest.fixture
def overlay(living: Living, served: Served) -> Overlay:
    return living.attach(served)


@pytest.fixture
def app(living: Living, overlay: Overlay) -> Any:
    app = make_app(FakeHost(), living, keys=OPEN)
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
