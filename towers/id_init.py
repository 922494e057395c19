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

from recsys.errors import ConfigError
from recsys.features.prepared.timeline import Timeline

if TYPE_CHECKING:
    import torch
    from scipy import sparse

    from recsys.towers.rules import TrainingRules
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
    window: int = 0,
    powers: tuple[float, float, float] = (0.5, 0.5, 0.0),
) -> Spectral:
    """Factor the normalised interactions R̃ = Du^-a R Di^-b ≈ P Σ Vᵀ.

    R̃ V Vᵀ is the ideal low-pass filter of graph signal processing (GF-CF; Shen et al., CIKM 2021,
    with a = b = ½) applied to a user's items; R̃ V Σ^c Vᵀ lets its edge fall softly. User u scores
    item i by Σ over j in u's history of (v_j / d_j^b) · (σ^c v_i d_i^b), so that the first bracket
    is what j adds to a history and the second what i is found by.

    Where the order of a history means something, a row of R is not a whole user but `window`
    consecutive events, so that what goes together is what stands together. Windows overlap by half.

    Args:
        timeline: the training side.
        dimension: D; beyond the rank of R̃ the columns are zero.
        seed: of the randomised decomposition (Halko et al., 2011).
        window: events of a row; 0: all of a user.
        powers: a, b and c. With a = ½ everybody weighs alike in the decomposition, with 0 each
            event does; so with b and items. With c = 0 all D directions count alike, with more the
            leading ones more.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    rows, events = _windows(timeline, window)
    shape = (int(rows.max(initial=0)) + 1, timeline.n_items)
    had = _counts_once(rows, np.asarray(timeline.item)[events], shape)
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
    user = np.asarray(seen @ history, np.float32)
    history /= _mean_length(user / np.maximum(np.asarray(seen.sum(1), np.float32), 1))
    return Spectral(item, history, _unit(user))


def _windows(timeline: Timeline, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of R that each event stands in, and the event; with windows, each stands in two."""
    user = np.asarray(timeline.user)
    events = np.arange(len(user))
    if not size:
        return user, events
    place = events - np.asarray(timeline.user_offsets)[user]
    rows: list[np.ndarray] = []
    for shift in (0, size // 2):
        window = (place + shift) // size
        fresh = np.ones(len(events), bool)
        fresh[1:] = (user[1:] != user[:-1]) | (window[1:] != window[:-1])
        rows.append(np.cumsum(fresh) - 1 + (rows[0][-1] + 1 if rows and len(events) else 0))
    return np.concatenate(rows), np.tile(events, 2)


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


CODE_LENGTH, AGAINST = 0.7, 2.0
"""Of random codes, the rest of a vector having length 1; and how much an entry speaks against its
own code at first."""


def start(model: TwoTower, timeline: Timeline, rules: TrainingRules, seed: int) -> None:
    """Set a model's id tables from a training side; what it reads of content stays as it is.

    Args:
        model: both towers.
        timeline: the training side.
        rules: of which `start`, "spectral" or "company", and what else begins with its name.
        seed: of the decomposition.

    Raises:
        ConfigError: the model has no item ids, several members, or no dimensions beside the code.
    """
    from recsys.towers.two_tower import ITEM_LENGTHS

    kind, code = rules.start, rules.start_code
    ids = getattr(model.item_tower.inputs, "ids", None)
    if ids is None:
        raise ConfigError(
            f'training.start = "{kind}" sets item ids, and towers.item_id is false: set it to '
            'true, or start to "random".'
        )
    if model.rules.members > 1:
        raise ConfigError(
            f'training.start = "{kind}" would start all {model.rules.members} members alike, and '
            'members that differ are what an ensemble is for: set it to "random", or '
            "towers.members to 1."
        )
    tower = model.user_tower
    if kind == "company":
        content = model.item_spec.text or model.item_spec.vector
        vectors = _with_code(timeline, model.rules.dimension, code, seed)
        if code and tower.look_back is not None:
            _speak_against(tower.look_back.says.weight, code)
        vectors = vectors * (1.0 if content else LENGTH)
        own = tower.history_ids if model.rules.history_table == "own" else None
        _set([(table, vectors) for table in (ids, own) if table is not None])
        return
    dimension = model.rules.dimension
    found = spectral(timeline, dimension, seed, rules.start_window, rules.start_powers)
    dot = model.rules.score in ITEM_LENGTHS
    # A cosine has directions alone; elsewhere lengths say what is often had.
    item = found.item if dot else _unit(found.item)
    pairs: list[tuple[torch.nn.Embedding, np.ndarray]] = []
    if tower.history_ids is not None:
        offset = item if model.rules.history_table == "offset" else 0.0
        pairs += [(ids, item), (tower.history_ids, found.history - offset)]
    elif tower.history_weight is not None:
        length = np.linalg.norm(found.history, axis=1, keepdims=True)
        pairs += [(ids, item), (tower.history_weight, np.log(np.maximum(length, 1e-6)))]
    else:
        # One table for both: its directions are what an item is found by, its lengths are how much
        # the item says of a user.
        pairs.append((ids, _unit(found.item) if dot else found.history))
    users = getattr(tower.features, "ids", None)
    if users is not None:
        pairs.append((users, found.user))
    _set(pairs)


def _with_code(timeline: Timeline, dimension: int, code: int, seed: int) -> np.ndarray:
    """(I, D) unit vectors: company, and behind it a random code of each item."""
    if code >= dimension:
        raise ConfigError(
            f"training.start_code is {code}, and towers.dimension is {dimension}: the code is a "
            "part of the vector. Make it smaller, or the vector larger."
        )
    vectors = company(timeline, dimension - code, seed)
    if not code:
        return vectors
    codes = np.random.default_rng(seed).standard_normal((len(vectors), code)).astype(np.float32)
    return _unit(np.concatenate([vectors, CODE_LENGTH * _unit(codes)], axis=1))


def _speak_against(weight: torch.Tensor, code: int) -> None:
    import torch

    with torch.no_grad():
        weight.diagonal()[-code:] = -AGAINST


def _set(pairs: list[tuple[torch.nn.Embedding, np.ndarray]]) -> None:
    import torch

    with torch.no_grad():
        for table, values in pairs:
            rows = min(len(values), table.num_embeddings)
            table.weight[1:rows] = torch.from_numpy(values[1:rows])
