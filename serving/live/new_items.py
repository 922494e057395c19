"""Encode items that come after the bundle, through the same item tower.

Legend: R items, D dimensions of the stored vector, E of what histories read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys.errors import BundleError
from recsys.features.prepared.item_coder import Described, ragged_codes
from recsys.features.prepared.timeline import NEVER, Timeline
from recsys.ragged import Ragged
from recsys.serving.bundle import Bundle
from recsys.towers.build import padded
from recsys.towers.embedding import FeatureTable, narrowed
from recsys.towers.encode import ROWS_AT_ONCE
from recsys.towers.two_tower import TwoTower, added


@dataclass(frozen=True)
class Encoded:
    """Items as a model sees them.

    Args:
        vectors: (R, D) float32 stored form.
        entries: (R, E) float32, what histories read of them.
        table: their features; row r + 1 is item r.
    """

    vectors: np.ndarray
    entries: np.ndarray
    table: FeatureTable


def encode_described(bundle: Bundle, items: Sequence[Described], known: np.ndarray) -> Encoded:
    """Encode items from what is said of them.

    An item that the bundle knows keeps its learned id vector and its statistics as of the cut-off,
    whatever is said of it now; any other is one that nothing has happened to yet.

    Args:
        bundle: whose towers read them.
        items: R of them, described by the bundle's coder.
        known: (R,) item rows, 0 for an item that the bundle does not know.

    Raises:
        BundleError: there is text, and the bundle has no text encoder to read it.
    """
    model, total = bundle.model, len(items)
    table = feature_table(bundle, items)
    statistics = _statistics(bundle, items, known)
    vectors = np.empty((total, model.vector_dimension), np.float32)
    entries = np.empty((total, model.vector_dimension), np.float32)
    # `FeatureEmbedding` takes the id vector of a row below `spec.ids` from what it is given.
    step = min(ROWS_AT_ONCE, max(1, model.item_spec.ids - 1))
    if model.item_spec.ids <= 1:
        step = ROWS_AT_ONCE
    with torch.inference_mode():
        for start in range(0, total, step):
            part = slice(start, min(start + step, total))
            local = _part(table, part)
            given = None if statistics is None else torch.from_numpy(statistics[part])
            vector, entry = _encode(model, local, torch.from_numpy(known[part]), given)
            vectors[part], entries[part] = vector.float().numpy(), entry.float().numpy()
    return Encoded(vectors, entries, table)


def feature_table(bundle: Bundle, items: Sequence[Described]) -> FeatureTable:
    """Features of items as the bundle's own table holds them; row 0 is "nothing known"."""
    spec, size = bundle.model.item_spec, len(items)
    text = vector = numbers = None
    if spec.text:
        text = torch.zeros(size + 1, spec.text)
        written = [item.text for item in items]
        if any(written):
            if bundle.encoder is None:
                raise BundleError(
                    "The towers of this bundle read text, but it has no text encoder, so that a "
                    "new item cannot be read. Make the bundle again."
                )
            text[1:] = torch.from_numpy(bundle.encoder.encode(written))
        text = _as_kept(text, bundle.model.items.text)
    if spec.vector:
        nothing = (0.0,) * spec.vector
        given = [nothing, *(item.vector or nothing for item in items)]
        said = torch.tensor(given, dtype=torch.float32)
        vector = _as_kept(said, bundle.model.items.vector)
    if spec.numbers:
        rows = [(0.0,) * spec.numbers, *(item.numbers for item in items)]
        numbers = torch.tensor(rows, dtype=torch.float32)
    categories = {}
    for column, name in enumerate(spec.categories):
        codes = ragged_codes(items, column)
        with_nothing = Ragged(np.concatenate([[0], codes.offsets]), codes.values)
        categories[name] = padded(with_nothing)
    return FeatureTable(size + 1, text=text, vector=vector, numbers=numbers, categories=categories)


