"""A folder of Parquet parts, written one after another and laid together now and then.

A part a second would be 86,400 files a day. So parts are written into a folder `open-…` inside, and
when it is full it becomes one file. A reader, and a start after a crash at any point, finds every
row once: the whole is written under a hidden name, the parts are hidden by renaming their folder,
the whole is shown by renaming it, and only then the parts are removed. Names that begin with a dot
are what readers/files.py passes over. Parts that cannot be laid together (a full disk) stay
as they are, and are tried again later: they are read as well as one file.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import polars as pl
from filelock import FileLock, Timeout

from recsys.errors import DataError
from recsys.files import atomic_write

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
