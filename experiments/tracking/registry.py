"""MLflow model registry as a source of bundles: an alias names a version; bundles in a cache."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

from recsys.errors import BundleError, ConfigError
from recsys.experiments.tracking.store import Store, bare, where
from recsys.files import atomic_folder

REGISTRY = "models:/"
"""What a URI of a registered model begins with."""
KEPT = 5
"""Bundles of a model that the cache keeps: two variants with the one before each, and a spare."""


class RegistrySource:
    """A registered model's alias or version as a `recsys.serving.models.sources.ModelSource`.

    Each version is downloaded once, into a folder of its own that is whole or absent. A store that
    is down raises, at most `every` seconds late, and the model that answers goes on.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        cache: holds the downloaded bundles; several processes may share it.
        tracking: the tracking store; empty: as everywhere, see `where`.
        out: holds the embedded store.
        every: seconds between two questions to the store.
        timeout: seconds of one request to a server; each is tried twice.

    Raises:
        ConfigError: a URI of another form.
    """

    def __init__(
        self,
        uri: str,
        cache: str | Path,
        *,
        tracking: str = "",
        out: str | Path = "runs",
        every: float = 10.0,
        timeout: float = 5.0,
    ) -> None:
        parts = re.fullmatch(
            r"models:/(?P<name>[^/@:]+)(@(?P<alias>[\w-]+)|/(?P<version>\d+))", uri
        )
        if parts is None:
            raise ConfigError(
                f"{uri!r} names no registered model. Write models:/NAME@champion or models:/NAME/3."
            )
        self.uri, self.tracking = uri, where(tracking, out)
        self.name, self._alias, self._version = parts["name"], parts["alias"], parts["version"]
        self._cache = Path(cache)
        self._every, self._timeout = every, timeout
        self._store: Store | None = None
        self._asked = -math.inf
        self._last: tuple[str, Path] | BundleError | None = None

    def latest(self) -> tuple[str, Path]:
        """See `ModelSource.latest`; between two questions to the store, what was found last.

        Raises:
            BundleError: the store does not answer, or has no such version.
        """
        if self._last is None or time.monotonic() - self._asked >= self._every:
            try:
                self._last = self._ask()
            except Exception as error:  # of MLflow, its database or the network
                self._last = BundleError(
                    f"The tracking store {bare(self.tracking)} does not give {self.uri}: "
                    f"{_short(error, self.tracking)}"
                )
            self._asked = time.monotonic()
        if isinstance(self._last, BundleError):
            raise BundleError(str(self._last))  # a new one each time: tracebacks would pile up
        return self._last

    def _ask(self) -> tuple[str, Path]:
        if self._store is None:
            self._store = _open(self.tracking, self._timeout)
        token, place = self._store.version_of(self.name, self._version, self._alias)
        # One name for all that tells bundles apart; quote leaves no separator in it.
        folder = self._cache / f"{quote(self.name, safe='')}-{token}"
        if not (folder / "manifest.json").is_file():
            with atomic_folder(folder) as temporary:
                self._store.download(place, temporary)
            self._prune(folder)
        os.utime(folder)
        return token, folder

    def _prune(self, newest: Path) -> None:
        """Remove the bundles that were used longest ago; what is mapped into memory stays there."""
        pattern = f"{glob.escape(quote(self.name, safe=''))}-*-*"
        folders = [path for path in self._cache.glob(pattern) if path != newest]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in folders[KEPT - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)


def promote(
    name: str,
    version: str | int,
    alias: str = "champion",
    *,
    tracking: str = "",
    out: str | Path = "runs",
    timeout: float = 10.0,
) -> None:
    """Let an alias of a registered model name a version; services that watch it will swap.

    Raises:
        BundleError: the store does not answer, or has no such version.
    """
    uri = where(tracking, out)
    try:
        _open(uri, timeout).set_alias(name, str(version), alias)
    except Exception as error:
        raise BundleError(
            f"The tracking store {bare(uri)} does not make {name}/{version} {alias}: "
            f"{_short(error, uri)}"
        ) from None


def _open(uri: str, timeout: float) -> Store:
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise BundleError(
            f"There is no database {database}. Say where the store is with MLFLOW_TRACKING_URI."
        )
    return Store(uri, timeout)


def _short(error: Exception, uri: str) -> str:
    """What an error says, in a line and without the store's password."""
    text = " ".join(str(error).replace(uri, bare(uri)).split()) or type(error).__name__
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return text if len(text) <= 300 else f"{text[:300]} …"
