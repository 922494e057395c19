"""How bytes become requests: uvicorn's protocol, bounded, with a short way for hot answers."""

from __future__ import annotations

import asyncio
import logging
from asyncio import TimerHandle
from collections.abc import Callable
from time import monotonic
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from recsys.serving.api.awake import Awake
from recsys.serving.api.direct import Direct
from recsys.serving.api.guard import MAX_HEADERS, MAX_URL, error_body
from recsys.serving.api.hot import Hot, HotAnswer
from recsys.serving.api.schemas import STATUS, Code

log = logging.getLogger("recsys.serve.http")
log.setLevel(logging.ERROR)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on what comes before a request is complete.

    uvicorn waits for ever for the end of a head, and keeps all of it; and it waits for ever for a
    reader that reads nothing.

    Hot and direct answers are written here, in one piece and without a task: asking `hot.py` costs
    less than starting a request of uvicorn's does.
    """

    head_seconds = 10.0
    write_seconds = 30.0
    most_connections = 4096
    direct = True
    """Whether answers are written here; otherwise the application gives the same ones."""

    _timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None
    _pending = 0
    _in_head = False
    _answered = False
    _asked = False  # a question was answered directly in this piece of data
    _held: list[bytes] | None = None  # pieces of a body that may be answered directly
    _given: list[tuple[bytes, bytes]] | None = None
    _given_bytes = b""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.on_refused: Callable[[str], None] | None = getattr(self.app, "refused", None)
        self._hot: Hot | None = getattr(self.app, "hot", None) if self.direct else None
        self._direct: Direct | None = getattr(self.app, "direct", None) if self.direct else None
        self._awake: Awake | None = getattr(self.app, "awake", None)
        self.logger = log  # counted, not logged: anybody can send any number of them

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections and not self._make_room():
            self._refuse(Code.OVERLOADED, "Too many connections; try again soon.")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn leaves that of a connection that was reset
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = True
        self._unset_keepalive_if_required()  # of an answer to what came before in the same piece
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._disarm()
        method = self.parser.get_method()
        if self.transport.is_closing():
            self._answered = True  # what comes after the last answer gets none, and is not done
        elif method == b"GET" and self._hot is not None and self._answer(self._hot):
            self._answered = True
        elif method == b"POST" and self._direct is not None and self._may(self._direct):
            self._held = []
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._held is not None:
            self._held.append(body)
        elif not self._answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._answered:
            self._answered = False
        elif self._held is None or not self._answer_held(b"".join(self._held)):
            self._give_up_direct()
            super().on_message_complete()
        else:
            self._held = None

    def _free(self) -> bool:
        """Whether nothing is to be written before an answer, and it can be written now."""
        return self._idle() and not self.flow.write_paused and not self.transport.is_closing()

    def _idle(self) -> bool:
        """Whether there is no request that is yet to be answered."""
        return self.cycle is None or self.cycle.response_complete

    def _answer(self, hot: Hot) -> bool:
        """Answer a hot request; False: it is not, or others are to be answered before it."""
        if not self._free():
            return False
        start = monotonic()
        path, _, query = self.url.partition(b"?")
        answer = hot.answer(path, query, self.headers)
        if answer is None:
            return False
        self._write(answer)
        hot.done(answer, monotonic() - start)
        return True

    def _may(self, direct: Direct) -> bool:
        """Whether a question may be answered directly once its body is there.

        One in a piece of data: others are served between two questions of a pipeline.
        """
        if self._asked or not direct.turn(id(self)) or not self._free():
            return False
        path, _, query = self.url.partition(b"?")
        return direct.may(path, query, self.headers)

    def _answer_held(self, body: bytes) -> bool:
        """Answer the question that is held; False: the general way has to."""
        assert self._direct is not None and self._hot is not None
        start = monotonic()
        path = self.url.partition(b"?")[0]
        answer = self._direct.answer(path, self.headers, body)
        if answer is None:
            return False
        self._asked = True
        self._write(answer)
        self._hot.done(answer, monotonic() - start, "POST")
        return True

    def _give_up_direct(self) -> None:
        """The general way takes over what is held, from its head on."""
        held, self._held = self._held, None
        if held is not None and not self.transport.is_closing():
            super().on_headers_complete()
            for piece in held:
                super().on_body(piece)

    def _write(self, answer: HotAnswer) -> None:
        keep = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self.transport.write(
            b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b"
            % (
                STATUS_LINE[200], self._defaults(), len(answer.content), answer.request_id,
                b"\r\n" if keep else b"connection: close\r\n\r\n", answer.content,
            )
        )  # fmt: skip
        self.server_state.total_requests += 1
        if self._awake is not None:
            self._awake.answered(self.loop)
        if keep:
            self._keep_alive()
        else:
            self.transport.close()

    def _keep_alive(self) -> None:
        """Close the connection when nothing comes for long."""
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _defaults(self) -> bytes:
        """The server's own headers (the date), which uvicorn makes anew every second."""
        given = self.server_state.default_headers
        if given is not self._given:
            self._given = given
            self._given_bytes = b"".join(b"%b: %b\r\n" % header for header in given)
        return self._given_bytes

    def data_received(self, data: bytes) -> None:
        self._asked = False
        super().data_received(data)
        self._give_up_direct()  # the rest of the body is yet to come, however slowly
        if self._in_head:
            self._pending += len(data)
            if self._pending > MAX_HEADERS + MAX_URL:
                self._refuse(Code.HEADERS, f"The head is larger than {MAX_HEADERS:,} bytes.")
            elif self._timer is None:
                self._arm()
        elif (
            self.timeout_keep_alive_task is None
            and self._timer is None
            and self._idle()
            and not self.transport.is_closing()
        ):
            # No request began: a line between two, or more of a body that was refused already.
            self._keep_alive()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Code.BAD_REQUEST, msg)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to say: the request is answered as if it had asked for no upgrade."""

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._slow)

    def _disarm(self) -> None:
        self._pending = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(Code.TIMEOUT, f"No request came within {self.head_seconds:g} s.")

    def _refuse(self, code: Code, message: str) -> None:
        """Answer what never became a request, and close."""
        self._disarm()
        self._in_head = False
        if self.on_refused is not None:
            self.on_refused(code)
        if not self._idle():
            self.transport.close()  # an answer is on its way; nothing may be put into it
            return
        content = error_body(code, message, "-")
        self.transport.write(
            b"".join(
                (
                    STATUS_LINE[STATUS[code]],
                    b"content-type: application/json\r\nconnection: close\r\ncontent-length: ",
                    b"%d\r\n\r\n" % len(content),
                    content,
                )
            )
        )
        self.transport.close()

    def _make_room(self) -> bool:
        """Close connections that wait for nothing; whether there were any."""
        idle = [
            one
            for one in self.connections
            if isinstance(one, GuardedProtocol) and one is not self and one._idle()
        ]
        for one in idle[: max(1, self.most_connections // 4)]:
            one.transport.close()
        return bool(idle)
