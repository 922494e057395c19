"""Masks of the items that a filter lets through, of all that may be answered now.

Legend: n index positions, X live items and late rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np

from recsys.serving.bundle import Bundle
from recsys.serving.engine.filters import ENTRY_BYTES, KEPT_BYTES, Filters, key_bytes
from recsys.serving.engine.query import Filter
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot

KEPT_MASKS = 16
"""Filters whose allowed is kept until the live items change; one over a million items is a
megabyte."""
MANY = 64
"""Denied items from which on they make a allowed of their own instead of being fetched and left."""


class FilterMasks:
    """From filters to masks; safe to use from several threads.

    Args:
        bundle: whose catalogue is filtered.
        limit: bytes of masks over columns that are kept; and of masks, with what was asked.
    """

    def __init__(self, bundle: Bundle, limit: int = KEPT_BYTES) -> None:
        self._catalog = bundle.catalog
        said = bundle.manifest.get("config", {}).get("data", {}).get("catalog", {})
        columns, separator = said.get("categories", ()), said.get("category_separator", "")
        self._filters = Filters(
            bundle.catalog, bundle.rows, limit, dict.fromkeys(columns, separator)
        )
        self._limit = limit
        self._known: OrderedDict[Any, tuple[AllowedItems, int]] = OrderedDict()
        self._lock = Lock()

    @property
    def held(self) -> int:
        """Bytes of the masks that are kept, and of the filters they were made of."""
        return sum(size for _, size in self._known.values())

    def of(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        """What a filter lets through.

        Raises:
            QueryError: an unknown column, or a value that its type cannot hold.
        """
        if filter.empty:
            return snapshot.open
        if filter.allow is not None:
            return self._listed(filter, snapshot)
        if len(filter.deny) <= MANY:
            filter = replace(filter, deny=())  # left out of what is found
            if filter.empty:
                return snapshot.open
        said = filter.key()
        key = snapshot, said
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known[0]
        allowed = self._chosen(filter, snapshot)
        held = allowed.extra.nbytes + (0 if allowed.mask is None else allowed.mask.nbytes)
        size = held + key_bytes(said) + ENTRY_BYTES
        with self._lock:
            self._known[key] = allowed, size
            # What was open before something changed is asked for no more.
            for old in [old for old in self._known if old[0] is not snapshot]:
                del self._known[old]
            while len(self._known) > KEPT_MASKS or (
                self.held > self._limit and len(self._known) > 1
            ):
                self._known.popitem(last=False)
        return allowed

    def _chosen(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        mask, open_mask = self._filters.mask(filter), snapshot.open.mask
        if mask is not None and open_mask is not None:
            mask = mask & open_mask
        elif mask is None:
            mask = open_mask
        extra = snapshot.open.extra & self._extra_of(filter, snapshot)
        denied = places_of(filter.deny, snapshot)
        if len(denied):
            mask = np.ones(snapshot.n, bool) if mask is None else mask.copy()
            mask[denied[denied < snapshot.n]] = False
            extra[denied[denied >= snapshot.n] - snapshot.n] = False
        count = snapshot.n if mask is None else int(np.count_nonzero(mask))
        return AllowedItems(mask, count, extra)

    def _extra_of(self, filter: Filter, snapshot: CatalogSnapshot) -> np.ndarray:
        """(X,) bool: which live items and late rows meet the conditions."""
        meets = np.ones(len(snapshot.extra), bool)
        if len(meets) and (filter.equals or filter.ranges):
            meets[: snapshot.live] = self._filters.mask_of(snapshot.view.fields, filter)
            if len(snapshot.late):
                late = self._catalog[snapshot.late - 1]
                meets[snapshot.live :] = self._filters.mask_of(late, filter)
        return meets

    def _listed(self, filter: Filter, snapshot: CatalogSnapshot) -> AllowedItems:
        """A list of ids says how few there can be: no mask over the catalogue is made of it."""
        places = np.unique(places_of(filter.allow or (), snapshot))
        places = places[~np.isin(places, places_of(filter.deny, snapshot))]
        positions = places[places < snapshot.n]
        if snapshot.open.mask is not None:
            positions = positions[snapshot.open.mask[positions]]
        if (mask := self._filters.mask(filter)) is not None:
            positions = positions[mask[positions]]
        extra = np.zeros(len(snapshot.extra), bool)
        extra[places[places >= snapshot.n] - snapshot.n] = True
        extra &= snapshot.open.extra & self._extra_of(filter, snapshot)
        return AllowedItems(None, len(positions), extra, positions)


def places_of(ids: Sequence[str], snapshot: CatalogSnapshot) -> np.ndarray:
    """Places of ids, those that cannot be answered left out."""
    places = np.array([snapshot.place_of(id) for id in ids], np.int64)
    return places[places >= 0]


__all__ = ["MANY", "FilterMasks", "places_of"]
