"""MovieLens as published: ratings.csv, ratings.dat or u.data, and its movies (grouplens.org)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recsys.errors import DataError
from recsys.features.readers.assemble import sides
from recsys.features.readers.events import read_parts
from recsys.features.readers.files import Part, Paths, expand, first_line, open_file, reading
from recsys.features.readers.items import catalog_frame
from recsys.features.readers.source import DataSource, with_defaults
from recsys.tables import Log

RATING = ("userId", "movieId", "rating", "timestamp")
MOVIE = ("movieId", "title", "genres")
GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|"
    "Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
"""The flags of u.item after its first five columns."""
NO_GENRE = "(no genres listed)"


def read(source: DataSource) -> Log:
    """Read MovieLens; 4 stars or more are positives and 2 or fewer rejections, unless said else.

    `log` is a file of ratings or the folder that holds it; from a folder the movies are read too,
    unless `items` names them. The year in a title becomes the number `year`.
    """
    schema = with_defaults(
        source.columns,
        user=RATING[0],
        item=RATING[1],
        value=RATING[2],
        time=RATING[3],
        positive_from=4.0,
        rejected_to=2.0,
    )
    parts = [
        Part(path, _ratings(path), side)
        for paths, side in sides(source)
        for path in _files(paths, ("ratings.csv", "ratings.dat", "u.data"))
    ]
    movies = _movie_files(source, parts[0].path)
    if not movies:
        return read_parts(source, schema, parts)
    frames = [Part(path, _movies(path).lazy()) for path in movies]
    catalog = with_defaults(
        source.catalog,
        item=MOVIE[0],
        title="title",
        text=("title", "genres"),
        categories=("genres",),
        numbers=("year",),
    )
    table = (catalog_frame(frames, catalog), catalog)
    return read_parts(source, schema, parts, files=movies, catalog=table)


def _files(paths: Paths, names: Sequence[str]) -> list[Path]:
    if isinstance(paths, (str, Path)) and Path(paths).expanduser().is_dir():
        folder = Path(paths).expanduser()
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise DataError(f"The folder {folder} holds none of {', '.join(names)}.")
        return found[:1]
    return [path for path, _ in expand(paths)]


def _movie_files(source: DataSource, ratings: Path) -> list[Path]:
    if source.items is not None:
        return _files(source.items, ("movies.csv", "movies.dat", "u.item"))
    log = source.log
    if isinstance(log, str) and Path(log).expanduser().is_dir():
        near = [ratings.parent / name for name in ("movies.csv", "movies.dat", "u.item")]
        return [path for path in near if path.is_file()][:1]
    return []


def _ratings(path: Path) -> pl.LazyFrame:
    """The four columns of whichever file it is."""
    line = first_line(path)
    if "::" in line:
        pieces = pl.col("line").str.split_exact("::", 3).struct.rename_fields(list(RATING))
        return pl.scan_lines(path, name="line").select(pieces.alias("all")).unnest("all")
    if path.name == "u.data" or (line.count("\t") == 3 and line.replace("\t", "").isdigit()):
        return open_file(path, separator="\t", names=RATING)
    return open_file(path)


def _movies(path: Path) -> pl.DataFrame:
    """movieId, title, genres and year; other columns of movies.csv stay."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        # The older sets are written in Latin-1.
        text = raw.decode("latin-1")
    lines = pl.DataFrame({"line": text.splitlines()}, schema={"line": pl.String})
    lines = lines.filter(pl.col("line").str.strip_chars() != "")
    first = lines["line"][0] if len(lines) else ""
    genres = GENRES_100K.split("|")
    if "::" in first:
        pieces = pl.col("line").str.split_exact("::", 2).struct.rename_fields(list(MOVIE))
        frame = lines.select(pieces.alias("all")).unnest("all")
    elif first.count("|") >= len(genres) + 4:
        cells = pl.col("line").str.split("|")
        flags = [
            pl.when(cells.list.get(5 + i) == "1").then(pl.lit(name))
            for i, name in enumerate(genres)
        ]
        frame = lines.select(
            cells.list.get(0).alias("movieId"),
            cells.list.get(1).alias("title"),
            pl.concat_str(flags, separator="|", ignore_nulls=True).alias("genres"),
        )
    else:
        with reading(path):
            frame = pl.read_csv(text.encode(), infer_schema=False)
    return _tidy(frame)


def _tidy(frame: pl.DataFrame) -> pl.DataFrame:
    columns = []
    if "genres" in frame.columns:
        columns.append(
            pl.when(~pl.col("genres").is_in([NO_GENRE, ""])).then(pl.col("genres")).alias("genres")
        )
    if "title" in frame.columns:
        year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Float64, strict=False)
        columns.append(year.alias("year"))
    return frame.with_columns(columns)
