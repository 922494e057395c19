"""Pagination: cursors over an exact ranking.

A cursor holds what the next page needs: the last answer's score and place, how many came before,
and the vectors that ask, because a click between two pages moves those and would shuffle
everything. It holds no secret and grants nothing: whoever forges one asks by a vector, which
anybody may. Its digest tells damage from what we gave.

Scores of a product of matrices differ in their last bits with the number of rows. The order is
therefore by sums in float64 of each row alone, which only the candidates near a cut are given.

Legend: n index positions, D dimensions, T things that may be answered, k answers of a page.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from recsys.errors import QueryError
from recsys.serving.engine.query import CursorError, Query

FORMAT = 2
_HEAD = struct.Struct("<B6s8sqdIqBHI")
"""Format, version, question, generation, score, answers before, place and its kind, bytes of id,
interests."""
MOST_BEFORE = 1 << 30
"""Answers before; positions of what was shown are written down as int32."""
DIGEST = 8
AT_ONCE = 1 << 16
"""Rows whose exact scores are made at once."""
INDEXED, LATE, LIVE = 0, 1, 2
"""Kinds of places, in the order in which equal scores are answered: index positions by number, item
rows that came to be available after the bundle was made, live items by id."""

Key = tuple[int, int, str]
"""Kind of place, its number (0 for live items), and its id (empty but for live items)."""


@dataclass(frozen=True)
class Cursor:
    """Where a page ended.

    Args:
        version: of the model.
        question: digest of what was asked.
        generation: of the live items when the first page was given; later ones are not shown.
        score: of the last answer, exactly.
        key: of the last answer; orders equal scores.
        vectors: (K, D) float32 that ask; none: the most popular items answer.
        before: answers on this page and those before it.
    """

    version: str
    question: bytes
    generation: int
    score: float
    key: Key
    vectors: np.ndarray
    before: int = 0

    def encode(self) -> str:
        """Letters that may stand in a URL."""
        kind, number, id = self.key
        name, vectors = id.encode(), np.ascontiguousarray(self.vectors, np.float32)
        if len(name) > 0xFFFF:
            raise QueryError(
                "The id of the last answer is too long for a cursor; ask by k instead."
            )
        body = _HEAD.pack(
            FORMAT, _version(self.version), self.question, self.generation, self.score,
            self.before, number, kind, len(name), len(vectors),
        )  # fmt: skip
        body += name + vectors.astype("<f4").tobytes()
        return base64.urlsafe_b64encode(body + _digest(body)).decode().rstrip("=")

    @staticmethod
    def decode(text: str, *, version: str, question: bytes, dimension: int) -> Cursor:
        """Read what `encode` wrote.

        Args:
            text: the cursor.
            version: of the model that is asked now.
            question: digest of what is asked now.
            dimension: D of the model's vectors.

        Raises:
            CursorError: it is not ours, of another question, or of another model version (`gone`).
        """
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            body, digest = raw[:-DIGEST], raw[-DIGEST:]
            if base64.urlsafe_b64encode(raw).decode().rstrip("=") != text:
                raise ValueError("bits beyond the end")
            if digest != _digest(body):
                raise ValueError("another digest")
            form, said, asked, generation, score, before, number, kind, length, interests = (
                _HEAD.unpack_from(body)
            )
            rest = body[_HEAD.size :]
            name, values = rest[:length].decode(), np.frombuffer(rest[length:], "<f4")
        except (ValueError, binascii.Error, struct.error, UnicodeError):
            raise CursorError(
                "The cursor is damaged or none of ours. Give it as the answer before had it in "
                "`next`, or ask for the first page without one."
            ) from None
        if form != FORMAT or said != _version(version):
            raise CursorError(
                f"The cursor belongs to another version of the model; {version} answers now. "
                "Begin again with the first page, without a cursor.",
                gone=True,
            )
        if asked != question:
            raise CursorError(
                "The cursor belongs to another question. Query the same as for the page before, "
                "only k and fields may differ; or begin with the first page, without a cursor."
            )
        if len(values) != interests * dimension or not (
            np.isfinite(values).all() and np.isfinite(score) and before < MOST_BEFORE
        ):
            raise CursorError("The cursor does not fit this model. Begin without a cursor.")
        vectors = values.reshape(interests, dimension).astype(np.float32)
        return Cursor(version, question, generation, score, (kind, number, name), vectors, before)


def _version(version: str) -> bytes:
    return blake2b(version.encode(), digest_size=6).digest()


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST, person=b"recsys page").digest()


def question_of(ask: Query) -> bytes:
    """(8 bytes) digest of what decides the ranking; k and fields may change from page to page."""
    plain = replace(
        ask, k=1, fields=None, paged=True, cursor=None, explain=False, exact=True, vector=None
    )
    said: list[Any] = [getattr(plain, name) for name in plain.__dataclass_fields__]
    said = [sorted(one.items()) if isinstance(one, Mapping) else one for one in said]
    said[list(plain.__dataclass_fields__).index("filter")] = ask.filter.key()
    vector = b"" if ask.vector is None else np.ascontiguousarray(ask.vector, np.float32).tobytes()
    return blake2b(repr(said).encode() + vector, digest_size=8).digest()


def exact_scores(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(T,) float64 best inner product with any of the queries; each row's sum is its own.

    Args:
        vectors: (T, D) float32.
        queries: (K, D) float32.
    """
    out = np.empty(len(vectors))
    for start in range(0, len(vectors), AT_ONCE):
        # Products of two float32 are exact in float64; a row's sum never depends on other rows.
        wide = vectors[start : start + AT_ONCE].astype(np.float64)
        each = [(wide * query.astype(np.float64)).sum(axis=1) for query in queries]
        out[start : start + AT_ONCE] = np.maximum.reduce(each)
    return out + 0.0  # -0 is 0


def cut(
    scores: np.ndarray,
    slack: float,
    exactly: Callable[[np.ndarray], np.ndarray],
    ranks: Callable[[np.ndarray], np.ndarray],
    k: int,
    after: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The k things that follow, best first, equals by their rank.

    One pass over all scores, whichever page it is; only those near the cut are looked at closely.

    Args:
        scores: (T,) float32, roughly; -inf is never answered. Written over.
        slack: no score is further than this from the exact one.
        exactly: places (c,) → exact scores (c,) float64.
        ranks: places (c,) → (c,) distinct numbers that order equals.
        k: answers wanted.
        after: exact score and rank of the answer before; None: the first page.

    Returns:
        places (m,) int64, m <= k; their exact scores (m,); whether anything follows.
    """
    wanted = k + 1
    if after is not None:
        scores[scores > after[0] + slack] = -np.inf
        wanted += int(np.count_nonzero(scores >= after[0] - slack))
    if not len(scores):
        return np.empty(0, np.int64), np.empty(0), False
    best = torch.from_numpy(scores).topk(min(wanted, len(scores)), sorted=False)
    near = np.flatnonzero((scores >= float(best.values.min()) - 2 * slack) & (scores > -np.inf))
    exact, rank = exactly(near), ranks(near)
    if after is not None:
        behind = (exact < after[0]) | ((exact == after[0]) & (rank > after[1]))
        near, exact, rank = near[behind], exact[behind], rank[behind]
    order = np.lexsort((rank, -exact))[: k + 1]
    return near[order[:k]], exact[order[:k]], len(order) > k


__all__ = ["INDEXED", "LATE", "LIVE", "Cursor", "Key", "cut", "exact_scores", "question_of"]
