"""Gate for new models: golden queries, measured recall, sanity of vectors.

A golden file is a JSON list of objects:
    {"ask": {"kind": "similar", "items": ["a"], "k": 10},    as in a request to /v1/batch
     "must_include": ["b"],                                  each of these must be answered
     "expected": ["b", "c"], "min_overlap": 0.5}             at least this share of them must be

Legend: n indexed items, Q sampled queries, D dimensions, k answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from recsys.errors import DataError, QueryError
from recsys.files import write_json
from recsys.ragged import Ragged
from recsys.search import ExactIndex, Index, check_vectors
from recsys.serving.api.schemas import AnyRequest, Id, refusal
from recsys.serving.api.schemas import Strict as Asked
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Query
from recsys.serving.index import HnswIndex
from recsys.serving.live.overlay import Overlay
from recsys.tables import Strict

GOLDEN = "golden.json"
PRODUCTS_AT_MOST = 4e9
"""Multiplications of the exact search that the sample is measured against: a fraction of a second
on one core."""
Share = Annotated[float, Field(ge=0, le=1)]


class GateRules(Strict):
    """What a new model must show before it answers anybody."""

    golden: Path | None = None
    """File of golden questions; none: golden.json in the bundle, beside it or beside CURRENT, as
    far as there is one."""
    golden_overlap: Share = 0.5
    """Share of the `expected` items that must be among the answers where a question says none."""
    recall: Share = 0.95
    """Least share of the exact answers that the index finds now; refused when the sample is below
    by more than three standard errors."""
    neighbour_recall: Share = 0.99
    """Least share of the exact answers that the table of neighbours holds."""
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    """Answers that recall is measured over."""
    sample: Annotated[int, Field(ge=1, le=10_000)] = 256
    """Queries that it is measured with; fewer where the catalogue is so large that it would take
    longer than a fraction of a second."""
    catalogue: Share = 0.5
    """Least number of indexed items, as a share of those of the model before."""
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        refusals: a sentence for each reason to refuse; none: the model may take over.
        measured: recall, neighbour_recall, golden (questions asked), items and seconds.
    """

    refusals: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.refusals


def check(
    model: LoadedModel,
    previous: LoadedModel | None,
    rules: GateRules,
    *,
    folder: str | Path | None = None,
) -> Verdict:
    """Judge a new model.

    Args:
        model: the new model.
        previous: the one that answers now, if there is one.
        rules: what must hold.
        folder: the new bundle's folder, in and beside which golden questions are looked for.

    Raises:
        DataError: a golden file cannot be read, or the rules name one that is not there.
    """
    begin = time.monotonic()
    measured: dict[str, float] = {"items": len(model.bundle.rows)}
    # Vectors that are not finite make every later answer arbitrary, and native code unsafe.
    refusals = _sane(model, previous, rules)
    if not refusals:
        refusals = _recall(model, rules, measured)
        questions = golden_questions(folder, rules)
        measured["golden"] = len(questions)
        refusals += _golden(model, questions, rules)
    measured["seconds"] = time.monotonic() - begin
    return Verdict(tuple(refusals), measured)


def _sane(model: LoadedModel, previous: LoadedModel | None, rules: GateRules) -> list[str]:
    try:
        check_vectors(model.bundle.vectors)
    except QueryError as error:
        return [f"The item vectors are of no use: {error}"]
    now = len(model.bundle.rows)
    if now == 0:
        return ["The bundle has no item that may be answered."]
    before = 0 if previous is None else len(previous.bundle.rows)
    if now < rules.catalogue * before:
        return [
            f"The catalogue shrank from {before:,} to {now:,} items, below the share of "
            f"{rules.catalogue:g} that the gate demands."
        ]
    return []


# --- recall ---------------------------------------------------------------------------------------


