"""The item table of a first `run.toml`: which column is what."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from recsys.experiments.wizard.draft import Draft
from recsys.experiments.wizard.look import Look, plainly
from recsys.features.readers import aliases as names


def write_catalog(draft: Draft, items: str | None, ids: pl.Series | None, same: str | None) -> None:
    if items is None:
        return
    look = Look.at(items)
    draft.section("data.catalog")
    draft.say(f"Columns of the item table: {', '.join(look.frame.columns)}")
    item, share = _item_column(look, ids, same)
    if item is None:
        draft.column("item", None, "the id of an item")
    else:
        draft.set("item", item, f"{share:.0%} of the first ids in the log" if share else "")
    free = [c for c in look.frame.columns if c != item]
    title = look.find(names.TITLE, [item])
    if title is not None:
        draft.set("title", title, "what people see")
    texts = [c for c in free if c == title or plainly(c) in names.TEXT]
    draft.set("text", texts, "what the text encoder reads")
    categories = [
        c
        for c in free
        if c not in texts and (plainly(c) in names.CATEGORY or _is_category(look.frame[c]))
    ]
    draft.set("categories", categories)
    mark = _separator(look, categories)
    if mark:
        draft.set("category_separator", mark)
    published = look.find(names.PUBLISHED, [item])
    if published is not None:
        draft.set("published", published, "an item later than the question is no candidate")
    vector = next((c for c in free if _is_vector(look, c)), None)
    numbers = [
        c
        for c in free
        if c not in (title, published, *texts, *categories)
        and not plainly(c).endswith(("id", "idx", "index"))
        and plainly(c)
        and look.number(c) is not None
    ]
    draft.set("numbers", numbers)
    if vector is not None:
        draft.set("vector", vector, "given vectors: images, audio, another model")
    for key in ("available", "available_from", "available_until"):
        found = look.find([plainly(key)])
        if found is not None:
            draft.set(key, found)


def _item_column(look: Look, ids: pl.Series | None, same: str | None) -> tuple[str | None, float]:
    """The column that shares most ids with the log, and the share of the log's ids it knows."""
    known = pl.Series([], dtype=pl.String) if ids is None else ids.unique()
    named = look.find([plainly(same)] if same else []) or look.find(names.ITEM) or look.find(["id"])
    best, share = named, 0.0
    for column in sorted(look.frame.columns, key=lambda c: c != named):
        series = look.frame[column]
        if isinstance(series.dtype, (pl.List, pl.Array, pl.Struct)) or not len(known):
            continue
        # Prefer the column that is made of the log's ids over one that happens to hold some.
        hits = float(known.is_in(series.drop_nulls().cast(pl.String).implode()).to_numpy().mean())
        if hits > share * 1.5:
            best, share = column, hits
    return best, share


def _separator(look: Look, categories: Sequence[str]) -> str | None:
    """What stands between several categories in one text."""
    texts = [look.frame[c].drop_nulls() for c in categories if look.frame[c].dtype == pl.String]
    for mark in ("|", ";", ","):
        if any(
            len(t) and t.str.contains(mark, literal=True).to_numpy().mean() > 0.05 for t in texts
        ):
            return mark
    return None


def _is_vector(look: Look, column: str) -> bool:
    dtype = look.frame.schema[column]
    return isinstance(dtype, (pl.List, pl.Array)) and dtype.inner.is_float()


def _is_category(series: pl.Series) -> bool:
    """Whether a text column repeats few short values."""
    if series.dtype != pl.String:
        return False
    text = series.drop_nulls()
    if len(text) < 4 or text.cast(pl.Float64, strict=False).null_count() == 0:
        return False
    return text.n_unique() <= len(text) // 2 and int(text.str.len_chars().to_numpy().max()) <= 40
