"""`recsys demo`: the whole pipeline on the simulated shop.

Everything here is simulated and says so; the best possible recall is known and stands beside ours.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import numpy as np

from recsys.bootstrap import Bootstrap, Estimate
from recsys.experiments import show
from recsys.experiments.config import RunConfig, loads
from recsys.experiments.evaluation.evaluate import test_side
from recsys.experiments.run import TrainResult, prepare, train
from recsys.experiments.shop.simulate import simulate
from recsys.experiments.shop.world import World
from recsys.features.batching.batch import Queries
from recsys.features.batching.examples import ask
from recsys.metrics import recall_at
from recsys.ragged import Ragged
from recsys.serving.later_events import extend
from recsys.serving.recommender import Recommender

RUN = """\
# The run of `recsys demo`, on a SIMULATED shop. `recsys train {path}` starts it again.
name = "run"
out = "{folder}/runs"

[data]
format = "impressions"
log = "{folder}/shop/impressions.parquet"
items = "{folder}/shop/items.parquet"

[data.columns]
position = "position"
context_categories = ["device"]

[data.catalog]
item = "item"
title = "title"
text = ["description"]
categories = ["category", "brand"]
numbers = ["price"]
published = "published"
fields = ["category", "price"]

[split]
test = "3d"
valid = "2d"

[training]
epochs = {epochs}
"""


def demo(folder: str | Path = "runs/demo", *, seed: int = 0, epochs: int = 12) -> TrainResult:
    """Simulate, train, judge and show.

    Args:
        folder: data and runs go here; a shop that stands there is used again.
        seed: of the shop.
        epochs: at most.
    """
    began = time.perf_counter()
    folder = Path(folder)
    with contextlib.redirect_stdout(sys.stderr):
        if not (folder / "shop" / "world.json").exists():
            print("Simulating a shop", file=sys.stderr)
            simulate(seed=seed).write(folder / "shop")
        world = World.load(folder / "shop")
        path = folder / "run.toml"
        text = RUN.format(folder=folder.as_posix(), path=path.as_posix(), epochs=epochs)
        path.write_text(text, encoding="utf-8")
        config = loads(text, str(path))
        result = train(config)
    counts = world.counts()
    print(
        f"\nA SIMULATED shop: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['shown']:,} showings, {counts['clicks']:,} clicks. Nothing in it is real."
    )
    show.scorecard(result.scorecard)
    recommender = Recommender.load(result.bundle)
    _beside_the_best(config, recommender, world, result)
    _one_user(recommender)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Where to look next:")
    show.facts(
        {
            "the run": path,
            "the bundle": result.bundle,
            "pictures": result.folder / "pictures",
            "all runs": f"mlflow ui --backend-store-uri sqlite:///{config.out}/mlflow.db",
            "any text": f'recsys similar {result.bundle} --text "oak desk lamp"',
            "over HTTP": f"recsys serve {result.bundle}",
            "every user": f"recsys candidates {result.bundle} --k 100 --out candidates.parquet",
            "your own log": "recsys init LOG ITEMS --out run.toml",
        }
    )
    return result


def best_possible(
    config: RunConfig, recommender: Recommender, world: World, k: int = 20
) -> dict[str, Estimate]:
    """Recall at k of the true click rates and of the true tastes, on the scorecard's own queries.

    "clicks" ranks by the click rate that the log is drawn from, so nothing can do better but by
    luck; "taste" by what the user would click if it were looked at, whatever the shop shows.
    """
    bundle, coded = extend(recommender.bundle, test_side(prepare(config)))
    questions = ask(
        bundle.timeline, coded.user, coded.item, coded.time, each_event=True, cutoff=None,
        max_history=1, drop_seen=True,
    )  # fmt: skip
    queries: Queries = questions.queries
    users = bundle.users.decode(queries.users).to_list()
    place = bundle.items.encode(world.items["item"]).astype(np.int64)
    of_row = np.full(bundle.items.size, -1, np.int64)
    of_row[place] = np.arange(len(place))
    seen = bundle.timeline.histories(queries.users, queries.times)
    seen = Ragged(seen.offsets, of_row[seen.values])
    bootstrap = Bootstrap(queries.users)
    assert queries.times is not None  # each event is asked at its own
    best_recall = {}
    for kind in ("clicks", "taste"):
        best = world.best(users, queries.times, k, exclude=seen, kind=kind)
        ranked = np.where(best >= 0, place[np.maximum(best, 0)], -1)
        best_recall[kind] = bootstrap.estimate(recall_at(ranked, questions.targets, k))
    return best_recall


def _beside_the_best(
    config: RunConfig, recommender: Recommender, world: World, result: TrainResult
) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        best = best_possible(config, recommender, world)
    ours = result.scorecard["model"]["recall_at_20"]["value"]
    print("\nIn a simulated world the best possible recall@20 is known:")
    show.facts(
        {
            "true click rates (nothing can beat this)": str(best["clicks"]),
            "true tastes alone": str(best["taste"]),
            "the towers": f"{ours:.4f}, {ours / best['clicks'].value:.0%} of the best possible",
        }
    )


def _one_user(recommender: Recommender) -> None:
    bundle = recommender.bundle
    lengths = np.diff(bundle.timeline.user_offsets)
    user = int(np.argsort(-lengths, kind="stable")[len(lengths) // 4])
    name = bundle.users.decode([user])[0]
    had = bundle.timeline.histories(np.array([user]), last=8).values[::-1]
    fields = bundle.catalog[had - 1]
    show.answers(fields.to_dicts(), f"What {name} clicked last, newest first (simulated)")
    show.answers(recommender.recommend(user=name, k=10).to_list(), f"Recommended to {name}")
    item = bundle.items.decode(had[:1])[0]
    title = fields["title"][0] if "title" in fields.columns else item
    show.answers(recommender.similar(item=item, k=5).to_list(), f"Similar to {item}, {title}")
