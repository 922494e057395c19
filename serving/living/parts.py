"""A folder of Parquet parts, written one after another and laid together now and then.

A part a second would be 86,400 files a day. So parts are written into a folder `open-…` inside, and
when it is full it becomes one file. A reader, and a start after a crash at any point, finds every
row once: the whole is written under a hidden name, the parts are hidden by renaming their folder,
the whole is shown by renaming it, and only then the parts are removed. Names that begin with a dot
are what `features.sources.files` passes over.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import polars as pl
from filelock import FileLock, Timeout

from recsys.errors import DataError
from recsys.files import atomic_write

FULL_PARTS, FULL_ROWS = 600, 1_000_000
"""When the parts of an open folder become one file."""


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
        self._recover()
        self._begin()

    def write(self, frame: pl.DataFrame) -> Path:
        """Write a part; it is on disk when this returns.

        Raises:
            OSError: it cannot be written, and is not there.
        """
        path = self._open / f"{self._now()}.parquet"
        with atomic_write(path) as temporary:
            frame.write_parquet(temporary, compression="zstd")
        self._count, self._rows = self._count + 1, self._rows + len(frame)
        if self._count >= self._most[0] or self._rows >= self._most[1]:
            full = self._open
            self._begin()
            self._join(full)
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

    def _join(self, full: Path) -> None:
        """Make one file of an open folder to which nothing is added any more."""
        hidden, whole = _names(full)
        with atomic_write(whole.with_name(f".{whole.name}")) as temporary:
            pl.scan_parquet(sorted(full.glob("*.parquet"))).sink_parquet(
                temporary, compression="zstd"
            )
        os.rename(full, hidden)
        self._show(hidden, whole)

    def _show(self, hidden: Path, whole: Path) -> None:
        aside = whole.with_name(f".{whole.name}")
        if aside.exists():
            os.replace(aside, whole)
        shutil.rmtree(hidden)

    def _recover(self) -> None:
        """Finish or undo what a killed process left between two steps."""
        for hidden in sorted(self.folder.glob(".open-*/")):
            self._show(hidden, _names(hidden.with_name(hidden.name[1:]))[1])
        for left in (*self.folder.glob(".log-*"), *self.folder.glob("open-*/.*")):
            left.unlink()
        for full in sorted(self.folder.glob("open-*/")):
            if next(full.glob("*.parquet"), None) is None:
                full.rmdir()
            else:
                self._join(full)


def _names(full: Path) -> tuple[Path, Path]:
    """What an open folder is called while it is hidden, and the file it becomes."""
    stamp = full.name.removeprefix("open-")
    return full.with_name(f".{full.name}"), full.with_name(f"log-{stamp}.parquet")
