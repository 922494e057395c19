"""One plain question by a vector or for somebody, answered from the graph as JSON.

What an engine does for many questions at once costs one alone as much as the graph does. Whatever
is unusual about a question, a model or the state of the catalogue is left to the engine.
"""

from __future__ import annotations

import numpy as np

from recsys.errors import QueryError
from recsys.search import LARGEST
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Query
from recsys.serving.engine.quick import written
from recsys.serving.engine.resolve import Resolver
from recsys.serving.engine.snapshot import FIRST_TRY, CatalogSnapshot
from recsys.serving.engine.user_inputs import UserInputs
from recsys.serving.index import HnswIndex


class Plain:
    """The plain questions of one model.

    Args:
        served: the model.
        askers: who may ask.
        reader: makes questions of asks.
    """

    def __init__(self, served: LoadedModel, askers: UserInputs, reader: Resolver) -> None:
        self._served, self._askers, self._reader = served, askers, reader
        index = served.bundle.index
        self._index = index if isinstance(index, HnswIndex) else None
        self._shape = (served.bundle.model.vector_dimension,)
        self._one = len(served.bundle.model.user_shape) == 1

    def answer(self, ask: Query, stock: CatalogSnapshot) -> bytes | None:
        """The answers of a quick ask (see `batcher.quick`) as JSON without brackets;
        None: it is not plain, or not well asked, and the engine says what is to be said.
        """
        index = self._index
        closed = stock.open.mask is not None or len(stock.extra) > 0
        if index is None or closed or ask.k > stock.n or ask.fields is not None:
            return None
        if ask.kind == "vector":
            vector = ask.vector
            if vector is None or vector.shape != self._shape:
                return None
            if not np.abs(vector).max() <= LARGEST:  # NaN is not, either
                return None
            found = index.nearest(vector, ask.k)
        elif ask.kind == "recommend" and self._one:
            try:
                question = self._reader.read(0, ask, stock)
            except QueryError:
                return None
            if question.asker is None or question.notes:
                return None
            out = question.exclude.tolist()
            vector = self._askers.encode([question.asker], stock.view)[0]
            found = index.nearest(vector, ask.k, frozenset(out), min(len(out), ask.k + FIRST_TRY))
        else:
            return None
        if found is None:
            return None
        rows = self._served.bundle.rows[found[0]].tolist()
        return written(self._served.ids.fragments(rows), found[1])


__all__ = ["Plain"]
