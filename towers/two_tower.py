"""User tower, item tower, and the score between them.

Legend: B examples, R distinct item rows, N candidates, D dimensions, S statistics.
The score that ranks is the inner product of stored vectors, whatever `score` says.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.features.batching.batch import UserSide
from recsys.towers.causal_transformer import CausalTransformer
from recsys.towers.embedding import FeatureEmbedding, FeatureSpec, FeatureTable, Residual, small
from recsys.towers.ensemble import side_by_side, unit_vectors
from recsys.towers.history import PooledHistory, entries_after, user_of_entry
from recsys.towers.rules import (
    LENGTH_SCORES,
    CustomHistory,
    MeanHistory,
    TowerRules,
    TransformerHistory,
    history_class,
)
from recsys.towers.text import TextTower

TEXT_DECAY = 0.8
"""text_share: how much each text of a history weighs beside the one after it."""
AHEAD = 0.5
"""example_age: how far an answer is beyond the newest examples, where 1 is as far as the three
before them lie behind."""


def _history(rules: TowerRules) -> nn.Module:
    """Of one tower of the ensemble."""
    history = rules.history
    if isinstance(history, TransformerHistory):
        return CausalTransformer(
            rules.width, history.length, layers=history.layers, heads=history.heads,
            hidden=history.hidden, dropout=rules.dropout, inputs=history.inputs,
            entry_dropout=rules.dropout if history.entry_dropout is None
            else history.entry_dropout,
        )  # fmt: skip
    if isinstance(history, CustomHistory):
        return history_class(history.module)(rules.width, history.length)
    decay = history.decay if isinstance(history, MeanHistory) else None
    return PooledHistory(
        rules.width, history.length, decay=decay, inputs=history.inputs, hidden=rules.dropout
    )


def _deep(rules: TowerRules) -> nn.Module:
    return side_by_side(lambda: Residual(rules.width, rules.hidden, rules.dropout), rules.ensemble)


def added(embedded: Tensor, more: Tensor) -> Tensor:
    """(R, D) added to (R, D) embedded items, or to the first D dimensions of longer ones."""
    size = more.shape[1]
    if embedded.shape[1] == size:
        return embedded + more
    return torch.cat([embedded[:, :size] + more, embedded[:, size:]], dim=1)


def beside_text(learned: Tensor, texts: Tensor, share: float) -> Tensor:
    """(B, D) unit vectors and (B, T) texts as one unit vector (B, D+T): cosines add up by share.

    A blank text leaves all of the length to what was learned.
    """
    both = [(1 - share) ** 0.5 * learned, share**0.5 * unit_vectors(texts)]
    return unit_vectors(torch.cat(both, dim=1))


class ItemTower(nn.Module):
    """Item rows → unit vectors, or plain ones where lengths count."""

    def __init__(self, spec: FeatureSpec, rules: TowerRules) -> None:
        super().__init__()
        self.rules = rules
        self.inputs = FeatureEmbedding(
            spec, rules.dimension, rules.id_dropout, rules.dropout, rules.ensemble,
            carry_text=rules.text_share > 0, text_dropout=rules.text_dropout,
        )  # fmt: skip
        self.deep = _deep(rules)

    def forward(self, embedded: Tensor) -> Tensor:
        """(R, D) embedded items → (R, D) vectors.

        Texts that the items carry behind are a part of the vectors: (R, D+T) → (R, D+T).
        """
        size = self.rules.dimension
        embedded, texts = embedded[:, :size], embedded[:, size:]
        out = self.deep(embedded)
        if self.rules.score in LENGTH_SCORES:
            return out
        unit = unit_vectors(out, self.rules.ensemble)
        return beside_text(unit, texts, self.rules.text_share) if texts.shape[1] else unit


class UserTower(nn.Module):
    """History, id, features and context → one vector.

    Args:
        spec: sizes of user features.
        context: number of codes of each context column.
        rules: the shape.
        item_ids: item rows that have an id vector.
    """

    def __init__(
        self, spec: FeatureSpec, context: tuple[int, ...], rules: TowerRules, item_ids: int = 0
    ) -> None:
        super().__init__()
        self.rules = rules
        self.features = FeatureEmbedding(spec, rules.dimension, ensemble=rules.ensemble)
        self.history: nn.Module | None = None
        if rules.history.kind != "none":
            self.history = side_by_side(lambda: _history(rules), rules.ensemble)
        self.history_ids: nn.Embedding | None = None
        if rules.history.table != "shared":
            table = nn.Embedding(item_ids, rules.dimension, sparse=True)
            self.history_ids = small(table, rules.ensemble)
            if rules.history.table == "offset":
                nn.init.zeros_(self.history_ids.weight)
        self.context = nn.ModuleList(
            small(nn.Embedding(size, rules.dimension, padding_idx=0), rules.ensemble)
            for size in context
        )
        self.deep = _deep(rules)
        self.age: nn.Embedding | None = None
        if rules.example_age:
            # Row 0 is the newest example, and stays zero.
            age = nn.Embedding(rules.example_age + 1, rules.dimension, padding_idx=0)
            self.age = small(age, rules.ensemble)

    def forward(self, side: UserSide, items: Tensor, table: FeatureTable) -> Tensor:
        """Encode users.

        Args:
            side: who they are and which of `items` they had.
            items: (R, D) embedded items, as `TwoTower.embed_history` gives them.
            table: user features.

        Returns:
            (Q, D); with texts (Q, D+T).
        """
        size = self.rules.dimension
        items, texts = items[:, :size], items[:, size:]
        out = self.features(side.users, table)
        if side.at is not None:
            out = out[user_of_entry(side)[side.at]]
        if self.history is not None:
            out = out + self.history(items, side)
        # Where no context is given, all of it is unknown, and unknown adds nothing.
        for context, codes in zip(self.context, side.context.T, strict=False):
            out = out + context(codes)
        if self.age is not None:
            out = out + (self._ahead() if side.age is None else self.age(side.age))
        out = self.deep(out)
        if self.rules.score == "dot":
            return out
        unit = unit_vectors(out, self.rules.ensemble)
        if texts.shape[1]:
            return beside_text(unit, self._texts_of(side, texts), self.rules.text_share)
        return unit

    def _ahead(self) -> Tensor:
        """(D,) what is added to those who are answered: a little away from what was learned of the
        examples just before the newest, for what is asked for comes after the newest.
        """
        assert self.age is not None
        return -AHEAD * self.age.weight[1:4].mean(0)

    @staticmethod
    def _texts_of(side: UserSide, texts: Tensor) -> Tensor:
        """(Q, T) sum of the texts of each history, the newest first; 0 where there is none."""
        user = user_of_entry(side)
        age = entries_after(side, user, len(user) + 1)
        weight = TEXT_DECAY ** age.to(texts.dtype)
        weighted = texts.index_select(0, side.history) * weight[:, None]
        return texts.new_zeros(len(side.lengths), texts.shape[1]).index_add(0, user, weighted)


class TwoTower(nn.Module):
    """Both towers and the tables of features they read.

    Args:
        rules: the shape.
        items: features of every item row.
        users: features of every user row.
        item_spec, user_spec: sizes of what the layers read.
        context: number of codes of each context column.
        texts: the text encoder, where it learns with the towers; None: `items` has text vectors.
    """

    def __init__(
        self,
        rules: TowerRules,
        items: FeatureTable,
        users: FeatureTable,
        item_spec: FeatureSpec,
        user_spec: FeatureSpec,
        context: tuple[int, ...] = (),
        texts: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.rules, self.item_spec, self.user_spec, self.context = (
            rules, item_spec, user_spec, context,
        )  # fmt: skip
        self.items, self.users, self.texts = items, users, texts
        self.item_tower = ItemTower(item_spec, rules)
        self.user_tower = UserTower(user_spec, context, rules, item_spec.ids)

    @property
    def uses_statistics(self) -> bool:
        return self.item_spec.statistics > 0

    @property
    def vector_dimension(self) -> int:
        """Of stored vectors: longer than `dimension` by the text's where `text_share` is set; in
        training vectors have `dimension`.
        """
        return self.rules.dimension + (self.item_spec.text if self.rules.text_share else 0)

    def item_texts(self) -> Tensor | None:
        """(N, T) text vectors of all item rows as the towers stand now; None without text."""
        if self.texts is None:
            return self.items.text
        return self.texts.vectors()[self.texts.text_of]

    def read_texts(self, rows: Tensor) -> Tensor | None:
        """(R, T) text vectors from the encoder that learns; None: the table of items has them."""
        return None if self.texts is None else self.texts(rows)

    def embed_items(
        self,
        rows: Tensor,
        statistics: Tensor | None = None,
        texts: Tensor | None = None,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """(R,) rows → (R, D) inputs of the item tower; `left_out` as for `ItemContext`."""
        if texts is None:
            texts = self.read_texts(rows)
        return self.item_tower.inputs(rows, self.items, statistics, texts, left_out=left_out)

    def embed_history(
        self,
        rows: Tensor,
        statistics: Tensor | None = None,
        texts: Tensor | None = None,
        *,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """(R,) rows → (R, D) what histories are made of.

        Args:
            rows, statistics, texts: as for `embed_items`.
            embedded: what `embed_items` gave of the rows; it is the answer itself where histories
                share it.
        """
        own = self.user_tower.history_ids
        if own is not None and self.rules.history.table == "own":
            if texts is None:
                texts = self.read_texts(rows)
            return self.item_tower.inputs(rows, self.items, statistics, texts, ids=own)
        if embedded is None:
            embedded = self.embed_items(rows, statistics, texts)
        if own is None:
            return embedded
        return added(embedded, own(torch.where(rows < own.num_embeddings, rows, 0)))

    def encode_users(self, side: UserSide, items: Tensor) -> Tensor:
        """User vectors of what `embed_history` gave, see `UserTower.forward`."""
        return self.user_tower(side, items, self.users)
