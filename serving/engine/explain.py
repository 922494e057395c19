"""Explanations of an answer: what its score would lack without each part.

Everything is measured, not attributed: the item goes through its tower again with one part unknown,
and the history through the user tower with one entry left out.

Legend: R items, P parts, h history entries, D dimensions of the stored vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.user_inputs import UserInput, UserInputs
from recsys.serving.live.overlay import LiveView

EXPLAINED = 20
"""Answers that are explained; what follows has no explanation."""
LEFT_OUT = 50
"""Newest history entries that are left out one by one."""
PULLS = 5
"""History entries that are told of each answer."""


class Explainer:
    """Explanations of one model's answers.

    Args:
        model: the bundle.
        inputs: encodes histories.
    """

    def __init__(self, model: LoadedModel, inputs: UserInputs) -> None:
        self._bundle, self._inputs = model.bundle, inputs
        self._model = model.bundle.model
        said = model.bundle.manifest.get("config", {}).get("data", {}).get("catalog", {})
        names = list(said.get("numbers", ()))
        count = self._model.item_spec.numbers
        if len(names) != count:
            names = [f"number {place + 1}" for place in range(count)]
        self._numbers = names

    def parts(self, rows: np.ndarray, queries: np.ndarray) -> list[dict[str, Any]]:
        """How much lower each item's score is when a part of it is unknown.

        Args:
            rows: (R,) item rows; of 0, a live item, the features are not at hand, and nothing is
                said.
            queries: (K, D) what asked.

        Returns:
            One object an item: "parts": name → score less the score without it, for "id",
            "text_neighbours" (of an item without an id; of others they are a part of "id"), "text",
            "vector", "statistics" and each number and category that the item has.
        """
        out: list[dict[str, Any]] = [{"parts": {}} for _ in rows]
        some = np.flatnonzero(rows > 0)
        if not len(some):
            return out
        at = torch.from_numpy(np.asarray(rows, np.int64)[some])
        asking = torch.from_numpy(queries)
        with torch.inference_mode():
            statistics = self._statistics(rows[some])
            whole = self._model.embed_items(at, statistics)
            width = self._model.rules.dimension
            parts = [
                (name, nn.functional.pad(said, (0, whole.shape[1] - said.shape[1])), there)
                for name, said, there in self._said(at, statistics)
            ]
            carried = whole.shape[1] > width
            for name, said, _ in parts:
                if carried and name == "text":
                    said[:, width:] = whole[:, width:]
            stacked = torch.stack([whole, *(whole - said for _, said, _ in parts)])  # (1+P, R, E)
            vectors = self._model.item_tower(stacked.flatten(0, 1))
            scores = (vectors @ asking.T).amax(1).view(len(stacked), len(some))
            pulls = (scores[0] - scores[1:]).tolist()
        for (name, _, there), pull in zip(parts, pulls, strict=True):
            for place, has, value in zip(some.tolist(), there.tolist(), pull, strict=True):
                if has:
                    out[place]["parts"][name] = round(value, 6)
        return out

    def _statistics(self, rows: np.ndarray) -> Tensor | None:
        if not self._model.uses_statistics:
            return None
        cutoff = self._bundle.cutoff
        assert cutoff is not None  # statistics need a clock
        return torch.from_numpy(self._bundle.timeline.statistics(rows, cutoff))

    def _said(
        self, rows: Tensor, statistics: Tensor | None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each part's name, what it adds to the item tower's input beyond what an unknown one adds
        (R, E), and which items have it (R,).
        """
        inputs, table, spec = (
            self._model.item_tower.inputs,
            self._model.items,
            self._model.item_spec,
        )
        if spec.ids:
            known = torch.where(rows < spec.ids, rows, 0)
            own, nobody = inputs.ids(known).float(), inputs.ids(torch.zeros_like(known)).float()
            yield "id", own - nobody, known > 0
        if spec.text_neighbours:
            started = inputs.place_of_start(rows)
            yield "text_neighbours", inputs.starts(started).float(), started > 0
        for name, layer in (("text", "text"), ("vector", "vector")):
            buffer = getattr(table, name)
            if getattr(spec, name) and buffer is not None:
                values = buffer[rows].float()
                yield name, getattr(inputs, layer)(values), values.any(1)
        if spec.numbers and table.numbers is not None:
            values = table.numbers[rows]
            for column, name in enumerate(self._numbers):
                # Standardised: 0 is both the mean and what stands for a missing one.
                weight = inputs.numbers.weight[:, column]
                yield name, values[:, column, None] * weight, values[:, column] != 0
        for bag, name in zip(inputs.categories.values(), spec.categories, strict=True):
            codes = table.codes(name)[rows]
            yield name, bag(codes), codes.any(1)
        if statistics is not None:
            usual = torch.zeros_like(statistics)
            said = inputs.statistics(inputs.standardised(statistics)) - inputs.statistics(usual)
            yield "statistics", said, torch.ones(len(rows), dtype=torch.bool)

    def pulls(
        self, user_input: UserInput, vectors: np.ndarray, view: LiveView
    ) -> list[list[dict[str, Any]]]:
        """How much lower each item's score is when an entry of the history had never been.

        Args:
            user_input: whose history; all variants of it go through the user tower at once.
            vectors: (R, D) stored vectors of the items.
            view: what is live.

        Returns:
            For each item the entries that pulled most, strongest first: "id" and "pull".
        """
        size = len(user_input.entries)
        if not size:
            return [[] for _ in vectors]
        places = range(max(0, size - LEFT_OUT), size)
        variants = [user_input, *(user_input.without(place) for place in places)]
        users = self._inputs.encode(variants, view)
        scores = users @ vectors.T  # (1+h, R)
        pulls = scores[:1] - scores[1:]  # (h, R)
        names = [self._inputs.name_of(int(user_input.entries[place]), view) for place in places]
        return [_strongest(names, column) for column in pulls.T]


def _strongest(names: Sequence[str], pulls: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-pulls, kind="stable")[:PULLS]
    return [{"id": names[place], "pull": round(float(pulls[place]), 6)} for place in order]


__all__ = ["EXPLAINED", "Explainer"]
