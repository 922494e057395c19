"""Ragged rows against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.ragged import Ragged, gather

LISTS = st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=6), max_size=8)


def lists(ragged: Ragged) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


@given(LISTS)
def test_it_holds_the_lists_it_was_made_from(rows: list[list[int]]) -> None:
    ragged = Ragged.from_lists(rows)
    assert lists(ragged) == rows
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.row_of().tolist() == [number for number, row in enumerate(rows) for _ in row]


@given(LISTS.filter(bool), st.data())
def test_taking_rows_is_taking_lists(rows: list[list[int]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    taken = Ragged.from_lists(rows).take(np.array(wanted, np.int64))
    assert lists(taken) == [rows[row] for row in wanted]


@given(LISTS, st.integers(0, 8))
def test_the_last_n_of_each_row(rows: list[list[int]], n: int) -> None:
    assert lists(Ragged.from_lists(rows).last(n)) == [row[max(0, len(row) - n) :] for row in rows]


def test_distinct_values_of_each_row_by_hand() -> None:
    found = Ragged.from_lists([[3, 1, 3], [], [0], [2, 2]]).distinct()
    assert [row.tolist() for row in found] == [[1, 3], [], [0], [2]]
    assert [row.tolist() for row in Ragged.empty(2).distinct()] == [[], []]


@given(LISTS, st.integers(-5, 5))
def test_where_keeps_every_row_and_only_the_values_that_hold(
    rows: list[list[int]], by: int
) -> None:
    ragged = Ragged.from_lists(rows)
    kept = ragged.where(ragged.values % 3 == by % 3)
    assert lists(kept) == [[value for value in row if value % 3 == by % 3] for row in rows]


@given(st.integers(0, 30), st.data())
def test_gather_is_slicing(size: int, data: st.DataObject) -> None:
    cut = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    slices = data.draw(st.lists(cut, max_size=10))
    values = np.arange(size) * 7
    start = np.array([a for a, _ in slices], np.int64)
    end = np.array([b for _, b in slices], np.int64)
    assert lists(gather(values, start, end)) == [values[a:b].tolist() for a, b in slices]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, bool])
def test_the_dtype_of_the_values_stays(dtype: type) -> None:
    ragged = Ragged.from_lists([[1, 0], [], [1]], dtype)
    for made in (ragged, ragged.take(np.array([2, 0])), ragged.last(1), Ragged.empty(3, dtype)):
        assert made.values.dtype == dtype
        assert made.offsets.dtype == np.int64


def test_start_and_end_may_be_narrow_and_the_total_wide() -> None:
    """int32 positions must not overflow where they are summed."""
    start = np.zeros(3, np.int32)
    end = np.full(3, 2**20, np.int32)
    assert gather(np.zeros(2**20, np.uint8), start, end).offsets[-1] == 3 * 2**20


def test_no_rows_and_rows_without_values() -> None:
    assert len(Ragged.from_lists([])) == 0
    assert lists(Ragged.empty(2)) == [[], []]
    assert lists(Ragged.empty(2).last(3)) == [[], []]


@pytest.mark.parametrize("offsets", [[], [1, 3], [0, 2], [0, 4]])
def test_offsets_that_do_not_cover_the_values_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="3, the number of values"):
        Ragged(np.array(offsets, np.int64), np.arange(3))
