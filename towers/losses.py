"""Contrastive losses of a batch's logits, one value an example.

A loss is a function `loss(logits: BatchLogits) -> (B,)`; bind options with `functools.partial`.
Where a query has no negative at all, the loss is 0 and has no gradient. Further losses as functions
of one's own: docs/examples/losses.py.

Legend: B examples, Q queries, s⁺ and s⁻ raw scores of an example's own item and of a negative,
τ temperature, w weight of a negative. Sums over negatives are those of `BatchLogits`: weighted,
without what the user chose or is known to like, per-query negatives beside the candidates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.features.batching.batch import Source
from recsys.towers.logits import BatchLogits, ragged_logaddexp


class Loss(Protocol):
    """What training minimises the weighted mean of."""

    def __call__(self, logits: BatchLogits, /) -> Tensor:
        """Give the (B,) loss of each example."""
        ...


def softmax(logits: BatchLogits) -> Tensor:
    """Cross-entropy of each example's own item among it and the negatives.

    InfoNCE (van den Oord et al., 2018), with cosines NT-Xent (Chen et al., SimCLR, 2020):
    log(e^{s⁺/τ} + Σ w e^{s⁻/τ}) - s⁺/τ. With the weights of `BatchLogits` it is sampled softmax
    with corrected logQ (Khrylchenko et al., RecSys 2025).
    """
    return _cross_entropy(logits.positive, logits.of_examples(logits.logsumexp()))


def bsl(logits: BatchLogits, *, t2: float = 1.2) -> Tensor:
    """Bilateral softmax loss (Wu et al., ICDE 2024; the form of junkangwu/BSL).

    -logmeanexp over the query's examples of s⁺/τ + t2 · logmeanexp over negatives of s⁻/τ. Each
    example has the loss of its query, so that a query counts by its examples.

    Args:
        logits: of a batch.
        t2: temperature of the positives over that of the negatives: the larger, the more
            robust against positives that are none.
    """
    positive = logits.positive  # (B,)
    if logits.owner is not None:
        nothing = torch.full_like(positive[:1], -torch.inf).expand(len(logits.users))
        pooled = ragged_logaddexp(nothing, positive, logits.owner)
        count = torch.bincount(logits.owner, minlength=len(logits.users))
        positive = logits.of_examples(pooled - count.to(pooled.dtype).log())
    negative = logits.logsumexp() - logits.log_mass().nan_to_num(neginf=0.0)
    mass = logits.of_examples(t2 * negative)
    return torch.where(mass > -torch.inf, mass - positive, 0)


def triplet(logits: BatchLogits, *, margin: float = 0.5) -> Tensor:
    """Hinge over all triplets: mean over negatives of max(0, margin - s⁺ + s⁻).

    Schroff et al. (FaceNet, 2015) with inner products in place of distances.

    Args:
        logits: of a batch; the temperature has no part in this.
        margin: by which the positive should lead.
    """
    return logits.pairwise_mean(lambda negative, positive: F.relu(negative - positive + margin))


def symmetric(logits: BatchLogits, *, loss: Loss = softmax, item_share: float = 0.5) -> Tensor:
    """Both directions (CLIP; Radford et al., 2021): user to item, and item to user.

    Args:
        logits: of a batch.
        loss: of either direction.
        item_share: weight of the second, whose candidates are the queries of the batch.
    """
    return (1 - item_share) * loss(logits) + item_share * loss(logits.transposed())


def skip_softmax(logits: BatchLogits) -> Tensor:
    """Cross-entropy of the positive against what its own query skipped, and nothing else.

    log(1 + Σ w e^{(s⁻ - s⁺)/τ}); 0 where nothing was skipped. Added to a loss whose negatives are
    random it makes clicked > skipped > random: sampled negatives, which stand for the whole
    catalogue, cannot drown the skipped ones here.
    """
    row, score, log_weight = logits.per_query_scores([Source.SKIPPED])
    nothing = torch.full_like(logits.positive_score[:1], -torch.inf).expand(len(logits.users))
    mass = ragged_logaddexp(nothing, score / logits.temperature + log_weight, row)  # (Q,)
    return _cross_entropy(logits.positive, logits.of_examples(mass))


def _cross_entropy(positive: Tensor, mass: Tensor) -> Tensor:
    """(B,) log(e^positive + e^mass) - positive.

    Args:
        positive: (B,) logits.
        mass: (B,) log-sum-exp over negatives; -inf where there are none.
    """
    # Of the difference: where the positive is far ahead, the loss keeps its digits.
    return F.softplus(mass - positive, threshold=30)


LOSSES: dict[str, Loss] = {"softmax": softmax, "bsl": bsl, "triplet": triplet}
"""By the names that a configuration uses."""
