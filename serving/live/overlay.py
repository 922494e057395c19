"""Overlay of one model: items and events that came after its bundle.

Legend: N item rows of the bundle, M items in the overlay, D dimensions of the stored vector, E of
what histories read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import polars as pl

from recsys.errors import BundleError, QueryError
from recsys.features.prepared.item_coder import Described, ItemCoder
from recsys.ragged import gather
from recsys.serving.live.new_items import Encoded, encode_described, same_features
from recsys.tables import Schema

if TYPE_CHECKING:
    from recsys.serving.engine.loaded_model import LoadedModel


EVENTS_KEPT = 1000
"""Newest events of a user that a view holds; no tower reads as many."""
READ_AT_ONCE = 8192
"""Items of the journal that are read at once, which bounds memory."""
CHUNKS = 64
"""Rows appended to the fields one by one before they are laid together again."""
SHOWN = "shown"
"""The event that says that an item was shown and nothing else."""


class Posted(NamedTuple):
    """An event as it is kept of a user."""

    time: int
    seq: int
    item: str
    strength: float
    event: str


@dataclass(frozen=True)
class LiveView:
    """One model's overlay at one moment; never changes.

    Args:
        ids: M items that were added or replaced; overlay place j.
        place: id → j.
        vectors: (M, D) float32 of the item tower, stored form.
        entries: (M, E) float32, what histories read of them (`TwoTower.embed_history`).
        fields: M rows, the columns of the bundle's catalogue but `item`.
        window: (M, 2) int64 microseconds, from when on and until when each may be recommended; an
            item published later may be from then on.
        hidden: item rows of the bundle that were deleted, or replaced by an item here.
        hidden_positions: the same as sorted int64 index positions, those that are in the index.
        events: user → (item id, microseconds, strength) of the newest 1000 posted events that count
            in a history, oldest first; only those on items that the bundle or this view knows.
        generation: rises with every change.
        since: (M,) int64 microseconds when each was put; what is put later has a larger one, also
            after a start: pages of answers begun before do not show it.
    """

    ids: tuple[str, ...]
    place: Mapping[str, int]
    vectors: np.ndarray
    entries: np.ndarray
    fields: pl.DataFrame
    window: np.ndarray
    hidden: frozenset[int]
    hidden_positions: np.ndarray
    events: Mapping[str, tuple[tuple[str, int, float], ...]]
    generation: int
    since: np.ndarray


@dataclass(frozen=True)
class NewItem:
    """An item ready to be put into an overlay."""

    id: str
    row: int
    window: tuple[int, int]
    fields: Mapping[str, Any]
    vector: np.ndarray
    entry: np.ndarray
    since: int = 0


class Overlay:
    """The living part of one model.

    Args:
        model: the model.

    Attributes:
        view: what a request reads, once; replaced in one go.
        left_out: id → why an item of the journal cannot be read by this model.
        folded: ids of the journal that the bundle holds with the same content.
    """

    def __init__(self, model: LoadedModel) -> None:
        bundle = model.bundle
        self.model, self.bundle = model, bundle
        self.coder = bundle.coder
        self.left_out: dict[str, str] = {}
        self.folded: set[str] = set()
        config = bundle.manifest.get("config", {})
        self._schema = Schema.model_validate(config.get("data", {}).get("columns", {}))
        self._types = {n: t for n, t in bundle.catalog.schema.items() if n != "item"}
        self._taken: set[int] = set()  # places of events that the bundle's timeline holds
        self._noted = 0  # events up to this place of the journal have been looked at
        # Users with events on an item that the bundle does not know.
        self._waiting: dict[str, set[str]] = {}
        self._appended = 0
        towers = bundle.model
        self._places: PersistentMap[int] = PersistentMap()
        self._events: PersistentMap[tuple[tuple[str, int, float], ...]] = PersistentMap()
        self._posted: dict[str, tuple[Posted, ...]] = {}
        self._room = (
            np.empty((16, towers.vector_dimension), np.float32),
            np.empty((16, towers.vector_dimension), np.float32),
            np.empty((16, 2), np.int64),
            np.empty(16, np.int64),
        )
        self.view = LiveView(
            (), {}, self._room[0][:0], self._room[1][:0],
            bundle.catalog.select(list(self._types)).clear(), self._room[2][:0],
            frozenset(), np.empty(0, np.int64), {}, 0, self._room[3][:0],
        )  # fmt: skip

    # ------------------------------------------------------------------ reading items

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of an item that this model knows."""
        named = self._own_coder.columns
        return tuple(dict.fromkeys((*named, *self._types)))

    @property
    def _own_coder(self) -> ItemCoder:
        if self.coder is None:
            raise BundleError(
                f"Bundle {self.model.version} was made before bundles could read new items: it "
                "says nothing of how their categories and numbers are coded. Make it again."
            )
        return self.coder

    def describe(self, item: Mapping[str, Any]) -> tuple[Described, dict[str, Any]]:
        """What the model reads of an item, and its fields.

        Raises:
            QueryError: a value cannot be what its column holds.
            BundleError: the bundle cannot read new items.
        """
        coder = self._own_coder
        described = coder.describe(item)
        known = {**item, **described.raw}
        fields = {
            name: field_value(name, known.get(name), dtype, coder.schema.category_separator)
            for name, dtype in self._types.items()
        }
        return described, fields

    def encode(
        self, items: Sequence[tuple[str, Described, Mapping[str, Any]]], put_at: Mapping[str, int]
    ) -> tuple[list[NewItem], Encoded]:
        """Items through the item tower, those the bundle knows with their learned ids.

        Args:
            items: id, what the model reads of it, and its fields.
            put_at: id → microseconds when it was put.
        """
        known = np.array([self.model.row_of(id) for id, _, _ in items], np.int64)
        encoded = encode_described(self.bundle, [described for _, described, _ in items], known)
        newcomers = []
        for (id, described, fields), row, vector, entry in zip(
            items, known.tolist(), encoded.vectors, encoded.entries, strict=True
        ):
            since, until = described.window
            if described.published is not None and since < until:
                since = max(since, described.published)
            at = put_at.get(id, 0)
            newcomers.append(NewItem(id, row, (since, until), fields, vector, entry, at))
        return newcomers, encoded

    # ------------------------------------------------------------------ from the journal

    def load(
        self,
        items: Mapping[str, bytes | None],
        users: Mapping[str, tuple[Posted, ...]],
        put_at: Mapping[str, int],
    ) -> None:
        """Take in items and users as the journal has them.

        What the bundle holds already is not taken: items with the same content, deletions of
        items it does not have, events that stand in its timeline. An item that this model cannot
        read is left out, see `left_out`.
        """
        newcomers: list[NewItem] = []
        ids = list(items)
        for start in range(0, len(ids), READ_AT_ONCE):
            some = {id: items[id] for id in ids[start : start + READ_AT_ONCE]}
            newcomers += self._read(some, put_at)
        gone = [id for id, body in items.items() if body is None]
        self.change(newcomers, gone, users, forgotten=[*self.left_out, *self.folded])

    def _read(self, items: Mapping[str, bytes | None], put_at: Mapping[str, int]) -> list[NewItem]:
        """Those of the items that are to stand here; the others are folded or left out."""
        puts = []
        for id, body in items.items():
            self.left_out.pop(id, None)
            self.folded.discard(id)
            if body is None:
                continue
            try:
                described, fields = self.describe(json.loads(body))
            except (QueryError, BundleError) as error:
                self.left_out[id] = str(error)
                continue
            puts.append((id, described, fields))
        if not puts:
            return []
        newcomers, encoded = self.encode(puts, put_at)
        finite = np.isfinite(encoded.vectors).all(1) & np.isfinite(encoded.entries).all(1)
        same = self._held(newcomers, [described for _, described, _ in puts], encoded)
        kept = []
        for newcomer, good, held in zip(newcomers, finite, same, strict=True):
            if held:
                self.folded.add(newcomer.id)
            elif good:
                kept.append(newcomer)
            else:
                self.left_out[newcomer.id] = "The item tower gives a vector that is not finite."
        return kept

    def _held(
        self, items: Sequence[NewItem], described: Sequence[Described], encoded: Encoded
    ) -> np.ndarray:
        """(R,) bool, the items that the bundle answers with, and with the same content."""
        bundle, same = self.bundle, np.zeros(len(items), bool)
        rows = np.array([item.row for item in items])
        some = np.flatnonzero((rows > 0) & (self.model.position[rows] >= 0))
        if not len(some):
            return same
        at = rows[some]
        alike = same_features(encoded.table, bundle.model.items, rows)[some]
        window = np.array([described[i].window for i in some.tolist()])
        alike &= (window == bundle.window[at]).all(1)
        ours = self._frame([items[i].fields for i in some.tolist()])
        theirs = bundle.catalog[at - 1].select(ours.columns)
        for name in ours.columns:
            alike &= ours[name].eq_missing(theirs[name]).to_numpy()
        same[some] = alike
        return same

    # ------------------------------------------------------------------ changing

    def change(
        self,
        puts: Sequence[NewItem],
        gone: Iterable[str] = (),
        users: Mapping[str, tuple[Posted, ...]] | None = None,
        forgotten: Iterable[str] = (),
    ) -> None:
        """Replace the view by one with these changes; one thread at a time.

        Args:
            puts: items, each id once.
            gone: ids that are deleted.
            users: all kept events of the users who did something.
            forgotten: ids of which the bundle speaks for itself again.
        """
        view, gone, forgotten = self.view, list(gone), list(forgotten)
        row_of = self.model.row_of
        hidden = {item.row for item in puts} | {row_of(id) for id in gone}
        shown = {row_of(id) for id in forgotten}
        view = self._items(view, puts, [*gone, *forgotten])
        rows = view.hidden
        if (hidden - {0}) - rows or shown & rows:
            rows = frozenset((rows | hidden) - shown - {0})
            positions = self.model.position[np.fromiter(rows, np.int64, len(rows))]
            view = replace(
                view,
                hidden=rows,
                hidden_positions=np.sort(positions[positions >= 0]).astype(np.int64),
            )
        ours = {item.id for item in puts} | {*gone}
        self.folded -= ours
        for id in ours:
            self.left_out.pop(id, None)
        # Which of the posted events can be read has changed with the items.
        touched = set(users or ())
        for id in (*ours, *forgotten):
            touched |= self._waiting.get(id, set())
        before = self._events
        if users:
            self._posted.update(users)
            self._note(users)
        if touched:
            counted = {user: self._counted(user, view) for user in touched}
            none = [user for user, events in counted.items() if not events]
            some = {user: events for user, events in counted.items() if events}
            self._events = self._events.changed(some, none)
        if view is not self.view or self._events is not before:
            self.view = replace(view, events=self._events, generation=view.generation + 1)

    def _items(self, view: LiveView, puts: Sequence[NewItem], gone: Sequence[str]) -> LiveView:
        """The view with items put and taken away."""
        away = [id for id in dict.fromkeys(gone) if id in view.place]
        old = [item for item in puts if item.id in view.place]
        new = [item for item in puts if item.id not in view.place]
        if not (away or old or new):
            return view
        ids, size = list(view.ids), len(view.ids)
        room = self._room
        if away or old:
            # Views given out before read the old arrays.
            room = tuple(part.copy() for part in room)  # type: ignore[assignment]
        fields, source = view.fields, np.arange(size + len(puts))
        if puts:
            fields = fields.vstack(self._frame([item.fields for item in (*old, *new)]))
            self._appended += 1
        for n, item in enumerate(old):
            place = view.place[item.id]
            _write(room, slice(place, place + 1), [item])
            source[place] = size + n
        moved: dict[str, int] = {}
        for id in away:
            # The last one takes its place.
            place, last = moved.pop(id, view.place[id]), len(ids) - 1
            if place < last:
                for part in room:
                    part[place] = part[last]
                ids[place], source[place] = ids[last], source[last]
                moved[ids[place]] = place
            ids.pop()
        start, end = len(ids), len(ids) + len(new)
        while end > len(room[0]):
            room = tuple(np.concatenate([part, np.empty_like(part)]) for part in room)  # type: ignore[assignment]
        _write(room, slice(start, end), new)
        ids += [item.id for item in new]
        if away or old:
            kept = source[:start]
            fields = fields[np.concatenate([kept, size + len(old) + np.arange(len(new))])]
        if self._appended >= CHUNKS or away or old:
            fields, self._appended = fields.rechunk(), 0
        places = {item.id: start + n for n, item in enumerate(new)}
        self._room = room
        self._places = self._places.changed(moved | places, away)
        return replace(
            view, ids=tuple(ids), place=self._places, vectors=room[0][:end], entries=room[1][:end],
            window=room[2][:end], fields=fields, since=room[3][:end],
        )  # fmt: skip

    def _frame(self, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
        columns = {
            name: pl.Series(name, [row[name] for row in rows], dtype=dtype)
            for name, dtype in self._types.items()
        }
        return pl.DataFrame(columns, height=len(rows)) if columns else pl.DataFrame()

    # ------------------------------------------------------------------ events

    def _counted(self, user: str, view: LiveView) -> tuple[tuple[str, int, float], ...]:
        """What counts in a history of the user."""
        row_of, place = self.model.row_of, view.place
        kept = []
        for event in self._posted.get(user, ()):
            strength = self._strength(event)
            if strength is None or event.seq in self._taken:
                continue
            if event.item in place or row_of(event.item):
                kept.append((event.item, event.time, strength))
        return tuple(kept)

    def _strength(self, event: Posted) -> float | None:
        """How much an event counts; None: it is no positive to this model.

        A log with event names says which ones are positives; for any other log everything is one
        but that an item was shown.
        """
        schema = self._schema
        if schema.event and (schema.positive or schema.shown_events or schema.rejected):
            times = schema.positive.get(event.event)
            return None if times is None else times * event.strength
        return None if event.event == SHOWN else event.strength

    def _note(self, users: Mapping[str, tuple[Posted, ...]]) -> None:
        """Remember who waits for an item, and which events the bundle knows."""
        row_of, cutoff, noted = self.model.row_of, self.bundle.cutoff, self._noted
        early = []
        for user, events in users.items():
            for event in events:
                if event.seq <= noted:
                    continue
                self._noted = max(self._noted, event.seq)
                if not row_of(event.item):
                    self._waiting.setdefault(event.item, set()).add(user)
                elif cutoff is not None and event.time < cutoff:
                    early.append((user, row_of(event.item), event.time, event.seq))
        if not early:
            return
        asked = pl.DataFrame(
            early,
            schema={"user": pl.String, "item": pl.Int64, "time": pl.Int64, "seq": pl.Int64},
            orient="row",
        )
        timeline = self.bundle.timeline
        asked = asked.with_columns(
            pl.Series("row", self.bundle.users.encode(asked["user"]).astype(np.int64))
        ).filter(pl.col("row") > 0)
        rows, offsets = asked["row"].unique().to_numpy(), np.asarray(timeline.user_offsets)
        had = gather(timeline.item, offsets[rows], offsets[rows + 1])
        times = gather(timeline.time, offsets[rows], offsets[rows + 1])
        known = pl.DataFrame(
            {
                "row": rows[had.row_of()],
                "item": had.values.astype(np.int64),
                "time": times.values.astype(np.int64),
            }
        )
        both = asked.join(known, on=["row", "item", "time"], how="semi")
        self._taken.update(both["seq"].to_list())

    def has_taken(self, seq: int) -> bool:
        """Whether the bundle's timeline holds the event at this place of the journal."""
        return seq in self._taken


def _write(room: tuple[np.ndarray, ...], at: slice, items: Sequence[NewItem]) -> None:
    if items:
        room[0][at] = [item.vector for item in items]
        room[1][at] = [item.entry for item in items]
        room[2][at] = [item.window for item in items]
        room[3][at] = [item.since for item in items]


_INT = 2**63
_UNITS = {"ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def field_value(name: str, value: Any, dtype: pl.DataType, separator: str) -> Any:
    """The value as the column holds it.

    Args:
        name: of the column.
        value: JSON value.
        dtype: of the column.
        separator: between several categories in one text.

    Raises:
        QueryError: the column cannot hold the value.
    """
    if value is None:
        return None
    # Most values take no look by Polars, which costs more than all the rest of an item.
    if dtype == pl.String:
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple)):
            return (separator or ", ").join(str(one) for one in value if one is not None)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (int, float)):
            return str(value)
    elif dtype == pl.Boolean:
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif dtype == pl.Float64 and isinstance(value, (int, float)):
        return float(value)
    elif dtype == pl.Int64 and isinstance(value, int) and -_INT <= value < _INT:
        return value
    else:
        try:
            held = value
            if isinstance(value, str) and isinstance(dtype, pl.Date | pl.Datetime):
                held = _moment(name, value, dtype)
            series = pl.Series(name, [held], dtype=dtype, strict=True)
            if series.dtype == dtype:  # a list makes one of lists, whatever was wanted
                if dtype.is_nested():
                    series.to_list()  # an answer that tells of the item will read what is in it
                return series[0]
        except QueryError:
            raise
        # Polars refuses in many ways; a time that Python cannot hold makes it panic, which is no
        # Exception.
        except (Exception, pl.exceptions.PanicException):
            pass
    raise QueryError(
        f"{name!r} holds {value!r}, but the catalogue has a column of {dtype}. "
        f"Give {_fitting(dtype)}."
    )


