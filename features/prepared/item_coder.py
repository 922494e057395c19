"""Encode the description of one item as the towers were trained on it.

Preparation reads whole tables (columns.py); here an item comes alone, after training, and
nothing is fitted any more. Both must give the same, which tests/test_item_coder.py holds them to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recsys.errors import DataError, QueryError, nearest
from recsys.features.prepared.columns import BEGINNING, NEVER, instants, joined_text
from recsys.ragged import Ragged
from recsys.tables import CatalogSchema, Schema

if TYPE_CHECKING:
    from recsys.features.prepared.dataset import Dataset

LARGEST = 1e30
"""Of a number: its square must not overflow float32 on the way through a tower."""


@dataclass(frozen=True)
class Described:
    """What is known of one item.

    Args:
        text: of all its text columns, title first.
        codes: of each category column, 0 for what training did not know.
        numbers: standardised, 0 where there is none.
        vector: as given, or None.
        published: microseconds, or None where it is not said.
        window: microseconds, from when on and until when it may be recommended.
        raw: what the columns said, times in microseconds.
    """

    text: str
    codes: tuple[tuple[int, ...], ...]
    numbers: tuple[float, ...]
    vector: tuple[float, ...] | None
    published: int | None
    window: tuple[int, int]
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class ItemCoder:
    """How items become what the towers read.

    Args:
        schema: the columns of the item table.
        categories: category column → its values in the order of their codes from 1 on.
        means, deviations: of each number column, as the training side had them.
        vector: size of a given vector, 0 where there is none.
    """

    schema: CatalogSchema
    categories: Mapping[str, tuple[str, ...]]
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()
    vector: int = 0

    @staticmethod
    def of(dataset: Dataset) -> ItemCoder:
        """How a dataset was prepared."""
        said = dataset.manifest["input"]["catalog_schema"]
        schema = CatalogSchema() if said is None else CatalogSchema.model_validate(said)
        numbers = dataset.manifest["numbers"]["item"]
        return ItemCoder(
            schema,
            {
                name: tuple(dataset.category_vocab("item", name).ids.to_list())
                for name in dataset.manifest["categories"]["item"]
            },
            tuple(numbers["means"]),
            tuple(numbers["deviations"]),
            0 if dataset.item_vectors is None else dataset.item_vectors.shape[1],
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "schema": self.schema.model_dump(mode="json"),
            "categories": [[name, list(values)] for name, values in self.categories.items()],
            "means": list(self.means),
            "deviations": list(self.deviations),
            "vector": self.vector,
        }

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> ItemCoder:
        """The inverse of `to_json`."""
        return ItemCoder(
            CatalogSchema.model_validate(said["schema"]),
            {name: tuple(values) for name, values in said["categories"]},
            tuple(said["means"]),
            tuple(said["deviations"]),
            int(said["vector"]),
        )

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that say something of an item."""
        schema = self.schema
        single = (
            schema.title, schema.vector, schema.published,
            schema.available_from, schema.available_until, schema.available,
        )  # fmt: skip
        several = (*schema.text, *schema.categories, *schema.numbers, *schema.fields)
        named = [name for name in (*single, *several) if name]
        if schema.title:
            named.append("title")  # as the catalogue of a bundle calls it
        return tuple(name for name in dict.fromkeys(named) if name != schema.item)

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        return {
            name: {value: code for code, value in enumerate(values, 1)}
            for name, values in self.categories.items()
        }

    # ------------------------------------------------------------------ one item

    def describe(self, item: Mapping[str, Any]) -> Described:
        """Read an item; columns that are not known are passed over.

        Raises:
            QueryError: a value cannot be what its column holds.
        """
        schema, item = self.schema, dict(item)
        if schema.title and schema.title != "title" and "title" not in self._own:
            item.setdefault(schema.title, item.get("title"))
        times = {
            name: _time(name, item.get(name))
            for name in (schema.published, schema.available_from, schema.available_until)
            if name
        }
        first, last = (
            times[name] if name else None
            for name in (schema.available_from, schema.available_until)
        )
        since, until = BEGINNING if first is None else first, NEVER if last is None else last
        if schema.available and not _flag(schema.available, item.get(schema.available)):
            since = until = 0
        raw = {name: item.get(name) for name in self.columns} | times
        if schema.title:
            raw["title"] = item.get("title") if "title" in self._own else item.get(schema.title)
        return Described(
            text=self._text(item),
            codes=tuple(
                tuple(
                    self._codes[name].get(value, 0)
                    for value in _values(name, item.get(name), schema.category_separator)
                )
                for name in self.categories
            ),
            numbers=tuple(
                _standard(name, item.get(name), mean, deviation)
                for name, mean, deviation in zip(
                    schema.numbers, self.means, self.deviations, strict=True
                )
            ),
            vector=self._vector(item),
            published=times[schema.published] if schema.published else None,
            window=(since, until),
            raw=raw,
        )

    @cached_property
    def _own(self) -> frozenset[str]:
        """Columns that the item table has under their own names."""
        schema = self.schema
        return frozenset((*schema.text, *schema.categories, *schema.numbers, *schema.fields))

    def _text(self, item: Mapping[str, Any]) -> str:
        parts = []
        for name in dict.fromkeys(name for name in joined_text(self.schema) if name):
            value = item.get(name)
            if isinstance(value, (list, tuple)):
                value = ", ".join(_word(name, one) for one in value if one is not None)
            text = "" if value is None else _word(name, value).strip()
            if text:
                parts.append(text)
        return ". ".join(parts)

    def _vector(self, item: Mapping[str, Any]) -> tuple[float, ...] | None:
        name = self.schema.vector
        value = item.get(name) if name else None
        if name is None or value is None or (isinstance(value, (list, tuple)) and not value):
            return None
        if not isinstance(value, (list, tuple)) or len(value) != self.vector:
            size = f"{len(value)} entries" if isinstance(value, (list, tuple)) else repr(value)
            raise QueryError(f"{name!r} is a list of {self.vector} numbers, not {size}.")
        return tuple(_number(name, one) for one in value)


