"""Every key of a run file with its meaning, default and range, read from the checked sections.

`recsys keys` prints them; `recsys keys --markdown > docs/CONFIG.md` writes the page.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from recsys.errors import ConfigError, nearest
from recsys.experiments import toml
from recsys.experiments.config import RunConfig

WIDTH = 100
"""Columns of what is printed."""


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        section: dotted, empty at the top level.
        name: within the section.
        kinds: the kinds of the section that have it; empty where the section has no kinds.
        default: as TOML; None: it has to be given.
        range: what it may be, in words.
        meaning: a sentence or more.
    """

    section: str
    name: str
    kinds: tuple[str, ...]
    default: str | None
    range: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A section: its dotted name, what it is for, and its keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def sections() -> list[Section]:
    """Every section of a run file, the top level first."""
    return list(_sections("", [RunConfig], RunConfig))


def section(name: str) -> list[Section]:
    """The section of a name, and those inside it.

    Raises:
        ConfigError: there is none of that name.
    """
    known = sections()
    wanted = [one for one in known if one.name == name or one.name.startswith(f"{name}.")]
    if not wanted:
        names = [one.name for one in known if one.name]
        raise ConfigError(f"A run file has no section {name!r}. {nearest(name, names)}")
    return wanted


def _sections(
    name: str, models: Sequence[type[BaseModel]], default: type[BaseModel]
) -> Iterator[Section]:
    """A section and those inside it; `models` has one class a kind, `default` the usual one."""
    others = len(models) > 1
    keys: dict[str, Key] = {}
    inside: list[tuple[str, FieldInfo]] = []
    for one in models:
        meanings = _meanings(one)
        for field_name, field in one.model_fields.items():
            if toml.models_in(field.annotation):
                inside.append((field_name, field))
                continue
            kinds: tuple[str, ...] = ()
            if others and field_name != "kind":
                kinds = (toml.kind_of(one),)
            key = Key(name, field_name, kinds, _default(field), _range(field), meanings[field_name])
            if field_name == "kind" and others:
                key = _kind(key, models, default)
            elif (old := keys.get(field_name)) is not None:
                key = replace(old, kinds=(*old.kinds, *kinds))
            keys[field_name] = key
    yield Section(name, _about(models), tuple(keys.values()))
    for field_name, field in inside:
        models = toml.models_in(field.annotation)
        usual = models[0]
        if not field.is_required():
            usual = type(field.get_default(call_default_factory=True))
        yield from _sections(f"{name}.{field_name}".lstrip("."), models, usual)


def _kind(key: Key, models: Sequence[type[BaseModel]], default: type[BaseModel]) -> Key:
    """The key `kind` of a section whose kinds are classes: each with what its class says."""
    meanings = [f"{toml.kind_of(one)}: {_doc(one).partition(': ')[2]}" for one in models]
    return replace(
        key,
        default=json.dumps(toml.kind_of(default)),
        range=" | ".join(json.dumps(toml.kind_of(one)) for one in models),
        meaning=" ".join(meanings),
    )


def _doc(model: type[BaseModel]) -> str:
    """What a section says of itself, without its errors, in one line."""
    return re.sub(r"\s+", " ", (inspect.getdoc(model) or "").partition("\n\nRaises:")[0])


def _about(models: Sequence[type[BaseModel]]) -> str:
    return "" if len(models) > 1 else re.sub(r"^\[[\w.]+\]:?\s*", "", _doc(models[0]))


@cache
def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each field of a class, and of those it inherits from."""
    meanings: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base.__module__.startswith("recsys")):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, below in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = ""
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    text = re.sub(r"\s+", " ", str(below.value.value)).strip()
                meanings[line.target.id] = text
    return meanings


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if value is None:
        return '""'
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {json.dumps(one)}" for key, one in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


_WORDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true | false",
    "string": "text",
}
_BOUNDS = {
    "minimum": "at least {}", "exclusiveMinimum": "more than {}", "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}  # fmt: skip


def _range(field: FieldInfo) -> str:
    """What a key may be, from the JSON schema of its type."""
    annotation: Any = field.annotation
    for part in field.metadata:
        annotation = Annotated[annotation, part]
    return _words(TypeAdapter(annotation).json_schema())


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(_words, schema["anyOf"])))
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type")
    if kind == "null":
        return '""'
    if kind == "array":
        inner = schema.get("items")
        if inner:
            return f"list of {_words(inner)}"
        return f"list of {len(schema['prefixItems'])} {_words(schema['prefixItems'][0])}".replace(
            "number", "numbers", 1
        )
    if kind == "object":
        return f"table of name = {_words(schema['additionalProperties'])}"
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([_WORDS[kind or "string"], *bounds])


def text(wanted: list[Section]) -> str:
    """Sections as they are printed on a terminal."""
    lines = []
    for one in wanted:
        lines += [f"[{one.name}]" if one.name else "Top level", ""]
        for key in one.keys:
            start = f"  {key.name} = {key.default}" if key.default else f"  {key.name}"
            kinds = f" (kind = {' | '.join(key.kinds)})" if key.kinds else ""
            lines.append(f"{start}{kinds}")
            given = "" if key.default else "Has to be given. "
            for part in (f"{given}{key.range}.", key.meaning):
                lines += textwrap.wrap(part, WIDTH - 6, initial_indent="      ",
                                       subsequent_indent="      ")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """docs/CONFIG.md."""
    count = sum(len(one.keys) for one in sections())
    lines = [
        "# Every key of a run file", "",
        f"{count} keys. A run file needs only `[data]`; `recsys init LOG` writes one with what it",
        "found, and a key that is left out has the default below. `recsys keys SECTION` prints a",
        "section; `--set section.key=value` changes a key for one run. An empty text stands for",
        "nothing. Paths are relative to the folder of the run file.", "",
        "Written by `recsys keys --markdown`; a test holds it current.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n" + markdown(sections())


def markdown(listed: list[Section]) -> str:
    """Sections as Markdown, a table each."""
    lines = []
    for one in listed:
        lines += ["", f"## [{one.name}]" if one.name else "## Top level", ""]
        if one.meaning:
            lines += [one.meaning, ""]
        lines += ["| key | default | may be | meaning |", "|---|---|---|---|"]
        for key in one.keys:
            kinds = (
                f" Of kind {' or '.join(f'`{kind}`' for kind in key.kinds)}." if key.kinds else ""
            )
            default = "has to be given" if key.default is None else f"`{key.default}`"
            cells = (f"`{key.name}`", default, key.range, key.meaning + kinds)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
