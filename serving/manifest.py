"""Manifest of a bundle: versions, digests, and their check."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recsys.errors import BundleError, DataError
from recsys.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json

FORMAT = "recsys-bundle"
FORMAT_VERSION = 3
LIBRARIES = ("torch", "sentence-transformers", "tokenizers", "hnswlib", "polars", "numpy")
MANIFEST = "manifest.json"
FIRST = ("index.bin", "vectors.safetensors")
"""Large files of a bundle in the order in which they are read."""
THREADS = 4
"""Files whose digests are made at once."""
SMALL = 1 << 20
"""Bytes from which on a file is mapped for its digest."""


def write_manifest(folder: Path, said: dict[str, Any]) -> None:
    """Write what is said, with the digests of all files that stand in the folder and its own."""
    files = digests(folder)
    manifest = {
        **said,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "files": files,
        "content": sha256_bytes(*(f"{name}={files[name]}".encode() for name in sorted(files))),
    }
    # As it will be read back: tuples are lists then.
    manifest = json.loads(canonical_json(manifest))
    write_json(folder / MANIFEST, {**manifest, "self": _own_digest(manifest)})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What a bundle says of itself, without loading or checking the rest.

    Raises:
        BundleError: there is no manifest, or not one of a bundle of this version.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}. Train one: recsys train.")
    try:
        manifest = read_json(file)
    except DataError as error:
        raise BundleError(f"{error} The bundle is damaged; make it again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(
            f"{file} has the format {found!r}, not {FORMAT!r}. Name a bundle's folder, as "
            "`recsys train` prints it."
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('format_version')}; this recsys reads "
            f"{FORMAT_VERSION}. Train again, or install the recsys that wrote it."
        )
    return manifest


def check(path: Path, manifest: dict[str, Any]) -> None:
    """Compare every digest of the manifest, its own included, with what stands in the folder.

    Raises:
        BundleError: a file is missing or changed; both digests are named.
    """
    with Check(path, manifest) as checked:
        checked.wait()


def begin(path: str | Path, *, trusted: bool = False) -> Check:
    """Begin to compare the digests of a bundle with its manifest.

    Args:
        path: its folder.
        trusted: compare nothing, as when it was done a moment ago.

    Raises:
        BundleError: no bundle, or one that lacks a file or whose manifest was changed.
    """
    return Check(Path(path), read_manifest(path), FIRST, trusted=trusted)


class Check:
    """Compares the digests of a bundle's files in threads, while its first parts are read.

    A part may be used as soon as `wait` has returned for its files. Small files come first, then
    those that are wanted first, then the others, the largest last.

    Args:
        path: the bundle's folder.
        manifest: what it says.
        first: large files in the order in which they are wanted.
        trusted: compare nothing, as when it was done a moment ago.

    Raises:
        BundleError: the manifest was changed.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        first: Iterable[str] = (),
        *,
        trusted: bool = False,
    ) -> None:
        self.path, self.manifest = path, manifest
        self._files = manifest.get("files", {})
        self._waiting: dict[str, Future[str]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self.trusted = trusted
        if trusted:
            return
        own = _own_digest(manifest)
        if manifest.get("self") != own:
            raise BundleError(
                f"{path / MANIFEST} has the SHA-256 {own[:12]}…, but says "
                f"{str(manifest.get('self'))[:12]}… of itself. It was changed; copy the bundle "
                "again."
            )
        wanted = {name: place for place, name in enumerate(first)}
        turn: dict[str, tuple[bool, int, int]] = {}
        for name in self._files:
            if not (path / name).is_file():
                raise BundleError(f"The bundle {path} lacks {name}. Copy it again as a whole.")
            size = (path / name).stat().st_size
            turn[name] = size >= SMALL, wanted.get(name, len(wanted)), size
        self._pool = _pool()
        for name in sorted(turn, key=turn.__getitem__):
            self._waiting[name] = self._pool.submit(_digest, path / name)

    def wait(self, *names: str) -> None:
        """Until the named files, or all of them, are known to be whole.

        Raises:
            BundleError: one was changed; both digests are named.
        """
        for name in names or tuple(self._waiting):
            if name not in self._waiting:
                continue  # compared already, or no part of this bundle
            found, digest = self._waiting[name].result(), self._files[name]
            if found != digest:
                raise BundleError(
                    f"{self.path / name} has the SHA-256 {found[:12]}…, but the manifest says "
                    f"{digest[:12]}…. The file was damaged or replaced; copy or make the bundle "
                    "again."
                )
            del self._waiting[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what was not compared yet is not."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _threads() -> int:
    """Threads for digests: one core is left to what goes on meanwhile, such as imports."""
    return max(1, min(THREADS, (os.cpu_count() or 1) - 1))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "digest")


def _digest(file: Path) -> str:
    """Hex SHA-256 of a file.

    A large one is mapped and read in one go: block by block, every block would wait for whatever
    else holds the interpreter meanwhile, such as native code that reads an index.
    """
    if file.stat().st_size < SMALL:
        return sha256_file(file)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()


def may_replace(path: Path) -> bool:
    """Whether an earlier bundle, whole or damaged, or nothing stands there."""
    if not path.is_dir():
        return False
    manifest = path / MANIFEST
    if manifest.is_file():
        return f'"{FORMAT}"' in manifest.read_text("utf-8", "replace")
    return not any(path.iterdir())


def _own_digest(manifest: dict[str, Any]) -> str:
    """Digest of all that the manifest says but this digest."""
    said = {name: value for name, value in manifest.items() if name != "self"}
    return sha256_bytes(canonical_json(said).encode())


def digests(folder: Path) -> dict[str, str]:
    """File → SHA-256 of everything below the folder but its manifest."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / MANIFEST]
    with _pool() as pool:
        return {
            file.relative_to(folder).as_posix(): digest
            for file, digest in zip(files, pool.map(_digest, files), strict=True)
        }
