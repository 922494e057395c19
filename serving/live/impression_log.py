"""Impression log: items shown and events, as Parquet that the next training reads.

One row an item shown or an event. `experiments/recipes/served.toml` has the `[data]` section that
reads the folder back: clicks as positives, with what was shown beside them and at which positions.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import polars as pl
from filelock import FileLock, Timeout

from recsys.errors import DataError
from recsys.files import atomic_write
from recsys.serving.live.journal import Event

log = logging.getLogger("recsys.serve")

SHOWN = "shown"
NOBODY = "request:"
"""Begins the user of an answer to nobody in particular."""
SCHEMA = {
    "user": pl.String,
    "item": pl.String,
    "time": pl.Int64,
    "event": pl.String,
    "request": pl.String,
    "position": pl.Int32,
    "propensity": pl.Float32,
    "weight": pl.Float32,
    "variant": pl.String,
    "model": pl.String,
}
"""Columns of a part: times are microseconds since 1970, positions count from 1."""


class _Shown(NamedTuple):
    request: str
    user: str | None
    time: int
    items: Sequence[str]
    variant: str
    model: str
    propensity: Sequence[float] | None
    first: int


class ImpressionLog:
    """Appends to a folder of Parquet parts, from a thread of its own.

    `shown` and `events` never wait for the disk. Rows lie in memory until `seconds` have passed or
    `rows` have gathered, so a killed process loses at most what came within the last `seconds`;
    `close` loses nothing. A part that cannot be written (a full disk) is tried again. Where
    writing falls behind for so long that `most` rows wait, new ones are dropped, and counted: an
    answer is worth more than the record of it. One process writes a folder.

    An answer to nobody in particular is noted as of a user of its own, `request:ID`.

    Args:
        folder: made if it is not there.
        seconds: between two parts.
        rows: of one part, about.
        most: rows that may wait in memory.

    Attributes:
        written: rows on disk.
        dropped: rows that were not taken.
        failures: how often a part could not be written.
        last_error: why not, the last time; None once writing went well again.

    Raises:
        DataError: another process writes the folder, or it cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        seconds: float = 1.0,
        rows: int = 50_000,
        most: int = 1_000_000,
    ) -> None:
        self.folder, self.seconds, self.rows, self.most = Path(folder), seconds, rows, most
        self.written = self.dropped = self.failures = 0
        self.last_error: str | None = None
        self._waiting: deque[_Shown | Event] = deque()
        self._size = 0
        self._change = threading.Condition()
        self._closed = False
        self._writing = threading.Lock()
        self._parts = Parts(self.folder)
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ taking

    def shown(
        self,
        request: str,
        user: str | None,
        time: int,
        items: Sequence[str],
        variant: str,
        model: str,
        propensity: Sequence[float] | None = None,
        *,
        first: int = 1,
    ) -> bool:
        """Note an answer.

        Args:
            request: its id; events that go back to it name it.
            user: who asked, or None.
            time: microseconds.
            items: what was answered, best first.
            variant, model: who answered.
            propensity: probability that each item was to be shown in its place.
            first: position of the first item; more than 1 on a later page.

        Returns:
            False: dropped.
        """
        if propensity is not None and len(propensity) != len(items):
            raise ValueError(f"{len(propensity)} propensities for {len(items)} items.")
        one = _Shown(request, user, time, items, variant, model, propensity, first)
        return self._take([one], len(items))

    def events(self, events: Sequence[Event]) -> bool:
        """Note what users did, all of it or nothing; False: dropped."""
        return self._take(events, len(events))

    def _take(self, some: Iterable[_Shown | Event], rows: int) -> bool:
        with self._change:
            if self._closed or self._size + rows > self.most:
                self.dropped += rows
                return False
            self._waiting.extend(some)
            before, self._size = self._size, self._size + rows
            if before < self.rows <= self._size:
                self._change.notify_all()
            return True

    @property
    def waiting(self) -> int:
        """Rows in memory."""
        return self._size

    @property
    def alive(self) -> bool:
        """Whether the thread that writes lives; it ends with `close` alone."""
        return self._thread.is_alive()

    # ------------------------------------------------------------------ writing

    def flush(self) -> None:
        """Write what waits now, in this thread.

        Raises:
            OSError: it cannot be written; it waits on.
            Exception: as much, for a reason that nobody thought of.
        """
        with self._writing:
            try:
                while self._waiting:
                    self._write_part()
            except Exception as error:
                self._failed(error)
                raise

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        said = str(error) or type(error).__name__
        if said != self.last_error:  # a disk stays full for hours, and is tried every second
            log.error(
                "The impression log %s cannot be written; %d rows wait, and are tried again: %s",
                self.folder,
                self._size,
                said,
                exc_info=None if isinstance(error, OSError) else error,
            )
        self.last_error = said

    def close(self) -> None:
        """Write what waits and end; a second call does nothing.

        Raises:
            DataError: it cannot be written; how many rows are lost.
        """
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        try:
            self.flush()
            self._parts.close()
        except Exception as error:
            raise DataError(
                f"{self._size} rows of the impression log cannot be written to {self.folder}: "
                f"{error}. Make room before the service is started again."
            ) from error

    def __enter__(self) -> ImpressionLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._change:
                if not self._closed:
                    self._change.wait_for(
                        lambda: self._closed or self._size >= self.rows, self.seconds
                    )
                if self._closed:
                    return  # `close` writes the rest
            try:
                self.flush()
            except Exception:
                # Noted in `failures`; whatever it is, what comes next wants a thread that writes.
                # A full disk is not worth a try every millisecond.
                time.sleep(min(self.seconds, 1.0))

    def _write_part(self) -> None:
        """Write about `rows` rows; what cannot be written goes back to where it was."""
        with self._change:
            some, size = [], 0
            while self._waiting and size < self.rows:
                one = self._waiting.popleft()
                size += len(one.items) if isinstance(one, _Shown) else 1
                some.append(one)
        try:
            self._parts.write(_frame(some))
        except Exception:
            with self._change:
                self._waiting.extendleft(reversed(some))
            raise
        if self.last_error is not None:
            log.warning("The impression log %s is written again.", self.folder)
        with self._change:
            self.last_error = None
            self._size -= size
            self.written += size


