"""An item that comes alone is coded as the table it might have stood in."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import QueryError
from recsys.features.prepared.columns import (
    BEGINNING,
    NEVER,
    categories,
    joined_text,
    numbers,
    texts,
)
from recsys.features.prepared.item_coder import ItemCoder, unknown_columns
from recsys.tables import CatalogSchema

SCHEMA = CatalogSchema(
    title="name", text=("about", "name"), categories=("kind", "tags"), numbers=("price", "size"),
    vector="image", published="born", available_from="from", available_until="until",
    available="sold", fields=("colour",),
)  # fmt: skip
CODER = ItemCoder(
    SCHEMA, {"kind": ("cup", "tea"), "tags": ("1", "a", "true")}, (2.0, 0.0), (4.0, 1.0), 2
)

words = st.text(st.sampled_from("ab |.é\t,"), max_size=8)
maybe = st.none() | words
rows = st.fixed_dictionaries(
    {
        "name": maybe,
        "about": maybe,
        "kind": maybe,
        "tags": st.none() | st.lists(st.none() | words, max_size=3),
        "price": st.none() | st.floats(-1e6, 1e6),
        "size": st.none() | st.integers(-1000, 1000),
    }
)


@given(st.lists(rows, min_size=1, max_size=6))
def test_one_by_one_equals_the_table(table: list[dict[str, Any]]) -> None:
    """Twin: columns.py, fitted on the table, beside a coder made of what was fitted."""
    frame = pl.DataFrame(
        table,
        schema={
            "name": pl.String, "about": pl.String, "kind": pl.String,
            "tags": pl.List(pl.String), "price": pl.Float64, "size": pl.Float64,
        },
    ).insert_column(0, pl.Series("item", [f"i{n}" for n in range(len(table))]))  # fmt: skip
    fit = np.ones(len(table), bool)
    coded = {name: categories(frame[name], "|", fit) for name in SCHEMA.categories}
    standard = numbers(frame, SCHEMA.numbers, fit, "item")
    coder = ItemCoder(
        SCHEMA,
        {name: tuple(vocab.ids.to_list()) for name, (_, vocab) in coded.items()},
        tuple(standard.means), tuple(standard.deviations),
    )  # fmt: skip
    coder = ItemCoder.from_json(json.loads(json.dumps(coder.to_json())))
    described = [coder.describe(json.loads(json.dumps(row))) for row in table]
    assert [one.text for one in described] == texts(frame, joined_text(SCHEMA)).to_list()[1:]
    for column, (codes, _) in enumerate(coded.values()):
        wanted = [tuple(codes[row].tolist()) for row in range(1, len(codes))]
        assert [one.codes[column] for one in described] == wanted
    found = np.array([one.numbers for one in described], np.float32)
    np.testing.assert_array_equal(found, standard.values[1:])


def test_by_hand() -> None:
    item = {
        "title": " Cup ", "about": ["round", None, "blue"], "kind": "tea|milk", "tags": [True, 1],
        "price": 10, "image": [0.5, 1], "born": "2024-01-01", "from": 1_704_067_200,
        "until": "2024-01-02T00:00:00Z", "colour": "red",
    }  # fmt: skip
    one = CODER.describe(item)
    assert one.text == "Cup. round, blue"
    assert one.codes == ((2, 0), (3, 1)) and one.numbers == (2.0, 0.0)
    start = 1_704_067_200_000_000
    assert one.vector == (0.5, 1.0) and one.published == start
    assert one.window == (start, start + 86_400_000_000)
    assert one.raw["title"] == " Cup " and one.raw["born"] == start


def test_an_empty_item_is_one_of_which_nothing_is_known() -> None:
    one = CODER.describe({})
    assert (one.text, one.codes, one.numbers, one.vector) == ("", ((), ()), (0.0, 0.0), None)
    assert one.window == (BEGINNING, NEVER) and one.published is None
    assert CODER.describe({"sold": False}).window == (0, 0)
    assert CODER.describe({"sold": None, "price": None, "image": []}) == one.__class__(
        **{**one.__dict__, "raw": CODER.describe({"sold": None, "image": []}).raw}
    )


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"price": "3"}, "'price' holds '3', which is no number"),
        ({"price": True}, "'price' holds True"),
        ({"price": 1e300}, "within"),
        ({"price": math.inf}, "within"),
        ({"kind": {"a": 1}}, "neither text nor a number"),
        ({"tags": [["a"]]}, "neither text nor a number"),
        ({"about": {}}, "neither text nor a number"),
        ({"image": [1]}, "a list of 2 numbers, not 1 entries"),
        ({"image": "x"}, "a list of 2 numbers, not 'x'"),
        ({"image": [1, None]}, "no number"),
        ({"born": "yesterday"}, "'born' holds 'yesterday', which is no time"),
        ({"born": True}, "which is no time"),
        ({"from": [1]}, "which is no time"),
        ({"until": 1e300}, "which is no time"),
        ({"sold": "no"}, "give true or false"),
    ],
)
def test_what_a_column_cannot_hold_is_named(item: dict[str, Any], words: str) -> None:
    with pytest.raises(QueryError, match="(?s)" + words.replace("(", r"\(")):
        CODER.describe(item)


def test_unknown_columns_are_refused_by_name() -> None:
    unknown_columns({"kind": 1, "title": 2}, CODER.columns)
    with pytest.raises(QueryError, match=r"no column 'prize' here. Did you mean 'price'\?"):
        unknown_columns({"prize": 1}, CODER.columns)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=2), some),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*CODER.columns, "other"]), values))
def test_whatever_comes_is_read_or_refused(item: dict[str, Any]) -> None:
    try:
        one = CODER.describe(item)
    except QueryError:
        return
    assert all(math.isfinite(number) for number in one.numbers)
    assert one.vector is None or len(one.vector) == 2
