"""`recsys init`: infer a run file from the first rows of a log and its item table.

Only the first rows are looked at, but for event names, which are counted over the whole log.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from recsys.experiments.keys import sections
from recsys.features.readers import aliases as names
from recsys.features.readers import ebnerd, mind
from recsys.features.readers.files import expand, first_line, form, open_file, reading
from recsys.features.readers.read import scan
from recsys.features.readers.sequences import HEADERS
from recsys.features.readers.times import clock, unit_of
from recsys.tables import SECOND, Schema

LOOK = 5_000
"""Rows that are looked at."""
MANY_NAMES = 40
"""A column with more different values than this does not hold event names."""
LONG = 300
"""Characters of a comment; what is longer is cut."""


def guess(
    log_path: str | Path, items_path: str | Path | None = None, folder: str | Path = "."
) -> Draft:
    """A commented run file for a log and its item table.

    Args:
        log_path: file, glob or folder, as `data.log` takes it.
        items_path: the item table.
        folder: of the run file, to which paths in it are relative.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    draft = Draft(folder=Path(folder))
    draft.say("Written by `recsys init` from a look at the files: mend what was guessed wrong.")
    draft.say("A line that is switched off shows the value that is used.")
    log, items = str(log_path), None if items_path is None else str(items_path)
    draft.set("name", _name(log), "of the run's folder and its MLflow run")
    draft.section("data")
    public = _public(Path(log).expanduser())
    if public is not None:
        kind = _write_public(draft, public, log, items)
    elif _is_lines(log):
        kind = _write_lines(draft, log, items)
    else:
        kind = _write_table(draft, log, items)
    draft.section("split")
    reasons = {
        "time": "by global time: what is later than a cut-off is the test",
        "leave_one_out": "there is no clock: the last item of each user is the test",
        "given": "the files are split already",
    }
    draft.offer("kind", kind, f'{reasons[kind]}; "auto" comes to the same')
    if kind == "time":
        draft.offer("test", 0.1, 'a share of the positives, or the last days: "7d", or an ISO time')
        draft.offer("valid", 0.1)
    _offer_rest(draft)
    return draft


def _name(log: str) -> str:
    """A run's name after its log: the file, or the folder."""
    path = Path(log).expanduser()
    stem = path.name.partition(".")[0] if not path.is_dir() else path.resolve().name
    return re.sub(r"[^\w.-]+", "_", stem).strip("_.-")[:100] or "run"


def _offer_rest(draft: Draft) -> None:
    """Every other key, switched off, at the value that is used."""
    for one in sections():
        if not one.name or one.name.split(".")[0] in ("data", "split"):
            continue
        draft.section(one.name)
        kind = next((key.default for key in one.keys if key.name == "kind"), None) or ""
        for key in one.keys:
            if key.default is None or (key.kinds and kind.strip('"') not in key.kinds):
                continue
            meaning = key.range if key.name == "kind" else key.meaning.partition(". ")[0]
            draft.lines.append(f"# {key.name} = {key.default}  # {short(meaning)}")


# ---------------------------------------------------------------- public formats


def _public(path: Path) -> str | None:
    """The public format that the names of files and columns betray."""
    marks = {
        "ebnerd": ("behaviors.parquet",),
        "mind": ("behaviors.tsv",),
        "movielens": ("ratings.csv", "ratings.dat", "u.data"),
        "lightgcn": ("train.txt",),
    }
    if path.is_dir():
        for name, files in marks.items():
            if any((path / file).is_file() for file in files):
                return name
    file = expand(path)[0][0]
    kind = form(file)
    if kind == "ndjson":
        return None
    if kind == "parquet":
        known = open_file(file).collect_schema().names()
        return "ebnerd" if set(ebnerd.COLUMNS.values()) <= set(known) else None
    line = first_line(file)
    cells = line.split("\t")
    if len(cells) == len(mind.BEHAVIORS) and cells[4][-2:] in ("-0", "-1"):
        return "mind"
    header = line.replace('"', "").split(",")
    plain = line.count("\t") == 3 and line.replace("\t", "").isdigit()
    if header[:4] == ["userId", "movieId", "rating", "timestamp"] or line.count("::") == 3 or plain:
        return "movielens"
    if "train" in file.name and "\t" not in line and _is_lines(str(file)):
        return "lightgcn"
    return None


