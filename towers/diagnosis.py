"""Diagnosis of towers from their vectors: measures, then findings in words.

Legend: N items, Q queries, P pairs, D dimensions, k answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from recsys.towers.rules import LENGTH_SCORES
from recsys.towers.two_tower import TwoTower

SHARPEST, FLATTEST = 0.01, 1.0
"""Bounds of a learned temperature."""
GRID = 1e-4
"""Unit vectors whose values all agree to this are told to be the same."""


# --- numbers --------------------------------------------------------------------------------------


def units(vectors: np.ndarray) -> np.ndarray:
    """(N, D) of length 1 in float64; what is zero stays zero."""
    norm = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def alignment(users: np.ndarray, items: np.ndarray) -> float:
    """Mean squared distance of unit vectors that belong together (Wang & Isola, 2020); 0 is best.

    Args:
        users, items: (P, D) both; user p chose item p.
    """
    return float(((units(users) - units(items)) ** 2).sum(1).mean())


def uniformity(vectors: np.ndarray, t: float = 2.0) -> float:
    """Log of the mean of exp(-t · squared distance) over pairs of unit vectors.

    0 where all are alike, about -2t where they are spread over a sphere of many dimensions (Wang &
    Isola, 2020).

    Args:
        vectors: (N, D), N at least 2; N² values are held.
    """
    unit = units(vectors)
    distance = np.maximum(2 - 2 * unit @ unit.T, 0)
    above = distance[np.triu_indices(len(unit), 1)]
    return float(np.log(np.exp(-t * above).mean()))


def mean_cosine(vectors: np.ndarray) -> float:
    """Mean cosine of two different rows of (N, D); N at least 2."""
    unit, n = units(vectors), len(vectors)
    return float(((unit.sum(0) ** 2).sum() - (unit**2).sum()) / (n * (n - 1)))


def effective_rank(vectors: np.ndarray) -> float:
    """Exp of the entropy of the normalised singular values of (N, D) (Roy & Vetterli, 2007).

    Between 1 and D: how many dimensions are in use.
    """
    singular = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    share = singular / max(singular.sum(), 1e-300)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def duplicates(vectors: np.ndarray) -> float:
    """Share of rows of (N, D) that stand where another row stands, too."""
    if not len(vectors):
        return 0.0
    cells = np.round(vectors / GRID).astype(np.int64)
    _, place, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    return float((counts[place.reshape(-1)] > 1).mean())


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's correlation of two (N,) arrays; 0 where one of them is the same everywhere."""
    ranks = rankdata(left), rankdata(right)
    if min(np.ptp(ranks[0]), np.ptp(ranks[1])) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def overlap(answers: np.ndarray) -> float:
    """Share of one asker's answers that another one gets, too, mean over all pairs of askers.

    Args:
        answers: (Q, k) item rows padded with -1, no row twice for one asker; Q at least 2.
    """
    asked, given = len(answers), answers[answers >= 0]
    if not len(given):
        return 0.0
    counts = np.bincount(given).astype(np.float64)
    return float((counts * (counts - 1)).sum() / (asked - 1) / len(given))


def kept(answers: np.ndarray, others: np.ndarray) -> float:
    """Share of (Q, k) answers that stand in the same asker's (Q, k) other answers, too."""
    there = answers >= 0
    if not there.any():
        return 1.0
    width = int(max(answers.max(initial=0), others.max(initial=0))) + 1
    start = width * np.arange(len(answers))[:, None]
    return float(np.isin((start + answers)[there], (start + others)[others >= 0]).mean())


def most_popular(
    popularity: np.ndarray, rows: np.ndarray, k: int, share: float = 0.01
) -> np.ndarray:
    """The given share of `rows` with the largest popularity, but no fewer than k of them."""
    size = min(len(rows), max(k, math.ceil(share * len(rows))))
    return rows[np.argsort(-popularity[rows], kind="stable")[:size]]


# --- what the towers read, one part at a time -----------------------------------------------------


