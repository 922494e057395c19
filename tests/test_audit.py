"""What the audit says of a batch: by hand, against a slow twin, and against autograd."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.features.batching.batch import Batch, UserSide
from recsys.towers.audit import ABOVE, EDGES, PER_QUERY, SOURCES, Audit, Draws, audit

INF = float("inf")


def batch_of(
    rows: int, n: int, target: list[int], *, encoded: int | None = None,
    owner: list[int] | None = None, queries: int | None = None, queued: int = 0,
    log_inclusion: Tensor | None = None, positive_mask: Any = ((), ()), per_query: Any = ((), ()),
    per_query_log_weight: Any = (), per_query_source: Any = (), weight: Any = None,
) -> Batch:  # fmt: skip
    queries = queries or len(target)
    return Batch(
        user=UserSide(
            torch.arange(queries), torch.empty(0, dtype=torch.int64),
            torch.zeros(queries, dtype=torch.int64), torch.zeros(queries, 0, dtype=torch.int64),
        ),
        rows=torch.arange(1, rows + 1), n_candidates=n, n_encoded=encoded or rows,
        target=torch.tensor(target), owner=None if owner is None else torch.tensor(owner),
        queued=torch.arange(100, 100 + queued),
        log_inclusion=torch.zeros(n + queued) if log_inclusion is None else log_inclusion,
        positive_mask=torch.tensor(positive_mask, dtype=torch.int64).reshape(2, -1),
        per_query=torch.tensor(per_query, dtype=torch.int64).reshape(2, -1),
        per_query_log_weight=torch.tensor(per_query_log_weight, dtype=torch.float32),
        per_query_source=torch.tensor(per_query_source, dtype=torch.uint8),
        weight=torch.ones(len(target)) if weight is None else weight,
        statistics=torch.zeros(rows, 0),
    )  # fmt: skip


def scene(seed: int, queries: int, examples: int) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Random vectors and a batch with every source of negatives, at odd sizes."""
    g = torch.Generator().manual_seed(seed)
    n, extra, queued, d = 11, 4, 5, 6
    users = torch.randn(queries, d, generator=g)
    items = torch.randn(n + extra, d, generator=g)
    memory = torch.randn(queued, d, generator=g)
    owner = torch.randint(queries, (examples,), generator=g)
    owner[:queries] = torch.arange(queries)
    target = torch.randint(n - 3, (examples,), generator=g)  # the last three are uniform draws
    known = torch.randint(queries, (2, 9), generator=g)
    known[1] = torch.randint(n + queued, (9,), generator=g)
    own = torch.stack(
        [torch.randint(queries, (13,), generator=g), torch.randint(n + extra, (13,), generator=g)]
    )
    batch = batch_of(
        n + extra, n, target.tolist(), owner=owner.tolist(), queries=queries, queued=queued,
        log_inclusion=-torch.rand(n + queued, generator=g) * 4, positive_mask=known.tolist(),
        per_query=own.tolist(), per_query_log_weight=torch.randn(13, generator=g).tolist(),
        per_query_source=(torch.arange(13) % 3).tolist(), weight=torch.rand(examples, generator=g),
    )  # fmt: skip
    return users, items, memory, batch


def naive(
    users: Tensor, items: Tensor, memory: Tensor, batch: Batch, tau: float, share: float
) -> dict[str, Any]:
    """One negative at a time."""
    n, owner = batch.n_candidates, batch.owner
    assert owner is not None
    columns = torch.cat([items[:n], memory]).double()
    known = set(zip(*batch.positive_mask.tolist(), strict=True))
    aims = set(batch.target.tolist())
    push = dict.fromkeys(SOURCES, 0.0)
    bins = {source: [0] * (len(EDGES) + 1) for source in SOURCES}
    masked, lost = 0, 0.0
    for b in range(len(batch)):
        q, t = int(owner[b]), int(batch.target[b])
        u = users[q].double()
        positive = float(u @ columns[t]) / tau
        mine = {int(batch.target[o]) for o in range(len(batch)) if int(owner[o]) == q}
        terms: list[tuple[str, float, float]] = []  # source, logit, weight in the sum
        liked = 0.0
        for c in range(len(columns)):
            logit = float(u @ columns[c]) / tau
            mass = math.exp(logit - float(batch.log_inclusion[c]))
            if c in mine:
                continue
            if (q, c) in known:
                liked += mass
                masked += 1
                continue
            source = "queue" if c >= n else "in_batch" if c in aims else "uniform"
            terms.append((source, logit, mass))
        for e in range(batch.per_query.shape[1]):
            if int(batch.per_query[0, e]) == q:
                logit = float(u @ items[batch.per_query[1, e]].double()) / tau
                source = PER_QUERY[int(batch.per_query_source[e])]
                terms.append(
                    (source, logit, math.exp(logit + float(batch.per_query_log_weight[e])))
                )
        apart = [t for t in terms if t[0] == "skipped"]
        among = [t for t in terms if t not in apart]
        total = math.exp(positive) + sum(t[2] for t in among)
        behind = math.exp(positive) + sum(t[2] for t in apart)
        for source, _, mass in among:
            push[source] += float(batch.weight[b]) * mass / total
        for source, _, mass in apart:
            push[source] += float(batch.weight[b]) * share * mass / behind
        for source, logit, _ in terms:
            bins[source][sum(logit - positive > edge for edge in EDGES)] += 1
        lost += liked / (liked + total)
    everything = sum(push.values())
    return {
        "push": everything / float(batch.weight.sum()),
        "gradient": {name: value / everything for name, value in push.items()},
        "hardness": {name: tuple(found) for name, found in bins.items()},
        "known": masked / len(batch), "known_mass": lost / len(batch),
    }  # fmt: skip


