"""HNSW search behind the `Index` protocol; the only file that imports hnswlib.

hnswlib reads past its arrays, loads damaged files and fails to save without a word, so everything
is checked before native code and read back after it. Around the graph stands a planner: what a
graph answers badly (small catalogues, narrow filters, long exclusions) the exact product answers.
Legend: N rows, D dimensions, Q queries, k answers, G distinct vectors (nodes of the graph).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import hnswlib
import numpy as np
import torch
from pydantic import Field, model_validator

from recsys.errors import BundleError
from recsys.files import atomic_write, read_json, sha256_bytes, sha256_file, write_json
from recsys.ragged import Ragged, gather
from recsys.search import ExactIndex, Index, check_filters, check_queries
from recsys.tables import Strict

FORMAT = "recsys hnsw 1"
ANSWERS_AT_ONCE = 1 << 18
"""Candidates that one block of a search may hold: rescoring gathers a vector for each."""
MARKS_AT_ONCE = 1 << 23
"""Bytes of the table that marks excluded rows of a block of queries; small enough for a cache."""
ADDED_AT_ONCE = 10_000


class IndexRules(Strict):
    """How items are searched ([index])."""

    kind: Literal["auto", "hnsw", "exact"] = "auto"
    """exact: the product with every item. hnsw: a navigable small-world graph. auto: exact where a
    graph would not be quicker (up to 10,000 items with the defaults), else hnsw."""
    m: int = Field(16, ge=2, le=128)
    """Links of a node; more is more memory (8 bytes each) and higher recall."""
    ef_construction: int = Field(200, ge=8, le=10_000)
    """Breadth of the search that finds a new node's links."""
    ef: int = Field(100, ge=1, le=100_000)
    """Least breadth of a lookup; it is never less than twice the answers to be fetched."""
    threads: int = Field(1, ge=0)
    """Of the build; 0: all cores. Only a build with one thread gives the same graph twice."""
    neighbours: int = Field(100, ge=0, le=1000)
    """Nearest items of every item that a bundle holds ready, so that what is like an item needs no
    search (8 bytes each on disk); 0: none."""

    @model_validator(mode="after")
    def _of_the_kind(self) -> Self:
        if self.kind == "exact":
            fields = type(self).model_fields
            for name in ("m", "ef_construction", "ef", "threads"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(
                        f'{name} is of the graph, and kind = "exact" has none: set kind to "auto" '
                        f'or "hnsw", or leave {name} out.'
                    )
        return self


class GraphRules(IndexRules):
    """What decides a graph and its lookups beyond [index], the same for every run."""

    space: Literal["auto", "plain", "lifted"] = "auto"
    """lifted: one more dimension makes all items equally long, which turns the largest inner
    product into the nearest neighbour. auto: when lengths differ, but the longest is at most 3
    times the median. Unit vectors (cosine) are never lifted."""
    seed: int = Field(0, ge=0, lt=2**31)
    exact_below: float = Field(0.25, ge=0, le=1)
    """A filter that keeps less than this share of the rows is answered by the exact product."""
    exact_breadth: float = Field(0.01, ge=0, le=1)
    """A lookup broader than this share of the rows is answered by the exact product, which is then
    as fast and misses nothing (measured: equally fast at .006 in batches, .0125 one by one)."""


def graph_rules(rules: IndexRules | None) -> GraphRules:
    """The rules of a graph as [index] says, with the rest as it always is."""
    if isinstance(rules, GraphRules):
        return rules
    return GraphRules(**({} if rules is None else rules.model_dump()))


def build_index(
    vectors: np.ndarray,
    rules: IndexRules | None = None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """The index that `rules` ask for.

    Args:
        vectors: (N, D) float32, finite.
        rules: how; the defaults when absent.
        progress: is told the number of vectors added, now and then.

    Raises:
        QueryError: vectors of another shape or dtype, or not finite.
    """
    rules = graph_rules(rules)
    never = rules.ef >= rules.exact_breadth * len(vectors)  # no lookup would reach the graph
    if rules.kind == "exact" or (rules.kind == "auto" and never):
        return ExactIndex(vectors)
    return HnswIndex(vectors, rules, progress)


class HnswIndex:
    """A navigable small-world graph (Malkov and Yashunin, 2020) with an exact fall-back.

    Safe to search from several threads: after the build nothing changes. hnswlib's `ef` is a field
    of the graph that concurrent callers would overwrite, so a broader search is asked for as more
    answers, of which the best are kept. Equal vectors (and all zero vectors) share one node,
    since duplicates cut a graph into pieces.

    Args:
        vectors: (N, D) float32, finite; kept, not copied.
        rules: how to build and search.
        progress: is told the number of vectors added, now and then.

    Raises:
        QueryError: vectors of another shape or dtype, or not finite.
    """

    _graph: Any

    def __init__(
        self,
        vectors: np.ndarray,
        rules: IndexRules | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._prepare(vectors, graph_rules(rules))
        if self._nodes == 0:
            return
        self._graph = self._empty_graph()
        self._graph.init_index(
            self._nodes, M=self.rules.m, ef_construction=self.rules.ef_construction,
            random_seed=self.rules.seed,
        )  # fmt: skip
        # In parts, so that progress shows; with one thread the graph is the same as in one go.
        for start in range(0, self._nodes, ADDED_AT_ONCE):
            labels = np.arange(start, min(start + ADDED_AT_ONCE, self._nodes))
            self._graph.add_items(
                self._points(labels), labels, num_threads=self.rules.threads or -1
            )
            if progress is not None:
                progress(len(labels))
        self._graph.set_ef(self.rules.ef)

    def _prepare(self, vectors: np.ndarray, rules: GraphRules) -> None:
        self.exact = ExactIndex(vectors)
        self.rules = rules
        self._vectors = np.ascontiguousarray(vectors)
        self._first, self._members = distinct(self._vectors)
        self._nodes = self.size if self._first is None else len(self._first)
        lengths = lengths_of(self._vectors)
        if self._first is not None:
            lengths = lengths[self._first]  # (G,)
        self._longest = float(lengths.max(initial=0.0))
        self._lifted = lifts(lengths, rules.space)
        if abs(self._longest - 1) <= UNIT_TOLERANCE and not self._lifted:
            self._longest = 1.0  # unit vectors: the graph holds them as they are
        self._graph = None

    def _remember(self, vectors: np.ndarray, rules: GraphRules, about: dict[str, Any]) -> None:
        """As `_prepare`, from what was written of vectors that are known to be the same."""
        self.exact = ExactIndex(vectors, checked=True)
        self.rules = rules
        self._vectors = np.ascontiguousarray(vectors)
        self._first = self._members = None
        if about["nodes"] != self.size:
            self._first, self._members = distinct(self._vectors)
        self._nodes, self._longest = int(about["nodes"]), float(about["longest"])
        self._lifted = bool(about["lifted"])
        self._graph = None
        self.__dict__["vectors_digest"] = about["vectors"]

    def _empty_graph(self) -> Any:
        return hnswlib.Index(space="ip", dim=self.dimension + self._lifted)

    def _points(self, nodes: np.ndarray) -> np.ndarray:
        """What the graph holds of the nodes: vectors over the longest length, perhaps lifted.

        `sqrt(1 - |x|²)` as one more dimension makes all points unit vectors, and a query with 0
        there has the same inner products (Bachrach et al., 2014).
        """
        x = self._vectors[nodes if self._first is None else self._first[nodes]]
        x = (x / self._longest).astype(np.float32) if self._longest > NOTHING else 0 * x
        if not self._lifted:
            return x
        rest = np.maximum(0.0, 1.0 - np.square(lengths_of(x)))
        return self._lift(x, np.sqrt(rest))

    def _lift(self, points: np.ndarray, height: np.ndarray | None = None) -> np.ndarray:
        if self._lifted:
            points = np.column_stack([points, np.zeros(len(points)) if height is None else height])
        return np.ascontiguousarray(points, np.float32)

    @property
    def _as_they_are(self) -> bool:
        """Whether the graph holds the vectors themselves: its distances are then their scores."""
        return self._longest == 1.0 and not self._lifted and self._members is None

    def with_breadth(self, ef: int) -> HnswIndex:
        """The same graph, of which a lookup visits at least `ef` nodes."""
        broad = copy.copy(self)
        broad.rules = self.rules.model_copy(update={"ef": ef})
        return broad

    @property
    def size(self) -> int:
        return len(self._vectors)

    @property
    def dimension(self) -> int:
        return self._vectors.shape[1]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`; equal scores by the smaller row among those that were found."""
        check_queries(queries, self.dimension, k)
        check_filters(allowed, exclude, self.size, len(queries))
        if allowed is None and exclude is None:
            near = self._nearest(queries, k)
            if near is not None:
                return near
        fetch = np.full(len(queries), k, np.int64)  # rows of which k survive
        if exclude is not None:
            fetch += exclude.lengths
        kept = self.size if allowed is None else int(np.count_nonzero(allowed))
        if kept < self.size:
            # A filter is rarely independent of the query: a quarter more than its share.
            fetch = np.ceil(fetch * (1.25 * self.size / max(kept, 1))).astype(np.int64)
        broad = np.maximum(2 * fetch, self.rules.ef) > self.rules.exact_breadth * self.size
        lengths = lengths_of(queries)
        by_graph = ~broad & (lengths > NOTHING)
        narrow = kept < self.rules.exact_below * self.size
        if narrow or self._graph is None or not by_graph.any():
            return self.exact.search(queries, k, allowed=allowed, exclude=exclude)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for part in self._blocks(np.flatnonzero(by_graph), fetch, exclude is not None):
            skip = None if exclude is None else exclude.take(part)
            points = self._lift(queries[part] / lengths[part, None])
            found = self._from_graph(points, k, int(fetch[part].max()), allowed, skip)
            rows[part], scores[part] = self._ranked(queries[part], found)
            # A short answer may be all there is, or a part of the graph out of reach.
            by_graph[part] = rows[part, -1] >= 0
        rest = np.flatnonzero(~by_graph)
        if len(rest):
            skip = None if exclude is None else exclude.take(rest)
            rows[rest], scores[rest] = self.exact.search(
                queries[rest], k, allowed=allowed, exclude=skip
            )
        return rows, scores

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A few queries without filters, in one go: what `search` would find, in half the time.

        None: something is unusual, which `search` sees to.
        """
        breadth = max(2 * k, self.rules.ef)
        few = 0 < len(queries) * breadth <= ANSWERS_AT_ONCE
        if self._graph is None or not few or breadth > self.rules.exact_breadth * self.size:
            return None
        lengths = lengths_of(queries)
        if lengths.min() <= NOTHING:
            return None
        points = self._lift(queries / lengths[:, None])
        if self._as_they_are:
            if (found := self._within_reach(points, breadth)) is None:
                return None
            rows = found[0][:, :k].astype(np.int64)
            scores = ((1 - found[1][:, :k]) * lengths[:, None]).astype(np.float32)
            order = np.lexsort((rows, -scores), axis=1)
            return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        rows = self._from_graph(points, k, k, None, None)
        if rows[:, -1].min() < 0:
            return None
        return self._ranked(queries, rows)

    def nearest(
        self, query: np.ndarray, k: int, out: Collection[int] = (), room: int = 0
    ) -> tuple[list[int], list[float]] | None:
        """One query with nothing but rows to leave out, in half the time of `search`.

        Args:
            query: (D,) float32, finite.
            k: answers wanted.
            out: rows never to answer with, of which a lookup makes room for `room`.

        Returns:
            k rows, best first, equals by the smaller, and k scores; None: it is unusual, or too
            little was found, and `search` sees to it.
        """
        breadth = max(2 * (k + room), self.rules.ef)
        usual = self._graph is not None and self._members is None
        if not usual or breadth > self.rules.exact_breadth * self.size:
            return None
        length = math.sqrt(float(query @ query))
        if not NOTHING < length < math.inf:
            return None
        point = query / np.float32(length)
        if self._lifted:
            point = np.append(point, np.float32(0))
        if (found := self._within_reach(point, min(self._nodes, breadth))) is None:
            return None
        # A few plain numbers are ordered sooner than arrays of them; what is left over is not read:
        # many queries at once are answered from so many, too.
        end = k + room
        pairs = zip(found[1][0, :end].tolist(), found[0][0, :end].tolist(), strict=True)
        kept = sorted(islice((pair for pair in pairs if pair[1] not in out), k))
        if len(kept) < k:
            return None
        rows = [row for _, row in kept]
        if self._as_they_are:
            return rows, [(1 - away) * length for away, _ in kept]
        scores = self._vectors[rows] @ query
        order = np.lexsort((rows, -scores))
        return [rows[place] for place in order.tolist()], scores[order].tolist()

    def _blocks(self, chosen: np.ndarray, fetch: np.ndarray, marks: bool) -> list[np.ndarray]:
        """The chosen queries in blocks that fetch about alike and fit into little memory."""
        if not len(chosen):
            return []
        if fetch.min() == fetch.max():
            level = np.zeros(len(chosen), np.int64)
        else:
            level = np.log2(fetch[chosen] / fetch[chosen].min()).astype(np.int64)
        blocks = []
        for one in range(int(level.max()) + 1):
            part = chosen[level == one]
            if not len(part):
                continue
            step = max(1, ANSWERS_AT_ONCE // self._breadth(int(fetch[part].max())))
            if marks:
                step = min(step, max(32, MARKS_AT_ONCE // self.size))
            blocks += [part[start : start + step] for start in range(0, len(part), step)]
        return blocks

    def _breadth(self, fetch: int) -> int:
        return min(self._nodes, max(self.rules.ef, 2 * fetch))

    def _within_reach(
        self, points: np.ndarray, breadth: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(b, breadth) nodes and distances, nearest first; None: fewer nodes are within reach."""
        try:
            nodes, distances = self._graph.knn_query(points, breadth, torch.get_num_threads())
        except RuntimeError:
            return None
        return nodes, distances

    def _from_graph(
        self,
        points: np.ndarray,
        k: int,
        fetch: int,
        allowed: np.ndarray | None,
        exclude: Ragged | None,
    ) -> np.ndarray:
        """(b, k) rows that may be answered, padded with -1 where the graph gives too few."""
        breadth = self._breadth(fetch)
        if (near := self._within_reach(points, breadth)) is None:
            return np.full((len(points), k), -1, np.int64)
        found = near[0].astype(np.int64)
        if self._members is not None:
            found = members_of(found, self._members, max(breadth, fetch))  # (b, w) padded with -1
        elif allowed is None and exclude is None:
            return found[:, :k]
        keep = found >= 0
        if allowed is not None:
            keep &= allowed[found]
        if exclude is not None:
            marked = np.zeros((len(points), self.size), bool)
            marked[exclude.row_of(), exclude.values] = True
            keep &= ~np.take_along_axis(marked, found, 1)
        return first_kept(found, keep, k)

    def _ranked(self, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows (b, k) best first, equals by the smaller, and their exact scores."""
        rows = np.sort(rows, axis=1)
        vectors = self._vectors[np.maximum(rows, 0)]  # (b, k, D)
        scores = np.matmul(vectors, queries[:, :, None])[:, :, 0]
        scores[rows < 0] = -np.inf
        order = (-scores).argsort(axis=1, kind="stable")
        line = np.arange(len(rows))[:, None]
        return rows[line, order], scores[line, order]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to `path` and what it belongs to beside it, as `path` + ".json".

        The graph is read back before it takes its name; the vectors are not written.

        Raises:
            BundleError: the disk did not take all of it.
        """
        path = Path(path)
        with atomic_write(path) as temporary:
            if self._graph is not None:
                self._graph.save_index(str(temporary))  # says nothing when the disk is full
                self._read_back(temporary)
            digest = sha256_file(temporary)
        about = {**self._about(), "longest": self._longest, "graph": digest}
        write_json(_sidecar(path), about)

    def _read_back(self, path: Path) -> None:
        written, expected = path.stat().st_size, self._graph.index_file_size()
        if written != expected:
            raise BundleError(
                f"{path.parent} took {written} of the {expected} bytes of an index. "
                "The disk is full, or a quota reached: make room and try again."
            )
        again = self._empty_graph()
        again.load_index(str(path), max_elements=self._nodes)
        again.set_ef(self.rules.ef)
        probe = self._points(np.arange(min(8, self._nodes)))
        first = [graph.knn_query(probe, k=1, num_threads=1)[0] for graph in (self._graph, again)]
        if not np.array_equal(*first):
            raise BundleError(f"The index written to {path.parent} answers otherwise when read.")

    @cached_property
    def vectors_digest(self) -> str:
        """Hex SHA-256 of the vectors it is over."""
        return sha256_bytes(self._vectors.data.cast("B") if self._vectors.size else b"")

    def _about(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dimension": self.dimension,
            "size": self.size,
            "nodes": self._nodes,
            "lifted": self._lifted,
            "vectors": self.vectors_digest,
        }

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        vectors: np.ndarray,
        rules: IndexRules | None = None,
        *,
        digest: str | None = None,
    ) -> HnswIndex:
        """Read what `save` wrote over the same vectors.

        Args:
            path: of the graph.
            vectors: (N, D) float32, those that it was built from.
            rules: how to search; `m`, `ef_construction` and `seed` are the graph's own.
            digest: of the vectors, when somebody has compared it and those of the files already:
                then no vector is read here, and a million are ready at once.

        Raises:
            BundleError: the file is missing or damaged, or belongs to other vectors.
        """
        path = Path(path)
        for file in (path, _sidecar(path)):
            if not file.is_file():
                raise BundleError(f"There is no index file {file}. Build the index again.")
        about = read_json(_sidecar(path))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise BundleError(f"{_sidecar(path)} does not describe an index of format {FORMAT!r}.")
        rules = graph_rules(rules)
        self = cls.__new__(cls)
        vouched = digest is not None and {"longest", "lifted", "nodes"} <= set(about)
        if vouched:
            (size, dimension), said = vectors.shape, digest
            found = {"dimension": dimension, "size": size, "vectors": said}
        else:
            space = "lifted" if about.get("lifted") else "plain"
            self._prepare(vectors, rules.model_copy(update={"space": space}))
            found = self._about()
        for name, value in found.items():
            if about.get(name) != value:
                raise BundleError(
                    f"{path} was built with {name} {about.get(name)}, but the vectors given "
                    f"have {value}. Build the index again from these vectors."
                )
        if vouched:
            self._remember(vectors, rules, about)
        else:
            # The library does not notice flipped bits, and crashes on some.
            of_file = sha256_file(path)
            if of_file != about["graph"]:
                raise BundleError(
                    f"{path} has the SHA-256 {of_file[:12]}…, but {_sidecar(path).name} says "
                    f"{str(about['graph'])[:12]}…. Copy it again or build the index again."
                )
        if self._nodes:
            self._graph = self._empty_graph()
            self._graph.load_index(str(path), max_elements=self._nodes)
            self._graph.set_ef(rules.ef)  # not stored; it would be 10
        self.rules = rules
        return self


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


UNIT_TOLERANCE = 1e-3
"""Vectors whose lengths differ by less, relatively, count as equally long."""
LIFT_SPREAD = 3.0
"""Longest vector over the median up to which lifting onto a sphere finds more than plain inner
products (20k × 64 at breadth 200, k = 100: biases .99 → 1.00 and .28 → 1.00; a dot product with
lognormal lengths, spread 24: .94 → .33)."""
NOTHING = 1e-30
"""A vector as short as this has no direction."""


def lengths_of(vectors: np.ndarray) -> np.ndarray:
    """(n,) Euclidean lengths, in float64 because squares of float32 may vanish or overflow."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def lifts(lengths: np.ndarray, space: str) -> bool:
    """Whether vectors of these lengths are lifted, see `GraphRules.space`."""
    if not len(lengths) or space == "plain":
        return False
    longest, median = float(lengths.max()), float(np.median(lengths))
    # A zero vector beside unit vectors scores 0 wherever it lies: not a reason to lift.
    positive = lengths[lengths > NOTHING]
    if not len(positive) or longest - float(positive.min()) <= UNIT_TOLERANCE * longest:
        return False
    return space == "lifted" or longest <= LIFT_SPREAD * median


def distinct(vectors: np.ndarray) -> tuple[np.ndarray | None, Ragged | None]:
    """First row of each distinct vector, in row order (G,), and the rows of each; None if N = G.

    Then every row is a node of its own. Zero and minus zero are equal.

    Args:
        vectors: (N, D) float32, finite.
    """
    key = np.zeros(len(vectors), np.uint64)
    random = np.random.default_rng(0)
    constants = random.integers(1, 2**64, (vectors.shape[1],), dtype=np.uint64) | np.uint64(1)
    for column, constant in enumerate(constants):  # over dimensions, not rows
        bits = (vectors[:, column] + np.float32(0)).view(np.uint32)  # -0 is 0
        key += (bits.astype(np.uint64) + np.uint64(column + 1)) * constant
        key ^= key >> np.uint64(29)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    if len(first) == len(vectors):
        return None, None
    if not np.array_equal(vectors, vectors[first[group]]):  # two vectors with one key: sort them
        _, first, group = np.unique(
            vectors + np.float32(0), axis=0, return_index=True, return_inverse=True
        )
        group = group.ravel()
    order = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[order] = np.arange(len(first))
    node = number[group]  # (N,)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(node), dtype=np.int64)])
    return first[order], Ragged(offsets, np.argsort(node, kind="stable"))


def members_of(nodes: np.ndarray, members: Ragged, width: int) -> np.ndarray:
    """The first `width` rows of the nodes (b, g), each node's in order; (b, width) with -1."""
    lengths = members.lengths[nodes]  # (b, g)
    before = np.cumsum(lengths, 1) - lengths
    taken = np.clip(width - before, 0, lengths)
    start = members.offsets[nodes]
    flat = gather(members.values, start.ravel(), (start + taken).ravel()).values
    out = np.full((len(nodes), width), -1, np.int64)
    out[np.arange(width) < taken.sum(1, keepdims=True)] = flat
    return out


def first_kept(rows: np.ndarray, keep: np.ndarray, k: int) -> np.ndarray:
    """(b, k) the first k kept rows of each query, padded with -1."""
    if rows.shape[1] >= k and keep[:, :k].all():
        return rows[:, :k].copy()
    place = np.cumsum(keep, 1) - 1  # (b, w)
    query, column = np.nonzero(keep & (place < k))
    out = np.full((len(rows), k), -1, np.int64)
    out[query, place[query, column]] = rows[query, column]
    return out