def _write_public(draft: Draft, name: str, log: str, items: str | None) -> str:
    draft.set("format", name, "recognised by its file names and columns, which need no naming")
    if name == "lightgcn":
        return _write_adjacency(draft, log)
    draft.path("log", log)
    folder = Path(log).expanduser().is_dir()
    if items is not None:
        draft.path("items", items)
    elif not folder:
        draft.offer("items", "path of the item table", "titles and texts find new items")
    if name == "ebnerd":
        known = open_file(_first(log, "behaviors.parquet")).collect_schema().names()
        draft.section("data.columns")
        draft.set("context_categories", [c for c in ("device_type",) if c in known])
        draft.offer("short_dwell", 3.0, "seconds: a shorter read is a rejection, not a click")
    if name == "movielens":
        draft.section("data.columns")
        draft.set("positive_from", 4.0, "stars: this or more is a positive")
        draft.set("rejected_to", 2.0, "this or less is an explicit rejection; between: left out")
    return "time"


def _first(log: str, name: str) -> Path:
    inside = Path(log).expanduser() / name
    return inside if inside.is_file() else expand(log)[0][0]


def _write_adjacency(draft: Draft, log: str) -> str:
    """LightGCN files: the test file beside the train file is the published split."""
    folder = Path(log).expanduser()
    train = Path(log) / "train.txt" if folder.is_dir() else Path(log)
    near = {path.name: path for path in sorted(train.expanduser().parent.glob("*.txt"))}
    test = near.get("test.txt")
    if test is None:
        draft.path(
            "log", str(train), "there is no test.txt beside it; name data.test when there is"
        )
        return "leave_one_out"
    draft.path("train", str(train), "the published split: order within a line means nothing")
    if "valid.txt" in near:
        draft.path("valid", str(train.with_name("valid.txt")))
    draft.path("test", str(train.with_name("test.txt")))
    return "given"


# ---------------------------------------------------------------- sequences as lines


def _is_lines(log: str) -> bool:
    """Whether the log is lines `user item item …` without a header."""
    file = expand(log)[0][0]
    if form(file) != "csv":
        return False
    with reading(file):
        lines = pl.scan_lines(file, n_rows=50).collect().to_series().to_list()
    rows = [line.split() for line in lines if line.strip()]
    if not rows or "," in lines[0] or ";" in lines[0] or rows[0][0].lower() in HEADERS:
        return False
    # Rows of a table are equally long; lists are not, unless they are all short.
    ragged = len({len(row) for row in rows}) > 1
    numbers = all(word.isdigit() for row in rows for word in row)
    return ragged if lines[0].count("\t") <= 1 else numbers and ragged


def _write_lines(draft: Draft, log: str, items: str | None) -> str:
    draft.set("format", "sequences", "each line is a user and then items, the oldest first")
    draft.path("log", log)
    draft.say('If the order within a line means nothing, write format = "lightgcn".')
    if items is not None:
        draft.path("items", items)
    file = expand(log)[0][0]
    lines = pl.scan_lines(file, n_rows=LOOK).collect().to_series()
    ids = lines.str.extract_all(r"\S+").list.slice(1).explode().drop_nulls()
    write_catalog(draft, items, ids, None)
    return "leave_one_out"


# ---------------------------------------------------------------- tables


