"""A filter keeps the rows that a loop over them would keep, and says what it cannot ask."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_cases import no_view, small

from recsys.errors import QueryError
from recsys.serving.engine.availability import Windows
from recsys.serving.engine.filters import KEPT_MASKS, KEPT_MOST, FilterMasks, Filters, Kept
from recsys.serving.engine.query import Filter
from recsys.serving.engine.snapshot import CatalogSnapshot

CLOCK = [datetime(2024, 1, 1, hour) for hour in (0, 10, 10, 23)] + [None, datetime(2024, 1, 2)]
"""In UTC."""
CATALOG = pl.DataFrame(
    {
        "item": [f"i{n}" for n in range(6)],
        "category": ["tea", "coffee", None, "tea", "", "Tea"],
        "path": ["a|b", "b", "a | c", None, "c|a|b", "ab"],
        "price": [1.0, float("nan"), 2.5, None, float("inf"), -3.0],
        "year": [1999, 2000, None, 2001, 2000, 0],
        "sold": [True, False, None, True, False, True],
        "tags": [["x", "y"], ["y"], [], None, ["x", None], ["z"]],
        "sizes": [[1, 2], [2], [], None, [3], [1]],
        "day": [date(2024, 1, d) for d in range(1, 6)] + [None],
        "naive": pl.Series(CLOCK, dtype=pl.Datetime("ms")),
        "utc": pl.Series(CLOCK, dtype=pl.Datetime("us", "UTC")),
        "berlin": pl.Series(CLOCK, dtype=pl.Datetime("ns", "Europe/Berlin")),
        "times": pl.Series([[one] for one in CLOCK], dtype=pl.List(pl.Datetime("us", "UTC"))),
        "kind": pl.Series(["p", "q", "p", None, "q", "p"], dtype=pl.Categorical),
    }
)
FILTERS = Filters(CATALOG, np.arange(1, 7), separated={"path": "|"})


def _kept(**conditions: Any) -> list[int]:
    mask = FILTERS.mask(Filter(**conditions))
    assert mask is not None
    np.testing.assert_array_equal(mask, FILTERS.mask_of(CATALOG.drop("item"), Filter(**conditions)))
    return np.flatnonzero(mask).tolist()


UNSIGNED = [pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("several", [False, True], ids=["one", "list"])
def test_a_negative_number_is_none_of_an_unsigned_column(dtype: Any, several: bool) -> None:
    most = 2 ** (8 * [1, 2, 4, 8][UNSIGNED.index(dtype)]) - 1
    column: Any = pl.Series([0, 3, most], dtype=dtype)
    if several:
        column = pl.Series([[0], [3, most], []], dtype=pl.List(dtype))
    filters = Filters(pl.DataFrame({"item": ["a", "b", "c"], "n": column}), np.arange(1, 4))
    assert np.flatnonzero(filters.mask(Filter(equals={"n": (most,)}))).tolist() == [2 - several]
    assert not filters.mask(Filter(equals={"n": (most + 1,)})).any() or dtype == pl.UInt64
    for negative in (-1, "-1", -(10**30)):
        with pytest.raises(QueryError, match=r"'n' holds.*-1"):
            filters.mask(Filter(equals={"n": (negative,)}))


@pytest.mark.parametrize(
    ("column", "values", "kept"),
    [
        ("category", ("tea",), [0, 3]),
        ("category", ("tea", "coffee"), [0, 1, 3]),
        ("category", ("",), [4]),
        ("category", ("nothing",), []),
        ("category", (), []),
        ("path", ("a",), [0, 2, 4]),  # one of several, with blanks around
        ("path", ("a|b",), [0]),  # or the whole text
        ("year", (2000,), [1, 4]),
        ("year", ("2000", 1999), [0, 1, 4]),  # from a URL all values are texts
        ("year", (10**30,), []),
        ("sold", (True,), [0, 3, 5]),
        ("sold", ("false",), [1, 4]),
        ("price", (1,), [0]),
        ("price", ("2.5",), [2]),
        ("tags", ("x",), [0, 4]),
        ("tags", ("x", "z"), [0, 4, 5]),
        ("sizes", (2,), [0, 1]),
        ("day", ("2024-01-03",), [2]),
        ("kind", ("p",), [0, 2, 5]),
    ],
)
def test_equal_values_by_hand(column: str, values: tuple[Any, ...], kept: list[int]) -> None:
    assert _kept(equals={column: values}) == kept


@pytest.mark.parametrize(
    ("column", "bounds", "kept"),
    [
        ("price", (1.0, None), [0, 2]),  # infinity and NaN are in no range
        ("price", (None, 1.0), [0, 5]),
        ("price", (2, 1), []),
        ("price", (None, None), [0, 2, 5]),
        ("year", (1999, 2000), [0, 1, 4]),
        ("day", (datetime(2024, 1, 2).timestamp(), None), None),
    ],
)
def test_ranges_by_hand(column: str, bounds: tuple[Any, Any], kept: list[int] | None) -> None:
    if kept is None:  # seconds since 1970, in UTC
        bounds, kept = (1_704_153_600.0, 1_704_240_000.0), [1, 2]
    assert _kept(ranges={column: bounds}) == kept


@pytest.mark.parametrize("column", ["naive", "utc", "berlin", "times"])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("2024-01-01", [0]),
        ("2024-01-01T10:00", [1, 2]),
        ("2024-01-01T10:00:00Z", [1, 2]),
        ("2024-01-02T00:00+14:00", [1, 2]),
        ("2024-01-01T23:00:00-01:00", [5]),
        ("2024-01-01T10:00:00.000001", []),
        ("0001-01-01T00:00:00+14:00", []),  # before the first year that Python knows
        ("9999-12-31T23:59:59-14:00", []),
    ],
)
def test_times_with_and_without_a_zone_meet_in_utc(column: str, text: str, kept: list[int]) -> None:
    assert _kept(equals={column: (text,)}) == kept


def test_all_conditions_must_hold() -> None:
    assert _kept(equals={"sold": (True,), "category": ("tea",)}, ranges={"price": (0, 5)}) == [0]
    assert FILTERS.mask(Filter(allow=("i0",), deny=("i1",))) is None  # ids are not columns


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"equals": {"categorie": ("tea",)}}, "Did you mean 'category'"),
        ({"equals": {"item": ("i1",)}}, "no column 'item'"),
        ({"equals": {"category": (True,)}}, "holds texts"),
        ({"equals": {"category": (3,)}}, "holds texts"),
        ({"equals": {"year": ("new",)}}, "holds whole numbers"),
        ({"equals": {"year": (True,)}}, "holds whole numbers"),
        ({"equals": {"sold": ("maybe",)}}, "holds true or false"),
        ({"equals": {"sold": (1,)}}, "holds true or false"),
        ({"equals": {"day": ("soon",)}}, "ISO 8601"),
        ({"equals": {"sizes": ("big",)}}, "holds whole numbers"),
        ({"ranges": {"category": (1, 2)}}, "a range says nothing"),
        ({"ranges": {"sold": (0, 1)}}, "a range says nothing"),
        ({"ranges": {"tags": (0, 1)}}, "a range says nothing"),
        ({"ranges": {"price": (float("nan"), None)}}, "finite number"),
        ({"ranges": {"price": (True, None)}}, "finite number"),
    ],
)
def test_what_cannot_be_asked_is_said(conditions: dict[str, Any], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        FILTERS.mask(Filter(**conditions))


@given(st.data())
def test_any_mix_keeps_what_a_loop_keeps(data: st.DataObject) -> None:
    equals = data.draw(
        st.dictionaries(
            st.sampled_from(["category", "tags"]),
            st.lists(st.sampled_from(["tea", "coffee", "x", "y", "", "é"])).map(tuple),
        )
    )
    bound = st.none() | st.floats(-4, 4)
    ranges = data.draw(st.dictionaries(st.sampled_from(["price", "year"]), st.tuples(bound, bound)))
    rows = np.array(data.draw(st.permutations(range(1, 7))))[: data.draw(st.integers(1, 6))]

    def holds(row: dict[str, Any]) -> bool:
        for name, values in equals.items():
            held = row[name] if isinstance(row[name], list) else [row[name]]
            if not any(value in held for value in values if held != [None]):
                return False
        for name, (low, high) in ranges.items():
            value = row[name]
            if value is None or not np.isfinite(value):
                return False
            if (low is not None and value < low) or (high is not None and value > high):
                return False
        return True

    expected = [holds(CATALOG.row(row - 1, named=True)) for row in rows.tolist()]
    mask = Filters(CATALOG, rows).mask(Filter(equals=equals, ranges=ranges))
    if mask is None:
        assert all(expected) and not equals and not ranges
    else:
        assert mask.tolist() == expected


def test_a_mask_is_made_once_and_the_oldest_is_forgotten() -> None:
    made: list[str] = []

    def mask(name: str) -> Any:
        return lambda: made.append(name) or np.ones(4000, bool)

    kept = Kept(limit=10_000)
    for name in "aabab":
        kept.get(name, mask(name))
    assert made == ["a", "b"] and 8000 < kept.held < 9000
    kept.get("c", mask("c"))  # a was asked for before b
    assert 8000 < kept.held < 9000
    kept.get("b", mask("b"))
    assert made == ["a", "b", "c"]
    kept.get("a", mask("a"))
    assert made == ["a", "b", "c", "a"]
    kept.get("big", lambda: np.ones(50_000, bool))
    assert 8000 < kept.held < 9000


def test_what_was_asked_counts_as_memory_too() -> None:
    """A small catalogue's masks are nothing beside the texts that a request may bring."""
    kept = Kept(limit=1 << 20)
    for n in range(50):
        kept.get(("equals", "title", (f"{n}" * 100_000,)), lambda: np.ones(6, bool))
    assert 100_000 < kept.held <= 1 << 20 and 1 < len(kept) < 11
    kept.get(("equals", "title", ("x" * (2 << 20),)), lambda: np.ones(6, bool))
    assert kept.held <= 1 << 20 and len(kept) > 1  # too large to be kept, and costs no other
    filters = Filters(CATALOG, np.arange(1, 7), limit=1 << 20)
    for n in range(50):
        filters.mask(Filter(equals={"category": tuple(f"{n} {m}" * 500 for m in range(100))}))
    assert filters._kept.held <= 1 << 20 and len(filters._kept) < 11


