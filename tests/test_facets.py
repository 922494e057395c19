"""What there is to filter by."""

from __future__ import annotations

import polars as pl

from recsys.serving.engine.ranking import MOST, facets


def test_columns_of_few_words_are_told_the_most_frequent_first() -> None:
    size = 3 * MOST
    catalog = pl.DataFrame(
        {
            "item": [f"i{n}" for n in range(size)],
            "title": ["t"] * size,
            "kind": ["b", "a", "a"] * MOST,
            "tags": [["x", "y"], ["y"], None] * MOST,
            "text": [f"text {n}" for n in range(size)],
            "price": [1.0] * size,
            "nothing": pl.Series([None] * size, dtype=pl.String),
        }
    )
    assert facets(catalog) == {"kind": ["a", "b"], "tags": ["y", "x"]}
    assert facets(catalog.with_columns(kind=pl.col("kind").cast(pl.Categorical)))["kind"] == [
        "a",
        "b",
    ]
    assert facets(catalog.clear()) == {}


def test_as_many_values_as_can_be_chosen_from_and_no_more() -> None:
    for count, told in ((MOST, True), (MOST + 1, False)):
        catalog = pl.DataFrame({"item": [f"i{n}" for n in range(count)]})
        catalog = catalog.with_columns(kind=pl.col("item"))
        assert ("kind" in facets(catalog)) == told