def _recall(model: LoadedModel, rules: GateRules, measured: dict[str, float]) -> list[str]:
    bundle, table = model.bundle, model.neighbours
    size, dimension = len(bundle.rows), bundle.vectors.shape[1]
    approximate = not isinstance(bundle.index, ExactIndex)
    if not approximate and table is None:
        return []
    if table is not None and table.rows.shape[0] != size:
        return [f"The table of neighbours has {len(table.rows):,} rows for {size:,} items."]
    sample = min(rules.sample, size, max(8, int(PRODUCTS_AT_MOST / (size * dimension))))
    random = np.random.default_rng(rules.seed)
    places = np.sort(random.choice(size, sample, replace=False))  # (Q,)
    queries = bundle.vectors[bundle.rows[places]]  # (Q, D)
    itself = Ragged(np.arange(sample + 1), places)
    k = min(rules.k, max(1, size - 1))
    _, best = _exact(model).search(queries, k, exclude=itself)
    refusals = []
    if approximate:
        rows, _ = bundle.index.search(queries, k, exclude=itself)
        found = _found(model, queries, rows, best)
        measured["recall"] = float(found.mean())
        if _surely_below(found, rules.recall):
            refusals.append(_too_low("The index", found, k, rules.recall))
    if table is not None:
        width = min(k, table.rows.shape[1])
        rows = np.asarray(table.rows[places, :width], np.int64)
        if rows.max(initial=-1) >= size or rows.min(initial=0) < -1:
            return [*refusals, "The table of neighbours names items that the index has not."]
        if (rows == places[:, None]).any():
            return [*refusals, "The table of neighbours names an item as its own neighbour."]
        found = _found(model, queries, rows, best[:, :width])
        measured["neighbour_recall"] = float(found.mean())
        if _surely_below(found, rules.neighbour_recall):
            what = "The table of neighbours"
            refusals.append(_too_low(what, found, width, rules.neighbour_recall))
    return refusals


def _exact(model: LoadedModel) -> Index:
    index = model.bundle.index
    if isinstance(index, HnswIndex):
        return index.exact  # over the same memory
    return index


def _found(
    model: LoadedModel, queries: np.ndarray, rows: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """(Q,) share of the exact answers among the rows (Q, k); whichever of equals it is counts.

    Args:
        model: the model.
        queries: (Q, D).
        rows: index positions, -1 where there is none.
        best: (Q, k) exact scores, best first, -inf where there is none.
    """
    bundle = model.bundle
    vectors = bundle.vectors[bundle.rows[np.maximum(rows, 0)]]  # (Q, k, D)
    scores = np.einsum("qkd,qd->qk", vectors, queries)
    scores[rows < 0] = -np.inf
    # The same item twice is one answer.
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    scores = np.take_along_axis(scores, order, 1)
    scores[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -np.inf
    wanted = np.isfinite(best)
    last = np.where(wanted, best, np.inf).min(axis=1, keepdims=True)
    lengths = np.linalg.norm(vectors, axis=2).max(initial=0.0)
    slack = 1e-6 * np.linalg.norm(queries, axis=1, keepdims=True) * lengths
    right = (scores >= last - slack).sum(1)
    return np.minimum(right, wanted.sum(1)) / np.maximum(1, wanted.sum(1))


def _surely_below(found: np.ndarray, least: float) -> bool:
    """Whether the mean is below by more than the luck of a sample: three standard errors."""
    return bool(found.mean() + 3 * found.std() / np.sqrt(len(found)) < least)


def _too_low(what: str, found: np.ndarray, k: int, least: float) -> str:
    return (
        f"{what} finds {found.mean():.3f} of the exact {k} answers of {len(found)} sampled items, "
        f"below the {least:g} that the gate demands."
    )


# --- golden questions -----------------------------------------------------------------------------


class Golden(Asked):
    """A question with what its answer must hold; see the head of this file."""

    ask: AnyRequest
    must_include: list[Id] = Field(default_factory=list)
    expected: list[Id] = Field(default_factory=list)
    min_overlap: Share | None = None


_FILE = TypeAdapter(list[Golden])


def golden_questions(folder: str | Path | None, rules: GateRules) -> list[Golden]:
    """All golden questions that concern a bundle.

    Raises:
        DataError: a file is no golden file, or the rules name one that is not there.
    """
    if rules.golden is not None:
        return read_golden(rules.golden)
    if folder is None:
        return []
    folder = Path(folder)
    places = [folder, folder.parent]
    if (folder.parent.parent / "CURRENT").exists():
        places.append(folder.parent.parent)
    files = [place / GOLDEN for place in places if (place / GOLDEN).is_file()]
    return [question for file in files for question in read_golden(file)]


def read_golden(path: str | Path) -> list[Golden]:
    """Read a golden file.

    Raises:
        DataError: it is missing, or an entry is none; its place is named.
    """
    try:
        return _FILE.validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"There is no file {path} of golden questions.") from None
    except ValidationError as error:
        raise DataError(
            f"{path} is no file of golden questions: {refusal(error).message}. Write one: "
            "recsys golden BUNDLE"
        ) from None


def _golden(model: LoadedModel, questions: Sequence[Golden], rules: GateRules) -> list[str]:
    if not questions:
        return []
    answers = _answers(model, [question.ask.to_query() for question in questions])
    refusals = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        fault = _fault(question, answer, rules)
        if fault:
            refusals.append(f"Golden question {number} ({_told(question.ask.to_query())}) {fault}.")
    if len(refusals) > 3:
        more = len(refusals) - 3
        refusals = [*refusals[:3], f"{more} more of the {len(questions)} golden questions fail."]
    return refusals


def _fault(question: Golden, answer: Answers | QueryError, rules: GateRules) -> str | None:
    if isinstance(answer, QueryError):
        return f"is not answered: {str(answer).rstrip('.')}"
    if not answer.ids or not np.isfinite(answer.scores).all():
        return "has no answer" if not answer.ids else "has scores that are not finite"
    missing = [id for id in question.must_include if id not in set(answer.ids)]
    if missing:
        return f"must answer {missing[0]!r}, but answers {_some(answer.ids)}"
    if not question.expected:
        return None
    least = rules.golden_overlap if question.min_overlap is None else question.min_overlap
    expected = set(question.expected)
    overlap = len(expected & set(answer.ids)) / len(expected)
    if overlap < least:
        return f"answers {overlap:.2f} of the expected items, below the {least:g} demanded"
    return None


def _answers(model: LoadedModel, asks: Sequence[Query]) -> list[Answers | QueryError]:
    """Answers of the bundle alone: what people put in or took away since is not to be judged."""
    return Engine(model, Overlay(model)).answer(asks)


def _told(ask: Query) -> str:
    what = ask.user or ask.text or ", ".join((ask.items or ask.history or ())[:3])
    return f"{ask.kind} {what}".strip()


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(id) for id in ids[:5]) + (", …" if len(ids) > 5 else "")


