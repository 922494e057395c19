"""[text]: which encoder turns item text into vectors, and how it learns; one class a kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recsys.tables import AS_TUPLE, Strict, of_kind

View = Literal["split", "dropout", "halves", "fields", "cooccurrence"]
Views = Annotated[tuple[View, ...], AS_TUPLE]
Train = Literal["frozen", "last", "all"]


class StaticText(Strict):
    """[text] kind = "static": the mean of token vectors, trained on the catalogue in seconds."""

    kind: Literal["static"] = "static"
    train: Literal["frozen", "all"] = "frozen"
    """frozen: texts are encoded once and kept. all: the encoder goes on learning inside the item
    tower, from the towers' own loss."""
    dimension: int = Field(256, ge=2, le=4096)
    """Of the vectors; 128 halves the memory and costs a few per cent of recall."""
    views: Annotated[Views, Field(min_length=1)] = ("split", "fields")
    """What counts as two views of one item. split: each token goes to one view or the other;
    dropout: each view keeps some of all tokens; halves: before and after a cut; fields: the first
    field beside each other one (title and description, title and category words); cooccurrence:
    the texts of two items that a user chose one after the other, each with some of its tokens, so
    that what is had together is near, and a new item lies near what its takers had."""
    beside: Views = ()
    """Views that a second encoder learns from, whose vectors stand beside the first's, so that they
    are twice as long. What texts say and what they are had with, the view cooccurrence, tell more
    side by side than drawn together. Ten epochs. Empty: no second one."""
    epochs: int = Field(10, ge=0, le=1000)
    """Of the contrastive training; 0: latent semantic analysis alone."""


class SmallTransformerText(Strict):
    """[text] kind = "small_transformer": a small BERT from random weights, which reads word order.

    Takes minutes; best with train = "all".
    """

    kind: Literal["small_transformer"] = "small_transformer"
    train: Train = "frozen"
    """What goes on learning inside the item tower, from the towers' own loss. frozen: nothing;
    texts are encoded once and kept. last: the last layer. all: every weight."""
    dimension: int = Field(256, ge=2, le=4096)
    """Of the vectors, and the width of the network."""
    layers: int = Field(2, ge=1, le=24)
    """Of attention."""
    views: Annotated[Views, Field(min_length=1)] = ("split", "fields")
    """What counts as two views of one item; see kind = "static"."""
    epochs: int = Field(10, ge=0, le=1000)
    """Of the contrastive training; 0: the weights stay random until the towers train them."""


class PretrainedText(Strict):
    """[text] kind = "pretrained": a sentence-transformers model by name or folder."""

    kind: Literal["pretrained"] = "pretrained"
    model: str = Field(min_length=1)
    """Name on the model hub, or a folder."""
    train: Train = "frozen"
    """What goes on learning inside the item tower, from the towers' own loss. frozen: nothing;
    texts are encoded once and kept. last: the last layer and what follows it. all: every weight."""
    device: str = ""
    """Where it runs (cpu, cuda, …); empty: the fastest that is there."""


TrainedText = StaticText | SmallTransformerText
"""Kinds that learn from the catalogue's own text, without a network."""

TextRules = Annotated[
    StaticText | SmallTransformerText | PretrainedText,
    Field(discriminator="kind"),
    of_kind("static"),
]


def learns_cooccurrence(rules: StaticText | SmallTransformerText | PretrainedText) -> bool:
    """Whether the encoder learns from the log which items are had together."""
    if isinstance(rules, PretrainedText):
        return False
    beside = rules.beside if isinstance(rules, StaticText) else ()
    return "cooccurrence" in (*rules.views, *beside)
