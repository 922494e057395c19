"""What the tests of readers share: a file to read, and what was read as tuples."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

from recsys.tables import Log


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def rows(log: Log, *columns: str) -> list[tuple]:
    return log.interactions.sort("row").select(columns).collect().rows()


def requests(log: Log, *columns: str) -> list[tuple]:
    return log.impressions.sort("request").select(columns).collect().rows()


def write_ebnerd(folder: Path, first: int = 1) -> None:
    """Two requests of two users on two hours of a day, and the history of one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    noon = datetime(2023, 5, 21, 12)
    pl.DataFrame(
        {
            "impression_id": [first, first + 1],
            "impression_time": [noon, noon + timedelta(hours=1)],
            "device_type": [2, 1],
            "article_ids_inview": [[10, 11], [12]],
            "article_ids_clicked": [[11], [12]],
            "user_id": [7, 8],
            "next_read_time": [1.0, 60.0],
        }
    ).write_parquet(folder / "behaviors.parquet")
    pl.DataFrame(
        {
            "user_id": [7],
            "impression_time_fixed": [[noon - timedelta(days=2), noon - timedelta(days=1)]],
            "article_id_fixed": [[9, 10]],
            "read_time_fixed": [[2.0, 30.0]],
        }
    ).write_parquet(folder / "history.parquet")