def _frame(some: Sequence[_Shown | Event]) -> pl.DataFrame:
    """Rows of a part, answers first, each in the order in which they came."""
    answers = [one for one in some if isinstance(one, _Shown)]
    events = [one for one in some if isinstance(one, Event)]
    shown = pl.DataFrame(
        {
            "request": [one.request for one in answers],
            "user": [one.user for one in answers],
            "time": [one.time for one in answers],
            "item": [list(one.items) for one in answers],
            "propensity": [
                [None] * len(one.items) if one.propensity is None else list(one.propensity)
                for one in answers
            ],
            "position": [list(range(one.first, one.first + len(one.items))) for one in answers],
            "variant": [one.variant for one in answers],
            "model": [one.model for one in answers],
        },
        schema_overrides={
            **{name: SCHEMA[name] for name in ("request", "user", "time", "variant", "model")},
            **{name: pl.List(SCHEMA[name]) for name in ("item", "propensity", "position")},
        },
    ).explode("item", "propensity", "position", empty_as_null=False)
    shown = shown.with_columns(event=pl.lit(SHOWN), weight=pl.lit(1.0))
    did = pl.DataFrame(
        {
            "user": [one.user for one in events],
            "item": [one.item for one in events],
            "time": [one.time for one in events],
            "event": [one.event for one in events],
            "request": [one.request for one in events],
            "weight": [one.strength for one in events],
        },
        schema={n: SCHEMA[n] for n in ("user", "item", "time", "event", "request", "weight")},
    )
    nobody = pl.col("user").is_null() | (pl.col("user") == "")
    whole = pl.concat([shown.cast({"weight": pl.Float32}), did], how="diagonal_relaxed")
    # A click on an answer to nobody names its request, and so finds it again.
    return whole.with_columns(
        pl.when(nobody).then(pl.lit(NOBODY) + pl.col("request")).otherwise("user").alias("user")
    ).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


log = logging.getLogger("recsys.serve")

