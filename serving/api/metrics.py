"""Prometheus metrics of the service.

Counting happens in the event loop alone, in plain lists: a request costs one bisection and three
additions. Prometheus' own objects are made when somebody asks.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

BOUNDS = (
    .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Seconds."""


class Requests:
    """Of one route, status and variant: how many, and how long they took."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Metrics:
    """Counts of one service.

    Args:
        more: asked at every scrape for counts of models, queues and journal.
    """

    def __init__(self, more: Callable[[], Iterable[Metric]] = lambda: ()) -> None:
        self._requests: dict[tuple[str, int, str], Requests] = {}
        self._fallbacks: dict[tuple[str, str], int] = {}
        self._refused: dict[str, int] = {}
        self.more = more
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def of(self, route: str, status: int, variant: str) -> Requests:
        """Where requests of this kind are counted; keep it and `add`."""
        key = (route, status, variant)
        found = self._requests.get(key)
        if found is None:
            found = self._requests[key] = Requests()
        return found

    def fallback(self, route: str, variant: str) -> None:
        """A fall-back answered."""
        self._fallbacks[route, variant] = self._fallbacks.get((route, variant), 0) + 1

    def refused(self, code: str) -> None:
        """A request had an error for an answer."""
        self._refused[code] = self._refused.get(code, 0) + 1

    def text(self) -> bytes:
        """In the text form of Prometheus."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """What Prometheus' registry asks for."""
        times = HistogramMetricFamily(
            "recsys_request_seconds", "Time from the head of a request to the end of its answer.",
            labels=["route", "status", "variant"],
        )  # fmt: skip
        for (route, status, variant), one in list(self._requests.items()):
            passed, buckets = 0, []
            for bound, count in zip((*BOUNDS, float("inf")), one.counts, strict=True):
                passed += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), passed))
            times.add_metric([route, str(status), variant], buckets, one.seconds)
        yield times
        fallbacks = CounterMetricFamily(
            "recsys_fallbacks", "Answers by something else than what was asked for.",
            labels=["route", "variant"],
        )  # fmt: skip
        for (route, variant), count in list(self._fallbacks.items()):
            fallbacks.add_metric([route, variant], count)
        yield fallbacks
        refused = CounterMetricFamily("recsys_errors", "Errors answered.", labels=["code"])
        for code, count in list(self._refused.items()):
            refused.add_metric([code], count)
        yield refused
        yield gauge("recsys_resident_bytes", "Resident memory.", resident_bytes())
        yield from self.more()


def gauge(name: str, said: str, value: float) -> Metric:
    """One number."""
    family = GaugeMetricFamily(name, said)
    family.add_metric([], value)
    return family


def counter(name: str, said: str, value: float) -> Metric:
    """One number that only rises."""
    family = CounterMetricFamily(name, said)
    family.add_metric([], value)
    return family


def of_models(facts: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
    """What a host says of its variants: numbers, the model's version, and the last failure."""
    info = GaugeMetricFamily(
        "recsys_model_info", "1; the labels say which model serves.",
        labels=["variant", "model", "last_error"],
    )  # fmt: skip
    share = GaugeMetricFamily("recsys_variant_share", "Share of requests.", labels=["variant"])
    swaps = CounterMetricFamily("recsys_swaps", "Models put in place.", labels=["variant"])
    failed = CounterMetricFamily(
        "recsys_swap_failures", "Models that were refused; the old one went on.", labels=["variant"]
    )
    loaded = GaugeMetricFamily(
        "recsys_model_loaded_seconds", "When the model was loaded.", labels=["variant"]
    )
    for one in facts:
        name = str(one.get("name", ""))
        error = str(one.get("last_error") or "")[:200]
        info.add_metric([name, str(one.get("version", "")), error], 1)
        for family, key in ((share, "share"), (swaps, "swaps"), (failed, "failures")):
            if isinstance(value := one.get(key), int | float):
                family.add_metric([name], value)
        if isinstance(value := one.get("loaded_at"), int | float):
            loaded.add_metric([name], value)
    yield from (info, share, swaps, failed, loaded)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
