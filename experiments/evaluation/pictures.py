"""Plots of a scorecard and of a training run, as PNG files; matplotlib is loaded on the first.

What is compared keeps its colour in all pictures; a line through a dot is the 95 % interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scorecard = Mapping[str, Any]
MODEL = "model"
MODEL_COLOUR = "#c2410c"
COLOURS = ("#1d4ed8", "#0f766e", "#7e22ce", "#a16207", "#475569", "#be185d", "#4d7c0f")
GREY = "#64748b"
FAVOURITE_K = 20
"""The k of single-k pictures, where the scorecard has it."""
DPI = 130


def draw(scorecard: Scorecard, folder: Path, *, title: str = "") -> list[Path]:
    """Draw every picture for which the scorecard has numbers.

    Args:
        scorecard: as `recsys.experiments.evaluation.evaluate` makes it, or read back from its JSON.
        folder: where the pictures go; made when absent.
        title: stands above each picture, before what the scorecard says of its protocol.

    Returns:
        The files written: comparison.png, recall_at_k.png, differences.png, slices.png,
        impressions.png, or fewer.
    """
    pictures: dict[str, Callable[[Scorecard], Figure | None]] = {
        "comparison": comparison,
        "recall_at_k": recall_at_k,
        "differences": differences,
        "slices": slices,
        "impressions": impressions,
    }
    written = []
    for name, picture in pictures.items():
        figure = picture(scorecard)
        if figure is None:
            continue
        heading = " · ".join([title] * bool(title) + _protocol(scorecard, name != "impressions"))
        if heading:
            figure.suptitle(heading, fontsize=9, color=GREY, x=0.01, ha="left")
        written.append(_write(figure, Path(folder) / f"{name}.png"))
    return written


def comparison(scorecard: Scorecard) -> Figure | None:
    """Model and baselines with their intervals, best first: recall and NDCG at one k."""
    metrics = _favourites(scorecard.get(MODEL, {}))
    if not metrics:
        return None
    names = _names(scorecard)
    figure, axes = _figure(len(metrics), 1.2 + 0.42 * len(names))
    for axis, metric in zip(axes, metrics, strict=True):
        estimates = {name: _estimate(_of(scorecard, name).get(metric)) for name in names}
        order = sorted(names, key=lambda name: _sortable(estimates[name][0]))
        for row, name in enumerate(order):
            _dot(axis, estimates[name], row, _colour(name, names), label=True)
        axis.set_yticks(range(len(order)), [_words(name) for name in order])
        axis.set_title(_words(metric))
        _room(axis, len(order))
        axis.set_xlim(0, 1.16 * axis.get_xlim()[1])
    return figure


def recall_at_k(scorecard: Scorecard) -> Figure | None:
    """Recall against k of model and baselines, the intervals shaded."""
    ks = _ks(scorecard.get(MODEL, {}), "recall")
    if len(ks) < 2:
        return None
    names = _names(scorecard)
    figure, (axis,) = _figure(1, 4.2)
    ends: list[tuple[float, str]] = []
    for name in names:
        metrics, colour = _of(scorecard, name), _colour(name, names)
        line = [_estimate(metrics.get(f"recall_at_{k}")) for k in ks]
        value, low, high = zip(*line, strict=True)
        axis.plot(
            ks, value, "o-", color=colour, markersize=4, linewidth=2 if name == MODEL else 1.2
        )
        axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        if not math.isnan(value[-1]):
            ends.append((value[-1], name))
    axis.set_xscale("log")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_xlabel("k")
    axis.set_title("Recall at k")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#e2e8f0")
    _name_ends(axis, ks[-1], ends, names)
    return figure


def differences(scorecard: Scorecard) -> Figure | None:
    """Model minus each baseline, paired: an interval right of zero is a win."""
    against = {name: pairs for name, pairs in scorecard.get("differences", {}).items() if pairs}
    metrics = _favourites(next(iter(against.values()))) if against else []
    if not metrics:
        return None
    names, rows = _names(scorecard), list(against)[::-1]
    figure, axes = _figure(len(metrics), 1.2 + 0.42 * len(rows))
    for axis, metric in zip(axes, metrics, strict=True):
        axis.axvline(0, color=GREY, linewidth=1)
        for row, name in enumerate(rows):
            _dot(axis, _estimate(against[name].get(metric)), row, _colour(name, names), label=True)
        axis.set_yticks(range(len(rows)), [f"against {_words(name)}" for name in rows])
        axis.set_title(f"{_words(metric)}: model − baseline")
        _room(axis, len(rows))
        low, high = axis.get_xlim()
        axis.set_xlim(low, high + 0.16 * (high - low))
    return figure


def slices(scorecard: Scorecard) -> Figure | None:
    """Recall of model and baselines on each part of items and users; | is chance, where known."""
    parts = {name: part for name, part in scorecard.get("slices", {}).items() if part.get(MODEL)}
    metrics = _favourites(next(iter(parts.values()))[MODEL]) if parts else []
    if not metrics:
        return None
    return _parts(parts, metrics[0], "queries", _names(scorecard), start=0.0)


def impressions(scorecard: Scorecard) -> Figure | None:
    """AUC over what was shown, for all requests and for parts of them; one half is chance."""
    judged = scorecard.get("impressions") or {}
    if "auc" not in judged.get(MODEL, {}):
        return None
    parts = {"all": judged, **judged.get("slices", {})}
    figure = _parts(parts, "auc", "requests", ["model", *judged.get("baselines", {})], start=None)
    figure.axes[0].axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    figure.axes[0].set_title("AUC of what was shown (dotted: chance)")
    return figure


def training_curves(
    points: Sequence[Mapping[str, float | None]], path: Path, *, title: str = ""
) -> Path | None:
    """Draw every number of a training run against the step, one small panel a name.

    Args:
        points: {"step": …, name: value, …} in any order, names missing where not measured.
        path: PNG file to write.
        title: stands above.

    Returns:
        `path`, or None where there is nothing to draw.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.items():
            if name != "step" and value is not None and math.isfinite(value):
                curves.setdefault(name, []).append((float(point["step"] or 0), float(value)))
    if not curves:
        return None
    columns = min(3, len(curves))
    figure, axes = _figure(columns, 2.6 * math.ceil(len(curves) / columns), len(curves))
    for axis, name in zip(axes, sorted(curves), strict=True):
        steps, values = zip(*sorted(curves[name]), strict=True)
        few = "o-" if len(steps) < 30 else "-"
        axis.plot(steps, values, few, color=MODEL_COLOUR, markersize=3, linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(color="#e2e8f0")
        axis.locator_params(axis="x", nbins=5, integer=True)
        axis.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=9, color=GREY, x=0.01, ha="left")
    return _write(figure, Path(path))