FULL_PARTS, FULL_ROWS = 600, 1_000_000
"""When the parts of an open folder become one file."""
JOIN_AGAIN = 60.0
"""Seconds after which full folders that could not become one file are tried again."""


class Parts:
    """Writes parts; not thread-safe.

    Args:
        folder: made if it is not there.
        parts, rows: when parts become one file.

    Raises:
        DataError: another process writes the folder, or it cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, parts: int = FULL_PARTS, rows: int = FULL_ROWS
    ) -> None:
        self.folder, self._most = Path(folder), (parts, rows)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock", timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout:
            raise DataError(
                f"Another process writes the log {self.folder}. Stop the other service, or name "
                "another folder."
            ) from None
        except OSError as error:
            raise DataError(
                f"The folder {self.folder} cannot be used for a log: {error}."
            ) from error
        self._last = self._count = self._rows = 0
        self._full: list[Path] = []  # open folders that are to become one file
        self._join_at = 0.0  # monotonic seconds, before which none is tried
        self._recover()
        self._begin()

    def write(self, frame: pl.DataFrame) -> Path:
        """Write a part; it is on disk when this returns.

        Raises:
            OSError: it cannot be written, and is not there.
        """
        path = self._open / f"{self._now()}.parquet"
        try:
            with atomic_write(path) as temporary:
                frame.write_parquet(temporary, compression="zstd")
        except (OSError, pl.exceptions.PolarsError) as error:
            with suppress(OSError):  # renamed but not synced: the caller will write it again
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error  # what Polars makes of a full disk
        self._count, self._rows = self._count + 1, self._rows + len(frame)
        if self._count >= self._most[0] or self._rows >= self._most[1]:
            self._full.append(self._open)
            self._begin()
        self._join_full()
        return path

    def close(self) -> None:
        """Let others write the folder."""
        self._lock.release()

    def _now(self) -> int:
        """Microseconds, never the same twice, so that names sort by time."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last

    def _begin(self) -> None:
        self._open = self.folder / f"open-{self._now()}"
        self._count = self._rows = 0

    def _join_full(self) -> None:
        """Try to make one file of each full folder; raises nothing, for no row hangs on it."""
        if not self._full or time.monotonic() < self._join_at:
            return
        for full in self._full[:]:
            try:
                self._join(full)
                self._full.remove(full)
            except Exception as error:
                self._join_at = time.monotonic() + JOIN_AGAIN
                log.warning(
                    "The parts in %s cannot become one file yet: %s. They stay, and are tried "
                    "again in %.0f s.", full, error, JOIN_AGAIN,
                )  # fmt: skip

    def _join(self, full: Path) -> None:
        """Make one file of an open folder to which nothing is added any more.

        May be called again after it failed at any step.
        """
        hidden, whole, aside = _names(full)
        if full.exists():
            with atomic_write(aside) as temporary:
                pl.scan_parquet(sorted(full.glob("*.parquet"))).sink_parquet(
                    temporary, compression="zstd"
                )
            os.rename(full, hidden)
        if aside.exists():
            os.replace(aside, whole)
        if hidden.exists():
            shutil.rmtree(hidden)

    def _recover(self) -> None:
        """Finish or undo what a killed process left between two steps."""
        hidden = [path.with_name(path.name[1:]) for path in sorted(self.folder.glob(".open-*/"))]
        self._full += hidden
        self._join_full()
        # Of a folder that is still hidden, the file aside is what shows its rows again.
        wanted = {_names(full)[2] for full in self._full}
        for pattern in (".log-*", "..log-*", "open-*/.*"):
            for left in self.folder.glob(pattern):
                if left not in wanted:
                    left.unlink()
        for full in sorted(self.folder.glob("open-*/")):
            if next(full.glob("*.parquet"), None) is None:
                full.rmdir()
            else:
                self._full.append(full)
        self._join_full()


def _names(full: Path) -> tuple[Path, Path, Path]:
    """What an open folder is called while hidden, the file it becomes, and that file aside."""
    stamp = full.name.removeprefix("open-")
    whole = full.with_name(f"log-{stamp}.parquet")
    return full.with_name(f".{full.name}"), whole, full.with_name(f".{whole.name}")
