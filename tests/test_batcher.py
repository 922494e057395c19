"""The queue before the engines: what waits goes together, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recsys.errors import QueryError
from recsys.serving.api.batcher import Batcher, BatchRules
from recsys.serving.api.schemas import Refusal
from recsys.serving.engine.query import Answers, Filter, Query


class Gate:
    """An engine whose every call waits until it is let through; says back the text."""

    def __init__(self, *, open: bool = False) -> None:
        self.calls: list[list[str]] = []
        self.go = threading.Semaphore(10_000 if open else 0)

    def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
        texts = [str(ask.text) for ask in asks]
        self.calls.append(texts)
        self.go.acquire()
        if "boom" in texts:
            raise ZeroDivisionError(f"{len(texts)} at once")
        return [
            QueryError(text) if text == "wrong" else Answers([text], np.zeros(1, np.float32))
            for text in texts
        ]


def asks(*texts: str) -> list[Query]:
    return [Query("search", text=text) for text in texts]


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


async def begun(batcher: Batcher, engine: Gate, *texts: str) -> asyncio.Task[Any]:
    task = asyncio.create_task(batcher.answer(engine, asks(*texts), soon()))
    await asyncio.sleep(0.02)
    return task


def test_what_waits_goes_in_one_call_up_to_the_most() -> None:
    async def run() -> None:
        batcher, engine = Batcher(BatchRules(most=4)), Gate()
        tasks = [await begun(batcher, engine, "first")]
        tasks += [await begun(batcher, engine, str(n)) for n in range(6)]
        assert batcher.depth == 6
        for _ in range(3):
            engine.go.release()
        got = [(await task)[0].ids for task in tasks]
        assert got == [["first"], *([str(n)] for n in range(6))]
        assert engine.calls == [["first"], ["0", "1", "2", "3"], ["4", "5"]]
        batcher.close()

    asyncio.run(run())


def test_engines_are_not_mixed() -> None:
    async def run() -> None:
        batcher, one, two = Batcher(), Gate(open=True), Gate(open=True)
        hold = Gate()
        first = await begun(batcher, hold, "hold")
        tasks = [await begun(batcher, one, "a"), await begun(batcher, two, "b")]
        tasks += [await begun(batcher, one, "c")]
        hold.go.release()
        assert [(await task)[0].ids for task in (first, *tasks)] == [["hold"], ["a"], ["b"], ["c"]]
        assert (one.calls, two.calls) == ([["a", "c"]], [["b"]])
        batcher.close()

    asyncio.run(run())


def test_a_single_question_waits_for_one_piece_of_a_batch_at_most() -> None:
    async def run() -> None:
        batcher, engine = Batcher(BatchRules(piece=2)), Gate()
        batch = await begun(batcher, engine, *"abcdef")
        single = await begun(batcher, engine, "single")
        for _ in range(3):
            engine.go.release()
        assert (await single)[0].ids == ["single"]
        assert [reply.ids for reply in await batch] == [[letter] for letter in "abcdef"]
        assert engine.calls == [["a", "b"], ["single", "c", "d"], ["e", "f"]]
        batcher.close()

    asyncio.run(run())


def test_one_that_breaks_the_engine_costs_the_others_nothing() -> None:
    async def run() -> None:
        batcher, engine = Batcher(), Gate()
        first = await begun(batcher, engine, "first")
        tasks = [await begun(batcher, engine, text) for text in ("a", "boom", "wrong", "b")]
        for _ in range(10):
            engine.go.release()
        await first
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(one, "args", one) for one in got][1] == ("1 at once",)
        assert got[0][0].ids == ["a"]
        assert got[3][0].ids == ["b"]
        assert isinstance(got[2][0], QueryError)
        batcher.close()

    asyncio.run(run())


def test_a_deadline_ends_the_wait_and_what_has_not_begun_is_dropped() -> None:
    async def run() -> None:
        batcher, engine = Batcher(), Gate()
        first = await begun(batcher, engine, "first")
        start = time.monotonic()
        with pytest.raises(Refusal, match="no answer in time"):
            await batcher.answer(engine, asks("late"), soon(0.05))
        assert 0.04 < time.monotonic() - start < 1
        engine.go.release()
        await first
        await asyncio.sleep(0.05)
        assert engine.calls == [["first"]]
        assert (batcher.dropped, batcher.depth) == (1, 0)
        batcher.close()

    asyncio.run(run())


def test_what_comes_too_late_is_never_begun() -> None:
    async def run() -> None:
        batcher, engine = Batcher(), Gate(open=True)
        for _ in range(20):
            with pytest.raises(Refusal, match="no answer in time"):
                await batcher.answer(engine, asks("late"), time.monotonic() - 0.01)
        await asyncio.sleep(0.02)
        assert engine.calls == []
        batcher.close()

    asyncio.run(run())


def test_a_full_queue_refuses_at_once() -> None:
    async def run() -> None:
        batcher, engine = Batcher(BatchRules(waiting=3)), Gate()
        tasks = [await begun(batcher, engine, "first")]
        tasks += [await begun(batcher, engine, *"abcde")]  # a batch may overshoot
        for some in (["x"], ["x", "y"]):
            with pytest.raises(Refusal, match="Too many") as refused:
                await batcher.answer(engine, asks(*some), soon())
            assert refused.value.retry == 1
        for _ in range(4):
            engine.go.release()
        await asyncio.gather(*tasks)
        assert (await begun(batcher, engine, "again")) is not None
        engine.go.release()
        await asyncio.sleep(0.02)
        batcher.close()

    asyncio.run(run())


def test_other_work_runs_in_the_thread_and_its_errors_come_back() -> None:
    async def run() -> None:
        batcher = Batcher()
        assert await batcher.call(lambda: threading.current_thread().name, soon()) == "answers-0"
        for error in (QueryError("no"), ValueError("no")):

            def fail(error: Exception = error) -> None:
                raise error

            with pytest.raises(type(error), match="no"):
                await batcher.call(fail, soon())
        batcher.close()

    asyncio.run(run())


def test_closing_finishes_what_waits_and_takes_nothing_more() -> None:
    async def run() -> None:
        batcher, engine = Batcher(BatchRules(most=1)), Gate(open=True)
        tasks = [
            asyncio.create_task(batcher.answer(engine, asks(str(n)), soon())) for n in range(9)
        ]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)
        assert [reply[0].ids for reply in await asyncio.gather(*tasks)] == [
            [str(n)] for n in range(9)
        ]
        with pytest.raises(Refusal, match="stopping"):
            await batcher.answer(engine, asks("late"), soon())

    asyncio.run(run())


def test_whoever_gives_up_costs_no_answer_to_others() -> None:
    async def run() -> None:
        batcher, engine = Batcher(), Gate()
        first = await begun(batcher, engine, "first")
        gone, stays = await begun(batcher, engine, "gone"), await begun(batcher, engine, "stays")
        gone.cancel()
        await asyncio.sleep(0)
        engine.go.release()
        engine.go.release()
        assert (await stays)[0].ids == ["stays"]
        await first
        assert engine.calls == [["first"], ["stays"]]
        batcher.close()

    asyncio.run(run())


class Panic(BaseException):
    """As Polars raises it: no Exception."""


def test_work_that_panics_costs_no_thread() -> None:
    async def run() -> None:
        batcher = Batcher(BatchRules(threads=2))

        def panic(error: BaseException) -> None:
            raise error

        for error in (Panic("out-of-range date"), SystemExit(3), KeyboardInterrupt()) * 2:
            with pytest.raises(RuntimeError, match=type(error).__name__):
                await batcher.call(lambda error=error: panic(error), soon())
        before = list(batcher._threads)
        assert all(thread.is_alive() for thread in before)
        assert await batcher.call(lambda: 5, soon()) == 5
        assert batcher._threads == before
        batcher.close()

    asyncio.run(run())


def test_an_engine_that_panics_costs_the_others_nothing() -> None:
    class Panicking(Gate):
        def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
            try:
                return super().answer(asks)
            except ZeroDivisionError as error:
                raise Panic(str(error)) from None

    async def run() -> None:
        batcher, engine = Batcher(), Panicking(open=True)
        hold = Gate()
        first = await begun(batcher, hold, "first")
        tasks = [await begun(batcher, engine, text) for text in ("a", "boom", "b")]
        hold.go.release()
        await first
        one, two, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(two, RuntimeError) and "1 at once" in str(two)
        assert (one[0].ids, three[0].ids) == (["a"], ["b"])
        batcher.close()

    asyncio.run(run())


def test_a_thread_outlives_errors_between_two_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        batcher, tell = Batcher(), Batcher._tell
        broken = [Panic("once")]

        def telling(self: Batcher, jobs: Any) -> None:
            tell(self, jobs)
            if broken:
                raise broken.pop()

        monkeypatch.setattr(Batcher, "_tell", telling)
        for _ in range(2):
            assert await batcher.call(lambda: 5, soon()) == 5
        assert not broken and len(batcher._threads) == 1 and batcher._threads[0].is_alive()
        batcher.close()

    asyncio.run(run())


def test_a_thread_that_is_gone_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        batcher = Batcher()
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, "_run", Batcher._step)  # ends after one job
            assert await batcher.call(lambda: 1, soon()) == 1
            batcher._threads[0].join(5)
        assert await batcher.call(lambda: 2, soon()) == 2
        assert [thread.is_alive() for thread in batcher._threads] == [True]
        batcher.close()

    asyncio.run(run())


# --- quick questions ------------------------------------------------------------------------------


class Where:
    """An engine that remembers in which thread it answered how many."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, int]] = []

    def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
        here = threading.current_thread() is threading.main_thread()
        self.calls.append((here, len(asks)))
        return [Answers(["a"], np.zeros(1, np.float32)) for _ in asks]


QUICK = Query("recommend", history=("a",))


@pytest.mark.parametrize(
    "more",
    [
        {"explain": True}, {"exact": True}, {"paged": True}, {"diversity": 0.5}, {"k": 500},
        {"filter": Filter(equals={"category": ("tea",)})}, {"kind": "search", "text": "tea"},
    ],
)  # fmt: skip
def test_a_question_that_may_take_long_never_holds_the_loop_up(more: dict[str, Any]) -> None:
    async def run() -> None:
        batcher, engine = Batcher(), Where()
        await batcher.answer(engine, [replace(QUICK, **more)], soon())
        assert engine.calls == [(False, 1)]
        batcher.close()

    asyncio.run(run())