def ragged_codes(items: Sequence[Described], column: int) -> Ragged:
    """Codes of one category column; a row without any is empty."""
    return Ragged.from_lists([item.codes[column] for item in items])


def unknown_columns(item: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse what nobody would read.

    Raises:
        QueryError: a column is not known; the known ones are named.
    """
    for name in item:
        if name not in known:
            raise QueryError(
                f"An item has no column {name!r} here. {nearest(str(name), known)} "
                f"Columns: {', '.join(known) or 'none'}."
            )


def _word(column: str, value: Any) -> str:
    """Text of a value, as a table's cast to text would give it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(pl.Series([value]).cast(pl.String)[0])
    raise QueryError(f"{column!r} holds {value!r}, which is neither text nor a number.")


def _values(column: str, value: Any, separator: str) -> list[str]:
    """Categories as `recsys.features.prepared.columns.lists_of` gives them."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        words = [_word(column, one) for one in value if one is not None]
    elif isinstance(value, str) and separator:
        words = value.split(separator)
    else:
        words = [_word(column, value)]
    return [word for word in (word.strip() for word in words) if word]


def _number(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise QueryError(f"{column!r} holds {value!r}, which is no number.")
    if not abs(value) <= LARGEST:
        raise QueryError(f"{column!r} holds {value!r}; give a number within ±{LARGEST:g}.")
    return float(value)


def _standard(column: str, value: Any, mean: float, deviation: float) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return 0.0
    number = (_number(column, value) - mean) / deviation
    if not abs(number) <= LARGEST:
        raise QueryError(f"{column!r} holds {value!r}, which is far from all that was known.")
    return float(np.float32(number))


def _flag(column: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return value is not False
    raise QueryError(f"{column!r} holds {value!r}; give true or false.")


def _time(column: str, value: Any) -> int | None:
    """Microseconds of ISO 8601 text or of a number since 1970, whose unit its size tells."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise QueryError(f"{column!r} holds {value!r}, which is no time.")
    try:
        return int(instants(pl.Series(column, [value]), Schema(), 0, pl.Series(["it"]))[1])
    except (DataError, pl.exceptions.PolarsError, OverflowError) as error:
        raise QueryError(
            f"{column!r} holds {value!r}, which is no time ({error}). Give ISO 8601 text, or a "
            "number since 1970."
        ) from None
