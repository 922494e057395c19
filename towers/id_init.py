"""Initialisation of id tables by spectral decomposition, in seconds.

Contrastive training from noise spends most of its steps on finding which items go together. For
sets of items, `spectral` factors who had what; for sequences, `cooccurrence` factors which items
stood near each other.

Legend: U user rows, I item rows, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recsys.errors import ConfigError
from recsys.features.prepared.timeline import Timeline
from recsys.towers.rules import LENGTH_SCORES, CooccurrenceInit, SpectralInit

if TYPE_CHECKING:
    import torch
    from scipy import sparse

    from recsys.towers.two_tower import TwoTower

POWER = 3
"""Power iterations of the decomposition. More find the leading vectors more sharply and rank worse:
on the end of Gowalla's training lists recall@20 .169, .180, .183, .182, .181 for 1, 2, 3, 4, 6."""


@dataclass(frozen=True)
class Spectral:
    """Start vectors; rows without an event are zero.

    Args:
        item: (I, D) float32, what an item is found by: often-had ones are longer. Of mean length 1.
        history: (I, D) float32, what an item adds to the sum over a history: rarer ones more.
        user: (U, D) float32 unit vectors.
    """

    item: np.ndarray
    history: np.ndarray
    user: np.ndarray


def spectral(
    timeline: Timeline,
    dimension: int,
    seed: int,
    powers: tuple[float, float, float] = (0.5, 0.5, 0.0),
) -> Spectral:
    """Factor the normalised interactions R̃ = Du^-a R Di^-b ≈ P Σ Vᵀ.

    R̃ V Vᵀ is the ideal low-pass filter of graph signal processing (GF-CF; Shen et al., CIKM 2021,
    with a = b = ½) applied to a user's items; R̃ V Σ^c Vᵀ lets its edge fall softly. User u scores
    item i by Σ over j in u's history of (v_j / d_j^b) · (σ^c v_i d_i^b), so that the first bracket
    is what j adds to a history and the second what i is found by.

    Args:
        timeline: the training side.
        dimension: D; beyond the rank of R̃ the columns are zero.
        seed: of the randomised decomposition (Halko et al., 2011).
        powers: a, b and c. With a = ½ everybody weighs alike in the decomposition, with 0 each
            event does; so with b and items. With c = 0 all D directions count alike, with more the
            leading ones more.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    user = np.asarray(timeline.user)
    shape = (int(user.max(initial=0)) + 1, timeline.n_items)
    had = _counts_once(user, np.asarray(timeline.item), shape)
    per_row = np.maximum(np.asarray(had.sum(1), np.float32)[:, 0], 1)
    per_item = np.maximum(np.asarray(had.sum(0), np.float32)[0], 1)
    of_row, of_item, of_value = powers
    scaled = sparse.diags(per_row**-of_row) @ had @ sparse.diags(per_item**-of_item)
    scaled = sparse.csr_matrix(scaled, dtype=np.float32)
    rank = min(dimension, *shape)
    _, sigma, vt = randomized_svd(scaled, rank, n_iter=POWER, random_state=seed)
    v = np.zeros((shape[1], dimension), np.float32)
    v[:, :rank] = vt.T
    popularity = (per_item**of_item)[:, None]
    item, history = v * popularity, v / popularity
    item[:, :rank] *= (sigma / max(float(sigma[0]), 1e-9)) ** of_value
    item /= _mean_length(item)
    # A mean of the history then has length 1 on average, like everything else that is added to it.
    whole = (timeline.n_users, timeline.n_items)
    seen = _counts_once(timeline.user, np.asarray(timeline.item), whole)
    sums = np.asarray(seen @ history, np.float32)
    history /= _mean_length(sums / np.maximum(np.asarray(seen.sum(1), np.float32), 1))
    return Spectral(item, history, _unit(sums))


def _counts_once(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_matrix:
    """Who had what, 1 however often."""
    from scipy import sparse

    found = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    found.sum_duplicates()
    found.data[:] = 1.0
    return found


def _mean_length(vectors: np.ndarray) -> float:
    """Of those that have one; 1 where none has."""
    length = np.linalg.norm(vectors, axis=1)
    return max(float(length[length > 0].mean()) if (length > 0).any() else 1.0, 1e-9)


REACH, DECAY = 15, 0.8
"""An item co-occurs with so many entries before it, each a fifth less than the one after it."""
LENGTH = 0.25
"""Of id vectors that start from co-occurrence. Only directions are scored, and the shorter a
vector, the further a step turns it. Beside text or given vectors they have length 1, as those
have."""


def cooccurrence(timeline: Timeline, dimension: int, seed: int) -> np.ndarray:
    """(I, D) float32 unit vectors from which items stand near each other in histories.

    The co-occurrence C sums .8^(gap-1) over all pairs of a user's entries at most 15 apart, both
    ways; vectors are those of the largest eigenvalues of D^-½ C D^-½, each times the root of its
    eigenvalue, so that inner products give the normalised co-occurrence back (as spectral word
    vectors do; Levy & Goldberg, 2014).

    Args:
        timeline: the training side.
        dimension: D; negative eigenvalues and those beyond the rank give zero columns.
        seed: of the decomposition's first vector.
    """
    from scipy import sparse
    from scipy.sparse.linalg import eigsh

    size, item, user = timeline.n_items, np.asarray(timeline.item), timeline.user
    near = sparse.csr_matrix((size, size), dtype=np.float32)
    for gap in range(1, min(REACH, max(1, len(item) - 1)) + 1):
        same = user[gap:] == user[:-gap]
        left, right = item[:-gap][same], item[gap:][same]
        weight = np.full(len(left), DECAY ** (gap - 1), np.float32)
        near = near + sparse.csr_matrix((weight, (left, right)), shape=(size, size))
    near = near + near.T
    scale = sparse.diags(np.maximum(np.asarray(near.sum(1))[:, 0], 1e-6) ** -0.5)
    # Plus one on the diagonal: the largest eigenvalues are then also the largest in magnitude.
    shifted = (scale @ near @ scale + sparse.eye(size)).astype(np.float32)
    rank = max(1, min(dimension, size - 2))
    first = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values, vectors = eigsh(shifted.tocsr(), k=rank, which="LM", v0=first, tol=1e-3)
    order = np.argsort(-values)
    out = np.zeros((size, dimension), np.float32)
    out[:, :rank] = vectors[:, order] * np.sqrt(np.maximum(values[order] - 1, 0))
    out[np.bincount(item, minlength=size) == 0] = 0
    return _unit(out)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def initialise(
    model: TwoTower, timeline: Timeline, rules: SpectralInit | CooccurrenceInit, seed: int
) -> None:
    """Set a model's id tables from a training side; what it reads of content stays as it is.

    Args:
        model: both towers.
        timeline: the training side.
        rules: which decomposition.
        seed: of the decomposition.

    Raises:
        ConfigError: the model has no item ids, or is an ensemble.
    """
    ids = getattr(model.item_tower.inputs, "ids", None)
    if ids is None:
        raise ConfigError(
            f'training.id_init.kind = "{rules.kind}" sets item ids, and towers.id_dropout = 1 '
            'leaves them out: set it below 1, or the kind to "random".'
        )
    if model.rules.ensemble > 1:
        raise ConfigError(
            f'training.id_init.kind = "{rules.kind}" would start all {model.rules.ensemble} towers '
            'alike, and an ensemble is of towers that differ: set it to "random", or '
            "towers.ensemble to 1."
        )
    tower, dimension = model.user_tower, model.rules.dimension
    if isinstance(rules, CooccurrenceInit):
        content = model.item_spec.text or model.item_spec.vector
        vectors = cooccurrence(timeline, dimension, seed) * (1.0 if content else LENGTH)
        own = tower.history_ids if model.rules.history.table == "own" else None
        _set([(table, vectors) for table in (ids, own) if table is not None])
        return
    factors = spectral(timeline, dimension, seed, rules.powers)
    by_length = model.rules.score in LENGTH_SCORES
    # A cosine has directions alone; elsewhere lengths say what is often had.
    item = factors.item if by_length else _unit(factors.item)
    pairs: list[tuple[torch.nn.Embedding, np.ndarray]] = []
    if tower.history_ids is not None:
        offset = item if model.rules.history.table == "offset" else 0.0
        pairs += [(ids, item), (tower.history_ids, factors.history - offset)]
    else:
        # One table for both: its directions are what an item is found by, its lengths are how much
        # the item says of a user.
        pairs.append((ids, _unit(factors.item) if by_length else factors.history))
    users = getattr(tower.features, "ids", None)
    if users is not None:
        pairs.append((users, factors.user))
    _set(pairs)


def _set(pairs: list[tuple[torch.nn.Embedding, np.ndarray]]) -> None:
    import torch

    with torch.no_grad():
        for table, values in pairs:
            rows = min(len(values), table.num_embeddings)
            table.weight[1:rows] = torch.from_numpy(values[1:rows])
