"""Journal of items and events: durable before it is acknowledged.

One SQLite file in WAL mode, one process. Every commit waits for the disk (synchronous = FULL), and
many writers share one commit (`recsys.serving.live.updates`). This file imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recsys.errors import QueryError, RecsysError

FORMAT_VERSION = 1
FILE, LOCK = "journal.sqlite", "journal.lock"
_APPLICATION = 0x52454353
"""Marks the file as ours, in SQLite's `application_id`."""
_TABLES = """
CREATE TABLE items (
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, put_at INTEGER NOT NULL, body BLOB
) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, user TEXT NOT NULL, item TEXT NOT NULL,
    time INTEGER NOT NULL, event TEXT NOT NULL, strength REAL NOT NULL, request TEXT
);
CREATE UNIQUE INDEX events_by_id ON events (id) WHERE id IS NOT NULL;
"""


class JournalError(RecsysError):
    """The journal cannot be opened, read or written; nothing was taken."""


@dataclass(frozen=True)
class Event:
    """What a user did with an item.

    Args:
        user, item: external ids.
        time: microseconds since 1970.
        event: what happened.
        strength: multiplies what the event's name counts for.
        request: the answer that it goes back to.
        id: the sender's own; the same id twice counts once.
    """

    user: str
    item: str
    time: int
    event: str = "click"
    strength: float = 1.0
    request: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Change:
    """An item as it is from now on.

    Args:
        id: external id.
        body: JSON of the item; None: it was deleted.
    """

    id: str
    body: bytes | None


@dataclass(frozen=True)
class Stored:
    """An event and its place in the journal."""

    seq: int
    event: Event


