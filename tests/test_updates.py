"""What is put is found, what is deleted is not; a start or another model changes nothing of it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Built
from serving_cases import NEW
from serving_cases import table as table

from recsys.errors import QueryError
from recsys.serving.bundle import Bundle
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.live.journal import Event, Journal, JournalError
from recsys.serving.live.new_items import encode_described
from recsys.serving.live.overlay import LiveView, Overlay, PersistentMap
from recsys.serving.live.updates import LiveUpdates
from recsys.tables import SECOND
from recsys.towers.encode import encode_items
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower


@pytest.fixture(scope="module")
def served(tiny: Built) -> LoadedModel:
    return LoadedModel.load(tiny.bundle)


@pytest.fixture(scope="module")
def other(plain: Built) -> LoadedModel:
    return LoadedModel.load(plain.bundle)


@pytest.fixture
def updates() -> Iterator[LiveUpdates]:
    with LiveUpdates(None) as updates:
        yield updates


def vector(view: LiveView, id: str) -> np.ndarray:
    return view.vectors[view.place[id]]


# ---------------------------------------------------------------------------- the item tower


def test_an_item_put_again_as_it_was_has_the_vector_it_had(
    updates: LiveUpdates, served: LoadedModel, table: dict[str, dict[str, Any]]
) -> None:
    """Those without an id vector (cold) and those with one, which they keep."""
    bundle, overlay = served.bundle, updates.attach(served)
    ids = bundle.items.ids.to_list()
    warm = bundle.model.item_spec.ids
    assert 1 < warm < len(ids), "the shop has cold items too"
    for row in (1, 2, warm - 1, warm, warm + 1, len(ids)):
        id = ids[row - 1]
        updates.put_item(id, table[id])
        found = vector(overlay.view, id)
        np.testing.assert_allclose(found, bundle.vectors[row], atol=1e-5)


def test_a_new_item_has_the_vector_of_its_cold_twin(
    updates: LiveUpdates, served: LoadedModel, table: dict[str, dict[str, Any]]
) -> None:
    """A cold item that nothing has happened to yet, under another id; its age counts alike."""
    bundle, overlay = served.bundle, updates.attach(served)
    timeline = bundle.timeline
    assert timeline.shown is not None
    quiet = (timeline.clicks.lengths == 0) & (timeline.shown.lengths == 0)
    quiet[: bundle.model.item_spec.ids] = False
    rows = np.flatnonzero(quiet)
    assert len(rows)
    for row in rows[:5].tolist():
        id = bundle.items.ids[row - 1]
        updates.put_item(f"twin of {id}", table[id])
        np.testing.assert_allclose(
            vector(overlay.view, f"twin of {id}"), bundle.vectors[row], atol=1e-5
        )


@pytest.mark.parametrize(
    ("history_table", "score", "share"),
    [
        *itertools.product(["shared", "offset", "own"], ["cosine", "dot"], [0.0]),
        *itertools.product(["shared", "offset", "own"], ["cosine"], [0.4]),
    ],
)
def test_every_tower_reads_newcomers_as_it_reads_its_own_rows(
    history_table: Any,
    score: Any,
    share: float,
    served: LoadedModel,
    table: dict[str, dict[str, Any]],
) -> None:
    """Twin: the bundle's own rows through `encode_items` and `embed_history`."""
    old, timeline, cutoff = served.bundle.model, served.bundle.timeline, served.bundle.cutoff
    rules = TowerRules(
        dimension=16, hidden=16, history={"table": history_table}, score=score, text_share=share
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = TwoTower(rules, old.items, old.users, old.item_spec, old.user_spec, old.context)
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=0.3)
    bundle: Bundle = replace(served.bundle, model=model.eval())
    assert bundle.coder is not None and cutoff is not None
    ids = bundle.items.ids.to_list()
    described = [bundle.coder.describe(table[id]) for id in ids]
    rows = np.arange(1, len(ids) + 1)
    found = encode_described(bundle, described, rows)
    np.testing.assert_allclose(
        found.vectors, encode_items(model, rows, timeline, cutoff), rtol=1e-4, atol=1e-4
    )
    with torch.inference_mode():
        statistics = torch.from_numpy(timeline.statistics(rows, cutoff))
        wanted = model.embed_history(torch.from_numpy(rows), statistics).float().numpy()
    np.testing.assert_allclose(found.entries, wanted, rtol=1e-4, atol=1e-4)
    # One at a time is as all at once.
    one = encode_described(bundle, described[7:8], rows[7:8])
    np.testing.assert_allclose(one.vectors[0], found.vectors[7], rtol=1e-4, atol=1e-5)