def _write_table(draft: Draft, log: str, items: str | None) -> str:
    look = Look.at(log)
    columns = look.frame.columns
    shown, clicked = look.find(names.SHOWN), look.find(names.CLICKED)
    user, sequence = look.find(names.USER), look.find(names.ITEMS)
    if shown and clicked:
        shape, why = "impressions", "a row a request: lists of what was shown and clicked"
    elif sequence and (look.is_list(sequence) or not look.find(names.ITEM)):
        shape, why = "sequences", "a row a user, with items in order, the oldest first"
    else:
        shape, why = "events", "a row an event"
    draft.set("format", shape, why)
    draft.path("log", log)
    if items is not None:
        draft.path("items", items)
        draft.offer("unknown_items", "keep", "or drop: events on items that the item table lacks")
    draft.section("data.columns")
    draft.say(f"Columns of the log: {', '.join(columns)}")
    draft.column("user", user, "a user")
    ids: pl.Series | None
    if shape == "impressions" and shown and clicked:
        kind, ids = _write_impressions(draft, look, shown, clicked), ids_in(look, shown)
    elif shape == "sequences" and sequence:
        draft.set("items", sequence, "the list of items")
        kind, ids = "leave_one_out", ids_in(look, sequence)
    else:
        kind, ids = _write_events(draft, look, log, user)
    write_catalog(draft, items, ids, look.find(names.ITEM))
    return kind


def _write_impressions(draft: Draft, look: Look, shown: str, clicked: str) -> str:
    _write_time(draft, look, [shown, clicked])
    draft.set("shown", shown, "the items of a request; their order is not taken as a position")
    draft.set("clicked", clicked)
    position = look.find(names.POSITION)
    if position is not None and look.is_list(position):
        draft.set("position", position, "one number for each item that was shown")
    _write_context(draft, look)
    return "time"


def _write_events(
    draft: Draft, look: Look, log: str, user: str | None
) -> tuple[str, pl.Series | None]:
    item = look.find(names.ITEM, [user])
    draft.column("item", item, "an item")
    time = _write_time(draft, look, [user, item])
    taken = [user, item, time]
    event = look.find(names.EVENT, taken)
    if event is not None and look.frame[event].n_unique() <= MANY_NAMES:
        _write_names(draft, log, event)
    else:
        draft.say(
            "event: no column of event names: every row is a positive, unless a value says not"
        )
    value = look.find(names.VALUE, taken)
    numbers = None if value is None else look.number(value)
    if value is not None and numbers is not None:
        high, low = _thresholds(numbers)
        draft.set("value", value, "from {:g} to {:g} in the first rows".format(*_ends(numbers)))
        draft.set("positive_from", high, "this or more is a positive")
        draft.set("rejected_to", low, "this or less is a rejection; between: left out")
    for key, among in (
        ("request", names.REQUEST),
        ("position", names.POSITION),
        ("dwell", names.DWELL),
    ):
        column = look.find(among, taken)
        if column is not None:
            draft.set(key, column)
            if key == "dwell":
                draft.offer("short_dwell", 3.0, "seconds: a shorter stay is a rejection")
    _write_context(draft, look)
    return ("time" if time else "leave_one_out"), None if item is None else ids_in(look, item)


def _write_context(draft: Draft, look: Look) -> None:
    devices = [c for c in look.frame.columns if plainly(c) in names.DEVICE]
    if devices:
        draft.set("context_categories", devices, "known when the query is made")


def _write_time(draft: Draft, look: Look, taken: Sequence[str | None]) -> str | None:
    time = look.find(names.TIME, taken)
    if time is None:
        draft.set("time", "", "no column looks like one: the order of the rows is all there is")
        return None
    series = look.frame[time].drop_nulls()
    time_form = clock(time, series.dtype, series.head(1000), Schema())
    values = series.to_frame().select(time_form.value).to_series().drop_nulls()
    if not len(values):
        draft.set("time", time, "no value of the first rows could be read as a time")
        return time
    if time_form.unit is None:
        description = (
            "times with a zone" if time_form.zoned else "times without a zone are taken as UTC"
        )
        scale = 1.0
    else:
        unit = unit_of(float(abs(values.to_numpy()).max()))
        description = f"numbers in {unit}"
        scale = {"s": SECOND, "ms": 1e3, "us": 1, "ns": 1e-3}[unit]
    low, high = (_date(float(end) * scale) for end in _ends(values))
    draft.set("time", time, f"{description}; the first rows are from {low} to {high}")
    if time_form.unit is None and not time_form.zoned:
        draft.offer("time_zone", "UTC", 'or a name such as "Europe/Copenhagen"')
    return time