class _Always(nn.Module):
    """Answers the same vector for every row."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector)

    def forward(self, rows: Tensor) -> Tensor:
        return self.get_buffer("vector").expand(len(rows), -1)


def parts(model: TwoTower) -> tuple[str, ...]:
    """What of "ids", "text" and "vector" the item tower reads."""
    inputs = model.item_tower.inputs
    return tuple(name for name in ("ids", "text", "vector") if getattr(inputs.spec, name))


@contextmanager
def hidden(model: TwoTower, part: str) -> Iterator[None]:
    """While it lasts, a part of what the towers read of items is unknown: see `parts`."""
    inputs = model.item_tower.inputs
    layer = getattr(inputs, part)
    weight = layer.weight.detach()
    unknown = weight[0].clone() if part == "ids" else torch.zeros_like(weight[:, 0])
    setattr(inputs, part, _Always(unknown))
    carried = inputs.carried
    if part == "text" and carried is not None:
        inputs.carried = _Always(weight.new_zeros(inputs.spec.text))
    try:
        yield
    finally:
        setattr(inputs, part, layer)
        inputs.carried = carried


# --- findings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is left of the item vectors when a part of what they are made of is unknown.

    Args:
        cosine: mean cosine of an item's vector with and without it.
        kept: share of the best answers that stay among the best.
        recall: of what users chose, as `Measured.recall`, without it.
    """

    cosine: float
    kept: float
    recall: float