def test_small_masks_are_kept_up_to_a_number() -> None:
    kept = Kept()
    for n in range(5000):
        kept.get(("range", "price", n, None), lambda: np.ones(6, bool))
    assert len(kept) == KEPT_MOST == 4096
    assert kept.held > 4096 * 200
    made: list[int] = []
    kept.get(("range", "price", 4999, None), lambda: made.append(1) or np.ones(6, bool))
    assert not made


def test_choices_count_what_was_asked(tmp_path: Path) -> None:
    served = small(tmp_path, items=300)
    stock = CatalogSnapshot(served, no_view(served), Windows(served.bundle, served.position), None)
    choices = FilterMasks(served.bundle, limit=1 << 20)
    for n in range(10):
        choices.of(Filter(equals={"category": (f"{n}" * 300_000,)}), stock)
    assert 300_000 < choices.held <= 1 << 20
    one = Filter(equals={"category": ("c1",)})
    assert choices.of(one, stock) is choices.of(one, stock)
    large = Filter(equals={"category": ("x" * (2 << 20),)})  # the last one stays, whatever it is
    assert choices.of(large, stock) is choices.of(large, stock)
    for n in range(50):
        choices.of(Filter(equals={"category": (f"{n}",)}), stock)
    assert choices.held < 1 << 20 and len(choices._known) == KEPT_MASKS


def test_the_same_conditions_have_one_key_whatever_their_order() -> None:
    one = Filter(equals={"a": ("x", "y"), "b": (1,)}, ranges={"c": (0, None)}, deny=("i", "j"))
    two = Filter(equals={"b": (1,), "a": ("y", "x", "x")}, ranges={"c": (0, None)}, deny=("j", "i"))
    assert one.key() == two.key() and hash(one.key()) == hash(two.key())
    assert Filter(equals={"b": (True,)}).key() != Filter(equals={"b": (1,)}).key()
    assert Filter(allow=()).key() != Filter().key() and not Filter(allow=()).empty
