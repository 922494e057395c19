"""Feature tables, feature embedding, and the residual layer of both towers.

Legend: R rows asked for, N rows of a table, D dimensions, B examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from recsys.towers.item_context import ROWS_AT_ONCE, ItemContext, TextNeighbours, alike


@dataclass(frozen=True)
class FeatureSpec:
    """What is known of each row, by size; enough to build the layers that read it.

    Args:
        ids: rows that have an id vector, row 0 for unknown included; 0: no id vectors at all.
        text: dimensions of the text vector, 0 for none.
        vector: dimensions of the given vector, 0 for none.
        numbers: how many numbers.
        categories: name → number of codes, code 0 for unknown included.
        statistics: how many statistics as of the event.
        text_neighbours: in a bundle, of how many rows whose texts are like its own every row reads.
        starts: rows beyond those with an id for which that is kept.
    """

    ids: int = 0
    text: int = 0
    vector: int = 0
    numbers: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    statistics: int = 0
    text_neighbours: int = 0
    starts: int = 0


class FeatureTable(nn.Module):
    """Features of every row, as buffers that move with the model but are not its weights.

    Args:
        n_rows: N, row 0 is "nothing known".
        text: (N, T) float32 unit vectors, zero where there is no text; or None. In a bundle
            float16, as are given vectors.
        vector: (N, V) float32 given vectors, or None.
        numbers: (N, F) float32 standardised, or None.
        categories: name → (N, C) int64 codes padded with 0.
    """

    text: Tensor | None
    vector: Tensor | None
    numbers: Tensor | None

    def __init__(
        self,
        n_rows: int,
        *,
        text: Tensor | None = None,
        vector: Tensor | None = None,
        numbers: Tensor | None = None,
        categories: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        categories = categories or {}
        self.n_rows = n_rows
        self.category_names = tuple(categories)
        for name, given in (("text", text), ("vector", vector), ("numbers", numbers)):
            self.register_buffer(name, given, persistent=False)
        for position, name in enumerate(self.category_names):
            self.register_buffer(f"category_{position}", categories[name], persistent=False)
        for name, buffer in self.named_buffers():
            if len(buffer) != n_rows:
                raise ValueError(f"{name} has {len(buffer)} rows, the table {n_rows}.")

    def spec(self, ids: int, category_sizes: dict[str, int], statistics: int = 0) -> FeatureSpec:
        """The sizes of this table's features."""

        def width(buffer: Tensor | None) -> int:
            return 0 if buffer is None else buffer.shape[1]

        return FeatureSpec(
            ids, width(self.text), width(self.vector), width(self.numbers),
            {name: category_sizes[name] for name in self.category_names}, statistics,
        )  # fmt: skip

    def codes(self, name: str) -> Tensor:
        """(N, C) codes of a category."""
        return getattr(self, f"category_{self.category_names.index(name)}")


