"""A reader of one's own: from a file of any form to the frames that everything else reads.

Name it in the run file, with this file where Python finds it (`PYTHONPATH=docs/examples`):

    [data]
    format = "reader:likes"
    log = "likes.txt"
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys.features.readers.read import DataSource
from recsys.tables import Kind, Log


def likes(source: DataSource) -> Log:
    """Lines such as "2024-05-01 ann likes rye bread", one positive each."""
    path = Path(str(source.log))
    words = pl.col("line").str.split_exact(" ", 2)
    interactions = pl.scan_lines(path, name="line").select(
        user=words.struct.field("field_1"),
        item=pl.col("line").str.extract(" likes (.*)$"),
        time=words.struct.field("field_0").str.to_date().cast(pl.Datetime("us")).cast(pl.Int64),
        weight=pl.lit(1.0, pl.Float32),
        kind=pl.lit(int(Kind.POSITIVE), pl.UInt8),
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    )
    return Log(
        interactions,
        impressions=None,
        catalog=None,
        users=None,
        timed=True,
        given_split=False,
        sources=(path,),
        schema=source.columns,
    )
