"""A bundle of any number of items without training, to measure serving with.

    python -m recsys.experiments.benchmarks.synthetic FOLDER --items 1000000 [--dimensions 64]

Items are unit vectors around centres of centres (as learned ones lie), known by their ids alone;
users have short histories within a few topics, so that what is recommended is not arbitrary.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from recsys.tables import SECOND

TITLE_WORDS = ("brass", "oak", "linen", "blue", "tall", "desk", "lamp", "chair", "tea", "coat")
CATEGORIES = ("tea", "coffee", "lamps", "chairs", "coats", "books", "toys", "tools")
CUTOFF = 1_704_067_200 * SECOND
DAY = 86_400 * SECOND


def clustered(items: int, dimensions: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(N, D) unit vectors, and the topic of each: √N topics of groups of about 50 items."""
    topics = max(2, int(items**0.5))
    groups = max(topics, items // 50)
    centre = rng.standard_normal((topics, dimensions), np.float32)
    topic_of = rng.integers(0, topics, groups)
    group = centre[topic_of] + 0.7 * rng.standard_normal((groups, dimensions), np.float32)
    group_of = rng.integers(0, groups, items)
    vectors = group[group_of]
    vectors += 0.7 * rng.standard_normal(vectors.shape, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, topic_of[group_of]


def make(
    path: Path,
    *,
    items: int,
    dimensions: int = 64,
    users: int = 1000,
    history: int = 20,
    seed: int = 0,
    threads: int = 0,
    neighbours: int = 100,
) -> Path:
    """Write the bundle; the graph is built with `threads` threads (0: all cores)."""
    import polars as pl
    import torch

    from recsys.features.prepared.item_coder import ItemCoder
    from recsys.features.prepared.timeline import Timeline
    from recsys.serving import bundle as bundles
    from recsys.serving.bundle import Bundle
    from recsys.serving.index import IndexRules, build_index
    from recsys.tables import CatalogSchema
    from recsys.towers.embedding import FeatureTable, narrow_tables
    from recsys.towers.encode import encode_items
    from recsys.towers.rules import MeanHistory, TowerRules
    from recsys.towers.two_tower import TwoTower
    from recsys.vocab import Vocab

    rng = np.random.default_rng(seed)
    vectors, topic = clustered(items, dimensions, rng)
    rules = TowerRules(
        dimension=dimensions,
        hidden=0,
        history=MeanHistory(),
        statistics=False,
        dropout=0,
        id_dropout=0,
    )
    tables = FeatureTable(items + 1), FeatureTable(users + 1)
    model = TwoTower(rules, *tables, tables[0].spec(items + 1, {}), tables[1].spec(0, {})).eval()
    with torch.no_grad():
        model.item_tower.inputs.ids.weight[1:] = torch.from_numpy(vectors)
    narrow_tables(model)  # as a bundle keeps them

    by_topic = np.argsort(topic, kind="stable")
    edges = np.searchsorted(topic[by_topic], np.arange(topic.max() + 2))
    liked = rng.choice(np.flatnonzero(np.diff(edges)), (users, 3))
    of = np.take_along_axis(liked, rng.integers(0, 3, (users, history)), 1)  # (users, history)
    item = by_topic[rng.integers(edges[of], edges[of + 1])] + 1
    born = CUTOFF - rng.integers(31, 365, items + 1) * DAY
    timeline = Timeline.build(
        np.repeat(np.arange(1, users + 1), history),
        item.ravel().astype(np.int32),
        CUTOFF - rng.integers(1, 30 * DAY, users * history),
        n_users=users + 1,
        first_seen=born,
        exists_from=born,
    )
    numbers = np.arange(items)
    words = np.array(TITLE_WORDS)[rng.integers(0, len(TITLE_WORDS), (3, items))]
    catalog = pl.DataFrame(
        {
            "item": [f"i{number:07}" for number in numbers],
            "title": pl.Series(words[0]) + " " + pl.Series(words[1]) + " " + pl.Series(words[2]),
            "category": np.array(CATEGORIES)[topic % len(CATEGORIES)],
            "price": np.round(rng.lognormal(3, 1, items), 2),
        }
    )
    limits = np.iinfo(np.int64)
    window = np.tile(np.array([limits.min, limits.max]), (items + 1, 1))
    stored = encode_items(model, np.arange(items + 1))
    rows = np.arange(1, items + 1)
    index_rules = IndexRules(threads=threads, neighbours=neighbours)
    bundle = Bundle(
        model, Vocab(catalog["item"]), Vocab(f"u{user:05}" for user in range(users)), catalog,
        window, timeline, stored, rows, build_index(stored[rows], index_rules), CUTOFF,
        coder=ItemCoder(CatalogSchema(title="title", fields=("category", "price")), {}),
        manifest={"warm_items": items, "synthetic": {"items": items, "seed": seed}},
    )  # fmt: skip
    return bundles.save(bundle, path, rules=index_rules, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--neighbours", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    start = time.perf_counter()
    options = dict(vars(asked))
    make(options.pop("folder"), **options)
    print(f"{asked.folder}: {asked.items:,} items in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