def same_features(ours: FeatureTable, theirs: FeatureTable, rows: np.ndarray) -> np.ndarray:
    """(R,) bool: rows 1 … R of one table say what the given rows of the other one say."""
    same = np.ones(len(rows), bool)
    at = torch.from_numpy(rows)
    for name in ("text", "vector", "numbers"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine is not None and other is not None:
            near = torch.isclose(mine[1:].float(), other[at].float(), rtol=1e-3, atol=1e-4)
            same &= near.all(1).numpy()
    for name in ours.category_names:
        mine, other = ours.codes(name)[1:], theirs.codes(name)[at]
        width = max(mine.shape[1], other.shape[1])
        # The mean of the known codes is read: their order and unknown ones say nothing.
        mine, other = (
            nn.functional.pad(codes, (0, width - codes.shape[1])).sort(1).values
            for codes in (mine, other)
        )
        same &= (mine == other).all(1).numpy()
    return same


def _as_kept(said: Tensor, kept: Tensor | None) -> Tensor:
    """What is said of items as a bundle keeps it, so that one put again has the vector it had."""
    return narrowed(said) if kept is not None and kept.dtype == torch.float16 else said


def _encode(
    model: TwoTower, table: FeatureTable, known: Tensor, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Vectors and history entries of rows 1 … R of a table whose ids are those of `known`."""
    rows, inputs = torch.arange(1, table.n_rows), model.item_tower.inputs
    ids = _picked(inputs.ids, known) if model.item_spec.ids else None
    embedded = inputs(rows, table, statistics, None, ids=ids)
    new = ((known == 0) | (known >= model.item_spec.ids)).nonzero().squeeze(1)
    if model.item_spec.text_neighbours and table.text is not None and len(new):
        # What has an id says with it what it has of its like.
        embedded[new] = added(embedded[new], inputs.start_of(table.text[new + 1], model.items))
    vectors = model.item_tower(embedded)
    own = model.user_tower.history_ids
    # As `TwoTower.embed_history`, which takes rows of the model's own table.
    if own is not None and model.rules.history.table == "own":
        return vectors, inputs(rows, table, statistics, None, ids=_picked(own, known))
    if own is not None:
        return vectors, added(embedded, _picked(own, known)(rows))
    return vectors, embedded


def _picked(table: nn.Embedding, rows: Tensor) -> nn.Embedding:
    """Vectors of unknown and then of the given rows, as a table of its own."""
    rows = torch.cat([rows.new_zeros(1), torch.where(rows < table.num_embeddings, rows, 0)])
    return nn.Embedding.from_pretrained(table.weight[rows])


def _part(table: FeatureTable, part: slice) -> FeatureTable:
    """Row 0 and the rows of some items."""
    if part.start == 0 and part.stop == table.n_rows - 1:
        return table
    rows = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(part.start, part.stop) + 1])

    def of(buffer: Tensor | None) -> Tensor | None:
        return None if buffer is None else buffer[rows]

    return FeatureTable(
        len(rows),
        text=of(table.text),
        vector=of(table.vector),
        numbers=of(table.numbers),
        categories={name: table.codes(name)[rows] for name in table.category_names},
    )


def _statistics(bundle: Bundle, items: Sequence[Described], known: np.ndarray) -> np.ndarray | None:
    """(R, S) statistics as of the cut-off; None where the towers read none."""
    if not bundle.model.uses_statistics:
        return None
    assert bundle.cutoff is not None  # towers with statistics have a clock
    past, nothing = bundle.timeline, np.empty(0, np.int64)
    published = [NEVER if item.published is None else item.published for item in items]
    fresh = Timeline(
        np.zeros(2, np.int64), nothing, nothing, np.array(published), np.array(published),
        None if past.shown is None else Ragged.empty(len(items)), True,
    )  # fmt: skip
    out = fresh.statistics(np.arange(len(items)), bundle.cutoff)
    old = np.flatnonzero(known)
    if len(old):
        out[old] = past.statistics(known[old], bundle.cutoff)
    return out
