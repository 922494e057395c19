"""Losses of one's own: functions of a batch's logits, one value an example.

Name one in the run file, as `[training] loss = "losses:psl"`, with this file where Python finds it
(`PYTHONPATH=docs/examples`), or pass it to `TwoTowerModule(model, rules, loss=psl)`. Each of these
was tried on the logs of docs/RESULTS.md and gained on none of them over `softmax`.

Legend: Q queries, B examples, C candidates, s⁺ and s⁻ raw scores of an example's own item and of a
negative, τ temperature, w weight of a negative (its logQ correction).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.towers.logits import BatchLogits

NOWHERE = 1e6
"""Further from any score than scores are from each other."""


def psl(logits: BatchLogits) -> Tensor:
    """Pairwise softmax loss (Yang et al., NeurIPS 2024).

    log Σ w (1 + tanh d)^{1/τ} with d = (s⁻ - s⁺)/2.

    For cosines d is in [-1, 1], where the surrogate lies between the step and exp: a tighter bound
    of DCG, and no pair outweighs all others.
    """
    negative = logits.of_examples(_scores(logits)).clamp(min=-NOWHERE)  # (B, C)
    surrogate = F.logsigmoid(negative - logits.positive_score[:, None]) + torch.log(
        torch.tensor(2.0)
    )
    mass = (surrogate / logits.temperature + logits.log_weight).logsumexp(1)
    return torch.where(mass > -NOWHERE, mass, 0)  # 0 where there is no negative


def sl_at_k(logits: BatchLogits, k: int = 20, tau_beta: float = 1.0) -> Tensor:
    """Softmax loss at K (Yang et al., KDD 2025): examples near the top of the list weigh more.

    sigmoid((s⁺ - β)/τ_β) · log Σ w e^{(s⁻ - s⁺)/τ}, where β is the score that an item needs to be
    among a query's first K of the batch.
    """
    scores = _scores(logits).detach()
    beta = scores.topk(min(k, scores.shape[1]), dim=1).values.amin(1)  # (Q,)
    weight = torch.sigmoid((logits.positive_score - logits.of_examples(beta)) / tau_beta)
    mass = logits.of_examples(logits.logsumexp())
    mass = torch.where(mass > -torch.inf, mass, logits.positive)  # 0 where there is no negative
    return weight * (mass - logits.positive)


def margin_softmax(logits: BatchLogits, margin: float = 0.1) -> Tensor:
    """Additive margin softmax (Wang et al., AM-Softmax, 2018): softmax with s⁺ - margin."""
    positive = (logits.positive_score - margin) / logits.temperature
    return F.softplus(logits.of_examples(logits.logsumexp()) - positive)


def cosine_contrastive(
    logits: BatchLogits, margin: float = 0.4, negative_weight: float = 150.0
) -> Tensor:
    """Cosine contrastive loss (Mao et al., SimpleX, CIKM 2021).

    1 - s⁺ + negative_weight · mean over negatives of max(0, s⁻ - margin).
    """
    scores = _scores(logits)  # (Q, C)
    weight = logits.log_weight.exp() * (scores > -torch.inf)
    mean = (F.relu(scores - margin) * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    return 1 - logits.positive_score + negative_weight * logits.of_examples(mean)


def _scores(logits: BatchLogits) -> Tensor:
    """(Q, C) raw scores of the candidates, -inf where one is no negative of the query."""
    return (logits.dense() - logits.log_weight) * logits.temperature
