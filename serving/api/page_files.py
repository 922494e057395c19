"""The page for people and the OpenAPI, served from memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import orjson

from recsys.files import sha256_bytes

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class PageFiles:
    """What is served beside the API.

    Args:
        openapi: gives the description of the API.
    """

    def __init__(self, openapi: Callable[[], dict[str, Any]]) -> None:
        self._openapi = openapi
        self._files: dict[str, tuple[bytes, str, str]] = {}
        folder = files("recsys.serving.api").joinpath("page")
        if not folder.is_dir():
            return
        for file in sorted(folder.iterdir(), key=lambda one: one.name):
            kind = KINDS.get("." + file.name.rsplit(".", 1)[-1])
            if kind is not None:
                self._add(f"/page/{file.name}", file.read_bytes(), kind)
        if "/page/index.html" in self._files:
            self._files["/"] = self._files["/page/index.html"]

    def _add(self, path: str, content: bytes, kind: str) -> None:
        self._files[path] = content, kind, f'"{sha256_bytes(content)[:32]}"'

    @property
    def paths(self) -> list[str]:
        """All there is."""
        return [*self._files, "/openapi.json"]

    def get(self, path: str, known: str | None) -> tuple[int, bytes, str, dict[str, str]]:
        """Status, content, type and headers.

        Args:
            path: one of `paths`.
            known: If-None-Match of the request.
        """
        if path not in self._files:  # the description of the API is made when first asked for
            self._add(path, orjson.dumps(self._openapi()), "application/json")
        content, kind, tag = self._files[path]
        headers = HEADERS | {"etag": tag}
        if known is not None and tag in known:
            return 304, b"", kind, headers
        return 200, content, kind, headers
