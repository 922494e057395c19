"""Rate limits: a token bucket for each key.

A bucket holds `burst` tokens and gets `per_second` of them back; a request takes one, a batch one
for each of its questions. What is kept of a bucket is the moment at which it will be full again
(the generic cell rate algorithm), so nothing has to be filled while nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from recsys.errors import ConfigError
from recsys.serving.api.auth import ROLES, Hashed, Role


@dataclass(frozen=True)
class Rate:
    """A bound for one caller.

    Args:
        per_second: requests that a second brings back.
        burst: requests that may come at once after a rest.
    """

    per_second: float
    burst: float


class Rates:
    """Buckets of all callers; asked by the event loop alone, so without a lock.

    Args:
        rules: role of a key → its bound; None → of all together who send no valid key. Who is not
            named is not bounded.
        clock: seconds.
    """

    def __init__(
        self, rules: Mapping[Role | None, Rate], clock: Callable[[], float] = monotonic
    ) -> None:
        self._rules, self._clock = dict(rules), clock
        self._full_at: dict[bytes, float] = {}

    def take(self, key: Hashed | None) -> float:
        """Take a token for a request with this key.

        Returns:
            0; or, and then nothing is taken, the seconds until there is one.
        """
        wait = self.wait(key)
        if not wait:
            self.charge(key, 1)
        return wait

    def wait(self, key: Hashed | None) -> float:
        """Seconds until there is a token for a request with this key; 0: there is one."""
        rate = self._rules.get(None if key is None else key.role)
        if rate is None:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at.get(_caller(key), now), now)
        wait = full_at - now - (rate.burst - 1.0) / rate.per_second
        return wait if wait > 1e-9 else 0.0  # rounding of the clock is no reason to refuse

    def charge(self, key: Hashed | None, tokens: int) -> None:
        """Take tokens, as for the questions of a batch beside its first; where there are not so
        many, the caller owes them, and waits the longer for the next.
        """
        rate = self._rules.get(None if key is None else key.role)
        if rate is not None and tokens > 0:
            now, caller = self._clock(), _caller(key)
            full_at = max(self._full_at.get(caller, now), now)
            self._full_at[caller] = full_at + tokens / rate.per_second


def _caller(key: Hashed | None) -> bytes:
    return b"" if key is None else key.digest


def parse_rates(
    rates: Sequence[str], bursts: Sequence[str], *, keys: bool
) -> dict[Role | None, Rate]:
    """Bounds from the command line: `100` for everybody, `read=100` for keys of a role.

    Args:
        rates: requests a second.
        bursts: requests at once; without one, as many as come in a second, and at least one.
        keys: whether keys are needed.

    Raises:
        ConfigError: one is no positive number, names no role or one twice, or bounds nobody.
    """
    per_second, burst = _by_role("--rate", rates, 0.0), _by_role("--burst", bursts, 1.0)
    if not keys and (per_second.keys() | burst.keys()) - {None}:
        raise ConfigError(
            "There are no keys, so no caller has a role. Give --rate and --burst a number alone, "
            "or give --keys."
        )
    found: dict[Role | None, Rate] = {}
    for role in ROLES if keys else (None,):
        each = per_second.get(role, per_second.get(None))
        if each is not None:
            found[role] = Rate(each, burst.get(role, burst.get(None, max(1.0, each))))
    for name in burst.keys() - {None}:
        if name not in found:
            raise ConfigError(f"--burst {name}=… has no --rate to go with. Give --rate too.")
    if burst and not found:
        raise ConfigError("--burst bounds nothing by itself. Give --rate too.")
    return found


def _by_role(option: str, said: Sequence[str], least: float) -> dict[Role | None, float]:
    found: dict[Role | None, float] = {}
    for one in said:
        name, equals, number = one.rpartition("=")
        role = next((role for role in ROLES if role == name), None)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if bool(equals) != (role is not None) or not (0 < value < math.inf) or value < least:
            raise ConfigError(
                f"{option} {one} is neither a number above 0 (a burst: at least 1) nor "
                "read=NUMBER or write=NUMBER."
            )
        if role in found:
            raise ConfigError(f"{option} is given twice for {role or 'everybody'}. Give it once.")
        found[role] = value
    return found
