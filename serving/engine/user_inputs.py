"""Inputs of the user tower and its vectors: one pass for all users that wait.

A history may name rows of the bundle and live items. Both are read as `TwoTower.embed_history`
gives them: live items were embedded when they came, rows of the bundle are now.

Legend: Q users, H history entries in all, N item rows, E dimensions of what histories read,
D dimensions of the stored vector.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from recsys.errors import QueryError, nearest
from recsys.features.batching.batch import Queries, query_side
from recsys.features.batching.examples import asking
from recsys.features.prepared.columns import ContextColumn
from recsys.ragged import Ragged
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.live.overlay import LiveView
from recsys.tables import SECOND

EMBEDDED_AT_ONCE = ENCODED_AT_ONCE = 16_384


@dataclass(frozen=True)
class UserInput:
    """What is known of who asks.

    Args:
        user: row; 0: nobody known.
        entries: (h,) int64 newest history entries, oldest first: item rows, or N + j for the live
            item j.
        elapsed: (h,) float32 seconds from each entry to now, NaN where not known; None: no entry
            has a time.
        event_weight: (h,) float32, NaN where not known; None: no entry has one.
        context: code of each context column.
        seen: item rows had before, however far back.
        seen_live: places of live items had before.
        nothing: nothing is known to recommend from.
    """

    user: int
    entries: np.ndarray
    elapsed: np.ndarray | None
    event_weight: np.ndarray | None
    context: tuple[int, ...]
    seen: np.ndarray
    seen_live: tuple[int, ...]
    nothing: bool

    def without(self, place: int) -> UserInput:
        """The same, had the entry at this place never been."""

        def left(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else np.delete(values, place)

        return replace(
            self,
            entries=np.delete(self.entries, place),
            elapsed=left(self.elapsed),
            event_weight=left(self.event_weight),
        )


class UserInputs:
    """From queries to user vectors.

    Args:
        model: the bundle.

    Attributes:
        timed: whether the age of history entries is read.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._loaded, self._bundle = model, model.bundle
        self._towers = model.bundle.model.eval()
        rules = self._towers.rules
        self._size = self._bundle.items.size  # N
        self._length = rules.history.length
        self._newest = rules.history.length if rules.history.kind != "none" else 0
        self.timed = self._bundle.timeline.timed and "recency" in rules.history.inputs
        self._weighed = (
            self._bundle.timeline.event_weight is not None and "weight" in rules.history.inputs
        )
        self._contexts = {column.name: _coder(column) for column in self._bundle.contexts}
        self._unknown = (0,) * len(self._contexts)

    @cached_property
    def row_of(self) -> Callable[[str], int]:
        """External id → user row; 0: unknown."""
        return self._loaded.user_ids.row_of

    @cached_property
    def _embedded(self) -> torch.Tensor | None:
        """(N, E) what histories read, made once: statistics cost a pass over the newest events
        however few rows are asked for. None: towers without them embed the rows of a history.
        """
        if not self._towers.uses_statistics:
            return None
        as_of = self._loaded.as_of
        assert as_of is not None  # statistics need a clock
        parts = []
        with torch.inference_mode():
            for start in range(0, self._size, EMBEDDED_AT_ONCE):
                rows = np.arange(start, min(start + EMBEDDED_AT_ONCE, self._size))
                statistics = torch.from_numpy(self._bundle.timeline.statistics(rows, as_of))
                parts.append(self._towers.embed_history(torch.from_numpy(rows), statistics))
        return torch.cat(parts)

    # ------------------------------------------------------------------ who asks

    def known(
        self, user: str, view: LiveView, context: Mapping[str, str | float], as_of: int | None
    ) -> UserInput:
        """A user with what the bundle knows and what was posted since.

        Args:
            user: external id.
            view: what is live.
            context: of the request.
            as_of: microseconds of now, from which the age of an entry counts.
        """
        row, timeline, newest = self.row_of(user), self._bundle.timeline, self._newest
        start, end = int(timeline.user_offsets[row]), int(timeline.user_offsets[row + 1])
        rows = np.asarray(timeline.item[start:end], np.int64)
        # What nobody knows any more says nothing.
        posted = [
            (code, time, event_weight)
            for id, time, event_weight in view.events.get(user, ())
            if (code := self.code_of(id, view))
        ]
        fresh = np.array([code for code, _, _ in posted], np.int64)
        elapsed = event_weight = None
        if self.timed and as_of is not None:
            since = np.array([time for _, time, _ in posted], np.int64)
            times = _tail(np.concatenate([_tail(timeline.time[start:end], newest), since]), newest)
            # A clock a little ahead of ours is no reason to know nothing.
            elapsed = np.maximum((as_of - times) / SECOND, 0).astype(np.float32)
        if self._weighed and timeline.event_weight is not None:
            known = _tail(timeline.event_weight[start:end], newest)
            said = np.array([event_weight for _, _, event_weight in posted], np.float32)
            event_weight = _tail(np.concatenate([known, said]), newest).astype(np.float32)
        has_vector = 0 < row < self._loaded.told_apart
        return UserInput(
            user=row,
            entries=_tail(np.concatenate([_tail(rows, newest), fresh]), newest),
            elapsed=elapsed,
            event_weight=event_weight,
            context=self.context_of(context),
            seen=np.concatenate([rows, fresh[fresh < self._size]]) if posted else rows,
            seen_live=tuple(code - self._size for code, _, _ in posted if code >= self._size),
            nothing=not has_vector and not len(rows) and not posted,
        )

    def given(
        self,
        history: Sequence[str],
        view: LiveView,
        user: str | None,
        context: Mapping[str, str | float],
    ) -> tuple[UserInput, list[str]]:
        """Somebody with the given history, and the ids in it that nobody knows.

        What a known user had before counts as seen, not as history.
        """
        row_of, place, size = self._loaded.row_of, view.place, self._size
        codes, unknown = [], []
        for id in history:
            live = place.get(id) if place else None
            if code := row_of(id) if live is None else size + live:
                codes.append(code)
            else:
                unknown.append(id)
        row = 0 if user is None else self.row_of(user)
        entries = np.array(codes, np.int64)
        seen = entries[entries < size] if place else entries
        seen_live = tuple(code - size for code in codes if code >= size) if place else ()
        if user is not None:
            before = self.known(user, view, {}, None)
            seen = np.concatenate([before.seen, seen])
            seen_live += before.seen_live
        user_input = UserInput(
            user=row,
            entries=_tail(entries, self._newest),
            elapsed=None,
            event_weight=None,
            context=self.context_of(context),
            seen=seen,
            seen_live=seen_live,
            nothing=not codes and not 0 < row < self._loaded.told_apart,
        )
        return user_input, unknown

    def code_of(self, id: str, view: LiveView) -> int:
        """History entry of an item id; 0: nobody knows it. What was deleted still says something of
        those who had it.
        """
        live = view.place.get(id)
        return self._loaded.row_of(id) if live is None else self._size + live

    def name_of(self, code: int, view: LiveView) -> str:
        """Item id of a history entry."""
        if code >= self._size:
            return view.ids[code - self._size]
        return self._loaded.ids.decode([code])[0]

    def context_of(self, context: Mapping[str, str | float]) -> tuple[int, ...]:
        """Code of each context column; 0 where nothing is said or the value was never met.

        Raises:
            QueryError: a column that the model does not read, or no number where one is read.
        """
        if not context:
            return self._unknown
        for name in context:
            if name not in self._contexts:
                known = nearest(name, self._contexts) if self._contexts else "It reads none."
                raise QueryError(f"This model reads no context {name!r}. {known}")
        return tuple(
            code(context[name]) if name in context else 0 for name, code in self._contexts.items()
        )

    # ------------------------------------------------------------------ what they ask by

    def encode(self, inputs: Sequence[UserInput], view: LiveView) -> np.ndarray:
        """(Q, D) float32 user vectors."""
        lengths = [len(one.entries) for one in inputs]
        queries = Queries(
            np.array([one.user for one in inputs], np.int64),
            Ragged(np.cumsum([0, *lengths]), np.concatenate([one.entries for one in inputs])),
            context=np.array([one.context for one in inputs], np.int64),
            elapsed=_beside([one.elapsed for one in inputs], lengths),
            event_weight=_beside([one.event_weight for one in inputs], lengths),
        )
        return self.encode_queries(queries, view)

    def encode_queries(self, queries: Queries, view: LiveView | None = None) -> np.ndarray:
        """(Q, D) float32 user vectors of queries, in blocks.

        Args:
            queries: history entries are item rows, or N + j for the live item j.
            view: what is live; None: nothing.
        """
        out = np.empty((len(queries), self._towers.vector_dimension), np.float32)
        with torch.inference_mode():
            for start in range(0, len(queries), ENCODED_AT_ONCE):
                part = queries
                if len(queries) > ENCODED_AT_ONCE:
                    end = min(start + ENCODED_AT_ONCE, len(queries))
                    part = queries.take(np.arange(start, end))
                side, codes = query_side(part, self._length)
                users = self._towers.encode_users(side, self.embed(codes, view))
                out[start : start + len(part)] = users.float().numpy()
        return out

    def queries(
        self,
        users: np.ndarray,
        times: np.ndarray | None = None,
        context: np.ndarray | None = None,
    ) -> Queries:
        """Queries of known user rows with what each had before its time.

        Args:
            users: (Q,) user rows.
            times: (Q,) microseconds; None: everything known, asked now.
            context: (Q, C) codes of the context columns, or None.
        """
        return asking(
            self._bundle.timeline, users, times, context, last=self._length,
            as_of=self._loaded.as_of,
        )  # fmt: skip

    def embed(self, codes: np.ndarray, view: LiveView | None) -> torch.Tensor:
        """(H, E) what histories read of entries."""
        live = codes >= self._size if view is not None and len(view.ids) else None
        if view is None or live is None or not live.any():
            return self._rows(torch.from_numpy(codes))
        out = torch.empty((len(codes), view.entries.shape[1]))
        of_live = torch.from_numpy(live)
        out[of_live] = torch.from_numpy(view.entries[codes[live] - self._size])
        out[~of_live] = self._rows(torch.from_numpy(codes[~live])).float()
        return out

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        if self._embedded is not None:
            return self._embedded[rows]
        return self._towers.embed_history(rows)


def _tail(values: np.ndarray, newest: int) -> np.ndarray:
    return values[len(values) - min(newest, len(values)) :]


def _beside(parts: Sequence[np.ndarray | None], lengths: Sequence[int]) -> np.ndarray | None:
    """(H,) float32 of all users, NaN for those of whom it is not known; None: of nobody."""
    if all(part is None for part in parts):
        return None
    filled = [
        np.full(length, np.nan, np.float32) if part is None else part
        for part, length in zip(parts, lengths, strict=True)
    ]
    return np.concatenate(filled)


def _coder(column: ContextColumn) -> Any:
    """A function from one value to its code; `ContextColumn.encode` is for tables."""
    if column.vocab is not None:
        codes = {id: code for code, id in enumerate(column.vocab.ids.to_list(), 1)}
        return lambda value: codes.get(_text(value), 0)
    edges = column.edges or []

    def code(value: str | float) -> int:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise QueryError(
                f"The context {column.name!r} is {value!r}, which is no number."
            ) from None
        return bisect_left(edges, number) + 1 if np.isfinite(number) else 0

    return code


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else str(value)


__all__ = ["UserInput", "UserInputs"]