def write_golden(
    model: LoadedModel,
    path: str | Path,
    *,
    questions: int = 20,
    k: int = 10,
    min_overlap: float = 0.5,
    seed: int = 0,
) -> int:
    """Ask a model that is known to be good, and keep its answers as golden questions.

    Half ask for items similar to one, half for recommendations to a user, both drawn at random.

    Args:
        model: the model.
        path: the file, written atomically; golden.json in or beside a bundle is found by the gate.
        questions: how many, as far as there are items and users.
        k: answers of each.
        min_overlap: share of these answers that a later model must give, too.
        seed: of the draw.

    Returns:
        Questions written.
    """
    random = np.random.default_rng(seed)
    bundle = model.bundle
    users = bundle.users.decode(_draw(random, np.arange(1, bundle.users.size), questions // 2))
    items = bundle.items.decode(_draw(random, bundle.rows, questions - len(users)))
    asks = [Query("similar", items=(id,), k=k) for id in items.to_list()]
    asks += [Query("recommend", user=id, k=k) for id in users.to_list()]
    entries = []
    for ask, answer in zip(asks, _answers(model, asks), strict=True):
        if isinstance(answer, QueryError):
            raise answer
        subject = {"items": list(ask.items)} if ask.kind == "similar" else {"user": ask.user}
        said = {"kind": ask.kind, "k": k, **subject}
        if answer.ids:
            entries.append({"ask": said, "expected": answer.ids, "min_overlap": min_overlap})
    write_json(path, entries)
    return len(entries)


def _draw(random: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    return np.sort(random.choice(rows, min(count, len(rows)), replace=False))


__all__ = ["GateRules", "Golden", "Verdict", "check", "golden_questions", "write_golden"]
