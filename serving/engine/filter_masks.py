"""What a filter lets through, of all that may be answered now.

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

CHOICES = 16
"""Filters whose choice is kept until the live items change; one over a million items is a
megabyte."""
MANY = 64
"""Denied items from which on they make a choice of their own instead of being fetched and left."""


class FilterMasks:
    """From filters to choices; safe to use from several threads.

    Args:
        bundle: whose catalogue is filtered.
        limit: bytes of masks over columns that are kept; and of choices, with what was asked.
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
        """Bytes of the choices that are kept, and of the filters they were made of."""
        return sum(size for _, size in self._known.values())

    def of(self, filter: Filter, stock: CatalogSnapshot) -> AllowedItems:
        """What a filter lets through.

        Raises:
            QueryError: an unknown column, or a value that its type cannot hold.
        """
        if filter.empty:
            return stock.open
        if filter.allow is not None:
            return self._listed(filter, stock)
        if len(filter.deny) <= MANY:
            filter = replace(filter, deny=())  # left out of what is found
            if filter.empty:
                return stock.open
        said = filter.key()
        key = stock, said
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known[0]
        choice = self._chosen(filter, stock)
        masks = choice.extra.nbytes + (0 if choice.mask is None else choice.mask.nbytes)
        size = masks + key_bytes(said) + ENTRY_BYTES
        with self._lock:
            self._known[key] = choice, size
            # What was open before something changed is asked for no more.
            for old in [old for old in self._known if old[0] is not stock]:
                del self._known[old]
            while len(self._known) > CHOICES or (self.held > self._limit and len(self._known) > 1):
                self._known.popitem(last=False)
        return choice

    def _chosen(self, filter: Filter, stock: CatalogSnapshot) -> AllowedItems:
        mask, open_mask = self._filters.mask(filter), stock.open.mask
        if mask is not None and open_mask is not None:
            mask = mask & open_mask
        elif mask is None:
            mask = open_mask
        extra = stock.open.extra & self._extra_of(filter, stock)
        denied = places_of(filter.deny, stock)
        if len(denied):
            mask = np.ones(stock.n, bool) if mask is None else mask.copy()
            mask[denied[denied < stock.n]] = False
            extra[denied[denied >= stock.n] - stock.n] = False
        count = stock.n if mask is None else int(np.count_nonzero(mask))
        return AllowedItems(mask, count, extra)

    def _extra_of(self, filter: Filter, stock: CatalogSnapshot) -> np.ndarray:
        """(X,) bool: which live items and late rows meet the conditions."""
        meets = np.ones(len(stock.extra), bool)
        if len(meets) and (filter.equals or filter.ranges):
            meets[: stock.live] = self._filters.mask_of(stock.view.fields, filter)
            if len(stock.late):
                late = self._catalog[stock.late - 1]
                meets[stock.live :] = self._filters.mask_of(late, filter)
        return meets

    def _listed(self, filter: Filter, stock: CatalogSnapshot) -> AllowedItems:
        """A list of ids says how few there can be: no mask over the catalogue is made of it."""
        places = np.unique(places_of(filter.allow or (), stock))
        places = places[~np.isin(places, places_of(filter.deny, stock))]
        positions = places[places < stock.n]
        if stock.open.mask is not None:
            positions = positions[stock.open.mask[positions]]
        if (mask := self._filters.mask(filter)) is not None:
            positions = positions[mask[positions]]
        extra = np.zeros(len(stock.extra), bool)
        extra[places[places >= stock.n] - stock.n] = True
        extra &= stock.open.extra & self._extra_of(filter, stock)
        return AllowedItems(None, len(positions), extra, positions)


def places_of(ids: Sequence[str], stock: CatalogSnapshot) -> np.ndarray:
    """Places of ids, those that cannot be answered left out."""
    places = np.array([stock.place_of(id) for id in ids], np.int64)
    return places[places >= 0]


__all__ = ["MANY", "FilterMasks", "places_of"]
