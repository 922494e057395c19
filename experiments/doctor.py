"""`recsys doctor`: diagnosis of a run from its vectors and learning curves.

Legend: Q queries, N item rows that may be answered, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from recsys.errors import DataError
from recsys.experiments.tracking.spool import RECORD, Spool
from recsys.files import read_json
from recsys.search import ExactIndex
from recsys.serving.recommender import Recommender
from recsys.tables import DAY
from recsys.towers import diagnosis
from recsys.towers.diagnosis import Measured, Part
from recsys.towers.encode import encode_items, encode_users

ASKED, COMPARED, LOOKED_AT = 1000, 2000, 20_000
"""At most so many users, vectors of which all pairs are compared, and items looked at for twins."""
FEWEST = 50
"""Items chosen in the last week that stand for all, where towers read item statistics."""
DEEPEST = 20
"""Answers of a user that are compared with those of others; a tenth of a small catalogue."""


def examine(path: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Measure a run and say what is wrong with it.

    Everything that needs no later event is measured from the bundle: users are asked as of just
    before their last choice. What was not learned from comes from the scorecard beside the bundle,
    the temperature from the run's curves.

    Args:
        path: the folder of a run, or of a bundle.
        seed: of the users and items looked at.

    Returns:
        `bundle`, `measured`, `findings` (name, evidence, cause, remedy), `not_judged` and the last
        `audit` of negatives, where the run has one.

    Raises:
        DataError: there is neither a run with a bundle nor a bundle.
        BundleError: the bundle is damaged.
    """
    bundle, run = _folders(Path(path))
    recommender = Recommender.load(bundle)
    curves = _curves(run)
    measured, missing = _measure(recommender, run, curves, seed)
    return {
        "bundle": str(bundle),
        "findings": [asdict(finding) for finding in diagnosis.diagnose(measured)],
        "measured": asdict(measured),
        "not_judged": missing,
        "audit": {name: v for name, v in curves.items() if name.startswith("audit/")},
    }