def _ends(values: pl.Series) -> tuple[float, float]:
    array = values.to_numpy()
    return float(array.min()), float(array.max())


def _date(time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time / SECOND, UTC):%Y-%m-%d}"
    except (OverflowError, ValueError, OSError):
        return "a date beyond the calendar"


def _thresholds(values: pl.Series) -> tuple[float, float]:
    """From where a rating is good and to where it is bad: the upper and the lower two fifths."""
    low, top = _ends(values)
    for scale in (1.0, 5.0, 10.0, 100.0):
        if top <= scale:
            return {1.0: (1.0, 0.0), 5.0: (4.0, 2.0), 10.0: (8.0, 4.0), 100.0: (70.0, 40.0)}[scale]
    middle = (low + top) / 2
    return middle, low + (top - low) / 4


def _write_names(draft: Draft, log: str, event: str) -> None:
    """Event names with their counts over the whole log."""
    frame, files = scan(log)
    with reading(files[0]):
        counts = frame.group_by(pl.col(event).cast(pl.String).alias("name")).len().collect()
    counts = counts.drop_nulls().sort("len", "name", descending=[True, False])
    events = dict(counts.iter_rows())
    draft.set("event", event, "found: " + ", ".join(f"{n} ({c})" for n, c in events.items()))
    positive = {
        name: strength
        for name in events
        for strength, words in names.STRENGTH.items()
        if plainly(name) in words
    }
    shown = [name for name in events if plainly(name) in names.SEEN]
    rejected = [name for name in events if plainly(name) in names.NOT_THIS]
    if not positive:
        positive = {name: 1.0 for name in events if name not in shown + rejected}
    rest = [name for name in events if name not in [*positive, *shown, *rejected]]
    draft.set("positive", positive, "event → strength")
    draft.set("shown_events", shown, 'events that only say "was shown"')
    draft.set("rejected", rejected, 'events that say "not this": dislike, skip, hide')
    if rest:
        draft.say(f"Left out, for no list names them: {', '.join(rest)}")


def write_catalog(draft: Draft, items: str | None, ids: pl.Series | None, same: str | None) -> None:
    if items is None:
        return
    look = Look.at(items)
    draft.section("data.catalog")
    draft.say(f"Columns of the item table: {', '.join(look.frame.columns)}")
    item, share = _item_column(look, ids, same)
    if item is None:
        draft.column("item", None, "the id of an item")
    else:
        draft.set("item", item, f"{share:.0%} of the first ids in the log" if share else "")
    free = [c for c in look.frame.columns if c != item]
    title = look.find(names.TITLE, [item])
    if title is not None:
        draft.set("title", title, "what people see")
    texts = [c for c in free if c == title or plainly(c) in names.TEXT]
    draft.set("text", texts, "what the text encoder reads")
    categories = [
        c
        for c in free
        if c not in texts and (plainly(c) in names.CATEGORY or _is_category(look.frame[c]))
    ]
    draft.set("categories", categories)
    mark = _separator(look, categories)
    if mark:
        draft.set("category_separator", mark)
    published = look.find(names.PUBLISHED, [item])
    if published is not None:
        draft.set("published", published, "an item later than the question is no candidate")
    vector = next((c for c in free if _is_vector(look, c)), None)
    numbers = [
        c
        for c in free
        if c not in (title, published, *texts, *categories)
        and not plainly(c).endswith(("id", "idx", "index"))
        and plainly(c)
        and look.number(c) is not None
    ]
    draft.set("numbers", numbers)
    if vector is not None:
        draft.set("vector", vector, "given vectors: images, audio, another model")
    for key in ("available", "available_from", "available_until"):
        column = look.find([plainly(key)])
        if column is not None:
            draft.set(key, column)