class FeatureEmbedding(nn.Module):
    """Sum of the projections of everything known of a row: (R,) rows → (R, D).

    Args:
        spec: sizes.
        dimension: D.
        id_dropout: probability that a row's id vector is replaced, in training, by the one that
            rows without an id get when the model serves, so that a new row lands in the right
            place from its content alone (DropoutNet; Volkovs et al., 2017).
        dropout: probability that a dimension of the sum is zeroed in training.
        ensemble: towers that share the dimensions, see ensemble.py; vectors start as long in each
            part as they would alone.
        text_dropout: probability that a dimension of the text vector is zeroed in training.
        carry_text: where the model answers, the text vector itself stands behind the sum.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        dimension: int,
        id_dropout: float = 0.0,
        dropout: float = 0.0,
        ensemble: int = 1,
        *,
        text_dropout: float = 0.0,
        carry_text: bool = False,
    ) -> None:
        super().__init__()
        self.carried: nn.Module | None = nn.Identity() if carry_text else None
        self.spec, self.dimension = spec, dimension
        self.id_dropout, self.dropout, self.text_dropout = id_dropout, dropout, text_dropout
        if spec.ids:
            # sparse: only the touched rows get a gradient, and only they are moved.
            # Row 0 is hardly ever trained without id dropout; small() lets it say nothing.
            self.ids = small(nn.Embedding(spec.ids, dimension, sparse=True), ensemble)
        self.context: ItemContext | None = None
        self.text_neighbours: TextNeighbours | None = None
        if spec.text_neighbours:
            self.likeness = nn.Parameter(torch.tensor(0.5))
            # Row 0 is of all rows that have an id.
            self.starts = nn.Embedding(spec.starts + 1, dimension, sparse=True)
            # Id vectors without what is around them, which new items start from.
            self.alone = nn.Embedding(spec.ids, dimension, sparse=True)
        if spec.text:
            self.text = nn.Linear(spec.text, dimension, bias=False)
            _scale_to_unit(self.text, inputs_norm=ensemble**0.5)
        if spec.vector:
            self.vector = nn.Linear(spec.vector, dimension, bias=False)
        if spec.numbers:
            self.numbers = nn.Linear(spec.numbers, dimension)
        self.categories = nn.ModuleDict(
            {
                # A dot is not allowed in a module's name, and a column's name may hold one.
                str(position): small(
                    nn.EmbeddingBag(size, dimension, mode="mean", padding_idx=0), ensemble
                )
                for position, size in enumerate(spec.categories.values())
            }
        )
        if spec.statistics:
            self.statistic_mean = nn.Buffer(torch.zeros(spec.statistics))
            self.statistic_scale = nn.Buffer(torch.ones(spec.statistics))
            self.statistics = nn.Sequential(
                nn.Linear(spec.statistics, dimension), nn.GELU(), nn.Linear(dimension, dimension)
            )

    def surround(self, context: ItemContext | None, text_neighbours: TextNeighbours | None) -> None:
        """Read what is around items, too; for training, a bundle holds what comes of it."""
        self.context, self.text_neighbours = context, text_neighbours

    def whole_ids(self) -> Tensor:
        """(I, D) what ids say, and with them all that is around the items."""
        out = self.ids.weight.detach().clone()
        with torch.no_grad():
            for rows in torch.arange(len(out), device=out.device).split(ROWS_AT_ONCE):
                if self.context is not None:
                    there, said = self.context(rows, self.ids)
                    out[rows] += said * there[:, None]
                if self.text_neighbours is not None:
                    out[rows] += self.text_neighbours(rows, self.ids)
        return out

    def starts_of(self, rows: Tensor) -> Tensor:
        """(1+R, D) zero, and what rows without an id start from, for a bundle."""
        assert self.text_neighbours is not None
        parts = [torch.zeros(1, self.dimension)]
        with torch.no_grad():
            parts += [self.text_neighbours(part, self.ids) for part in rows.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    def place_of_start(self, rows: Tensor) -> Tensor:
        """(R,) rows of `starts`: 0 of what has an id, and of what came after the bundle."""
        place = rows - (self.spec.ids - 1)
        return torch.where((place < 1) | (place > self.spec.starts), 0, place)

    def start_of(self, texts: Tensor, table: FeatureTable) -> Tensor:
        """(R, T) texts → (R, D) what new items with them start from; in a bundle.

        Args:
            texts: of the new items.
            table: of the items that were learned from.
        """
        found, weight = alike(
            texts, _of(table.text, slice(self.spec.ids)), self.spec.text_neighbours
        )
        return self.likeness * (self.alone(found).float() * weight[:, :, None]).sum(1)

    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """Fix the mean and scale of the statistics, (S,) each, as seen on the training side."""
        self.statistic_mean.copy_(mean)
        self.statistic_scale.copy_(scale)

    def standardised(self, statistics: Tensor) -> Tensor:
        """(R, S) statistics as the layers read them."""
        return ((statistics - self.statistic_mean) / self.statistic_scale).clamp(-5, 5)

    def forward(
        self,
        rows: Tensor,
        table: FeatureTable,
        statistics: Tensor | None = None,
        texts: Tensor | None = None,
        ids: nn.Embedding | None = None,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """Embed rows.

        Args:
            rows: (R,) int64 rows of `table`; a row without an id vector is treated as unknown.
            table: where features are looked up.
            statistics: (R, S) as of the event; needed when the spec has any.
            texts: (R, T) text vectors to use instead of the table's.
            ids: id vectors to use instead of those learned here.
            left_out: user rows of whose events nothing is to be known, see `ItemContext`.

        Returns:
            (R, D); (R, D+T) with `carry_text`, where the model answers.
        """
        # Not of no dimension: what is kept as float16 becomes float32 by being added.
        out = torch.zeros(1, device=rows.device)
        if self.spec.ids:
            out = out + self._of_log(rows, self.ids if ids is None else ids, left_out)
        if self.spec.text:
            texts = _of(table.text, rows) if texts is None else texts
            read = texts
            if self.training and self.text_dropout:
                read = nn.functional.dropout(texts, self.text_dropout)
            out = out + self.text(read)
        if self.spec.vector:
            out = out + self.vector(_of(table.vector, rows))
        if self.spec.numbers:
            out = out + self.numbers(_of(table.numbers, rows))
        for bag, name in zip(self.categories.values(), self.spec.categories, strict=True):
            out = out + bag(table.codes(name)[rows])
        if self.spec.statistics:
            if statistics is None:
                raise ValueError(
                    f"These layers read {self.spec.statistics} statistics of each row."
                )
            out = out + self.statistics(self.standardised(statistics))
        if self.training and self.dropout:
            out = nn.functional.dropout(out, self.dropout)
        if self.carried is not None and texts is not None and not self.training:
            return torch.cat([out, self.carried(texts).to(out.dtype)], dim=1)
        return out if out.ndim > 1 else out.expand(len(rows), self.dimension)

    def _of_log(self, rows: Tensor, ids: nn.Embedding, left_out: Tensor | None) -> Tensor:
        """(R, D) what the log says of rows and of their like; of those that it does not know, or
        that are hidden, of their like alone.
        """
        known = torch.where(rows < self.spec.ids, rows, 0)
        there, said = known > 0, None
        if self.context is not None:
            seen, said = self.context(known, ids, left_out)
            there = there & seen & self._kept(rows, self.context.hidden)
            said = said * there[:, None]
        shown = there & self._kept(rows, self.id_dropout)
        out = ids(known * shown)
        if said is not None:
            out = out + said
        if self.text_neighbours is not None:
            out = out + self.text_neighbours(rows, ids)
        if self.spec.text_neighbours:
            out = out + self.starts(self.place_of_start(rows)).float()
        return out

    def _kept(self, rows: Tensor, dropout: float) -> Tensor:
        """(R,) bool: which rows a dropout leaves; all, where the model answers."""
        if not self.training or not dropout:
            return torch.ones_like(rows, dtype=torch.bool)
        return torch.rand(len(rows), device=rows.device) >= dropout


Table = TypeVar("Table", nn.Embedding, nn.EmbeddingBag)


def small(table: Table, ensemble: int = 1) -> Table:
    """Start a table of vectors small beside the content, and its row 0, unknown, at zero."""
    nn.init.normal_(table.weight, std=0.1 * (ensemble / table.embedding_dim) ** 0.5)
    with torch.no_grad():
        table.weight[0].zero_()
    return table


def _of(buffer: Tensor | None, rows: Tensor | slice) -> Tensor:
    if buffer is None:
        raise ValueError("The feature table lacks what the layers were built to read.")
    found = buffer[rows]
    return found.float() if found.dtype == torch.float16 else found  # a bundle keeps that


def narrowed(table: Tensor) -> Tensor:
    """The same numbers in half the memory, as float16: 11 bits of each.

    A table stays as it is where one of its numbers is too large for that.
    """
    narrow = table.to(torch.float16)
    return narrow if bool(torch.isfinite(narrow).all()) else table


def narrow_tables(model: nn.Module) -> None:
    """Keep what is looked up row by row as float16: id vectors, text vectors, given vectors.

    What a served catalogue takes is mostly that, and a vector with 11 bits of each number points
    the same way to some 1e-4. What is computed with stays float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.sparse and module.embedding_dim > 1:
            module.weight = nn.Parameter(narrowed(module.weight.detach()), requires_grad=False)
        elif isinstance(module, FeatureTable):
            for name in ("text", "vector"):
                buffer = getattr(module, name)
                if buffer is not None:
                    setattr(module, name, narrowed(buffer))


def _scale_to_unit(layer: nn.Linear, inputs_norm: float) -> None:
    """Start a projection so that an input of the given norm comes out with about the same norm."""
    nn.init.normal_(layer.weight, std=inputs_norm / layer.out_features**0.5)


class Residual(nn.Module):
    """x + MLP(x): starts near the identity, so that a tower without need of depth loses nothing.

    Args:
        dimension: D.
        hidden: width of the hidden layer; 0: the identity.
        dropout: probability.
    """

    def __init__(self, dimension: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers: nn.Module = nn.Identity()
        if hidden:
            last = nn.Linear(hidden, dimension)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.layers = nn.Sequential(
                nn.LayerNorm(dimension),
                nn.Linear(dimension, hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                last,
            )
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) → (B, D)."""
        return x + self.layers(x) if self.hidden else x