def body_of(item: Any) -> bytes:
    """The JSON that is stored of an item, dates and times in ISO 8601.

    Raises:
        QueryError: it cannot be said in JSON.
    """
    try:
        text = json.dumps(
            item, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_iso
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise QueryError(f"The item cannot be written as JSON: {error}.") from None


def _iso(value: Any) -> str:
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    raise TypeError(f"{value!r} has no form in it")


class Journal:
    """Newest state of each item, and every event, in one folder.

    Args:
        folder: made if it is not there.
        patience: seconds to wait for another program that holds the database.

    Raises:
        JournalError: another process has it open, or it is damaged, of a later version or on a
            disk that cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, patience: float = 2.0) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout:
            raise JournalError(
                f"The journal {self.folder} is open in another process. One process writes a "
                "journal: stop the other service, or name another folder."
            ) from None
        except OSError as error:
            raise JournalError(
                f"The folder {self.folder} cannot be used for a journal: {error}. Make it "
                "writable, or name another one."
            ) from error
        self._mutex = threading.Lock()
        try:
            # Autocommit: every transaction is begun and ended by name.
            self._db = sqlite3.connect(
                self.folder / FILE,
                timeout=patience,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            self._lock.release()
            raise self._complaint(error) from error
        try:
            with self._explained():
                self._open()
        except BaseException:
            self._db.close()
            self._lock.release()
            raise

    def _open(self) -> None:
        db = self._db
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        if not empty and application != _APPLICATION:
            raise JournalError(
                f"{self.folder / FILE} is a database, but no journal of recsys. Name another "
                "folder."
            )
        if not empty and version != FORMAT_VERSION:
            raise JournalError(
                f"{self.folder / FILE} has format version {version}; this recsys reads "
                f"{FORMAT_VERSION}. Use the recsys that wrote it."
            )
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(
                f"SQLite cannot use a write-ahead log in {self.folder} (it says {mode!r}); a "
                "network disk cannot. Name a folder on a local disk."
            )
        db.execute("PRAGMA synchronous = FULL")
        if empty:
            with self._transaction():
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        else:
            said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if said != "ok":
                raise self._complaint(sqlite3.DatabaseError(said.splitlines()[-1]))
        self._seq = db.execute("SELECT coalesce(max(seq), 0) FROM items").fetchone()[0]

    # ------------------------------------------------------------------ writing

    def append(
        self, changes: Sequence[Change] = (), events: Sequence[Event] = (), now: int | None = None
    ) -> list[int | None]:
        """Write all of it in one transaction; it is on disk when this returns.

        Args:
            changes: items put or deleted, in order; the last of an id counts.
            events: what users did.
            now: microseconds; when the changes were made.

        Returns:
            Place of each event; None: an event with its id was there before.

        Raises:
            JournalError: the disk is full, the database is locked or damaged. Nothing was written.
        """
        now = time.time_ns() // 1000 if now is None else now
        with self._mutex, self._explained(), self._transaction():
            numbered = enumerate(changes, self._seq + 1)
            self._db.executemany(
                "INSERT INTO items (id, seq, put_at, body) VALUES (?, ?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET seq = excluded.seq, put_at = excluded.put_at, body = excluded.body",
                [(change.id, seq, now, change.body) for seq, change in numbered],
            )
            places = [self._insert(event) for event in events]
        self._seq += len(changes)
        return places

    def _insert(self, event: Event) -> int | None:
        # One at a time: executemany does not tell which of them were there before.
        done = self._db.execute(
            "INSERT INTO events (id, user, item, time, event, strength, request) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                event.id, event.user, event.item, event.time,
                event.event, event.strength, event.request,
            ),
        )  # fmt: skip
        return done.lastrowid if done.rowcount else None

    def prune(
        self,
        items: Iterable[str] = (),
        events_before: int | None = None,
        keep: Iterable[int] = (),
    ) -> tuple[int, int]:
        """Forget what a bundle has taken in, and give its room back to the disk.

        Args:
            items: ids to forget, put or deleted.
            events_before: microseconds; events strictly before are forgotten …
            keep: … but those at these places.

        Returns:
            How many items and events were forgotten.
        """
        with self._mutex, self._explained():
            with self._transaction():
                db = self._db
                gone = db.executemany("DELETE FROM items WHERE id = ?", [(id,) for id in items])
                n_items, n_events = max(gone.rowcount, 0), 0
                if events_before is not None:
                    db.execute("CREATE TEMP TABLE kept (seq INTEGER PRIMARY KEY)")
                    db.executemany("INSERT INTO kept VALUES (?)", [(seq,) for seq in keep])
                    n_events = db.execute(
                        "DELETE FROM events WHERE time < ? AND seq NOT IN (SELECT seq FROM kept)",
                        (events_before,),
                    ).rowcount
                    db.execute("DROP TABLE kept")
            if n_items or n_events:
                self._db.execute("VACUUM")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return n_items, n_events

    # ------------------------------------------------------------------ reading

    def items(self) -> list[tuple[str, int, bytes | None]]:
        """Id, microseconds of its last change and body of every item, oldest change first."""
        with self._mutex, self._explained():
            rows = self._db.execute("SELECT id, put_at, body FROM items ORDER BY seq")
            return rows.fetchall()

    def events(self) -> Iterator[Stored]:
        """Every event in the order in which they came; a block at a time, while others write."""
        seq = 0
        while True:
            with self._mutex, self._explained():
                rows = self._db.execute(
                    "SELECT seq, user, item, time, event, strength, request, id FROM events "
                    "WHERE seq > ? ORDER BY seq LIMIT 65536",
                    (seq,),
                ).fetchall()
            if not rows:
                return
            seq = rows[-1][0]
            for place, *event in rows:
                yield Stored(place, Event(*event))

    def count(self) -> dict[str, int]:
        """Rows of each table, and bytes on disk."""
        with self._mutex, self._explained():
            counts = {
                name: self._db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("items", "events")
            }
        files = [self.folder / f"{FILE}{end}" for end in ("", "-wal")]
        return {**counts, "bytes": sum(file.stat().st_size for file in files if file.exists())}

    def close(self) -> None:
        """Close the database and let others open it; a second call does nothing."""
        with self._mutex:
            self._db.close()
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # ------------------------------------------------------------------ both

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._complaint(error) from error

    def _complaint(self, error: sqlite3.Error) -> JournalError:
        file, name = self.folder / FILE, getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_FULL"):
            text = f"The disk of {file} is full: nothing was taken. Make room and send it again."
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            text = (
                f"Another program holds {file} locked: nothing was taken. Close it (a database "
                "browser, a backup) and send it again."
            )
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            text = f"{file} cannot be written ({error}). Look at its owner and rights."
        elif name.startswith("SQLITE_IOERR"):
            text = f"The disk failed under {file} ({error}): nothing was taken. Look at the disk."
        elif isinstance(error, sqlite3.ProgrammingError):
            text = f"The journal {self.folder} is closed."
        else:
            text = (
                f"{file} is damaged ({error}). Put a copy of the folder in its place, or move it "
                "away: the items and events that came since the last bundle are then lost."
            )
        return JournalError(text)