def _fitting(dtype: pl.DataType) -> str:
    """What a column takes, in words."""
    if isinstance(dtype, pl.Date):
        return "a date in ISO 8601, or days since 1970, within the years 1 to 9999"
    if isinstance(dtype, pl.Datetime):
        unit = _UNITS[dtype.time_unit]
        return f"a time in ISO 8601, or {unit} since 1970, within the years 1 to 9999"
    if isinstance(dtype, pl.Duration):
        return f"a whole number of {_UNITS[dtype.time_unit]}"
    if isinstance(dtype, pl.List | pl.Array):
        return f"a list of {dtype.inner}"
    if isinstance(dtype, pl.Boolean):
        return "true or false"
    if dtype.is_integer():
        return "a whole number that fits"
    return "a number" if dtype.is_numeric() else "a value of that type"


def _moment(name: str, value: str, dtype: pl.Date | pl.Datetime) -> date | datetime:
    try:
        as_of = datetime.fromisoformat(value)
    except ValueError:
        raise QueryError(f"{name!r} holds {value!r}, which is no time in ISO 8601.") from None
    if isinstance(dtype, pl.Date):
        return as_of.date()
    if as_of.tzinfo is not None:
        # A column without a zone holds UTC, as a time without one is read everywhere.
        as_of = as_of.astimezone(UTC)
        if dtype.time_zone is None:
            as_of = as_of.replace(tzinfo=None)
    return as_of


