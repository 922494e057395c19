"""Events after a bundle's cut-off, in external ids.

Legend: E events, R requests, T items shown in all, N item rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch

from recsys.features.prepared.encode_log import beside_shown
from recsys.features.prepared.timeline import NEVER, Timeline
from recsys.ragged import Ragged
from recsys.serving.bundle import Bundle
from recsys.tables import CONTEXT, Kind, Log
from recsys.towers.embedding import FeatureTable
from recsys.towers.two_tower import TwoTower
from recsys.vocab import Vocab

ALWAYS = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Requests:
    """What was shown together and what of it was chosen.

    Args:
        user: (R,) external ids.
        time: (R,) int64 microseconds.
        shown: R ragged external item ids, as positions in `items`.
        items: the external ids that `shown` points into.
        clicked: (T,) bool beside `shown.values`.
        context: (R, C) codes of the context columns.
        position: (T,) declared positions, negative where there is none; None: none at all.
    """

    user: pl.Series
    time: np.ndarray
    shown: Ragged
    items: pl.Series
    clicked: np.ndarray
    context: np.ndarray
    position: np.ndarray | None = None


@dataclass(frozen=True)
class Later:
    """Positives, and requests where the log has them, in external ids.

    Args:
        user, item: (E,) external ids.
        time: (E,) int64 microseconds, or positions without a clock.
        context: (E, C) codes of the context columns.
        requests: impression lists, or None.
        event_weight: (E,) float32 weight of each event, or None where it is not known.
    """

    user: pl.Series
    item: pl.Series
    time: np.ndarray
    context: np.ndarray
    requests: Requests | None = None
    event_weight: np.ndarray | None = None

    def since(self, as_of: int) -> Later:
        """Only what is at or after the moment."""
        kept, asked = np.flatnonzero(self.time >= as_of), self.requests
        if asked is not None:
            rows = np.flatnonzero(asked.time >= as_of)
            offsets, position = asked.shown.offsets, asked.position
            asked = Requests(
                asked.user.gather(rows), asked.time[rows], asked.shown.take(rows), asked.items,
                Ragged(offsets, asked.clicked).take(rows).values, asked.context[rows],
                None if position is None else Ragged(offsets, position).take(rows).values,
            )  # fmt: skip
        return Later(
            self.user.gather(kept), self.item.gather(kept), self.time[kept], self.context[kept],
            asked, None if self.event_weight is None else self.event_weight[kept],
        )  # fmt: skip


@dataclass(frozen=True)
class CodedLater:
    """`Later` in the rows of the extended bundle."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    context: np.ndarray
    request_user: np.ndarray
    request_time: np.ndarray
    request_context: np.ndarray
    shown: Ragged
    clicked: np.ndarray
    event_weight: np.ndarray | None = None
    position: np.ndarray | None = None


def from_log(log: Log, bundle: Bundle) -> Later:
    """The positives and requests of a log, coded as far as the bundle's context columns need."""
    names = [CONTEXT + column.name for column in bundle.contexts]
    frame = log.interactions.filter(pl.col("kind") == Kind.POSITIVE)
    there = [name for name in names if name in frame.collect_schema().names()]
    events = (
        frame.select("user", "item", "time", "weight", "row", *there).sort("time", "row").collect()
    )
    requests = None
    if log.impressions is not None:
        schema = log.impressions.collect_schema().names()
        there = [name for name in ("position", *names) if name in schema]
        frame = log.impressions.select("request", "user", "time", "shown", "clicked", *there)
        asked = frame.sort("time", "request").collect()
        pairs = asked.with_row_index("r").select("r", "shown").explode("shown", empty_as_null=False)
        chosen = (
            asked.with_row_index("r").select("r", "clicked").explode("clicked", empty_as_null=False)
        )
        hits = pairs.join(
            chosen.unique().with_columns(hit=True),
            left_on=["r", "shown"],
            right_on=["r", "clicked"],
            how="left",
            maintain_order="left",
        )["hit"].fill_null(False)
        items = pairs["shown"].unique(maintain_order=True)
        lengths = asked["shown"].list.len().to_numpy().astype(np.int64)
        requests = Requests(
            user=asked["user"],
            time=asked["time"].to_numpy(),
            shown=Ragged(
                np.concatenate([[0], np.cumsum(lengths)]),
                Vocab(items).encode(pairs["shown"]).astype(np.int64) - 1,
            ),
            items=items,
            clicked=hits.to_numpy(),
            context=_codes(asked, bundle),
            position=_positions(asked, lengths),
        )
    time = events["time"].to_numpy()
    if not bundle.timeline.timed:
        # Without a clock a later log goes on where each user's sequence ended.
        time = time + np.diff(bundle.timeline.user_offsets)[bundle.users.encode(events["user"])]
    return Later(
        events["user"], events["item"], time, _codes(events, bundle), requests,
        events["weight"].cast(pl.Float32).to_numpy(),
    )  # fmt: skip


def _positions(asked: pl.DataFrame, lengths: np.ndarray) -> np.ndarray | None:
    """(T,) declared positions of what was shown, -1 where there is none."""
    found = beside_shown(asked, "position", lengths)
    return None if found is None else np.where(np.isnan(found), -1, found).astype(np.int64)


