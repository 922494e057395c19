"""Micro-batching: waiting queries are answered together, in one pass of the tower.

The event loop only puts in and is told; it never waits for a lock that a model holds. Single
queries go before pieces of big batches, and a piece is small, so that nobody waits long for one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recsys.errors import QueryError, as_exception
from recsys.serving.api.schemas import Code, Refusal
from recsys.serving.engine.query import Answers, Query

log = logging.getLogger("recsys.serve")

Outcome = Answers | QueryError | Exception


class Answerer(Protocol):
    """What the batcher wants of an engine."""

    def answer(self, queries: Sequence[Query]) -> list[Answers | QueryError]: ...


@dataclass(frozen=True)
class BatchRules:
    """How queries wait.

    Args:
        most: queries answered in one pass.
        piece: queries of a big batch that go together; what a single one may have to wait for.
        waiting: queries (and other work) that may wait; more are refused.
        threads: that answer.
    """

    most: int = 64
    piece: int = 16
    waiting: int = 1024
    threads: int = 1


class _Job:
    """A query, or other work, and the future of whoever waits for it."""

    __slots__ = ("call", "deadline", "engine", "future", "loop", "outcome", "query")

    def __init__(
        self,
        future: asyncio.Future[Any],
        deadline: float,
        engine: Answerer | None = None,
        query: Query | None = None,
        call: Callable[[], Any] | None = None,
    ) -> None:
        self.future, self.deadline = future, deadline
        self.engine, self.query, self.call = engine, query, call
        self.loop = future.get_loop()
        self.outcome: Any = None


class Batcher:
    """A bounded queue before the threads that answer.

    Args:
        rules: sizes.
        name: of the threads.
    """

    def __init__(self, rules: BatchRules | None = None, *, name: str = "answers") -> None:
        self.rules = rules or BatchRules()
        self._name = name
        self._single: deque[_Job] = deque()
        self._bulk: deque[list[_Job]] = deque()
        self._size = 0
        self._ready = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.dropped = 0  # work that was given up before it began

    @property
    def depth(self) -> int:
        """How much waits now."""
        return self._size

    async def answer(
        self, engine: Answerer, queries: Sequence[Query], deadline: float
    ) -> list[Outcome]:
        """Answers of one engine in the order of the queries.

        Args:
            engine: who answers.
            queries: one, or the queries of a batch; of these each may fail in its own place.
            deadline: in seconds of time.monotonic().

        Raises:
            Refusal: the queue is full, or the deadline has passed.
            Exception: what went wrong with the only one.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(loop.create_future(), deadline, engine, query) for query in queries]
        self._put(jobs, bulk=len(jobs) > 1)
        return await self._wait(jobs, deadline)

    async def call(self, work: Callable[[], Any], deadline: float) -> Any:
        """What `work` returns, run in a thread of ours.

        Raises:
            Refusal: as `answer`; otherwise whatever `work` raises.
        """
        job = _Job(asyncio.get_running_loop().create_future(), deadline, call=work)
        self._put([job], bulk=False)
        return (await self._wait([job], deadline))[0]

    def _put(self, jobs: list[_Job], *, bulk: bool) -> None:
        with self._ready:
            if self._closed:
                raise Refusal(Code.OVERLOADED, "The service is stopping.", retry=1, close=True)
            # A batch may be larger than what is free in the queue, but not come into a full one.
            room = self.rules.waiting - self._size
            if room <= 0 or (not bulk and len(jobs) > room):
                raise Refusal(Code.OVERLOADED, "Too many requests wait; try again soon.", retry=1)
            if bulk:
                step = self.rules.piece
                self._bulk.extend(jobs[at : at + step] for at in range(0, len(jobs), step))
            else:
                self._single.extend(jobs)
            self._size += len(jobs)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) < self.rules.threads:
                self._start()
            self._ready.notify()

    async def _wait(self, jobs: list[_Job], deadline: float) -> list[Any]:
        futures = [job.future for job in jobs]
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                if len(futures) == 1:
                    outcomes = [await futures[0]]
                else:
                    outcomes = list(await asyncio.gather(*futures))
        except TimeoutError:
            raise _late() from None
        for outcome in outcomes:
            # An answer may be that the query is wrong; anything else went wrong with us, and
            # costs the others of a batch nothing. What comes late is late for all of them.
            if not isinstance(outcome, Exception) or isinstance(outcome, QueryError):
                continue
            if len(outcomes) == 1 or isinstance(outcome, Refusal):
                raise outcome
        if len(outcomes) == 1 and jobs[0].call is not None and isinstance(outcomes[0], QueryError):
            raise outcomes[0]
        return outcomes

    # ------------------------------------------------------------------ in the threads

    def _start(self) -> None:
        thread = threading.Thread(
            target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def _run(self) -> None:
        while True:
            try:
                if not self._step():
                    return
            except BaseException:  # a thread that ends here would be missing from then on
                log.exception("a thread of %s goes on after an error", self._name)

    def _step(self) -> bool:
        """Do what waits; False at the end.

        Nothing of it is held while waiting for more: a replaced engine must be free to go.
        """
        jobs = self._take()
        if jobs is None:
            return False
        now = time.monotonic()
        due = [job for job in jobs if job.deadline > now and not job.future.cancelled()]
        for job in jobs:
            job.outcome = _LATE
        try:
            self._work(due)
        finally:  # whatever happens, nobody is left waiting
            self._tell(jobs)
            self.dropped += len(jobs) - len(due)
        return True

    def _take(self) -> list[_Job] | None:
        """Next work: singles first, and one piece of a batch with them; None at the end."""
        with self._ready:
            while not self._single and not self._bulk:
                if self._closed:
                    return None
                self._ready.wait()
            jobs = [self._single.popleft() for _ in range(min(self.rules.most, len(self._single)))]
            if self._bulk and len(jobs) < self.rules.most:
                jobs += self._bulk.popleft()
            self._size -= len(jobs)
            return jobs

    def _work(self, jobs: list[_Job]) -> None:
        groups: dict[int, list[_Job]] = {}
        for job in jobs:
            if job.call is not None:
                try:
                    job.outcome = job.call()
                except BaseException as error:  # a panic of Polars is no Exception
                    job.outcome = as_exception(error)
            else:
                groups.setdefault(id(job.engine), []).append(job)
        for group in groups.values():
            self._answer(group)

    def _answer(self, jobs: list[_Job]) -> None:
        engine, queries = jobs[0].engine, [job.query for job in jobs if job.query is not None]
        assert engine is not None
        try:
            outcomes: Sequence[Outcome] = engine.answer(queries)
            if len(outcomes) != len(queries):
                raise RuntimeError(f"{len(queries)} queries, but {len(outcomes)} answers")
        except BaseException as error:
            if len(jobs) > 1:  # one that breaks the engine must not cost the others their answer
                log.exception("a batch of %d failed; each is answered alone", len(jobs))
                for job in jobs:
                    self._answer([job])
                return
            outcomes = [as_exception(error)]
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.outcome = outcome

    def _tell(self, jobs: list[_Job]) -> None:
        loops = {id(job.loop): job.loop for job in jobs}
        for key, loop in loops.items():
            mine = [job for job in jobs if id(job.loop) == key]
            try:
                loop.call_soon_threadsafe(_resolve, mine)
            except RuntimeError:  # the loop is closed; nobody waits there any more
                log.warning("%d answers came after the end of the loop", len(mine))

    def close(self, seconds: float = 5.0) -> None:
        """Take nothing more, finish what waits, and end the threads (within `seconds`)."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


def _late() -> Refusal:
    return Refusal(Code.DEADLINE, "There was no answer in time; try again soon.", retry=1)


_LATE = object()


def _resolve(jobs: list[_Job]) -> None:
    """In the loop: give everybody what became of the work."""
    for job in jobs:
        if not job.future.done():
            job.future.set_result(_late() if job.outcome is _LATE else job.outcome)
