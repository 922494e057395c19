"""Publish bundles under a folder that a service watches.

    FOLDER/CURRENT              "versions/3f9c51…", the one to serve
    FOLDER/HISTORY              versions in the order of publication, one a line
    FOLDER/versions/3f9c51…/    a bundle, named by the digest of its content

Every step is one rename, and CURRENT is the last: whoever is killed wherever leaves it naming a
whole bundle. One publisher works at a time; readers need no lock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from recsys.errors import BundleError
from recsys.files import atomic_write, sync
from recsys.serving.manifest import MANIFEST, check, read_manifest

CURRENT, HISTORY, VERSIONS = "CURRENT", "HISTORY", "versions"
LOCK = ".publish.lock"
HALF = ".half-"
"""Begins the name of a folder that is being written or removed."""
DIGITS = 12
"""Of the content digest that name a version."""
PATIENCE = 600.0
"""Seconds that a publisher waits for another one."""


@dataclass(frozen=True)
class Version:
    """A published bundle.

    Args:
        name: the first digits of its content digest.
        path: its folder.
        current: whether CURRENT names it.
    """

    name: str
    path: Path
    current: bool


def publish(bundle: str | Path, folder: str | Path, *, keep: int = 3, link: bool = True) -> Path:
    """Put a bundle into the folder and name it CURRENT.

    Args:
        bundle: a bundle's folder. Its files are compared with their digests first.
        folder: made where there is none.
        keep: published bundles that stay, at least 2: this one and the one before it. Older ones
            are removed; who has one open may go on reading.
        link: hard links instead of copies where the disk allows it: publishing takes no room and
            no time, but whoever then writes into the bundle's files in place (nothing here does)
            writes into the published ones.

    Returns:
        The published bundle's folder.

    Raises:
        BundleError: no whole bundle stands there, or another publisher does not finish.
    """
    folder = Path(folder)
    bundle = Path(bundle)
    name = str(read_manifest(bundle)["content"])[:DIGITS]
    target = folder / VERSIONS / name
    with _alone(folder):
        _sweep(folder)
        if not _whole(target):
            _copy(bundle, target, link)
        now = _named(folder)
        history = _history(folder)
        if now in history:  # what was rolled back is not what came before
            history = history[: history.index(now) + 1]
        history = [*(one for one in history if one != name), name]
        _write(folder / HISTORY, "\n".join(history))
        _write(folder / CURRENT, f"{VERSIONS}/{name}")
        _prune(folder, history, max(2, keep))
    return target


def current(folder: str | Path) -> Path:
    """The folder of the bundle to serve.

    Raises:
        BundleError: nothing was published there.
    """
    folder = Path(folder)
    name = _named(folder)
    if name is None:
        raise BundleError(
            f"{folder} has no {CURRENT}: nothing was published there. Publish a bundle: "
            f"recsys publish BUNDLE {folder}"
        )
    return folder / VERSIONS / name


def rollback(folder: str | Path) -> Path:
    """Name the bundle before the current one CURRENT again.

    Twice in a row goes back two; the next publication forgets what was rolled back.

    Returns:
        The folder of what is current now.

    Raises:
        BundleError: there is none before it, or it is not whole.
    """
    folder = Path(folder)
    current(folder)
    with _alone(folder):
        now, history = _named(folder), _history(folder)
        before = history[: history.index(now)] if now in history else []
        before = [name for name in before if (folder / VERSIONS / name / MANIFEST).is_file()]
        if not before:
            raise BundleError(
                f"There is no bundle before {now} in {folder}. Publish the one you want: "
                f"recsys publish BUNDLE {folder}"
            )
        target = folder / VERSIONS / before[-1]
        check(target, read_manifest(target))
        _write(folder / CURRENT, f"{VERSIONS}/{before[-1]}")
    return target


def versions(folder: str | Path) -> list[Version]:
    """Published bundles, the latest publication first."""
    folder = Path(folder)
    now = _named(folder)
    return [
        Version(name, folder / VERSIONS / name, name == now)
        for name in _in_order(folder, _history(folder))
    ]


def _in_order(folder: Path, history: list[str]) -> list[str]:
    """Names of the bundles there are, latest first; those without a history last."""
    there = {
        path.name: path.stat().st_mtime_ns
        for path in (folder / VERSIONS).glob("*")
        if not path.name.startswith(".")
    }
    known = [name for name in reversed(history) if name in there]
    others = sorted(set(there) - set(known), key=lambda name: -there[name])
    return known + others


def _named(folder: Path) -> str | None:
    file = folder / CURRENT
    if not file.is_file():
        return None
    return Path(file.read_text("utf-8").strip()).name


def _history(folder: Path) -> list[str]:
    file = folder / HISTORY
    return file.read_text("utf-8").split() if file.is_file() else []


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back when its holder dies."""
    (folder / VERSIONS).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=PATIENCE):
            yield
    except Timeout:
        raise BundleError(
            f"Another publisher has held {folder / LOCK} for {PATIENCE:.0f} s. See what it is "
            "waiting for, and publish again."
        ) from None


def _sweep(folder: Path) -> None:
    """Remove what killed publishers left; nobody else works while the lock is held."""
    for path in (folder / VERSIONS).glob(f"{HALF}*"):
        shutil.rmtree(path)
    for name in (CURRENT, HISTORY):
        for path in folder.glob(f".{name}.*"):
            path.unlink()


def _whole(path: Path) -> bool:
    """Whether the bundle stands there as it was published."""
    if not path.exists():
        return False
    try:
        check(path, read_manifest(path))
    except BundleError:
        return False
    return True


def _copy(bundle: Path, target: Path, link: bool) -> None:
    """A verified copy of the bundle under its final name."""
    half = Path(tempfile.mkdtemp(prefix=HALF, dir=target.parent))
    os.chmod(half, bundle.stat().st_mode)
    for file in sorted(bundle.rglob("*")):
        place = half / file.relative_to(bundle)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        elif not (link and _linked(file, place)):
            shutil.copyfile(file, place)
            shutil.copymode(file, place)
    check(half, read_manifest(half))  # of the copy: it is what will be served
    for path in (*half.rglob("*"), half):
        sync(path)
    if target.exists():  # damaged since
        os.rename(target, target.parent / f"{HALF}{target.name}")
    os.rename(half, target)
    sync(target.parent)


def _linked(file: Path, place: Path) -> bool:
    try:
        os.link(os.path.realpath(file), place)
    except OSError:  # another disk, too many links, or a file system without them
        return False
    return True


def _prune(folder: Path, history: list[str], keep: int) -> None:
    """Remove all but the latest; under another name first, so that none is ever half there."""
    for name in _in_order(folder, history)[keep:]:
        gone = folder / VERSIONS / f"{HALF}{name}"
        os.rename(folder / VERSIONS / name, gone)
        shutil.rmtree(gone)
