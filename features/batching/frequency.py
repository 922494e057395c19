"""How likely one draw of the batches brings an item in: counted beforehand, or from the stream.

A draw is one event, or one whole user where batches are made of users. Legend: n draws, T items
that they brought in, N item rows, h hash functions, b buckets of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_PRIME = np.uint64(2**31 - 1)


def exact_shares(items: np.ndarray, n_items: int, draws: np.ndarray | None = None) -> np.ndarray:
    """(N,) share of all draws that bring each item in.

    Args:
        items: (T,) item rows.
        draws: (T,) draw of each; one that brings an item in twice counts once. None: each item is
            a draw of its own.
    """
    if draws is None:
        return np.bincount(items, minlength=n_items) / max(1, len(items))
    pairs = np.unique(draws * n_items + items)
    n_draws = len(np.unique(pairs // n_items))
    return np.bincount(pairs % n_items, minlength=n_items) / max(1, n_draws)


class StreamingFrequency:
    """Probability that a draw brings an item in, estimated from the gaps between its occurrences.

    Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations"
    (RecSys 2019): the expected number of draws between two occurrences is the inverse of the
    probability; it is kept as a moving average in hashed buckets, and of several hash functions the
    largest gap counts, since two items in one bucket make its gaps smaller, never larger. A gap is
    measured here in draws rather than in steps, so that an item may be likelier than one a step,
    and a bucket's first occurrences are averaged alike, so that no starting value biases them.

    Args:
        buckets: b of each hash function; the memory is 24·h·b bytes.
        hashes: h.
        rate: weight of the newest gap in the average; smaller is steadier and slower to follow.
        seed: of the hash functions.

    Raises:
        ValueError: no bucket, no hash function, or a rate outside (0, 1].
    """

    def __init__(
        self, buckets: int = 2**18, hashes: int = 2, rate: float = 0.02, seed: int = 0
    ) -> None:
        if buckets < 1 or hashes < 1 or not 0 < rate <= 1:
            raise ValueError(
                f"There are {buckets} buckets, {hashes} hash functions and a rate of {rate}: "
                "at least one of each is needed, and a rate in (0, 1]."
            )
        self.buckets, self.hashes, self.rate = buckets, hashes, rate
        rng = np.random.default_rng([seed, 13])
        self._factor = rng.integers(1, int(_PRIME), hashes, dtype=np.uint64)
        self._shift = rng.integers(0, int(_PRIME), hashes, dtype=np.uint64)
        self.draws = 0
        self.gap = np.zeros(hashes * buckets)  # mean draws between two occurrences
        self.last = np.zeros(hashes * buckets, np.int64)  # draws until the last occurrence
        self.seen = np.zeros(hashes * buckets, np.int64)  # occurrences

    def _bucket(self, items: np.ndarray, number: int) -> np.ndarray:
        """Bucket of each item by one hash function (Carter and Wegman's)."""
        hashed = (items.astype(np.uint64) * self._factor[number] + self._shift[number]) % _PRIME
        return (hashed % np.uint64(self.buckets)).astype(np.int64) + number * self.buckets

    def update(self, items: np.ndarray, draws: np.ndarray, n_draws: int) -> None:
        """Learn from the next draws.

        Args:
            items: (T,) item rows below 2³¹ that were brought in.
            draws: (T,) which of these draws brought each, in [0, n_draws).
            n_draws: n.
        """
        for number in range(self.hashes):
            buckets = self._bucket(items, number)
            # What one draw brings into one bucket is one occurrence.
            pairs = np.unique(buckets * n_draws + draws)
            bucket, when = np.divmod(pairs, n_draws)
            first = np.flatnonzero(np.diff(bucket, prepend=-1))
            counts = np.diff(first, append=len(bucket))
            bucket, newest = bucket[first], self.draws + 1 + when[first + counts - 1]
            mean = (newest - self.last[bucket]) / counts
            # Equals c steps of the moving average with the mean of c gaps.
            moving = -np.expm1(counts * np.log1p(-min(self.rate, 1 - 1e-12)))
            alike = counts / (self.seen[bucket] + counts)
            self.gap[bucket] += np.maximum(moving, alike) * (mean - self.gap[bucket])
            self.last[bucket] = newest
            self.seen[bucket] += counts
        self.draws += n_draws

    def share(self, items: np.ndarray) -> np.ndarray:
        """(T,) estimated probability that one draw brings in each item; what never came counts as
        if it came next.
        """
        gap = np.ones(len(items))
        for number in range(self.hashes):
            bucket = self._bucket(items, number)
            gap = np.maximum(
                gap, np.where(self.seen[bucket] > 0, self.gap[bucket], self.draws + 1.0)
            )
        return 1 / gap

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been learned; the hash functions come from the seed."""
        return {
            "draws": torch.tensor(self.draws),
            "gap": torch.from_numpy(self.gap.copy()),
            "last": torch.from_numpy(self.last.copy()),
            "seen": torch.from_numpy(self.seen.copy()),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what had been learned.

        Raises:
            ValueError: it was learned with other numbers of buckets or hash functions.
        """
        if len(state["gap"]) != len(self.gap):
            raise ValueError(
                f"The saved frequencies have {len(state['gap'])} buckets, but {len(self.gap)} are "
                "kept here. Set buckets and hashes as they were."
            )
        self.draws = int(state["draws"])
        self.gap, self.last, self.seen = (
            state[name].cpu().numpy().copy() for name in ("gap", "last", "seen")
        )
