"""Traffic split between variants by a stable hash."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence

from recsys.errors import ConfigError

TOLERANCE = 1e-6
"""How far from 1 the shares may sum to: what is left of .333333 three times."""


class TrafficSplit:
    """Named shares of the traffic, and the variant of each unit.

    Each variant runs a race whose time is exponential with the share as rate, drawn from a hash of
    salt, variant and unit; the first wins (weighted rendezvous hashing). With two variants, or when
    one share changes and the others keep their proportions, exactly as many units move as the
    shares differ; any other change of shares moves less than twice as many. The order of the
    variants means nothing, and another salt is another, independent experiment.

    Args:
        shares: variant → share, at least 0 and together 1.
        salt: names the experiment.

    Raises:
        ConfigError: no variant, a share that is no share, or shares that do not sum to 1.
    """

    def __init__(self, shares: Mapping[str, float], salt: str = "recsys") -> None:
        if not shares:
            raise ConfigError("There is no variant. Name at least one.")
        for name, share in shares.items():
            if not (math.isfinite(share) and share >= 0):
                raise ConfigError(f"The share of {name!r} is {share}; give a number from 0 to 1.")
        total = math.fsum(shares.values())
        if abs(total - 1) > TOLERANCE:
            said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ConfigError(f"The shares sum to {total:g}, not to 1: {said}.")
        self.shares = dict(shares)
        running = [(name, share) for name, share in shares.items() if share > 0]
        self._names = [name for name, _ in running]
        self._weights = [share for _, share in running]
        # Begun once: a copy of the state is cheaper than hashing salt and name again.
        self._begun = [
            hashlib.blake2b(name.encode(), digest_size=8, key=_key(salt)) for name in self._names
        ]

    @staticmethod
    def equal(names: Sequence[str], salt: str = "recsys") -> TrafficSplit:
        """The same share for each."""
        return TrafficSplit({name: 1 / len(names) for name in names}, salt)

    def variant(self, unit: str | None) -> str:
        """The variant of a unit (a user, a session), always the same; None: by chance."""
        if len(self._names) == 1:
            return self._names[0]
        if unit is None:
            return random.choices(self._names, self._weights)[0]
        # The length keeps variant "a" of unit "bc" apart from variant "ab" of unit "c".
        code = unit.encode("utf-8", "surrogatepass")
        code = len(code).to_bytes(8, "little") + code
        best, winner = math.inf, self._names[0]
        for name, weight, begun in zip(self._names, self._weights, self._begun, strict=True):
            digest = begun.copy()
            digest.update(code)
            number = int.from_bytes(digest.digest(), "little")
            time = -math.log((number + 0.5) / 2.0**64) / weight
            if time < best:
                best, winner = time, name
        return winner


def _key(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode(), digest_size=32).digest()