def _item_column(look: Look, ids: pl.Series | None, same: str | None) -> tuple[str | None, float]:
    """The column that shares most ids with the log, and the share of the log's ids it knows."""
    known = pl.Series([], dtype=pl.String) if ids is None else ids.unique()
    named = look.find([plainly(same)] if same else []) or look.find(names.ITEM) or look.find(["id"])
    best, share = named, 0.0
    for column in sorted(look.frame.columns, key=lambda c: c != named):
        series = look.frame[column]
        if isinstance(series.dtype, (pl.List, pl.Array, pl.Struct)) or not len(known):
            continue
        # Prefer the column that is made of the log's ids over one that happens to hold some.
        hits = float(known.is_in(series.drop_nulls().cast(pl.String).implode()).to_numpy().mean())
        if hits > share * 1.5:
            best, share = column, hits
    return best, share


def _separator(look: Look, categories: Sequence[str]) -> str | None:
    """What stands between several categories in one text."""
    texts = [look.frame[c].drop_nulls() for c in categories if look.frame[c].dtype == pl.String]
    for mark in ("|", ";", ","):
        if any(
            len(t) and t.str.contains(mark, literal=True).to_numpy().mean() > 0.05 for t in texts
        ):
            return mark
    return None


def _is_vector(look: Look, column: str) -> bool:
    dtype = look.frame.schema[column]
    return isinstance(dtype, (pl.List, pl.Array)) and dtype.inner.is_float()


def _is_category(series: pl.Series) -> bool:
    """Whether a text column repeats few short values."""
    if series.dtype != pl.String:
        return False
    text = series.drop_nulls()
    if len(text) < 4 or text.cast(pl.Float64, strict=False).null_count() == 0:
        return False
    return text.n_unique() <= len(text) // 2 and int(text.str.len_chars().to_numpy().max()) <= 40


# ---------------------------------------------------------------- the first rows of a table


@dataclass(frozen=True)
class Look:
    """The first rows of a table, by which columns are guessed."""

    frame: pl.DataFrame
    name: str

    @staticmethod
    def at(paths: str) -> Look:
        frame, files = scan(paths)
        with reading(paths):
            head = frame.head(LOOK).collect()
        return Look(head.drop([c for c in head.columns if c == ""]), str(files[0]))

    def find(self, among: Iterable[str], taken: Sequence[str | None] = ()) -> str | None:
        """The first column whose plain name is one of those, in their order."""
        plain = {plainly(c): c for c in reversed(self.frame.columns) if c not in taken}
        return next((plain[name] for name in among if name in plain), None)

    def is_list(self, column: str) -> bool:
        """Whether a column holds lists, native or written in brackets."""
        series = self.frame[column]
        if isinstance(series.dtype, (pl.List, pl.Array)):
            return True
        if series.dtype != pl.String:
            return False
        text = series.drop_nulls().head(100)
        return bool(len(text)) and bool(text.str.contains(r"^\[.*\]$").all())

    def number(self, column: str) -> pl.Series | None:
        """A column as numbers, None when it is not numbers."""
        series = self.frame[column].drop_nulls()
        if series.dtype == pl.Boolean or not (
            series.dtype.is_numeric() or series.dtype == pl.String
        ):
            return None
        values = series.cast(pl.Float64, strict=False)
        return values if len(values) and values.null_count() == 0 else None


def plainly(name: str) -> str:
    """A name without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def ids_in(look: Look, column: str) -> pl.Series:
    """The ids of a column, those within lists too."""
    series = look.frame[column]
    if isinstance(series.dtype, (pl.List, pl.Array)):
        return series.explode().drop_nulls().cast(pl.String)
    if look.is_list(column) or plainly(column) in (*names.SHOWN, *names.ITEMS):
        return series.str.extract_all(r"[^\s,'\"\[\]]+").explode().drop_nulls()
    return series.drop_nulls().cast(pl.String)


# ---------------------------------------------------------------- a commented TOML file


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

    def column(self, key: str, name: str | None, what: str) -> None:
        """The column of a key, or a gap to be filled."""
        if name:
            self.set(key, name)
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
