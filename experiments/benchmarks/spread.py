"""Scorecards of several seeds in one Markdown table: the mean, and the range over the seeds.

    recsys train RUN.toml --set seed=0 --json > run-0.json      # and 1, 2
    python -m recsys.experiments.benchmarks.spread run-0.json run-1.json run-2.json
    python -m recsys.experiments.benchmarks.spread --part impressions --metrics auc run-*.json

Files are what `recsys train --json` or `recsys evaluate --json` printed. Differences are paired;
the interval shown with them spans those of all seeds, so that "above 0" holds for each of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys.errors import DataError

METRICS = ("recall_at_10", "recall_at_20", "recall_at_100", "ndcg_at_20")


def read(path: Path, part: str) -> dict[str, Any] | None:
    """A part of a scorecard, e.g. "slices.cold_items", or None where the scorecard has none."""
    card = json.loads(path.read_text(encoding="utf-8"))
    card = card.get("scorecard", card)
    if "model" not in card:
        raise DataError(f"{path} is no scorecard. Write it with recsys train RUN.toml --json.")
    for key in filter(None, part.split(".")):
        card = card.get(key) or {}
    return card or None


def spread(cards: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """The Markdown table of the same part of several scorecards."""
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]

    def values(path: Sequence[str]) -> str:
        found = []
        for card in cards:
            value: Any = card
            for key in path:
                value = (value or {}).get(key)
            found.append((value or {}).get("value"))
        known = [value for value in found if value is not None]
        if not known:
            return "–"
        mean = sum(known) / len(known)
        if len(known) == 1 or max(known) == min(known):
            return f"{mean:.4f}"
        return f"{mean:.4f} ({min(known):.4f}–{max(known):.4f})"

    def gap(name: str, metric: str) -> str:
        found = [card["differences"][name].get(metric) or {} for card in cards]
        known = [one for one in found if one.get("low") is not None]
        if not known:
            return "–"
        mean = sum(one["value"] for one in known) / len(known)
        low, high = min(one["low"] for one in known), max(one["high"] for one in known)
        return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"

    lines.append("| two towers | " + " | ".join(values(("model", m)) for m in metrics) + " |")
    for name in cards[0]["baselines"]:
        cells = (values(("baselines", name, metric)) for metric in metrics)
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    for name in cards[0]["differences"]:
        cells = (gap(name, metric) for metric in metrics)
        lines.append(f"| towers − {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    if "chance" in cards[0]:
        chance = (f"{cards[0]['chance'].get(metric, float('nan')):.4f}" for metric in metrics)
        lines.append("| chance | " + " | ".join(chance) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--part", default="", help="e.g. slices.cold_items or impressions")
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    chosen = parser.parse_args(arguments)
    cards = [read(path, chosen.part) for path in chosen.files]
    known = [card for card in cards if card is not None]
    if not known:
        sys.exit(f"None of the scorecards has a part {chosen.part!r}.")
    print(spread(known, chosen.metrics))


if __name__ == "__main__":
    main()
