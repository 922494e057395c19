"""Live updates: batch concurrent writes into one transaction, then apply them to every model.

Order of everything: one thread writes. It takes what waits, reads the new items with every loaded
model, writes all of it to the journal in one commit, and then replaces each model's view in one go.
What cannot be read or written is refused before anything of it is taken.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from recsys.errors import BundleError, DataError, QueryError, as_exception
from recsys.features.prepared.item_coder import unknown_columns
from recsys.serving.live.journal import Change, Event, Journal, JournalError, Stored, body_of
from recsys.serving.live.overlay import EVENTS_KEPT, NewItem, Overlay, Posted

if TYPE_CHECKING:
    from recsys.serving.engine.loaded_model import LoadedModel


_INT = 2**63


@dataclass(frozen=True)
class _Item:
    """Wanted: the item is this, or None, from now on."""

    id: str
    item: Mapping[str, Any] | None
    body: bytes | None


@dataclass(frozen=True)
class _Events:
    events: tuple[Event, ...]
    new: list[Event] = field(default_factory=list)  # filled once they are written


@dataclass(frozen=True)
class _Read:
    """What one commit is to change.

    Args:
        answers: one each that waits; those of events are only known once they are written.
        now: id → body, None: deleted.
        events: of all who wait, in their order.
        puts: the items as each model reads them.
        at: microseconds of the commit.
    """

    answers: list[int | Exception]
    now: dict[str, bytes | None]
    events: list[Event]
    puts: list[list[NewItem]]
    at: int


@dataclass
class _Attaching:
    """What changed while a model was being told everything."""

    items: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)


class LiveUpdates:
    """Items and events that come while models serve; thread-safe, and blocking.

    PUT of an item that a bundle knows replaces its description and keeps the id vector that was
    learned of it; of any other item the towers read the content alone. DELETE hides an item, PUT
    after DELETE shows it again. An event counts in its user's history at once; one on an item that
    nobody knows is kept, and counts from when the item comes. What a newer bundle already holds
    drops out of that bundle's overlay by content, not by date: an item that it describes alike, an
    event that stands in its timeline, the deletion of an item that it has not. So an event that
    training did not get to see still counts, and an item that the bundle describes otherwise stays
    as it was put, until `prune` forgets it.

    Args:
        path: folder of the journal; None: in memory, lost at the end.

    Raises:
        JournalError: the journal is open elsewhere, damaged, or cannot be written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._journal = None if path is None else Journal(path)
        self._lock = threading.RLock()
        self._overlays: tuple[Overlay, ...] = ()
        self._attaching: list[_Attaching] = []
        self._items: dict[str, bytes | None] = {}
        self._put_at: dict[str, int] = {}
        self._users: dict[str, tuple[Posted, ...]] = {}
        self._seq, self._ids = 0, set[str]()  # without a journal
        if self._journal is not None:
            for id, put_at, body in self._journal.items():
                self._items[id], self._put_at[id] = body, put_at
            self._replay(self._journal)
        self._last_put = max(self._put_at.values(), default=0)
        self._writers = GroupCommit(self._write, most=256, name="journal")

    def _replay(self, journal: Journal) -> None:
        came: dict[str, list[Posted]] = {}
        for stored in journal.events():
            events = came.setdefault(stored.event.user, [])
            events.append(_posted(stored))
            if len(events) >= 2 * EVENTS_KEPT:
                came[stored.event.user] = sorted(events)[-EVENTS_KEPT:]
        self._users = {user: tuple(sorted(events)[-EVENTS_KEPT:]) for user, events in came.items()}

    # ------------------------------------------------------------------ models

    def attach(self, model: LoadedModel) -> Overlay:
        """Read every live item with this model, and keep its overlay up to date from now on.

        Writes go on meanwhile. Items that this model cannot read are left out of its overlay and
        named in `Overlay.left_out`.
        """
        overlay, changed = Overlay(model), _Attaching()
        with self._lock:
            items, users, put_at = dict(self._items), dict(self._users), dict(self._put_at)
            self._attaching.append(changed)
        try:
            overlay.load(items, users, put_at)
            with self._lock:
                overlay.change((), forgotten=changed.forgotten - changed.items)
                overlay.load(
                    {id: self._items[id] for id in changed.items},
                    {user: self._users.get(user, ()) for user in changed.users},
                    self._put_at,
                )
                self._overlays = (*self._overlays, overlay)
        finally:
            with self._lock:
                # By identity: two that have met no change are equal.
                self._attaching = [one for one in self._attaching if one is not changed]
        return overlay

    def detach(self, overlay: Overlay) -> None:
        """Keep the overlay up to date no more; its last view stays as it is."""
        with self._lock:
            self._overlays = tuple(one for one in self._overlays if one is not overlay)

    # ------------------------------------------------------------------ writing

    def put_item(self, id: str, item: Mapping[str, Any]) -> None:
        """Add or replace an item; it is on disk and can be found when this returns.

        Args:
            id: external id.
            item: columns of the item table → JSON values: text, title, categories (one or a list),
                numbers, vector, times (ISO 8601, or a number since 1970), fields. What is not
                said is not known: nothing is kept from before.

        Raises:
            QueryError: a column is unknown to every loaded model, or its value cannot be read.
            JournalError: it cannot be written; the item is as it was.
        """
        _check_text("The item's id", id)
        if not isinstance(item, Mapping) or not all(isinstance(name, str) for name in item):
            raise QueryError("An item is an object: column names and values.")
        body = body_of(dict(item))
        # As a start will read it.
        self._ask(_Item(id, json.loads(body), body))

    def delete_item(self, id: str) -> bool:
        """Take an item away, be it from a bundle or put; it is not found when this returns.

        Returns:
            Whether anything was there.

        Raises:
            JournalError: it cannot be written; the item is as it was.
        """
        _check_text("The item's id", id)
        return bool(self._ask(_Item(id, None, None)))

    def post_events(self, events: Sequence[Event]) -> list[Event]:
        """Remember what users did, all of it or nothing.

        Returns:
            Those that were new; one whose id came before counts no second time.

        Raises:
            QueryError: an event says something that cannot be.
            JournalError: they cannot be written; none was taken.
        """
        for event in events:
            _check_event(event)
        wanted = _Events(tuple(events))
        if events:
            self._ask(wanted)
        return wanted.new

    def _ask(self, wanted: _Item | _Events) -> int:
        try:
            return self._writers(wanted)
        except RuntimeError as error:
            if isinstance(error, JournalError) or not self._writers.closed:
                raise
            raise JournalError("The journal is closed: the service is stopping.") from None

    def _write(self, wanted: Sequence[_Item | _Events]) -> list[int | Exception]:
        """One commit for all that waits; each answered, or with the reason it was refused."""
        with self._lock:
            try:
                read = self._read(wanted)
                changes = [Change(id, body) for id, body in read.now.items()]
                places = self._append(changes, read.events, read.at)
            except JournalError as error:
                return [error] * len(wanted)
            except BaseException as error:  # a panic of Polars is no Exception
                if len(wanted) == 1:
                    return [as_exception(error)]
            else:
                return self._take(wanted, read, places)
            # One of them spoils it for all, and nothing of it is taken: one at a time.
            return [self._write([one])[0] for one in wanted]

    def _read(self, wanted: Sequence[_Item | _Events]) -> _Read:
        """All of it as every model reads it; nothing is changed."""
        answers: list[int | Exception] = []
        now: dict[str, bytes | None] = {}
        read: list[dict[str, Any]] = [{} for _ in self._overlays]
        events: list[Event] = []
        for one in wanted:
            if isinstance(one, _Events):
                answers.append(0)
                events += one.events
            elif one.item is None:
                there = self._there(one.id, now)
                answers.append(int(there))
                if there:
                    now[one.id] = None
            else:
                said = self._describe(one.item)
                for each, described in zip(read, said, strict=True):
                    each[one.id] = described
                now[one.id] = one.body
                answers.append(1)
        # Rises with every commit, whatever the clock does: pages tell by it what came after them.
        at = self._last_put = max(time.time_ns() // 1000, self._last_put + 1)
        put_at = dict.fromkeys(now, at)
        puts = [
            _newcomers(
                overlay, [(id, *each[id]) for id, body in now.items() if body is not None], put_at
            )
            for overlay, each in zip(self._overlays, read, strict=True)
        ]
        return _Read(answers, now, events, puts, at)

    def _take(
        self, wanted: Sequence[_Item | _Events], read: _Read, places: Sequence[int | None]
    ) -> list[int | Exception]:
        """Show what is on disk now, and answer each."""
        answers, now, events = read.answers, read.now, read.events
        self._items |= now
        self._put_at |= dict.fromkeys(now, read.at)
        users = self._remember(
            Stored(seq, event) for seq, event in zip(places, events, strict=True) if seq is not None
        )
        gone = [id for id, body in now.items() if body is None]
        for overlay, newcomers in zip(self._overlays, read.puts, strict=True):
            overlay.change(newcomers, gone, users)
        for attaching in self._attaching:
            attaching.items |= now.keys()
            attaching.users |= users.keys()
        # Which of each caller's events were new.
        start = 0
        for place, one in enumerate(wanted):
            if isinstance(one, _Events):
                end = start + len(one.events)
                pairs = zip(one.events, places[start:end], strict=True)
                one.new[:] = [event for event, seq in pairs if seq is not None]
                answers[place] = len(one.new)
                start = end
        return answers

    def _there(self, id: str, now: Mapping[str, bytes | None]) -> bool:
        for state in (now, self._items):
            if id in state:
                return state[id] is not None
        return any(overlay.model.row_of(id) for overlay in self._overlays)

    def _describe(self, item: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """What each model reads of an item."""
        try:
            if self._overlays:
                names = (name for overlay in self._overlays for name in overlay.columns)
                unknown_columns(item, list(dict.fromkeys(names)))
            return [overlay.describe(item) for overlay in self._overlays]
        except BundleError as error:  # to whoever sends an item, it cannot be taken
            raise QueryError(str(error)) from error

    def _append(
        self, changes: Sequence[Change], events: Sequence[Event], at: int
    ) -> list[int | None]:
        if self._journal is not None:
            return self._journal.append(changes, events, at)
        places: list[int | None] = []
        for event in events:
            new = event.id is None or event.id not in self._ids
            if event.id is not None:
                self._ids.add(event.id)
            self._seq += new
            places.append(self._seq if new else None)
        return places

    def _remember(self, events: Iterable[Stored]) -> dict[str, tuple[Posted, ...]]:
        """Put events into their users' kept ones; those users and what is kept of them."""
        came: dict[str, list[Posted]] = {}
        for stored in events:
            came.setdefault(stored.event.user, []).append(_posted(stored))
        users = {
            user: tuple(sorted((*self._users.get(user, ()), *new))[-EVENTS_KEPT:])
            for user, new in came.items()
        }
        self._users |= users
        return users

    # ------------------------------------------------------------------ the journal

    def prune(self, before: int | None = None) -> dict[str, int]:
        """Forget what every loaded model holds by itself; from the journal too, for good.

        Not done by itself, but by `recsys prune`: a service that goes back to an older bundle needs
        what came since.

        Args:
            before: microseconds; items put or deleted before that moment are forgotten whether or
                not the bundles have them: what the bundles say of them holds again.

        Returns:
            How many items and events were forgotten.

        Raises:
            JournalError: the journal cannot be written; nothing was forgotten.
        """
        with self._lock:
            if not self._overlays:
                return {"items": 0, "events": 0}
            away = [id for id in self._items if self._folded(id, before)]
            cutoffs = [overlay.bundle.cutoff for overlay in self._overlays]
            cutoff = None if None in cutoffs else min(c for c in cutoffs if c is not None)
            kept = {user: self._standing(events) for user, events in self._users.items()}
            changed = {u: e for u, e in kept.items() if len(e) != len(self._users[u])}
            lost = sum(len(self._users[user]) - len(events) for user, events in changed.items())
            counts = {"items": len(away), "events": lost}
            if self._journal is not None:
                standing = (event.seq for events in kept.values() for event in events)
                _, counts["events"] = self._journal.prune(away, cutoff, standing)
            for id in away:
                del self._items[id], self._put_at[id]
            self._users |= changed
            for overlay in self._overlays:
                overlay.change((), (), changed, forgotten=away)
                overlay.folded.difference_update(away)
                for id in away:
                    overlay.left_out.pop(id, None)
            for attaching in self._attaching:
                attaching.items -= set(away)
                attaching.forgotten.update(away)
                attaching.users |= changed.keys()
            self._users = {user: events for user, events in self._users.items() if events}
            return counts

    def _folded(self, id: str, before: int | None) -> bool:
        if before is not None and self._put_at[id] < before:
            return True
        if self._items[id] is None:
            return not any(overlay.model.row_of(id) for overlay in self._overlays)
        return all(id in overlay.folded for overlay in self._overlays)

    def _standing(self, events: tuple[Posted, ...]) -> tuple[Posted, ...]:
        """The events that at least one model does not hold."""
        return tuple(
            event
            for event in events
            if not all(overlay.has_taken(event.seq) for overlay in self._overlays)
        )

    def facts(self) -> dict[str, Any]:
        """Counts for metrics: items put and deleted, users with events, the journal's size."""
        with self._lock:
            deleted = sum(body is None for body in self._items.values())
            return {
                "items": len(self._items) - deleted,
                "deleted": deleted,
                "users": len(self._users),
                "models": [
                    {
                        "version": overlay.model.version,
                        "items": len(overlay.view.ids),
                        "hidden": len(overlay.view.hidden),
                        "folded": len(overlay.folded),
                        "left_out": len(overlay.left_out),
                        "generation": overlay.view.generation,
                    }
                    for overlay in self._overlays
                ],
                "journal": None if self._journal is None else self._journal.count(),
            }

    def close(self) -> None:
        """Finish what waits and close the journal; later writes are refused."""
        self._writers.close()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> LiveUpdates:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _newcomers(
    overlay: Overlay, items: Sequence[tuple[str, Any, Any]], put_at: Mapping[str, int]
) -> list[NewItem]:
    """Items through a model's item tower.

    Raises:
        QueryError: the tower gives no finite vector for one of them.
    """
    if not items:
        return []
    try:
        newcomers, encoded = overlay.encode(items, put_at)
    except (BundleError, DataError) as error:
        raise QueryError(str(error)) from error
    finite = np.isfinite(encoded.vectors).all(1) & np.isfinite(encoded.entries).all(1)
    if not finite.all():
        raise QueryError(
            f"The item tower gives no finite vector for item "
            f"{items[int(np.flatnonzero(~finite)[0])][0]!r}. Look at its numbers and its vector."
        )
    return newcomers


def _posted(stored: Stored) -> Posted:
    event = stored.event
    return Posted(event.time, stored.seq, event.item, event.strength, event.event)


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise QueryError(f"{what} is {value!r}; give a text that is not empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise QueryError(f"{what} is {value!r}, which is no valid Unicode.") from None


def _check_event(event: Event) -> None:
    for name in ("user", "item", "event"):
        _check_text(f"An event's {name}", getattr(event, name))
    for name in ("request", "id"):
        if getattr(event, name) is not None:
            _check_text(f"An event's {name}", getattr(event, name))
    if isinstance(event.time, bool) or not isinstance(event.time, int):
        raise QueryError(f"An event's time is {event.time!r}; give microseconds since 1970.")
    if not -_INT <= event.time < _INT:
        raise QueryError(f"An event's time is {event.time}, which is out of bounds.")
    strength = event.strength
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise QueryError(f"An event's strength is {strength!r}; give a number.")
    if not (math.isfinite(strength) and 0 <= strength <= 1e6):
        raise QueryError(f"An event's strength is {strength!r}; give a number from 0 to 1,000,000.")


T = TypeVar("T")
R = TypeVar("R")


class GroupCommit(Generic[T, R]):
    """One worker thread behind many callers.

    Args:
        work: is given what waits, in order, and answers each with a result or an exception to
            raise; what it raises itself is raised to all of them.
        most: of one go.
        name: of the thread.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R | Exception]],
        *,
        most: int = 1024,
        name: str = "together",
    ) -> None:
        self._work, self._most = work, most
        self._waiting: deque[tuple[T, Future[R]]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, asked: T) -> R:
        """Have it done; blocks until it is.

        Raises:
            RuntimeError: closed.
        """
        future: Future[R] = Future()
        with self._change:
            if self._closed:
                raise RuntimeError("It is closed.")
            self._waiting.append((asked, future))
            self._change.notify()
        try:
            return future.result()
        finally:
            del future  # an error holds this frame: a cycle, with all that its traceback reaches

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Do what waits, then end the thread; a second call does nothing."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if not self._waiting:
                    return
                some = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            self._do(some)
            del some  # while waiting for more, nothing of the last is held

    def _do(self, some: list[tuple[T, Future[R]]]) -> None:
        try:
            done = self._work([asked for asked, _ in some])
        except BaseException as error:  # to those who wait, who would else wait for ever
            for _, future in some:
                future.set_exception(error)
        else:
            for (_, future), result in zip(some, done, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            del done, result
        # The frames that an error's traceback holds lead here: it must not be found from here.
        del future
        some.clear()
