"""API keys: salted hashes compared in constant time.

A key is 32 random bytes, so a fast hash is enough: there is nothing to guess. A file of keys has
one line a key, `ROLE sha256 SALT HASH`; several of a role are valid at once, so that a new key can
be given out before the old one is taken out. A running service reads its file again when it
changes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISFIFO
from typing import Literal

from recsys.errors import ConfigError

log = logging.getLogger("recsys.serve")

Role = Literal["read", "write"]
ROLES: tuple[Role, ...] = ("read", "write")
PREFIX = "rk_"
MOST = 16
"""Every key is compared at every request."""
LONGEST = 256


@dataclass(frozen=True)
class Hashed:
    """What is kept of a key."""

    role: Role
    salt: bytes
    digest: bytes

    def line(self) -> str:
        """As it stands in a file of keys."""
        return f"{self.role} sha256 {self.salt.hex()} {self.digest.hex()}"


@dataclass
class Keys:
    """Who may do what.

    Args:
        hashed: the keys that are valid; none: reading is free. Replaced as a whole.
        open_writes: without keys: whether writing is free too.

    A write key may read too.
    """

    hashed: tuple[Hashed, ...] = ()
    open_writes: bool = False

    @property
    def needed(self) -> bool:
        """Whether a key must be sent."""
        return bool(self.hashed)

    def find(self, key: bytes | None) -> Hashed | None:
        """What is kept of a key, with the strongest role it has; None: it is not valid."""
        if key is None or len(key) > LONGEST:
            return None
        found: Hashed | None = None
        for one in self.hashed:  # all of them, whatever the first says: time tells nothing
            same = hmac.compare_digest(_digest(one.salt, key), one.digest)
            if same and (found is None or found.role != "write"):
                found = one
        return found

    def role(self, key: bytes | None) -> Role | None:
        """The strongest role of a key; None: it is not valid."""
        found = self.find(key)
        return None if found is None else found.role

    @staticmethod
    def parse(text: str, name: str = "the keys") -> Keys:
        """Keys from the lines of a file.

        Raises:
            ConfigError: a line is none; its number is named, never what stands there.
        """
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.split("#", 1)[0].strip()
            if line:
                found.append(_parsed(line.split(), f"Line {number} of {name}"))
        if len(found) > MOST:
            raise ConfigError(f"{name} has {len(found)} keys; at most {MOST}. Take old ones out.")
        if not found:
            raise ConfigError(f"{name} has no key. Make one: recsys serve --make-key read")
        return Keys(tuple(found))

    @staticmethod
    def load(path: str | Path) -> Keys:
        """Keys from a file.

        Raises:
            ConfigError: it is missing, or a line is no key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The file of keys {path} cannot be read: {error}.") from None
        return Keys.parse(text, str(path))


class KeyFile(Keys):
    """The keys of a file, read again when it changes.

    A thread of its own looks, so that a key taken out of the file is refused within `every` seconds
    even while a large model is being loaded. A file that cannot be read changes nothing: the keys
    that were valid stay valid, and the log and `facts` say so.

    Write the file aside and rename it: of one that is written in place, a look may find a half. A
    pipe is read once, for its keys cannot be read again.

    Args:
        path: of the file.
        every: seconds between two looks.

    Raises:
        ConfigError: the file cannot be read to begin with.
    """

    def __init__(self, path: str | Path, every: float = 1.0) -> None:
        super().__init__(Keys.load(path).hashed)
        self.path, self.every = Path(path), every
        self._mark: object = None
        self._broken, self._reads, self._failures = False, 0, 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Read the file if it is another one than at the last look."""
        try:
            stat = os.stat(self.path)
            if S_ISFIFO(stat.st_mode):
                return  # a pipe gives its keys once
            mark: object = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        except OSError as error:
            mark = error.errno  # said once, as anything else about the file
        if mark == self._mark:
            return
        first, self._mark = self._mark is None, mark
        try:
            hashed = Keys.load(self.path).hashed
        except ConfigError as error:
            self._broken, self._failures = True, self._failures + 1
            log.error("The keys that were valid stay valid: %s", error)
            return
        changed, self.hashed = hashed != self.hashed, hashed
        self._broken, self._reads = False, self._reads + 1
        if changed or not first:
            log.warning("The keys were read again: %d are valid.", len(hashed))

    def watch(self) -> None:
        """Look now and then, until `stop`."""
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def facts(self) -> dict[str, int]:
        """Counts for metrics: valid keys, whether the file cannot be read, reads and failures."""
        return {
            "valid": len(self.hashed),
            "broken": int(self._broken),
            "reads": self._reads,
            "failures": self._failures,
        }

    def _run(self) -> None:
        while True:
            self.look()
            if self._stop.wait(self.every):
                return


def make_key(role: str) -> tuple[str, Hashed]:
    """A new key, and what to keep of it."""
    if role not in ROLES:
        raise ConfigError(f"{role!r} is no role of a key; take read or write.")
    key = PREFIX + secrets.token_urlsafe(32)
    salt = secrets.token_bytes(16)
    return key, Hashed(role, salt, _digest(salt, key.encode()))


def given(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request: `Authorization: Bearer KEY`, or `X-API-Key: KEY`."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value
    return None


def _digest(salt: bytes, key: bytes) -> bytes:
    return hashlib.sha256(salt + key).digest()


def _parsed(words: list[str], place: str) -> Hashed:
    if len(words) == 4 and words[0] in ROLES and words[1] == "sha256":
        try:
            salt, digest = bytes.fromhex(words[2]), bytes.fromhex(words[3])
        except ValueError:
            salt = digest = b""
        if len(salt) >= 16 and len(digest) == 32:
            return Hashed(words[0], salt, digest)
    raise ConfigError(
        f"{place} is no hash of a key: `read|write sha256 SALT HASH`. "
        "Make one: recsys serve --make-key read"
    )
