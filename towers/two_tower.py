"""The user tower, the item tower, and the score between them.

Legend: B examples, R distinct item rows, N candidates, D dimensions, S statistics.
The score that ranks is the inner product of stored vectors, whatever `score` says: a bias is one
more dimension of the item vector, met by a 1 in the user vector.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.batches import UserSide
from recsys.tables import Strict
from towers.blocks import (
    FeatureEmbedding,
    FeatureSpec,
    FeatureTable,
    History,
    Residual,
    small,
)


class TowerRules(Strict):
    """[towers]: the shape of the two networks."""

    dimension: int = Field(64, ge=2, le=4096)
    """Of the vectors that are compared."""
    score: Literal["cosine", "dot", "cosine_bias"] = "cosine"
    """cosine: direction alone; dot: norms carry popularity; cosine_bias: and a number an item."""
    history: Literal["none", "mean", "attention"] = "attention"
    """How the user's earlier items become one vector."""
    max_history: int = Field(50, ge=1)
    """Newest items read."""
    user_id: bool = False
    """A vector of its own for every user of the training side; new users have only the rest."""
    item_id: bool = True
    """A vector of its own for every item of the training side."""
    id_dropout: float = Field(0.2, ge=0, lt=1)
    """Probability that an item's id is hidden in training, so that new items work from content."""
    hidden: int = Field(128, ge=0)
    """Width of each tower's residual layer; 0: none, which overfits least on very small logs."""
    dropout: float = Field(0.1, ge=0, lt=1)
    statistics: bool | Literal["auto"] = "auto"
    """Item age, clicks and exposures as of the event; auto: when the log shows impressions."""


def unit_vectors(x: Tensor) -> Tensor:
    """(B, D) of length 1 in float32; what is almost 0 stays short: its gradient has bounds."""
    return F.normalize(x.float(), dim=-1, eps=0.01)


class ItemTower(nn.Module):
    """Item rows → unit vectors (plain ones for the dot product), and a bias where there is one."""

    def __init__(self, spec: FeatureSpec, rules: TowerRules) -> None:
        super().__init__()
        self.rules = rules
        self.inputs = FeatureEmbedding(spec, rules.dimension, rules.id_dropout, rules.dropout)
        self.deep = Residual(rules.dimension, rules.hidden, rules.dropout)
        if rules.score == "cosine_bias":
            self.bias = nn.Linear(rules.dimension, 1)
            nn.init.zeros_(self.bias.weight)
            nn.init.zeros_(self.bias.bias)

    def forward(self, embedded: Tensor) -> Tensor:
        """(R, D) embedded items → (R, D) or, with a bias, (R, D+1) vectors."""
        out = self.deep(embedded)
        if self.rules.score == "dot":
            return out
        unit = unit_vectors(out)
        if self.rules.score == "cosine":
            return unit
        return torch.cat([unit, self.bias(out).float()], dim=-1)


class UserTower(nn.Module):
    """History, id, features and context → one vector."""

    def __init__(self, spec: FeatureSpec, context: tuple[int, ...], rules: TowerRules) -> None:
        super().__init__()
        self.rules = rules
        self.features = FeatureEmbedding(spec, rules.dimension)
        self.history = (
            None
            if rules.history == "none"
            else History(rules.dimension, rules.history, rules.max_history)
        )
        self.context = nn.ModuleList(
            small(nn.Embedding(size, rules.dimension, padding_idx=0)) for size in context
        )
        self.deep = Residual(rules.dimension, rules.hidden, rules.dropout)

    def forward(self, side: UserSide, items: Tensor, table: FeatureTable) -> Tensor:
        """Encode users.

        Args:
            side: who they are and which of `items` they had.
            items: (R, D) embedded items, as the item tower's inputs give them.
            table: user features.

        Returns:
            (B, D) or, with a bias, (B, D+1).
        """
        out = self.features(side.users, table)
        if self.history is not None:
            out = out + self.history(items, side.history, side.lengths)
        # Where no context is given, all of it is unknown, and unknown adds nothing.
        for context, codes in zip(self.context, side.context.T, strict=False):
            out = out + context(codes)
        out = self.deep(out)
        if self.rules.score == "dot":
            return out
        unit = unit_vectors(out)
        if self.rules.score == "cosine":
            return unit
        return torch.cat([unit, torch.ones_like(unit[:, :1])], dim=-1)


class TwoTower(nn.Module):
    """Both towers and the tables of features they read.

    Args:
        rules: the shape.
        items: features of every item row.
        users: features of every user row.
        item_spec, user_spec: sizes of what the layers read.
        context: number of codes of each context column.
    """

    def __init__(
        self,
        rules: TowerRules,
        items: FeatureTable,
        users: FeatureTable,
        item_spec: FeatureSpec,
        user_spec: FeatureSpec,
        context: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.rules, self.item_spec, self.user_spec, self.context = (
            rules, item_spec, user_spec, context,
        )  # fmt: skip
        self.items, self.users = items, users
        self.item_tower = ItemTower(item_spec, rules)
        self.user_tower = UserTower(user_spec, context, rules)

    @property
    def uses_statistics(self) -> bool:
        return self.item_spec.statistics > 0

    @property
    def vector_dimension(self) -> int:
        """Of stored vectors: one more than `dimension` when a bias rides along."""
        return self.rules.dimension + (self.rules.score == "cosine_bias")

    def embed_items(
        self, rows: Tensor, statistics: Tensor | None = None, texts: Tensor | None = None
    ) -> Tensor:
        """(R,) rows → (R, D) inputs of the item tower, which histories are pooled from too."""
        return self.item_tower.inputs(rows, self.items, statistics, texts)

    def encode_users(self, side: UserSide, items: Tensor) -> Tensor:
        """User vectors, see `UserTower.forward`."""
        return self.user_tower(side, items, self.users)
