"""Make a serving bundle of trained towers, with everything known before the test side.

Legend: N item rows, U user rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from recsys.experiments.config import RunConfig
from recsys.experiments.evaluation.evaluate import protocol
from recsys.features.batching.examples import timeline_until
from recsys.features.prepared.columns import ContextColumn
from recsys.features.prepared.dataset import Dataset
from recsys.features.prepared.item_coder import ItemCoder
from recsys.search import ExactIndex
from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.tables import Side
from recsys.towers.embedding import FeatureTable, narrow_tables
from recsys.towers.encode import encode_items
from recsys.towers.two_tower import TwoTower
from recsys.vocab import Vocab

if TYPE_CHECKING:
    from recsys.features.text.encoder import TextEncoder


def make_bundle(
    config: RunConfig, dataset: Dataset, model: TwoTower, encoder: TextEncoder | None, path: Path
) -> Path:
    """Everything known before the test side, in one folder.

    A text encoder that learned with the towers takes the place of `encoder`, with which it began.
    """
    if model.texts is not None:
        encoder = model.texts.trained()
    timeline = timeline_until(dataset, Side.VALID)
    cutoff = _cutoff(dataset, timeline.time)
    # Items and users that only the test side knows are left out; rows move up.
    catalog = dataset.catalog
    described = [name for name in catalog.columns if name != "item"]
    met = np.zeros(dataset.n_items, bool)
    met[timeline.item] = True
    if timeline.shown is not None:
        met |= timeline.shown.lengths > 0
    if described:
        met[1:] |= (
            catalog.select(pl.any_horizontal(pl.col(described).is_not_null()))
            .to_series()
            .to_numpy()
        )
    met[0] = True
    items = np.flatnonzero(met)
    users = np.diff(timeline.user_offsets) > 0
    # A user table describes users who have not come yet.
    users |= bool(
        dataset.user_numbers.shape[1] or dataset.user_categories or any(dataset.user_text)
    )
    users[0] = True
    kept_users = np.flatnonzero(users)
    place = np.full(dataset.n_items, -1, np.int64)
    place[items] = np.arange(len(items))
    timeline = replace(
        timeline,
        user_offsets=np.append(np.asarray(timeline.user_offsets)[kept_users], len(timeline.item)),
        item=place[timeline.item].astype(np.int32),
        first_seen=timeline.first_seen[items],
        exists_from=timeline.exists_from[items],
        shown=None if timeline.shown is None else timeline.shown.take(items),
    )
    with_tables = _with_rows(model, items, kept_users)
    shown = ["item", *(n for n in ("title", *config.data.catalog.fields) if n in catalog.columns)]
    catalog = catalog[items[1:] - 1].select(list(dict.fromkeys(shown)))
    window = _window(dataset)[items]
    allowed = timeline.alive(cutoff) & bundles.available(window, cutoff)
    rows = np.flatnonzero(allowed)
    vectors = encode_items(with_tables, np.arange(len(items)), timeline, cutoff)
    bundle = Bundle(
        model=with_tables,
        items=Vocab(dataset.items.ids.gather(items[1:] - 1)),
        users=Vocab(dataset.users.ids.gather(kept_users[1:] - 1)),
        catalog=catalog,
        window=window,
        timeline=timeline,
        vectors=vectors,
        rows=rows,
        index=ExactIndex(np.ascontiguousarray(vectors[rows])),
        cutoff=cutoff,
        contexts=contexts(dataset),
        coder=ItemCoder.of(dataset),
        manifest={
            "config": config.model_dump(mode="json"),
            "warm_items": dataset.n_refit_items if config.training.refits else dataset.n_warm_items,
            "prepared": str(dataset.path.resolve()),
            "prepared_digest": dataset.manifest["input"]["digest"],
            "protocol": protocol(config, dataset),
            "data": {k: dataset.manifest[k] for k in ("split", "skips", "counts")},
        },
    )
    bundle = bundles.with_index(bundle, config.index)
    return bundles.save(bundle, path, rules=config.index, encoder=encoder, seed=config.seed)


def contexts(dataset: Dataset) -> tuple[ContextColumn, ...]:
    """How the context columns became codes."""
    return tuple(
        ContextColumn(name, dataset.context_vocab(name), dataset.manifest["context"][name]["edges"])
        for name in dataset.context_sizes
    )


def _window(dataset: Dataset) -> np.ndarray:
    """(N, 2) int64, from when on and until when each item may be recommended."""
    window = np.empty((dataset.n_items, 2), np.int64)
    bounds = (dataset.item_available_from, dataset.item_available_until)
    limits = np.iinfo(np.int64)
    for side, (array, free) in enumerate(zip(bounds, (limits.min, limits.max), strict=True)):
        window[:, side] = free if array is None else array
    if dataset.item_available is not None:
        window[~np.asarray(dataset.item_available).astype(bool)] = 0
    return window


def _cutoff(dataset: Dataset, times: np.ndarray) -> int | None:
    if not dataset.timed:
        return None
    return dataset.test_from if dataset.test_from is not None else int(times.max()) + 1


def _with_rows(model: TwoTower, items: np.ndarray, users: np.ndarray) -> TwoTower:
    """The same towers over some rows of their tables; text that was learned becomes a table, and
    what is around items a part of their id vectors.

    The tables are narrowed here, so that all that a bundle says is computed from what it holds.
    """

    def some(table: FeatureTable, rows: np.ndarray, text: Any) -> FeatureTable:
        def of(buffer: Any) -> Any:
            return None if buffer is None else buffer[rows]

        return FeatureTable(
            len(rows),
            text=of(text),
            vector=of(table.vector),
            numbers=of(table.numbers),
            categories={name: of(table.codes(name)) for name in table.category_names},
        )

    spec, weights = model.item_spec, model.state_dict()
    inputs, name = model.item_tower.inputs, "item_tower.inputs."
    if inputs.context is not None or inputs.text_neighbours is not None:
        weights[f"{name}ids.weight"] = inputs.whole_ids()
    if inputs.text_neighbours is not None:
        starts = inputs.starts_of(torch.from_numpy(items[items >= spec.ids]))
        spec = replace(spec, text_neighbours=inputs.text_neighbours.most, starts=len(starts) - 1)
        weights[f"{name}starts.weight"] = starts
        weights[f"{name}alone.weight"] = inputs.ids.weight
        weights[f"{name}likeness"] = inputs.text_neighbours.share
    kept = TwoTower(
        model.rules,
        some(model.items, items, model.item_texts()),
        some(model.users, users, model.users.text),
        spec, model.user_spec, model.context,
    )  # fmt: skip
    learning = ("texts.", f"{name}context.", f"{name}text_neighbours.")
    kept.load_state_dict({n: w for n, w in weights.items() if not n.startswith(learning)})
    narrow_tables(kept)
    return kept.eval()