@dataclass(frozen=True)
class Measured:
    """What `diagnose` judges by; None: it could not be measured.

    Args:
        items: how many may be answered.
        dimension: D of the vectors, without a bias.
        score: "cosine", "dot" or "projection".
        item_rank, user_rank: effective ranks.
        item_cosine, user_cosine: mean cosine of two different ones.
        item_uniformity, user_uniformity: see `uniformity`.
        alignment: of users before their last choice, and that choice.
        norm: mean length of the item vectors.
        norm_spread: standard deviation of the lengths over their mean.
        norm_popularity: rank correlation of length and number of choices.
        duplicates: share of items that cannot be told from another one.
        score_popularity: rank correlation of an item's mean score and its number of choices.
        same_for_all: see `overlap`.
        popular_share: share of the best answers among the most popular percent.
        popular_choices: share of what users chose that is among them.
        depth: answers of each user that are compared.
        k: depth of recall.
        recall: share of last choices, learned from, that are among the first k.
        held_out: recall at k on events that were not learned from.
        popularity_recall: of the best popularity baseline, on the same events.
        parts: "ids", "text", "vector" → what is left without.
        temperature: of the loss.
        temperature_learned: whether it was learned.
    """

    items: int
    dimension: int
    score: str
    item_rank: float
    user_rank: float
    item_cosine: float
    user_cosine: float
    item_uniformity: float
    user_uniformity: float
    alignment: float | None
    norm: float
    norm_spread: float
    norm_popularity: float
    duplicates: float
    score_popularity: float
    same_for_all: float
    popular_share: float
    popular_choices: float
    depth: int
    k: int
    recall: float | None
    held_out: float | None = None
    popularity_recall: float | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    temperature: float | None = None
    temperature_learned: bool = False

    @property
    def useful(self) -> bool:
        """Whether what was not learned from is foretold far better than by popularity or chance.

        Where all follow the hour, as on news, good towers give nearly the same list to everybody.
        """
        if self.held_out is None or self.popularity_recall is None:
            return False
        return self.held_out >= 2 * max(self.popularity_recall, self.k / max(1, self.items))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, what shows it, why it is probably so, and what helps."""

    name: str
    evidence: str
    cause: str
    remedy: str


def diagnose(found: Measured) -> list[Finding]:
    """What is wrong, the gravest first; nothing where all is well."""
    findings = [*_collapse(found), *_temperature(found), *_popularity(found)]
    return [*findings, *_overfit(found), *_ignored(found), *_duplicates(found)]


def _collapse(found: Measured) -> Iterator[Finding]:
    most = min(found.dimension, found.items)
    for side, rank, cosine, limit in (
        ("item", found.item_rank, found.item_cosine, 0.9),
        # Users who are all at the start of their history are alike and well.
        ("user", found.user_rank, found.user_cosine, 0.97),
    ):
        if rank <= max(1.5, 0.05 * most) or (cosine >= limit and not found.useful):
            yield Finding(
                "collapse",
                f"The {side} vectors use {rank:.1f} of {most} dimensions; the mean cosine of two "
                f"of them is {cosine:.2f}.",
                "Nothing pushes vectors apart: too few negatives, a temperature that is too high, "
                "a learning rate that threw them together, or weight decay that shrank them.",
                "Raise batch_size or uniform_negatives, use a temperature of 0.05 to 0.2, and try "
                "a third of the learning rate.",
            )


def _temperature(found: Measured) -> Iterator[Finding]:
    value = found.temperature
    if value is None:
        return
    if found.temperature_learned and value <= 1.05 * SHARPEST:
        yield Finding(
            "dead temperature",
            f"The learned temperature is {value:.4f}, its lower bound is {SHARPEST}.",
            "Scores could not be told apart otherwise, often because liked items stand among the "
            "negatives or positives are learned by heart; only the hardest negative pushes now.",
            "Fix it: temperature = 0.1.",
        )
    elif found.temperature_learned and value >= 0.95 * FLATTEST:
        yield Finding(
            "dead temperature",
            f"The learned temperature is {value:.3f}, its upper bound is {FLATTEST}.",
            "Being unsure costs the loss least: the towers do not find who chooses what, or the "
            "learning rate blew the temperature up before they could.",
            "Fix it: temperature = 0.1; then look at the data.",
        )
    elif found.score not in LENGTH_SCORES and 2 / value < math.log(max(found.items, 2)):
        yield Finding(
            "dead temperature",
            f"At temperature {value:.3g} the best and the worst cosine are {2 / value:.1f} apart "
            f"as logits; to win against {found.items:,} items takes {math.log(found.items):.1f}.",
            "However right the ranking, the loss stays high and all negatives push alike, the "
            "easy ones as much as the hard.",
            "Set temperature between 0.05 and 0.2.",
        )


def _popularity(found: Measured) -> Iterator[Finding]:
    everyone = found.same_for_all >= 0.8 and found.score_popularity >= 0.5
    top = found.popular_share >= 0.8 and found.popular_share >= 2 * found.popular_choices
    if (everyone or top) and not found.useful:
        yield Finding(
            "popularity domination",
            f"Two users share {found.same_for_all:.0%} of their first {found.depth} answers; "
            f"{found.popular_share:.0%} of the answers are among the most popular items, which get "
            f"{found.popular_choices:.0%} of the choices (rank correlation of score and "
            f"popularity {found.score_popularity:.2f}).",
            "The user's side says little beside how popular an item is: norms or the bias carry "
            "popularity, negatives are not corrected for it, or users have no history to read.",
            "Keep logq = true, use score = 'cosine', add uniform_negatives, and look whether "
            "histories reach the user tower.",
        )


def _overfit(found: Measured) -> Iterator[Finding]:
    if "ids" not in found.parts or found.recall is None or found.held_out is None:
        return
    without, baseline = found.parts["ids"].recall, found.popularity_recall
    gap = found.recall / max(found.held_out, 1e-4)
    useless = baseline is not None and found.held_out <= baseline
    # What is remembered of a few items by chance is no proof.
    if (
        found.recall >= 0.1
        and without <= 0.5 * found.recall
        and (gap >= 10 or (gap >= 3 and useless))
    ):
        beside = "" if baseline is None else f" (popularity: {baseline:.3f})"
        yield Finding(
            "id overfit",
            f"Recall@{found.k} is {found.recall:.3f} on what was learned, {found.held_out:.3f} on "
            f"what was not{beside}, and {without:.3f} with ids hidden.",
            "The id vectors learned single events by heart: the log is small for so many "
            "dimensions, or training went on for too long.",
            "Raise id_dropout, lower dimension or table_learning_rate, stop earlier; with little "
            "data set id_dropout = 1 where there is content.",
        )


def _ignored(found: Measured) -> Iterator[Finding]:
    names = {"text": ("text", "[data.catalog] text"), "vector": ("given vectors", "vectors")}
    for part, (what, where) in names.items():
        left = found.parts.get(part)
        if left is not None and left.kept >= 0.97 and left.cosine >= 0.995:
            yield Finding(
                f"{part} ignored",
                f"Without the {what} of the items {left.kept:.0%} of the answers stay, and an "
                f"item's vector keeps its direction (cosine {left.cosine:.3f}).",
                f"The ids say it all already, or the {what} hold nothing: new items, which have "
                "nothing else, will be ranked by chance.",
                f"Raise id_dropout (0.2 to 0.5), and look at {where} and what [text] makes of it.",
            )


def _duplicates(found: Measured) -> Iterator[Finding]:
    if found.duplicates >= 0.2 and found.item_cosine < 0.9:
        yield Finding(
            "duplicates",
            f"{found.duplicates:.0%} of the items have the vector of another item.",
            "Items without an id vector and without content all look like the unknown item; or "
            "the catalogue lists the same thing many times.",
            "Give them content in [data.catalog], leave them out by `available`, or merge them.",
        )
