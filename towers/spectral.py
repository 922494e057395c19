"""A start for id tables from what goes with what: leading singular vectors, found in seconds.

Contrastive training from noise spends most of its steps on finding which items go together. For
sets of items, `spectral` factors who had what; for sequences, `company` factors which items stood
near each other.

Legend: U user rows, I item rows, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from features.timeline import Timeline
from recsys.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from towers.two_tower import TwoTower


@dataclass(frozen=True)
class Spectral:
    """Start vectors; rows without an event are zero.

    Args:
        item: (I, D) float32 unit vectors, what an item is found by.
        history: (I, D) float32, what an item adds to the sum over a history: rarer ones more.
        user: (U, D) float32 unit vectors.
    """

    item: np.ndarray
    history: np.ndarray
    user: np.ndarray


def spectral(timeline: Timeline, dimension: int, seed: int) -> Spectral:
    """Factor the symmetrically normalised interactions R̃ = Du^-½ R Di^-½ ≈ P Σ Vᵀ.

    R̃ Vᵀ V is the ideal low-pass filter of graph signal processing (GF-CF; Shen et al., CIKM 2021)
    applied to a user's items: user u scores item i by Σ over j in u's history of
    (v_j / √d_j) · (v_i √d_i), so that the first bracket is what j adds to a history and the second
    what i is found by. Directions alone are kept of the second.

    Args:
        timeline: the training side.
        dimension: D; beyond the rank of R̃ the columns are zero.
        seed: of the randomised decomposition (Halko et al., 2011).
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    shape = (timeline.n_users, timeline.n_items)
    seen = sparse.csr_matrix(
        (np.ones(len(timeline.item), np.float32), (timeline.user, timeline.item)), shape=shape
    )
    seen.sum_duplicates()
    seen.data[:] = 1.0
    per_user = np.maximum(np.asarray(seen.sum(1), np.float32)[:, 0], 1)
    per_item = np.maximum(np.asarray(seen.sum(0), np.float32)[0], 1)
    scaled = sparse.diags(per_user**-0.5) @ seen @ sparse.diags(per_item**-0.5)
    scaled = sparse.csr_matrix(scaled, dtype=np.float32)
    rank = min(dimension, *shape)
    _, _, vt = randomized_svd(scaled, rank, n_iter=4, random_state=seed)
    v = np.zeros((shape[1], dimension), np.float32)
    v[:, :rank] = vt.T
    history = v / np.sqrt(per_item)[:, None]
    # A mean of the history then has length 1 on average, like everything else that is added to it.
    user = np.asarray(seen @ history, np.float32)
    length = np.linalg.norm(user / per_user[:, None], axis=1)
    history /= max(float(length[length > 0].mean()) if (length > 0).any() else 1.0, 1e-9)
    return Spectral(_unit(v), history, _unit(user))


REACH, DECAY = 15, 0.8
"""Company is kept with so many entries before, each a fifth less than the one after it."""
LENGTH = 0.25
"""Of id vectors that start from company. Only directions are scored, and the shorter a vector, the
further a step turns it. Beside text or given vectors they have length 1, as those have."""


def company(timeline: Timeline, dimension: int, seed: int) -> np.ndarray:
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


def start(model: TwoTower, timeline: Timeline, kind: str, seed: int) -> None:
    """Set a model's id tables from a training side; what it reads of content stays as it is.

    Args:
        model: both towers.
        timeline: the training side.
        kind: "spectral" or "company".
        seed: of the decomposition.

    Raises:
        ConfigError: the model has no item ids.
    """
    ids = getattr(model.item_tower.inputs, "ids", None)
    if ids is None:
        raise ConfigError(
            f'training.start = "{kind}" sets item ids, and towers.item_id is false: set it to '
            'true, or start to "random".'
        )
    tower = model.user_tower
    if kind == "company":
        content = model.item_spec.text or model.item_spec.vector
        vectors = company(timeline, model.rules.dimension, seed) * (1.0 if content else LENGTH)
        own = tower.history_ids if model.rules.history_table == "own" else None
        _set([(table, vectors) for table in (ids, own) if table is not None])
        return
    found = spectral(timeline, model.rules.dimension, seed)
    pairs: list[tuple[torch.nn.Embedding, np.ndarray]] = []
    if tower.history_ids is not None:
        offset = found.item if model.rules.history_table == "offset" else 0.0
        pairs += [(ids, found.item), (tower.history_ids, found.history - offset)]
    elif tower.history_weight is not None:
        length = np.linalg.norm(found.history, axis=1, keepdims=True)
        pairs += [(ids, found.item), (tower.history_weight, np.log(np.maximum(length, 1e-6)))]
    else:
        # One table for both: its directions are what an item is found by, its lengths are how much
        # the item says of a user.
        pairs.append((ids, found.history if model.rules.score != "dot" else found.item))
    users = getattr(tower.features, "ids", None)
    if users is not None:
        pairs.append((users, found.user))
    _set(pairs)


def _set(pairs: list[tuple[torch.nn.Embedding, np.ndarray]]) -> None:
    import torch

    with torch.no_grad():
        for table, values in pairs:
            rows = min(len(values), table.num_embeddings)
            table.weight[1:rows] = torch.from_numpy(values[1:rows])