def _codes(frame: pl.DataFrame, bundle: Bundle) -> np.ndarray:
    """(n, C) codes of the context columns; 0 for a column that the log does not have."""
    columns = [
        column.encode(frame[CONTEXT + column.name])
        if CONTEXT + column.name in frame.columns
        else np.zeros(len(frame), np.int32)
        for column in bundle.contexts
    ]
    return np.stack(columns, 1).astype(np.int64) if columns else np.empty((len(frame), 0), np.int64)


def extend(bundle: Bundle, later: Later) -> tuple[Bundle, CodedLater]:
    """The bundle with later events, items and users appended, and the events in its rows.

    Items that the bundle does not know have no id vector and no content. They become candidates,
    each from its own first moment on, only for towers that read item statistics; for others they
    are targets that cannot be hit. Nothing is learned from what is appended.
    """
    users, items = bundle.users.extended(later.user.unique(maintain_order=True)), bundle.items
    items = items.extended(later.item.unique(maintain_order=True))
    requests = later.requests
    if requests is not None:
        users = users.extended(requests.user.unique(maintain_order=True))
        items = items.extended(requests.items)
    empty = np.empty(0, np.int64)
    width = later.context.shape[1]
    coded = CodedLater(
        user=users.encode(later.user).astype(np.int64),
        item=items.encode(later.item).astype(np.int64),
        time=later.time,
        context=later.context,
        request_user=empty if requests is None else users.encode(requests.user).astype(np.int64),
        request_time=empty if requests is None else requests.time,
        request_context=np.empty((0, width), np.int64) if requests is None else requests.context,
        shown=Ragged.empty(0)
        if requests is None
        else Ragged(
            requests.shown.offsets,
            items.encode(requests.items).astype(np.int64)[requests.shown.values],
        ),
        clicked=np.empty(0, bool) if requests is None else requests.clicked,
        event_weight=later.event_weight,
        position=None if requests is None else requests.position,
    )
    timeline = _timeline(bundle.timeline, coded, users.size, items.size)
    new_items = items.size - bundle.items.size
    vectors = np.concatenate(
        [bundle.vectors, np.repeat(bundle.vectors[:1], new_items, axis=0)]  # nothing known of them
    )
    catalog = pl.concat(
        [bundle.catalog, pl.DataFrame({"item": items.ids[len(bundle.items.ids) :]})],
        how="diagonal",
    )
    extended = replace(
        bundle,
        model=_model(bundle.model, items.size, users.size),
        items=items,
        users=users,
        catalog=catalog,
        window=np.concatenate([bundle.window, np.full((new_items, 2), [ALWAYS, NEVER])]),
        timeline=timeline,
        vectors=vectors,
        known_items=bundle.known_items or bundle.items.size,
    )
    return extended, coded


def _timeline(past: Timeline, later: CodedLater, n_users: int, n_items: int) -> Timeline:
    shown_time = np.repeat(later.request_time, later.shown.lengths)
    first = np.full(n_items, NEVER)
    np.minimum.at(first, later.item, later.time)
    np.minimum.at(first, later.shown.values, shown_time)
    # Known is what is strictly before: an item is there only after the event that it came with.
    first_seen, exists_from = first.copy(), np.where(first < NEVER, first + 1, NEVER)
    known = past.n_items
    first_seen[:known] = np.minimum(past.first_seen, first[:known])
    exists_from[:known] = np.minimum(past.exists_from, exists_from[:known])
    first_seen[0] = exists_from[0] = NEVER
    has_requests = past.shown is not None or len(later.request_time) > 0
    return past.extended(
        later.user,
        later.item,
        later.time,
        n_users=n_users,
        first_seen=first_seen,
        exists_from=exists_from,
        shown_item=later.shown.values if has_requests else None,
        shown_time=shown_time if has_requests else None,
        event_weight=later.event_weight,
    )


def _model(model: TwoTower, n_items: int, n_users: int) -> TwoTower:
    """The same weights over longer feature tables; appended rows have no features."""
    longer = TwoTower.__new__(TwoTower)
    torch.nn.Module.__init__(longer)
    longer.rules, longer.item_spec, longer.user_spec, longer.context = (
        model.rules, model.item_spec, model.user_spec, model.context,
    )  # fmt: skip
    longer.items, longer.users = _longer(model.items, n_items), _longer(model.users, n_users)
    longer.item_tower, longer.user_tower = model.item_tower, model.user_tower
    longer.texts = None  # a bundle holds text vectors, whoever made them
    return longer.eval()


def _longer(table: FeatureTable, n_rows: int) -> FeatureTable:
    def grown(buffer: torch.Tensor | None) -> torch.Tensor | None:
        if buffer is None:
            return None
        return lengthened(buffer)

    def lengthened(buffer: torch.Tensor) -> torch.Tensor:
        return torch.cat([buffer, buffer.new_zeros(n_rows - len(buffer), *buffer.shape[1:])])

    known = dict(table.named_buffers())

    return FeatureTable(
        n_rows,
        text=grown(known.get("text")),
        vector=grown(known.get("vector")),
        numbers=grown(known.get("numbers")),
        categories={name: lengthened(table.codes(name)) for name in table.category_names},
    )