V = TypeVar("V")
SHARDS = 1024
"""A change copies the shards that it touches, a thousandth of the whole each."""


class PersistentMap(Mapping[str, V]):
    """Text keys → values, spread over dictionaries by hash.

    Example:
        >>> one = PersistentMap().changed({"a": 1, "b": 2})
        >>> two = one.changed({"a": 3}, ["b"])
        >>> sorted(one.items()), sorted(two.items())
        ([('a', 1), ('b', 2)], [('a', 3)])
    """

    __slots__ = ("_shards", "_size")

    def __init__(self, shards: tuple[dict[str, V], ...] | None = None, size: int = 0) -> None:
        nothing: dict[str, V] = {}
        self._shards = (nothing,) * SHARDS if shards is None else shards
        self._size = size

    def changed(self, new: Mapping[str, V], gone: Iterable[str] = ()) -> PersistentMap[V]:
        """This mapping without `gone` and with `new`."""
        shards, own, size = list(self._shards), set[int](), self._size

        def mine(key: str) -> dict[str, V]:
            place = hash(key) % SHARDS
            if place not in own:
                own.add(place)
                shards[place] = dict(shards[place])
            return shards[place]

        for key in gone:
            shard = mine(key)
            size -= key in shard
            shard.pop(key, None)
        for key, value in new.items():
            shard = mine(key)
            size += key not in shard
            shard[key] = value
        return PersistentMap(tuple(shards), size) if own else self

    def __getitem__(self, key: str) -> V:
        return self._shards[hash(key) % SHARDS][key]

    # Mapping's own go through an exception.
    def get(self, key, default=None):  # type: ignore[no-untyped-def]
        """The value of the key, or the default."""
        return self._shards[hash(key) % SHARDS].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._shards[hash(key) % SHARDS]

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from shard

    def __len__(self) -> int:
        return self._size