def tell(report: Mapping[str, Any]) -> None:
    """The report as people read it, on stdout."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from recsys.experiments import show

    console = Console(width=None if sys.stdout.isatty() else show.WIDE)
    measured = dict(report["measured"])
    parts = measured.pop("parts")
    show.facts({name: _short(value) for name, value in measured.items()})
    for name, left in parts.items():
        show.facts({f"without {name}": ", ".join(f"{k} {_short(v)}" for k, v in left.items())})
    if report["audit"]:
        console.print("\n[bold]The negatives of the last epoch[/]")
        show.facts({name.removeprefix("audit/"): _short(v) for name, v in report["audit"].items()})
    for note in report["not_judged"]:
        console.print(f"[dim]{escape(note)}[/]")
    if not report["findings"]:
        console.print("\n[bold]Nothing is wrong as far as this can tell.[/]")
    for finding in report["findings"]:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for part in ("evidence", "cause", "remedy"):
            table.add_row(part, escape(finding[part]))
        console.print(f"\n[bold]{escape(finding['name'])}[/]")
        console.print(table)


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def _folders(path: Path) -> tuple[Path, Path | None]:
    """The bundle's folder and, where there is one, the run's."""
    if (path / "bundle").is_dir():
        return path / "bundle", path
    if not (path / "manifest.json").is_file():
        raise DataError(
            f"{path} holds neither a run with a bundle nor a bundle. Name the folder of a run that "
            "has ended, or a bundle's."
        )
    above = path.resolve().parent
    return path, above if (above / RECORD).is_file() else None


def _curves(run: Path | None) -> dict[str, float]:
    """The last finite value of every curve."""
    if run is None or not (run / RECORD).is_file():
        return {}
    last: dict[str, float] = {}
    for point in Spool.open(run).points():
        last |= {name: v for name, v in point["metrics"].items() if math.isfinite(v)}
    return last


def _measure(
    recommender: Recommender, run: Path | None, curves: Mapping[str, float], seed: int
) -> tuple[Measured, list[str]]:
    bundle, missing = recommender.bundle, list[str]()
    model, timeline, rows = bundle.model, bundle.timeline, bundle.rows
    config = bundle.manifest["config"]
    rng = np.random.default_rng([seed, 29])
    width = model.rules.dimension  # without a bias and the share of texts
    depth = max(1, min(DEEPEST, len(rows) // 10))
    k = _depth(config["evaluate"]["ks"], len(rows))
    drop_seen = config["evaluate"]["drop_seen"]

    users = rng.permutation(np.flatnonzero(np.diff(timeline.user_offsets) > 1))
    last = np.asarray(timeline.user_offsets)[users + 1] - 1
    current = rows
    if model.uses_statistics:
        # Vectors are as of the cut-off: what lies further back would be judged by today's clicks.
        newest = np.argsort(-np.asarray(timeline.time)[last], kind="stable")
        users, last = users[newest], last[newest]
        lately = rows[timeline.popularity(bundle.cutoff, 7 * DAY)[rows] > 0]
        current = lately if len(lately) >= FEWEST else rows
    users, last = users[:ASKED], last[:ASKED]
    queries = recommender.queries(users, np.asarray(timeline.time)[last])
    chosen = np.asarray(timeline.item)[last].astype(np.int64)
    some = np.flatnonzero((queries.history.lengths > 0) & recommender.allowed[chosen])
    if len(some) < 2 or len(rows) < 2:
        raise DataError(
            f"The bundle has {len(some)} users with a history and {len(rows)} items; at least two "
            "of each are needed to tell anything."
        )
    queries, chosen = queries.take(some), chosen[some]
    past = recommender.seen(queries)
    fresh = np.ones(len(chosen), bool)
    if drop_seen:
        fresh[past.row_of()[past.values == chosen[past.row_of()]]] = False

    def answers(vectors: np.ndarray) -> tuple[np.ndarray, float | None]:
        """First answers, whatever was seen, and recall of the last choices."""
        index = ExactIndex(np.ascontiguousarray(vectors[rows]))
        other = Recommender(replace(bundle, vectors=vectors, index=index))
        first = other.recommend_rows(queries, depth, drop_seen=False, fallback=False)[0]
        judged = np.flatnonzero(fresh)
        if not len(judged):
            return first, None
        ranked, *_ = other.recommend_rows(
            queries.take(judged), k, drop_seen=drop_seen, fallback=False
        )
        return first, float((ranked == chosen[judged][:, None]).any(1).mean())

    first, recall = answers(bundle.vectors)
    if recall is None:
        missing.append("No user's last choice was new to them, so that recall is not judged.")
    left = {}
    everything = np.arange(bundle.items.size)
    sample = rng.permutation(current)[:LOOKED_AT]
    for part in diagnosis.parts(model):
        with diagnosis.hidden(model, part):
            vectors = encode_items(model, everything, timeline, bundle.cutoff)
        others, without = answers(vectors)
        one, other = (diagnosis.units(v[sample, :width]) for v in (bundle.vectors, vectors))
        left[part] = Part(
            float((one * other).sum(1).mean()), diagnosis.kept(first, others), without or 0.0
        )

    user = encode_users(model, queries, timeline, bundle.cutoff)  # (Q, D)
    item = bundle.vectors[sample, :width]
    popularity = timeline.popularity(bundle.cutoff)
    popular = diagnosis.most_popular(popularity, rows, depth)
    mean_score = bundle.vectors[rows] @ user.mean(0)
    norms = np.linalg.norm(item, axis=1)
    compared = item[:COMPARED]
    held_out, baseline = _held_out(run, curves, k, missing)
    temperature, learned = _temperature(config, curves, missing)
    return Measured(
        items=len(rows),
        dimension=width,
        score=model.rules.score,
        item_rank=diagnosis.effective_rank(compared),
        user_rank=diagnosis.effective_rank(user[:, :width]),
        item_cosine=diagnosis.mean_cosine(compared),
        user_cosine=diagnosis.mean_cosine(user[:, :width]),
        item_uniformity=diagnosis.uniformity(compared),
        user_uniformity=diagnosis.uniformity(user[:, :width]),
        alignment=diagnosis.alignment(user[:, :width], bundle.vectors[chosen, :width]),
        norm=float(norms.mean()),
        norm_spread=float(norms.std() / max(norms.mean(), 1e-12)),
        norm_popularity=diagnosis.rank_correlation(norms.round(5), popularity[sample]),
        duplicates=diagnosis.duplicates(diagnosis.units(item)),
        score_popularity=diagnosis.rank_correlation(mean_score, popularity[rows]),
        same_for_all=diagnosis.overlap(first),
        popular_share=float(np.isin(first[first >= 0], popular).mean()),
        popular_choices=float(popularity[popular].sum() / max(popularity[rows].sum(), 1e-12)),
        depth=depth,
        k=k,
        recall=recall,
        held_out=held_out,
        popularity_recall=baseline,
        parts=left,
        temperature=temperature,
        temperature_learned=learned,
    ), missing  # fmt: skip


def _depth(ks: list[int], items: int) -> int:
    """The depth that scorecards are read at."""
    return min(DEEPEST if DEEPEST in ks else sorted(ks)[len(ks) // 2], items)


def _held_out(
    run: Path | None, curves: Mapping[str, float], k: int, missing: list[str]
) -> tuple[float | None, float | None]:
    """Recall on what was not learned from, and that of the best popularity baseline there."""
    name = f"recall_at_{k}"
    if run is not None and (run / "scorecard.json").is_file():
        card = read_json(run / "scorecard.json")
        ours = (card.get("model", {}).get(name) or {}).get("value")
        others = [
            (metrics.get(name) or {}).get("value")
            for who, metrics in card.get("baselines", {}).items()
            if "popular" in who
        ]
        known = [value for value in others if value is not None]
        if ours is not None:
            return ours, max(known, default=None)
    if f"val/{name}" in curves:
        return curves[f"val/{name}"], None
    missing.append(f"No scorecard beside the bundle has {name}, so that overfit is not judged.")
    return None, None


def _temperature(
    config: Mapping[str, Any], curves: Mapping[str, float], missing: list[str]
) -> tuple[float | None, bool]:
    rules = config["training"]
    learned = rules["temperature"] == "learned"
    if not learned:
        return float(rules["temperature"]), False
    if "train/temperature" in curves:
        return curves["train/temperature"], True
    missing.append("The learned temperature stands in a run's curves, which are not here.")
    return None, True