def test_what_the_model_does_not_know_counts_as_unknown(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay = updates.attach(served)
    updates.put_item("a", NEW)
    updates.put_item("b", {**NEW, "category": ["Garden", "watering can", "never heard of"]})
    np.testing.assert_allclose(vector(overlay.view, "a"), vector(overlay.view, "b"), atol=1e-5)
    updates.put_item("c", {})
    assert np.isfinite(vector(overlay.view, "c")).all()


# ---------------------------------------------------------------------------- the view


def test_put_delete_put_by_hand(updates: LiveUpdates, served: LoadedModel) -> None:
    overlay = updates.attach(served)
    assert overlay.view.generation == 0 and not overlay.view.ids
    known = served.bundle.items.ids[int(served.bundle.rows[3]) - 1]
    row = served.row_of(known)
    updates.put_item("new", NEW)
    view = overlay.view
    assert view.ids == ("new",) and dict(view.place) == {"new": 0} and not view.hidden
    assert view.fields.columns == served.bundle.catalog.columns[1:]
    assert view.fields.row(0, named=True)["title"] == NEW["title"]
    assert view.fields.row(0, named=True)["price"] == NEW["price"]
    assert view.window.tolist() == [[-(2**63), 2**63 - 1]]
    assert updates.delete_item(known) and not updates.delete_item(known)
    assert not updates.delete_item("nobody")
    view = overlay.view
    assert view.hidden == {row} and view.hidden_positions.tolist() == [served.position[row]]
    updates.put_item(known, {**NEW, "price": 1})
    view = overlay.view
    assert view.ids == ("new", known) and view.hidden == {row}
    assert view.fields["price"].to_list() == [31.9, 1.0]
    assert updates.delete_item("new")
    view = overlay.view
    assert view.ids == (known,) and dict(view.place) == {known: 0}
    assert view.fields["price"].to_list() == [1.0] and view.generation == 4


def test_what_is_put_later_says_so_after_a_start_too(
    tmp_path: Path, served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 7_000)  # a clock that stands still
    with LiveUpdates(tmp_path) as updates:
        overlay = updates.attach(served)
        for id in ("a", "b", "c", "a"):
            updates.put_item(id, NEW)
        assert overlay.view.ids == ("a", "b", "c") and overlay.view.since.tolist() == [10, 8, 9]
    with LiveUpdates(tmp_path) as updates:
        overlay = updates.attach(served)
        updates.put_item("d", NEW)
        view = overlay.view
        assert {id: int(view.since[j]) for id, j in view.place.items()} == {
            "a": 10, "b": 8, "c": 9, "d": 11,
        }  # fmt: skip


def test_an_item_is_not_to_be_recommended_before_it_is_published(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay = updates.attach(served)
    updates.put_item("soon", {**NEW, "published": "2034-01-01"})
    assert overlay.view.window.tolist() == [[2_019_686_400_000_000, 2**63 - 1]]


def test_a_view_never_changes(updates: LiveUpdates, served: LoadedModel) -> None:
    overlay, seen = updates.attach(served), []
    for n in range(100):
        updates.put_item(f"i{n % 40}", {**NEW, "price": n})
        if n % 7 == 3:
            updates.delete_item(f"i{n % 13}")
        updates.post_events([Event(f"u{n % 3}", f"i{n % 5}", n)])
        seen.append((overlay.view, frozen(overlay.view)))
    for view, was in seen:
        assert frozen(view) == was
        assert list(view.place) == list(dict(view.place)) and len(view.place) == len(view.ids)
        assert [view.place[id] for id in view.ids] == list(range(len(view.ids)))


def frozen(view: LiveView) -> tuple[Any, ...]:
    return (
        view.ids, sorted(view.place.items()), view.vectors.tobytes(), view.entries.tobytes(),
        view.fields.rows(), view.window.tobytes(), view.since.tobytes(), sorted(view.hidden),
        view.hidden_positions.tobytes(), sorted(view.events.items()), view.generation,
    )  # fmt: skip


def test_an_item_is_found_at_once_among_ten_thousand(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    for n in range(10_000):
        updates._items[f"n{n}"] = b'{"title": "Minimalist watering can"}'
        updates._put_at[f"n{n}"] = n
    overlay = updates.attach(served)
    assert len(overlay.view.ids) == 10_000
    spent = []
    for n in range(30):
        began = time.perf_counter()
        updates.put_item(f"late{n}", NEW)
        assert f"late{n}" in overlay.view.place
        updates.put_item(f"n{n}", NEW)
        updates.delete_item(f"n{n + 100}")
        spent.append(time.perf_counter() - began)
    assert np.median(spent) < 1  # a second is what is promised


def test_items_that_cannot_be_read_are_refused_and_named(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay = updates.attach(served)
    for id, item, words in (
        ("a", {"colour": "red"}, r"no column 'colour' here.*Columns: title,"),
        ("a", {"price": "3"}, "no number"),
        ("a", {"category": {"a": 1}}, "neither"),
        ("", NEW, "not empty"),
        ("\ud800", NEW, "Unicode"),
        (None, NEW, "not empty"),
        ("a", {"title": "\ud800"}, "JSON"),
        ("a", [1], "object"),
        ("a", {1: 2}, "object"),
    ):
        with pytest.raises(QueryError, match=words):
            updates.put_item(id, item)  # type: ignore[arg-type]
    assert overlay.view.generation == 0 and not updates._items


def test_one_bad_item_does_not_spoil_its_neighbours_in_a_commit(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay, failed = updates.attach(served), []

    def put(n: int) -> None:
        try:
            updates.put_item(f"i{n}", {**NEW, "price": "x" if n % 5 == 0 else n})
        except QueryError:
            failed.append(n)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(40)]
    with updates._lock:  # so that they gather
        for thread in threads:
            thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(failed) == list(range(0, 40, 5))
    assert set(overlay.view.ids) == {f"i{n}" for n in range(40) if n % 5}


# ---------------------------------------------------------------------------- events


def test_events_count_at_once_in_the_order_of_time(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay = updates.attach(served)
    a, b = served.bundle.items.ids[:2]
    late = (served.bundle.cutoff or 0) + SECOND
    came = [Event("u", a, late + 5, id="x"), Event("u", b, late)]
    assert updates.post_events(came) == came
    assert overlay.view.events["u"] == ((b, late, 1.0), (a, late + 5, 1.0))
    assert updates.post_events([Event("u", a, late + 5, id="x")]) == []
    updates.post_events(
        [Event("u", "unborn", late + 2, strength=2.0), Event("u", a, late, "shown")]
    )
    assert overlay.view.events["u"] == ((b, late, 1.0), (a, late + 5, 1.0))
    updates.put_item("unborn", NEW)
    assert overlay.view.events["u"][1] == ("unborn", late + 2, 2.0)
    updates.delete_item("unborn")
    assert overlay.view.events["u"] == ((b, late, 1.0), (a, late + 5, 1.0))


def test_of_many_who_post_the_same_event_at_once_one_is_told_that_it_is_new(tmp_path: Path) -> None:
    with LiveUpdates(tmp_path) as updates, ThreadPoolExecutor(16) as threads:
        posts = [
            [Event("u", "i", n, id=f"e{n % 8}"), Event("u", "i", n, id=f"f{n}")] for n in range(64)
        ]
        told = list(threads.map(updates.post_events, posts))
    assert all(set(new) <= set(post) for new, post in zip(told, posts, strict=True))
    ids = sorted(event.id or "" for new in told for event in new)
    assert ids == sorted([f"e{n}" for n in range(8)] + [f"f{n}" for n in range(64)])


def test_an_event_that_the_timeline_holds_counts_once(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    """By content, not by date: one before the cut-off that training did not see still counts."""
    bundle, timeline = served.bundle, served.bundle.timeline
    user = int(timeline.user[0])
    item, at = bundle.items.ids[int(timeline.item[0]) - 1], int(timeline.time[0])
    updates.post_events([Event(bundle.users.ids[user - 1], item, at), Event("stranger", item, at)])
    overlay = updates.attach(served)
    updates.post_events([Event(bundle.users.ids[user - 1], item, at)])
    updates.post_events([Event(bundle.users.ids[user - 1], item, at + 1)])
    assert dict(overlay.view.events) == {
        bundle.users.ids[user - 1]: ((item, at + 1, 1.0),),
        "stranger": ((item, at, 1.0),),
    }


def test_only_what_is_a_positive_to_the_model_counts(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    manifest = served.bundle.manifest
    config = {
        **manifest["config"],
        "data": {
            **manifest["config"]["data"],
            "columns": {"event": "event", "positive": {"click": 1.0, "buy": 3.0}},
        },
    }
    bundle = replace(served.bundle, manifest={**manifest, "config": config})
    overlay = updates.attach(LoadedModel(bundle, None))
    item, at = bundle.items.ids[0], 2**50
    updates.post_events([Event("u", item, at + n, name, 2.0) for n, name in enumerate(
        ("click", "dislike", "buy", "shown"))])  # fmt: skip
    assert overlay.view.events["u"] == ((item, at, 2.0), (item, at + 2, 6.0))


def test_a_view_holds_the_newest_thousand_events_of_a_user(
    tmp_path: Path, served: LoadedModel
) -> None:
    item = served.bundle.items.ids[0]
    wanted = tuple((item, 2**50 + n, 1.0) for n in range(500, 1500))
    with LiveUpdates(tmp_path) as updates:
        overlay = updates.attach(served)
        for start in (1000, 0, 500):
            updates.post_events([Event("u", item, 2**50 + start + n) for n in range(500)])
        assert overlay.view.events["u"] == wanted
        assert updates.facts()["journal"]["events"] == 1500
    with LiveUpdates(tmp_path) as updates:
        assert updates.attach(served).view.events["u"] == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"user": ""}, {"item": ""}, {"event": ""}, {"time": 1.5}, {"time": True}, {"time": 2**63},
        {"strength": float("nan")}, {"strength": -1.0}, {"strength": "1"}, {"user": "\ud800"},
        {"id": ""}, {"request": 5},
    ],
)  # fmt: skip
def test_events_that_cannot_be_are_refused_whole(
    wrong: dict[str, Any], updates: LiveUpdates
) -> None:
    good = Event("u", "i", 1)
    with pytest.raises(QueryError, match=f"event's {next(iter(wrong))}"):
        updates.post_events([good, replace(good, **wrong)])
    assert not updates._users


# ---------------------------------------------------------------------------- starts and models


def test_another_bundle_takes_in_what_it_holds(
    tmp_path: Path, served: LoadedModel, other: LoadedModel, table: dict[str, dict[str, Any]]
) -> None:
    ids = served.bundle.items.ids
    same, changed, gone = (ids[int(row) - 1] for row in served.bundle.rows[:3])
    with LiveUpdates(tmp_path) as updates:
        updates.put_item(same, table[same])
        updates.put_item(changed, {**table[changed], "description": "Something else altogether."})
        updates.put_item("new", NEW)
        updates.delete_item("new")
        updates.put_item("stays", {**NEW, "title": "Thing"})
        overlay = updates.attach(served)
        assert set(overlay.view.ids) == {changed, "stays"} and overlay.folded == {same}
        assert overlay.view.hidden == {served.row_of(changed)}
        with pytest.raises(QueryError, match="no column"):
            updates.put_item("x", {"nothing": 1})
        updates.delete_item(gone)
        # A model of another shop reads what it can of the same items.
        far = updates.attach(other)
        assert set(far.view.ids) == {same, changed, "stays"} and not far.view.hidden
        assert far.view.fields["title"].to_list()[far.view.place["stays"]] == "Thing"
        updates.detach(far)
        # The other one still shows `same`, so nothing is forgotten while it is loaded.
        assert updates.prune() == {"items": 2, "events": 0}
        assert set(overlay.view.ids) == {changed, "stays"}
        assert overlay.view.hidden == {served.row_of(changed), served.row_of(gone)}
    with LiveUpdates(tmp_path) as updates:
        assert updates._items.keys() == {changed, "stays", gone}
        overlay = updates.attach(served)
        assert updates.prune(before=2**62)["items"] == 3
        assert not overlay.view.ids and not overlay.view.hidden and not updates._items


def test_an_item_that_a_later_model_cannot_read_is_left_out_and_named(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    updates.put_item("bad", {"price": "a lot"})  # no model is there to object
    updates.put_item("good", NEW)
    overlay = updates.attach(served)
    assert overlay.view.ids == ("good",) and "no number" in overlay.left_out["bad"]
    updates.put_item("bad", NEW)
    assert set(overlay.view.ids) == {"good", "bad"} and not overlay.left_out


def test_a_bundle_without_coding_refuses_items_and_serves_on(
    updates: LiveUpdates, served: LoadedModel
) -> None:
    overlay = updates.attach(LoadedModel(replace(served.bundle, coder=None), None))
    with pytest.raises(QueryError, match="Make it again"):
        updates.put_item("a", NEW)
    assert updates.delete_item(served.bundle.items.ids[0]) and overlay.view.hidden


def test_writes_go_on_while_a_model_is_attached(
    updates: LiveUpdates, served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(50):
        updates.put_item(f"i{n}", NEW)
    load, inside = Overlay.load, threading.Event()
    go_on = threading.Event()

    def slow(self: Overlay, *args: Any) -> None:
        load(self, *args)
        if not inside.is_set():
            inside.set()
            assert go_on.wait(10)

    monkeypatch.setattr(Overlay, "load", slow)
    found: list[Overlay] = []
    thread = threading.Thread(target=lambda: found.append(updates.attach(served)))
    thread.start()
    assert inside.wait(10)
    updates.put_item("meanwhile", NEW)
    updates.delete_item("i7")
    updates.post_events([Event("u", "meanwhile", 5)])
    go_on.set()
    thread.join()
    view = found[0].view
    assert set(view.ids) == {f"i{n}" for n in range(50) if n != 7} | {"meanwhile"}
    assert view.events["u"] == (("meanwhile", 5, 1.0),)


def test_a_write_that_fails_is_not_seen(
    tmp_path: Path, served: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveUpdates(tmp_path) as updates:
        overlay = updates.attach(served)

        def full(*args: Any) -> None:
            raise JournalError("The disk is full.")

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", full)
            for write in (
                lambda: updates.put_item("a", NEW),
                lambda: updates.delete_item(served.bundle.items.ids[0]),
                lambda: updates.post_events([Event("u", "a", 1)]),
            ):
                with pytest.raises(JournalError, match="full"):
                    write()
        assert overlay.view.generation == 0 and not updates._items and not updates._users
        updates.put_item("a", NEW)
        assert overlay.view.ids == ("a",)
    with pytest.raises(JournalError, match="stopping"):
        updates.put_item("b", NEW)


def test_shards_by_hand() -> None:
    one = PersistentMap[int]().changed({"a": 1, "b": 2})
    two = one.changed({"a": 3, "c": 4}, ["b", "x"])
    assert dict(one) == {"a": 1, "b": 2} and dict(two) == {"a": 3, "c": 4}
    assert (len(one), len(two)) == (2, 2) and two.get("b", 7) == 7 and "a" in two
    with pytest.raises(KeyError):
        two["b"]
