"""What the tests of readers share: a file to read, and what was read as tuples."""

from __future__ import annotations

from pathlib import Path

from recsys.tables import Log


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def rows(log: Log, *columns: str) -> list[tuple]:
    return log.interactions.sort("row").select(columns).collect().rows()


def requests(log: Log, *columns: str) -> list[tuple]:
    return log.impressions.sort("request").select(columns).collect().rows()
