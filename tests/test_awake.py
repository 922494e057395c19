"""After an answer the loop looks out for the next question for a moment, and then it sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from service_cases import FakeHost, served
from test_direct import HISTORY, Line, post

from recsys.serving.api import awake as module
from recsys.serving.api.app import ServiceRules, make_app
from recsys.serving.api.awake import Awake


class Loop:
    """Calls what is to be called soon, one turn after the other; each turn takes 50 µs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.turns, self._soon = 0.0, 0, list[tuple[Callable[..., None], Any]]()
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "cores", lambda: 2)

    def call_soon(self, call: Callable[..., None], given: Any) -> None:
        self._soon.append((call, given))

    def run(self, at_most: int = 1000) -> int:
        """Turns until it sleeps."""
        turns = 0
        while self._soon and turns < at_most:
            soon, self._soon = self._soon, []
            assert len(soon) == 1, "looked out for once, however many were answered"
            for call, given in soon:
                call(given)
            turns, self.now = turns + 1, self.now + 0.00005
        return turns


def test_it_looks_out_for_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    awake = Awake(0.000475, lambda: True)
    awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run() == 11  # at 0, 50, … 450 µs it goes on; at 500 µs it ends
    assert loop.run() == 0
    awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run(5) == 5
    for _ in range(3):
        awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run() == 11, "from the last answer on"


def test_it_sleeps_at_once_where_others_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, state = Loop(monkeypatch), SimpleNamespace(idle=True)
    awake = Awake(1.0, lambda: state.idle)
    awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run(3) == 3
    state.idle = False
    assert loop.run() == 1


def test_it_sleeps_at_once_where_another_thread_has_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(monkeypatch)
    awake = Awake(1.0, lambda: True)
    awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run(100) == 100
    loop.now += 0.005
    assert loop.run() == 1
    loop.now += 1.0  # an answer that took long is no sign of others
    awake.answered(loop)  # type: ignore[arg-type]
    assert loop.run(100) == 100


@pytest.mark.parametrize(("seconds", "cores"), [(0.0, 2), (0.5, 1)])
def test_never_where_it_is_off_or_the_core_is_the_callers(
    monkeypatch: pytest.MonkeyPatch, seconds: float, cores: int
) -> None:
    loop = Loop(monkeypatch)
    monkeypatch.setattr(module, "cores", lambda: cores)
    Awake(seconds, lambda: True).answered(loop)  # type: ignore[arg-type]
    assert loop.run() == 0


def test_a_service_that_stays_awake_uses_its_core_that_long_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "HELD", 10.0)  # threads of this test want the interpreter, too
    used = {}
    for seconds in (0.0, 0.4):
        with served(make_app(FakeHost(), rules=ServiceRules(awake=seconds))) as port:
            line = Line(port)
            for _ in range(2):  # the second one is answered directly
                assert line.ask(post("/v1/recommendations", HISTORY))[0] == 200
            before = time.process_time()
            time.sleep(1.5)
            used[seconds] = time.process_time() - before
            line.socket.close()
    assert used[0.0] < 0.2
    # A loaded machine gives it less of a core, never more than was asked for.
    assert 0.05 < used[0.4] - used[0.0] < 0.8
