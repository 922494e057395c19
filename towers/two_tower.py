"""The user tower, the item tower, and the score between them.

Legend: B examples, R distinct item rows, N candidates, D dimensions, S statistics.
The score that ranks is the inner product of stored vectors, whatever `score` says: a bias is one
more dimension of the item vector, met by a 1 in the user vector.
"""

from __future__ import annotations

import json
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.features.batching.batch import UserSide
from recsys.tables import Strict
from recsys.towers.causal_transformer import CausalTransformer
from recsys.towers.embedding import FeatureEmbedding, FeatureSpec, FeatureTable, Residual, small
from recsys.towers.ensemble import side_by_side, unit_vectors
from recsys.towers.history import (
    History,
    LookBack,
    MultiInterest,
    places_from_newest,
    user_of_entry,
)
from recsys.towers.text import TextTower

TEXT_DECAY = 0.8
"""text_share: how much each text of a history weighs beside the one after it."""
AHEAD = 0.5
"""example_age: how far an answer is beyond the newest examples, where 1 is as far as the three
before them lie behind."""
ITEM_LENGTHS = ("dot", "projection")
"""Scores to which an item's length counts."""


class TowerRules(Strict):
    """[towers]: the shape of the two networks."""

    dimension: int = Field(64, ge=2, le=4096)
    """Of the vectors that are compared."""
    members: int = Field(1, ge=1, le=64)
    """Towers of an ensemble, side by side: each has its part of the dimensions and learns by
    itself, and an item's score is the mean of their cosines. Where one tower learns a small log by
    heart, more members of the same size rank better, and more dimensions do not."""
    score: Literal["cosine", "dot", "projection", "cosine_bias"] = "cosine"
    """cosine: direction alone; dot: lengths of both count, and an item's carries its popularity;
    projection: an item's length counts, a user's does not, so that no user learns louder than
    another; cosine_bias: direction and a number an item."""
    history: Literal["none", "mean", "attention", "transformer", "multi_interest"] = "attention"
    """How the user's earlier items become one vector; multi_interest: several, and an item's score
    is that of the nearest."""
    max_history: int = Field(50, ge=1)
    """Newest items read."""
    history_norm: float = Field(1.0, ge=0, le=1)
    """mean: the sum over so many items is divided by their number to this power; 0: the sum."""
    history_decay: float = Field(0.0, ge=0, le=10)
    """mean: an entry counts (1 + entries after it) ** -decay, so that what came last says most; 0:
    all alike. 1.25 was best on check-ins."""
    history_inputs: tuple[Literal["recency", "strength"], ...] = ()
    """What is read of a history's entries beside the items: how long ago, and how strong the event
    was (its weight, such as a dwell time)."""
    history_table: Literal["shared", "weighted", "offset", "own"] = "shared"
    """shared: histories read the item tower's own vectors; weighted: at length 1, times a learned
    weight of each item; offset: plus a learned vector of each item that starts at zero, so that
    what an item says of its user may drift from what it is found by; own: with a second id vector
    of each item in place of the first."""
    entry_dropout: float | None = Field(None, ge=0, lt=1)
    """transformer: probability that a dimension of a history's entry is zeroed in training; None:
    as `dropout`."""
    look_back: bool = False
    """What the user tower answers looks back at each entry on its own, and a linear layer, which
    starts at zero, of those that it is near to is added: so it is learned, item by item, whether
    what the user had comes again. See `training.start_code`."""
    history_layers: int = Field(1, ge=1, le=8)
    """transformer: blocks of attention and feed-forward layer."""
    history_heads: int = Field(1, ge=1, le=64)
    """transformer: heads; twice their number divides the dimension."""
    history_hidden: int = Field(256, ge=1)
    """transformer: width of the feed-forward layers."""
    history_place: Literal["distance", "rotary", "learned"] = "distance"
    """transformer: attention has a learned logit for each distance between two entries, or turns
    them by it, or a vector for each place counted from the oldest entry read is added."""
    interests: int = Field(4, ge=1, le=64)
    """multi_interest: vectors of a user."""
    passed_over: bool = False
    """Read what the user was shown and passed over before, too (the newest 100), where the log has
    impression lists; it starts by adding nothing."""
    example_age: int = Field(0, ge=0, le=1000)
    """In training, the user tower is told how many events of its user came after the example, up to
    this number; when answering there is none, and half a step is taken beyond the newest. So it
    learns what was chosen when, and answers for what comes next (the example age of Covington et
    al., 2016, counted in events). 0: it is not told."""
    user_id: bool = False
    """A vector of its own for every user of the training side; new users have only the rest."""
    item_id: bool = True
    """A vector of its own for every item of the training side."""
    id_dropout: float = Field(0.2, ge=0, lt=1)
    """Probability that an item's id is hidden in training, so that new items work from content."""
    neighbours: int = Field(0, ge=0, le=100_000)
    """Of an item with an id, the item tower reads what stands around it in the log as well: the
    mean id vector of at most so many items that came shortly before it in histories (a graph
    convolution), how many events it has, and how near to the ends of histories they are. So an item
    of few events is placed by those around it, and fresh items can be told from faded ones where a
    log has no clock. In training the users who are asked for are left out of all of it. 0: its id
    alone."""
    neighbours_dropout: float = Field(0.1, ge=0, lt=1)
    """neighbours: probability that all that the log says of an item is hidden in training, its id
    and what is around it; `id_dropout` then hides ids alone."""
    lookalikes: int = Field(0, ge=0, le=1000)
    """The item tower reads the mean id vector of so many items whose texts are most like an item's
    own, too: so what is seldom, or new, is placed by its like. Every text is compared with every
    other once a training, which for a million items is long. 0: its own id alone."""
    hidden: int = Field(128, ge=0)
    """Width of each tower's residual layer; 0: none, which overfits least on very small logs."""
    dropout: float = Field(0.1, ge=0, lt=1)
    text_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a dimension of an item's text vector is zeroed in training, so that the
    texts of known items are not learned by heart."""
    text_share: float = Field(0.0, ge=0, lt=1)
    """Share of the score that is the plain likeness of an item's text to those of the history, the
    newest of which say most; the rest is what the towers learned, without it. So new items are
    found by their texts themselves, however well the towers know the old ones by heart. Stored
    vectors are longer by the text's dimensions. Best with text.views that hold "company"."""
    statistics: bool | Literal["auto"] = "auto"
    """Item age, clicks and exposures as of the event; auto: when the log shows impressions."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.members > 1:
            self._several_members()
        if self.history == "transformer" and self.width % (2 * self.history_heads):
            raise ValueError(
                f"{self.history_heads} heads need a dimension that {2 * self.history_heads} "
                f"divides, and it is {self.width}: change history_heads or dimension."
            )
        if self.look_back and self.history in ("none", "multi_interest"):
            raise ValueError(
                f'look_back needs one answer made of a history, and history is "{self.history}": '
                "set it to mean, attention or transformer, or look_back to false."
            )
        if self.text_share and (
            self.score != "cosine"
            or self.history in ("none", "multi_interest")
            or self.history_table == "weighted"
        ):
            raise ValueError(
                "text_share is a share of a cosine, between one vector of a history and an item: "
                'leave score at "cosine", take mean, attention or transformer as history and no '
                "weighted history_table, or leave text_share at 0."
            )
        for name in ("neighbours", "lookalikes"):
            if getattr(self, name) and (not self.item_id or self.history_table == "own"):
                raise ValueError(
                    f"{name} = {getattr(self, name)} is read of items beside their ids, once: set "
                    f'item_id to true, history_table to another than "own", or {name} to 0.'
                )
        if self.history_table != "shared" and not self.item_id:
            raise ValueError(
                f'history_table = "{self.history_table}" learns something of each item, and '
                'item_id is false: set it to true, or history_table to "shared".'
            )
        return self

    def _several_members(self) -> None:
        if self.dimension % self.members or self.dimension // self.members < 2:
            raise ValueError(
                f"{self.members} members share {self.dimension} dimensions: make the dimension a "
                "multiple of the members, at least twice as many."
            )
        for name, value, wanted in (
            ("score", self.score, "cosine"),
            ("look_back", self.look_back, False),
            ("history", self.history == "multi_interest" and self.history, "attention"),
        ):
            if value and value != wanted:
                raise ValueError(
                    f"members = {self.members} is a mean of cosines of one vector each, which does "
                    f"not go with {name} = {json.dumps(value)}: set it to {json.dumps(wanted)}, or "
                    "members to 1."
                )

    @property
    def width(self) -> int:
        """Dimensions of one member."""
        return self.dimension // self.members


def _history(rules: TowerRules) -> History | CausalTransformer | MultiInterest:
    """Of one member."""
    inputs, hidden = rules.history_inputs, rules.dropout
    if rules.history == "transformer":
        return CausalTransformer(
            rules.width, rules.max_history, layers=rules.history_layers,
            heads=rules.history_heads, hidden=rules.history_hidden, dropout=rules.dropout,
            place=rules.history_place, inputs=inputs,
            entry_dropout=rules.dropout if rules.entry_dropout is None else rules.entry_dropout,
        )  # fmt: skip
    if rules.history == "multi_interest":
        return MultiInterest(
            rules.dimension, rules.interests, rules.max_history, inputs=inputs, hidden=hidden
        )
    return History(
        rules.width, rules.history, rules.max_history, norm=rules.history_norm,
        decay=rules.history_decay, inputs=inputs, hidden=hidden,
    )  # fmt: skip


def _deep(rules: TowerRules) -> nn.Module:
    return side_by_side(lambda: Residual(rules.width, rules.hidden, rules.dropout), rules.members)


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
    """Item rows → unit vectors (plain ones where lengths count), and a bias where there is one."""

    def __init__(self, spec: FeatureSpec, rules: TowerRules) -> None:
        super().__init__()
        self.rules = rules
        self.inputs = FeatureEmbedding(
            spec, rules.dimension, rules.id_dropout, rules.dropout, rules.members,
            carry_text=rules.text_share > 0, text_dropout=rules.text_dropout,
        )  # fmt: skip
        self.deep = _deep(rules)
        if rules.score == "cosine_bias":
            self.bias = nn.Linear(rules.dimension, 1)
            nn.init.zeros_(self.bias.weight)
            nn.init.zeros_(self.bias.bias)

    def forward(self, embedded: Tensor) -> Tensor:
        """(R, D) embedded items → (R, D) or, with a bias, (R, D+1) vectors.

        Texts that the items carry behind are a part of the vectors: (R, D+T) → (R, D+T).
        """
        size = self.rules.dimension
        embedded, texts = embedded[:, :size], embedded[:, size:]
        out = self.deep(embedded)
        if self.rules.score in ITEM_LENGTHS:
            return out
        unit = unit_vectors(out, self.rules.members)
        if texts.shape[1]:
            return beside_text(unit, texts, self.rules.text_share)
        if self.rules.score == "cosine":
            return unit
        return torch.cat([unit, self.bias(out).float()], dim=-1)


class UserTower(nn.Module):
    """History, id, features and context → one vector, or one an interest.

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
        self.features = FeatureEmbedding(spec, rules.dimension, members=rules.members)
        self.history: nn.Module | None = None
        if rules.history != "none":
            self.history = side_by_side(lambda: _history(rules), rules.members)
        self.history_ids = self.history_weight = None
        if rules.history_table in ("own", "offset") and rules.history != "none":
            table = nn.Embedding(item_ids, rules.dimension, sparse=True)
            self.history_ids = small(table, rules.members)
            if rules.history_table == "offset":
                nn.init.zeros_(self.history_ids.weight)
        if rules.history_table == "weighted" and rules.history != "none":
            # Logarithms of weights; row 0 is of every item without an id.
            self.history_weight = nn.Embedding(item_ids, 1, sparse=True)
            nn.init.zeros_(self.history_weight.weight)
        self.look_back: LookBack | None = None
        self.context = nn.ModuleList(
            small(nn.Embedding(size, rules.dimension, padding_idx=0), rules.members)
            for size in context
        )
        self.deep = _deep(rules)
        if rules.look_back:
            self.look_back = LookBack(rules.dimension)
        self.passed: nn.Linear | None = None
        if rules.passed_over:
            # Made last, so that all else starts as it does without.
            self.passed = nn.Linear(rules.dimension, rules.dimension)
            nn.init.zeros_(self.passed.weight)
            nn.init.zeros_(self.passed.bias)
        self.age: nn.Embedding | None = None
        if rules.example_age:
            # Row 0 is the newest example, and stays zero.
            age = nn.Embedding(rules.example_age + 1, rules.dimension, padding_idx=0)
            self.age = small(age, rules.members)

    def forward(self, side: UserSide, items: Tensor, table: FeatureTable) -> Tensor:
        """Encode users.

        Args:
            side: who they are and which of `items` they had.
            items: (R, D) embedded items, as `TwoTower.embed_history` gives them.
            table: user features.

        Returns:
            (Q, D) or, with several interests, (Q, K, D); with a bias D+1, with texts D+T.
        """
        size = self.rules.dimension
        items, texts = items[:, :size], items[:, size:]
        out = self.features(side.users, table)
        if side.at is not None:
            out = out[user_of_entry(side)[side.at]]
        several = self.rules.history == "multi_interest"
        if several:
            out = out[:, None]
        if self.history is not None:
            out = out + self.history(items, side)
        if self.passed is not None and side.passed is not None:
            said = self._passed_over(self.passed, side, items)
            out = out + (said[:, None] if several else said)
        # Where no context is given, all of it is unknown, and unknown adds nothing.
        for context, codes in zip(self.context, side.context.T, strict=False):
            said = context(codes)
            out = out + (said[:, None] if several else said)
        if self.age is not None:
            said = self._ahead() if side.age is None else self.age(side.age)
            out = out + (said[..., None, :] if several else said)
        out = self.deep(out)
        if self.look_back is not None:
            out = self.look_back(out, items, side)
        if self.rules.score == "dot":
            return out
        unit = unit_vectors(out, self.rules.members)
        if texts.shape[1]:
            return beside_text(unit, self._texts_of(side, texts), self.rules.text_share)
        if self.rules.score in ("cosine", "projection"):
            return unit
        return torch.cat([unit, torch.ones_like(unit[..., :1])], dim=-1)

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
        place = places_from_newest(side, user, len(user) + 1)
        weight = TEXT_DECAY ** place.to(texts.dtype)
        said = texts.index_select(0, side.history) * weight[:, None]
        return texts.new_zeros(len(side.lengths), texts.shape[1]).index_add(0, user, said)

    @staticmethod
    def _passed_over(layer: nn.Linear, side: UserSide, items: Tensor) -> Tensor:
        """(Q, D) what the mean of the passed-over items says; 0 where there is none."""
        assert side.passed is not None and side.passed_lengths is not None  # they come together
        lengths = side.passed_lengths
        if len(side.passed):
            mean = F.embedding_bag(
                side.passed, items.float(), lengths.cumsum(0) - lengths, mode="mean"
            )
        else:
            mean = items.new_zeros((len(lengths), items.shape[1])).float()
        return layer(mean) * (lengths > 0)[:, None]


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
        """Of stored vectors: one more than `dimension` when a bias rides along, or a text's."""
        return self.learned_dimension + self.carried

    @property
    def learned_dimension(self) -> int:
        """Of the vectors that are compared in training."""
        return self.rules.dimension + (self.rules.score == "cosine_bias")

    @property
    def carried(self) -> int:
        """Dimensions of the text that stands behind embedded items where the model answers."""
        return self.item_spec.text if self.rules.text_share else 0

    @property
    def user_shape(self) -> tuple[int, ...]:
        """Of what is stored of a user: (D,), or (K, D) with several interests."""
        if self.rules.history == "multi_interest":
            return self.rules.interests, self.vector_dimension
        return (self.vector_dimension,)

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
        """(R,) rows → (R, D) inputs of the item tower; `left_out` as for `Surroundings`."""
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
        own, weight = self.user_tower.history_ids, self.user_tower.history_weight
        if own is not None and self.rules.history_table == "own":
            if texts is None:
                texts = self.read_texts(rows)
            return self.item_tower.inputs(rows, self.items, statistics, texts, ids=own)
        if embedded is None:
            embedded = self.embed_items(rows, statistics, texts)
        if own is not None:
            return added(embedded, own(torch.where(rows < own.num_embeddings, rows, 0)))
        if weight is not None:
            known = torch.where(rows < weight.num_embeddings, rows, 0)
            return unit_vectors(embedded, self.rules.members) * weight(known).exp()
        return embedded

    def encode_users(self, side: UserSide, items: Tensor) -> Tensor:
        """User vectors of what `embed_history` gave, see `UserTower.forward`."""
        return self.user_tower(side, items, self.users)
