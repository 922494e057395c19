"""A commented TOML file in the making."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONG = 300
"""Characters of a comment; what is longer is cut."""


@dataclass
class Draft:
    """Lines of a TOML file, what was guessed, and what is missing.

    Attributes:
        guessed: dotted key, value as TOML, why.
        missing: a sentence for each key that has to be filled in.
    """

    lines: list[str] = field(default_factory=list)
    guessed: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    folder: Path = Path()
    _section: str = ""

    def say(self, text: str) -> None:
        """A comment."""
        self.lines.append(f"# {comment(text)}")

    def section(self, name: str) -> None:
        self._section = name
        self.lines += ["", f"[{name}]"]

    def set(self, key: str, value: Any, why: str = "") -> None:
        """A line, which is told among the guesses."""
        self.lines.append(f"{key} = {toml(value)}" + (f"  # {comment(why)}" if why else ""))
        self.guessed.append((f"{self._section}.{key}".lstrip("."), toml(value), comment(why)))

    def path(self, key: str, value: str, why: str = "") -> None:
        """A path, written relative to the folder of the run file."""
        plain = Path(value).expanduser()
        if not plain.is_absolute():
            value = os.path.relpath(plain, self.folder)
        self.set(key, value, why)

    def offer(self, key: str, value: Any, why: str = "") -> None:
        """A line that is switched off."""
        self.lines.append(f"# {key} = {toml(value)}" + (f"  # {comment(why)}" if why else ""))

    def column(self, key: str, found: str | None, what: str) -> None:
        """The column of a key, or a gap to be filled."""
        if found:
            self.set(key, found)
            return
        self.missing.append(f"{self._section}.{key}: no column looks like {what}")
        gap = f"MISSING: no column looks like {what}. Write its name here"
        self.lines.append(f"{key} = {toml(key)}  # {gap}")

    def text(self) -> str:
        return "\n".join(self.lines).strip() + "\n"


def comment(text: str) -> str:
    """A text that may stand in a comment: one line, and not a long one."""
    text = re.sub(r"\s+|[\x00-\x1f\x7f]", " ", text)
    return text if len(text) <= LONG else text[: LONG - 2] + " …"


def short(text: str) -> str:
    """The beginning of a text, as long as a line can take."""
    return text if len(text) <= 80 else f"{text[:78].rpartition(' ')[0]} …"


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
