"""Calls of many threads, done by one thread in as few goes as possible.

While one go waits for the disk the next calls gather, so that a commit is shared by all who wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class GroupCommit(Generic[T, R]):
    """One worker thread behind many callers.

    Args:
        work: is given what waits, in order, and answers each with a result or an exception to
            raise; what it raises itself is raised to all of them.
        most: of one go.
        name: of the thread.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Sequence[R | Exception]],
        *,
        most: int = 1024,
        name: str = "together",
    ) -> None:
        self._work, self._most = work, most
        self._waiting: deque[tuple[T, Future[R]]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, asked: T) -> R:
        """Have it done; blocks until it is.

        Raises:
            RuntimeError: closed.
        """
        future: Future[R] = Future()
        with self._change:
            if self._closed:
                raise RuntimeError("It is closed.")
            self._waiting.append((asked, future))
            self._change.notify()
        try:
            return future.result()
        finally:
            del future  # an error holds this frame: a cycle, with all that its traceback reaches

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Do what waits, then end the thread; a second call does nothing."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if not self._waiting:
                    return
                some = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            self._do(some)
            del some  # while waiting for more, nothing of the last is held

    def _do(self, some: list[tuple[T, Future[R]]]) -> None:
        try:
            done = self._work([asked for asked, _ in some])
        except BaseException as error:  # to those who wait, who would else wait for ever
            for _, future in some:
                future.set_exception(error)
        else:
            for (_, future), result in zip(some, done, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            del done, result
        # The frames that an error's traceback holds lead here: it must not be found from here.
        del future
        some.clear()
