"""LightGCN adjacency lists: lines `user item item …`, whose order nobody vouches for."""

from __future__ import annotations

from features.sources.sequences import read_lists
from features.sources.source import DataSource
from recsys.tables import Log


def read(source: DataSource) -> Log:
    """Read adjacency lists; usually train and test files are given."""
    return read_lists(source, source.columns, ordered=False)
