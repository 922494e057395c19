"""Results as tables on stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDE = 140
"""Columns of a table that goes into a file or a pipe."""


def facts(values: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if _whole(value) else escape(str(value)))
    _console().print(table)


def guesses(guessed: Sequence[tuple[str, str, str]]) -> None:
    """What was guessed of a log: key, value and why."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for row in guessed:
        table.add_row(*map(escape, row))
    _console().print(table)


def answers(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Items with rank, score and fields; what is longer than a line is cut."""
    if not rows:
        _console().print("No item answers this.")
        return
    names = [name for name in rows[0] if name != "score"]
    if title:
        _console().print(f"\n[bold]{escape(title)}[/]")
    table = Table(box=None)
    table.add_column("", justify="right", style="dim")
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    scored = "score" in rows[0]
    if scored:
        table.add_column("score", justify="right")
    for rank, row in enumerate(rows, start=1):
        cells = ("" if row[name] is None else escape(_cell(row[name])) for name in names)
        table.add_row(str(rank), *cells, *([f"{row['score']:.3f}"] if scored else []))
    _console().print(table)


def scorecard(card: Mapping[str, Any]) -> None:
    """The towers beside the baselines, slices, impressions, the protocol and the verdict."""
    console = _console()
    protocol = card.get("protocol") or {}
    names = _chosen(card["model"])
    _contest("All items ranked, 95 % intervals", card, names)
    for part, sub in (card.get("slices") or {}).items():
        title = f"{part.replace('_', ' ')}: {sub['queries']:,} queries"
        if "chance" in sub:
            title += f", {sub['candidates']:,} candidates"
        recalls = [name for name in names if name.startswith("recall")]
        _contest(title, sub, recalls)
    shown = card.get("impressions")
    if shown:
        whole = {"all": shown, **(shown.get("slices") or {})}
        for part, sub in whole.items():
            title = f"What was shown, {part} clicks: {sub['requests']:,} requests"
            _contest(title, sub, list(sub["model"])[:3])
    for name, value in (card.get("index") or {}).items():
        if isinstance(value, Mapping) and name != "recall_of_items":
            console.print(f"[dim]index {_plain(name)} against exact search[/] {_number(value)}")
    console.print()
    lines = {k: v for k, v in protocol.items() if not isinstance(v, Mapping)}
    facts(lines)
    if card.get("verdict"):
        console.print(f"\n[bold]{escape(str(card['verdict']))}[/]")


def _contest(title: str, card: Mapping[str, Any], names: Sequence[str]) -> None:
    """A row the model and one each baseline, the best value of a column in bold."""
    contestants = {"two towers": card["model"], **(card.get("baselines") or {})}
    table = Table(box=None)
    table.add_column("")
    for name in names:
        table.add_column(_plain(name), justify="right", no_wrap=True)
    best = {
        name: max((_value(metrics.get(name)) for metrics in contestants.values()), default=0.0)
        for name in names
    }
    for who, metrics in contestants.items():
        cells = []
        for name in names:
            text = _number(metrics.get(name))
            won = _value(metrics.get(name)) == best[name]
            cells.append(f"[bold]{text}[/]" if won else text)
        table.add_row(_plain(who), *cells)
    if "chance" in card:
        table.add_row("[dim]chance[/]", *(f"{card['chance'][name]:.4f}" for name in names))
    _console().print(f"\n[bold]{escape(title)}[/]")
    _console().print(table)


def _chosen(metrics: Mapping[str, Any]) -> list[str]:
    """A few of many metrics: recall at three depths, the rest at one."""
    depths = sorted({int(n.rpartition("_")[2]) for n in metrics if n.startswith("recall_at_")})
    middle = 20 if 20 in depths else depths[len(depths) // 2]
    wanted = [f"recall_at_{k}" for k in dict.fromkeys((min(10, middle), middle, depths[-1]))]
    wanted += [f"{name}_at_{middle}" for name in ("ndcg", "mrr", "coverage")]
    return [name for name in wanted if name in metrics]


def _value(metric: Mapping[str, Any] | None) -> float:
    value = metric.get("value") if metric else None
    return -math.inf if value is None or math.isnan(value) else float(value)


def _number(metric: Mapping[str, Any] | None) -> str:
    if metric is None or math.isinf(_value(metric)):
        return "–"
    if metric.get("low") is None:
        return f"{metric['value']:.4f}"
    half = (metric["high"] - metric["low"]) / 2
    return f"{metric['value']:.4f} ±{half:.4f}"


def _plain(name: str) -> str:
    return name.replace("_at_", "@").replace("_", " ")


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE)
