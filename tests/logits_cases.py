"""Random batches of logits at odd sizes, and their negatives listed one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys.towers.logits import BatchLogits

LEARNED = ("users", "items", "temperature", "queued")


@dataclass(frozen=True)
class Size:
    """Queries, examples (None: one a query), candidates, items beside them, remembered, length."""

    queries: int
    examples: int | None
    candidates: int
    beside: int = 0
    remembered: int = 0
    dimension: int = 3

    def __str__(self) -> str:
        examples = "each" if self.examples is None else self.examples
        return f"{self.queries}x{examples}x{self.candidates}+{self.beside}+{self.remembered}"


SIZES = [
    Size(1, None, 1, dimension=2),  # no negative but those given
    Size(3, None, 2, beside=1, dimension=5),
    Size(7, None, 5, beside=4, remembered=3),
    Size(5, 11, 9, beside=2, remembered=1, dimension=4),
    Size(13, 9, 11, beside=3, dimension=7),  # queries without an example
    Size(2, 5, 3),
]


def case(size: Size, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Fields of `BatchLogits`: masked edges (some twice, some targets), per-query negatives."""
    rng = torch.Generator().manual_seed(seed + 1000 * size.queries + size.candidates)
    owner = None
    count = size.queries
    if size.examples is not None:
        count = size.examples
        owner = torch.randint(size.queries, (count,), generator=rng)
    columns = size.candidates + size.remembered
    known = (torch.rand(size.queries, columns, generator=rng) < 0.3).nonzero()
    if size.queries > 2:  # one query knows everything
        known = known[known[:, 0] != 1]
        everything = torch.stack([torch.ones(columns), torch.arange(columns)], 1).long()
        known = torch.cat([known, everything])
    known = torch.cat([known, known[:2]])[
        torch.randperm(len(known) + len(known[:2]), generator=rng)
    ]
    given = 2 * size.queries if size.queries > 1 else 1
    rows = torch.randint(size.queries, (given,), generator=rng)
    if size.queries > 3:  # and some have nothing of their own
        rows[rows == 1] = 2
    places = torch.randint(size.candidates + size.beside, (given,), generator=rng)

    def vectors(rows: int) -> Tensor:
        made = torch.randn(rows, size.dimension, generator=rng, dtype=torch.float64)
        return torch.nn.functional.normalize(made, dim=1).to(dtype)

    return {
        "users": vectors(size.queries),
        "items": vectors(size.candidates + size.beside),
        "target": torch.randint(size.candidates, (count,), generator=rng),
        "temperature": torch.tensor(0.3, dtype=dtype),
        "log_weight": -torch.rand(columns, generator=rng).clamp(0.05).log().to(dtype),
        "owner": owner,
        "queued": vectors(size.remembered) if size.remembered else None,
        "positive_mask": known.T,
        "per_query": torch.stack([rows, places]),
        "per_query_log_weight": torch.rand(given, generator=rng).clamp(0.05).log().to(dtype),
        "per_query_source": torch.randint(3, (given,), generator=rng).to(torch.uint8),
        "user_log_weight": torch.rand(size.queries, generator=rng).to(dtype),
    }


def learning(fields: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The fields, those that may have a gradient as new leaves, and the leaves."""
    copy = {
        name: value.clone().requires_grad_() if name in LEARNED and value is not None else value
        for name, value in fields.items()
    }
    return copy, [copy[name] for name in LEARNED if copy.get(name) is not None]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a mix of losses that tells examples apart; zeros where there is none."""
    mix = torch.linspace(1, 2, len(loss), dtype=loss.dtype)
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad((loss * mix).sum(), leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if value is None else value
        for leaf, value in zip(leaves, found, strict=True)
    ]


@dataclass(frozen=True)
class Naive:
    """The same numbers, pair by pair."""

    fields: dict[str, Any]

    def owner(self, example: int) -> int:
        owner = self.fields["owner"]
        return example if owner is None else int(owner[example])

    def examples(self, query: int) -> list[int]:
        return [b for b in range(len(self.fields["target"])) if self.owner(b) == query]

    def positive(self, example: int) -> Tensor:
        """Raw score."""
        user = self.fields["users"][self.owner(example)]
        return user.dot(self.fields["items"][self.fields["target"][example]])

    def is_negative(self, query: int, column: int) -> bool:
        known = set(zip(*self.fields["positive_mask"].tolist(), strict=True))
        targets = {int(self.fields["target"][b]) for b in self.examples(query)}
        return column not in targets and (query, column) not in known

    def per_query(
        self, query: int, sources: tuple[int, ...] = (1, 2)
    ) -> list[tuple[Tensor, Tensor]]:
        """Raw score and weight of the negatives given to a query."""
        fields = self.fields
        return [
            (
                fields["users"][query].dot(fields["items"][fields["per_query"][1, s]]),
                fields["per_query_log_weight"][s].exp(),
            )
            for s in range(fields["per_query"].shape[1])
            if int(fields["per_query"][0, s]) == query
            and int(fields["per_query_source"][s]) in sources
        ]

    def negatives(self, query: int) -> list[tuple[Tensor, Tensor]]:
        """Raw score and weight of every negative of a query."""
        fields = self.fields
        queued = fields["queued"]
        candidates = len(fields["log_weight"]) - (0 if queued is None else len(queued))
        found = []
        for column, log_weight in enumerate(fields["log_weight"]):
            vector = fields["items"][column] if column < candidates else queued[column - candidates]
            if self.is_negative(query, column):
                found.append((fields["users"][query].dot(vector), log_weight.exp()))
        return found + self.per_query(query)

    def items_against_users(self, example: int) -> list[tuple[Tensor, Tensor]]:
        """Raw score and weight of the queries that an example's item was not meant for."""
        fields = self.fields
        item = int(fields["target"][example])
        return [
            (user.dot(fields["items"][item]), fields["user_log_weight"][query].exp())
            for query, user in enumerate(fields["users"])
            if self.is_negative(query, item)
        ]


def logits(fields: dict[str, Any], **changes: Any) -> BatchLogits:
    return BatchLogits(**{**fields, **changes})
