"""What comes in from outside is bounded here: sizes, times, and what is no HTTP at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import orjson

from recsys.serving.api.schemas import MAX_ID, Code, Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

MAX_URL = 8 << 10
MAX_HEADERS = 32 << 10
MAX_HEADER_COUNT = 100
MAX_PARAMETERS = 64

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,64}")
_UNSAFE = re.compile(rb'["\\]')
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def error_body(code: Code, message: str, request_id: str) -> bytes:
    """The body of every error."""
    return orjson.dumps({"error": {"code": code, "message": message, "request_id": request_id}})


def sane_id(value: bytes) -> str | None:
    """A request id from outside, where it is short and visible ASCII without quotes."""
    if _REQUEST_ID.fullmatch(value) and not _UNSAFE.search(value):
        return value.decode("ascii")
    return None


def check_head(scope: Scope) -> None:
    """Bounds of URL and headers, and the encoding of the path.

    Raises:
        Refusal: one of them does not hold.
    """
    raw, query = scope.get("raw_path") or b"", scope["query_string"]
    if len(raw) + len(query) > MAX_URL:
        raise Refusal(
            Code.LONG_URL,
            f"The address is longer than {MAX_URL:,} bytes; post the question as JSON.",
        )
    headers = scope["headers"]
    if len(headers) > MAX_HEADER_COUNT or sum([len(n) + len(v) for n, v in headers]) > MAX_HEADERS:
        raise Refusal(
            Code.HEADERS,
            f"More than {MAX_HEADER_COUNT} headers, or more than {MAX_HEADERS:,} bytes of them.",
        )


def segment(raw: str) -> str:
    """An id from its piece of the path, where `/` in an id is written %2F.

    Raises:
        Refusal: no UTF-8 is written there, or it is too long.
    """
    octets = raw.encode("ascii", "replace")
    if _BAD_ESCAPE.search(octets):
        raise Refusal(Code.BAD_REQUEST, "The path has a % without two hexadecimal digits.")
    try:
        text = unquote_to_bytes(octets).decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal(Code.BAD_REQUEST, "The path is not UTF-8.") from None
    if not 1 <= len(text) <= MAX_ID:
        raise Refusal(Code.INVALID, f"An id has 1 to {MAX_ID} characters; this has {len(text)}.")
    return text


def parameters(query: bytes) -> dict[str, list[str]]:
    """Values of each parameter of a query string.

    Raises:
        Refusal: no UTF-8, broken escapes, or too many.
    """
    if not query:
        return {}
    if _BAD_ESCAPE.search(query):
        raise Refusal(Code.BAD_REQUEST, "The query has a % without two hexadecimal digits.")
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )  # fmt: skip
    except UnicodeDecodeError:
        raise Refusal(Code.BAD_REQUEST, "The query is not UTF-8.") from None
    except ValueError:
        raise Refusal(
            Code.BAD_REQUEST, f"The query has more than {MAX_PARAMETERS} parameters."
        ) from None
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


async def body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """The whole body, never more than `most` bytes of it, whether or not its length was said.

    Raises:
        Refusal: no JSON is announced, it is too large, or it came too slowly.
    """
    kind, encoding, length = b"", b"", None
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value
        elif name == b"content-encoding":
            encoding = value
        elif name == b"content-length":
            length = value
    # A page of another origin cannot send this type unasked: nobody writes through a visitor.
    if kind.split(b";", 1)[0].strip().lower() != b"application/json":
        raise Refusal(Code.MEDIA, "Send the body as Content-Type: application/json.")
    if encoding.strip().lower() not in (b"", b"identity"):
        raise Refusal(Code.MEDIA, "Send the body as it is, without a Content-Encoding.")
    if length is not None and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(Code.BAD_REQUEST, "The body did not end.", close=True)
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(
            Code.TIMEOUT, f"The body did not come within {seconds:g} s.", close=True
        ) from None


def _too_large(most: int) -> Refusal:
    return Refusal(
        Code.TOO_LARGE, f"The body is larger than {most:,} bytes; send it in parts.", close=True
    )
