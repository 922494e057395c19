"""Model sources: the protocol, and a watched folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from recsys.errors import BundleError
from recsys.serving.manifest import MANIFEST, read_manifest

CURRENT = "CURRENT"


class ModelSource(Protocol):
    """Something that names the model which should answer.

    Any method of an object that is asked every second, so cheap where nothing changed. It may
    raise whatever it likes: the model that answers goes on.
    """

    def latest(self) -> tuple[str, Path]:
        """A token and a bundle's folder; a new token means a new model."""
        ...


class FolderSource:
    """A bundle's folder, or a folder whose file CURRENT names the bundle in it.

    Args:
        path: of either; which one it is may change while it is watched.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[object, tuple[str, Path]] | None = None

    def latest(self) -> tuple[str, Path]:
        """See `ModelSource.latest`; one `stat` where nothing changed.

        Raises:
            BundleError: there is neither, or CURRENT is empty or names nothing in this folder.
        """
        for name in (CURRENT, MANIFEST):
            try:
                stat = (self.path / name).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            mark = (name, stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if self._seen is None or self._seen[0] != mark:
                # Remembered only when it could be read: a pointer half-written is read again.
                found = self._pointed() if name == CURRENT else self._bundle()
                self._seen = mark, found
            return self._seen[1]
        raise BundleError(
            f"{self.path} is neither a bundle nor a folder with {CURRENT}. Name what "
            "`recsys train` or `recsys publish` printed."
        )

    def _pointed(self) -> tuple[str, Path]:
        file = self.path / CURRENT
        try:
            said = file.read_text("utf-8").strip()
        except UnicodeDecodeError:
            said = ""
        target = Path(said)
        if not said or "\n" in said or target.is_absolute() or ".." in target.parts:
            raise BundleError(
                f"{file} says {said[:100]!r}, which is no folder below {self.path}. Publish again: "
                "recsys publish."
            )
        if not (self.path / target / MANIFEST).is_file():
            raise BundleError(
                f"{file} names {said}, but no bundle is there. Publish again, or roll back: "
                "recsys rollback."
            )
        return said, self.path / target

    def _bundle(self) -> tuple[str, Path]:
        manifest = read_manifest(self.path)
        return str(manifest.get("self") or manifest.get("content")), self.path
