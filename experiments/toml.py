"""Validated configurations as TOML: overrides, errors as sentences, writing.

TOML has no word for "nothing": an empty string stands for it wherever a key may be nothing.
Overrides are parsed as TOML, never evaluated.
"""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from recsys.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)


def read(
    model: type[Model],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    paths: Collection[str] = (),
) -> Model:
    """Read a checked value from a file.

    Args:
        model: what the file describes.
        path: a TOML file.
        overrides: `section.key=value`; the value is TOML, and a bare word is text.
        paths: dotted keys that hold paths: in the file they are relative to its folder, in an
            override to the current one.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or a value cannot be meant.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no run file {path}. `recsys init LOG --out {path}` writes one."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the run file in it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # The message of tomllib ends in (at line 3, column 7).
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    for key in paths:
        beside(values, key.split("."), path.parent)
    where = str(path)
    for override in overrides:
        _override(values, override)
        where = f"{path} with --set"
    return check(model, values, where)


def parse(model: type[Model], text: str, source: str) -> Model:
    """The inverse of `dump`; `source` names the text in errors.

    Raises:
        ConfigError: as in `read`.
    """
    try:
        return check(model, tomllib.loads(text), source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}.") from None


def dump(value: BaseModel) -> str:
    """TOML that gives the same value again, defaults written out."""
    import tomlkit

    return tomlkit.dumps(_without_none(value.model_dump(mode="json"), type(value)))


def check(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Make a checked value of parsed TOML; `source` names it in errors."""
    # Strict JSON: a list may be a tuple and text may be a date, but text is never a number.
    text = json.dumps(_with_none(values, model), default=_plain)
    try:
        return model.model_validate_json(text, strict=True)
    except ConfigError as error:
        # A check of ours, which says what is wrong but not where it was written.
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        raise ConfigError(_sentence(model, values, source, error)) from None


def beside(values: Any, key: Sequence[str], folder: Path) -> None:
    """Make the path of a key relative to the current folder, in place."""
    *sections, name = key
    for part in sections:
        values = values.get(part)
        if not isinstance(values, dict):
            return
    value = values.get(name)
    if isinstance(value, str):
        values[name] = _joined(folder, value)
    elif isinstance(value, list):
        values[name] = [_joined(folder, one) if isinstance(one, str) else one for one in value]


def _joined(folder: Path, path: str) -> str:
    return path if not path or "://" in path or path[0] == "~" else str(folder / path)


# --- overrides ------------------------------------------------------------------------------------


def _override(values: dict[str, Any], override: str) -> None:
    """Write one `section.key=value` into the parsed file, in place."""
    key, equals, text = override.partition("=")
    path = _path_of(key.strip()) if equals else []
    if not path:
        raise ConfigError(
            f"--set {override} is not of the form section.key=value, e.g. training.epochs=5."
        )
    place: Any = values
    for depth, part in enumerate(path[:-1]):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"--set {override} writes into {'.'.join(path[: depth + 1])}, which is the value "
                f"{_shown(place)} and not a section."
            )
    place[path[-1]] = _value_of(text.strip(), override)


def _path_of(key: str) -> list[str]:
    """The parts of a dotted TOML key; empty when it is none."""
    try:
        place: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return []
    parts = []
    while isinstance(place, dict):
        if len(place) != 1:
            return []
        part, place = next(iter(place.items()))
        parts.append(part)
    return parts


def _value_of(text: str, override: str) -> Any:
    """The TOML value of an override; what is not TOML is text, unless it starts like a value."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"The value of --set {override} is not TOML: {error}.") from None
    return text


# --- nothing, and what JSON does not know ---------------------------------------------------------


def _with_none(values: Any, model: type[BaseModel]) -> Any:
    """Turn an empty string into None wherever the key may be None."""
    if not isinstance(values, dict):
        return values
    out = {}
    for key, value in values.items():
        field = model.model_fields.get(key)
        inner = _model_of(field, value) if field else None
        if field and value == "" and _may_be_none(field.annotation):
            value = None
        elif inner and isinstance(value, list):
            value = [_with_none(entry, inner) for entry in value]
        elif inner:
            value = _with_none(value, inner)
        out[key] = value
    return out


def _without_none(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Leave out what is None by default, and write the other Nones as empty strings."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        field = model.model_fields[key]
        inner = _model_of(field, value)
        if value is None:
            if field.is_required() or field.get_default(call_default_factory=True) is not None:
                out[key] = ""
        elif inner and isinstance(value, list):
            out[key] = [_without_none(entry, inner) for entry in value]
        elif inner and isinstance(value, dict):
            out[key] = _without_none(value, inner)
        else:
            out[key] = value
    # A table swallows every plain key after it.
    return dict(sorted(out.items(), key=lambda entry: isinstance(entry[1], dict)))


def _parts(annotation: Any) -> Iterator[Any]:
    """The annotation and what it is a union, tuple or list of."""
    yield annotation
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        for part in typing.get_args(annotation):
            yield from _parts(part)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The class of a section, or one for each of its kinds; none where it is a plain key."""
    return [p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, BaseModel)]


