"""Reader of LightGCN adjacency lists: lines `user item item …`, in no particular order."""

from __future__ import annotations

from recsys.features.readers.sequences import read_lists
from recsys.features.readers.source import DataSource
from recsys.tables import Log


def read(source: DataSource) -> Log:
    """Read adjacency lists; usually train and test files are given."""
    return read_lists(source, source.columns, ordered=False)
