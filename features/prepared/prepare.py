"""Prepare a log: encode, split, label skips, fit encoders on train, sort, write.

Legend: E positive events, R requests, T shown items, S skips, N item rows, U user rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import BundleError, DataError
from recsys.features.prepared import skips as skipping
from recsys.features.prepared.columns import (
    BEGINNING,
    LISTED,
    NEVER,
    ContextColumn,
    aligned,
    categories,
    instants,
    joined_text,
    numbers,
    texts,
    vectors,
)
from recsys.features.prepared.dataset import FORMAT, FORMAT_VERSION, MANIFEST, Dataset
from recsys.features.prepared.encode_log import Coded, Requests, order_by, read, rows_of
from recsys.features.prepared.skips import SkipRules
from recsys.files import atomic_folder, canonical_json, sha256_bytes, sha256_file
from recsys.ragged import Ragged
from recsys.split import Split, SplitRules, cold_items, decide
from recsys.tables import CONTEXT, CatalogSchema, Kind, Log, Side, UserSchema

Progress = Callable[[str], None]


def prepare(
    log: Log,
    split: SplitRules,
    skips: SkipRules,
    out: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Write the prepared dataset of a log, unless the same input stands there already.

    Args:
        log: what a reader handed on.
        split: [split].
        skips: [skips].
        out: the folder to write; an older prepared dataset there is replaced once the new one is
            whole.
        options: whatever else decided what was read (the [data] section), part of the digest of
            the input.
        progress: is told each stage in a few words.

    Returns:
        The opened dataset; its `fresh` says whether it was written now.

    Raises:
        ConfigError, DataError: the log cannot be split or encoded as asked.
        BundleError: something else than a prepared dataset stands at `out`.
    """
    say = progress or (lambda _: None)
    out = Path(out)
    identity = _identity(log, split, skips, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            there = Dataset.open(out)
        except BundleError as error:
            if not _ours(out):
                raise BundleError(
                    f"{out} holds something that is no prepared dataset, and would be replaced. "
                    "Name another folder, or remove it."
                ) from error
        else:
            if log.sources and there.manifest["input"]["digest"] == identity["digest"]:
                say(f"{out} is already prepared from this very input; nothing to do")
                return there
    with atomic_folder(out) as folder:
        _Preparation(log, split, skips, Writer(folder), say).run(identity)
    return Dataset(out, Dataset.open(out).manifest, fresh=True)


def _ours(out: Path) -> bool:
    """Whether a folder that does not open was at least written by us (older, or damaged)."""
    manifest = out / MANIFEST
    return manifest.is_file() and f'"{FORMAT}"' in manifest.read_text("utf-8", "replace")


def _identity(
    log: Log, split: SplitRules, skips: SkipRules, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that the result depends on; file names without their folders, so that a copy is equal."""
    sources = [{"name": path.name, "sha256": sha256_file(path)} for path in log.sources]
    said = {
        "sources": sorted(sources, key=lambda source: (source["name"], source["sha256"])),
        "schema": log.schema.model_dump(mode="json"),
        "catalog_schema": log.catalog and log.catalog.schema.model_dump(mode="json"),
        "user_schema": log.user_schema.model_dump(mode="json"),
        "timed": log.timed,
        "given_split": log.given_split,
        "notes": log.notes,
        "options": dict(options or {}),
        "split": split.model_dump(mode="json"),
        "skips": skips.model_dump(mode="json"),
    }
    text = canonical_json([FORMAT, FORMAT_VERSION, said])
    return {**said, "digest": sha256_bytes(text.encode())}


class _Preparation:
    """The stages in order; each hands the next what it needs and lets go of the rest."""

    def __init__(
        self, log: Log, split: SplitRules, skips: SkipRules, writer: Writer, say: Progress
    ) -> None:
        self.log, self.split_rules, self.skip_rules = log, split, skips
        self.writer, self.say = writer, say
        self.manifest: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        self.counts: dict[str, int] = {}

    def run(self, identity: dict[str, Any]) -> None:
        self.say("reading the log and encoding its ids")
        given = self.log.given_split and self.split_rules.kind in ("auto", "given")
        coded = read(self.log, given)
        self.say("splitting")
        split = decide(coded.frame, self.split_rules, timed=coded.timed, given=given)
        frame, requests, cold = self._sides(coded, split)
        self.say("numbering users and items")
        frame, requests, items, users, cold = self._number(coded, frame, requests, cold)
        wanted = skipping.wanted(self.skip_rules, frame, requests is not None)
        labels = None
        if wanted:
            self.say("labelling what was skipped but seen")
            shown = None if requests is None else _as_rows(requests)
            labels = skipping.label(frame, shown, self.skip_rules, timed=coded.timed)
        self.manifest["skips"] = self._skip_report(wanted, labels)
        self.say("sorting and writing events")
        seen_first = self._first_seen(frame, requests)
        on_train = self._on_train(frame, requests)
        events = frame.filter(pl.col("kind") == Kind.POSITIVE)
        del frame
        order = order_by(events["user"].to_numpy(), events["time"].to_numpy())
        contexts = self._contexts(events, order)
        event = self._events(events, order, len(users) + 1)
        self._skips(event, labels)
        if requests is not None:
            self.say("writing requests")
        self._requests(requests, contexts)
        self.say("writing items and users")
        cutoff = split.valid_from if split.valid_from is not None else split.test_from
        known = Known(seen_first, on_train, cold, cutoff, coded.timed)
        warm = self.manifest["n_warm_users"]
        self.manifest |= write_tables(self.writer, self.log, items, users, known, warm)
        self.manifest |= {
            "n_items": len(items) + 1,
            "n_users": len(users) + 1,
            "timed": coded.timed,
            "split": {
                "kind": split.kind,
                "valid_from": split.valid_from,
                "test_from": split.test_from,
            },
            "input": identity,
            "counts": self.counts | self.log.notes | coded.notes,
            "files": self.writer.files,
        }
        text = canonical_json(self.manifest) + "\n"
        (self.writer.folder / MANIFEST).write_text(text, encoding="utf-8")

    def _sides(
        self, coded: Coded, split: Split
    ) -> tuple[pl.DataFrame, Requests | None, np.ndarray]:
        """Sides (and where they end) of every row; the cold items' earlier rows taken out."""
        frame, requests = split.sides(coded.frame), coded.requests
        if requests is not None:
            requests = replace(requests, frame=split.ends(split.sides(requests.frame)))
        if requests is not None or (frame["kind"] != Kind.POSITIVE).any():
            frame = split.ends(frame)
        ids = coded.items.ids
        cold = np.zeros(len(ids), bool)
        if self.split_rules.cold_items > 0:
            chosen = frame.filter(pl.col("kind") == Kind.POSITIVE)["item"].unique().sort()
            rules = self.split_rules
            names = cold_items(ids.gather(chosen), rules.cold_items)
            cold = ids.is_in(names.implode()).to_numpy()
            away = cold[frame["item"].to_numpy()] & (frame["side"] != Side.TEST).to_numpy()
            frame = frame.filter(pl.Series(~away))
            self.counts["events_of_cold_items_taken_out"] = int(away.sum())
            if requests is not None:
                early = (requests.frame["side"] != Side.TEST).to_numpy()[requests.shown.row_of()]
                requests = requests.where(~(early & cold[requests.shown.values]))
        positives = frame.filter(pl.col("kind") == Kind.POSITIVE)["side"]
        for side in Side:
            number = int((positives == side).sum())
            self.counts[f"{side.name.lower()}_positives"] = number
            asked = {Side.VALID: self.split_rules.valid, Side.TEST: self.split_rules.test}
            if number == 0 and asked.get(side) != 0:
                raise DataError(
                    f"The {side.name.lower()} side is empty once the events of "
                    f"{int(cold.sum())} cold items are taken out. Lower split.cold_items."
                )
        return frame, requests, cold

    def _number(
        self, coded: Coded, frame: pl.DataFrame, requests: Requests | None, cold: np.ndarray
    ) -> tuple[pl.DataFrame, Requests | None, pl.Series, pl.Series, np.ndarray]:
        """Provisional codes → final rows."""
        positive = frame.filter(pl.col("kind") == Kind.POSITIVE)
        tables = {}
        for name, codes in (("item", coded.items), ("user", coded.users)):
            since = np.full(len(codes.ids), Side.TEST, np.int8)
            for side in (Side.VALID, Side.TRAIN):
                since[positive.filter(pl.col("side") == side)[name].to_numpy()] = side
            tables[name] = rows_of(codes, since)
            self.manifest[f"n_warm_{name}s"] = int((since == Side.TRAIN).sum())
            self.manifest[f"n_refit_{name}s"] = int((since != Side.TEST).sum())
        (item_rows, items), (user_rows, users) = tables["item"], tables["user"]
        frame = frame.with_columns(
            pl.Series("user", user_rows[frame["user"].to_numpy()]),
            pl.Series("item", item_rows[frame["item"].to_numpy()]),
        )
        if requests is not None:
            own = pl.Series("user", user_rows[requests.frame["user"].to_numpy()])
            shown = Ragged(requests.shown.offsets, item_rows[requests.shown.values])
            requests = replace(requests, frame=requests.frame.with_columns(own), shown=shown)
            by = requests.frame.select("request", "time", "user").to_numpy().T
            requests = requests.take(np.lexsort(by))
        cold_rows = np.zeros(len(items) + 1, bool)
        cold_rows[item_rows[cold]] = True
        self.manifest["cold_items"] = int(cold.sum())
        return frame, requests, items, users, cold_rows

    def _skip_report(self, wanted: bool, labels: skipping.Skips | None) -> dict[str, Any]:
        total: dict[str, int] = {}
        for side in labels.report.values() if labels else ():
            for reason, number in side.items():
                total[reason] = total.get(reason, 0) + number
        sides = labels.report if labels else {}
        return {"labelled": wanted, "total": total, "by_side": sides}

    def _first_seen(self, frame: pl.DataFrame, requests: Requests | None) -> pl.DataFrame:
        """Item → first time it stands in the log, chosen or shown."""
        parts = [frame.lazy().select("item", "time")]
        if requests is not None:
            times = requests.frame["time"].to_numpy()[requests.shown.row_of()]
            parts.append(pl.LazyFrame({"item": requests.shown.values, "time": times}))
        return pl.concat(parts).group_by("item").agg(pl.col("time").min()).collect()

    def _on_train(self, frame: pl.DataFrame, requests: Requests | None) -> np.ndarray:
        """Rows of the items that appear on the train side."""
        found = [frame.filter(pl.col("side") == Side.TRAIN)["item"].unique().to_numpy()]
        if requests is not None:
            train = (requests.frame["side"] == Side.TRAIN).to_numpy()[requests.shown.row_of()]
            found.append(requests.shown.values[train])
        return np.unique(np.concatenate(found))

    def _contexts(self, events: pl.DataFrame, order: np.ndarray) -> list[ContextColumn]:
        names = sorted(name for name in events.columns if name.startswith(CONTEXT))
        train = events.filter(pl.col("side") == Side.TRAIN).select(names)
        contexts, codes = [], []
        for name in names:
            short = name.removeprefix(CONTEXT)
            number = short in self.log.schema.context_numbers
            column = ContextColumn.fit(short, train[name], number)
            contexts.append(column)
            codes.append(column.encode(events[name])[order])
            if column.vocab is not None:
                self.writer.table(f"context_{len(contexts) - 1}", column.vocab.ids.to_frame())
        stacked = np.stack(codes, 1) if codes else np.zeros((len(events), 0), np.int32)
        self.writer.array("event_context", stacked, np.int32)
        self.manifest["context_sizes"] = {column.name: column.size for column in contexts}
        self.manifest["context"] = {
            column.name: {"place": place, "edges": column.edges}
            for place, column in enumerate(contexts)
        }
        return contexts

    def _events(self, events: pl.DataFrame, order: np.ndarray, n_users: int) -> pl.DataFrame:
        """Write the positives in their final order; hand on what skips are attached to."""
        user = events["user"].to_numpy()[order]
        time = events["time"].to_numpy()[order]
        offsets = np.zeros(n_users + 1, np.int64)
        np.cumsum(np.bincount(user, minlength=n_users), out=offsets[1:])
        places = np.arange(user.size)
        changed = np.ones(user.size, bool)
        changed[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
        first = np.maximum.accumulate(np.where(changed, places, 0)) if user.size else places
        side = events["side"].to_numpy()[order]
        for name, array, dtype in (
            ("event_user", user, np.int32),
            ("event_item", events["item"].to_numpy()[order], np.int32),
            ("event_time", time, np.int64),
            ("event_weight", events["weight"].to_numpy()[order], np.float32),
            ("event_side", side, np.uint8),
            ("event_past", first - offsets[user], np.int32),
            ("user_offsets", offsets, np.int64),
        ):
            self.writer.array(name, array, dtype)
        self.counts["users_with_positives"] = int((np.diff(offsets) > 0).sum())
        for each in Side:
            number = np.count_nonzero(np.bincount(user[side == each], minlength=n_users))
            self.counts[f"{each.name.lower()}_users"] = int(number)
        columns = {"user": user, "time": time, "side": side}
        if "request" in events.columns:
            columns["request"] = events["request"].gather(order)
        columns["event"] = places.astype(np.int32)
        return pl.DataFrame(columns)

    def _skips(self, event: pl.DataFrame, labels: skipping.Skips | None) -> None:
        if labels is None or not len(labels.labels):
            offsets = np.zeros(len(event) + 1, np.int64)
            found = pl.DataFrame({"item": [], "confidence": []})
        else:
            found = skipping.attach(labels.labels, event)
            alone = found["event"].null_count()
            if alone:
                self.manifest["skips"]["total"]["alone"] = alone
            found = found.drop_nulls("event").sort("event", "time", "item", "reason", "request")
            per_event = np.bincount(found["event"].to_numpy(), minlength=len(event))
            offsets = np.concatenate([[0], np.cumsum(per_event)])
        self.writer.array("skip_offsets", offsets, np.int64)
        self.writer.array("skip_item", found["item"].to_numpy(), np.int32)
        self.writer.array("skip_weight", found["confidence"].to_numpy(), np.float32)
        self.counts["skips"] = len(found)

    def _requests(self, requests: Requests | None, contexts: list[ContextColumn]) -> None:
        if requests is None:
            names = ("request", "user", "time", "side")
            frame = pl.DataFrame(schema=dict.fromkeys(names, pl.Int64))
            requests = Requests(frame, Ragged.empty(0, np.int32), np.zeros(0, bool), None)
        frame, write = requests.frame, self.writer.array
        write("request_user", frame["user"].to_numpy(), np.int32)
        write("request_time", frame["time"].to_numpy(), np.int64)
        write("request_side", frame["side"].to_numpy(), np.uint8)
        write("request_offsets", requests.shown.offsets, np.int64)
        write("shown_item", requests.shown.values, np.int32)
        write("shown_clicked", requests.clicked, np.uint8)
        if requests.position is not None:
            write("shown_position", requests.position, np.int16)
        codes = [
            column.encode(frame[CONTEXT + column.name])
            if CONTEXT + column.name in frame.columns
            else np.zeros(len(frame), np.int32)
            for column in contexts
        ]
        stacked = np.stack(codes, 1) if codes else np.zeros((len(frame), 0), np.int32)
        write("request_context", stacked, np.int32)
        self.counts["requests"] = len(frame)
        self.counts["shown_items"] = len(requests.clicked)


def _as_rows(requests: Requests) -> pl.DataFrame:
    """The impression lists, one row a shown item."""
    frame = requests.frame.select("user", "time", "request", "side", "end")
    frame = frame[requests.shown.row_of()].with_columns(
        pl.Series("item", requests.shown.values), pl.Series("clicked", requests.clicked)
    )
    if requests.position is None:
        return frame
    position = pl.Series("position", requests.position.astype(np.int32))
    return frame.with_columns(position.set(position < 0, None))


@dataclass
class Writer:
    """Writes arrays and tables into a folder and keeps the list of them."""

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def array(self, name: str, array: np.ndarray, dtype: type) -> None:
        array = np.ascontiguousarray(array, dtype)
        np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        self._note(f"{name}.npy", {"dtype": array.dtype.str, "shape": list(array.shape)})

    def table(self, name: str, frame: pl.DataFrame) -> None:
        frame.write_parquet(self.folder / f"{name}.parquet", compression="zstd", statistics=False)
        self._note(f"{name}.parquet", {"rows": len(frame)})

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        file = self.folder / name
        entry |= {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        self.files[name] = entry


@dataclass(frozen=True)
class Known:
    """What the log says of its items.

    Args:
        first: item row and the first time it stands in the log, chosen or shown.
        on_train: rows of items that appear on the train side.
        cold: (N,) bool, held out.
        cutoff: microseconds at which the train side ends, if that is one moment.
        timed: whether times are of a clock.
    """

    first: pl.DataFrame
    on_train: np.ndarray
    cold: np.ndarray
    cutoff: int | None
    timed: bool


def write_tables(
    writer: Writer, log: Log, items: pl.Series, users: pl.Series, known: Known, warm_users: int
) -> dict[str, Any]:
    """Write everything that has one row an item or a user.

    Args:
        writer: of the folder.
        log: with the item and user tables.
        items: (N-1,) ids of rows 1, 2, ….
        users: (U-1,) likewise.
        known: of the items.
        warm_users: rows 1 to this have a positive on the train side.

    Returns:
        Entries of the manifest.
    """
    catalog = log.catalog
    schema = catalog.schema if catalog is not None else CatalogSchema()
    frame = aligned(catalog.frame if catalog is not None else None, "item", items)
    fit = _times(writer, log, schema, frame, items, known)
    if catalog is not None and schema.vector:
        writer.array("item_vectors", vectors(frame[schema.vector], items), np.float32)
    if catalog is None:
        schema = CatalogSchema()
    item_entry = _features(writer, "item", frame, schema, fit, joined_text(schema))
    frame = frame.select(name for name in frame.columns if name not in (LISTED, schema.vector))
    if schema.title and schema.title != "title":
        frame = frame.with_columns(pl.col(schema.title).alias("title"))
    writer.table("items", frame)

    people = log.user_schema if log.users is not None else UserSchema()
    frame = aligned(log.users, "user", users)
    warm = np.arange(len(users)) < warm_users
    user_entry = _features(writer, "user", frame, people, warm, people.text)
    writer.table("users", frame.select("user"))
    return {
        key: {"item": item_entry[key], "user": user_entry[key]} for key in ("categories", "numbers")
    }


def _times(
    writer: Writer,
    log: Log,
    schema: CatalogSchema,
    frame: pl.DataFrame,
    ids: pl.Series,
    known: Known,
) -> np.ndarray:
    """When each item came into being and may be answered.

    Returns:
        (N-1,) bool, the items that existed at the cut-off: what may be fitted on.
    """
    listed = np.concatenate([[False], frame[LISTED].to_numpy()])
    published = np.full(len(listed), NEVER, np.int64)
    if log.catalog is not None and schema.published:
        published = instants(frame[schema.published], log.schema, NEVER, ids)
    first = np.full(len(listed), NEVER, np.int64)
    first[known.first["item"].to_numpy()] = known.first["time"].to_numpy()
    first = np.minimum(first, published)
    # An item that only its own first event tells of is known after that event, not at it.
    met = np.where(first < published, np.minimum(first, NEVER - 1) + 1, first)
    exists = np.where(listed & (published == NEVER), BEGINNING, met)
    early = published == NEVER
    if known.cutoff is None or not known.timed:
        early[:] = True
    else:
        early |= published <= known.cutoff
    there = listed & early
    there[known.on_train] = True
    there &= ~known.cold
    if not known.timed:
        # Positions within a user say nothing of when an item came into being.
        first[1:], exists[1:] = 0, BEGINNING
    writer.array("item_first_seen", first, np.int64)
    writer.array("item_exists_from", exists, np.int64)
    writer.array("item_known", there, np.uint8)
    if log.catalog is not None:
        for name, missing in (("available_from", BEGINNING), ("available_until", NEVER)):
            column = getattr(schema, name)
            if column:
                times = instants(frame[column], log.schema, missing, ids)
                writer.array(f"item_{name}", times, np.int64)
        if schema.available:
            flag = frame[schema.available].cast(pl.Boolean).fill_null(True).to_numpy()
            writer.array("item_available", np.concatenate([[False], flag]), np.uint8)
    return there[1:]


def _features(
    writer: Writer,
    table: str,
    frame: pl.DataFrame,
    schema: CatalogSchema | UserSchema,
    fit: np.ndarray,
    text: tuple[str | None, ...],
) -> dict[str, Any]:
    """Categories, numbers and text of items or users; all empty where the schema names none."""
    for place, name in enumerate(schema.categories):
        codes, vocab = categories(frame[name], schema.category_separator, fit)
        stem = f"{table}_category_{place}"
        writer.array(f"{stem}_offsets", codes.offsets, np.int64)
        writer.array(f"{stem}_codes", codes.values, np.int32)
        writer.table(stem, vocab.ids.to_frame())
    standard = numbers(frame, schema.numbers, fit, table)
    writer.array(f"{table}_numbers", standard.values, np.float32)
    writer.table(f"{table}_text", texts(frame, text).to_frame())
    return {
        "categories": list(schema.categories),
        "numbers": {
            "names": list(schema.numbers),
            "means": standard.means,
            "deviations": standard.deviations,
        },
    }
