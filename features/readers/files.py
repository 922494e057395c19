"""Open files, globs and folders as lazy frames, text as text."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recsys.errors import DataError, nearest

FORMS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".dat": "csv",
    ".data": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""How a file is read, by the end of its name, `.gz` and `.zst` taken off."""
COMPRESSED = (".gz", ".zst")
ARCHIVES = (".zip", ".tar", ".7z", ".rar", ".bz2", ".xz", ".tgz")
SEPARATORS = (",", "\t", ";", "|")

Paths = str | Path | Sequence[str | Path] | pl.DataFrame
"""Files, globs and folders; or a table that is in memory already."""


@dataclass(frozen=True)
class Part:
    """One file of a log.

    Args:
        path: the file.
        frame: its rows, columns as they stand in the file.
        side: the side of a given split, or None.
    """

    path: Path
    frame: pl.LazyFrame
    side: int | None = None


def form(path: Path) -> str:
    """How a file is read: csv, ndjson or parquet.

    Raises:
        DataError: the end of the name is not one that can be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in ARCHIVES:
        raise DataError(
            f"{path} is an archive, which cannot be scanned. Unpack it and name the file inside "
            "(plain, .gz and .zst files are read as they are)."
        )
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    if not suffixes or suffixes[-1] not in FORMS:
        raise DataError(
            f"{path} does not end in a known form. Known: {', '.join(FORMS)}, "
            f"each also with {' or '.join(COMPRESSED)}."
        )
    return FORMS[suffixes[-1]]


def expand(paths: Paths) -> list[tuple[Path, dict[str, str]]]:
    """The files that paths, globs and folders mean, and the `key=value` folders above each.

    Args:
        paths: one or several files, globs, or folders (read to the bottom; names that start with
            a dot or an underscore are left out).

    Returns:
        Files in the order of the paths, sorted within a glob or folder; the keys are those of
        folders below the folder or the fixed part of the glob.

    Raises:
        DataError: nothing is there, or a folder holds files of several forms.
    """
    assert not isinstance(paths, pl.DataFrame), "a frame has no files"
    found: list[tuple[Path, dict[str, str]]] = []
    for spec in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(spec).expanduser()
        if path.is_file():
            found.append((path, {}))
        elif path.is_dir():
            found += [(file, _keys(file, path)) for file in _inside(path)]
        elif glob.has_magic(str(path)):
            files = [Path(name) for name in _glob(path)]
            files = [file for file in files if file.is_file()]
            if not files:
                raise DataError(f"No file matches {spec}. Look at the folder, or mend the pattern.")
            fixed = Path(*_before_magic(path))
            found += [(file, _keys(file, fixed)) for file in files]
        else:
            raise DataError(f"There is no file {spec}. {_beside(path)}".rstrip())
    if not found:
        raise DataError("The list of log files is empty. Name at least one file.")
    return found


def _glob(pattern: Path) -> list[str]:
    # `Path.glob` knows no absolute pattern.
    return sorted(glob.glob(str(pattern), recursive=True))


def _before_magic(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _keys(file: Path, root: Path) -> dict[str, str]:
    folders = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return dict(folder.split("=", 1) for folder in folders if "=" in folder)


def _inside(folder: Path) -> list[Path]:
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part[0] in "._" for part in file.relative_to(folder).parts)
        suffixes = [s.lower() for s in file.suffixes if s.lower() not in COMPRESSED]
        if file.is_file() and not hidden and suffixes and suffixes[-1] in FORMS:
            files.append(file)
    if not files:
        raise DataError(f"The folder {folder} holds no file that can be read: {', '.join(FORMS)}.")
    if len({form(file) for file in files}) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:4])
        raise DataError(
            f"The folder {folder} holds files of several forms ({names}). "
            f"Name a glob instead, such as {folder}/*{files[0].suffix}."
        )
    return files


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = [entry.name for entry in path.parent.iterdir()]
    phrase = nearest(path.name, names) if names else ""
    return phrase if phrase.startswith("Did") else ""


def first_line(path: Path) -> str:
    """The first line of a text file, empty if there is none."""
    with reading(path):
        lines = pl.scan_lines(path, n_rows=1).collect()
    return lines.item() if len(lines) else ""


def separator_of(path: Path) -> str:
    """The separator of a text table: a tab for .tsv, else the commonest in its first line."""
    if ".tsv" in path.suffixes:
        return "\t"
    line = first_line(path)
    return max(SEPARATORS, key=lambda mark: (line.count(mark), -SEPARATORS.index(mark)))


def open_file(
    path: Path,
    *,
    separator: str | None = None,
    names: Sequence[str] | None = None,
    quote: str | None = '"',
    ids: Iterable[str] = (),
) -> pl.LazyFrame:
    """Scan one file lazily.

    Columns of text files are all String, so that an id "007" stays what it is and no late value
    contradicts a guessed type.

    Args:
        path: a file whose name says its form.
        separator: between the columns of a text table; None: looked at in the first line.
        names: the columns of a text table without a header.
        quote: what encloses text that holds the separator; None: nothing does.
        ids: columns that are ids, needed for NDJSON, where a type is guessed from the first rows.

    Raises:
        DataError: the form is unknown, or the file is empty or damaged.
    """
    kind = form(path)
    with reading(path):
        if kind == "parquet":
            frame = pl.scan_parquet(path, hive_partitioning=False)
        elif kind == "ndjson":
            frame = pl.scan_ndjson(path, infer_schema_length=10_000)
            known = frame.collect_schema()
            strings = {name: pl.String for name in ids if name in known and _flat(known[name])}
            if strings:
                frame = pl.scan_ndjson(path, infer_schema_length=10_000, schema_overrides=strings)
        else:
            frame = pl.scan_csv(
                path,
                separator=separator or separator_of(path),
                has_header=names is None,
                new_columns=list(names) if names else None,
                quote_char=quote,
                infer_schema=False,
                truncate_ragged_lines=False,
            )
        frame.collect_schema()
    return frame


def _flat(dtype: pl.DataType) -> bool:
    return not isinstance(dtype, (pl.List, pl.Struct, pl.Array))


def open_parts(
    paths: Paths,
    *,
    side: int | None = None,
    separator: str | None = None,
    ids: Iterable[str] = (),
) -> list[Part]:
    """Scan every file that the paths mean, `key=value` folders as columns; a frame is one part."""
    if isinstance(paths, pl.DataFrame):
        return [Part(Path("the frame"), paths.lazy(), side)]
    parts = []
    for path, keys in expand(paths):
        frame = open_file(path, separator=separator, ids=ids)
        known = frame.collect_schema().names()
        new = [pl.lit(value).alias(key) for key, value in keys.items() if key not in known]
        parts.append(Part(path, frame.with_columns(new) if new else frame, side))
    return parts


def open_lines(paths: Paths, *, side: int | None = None) -> list[Part]:
    """Scan files of text lazily as one column `line`."""
    parts = []
    for path, _ in expand(paths):
        if form(path) != "csv":
            raise DataError(f"{path} is not a text file, and this format is read line by line.")
        parts.append(Part(path, pl.scan_lines(path, name="line"), side))
    return parts


class reading:
    """Turn what Polars says about a file into a DataError that names the file."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pl.exceptions.NoDataError):
            raise DataError(f"{self.path} is empty. Name a file with rows.") from None
        if isinstance(error, (pl.exceptions.PolarsError, OSError)):
            said = str(error).strip().splitlines()[0]
            raise DataError(
                f"{self.path} cannot be read: {said}. Is the file whole and of that form?"
            ) from None


def require(path: Path, known: Sequence[str], wanted: Mapping[str, str | None]) -> None:
    """See that the columns are there.

    Args:
        path: the file, for the message.
        known: its columns.
        wanted: configuration key → column, None where the schema names none.

    Raises:
        DataError: a column is missing.
    """
    for key, column in wanted.items():
        if column is not None and column not in known:
            raise DataError(
                f"{path} has no column {column!r}, which {key} names. {nearest(column, known)}"
            )
