"""Losses for pairs of towers: pure functions of vectors and edges.

Legend: B examples, N candidates, M encoded rows (candidates and skipped ones), D dimensions,
E known edges, S skip edges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def in_batch_softmax(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    log_inclusion: Tensor,
    temperature: Tensor | float,
    known: Tensor | None = None,
    skips: Tensor | None = None,
    skip_log_weight: Tensor | None = None,
    skip_share: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each example's own item against every other candidate and its own skips.

    The positive was not drawn, so only the negatives are corrected for how they were (corrected
    logQ; Khrylchenko et al., RecSys 2025). The score is divided by the temperature first. Skips
    are given, not drawn: they get their weight and no correction.

    Args:
        users: (B, D) vectors.
        items: (M, D) vectors, each row once; the first N are candidates for everybody.
        target: (B,) candidate that each example chose.
        log_inclusion: (N,) log probability that each candidate is among the drawn negatives.
        temperature: divides the score; smaller is sharper.
        known: (2, E) example and candidate that the user is known to like: no negative there.
        skips: (2, S) example and row of `items` that the user saw and passed over.
        skip_log_weight: (S,) log weight; a weight of 1 counts as one full negative.
        skip_share: None: skips stand in the softmax beside the drawn negatives. A number: they form
            a softmax of their own against the positive, which joins the loss with this weight; the
            drawn negatives, which stand for the whole catalogue, then cannot drown them.
        weight: (B,) strength of each positive; None: all alike.

    Returns:
        () weighted mean over examples.
    """
    n_candidates = len(log_inclusion)
    logits = ((users / temperature) @ items[:n_candidates].T).float()  # (B, N)
    # Corrections and masks are constants: written in place and unseen by autograd they cost no copy
    # of the matrix, and where -inf stands the softmax lets no gradient through.
    with torch.no_grad():
        own = logits.gather(1, target[:, None])  # (B, 1)
        logits -= log_inclusion
        if known is not None and known.shape[1]:
            logits[known[0], known[1]] = -torch.inf
        # The target stands among the candidates once: there it is the positive, uncorrected.
        logits.scatter_(1, target[:, None], own)
    loss = F.cross_entropy(logits, target, reduction="none")  # (B,)
    if skips is not None and skips.shape[1]:
        passed = (users[skips[0]] * items[skips[1]]).sum(1).float() / temperature  # (S,)
        if skip_log_weight is not None:
            passed = passed + skip_log_weight
        # The loss is relative to the positive, so that what joins it has to be, too.
        positive = logits.gather(1, target[:, None])[:, 0]
        behind = passed - positive[skips[0]]
        if skip_share is None:
            loss = ragged_logaddexp(loss, behind, skips[0])
        else:
            nothing = torch.zeros_like(loss)  # log(1 + Σ exp(behind)); 0 where nothing was skipped
            loss = loss + skip_share * ragged_logaddexp(nothing, behind, skips[0])
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.sum().clamp(min=1e-9)  # 0 when nothing weighs


def ragged_logaddexp(total: Tensor, terms: Tensor, row: Tensor) -> Tensor:
    """log(exp(total[b]) + Σ over the terms of row b of exp(term)), without overflow.

    Args:
        total: (B,) finite.
        terms: (S,).
        row: (S,) int64 row of each term.

    Returns:
        (B,).
    """
    top = total.detach().scatter_reduce(0, row, terms.detach(), "amax")
    mass = (total - top).exp().index_add(0, row, (terms - top[row]).exp())
    return top + mass.log()