def test_two_users_and_a_uniform_draw_by_hand() -> None:
    users, items = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = audit(users, items, batch_of(3, 3, [0, 1]), 1.0)
    # Each has its own item at 1, the other's at 0 and the uniform one at 1.
    e, total = math.e, 2 * math.e + 1
    assert found.push == pytest.approx((e + 1) / total)
    assert found.gradient["in_batch"] == pytest.approx(1 / (e + 1))
    assert found.gradient["uniform"] == pytest.approx(e / (e + 1))
    assert found.negatives["in_batch"] == found.negatives["uniform"] == 1
    assert found.catalogue == pytest.approx(3)
    assert sum(found.gradient.values()) == pytest.approx(1)


def test_a_known_item_pushes_nothing_and_its_probability_is_told() -> None:
    users, items = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # The first user knows the uniform item; an edge to its own target counts as nothing.
    found = audit(users, items, batch_of(3, 3, [0, 1], positive_mask=((0, 0), (2, 0))), 1.0)
    e = math.e
    assert found.known == 0.5
    assert found.known_mass == pytest.approx(e / (2 * e + 1) / 2)
    assert found.push == pytest.approx((1 / (e + 1) + (e + 1) / (2 * e + 1)) / 2)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("queries", "examples"), [(5, 5), (7, 19)])
def test_everything_equals_a_slow_twin(queries: int, examples: int, share: float) -> None:
    users, items, memory, batch = scene(queries, queries, examples)
    found = audit(users, items, batch, 0.7, queued=memory, skip_share=share)
    wanted = naive(users, items, memory, batch, 0.7, share)
    assert found.push == pytest.approx(wanted["push"], rel=1e-5)
    assert found.gradient == pytest.approx(wanted["gradient"], rel=1e-5)
    assert found.hardness == wanted["hardness"]
    assert found.known == pytest.approx(wanted["known"])
    assert found.known_mass == pytest.approx(wanted["known_mass"], rel=1e-5)


def test_small_tiles_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    users, items, memory, batch = scene(3, 7, 19)
    whole = audit(users, items, batch, 0.5, queued=memory)
    monkeypatch.setattr("recsys.towers.audit.LOGITS_AT_ONCE", 50)  # three examples at once
    small = audit(users, items, batch, 0.5, queued=memory)
    assert small.gradient == pytest.approx(whole.gradient)
    assert small.hardness == whole.hardness and small.known == whole.known


