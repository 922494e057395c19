"""Writes, starts and swaps in any order, against a naive twin."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
from conftest import Built
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serving_cases import NEW
from serving_cases import table as table

from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.live.journal import Event
from recsys.serving.live.new_items import encode_described
from recsys.serving.live.updates import LiveUpdates


@pytest.fixture(scope="module")
def served(tiny: Built) -> LoadedModel:
    return LoadedModel.load(tiny.bundle)


class Machine(RuleBasedStateMachine):
    """Twin: one dict of items, one list of events, everything looked through every time."""

    served: LoadedModel
    table: dict[str, dict[str, Any]]

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.updates = LiveUpdates(self.folder.name)
        self.overlay = self.updates.attach(self.served)
        self.items: dict[str, dict[str, Any] | None] = {}
        self.events: list[Event] = []
        ids = self.served.bundle.items.ids
        self.known = [ids[int(row) - 1] for row in self.served.bundle.rows[:3]]

    def teardown(self) -> None:
        if hasattr(self, "living"):
            self.updates.close()
            self.folder.cleanup()

    def id(self, n: int) -> str:
        return [*self.known, "new0", "new1", "new2"][n]

    @rule(n=st.integers(0, 5), price=st.integers(1, 3))
    def put(self, n: int, price: int) -> None:
        self.items[self.id(n)] = {**NEW, "price": price}
        self.updates.put_item(self.id(n), {**NEW, "price": price})

    @rule(n=st.integers(0, 2))
    def put_as_it_was(self, n: int) -> None:
        self.items[self.id(n)] = self.table[self.id(n)]
        self.updates.put_item(self.id(n), self.table[self.id(n)])

    @rule(n=st.integers(0, 5))
    def delete(self, n: int) -> None:
        id = self.id(n)
        there = self.items[id] is not None if id in self.items else n < 3
        if there:
            self.items[id] = None
        assert self.updates.delete_item(id) == there

    @rule(
        user=st.sampled_from("ab"), n=st.integers(0, 5), time=st.integers(0, 5),
        key=st.none() | st.integers(0, 3),
    )  # fmt: skip
    def post(self, user: str, n: int, time: int, key: int | None) -> None:
        event = Event(user, self.id(n), 2**51 + time, id=None if key is None else str(key))
        new = key is None or all(one.id != str(key) for one in self.events)
        assert self.updates.post_events([event]) == [event] * new
        if new:
            self.events.append(event)

    @rule()
    def start_again(self) -> None:
        self.updates.close()
        self.updates = LiveUpdates(self.folder.name)
        self.overlay = self.updates.attach(self.served)

    @rule()
    def swap(self) -> None:
        old, self.overlay = self.overlay, self.updates.attach(self.served)
        self.updates.detach(old)

    @precondition(lambda self: hasattr(self, "living"))
    @rule()
    def prune(self) -> None:
        self.updates.prune()
        kept = self.updates._items
        # What was forgotten is what the bundle says without it.
        for id in [id for id in self.items if id not in kept]:
            item = self.items.pop(id)
            assert item == self.table.get(id) if id in self.known else item is None

    @invariant()
    def the_view_says_what_the_twin_says(self) -> None:
        if not hasattr(self, "living"):
            return
        view, hidden = self.overlay.view, set()
        for n in range(6):
            id = self.id(n)
            row, item = self.served.row_of(id), self.items.get(id)
            untouched = id not in self.items or (
                item == self.table.get(id) and id not in view.place
            )
            if untouched:
                assert id not in view.place
                continue
            if row:
                hidden.add(row)
            if item is None:
                assert id not in view.place
            else:
                place = view.place[id]
                assert view.ids[place] == id
                assert view.fields["price"][place] == item["price"]
                assert view.fields["title"][place] == item["title"]
                wanted = self.vector(id, item)
                np.testing.assert_allclose(view.vectors[place], wanted, atol=1e-5)
        assert view.hidden == hidden
        assert view.hidden_positions.tolist() == sorted(self.served.position[list(hidden)].tolist())
        assert len(view.ids) == len(view.place) == len(view.vectors) == len(view.fields)
        for user in "ab":
            told = sorted(
                (event.time, n, event.item)
                for n, event in enumerate(self.events)
                if event.user == user and (event.item in self.known or event.item in view.place)
            )
            assert [(i, t) for i, t, _ in view.events.get(user, ())] == [(i, t) for t, _, i in told]

    _vectors: dict[tuple[str, float], np.ndarray] = {}  # noqa: RUF012

    def vector(self, id: str, item: dict[str, Any]) -> np.ndarray:
        key = (self.served.row_of(id), item["price"], item["title"])
        if key not in self._vectors:
            coder = self.served.bundle.coder
            assert coder is not None
            encoded = encode_described(
                self.served.bundle, [coder.describe(item)], np.array([key[0]], np.int64)
            )
            self._vectors[key] = encoded.vectors[0]
        return self._vectors[key]


def test_any_history_of_writes_starts_and_swaps(
    served: LoadedModel, table: dict[str, dict[str, Any]]
) -> None:
    class Bound(Machine):
        pass

    Bound.served, Bound.table = served, table
    case = Bound.TestCase
    case.settings = settings(
        max_examples=30, stateful_step_count=25, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    case("runTest").runTest()