def _parts(
    parts: Mapping[str, Any], metric: str, counted: str, names: list[str], start: float | None
) -> Figure:
    """One band a part, in it one dot a contestant; the legend below."""
    figure, (axis,) = _figure(1, 1.6 + (0.3 + 0.16 * len(names)) * len(parts))
    order = list(parts)[::-1]
    for band, part in enumerate(order):
        metrics = {MODEL: parts[part][MODEL], **parts[part].get("baselines", {})}
        for place, name in enumerate(names):
            height = band + 0.36 - 0.72 * (place + 0.5) / len(names)
            _dot(axis, _estimate(metrics.get(name, {}).get(metric)), height, _colour(name, names))
        chance = parts[part].get("chance", {}).get(metric)
        if chance is not None:
            axis.plot([chance, chance], [band - 0.36, band + 0.36], color=GREY, linestyle=":")
        if band % 2:
            axis.axhspan(band - 0.5, band + 0.5, color="#f1f5f9", zorder=0, linewidth=0)
    many = [parts[part].get(counted) for part in order]
    labels = [
        _words(part) + (f"\n{count:,} {counted}" if count is not None else "")
        for part, count in zip(order, many, strict=True)
    ]
    axis.set_yticks(range(len(order)), labels)
    chances = any("chance" in part for part in parts.values())
    axis.set_title(_words(metric) + (" (dotted: chance)" if chances else ""))
    if start is not None:
        axis.set_xlim(left=start)
    _room(axis, len(order))
    handles = [
        axis.plot([], [], "o-", color=_colour(name, names), label=_words(name))[0] for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _figure(columns: int, height: float, panels: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of its own: no global state, no window, so any thread may draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = columns if panels is None else panels
    width = {1: 7.0, 2: 9.5}.get(columns, 11.0)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows = math.ceil(panels / columns)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=9)
    return figure, axes


def _write(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as temporary:
        # Without the version of matplotlib, so that equal numbers give equal files.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _dot(
    axis: Axes,
    estimate: tuple[float, float, float],
    height: float,
    colour: str,
    *,
    label: bool = False,
) -> None:
    value, low, high = estimate
    if math.isnan(value):
        return
    if not math.isnan(low):
        axis.plot([low, high], [height, height], color=colour, linewidth=2, alpha=0.6)
    axis.plot([value], [height], "o", color=colour, markersize=5)
    if label:
        axis.annotate(
            f"{value:.4f}", (value if math.isnan(high) else high, height), (6, 0),
            textcoords="offset points", va="center", fontsize=8, color=colour,
        )  # fmt: skip


def _room(axis: Axes, rows: int) -> None:
    """Half a row above and below, and lines to read values by."""
    axis.set_ylim(-0.6, rows - 0.4)
    axis.grid(axis="x", color="#e2e8f0")
    axis.set_axisbelow(True)
    axis.locator_params(axis="x", nbins=6)


def _name_ends(axis: Axes, last_k: int, ends: list[tuple[float, str]], names: list[str]) -> None:
    """Names at the right end of their lines, moved apart where lines end close together."""
    top = axis.get_ylim()[1]
    least, height = 0.055 * top, -math.inf
    for value, name in sorted(ends):
        height = max(value, height + least)
        axis.annotate(
            _words(name), (last_k, value), (1.02, height), xycoords="data",
            textcoords=axis.get_yaxis_transform(), va="center", fontsize=9,
            color=_colour(name, names), fontweight="bold" if name == MODEL else "normal",
        )  # fmt: skip


def _names(scorecard: Scorecard) -> list[str]:
    return [MODEL, *scorecard.get("baselines", {})]


def _of(scorecard: Scorecard, name: str) -> Mapping[str, Any]:
    return scorecard[MODEL] if name == MODEL else scorecard["baselines"][name]


def _colour(name: str, names: Sequence[str]) -> str:
    if name == MODEL:
        return MODEL_COLOUR
    others = [other for other in names if other != MODEL]
    return COLOURS[others.index(name) % len(COLOURS)]


def _estimate(entry: Any) -> tuple[float, float, float]:
    """Value, low and high of an entry; NaN for null and for what is not there."""
    if not isinstance(entry, Mapping):
        return math.nan, math.nan, math.nan
    ends = [entry.get(end) for end in ("value", "low", "high")]
    value, low, high = (math.nan if end is None else float(end) for end in ends)
    return value, low, high


def _ks(metrics: Mapping[str, Any], kind: str) -> list[int]:
    matches = (re.fullmatch(rf"{kind}_at_(\d+)", name) for name in metrics)
    return sorted(int(match[1]) for match in matches if match)


def _favourites(metrics: Mapping[str, Any]) -> list[str]:
    """Recall and NDCG at 20, or at the k nearest to it."""
    chosen = []
    for kind in ("recall", "ndcg"):
        ks = _ks(metrics, kind)
        if ks:
            chosen.append(f"{kind}_at_{min(ks, key=lambda k: abs(math.log(k / FAVOURITE_K)))}")
    return chosen


def _words(name: str) -> str:
    """A name of the scorecard as people write it: recall_at_20 → Recall@20."""
    match = re.fullmatch(r"(\w+)_at_(\d+)", name)
    if match:
        kind = match[1].replace("_", " ")
        return f"{kind.upper() if kind in ('ndcg', 'mrr') else kind.capitalize()}@{match[2]}"
    if name in ("auc", "mrr"):
        return name.upper()
    return "co-occurrence" if name == "co_occurrence" else name.replace("_", " ")


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _protocol(scorecard: Scorecard, ranking: bool) -> list[str]:
    """What a picture must say of itself when it stands alone; `ranking`: with the queries."""
    protocol = scorecard.get("protocol") or {}
    lines = ["simulated"] if protocol.get("simulated") else []
    if not ranking:
        return lines
    if "queries_judged" in protocol:
        lines.append(f"{protocol['queries_judged']:,} queries")
    if "users_judged" in protocol:
        lines.append(f"{protocol['users_judged']:,} users")
    if "queries" in protocol:
        lines.append(str(protocol["queries"]))
    return lines