def test_the_shares_are_those_of_the_gradient_of_the_softmax() -> None:
    """Autograd on the loss itself: |∂loss/∂logit| of the columns of each source."""
    users, items, memory, batch = scene(1, 6, 6)
    batch = replace(
        batch, per_query=batch.per_query[:, :0],
        per_query_log_weight=batch.per_query_log_weight[:0],
        per_query_source=batch.per_query_source[:0], weight=torch.ones(6),
    )  # fmt: skip
    assert batch.owner is not None
    columns = torch.cat([items[:11], memory])
    logits = (users @ columns.T / 0.5).requires_grad_()
    corrected = logits - batch.log_inclusion
    corrected = corrected.scatter(1, batch.target[:, None], logits.gather(1, batch.target[:, None]))
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[batch.positive_mask[0], batch.positive_mask[1]] = True
    mask[torch.arange(6), batch.target] = False
    loss = torch.nn.functional.cross_entropy(
        corrected.masked_fill(mask, -INF), batch.target, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    pushed = gradient.clamp(min=0).sum(0)
    aim = torch.zeros(16, dtype=torch.bool)
    aim[batch.target] = True
    found = audit(users, items, batch, 0.5, queued=memory)
    assert found.gradient["in_batch"] == pytest.approx(float(pushed[aim].sum() / pushed.sum()))
    assert found.gradient["queue"] == pytest.approx(float(pushed[11:].sum() / pushed.sum()))
    assert found.push == pytest.approx(float(pushed.sum() / 6), rel=1e-5)


def test_a_column_of_no_weight_is_no_negative() -> None:
    users, items, memory, batch = scene(2, 5, 5)
    weight = -batch.log_inclusion.clone()
    weight[11:] = -INF  # the queue before its warm-up
    without = audit(users, items, batch, 0.5, queued=memory, log_weight=weight)
    assert without.negatives["queue"] == without.gradient["queue"] == 0
    assert not any(without.hardness["queue"])
    left_out = audit(users, items, batch, 0.5)
    assert without.gradient == pytest.approx(left_out.gradient)
    assert without.catalogue == pytest.approx(left_out.catalogue)


def test_extreme_logits_stay_finite() -> None:
    users, items, memory, batch = scene(5, 5, 5)
    found = audit(users * 100, items, batch, 0.01, queued=memory)
    assert math.isfinite(found.push) and sum(found.gradient.values()) == pytest.approx(1)
    assert all(math.isfinite(value) for value in found.metrics().values())


def test_a_sample_of_examples_is_spread_over_the_batch() -> None:
    users, items, memory, batch = scene(6, 7, 19)
    found = audit(users, items, batch, 0.5, queued=memory, most=5)
    assert found.examples == 5
    assert sum(map(sum, found.hardness.values())) == pytest.approx(
        5 * sum(found.negatives.values())
    )


def test_metrics_name_only_sources_that_are_there_and_the_json_is_whole(tmp_path: Path) -> None:
    users, items = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    found = audit(users, items, batch_of(3, 3, [0, 1]), 1.0)
    metrics = found.metrics()
    assert metrics["audit/above_positive/uniform"] == 1
    assert metrics["audit/above_positive/in_batch"] == 0
    assert not any("queue" in name or "mined" in name for name in metrics)
    path = found.write(tmp_path, 3)
    assert path.name == "epoch-003.json"
    said = json.loads(path.read_text())
    assert said["hardness"]["edges"] == list(EDGES) and said["draws"] is None
    assert said["hardness"]["uniform"][ABOVE] == 2  # 2 - 1, the first bin above the positive


# --- draws ----------------------------------------------------------------------------------------


def watched(scale: float, batches: int = 2000, seed: int = 0) -> tuple[Draws, np.ndarray]:
    """Items drawn independently with known probabilities, which are told times `scale`."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([[0], np.geomspace(0.5, 0.005, 60)])
    draws = Draws(61)
    for _ in range(batches):
        rows = np.flatnonzero(rng.random(61) < truth)
        told = torch.from_numpy(np.log(truth[rows] * scale))
        n = max(0, len(rows) - 1)
        batch = batch_of(len(rows), n, [0], queued=len(rows) - n, log_inclusion=told)
        draws.add(
            replace(batch, rows=torch.from_numpy(rows[:n]), queued=torch.from_numpy(rows[n:]))
        )
    return draws, truth


def test_true_probabilities_have_hardly_an_error_and_doubled_ones_log_two() -> None:
    draws, truth = watched(1.0)
    right = draws.errors(truth)
    assert right.items > 50 and right.error < 0.12
    assert right.expected == pytest.approx(right.sampled, rel=0.02)
    assert max(map(abs, right.deciles)) < 0.15
    draws, truth = watched(2.0)
    wrong = draws.errors(truth)
    assert wrong.error == pytest.approx(math.log(2), abs=0.05)
    assert wrong.expected == pytest.approx(2 * wrong.sampled, rel=0.02)
    assert all(error == pytest.approx(math.log(2), abs=0.15) for error in wrong.deciles)


def test_an_error_of_popular_items_alone_shows_in_the_last_decile() -> None:
    draws, truth = watched(1.0)
    draws.estimate[truth > np.sort(truth)[-7]] *= 3
    deciles = draws.errors(truth).deciles
    assert deciles[-1] == pytest.approx(math.log(3), abs=0.1)
    assert max(map(abs, deciles[:-1])) < 0.15


def test_nothing_watched_is_no_error() -> None:
    found = Draws(5).errors(np.ones(5))
    assert found.batches == 0 and found.sampled == 0 and math.isnan(found.error)
    users, items = torch.eye(2), torch.eye(2)
    one = audit(users, items, batch_of(2, 2, [0, 1]), 1.0, draws=found)
    assert isinstance(one, Audit) and "audit/draws/error" not in one.metrics()
    assert one.to_json()["draws"]["error"] is None
    json.dumps(one.to_json(), allow_nan=False)
