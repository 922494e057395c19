"""Latent item time from a Bradley–Terry fit to the order of histories.

A log without a clock has one all the same: what most people chose before something else is the
earlier of the two. So each item has a place in time.

Legend: E events, N item rows, U users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

REACH = 7
"""Events before an event that it is compared with, at most."""
FADE = 0.7
"""How much a pair counts beside one whose events stand one nearer."""
PRIOR = 0.1
"""λ: how much of λ · place² keeps what was seldom chosen near the middle."""


def pairs(offsets: np.ndarray, item: np.ndarray) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Weight, earlier events, later events, for each distance of two events of a user.

    Args:
        offsets: (U+1,) of each user's events.
        item: (E,) rows; an item beside itself is no pair.
    """
    user = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    for distance in range(1, REACH + 1):
        together = (user[:-distance] == user[distance:]) & (item[:-distance] != item[distance:])
        earlier = np.flatnonzero(together)
        yield FADE ** (distance - 1), earlier, earlier + distance


@dataclass(frozen=True)
class Order:
    """Places of items in a time of their own, which has no unit.

    Args:
        place: (N,) float64, larger is later, 0 where nothing is known.
        pull: (E,) float32 how much each event pulls its item's place towards later (its share of
            minus the loss's derivative).
        hold: (E,) float32 share of each event in the loss's curvature by its item's place.
    """

    place: np.ndarray
    pull: np.ndarray
    hold: np.ndarray

    @staticmethod
    def of(offsets: np.ndarray, item: np.ndarray, n_items: int) -> Order:
        """Fit places to the order of everybody's events.

        The Bradley-Terry model: "b after a" has probability σ(place b - place a), and the places
        are the likeliest under a normal prior. The loss is convex, so that there is one answer.

        Args:
            offsets: (U+1,) of each user's events, oldest first.
            item: (E,) rows.
            n_items: N.
        """
        from scipy.optimize import minimize

        found = [(np.full(len(a), w), a, b) for w, a, b in pairs(offsets, item)]
        weight, earlier, later = (np.concatenate(part) for part in zip(*found, strict=True))
        before, after = item[earlier], item[later]

        def loss(place: np.ndarray) -> tuple[float, np.ndarray]:
            gap = place[before] - place[after]
            wrong = weight * _sigmoid(gap)
            slope = np.bincount(before, wrong, n_items) - np.bincount(after, wrong, n_items)
            value = weight @ np.logaddexp(0, gap) + PRIOR * place @ place
            return float(value), slope + 2 * PRIOR * place

        place = np.zeros(n_items)
        if len(weight):
            place = minimize(loss, place, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
        wrong = _sigmoid(place[before] - place[after])
        pull = np.bincount(later, weight * wrong, len(item))
        pull -= np.bincount(earlier, weight * wrong, len(item))
        bend = weight * wrong * (1 - wrong)
        hold = np.bincount(earlier, bend, len(item)) + np.bincount(later, bend, len(item))
        return Order(
            place,
            pull.astype(np.float32),
            hold.astype(np.float32),
        )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))  # no overflow on either side