def _model_of(field: FieldInfo, value: Any) -> type[BaseModel] | None:
    """The class of a section; of one with kinds, that of the kind which the value names."""
    models = models_in(field.annotation)
    if len(models) > 1 and not field.is_required():
        kind = value.get("kind") if isinstance(value, dict) else None
        default = type(field.get_default(call_default_factory=True))
        return next((m for m in models if m.model_fields["kind"].default == kind), default)
    return models[0] if models else None


def kind_of(model: type[BaseModel]) -> str:
    """The kind that a class of a section stands for."""
    return str(model.model_fields["kind"].default)


def _may_be_none(annotation: Any) -> bool:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return union and type(None) in typing.get_args(annotation)


def _plain(value: Any) -> str:
    """Dates and times of TOML as text."""
    return str(value.isoformat())


# --- errors as sentences --------------------------------------------------------------------------


def _sentence(
    model: type[BaseModel], values: dict[str, Any], source: str, error: ValidationError
) -> str:
    """What is wrong with the first bad key, and how many more there are."""
    # A union gives one error for each of its types: one sentence a key.
    problems: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_key(values, problem), []).append(problem)
    # Unknown keys first: a misspelt key is why another is missing.
    unknown = [key for key, of in problems.items() if of[0]["type"] == "extra_forbidden"]
    key = unknown[0] if unknown else next(iter(problems))
    first, *_ = problems[key]
    kind = first["type"]
    if kind == "extra_forbidden":
        text = _unknown(model, values, source, key)
    elif kind == "missing":
        text = f"{source} has no {_named(key)}, and there is no default for it. Give it."
    elif kind == "value_error":
        # The message of a check of ours: a sentence already.
        reason = str(first["ctx"]["error"]).rstrip(".")
        text = f"{_named(key)} in {source}: {reason}." if key else f"{source}: {reason}."
    else:
        allowed = " or ".join(dict.fromkeys(_allowed(problem) for problem in problems[key]))
        text = f"{_named(key)} in {source} is {_shown(_at(values, key))}, but must be {allowed}."
    more = len(problems) - 1
    return text + (f" ({more} more {'key is' if more == 1 else 'keys are'} wrong.)" if more else "")


def _key(values: Any, problem: Any) -> tuple[str, ...]:
    """The parts of a pydantic location that are keys of the file, not members of a union."""
    parts: list[str] = []
    for depth, part in enumerate(problem["loc"], start=1):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            # The name of a union's member, or of the key that is missing.
            if problem["type"] != "missing" or depth < len(problem["loc"]):
                continue
        parts.append(str(part))
    return tuple(parts)


def _at(values: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def _named(key: tuple[str, ...]) -> str:
    """`epochs in [training]`, as it stands in the file."""
    if len(key) < 2:
        return "".join(key) or "The file"
    return f"[{'.'.join(key[:-1])}] {key[-1]}"


def _unknown(model: type[BaseModel], values: Any, source: str, key: tuple[str, ...]) -> str:
    """Name the nearest key of the section, or the section that has the key."""
    *section, name = key
    inside: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in section:
        values = values.get(part, {}) if isinstance(values, dict) else {}
        if inside and part in inside.model_fields:
            field = inside.model_fields[part]
            inside = _model_of(field, values)
    place = f"[{'.'.join(section)}]" if section else "the top level"
    start = f"{source} has the unknown key {name!r} in {place}."
    others = models_in(field.annotation) if field and inside else []
    having = [kind_of(other) for other in others if name in other.model_fields]
    if len(others) > 1 and inside:
        start = (
            f'{source} has the key {name!r} in {place}, but kind = "{kind_of(inside)}" has no '
            "such key."
        )
        if having:
            kinds = " or ".join(f'"{kind}"' for kind in having)
            return f"{start} Set kind to {kinds}, or leave {name} out."
    elsewhere = [other for other in _sections(model) if other[-1] == name and other != key]
    fields = inside.model_fields if inside else {}
    hint = nearest(name, fields)
    if elsewhere and not hint.startswith("Did you mean"):
        return f"{start} Did you mean {_named(elsewhere[0])}?"
    return f"{start} {hint}"


def _sections(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the configuration with the sections above it."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for inner in models_in(field.annotation):
            yield from _sections(inner, (*above, name))


_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text in quotes (on the command line: \"'text'\")",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "none_required": "empty",
    "finite_number": "a finite number",
    "is_instance_of": "a frame (from Python)",
}


def _allowed(problem: Any) -> str:
    """What a key may be, from pydantic's kind of problem."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "union_tag_invalid":
        return f"a section of the kind {' or '.join(context['expected_tags'].split(', '))}"
    signs = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
        "multiple_of": ("a multiple of", "multiple_of"),
    }
    if kind in signs:
        word, bound = signs[kind]
        return f"{word} {context[bound]}"
    if kind == "string_pattern_mismatch":
        return f"of the form {context['pattern']}"
    return str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value should be ")


def _shown(value: Any) -> str:
    """A value as TOML would show it, cut when long."""
    text = json.dumps(value, default=_plain, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
