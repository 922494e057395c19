"""Objectives for pairs of towers: plain functions of `Scores`, one loss an example.

Every one has the signature `objective(scores, *, options) -> (B,)`; bind options with
`functools.partial`. Where a query has no negative at all, the loss is 0 and has no gradient.

Legend: B examples, Q queries, s⁺ and s⁻ raw scores of an example's own item and of a negative,
τ temperature, w weight of a negative. Sums over negatives are those of `Scores`: weighted, without
what the user chose or is known to like, own negatives beside the columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.features.batching.batch import Source
from recsys.towers.logits import PairTerm, Scores
from recsys.towers.logsumexp import ragged_logaddexp


class Objective(Protocol):
    """What training minimises the weighted mean of."""

    def __call__(self, scores: Scores, /) -> Tensor:
        """Give the (B,) loss of each example."""
        ...


def softmax(scores: Scores, *, decoupled: bool = False) -> Tensor:
    """Cross-entropy of each example's own item among it and the negatives.

    InfoNCE (van den Oord et al., 2018), with cosines NT-Xent (Chen et al., SimCLR, 2020):
    log(e^{s⁺/τ} + Σ w e^{s⁻/τ}) - s⁺/τ. With the weights of `Scores` it is sampled softmax with
    corrected logQ (Khrylchenko et al., RecSys 2025).

    Args:
        scores: of a batch.
        decoupled: leave the positive out of the sum (Yeh et al., ECCV 2022), so that the gradient
            does not fade as the negatives are beaten.
    """
    return _against(scores.positive, scores.of_examples(scores.logsumexp()), decoupled)


def full_softmax(scores: Scores) -> Tensor:
    """Cross-entropy over the whole catalogue: `softmax` of a batch with all items as candidates.

    Raises:
        ValueError: columns remembered from earlier steps, which would count items twice.
    """
    if scores.queued is not None and len(scores.queued):
        raise ValueError(
            "The full softmax has every item as a candidate; it takes no remembered columns."
        )
    return softmax(scores)


def bsl(scores: Scores, *, t2: float = 1.2) -> Tensor:
    """Bilateral softmax loss (Wu et al., ICDE 2024; the form of junkangwu/BSL).

    -logmeanexp over the query's examples of s⁺/τ + t2 · logmeanexp over negatives of s⁻/τ. Each
    example has the loss of its query, so that a query counts by its examples.

    Args:
        scores: of a batch.
        t2: temperature of the positives over that of the negatives: the larger, the more
            robust against positives that are none.
    """
    positive = scores.positive  # (B,)
    if scores.owner is not None:
        nothing = torch.full_like(positive[:1], -torch.inf).expand(len(scores.users))
        pooled = ragged_logaddexp(nothing, positive, scores.owner)
        count = torch.bincount(scores.owner, minlength=len(scores.users))
        positive = scores.of_examples(pooled - count.to(pooled.dtype).log())
    negative = scores.logsumexp() - scores.log_mass().nan_to_num(neginf=0.0)
    return _behind(positive, scores.of_examples(t2 * negative))


def psl(
    scores: Scores,
    *,
    form: Literal["tanh", "atan", "relu"] = "tanh",
    decoupled: bool = True,
) -> Tensor:
    """Pairwise softmax loss (Yang et al., NeurIPS 2024): a surrogate in place of the exponential.

    log Σ w σ(d)^{1/τ} with d = (s⁻ - s⁺)/2 and σ(d) = 1 + tanh d, 1 + atan d or relu(1 + d). For
    cosines d is in [-1, 1], where all of them lie between the step and exp: a tighter bound of DCG,
    and no pair outweighs all others. As d is half a difference, τ here is to be about half of that
    of a softmax.

    Args:
        scores: of a batch.
        form: surrogate.
        decoupled: the positive is not in the sum (as published); its own d is 0, so it adds 1.

    Raises:
        ValueError: no such form.
    """
    if form not in SURROGATES:
        raise ValueError(f"{form!r} is no form of PSL; use {', '.join(SURROGATES)}.")
    surrogate, temperature = SURROGATES[form], scores.temperature

    def term(negative: Tensor, positive: Tensor) -> Tensor:
        return surrogate(negative, positive) / temperature

    # Pairs are differences already: what they are compared with is 0.
    mass = scores.pairwise_logsumexp(term)
    return _against(torch.zeros_like(mass), mass, decoupled)


def sl_at_k(
    scores: Scores,
    *,
    k: int = 20,
    threshold: Tensor | None = None,
    tau_beta: float = 1.0,
    decoupled: bool = True,
) -> Tensor:
    """Softmax loss at K (Yang et al., KDD 2025): examples near the top of the list weigh more.

    sigmoid((s⁺ - β)/τ_β) · log Σ w e^{(s⁻ - s⁺)/τ}, where β is the score that an item needs to
    be among a query's first K. β is a constant; the weight has a gradient through s⁺.

    Args:
        scores: of a batch.
        k: length of the list, where thresholds are taken from this batch.
        threshold: (Q,) β, remembered from an earlier pass; None: the k-th largest score of
            the query among all columns (one more product and a partial sort).
        tau_beta: temperature of the weight, in units of the score; its authors searched .5 to 3.
        decoupled: the positive is not in the sum (as published).
    """
    beta = scores.kth_largest(k) if threshold is None else threshold.detach()
    weight = torch.sigmoid((scores.positive_score - scores.of_examples(beta)) / tau_beta)
    return weight * softmax(scores, decoupled=decoupled)


def triplet(scores: Scores, *, margin: float = 0.5) -> Tensor:
    """Hinge over all triplets: mean over negatives of max(0, margin - s⁺ + s⁻).

    Schroff et al. (FaceNet, 2015) with inner products in place of distances.

    Args:
        scores: of a batch; the temperature has no part in this.
        margin: by which the positive should lead.
    """
    return scores.pairwise_mean(lambda negative, positive: F.relu(negative - positive + margin))


def margin_softmax(scores: Scores, *, margin: float = 0.1, decoupled: bool = False) -> Tensor:
    """Additive margin softmax (Wang et al., AM-Softmax, 2018): `softmax` with s⁺ - margin.

    Args:
        scores: of a batch.
        margin: handicap of the positive, in units of the score (before the temperature).
        decoupled: leave the positive out of the sum.
    """
    positive = (scores.positive_score - margin) / scores.temperature
    return _against(positive, scores.of_examples(scores.logsumexp()), decoupled)


def ccl(scores: Scores, *, margin: float = 0.4, negative_weight: float = 150.0) -> Tensor:
    """Cosine contrastive loss (Mao et al., SimpleX, CIKM 2021).

    1 - s⁺ + negative_weight · mean over negatives of max(0, s⁻ - margin). Made for cosines; the
    temperature has no part in it.

    Args:
        scores: of a batch.
        margin: cosine below which a negative is left alone.
        negative_weight: of all negatives together (the paper's is for their mean, too).
    """
    negative = scores.of_examples(scores.mean(lambda score: F.relu(score - margin)))
    loss = 1 - scores.positive_score + negative_weight * negative
    return torch.where(scores.of_examples(scores.log_mass()) > -torch.inf, loss, 0)


def symmetric(scores: Scores, *, objective: Objective = softmax, item_share: float = 0.5) -> Tensor:
    """Both directions (CLIP; Radford et al., 2021): user to item, and item to user.

    Args:
        scores: of a batch.
        objective: of either direction.
        item_share: weight of the second, whose columns are the queries of the batch.
    """
    return (1 - item_share) * objective(scores) + item_share * objective(scores.transposed())


def matryoshka(
    scores: Scores,
    *,
    dimensions: Sequence[int],
    weights: Sequence[float] | None = None,
    objective: Objective = softmax,
    renormalise: bool = True,
    keep_last: int = 0,
) -> Tensor:
    """Weighted sum of an objective over vectors cut short (Kusupati et al., NeurIPS 2022).

    Args:
        scores: of a batch.
        dimensions: lengths of the cut vectors; the full one only where it is among them.
        weights: one for each length; None: 1 each.
        objective: of the cut vectors.
        renormalise: cut vectors are brought to length 1, where the score is a cosine.
        keep_last: so many last dimensions stay and are not counted: an item bias.

    Raises:
        ValueError: no dimension, more than the vectors have, or not a weight for each.
    """
    if not dimensions or len(weights or dimensions) != len(dimensions):
        raise ValueError(f"Dimensions {list(dimensions)} and weights {weights} are not pairs.")
    loss = torch.zeros_like(scores.positive_score)
    for dimension, weight in zip(dimensions, weights or [1.0] * len(dimensions), strict=True):
        cut = scores.truncated(dimension, renormalise=renormalise, keep_last=keep_last)
        loss = loss + weight * objective(cut)
    return loss


def of_members(
    scores: Scores, *, members: int, objective: Objective, together: float = 0.0
) -> Tensor:
    """An objective of the members of an ensemble, of each by itself and of all of them as one.

    Args:
        scores: of a batch.
        members: how many share the dimensions.
        objective: of one member's vectors, or of all.
        together: share of the objective of their mean score; the rest is the mean over members.
    """
    if together == 1:
        return objective(scores)
    alone = [objective(scores.of_member(k, members)) for k in range(members)]
    each = torch.stack(alone).mean(0)
    return each if not together else together * objective(scores) + (1 - together) * each


def skip_term(scores: Scores, *, scale: float = 1.0, source: Source = Source.SKIPPED) -> Tensor:
    """Cross-entropy of the positive against what its own query skipped, and nothing else.

    log(1 + Σ w e^{scale · (s⁻ - s⁺)/τ}); 0 where nothing was skipped. Added to an objective whose
    columns are random it makes clicked > skipped > random: drawn negatives, which stand for the
    whole catalogue, cannot drown the skipped ones here.

    Args:
        scores: of a batch; whether its skips also join the columns makes no difference.
        scale: multiplies the logits of this term only.
        source: kind of own negative that is meant.
    """
    row, score, log_weight = scores.own_scores([source])
    scaled = scale / scores.temperature
    nothing = torch.full_like(scores.positive_score[:1], -torch.inf).expand(len(scores.users))
    mass = ragged_logaddexp(nothing, score * scaled + log_weight, row)  # (Q,)
    return _against(scores.positive_score * scaled, scores.of_examples(mass))


def _against(positive: Tensor, mass: Tensor, decoupled: bool = False) -> Tensor:
    """(B,) log(e^positive + e^mass) - positive, or without the positive in the sum.

    Args:
        positive: (B,) logits.
        mass: (B,) log-sum-exp over negatives; -inf where there are none.
        decoupled: leave the positive out of the sum.
    """
    if decoupled:
        return _behind(positive, mass)
    # Of the difference: where the positive is far ahead, the loss keeps its digits.
    return F.softplus(mass - positive, threshold=30)


def _behind(positive: Tensor, mass: Tensor) -> Tensor:
    """(B,) mass - positive, and 0 where there is no negative."""
    return torch.where(mass > -torch.inf, mass - positive, 0)


def _log_tanh(negative: Tensor, positive: Tensor) -> Tensor:
    """log(1 + tanh d) of d = (s⁻ - s⁺)/2, as log 2 + logsigmoid(2d): finite for every d."""
    return F.logsigmoid(negative - positive) + math.log(2)


def _log_atan(negative: Tensor, positive: Tensor) -> Tensor:
    """log(1 + atan d) of d = (s⁻ - s⁺)/2; far out, which cosines never are, a constant."""
    return torch.log((1 + torch.atan((negative - positive) / 2)).clamp(min=_LEAST))


def _log_relu(negative: Tensor, positive: Tensor) -> Tensor:
    """Its log(relu(1 + d)) of d = (s⁻ - s⁺)/2, with a least value in place of 0."""
    return torch.log((1 + (negative - positive) / 2).clamp(min=_LEAST))


_LEAST = 1e-6

SURROGATES: dict[str, PairTerm] = {"tanh": _log_tanh, "atan": _log_atan, "relu": _log_relu}

OBJECTIVES = {
    "softmax": softmax,
    "full_softmax": full_softmax,
    "bsl": bsl,
    "psl": psl,
    "sl_at_k": sl_at_k,
    "triplet": triplet,
    "margin_softmax": margin_softmax,
    "ccl": ccl,
    "symmetric": symmetric,
}
"""By the names that a configuration uses; `matryoshka` and `skip_term` are put around or beside."""
