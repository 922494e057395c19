"""Lines of a commented TOML file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

LONG = 300
"""Characters of a comment; what is longer is cut."""


@dataclass
class Draft:
    """Lines of a TOML file, and what was found."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A comment."""
        self.lines.append(f"# {comment(text)}")

    def section(self, name: str) -> None:
        self.lines += ["", f"[{name}]"]

    def set(self, key: str, value: Any, why: str = "") -> None:
        self.lines.append(f"{key} = {toml(value)}" + (f"  # {comment(why)}" if why else ""))

    def offer(self, key: str, value: Any, why: str = "") -> None:
        """A line that is switched off."""
        self.set(f"# {key}", value, why)

    def column(self, key: str, found: str | None, what: str) -> None:
        """The column of a key, or a gap to be filled."""
        gap = "" if found else f"MISSING: no column looks like {what}. Write its name here"
        self.set(key, found or key, gap)

    def text(self) -> str:
        return "\n".join(self.lines).strip() + "\n"


def comment(text: str) -> str:
    """A text that may stand in a comment: one line, and not a long one."""
    text = re.sub(r"\s+|[\x00-\x1f\x7f]", " ", text)
    return text if len(text) <= LONG else text[: LONG - 2] + " …"


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
