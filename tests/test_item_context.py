"""Item context: against loops, without the users of the batch, and the same in a bundle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving_cases import table as table

from recsys.errors import ConfigError
from recsys.features.prepared.cooccurrence import LATE, CooccurrenceGraph
from recsys.features.prepared.item_time import FADE, PRIOR, REACH, Order
from recsys.features.prepared.timeline import Timeline
from recsys.towers.build import build_model
from recsys.towers.data import InteractionData
from recsys.towers.item_context import (
    KNOTS,
    KNOTS_REACH,
    SHARPNESS,
    USUAL,
    ItemContext,
    TextNeighbours,
    alike,
)
from recsys.towers.rules import TowerRules
from recsys.towers.training import TwoTowerModule
from tests.test_towers import SEED, settle

D = 5


def timeline_of(histories: list[list[int]], n_items: int) -> Timeline:
    user = np.repeat(np.arange(len(histories)), [len(row) for row in histories])
    item = np.array([i for row in histories for i in row], np.int64)
    return Timeline.build(
        user, item, np.arange(len(item)), n_users=len(histories),
        first_seen=np.zeros(n_items, np.int64), timed=False,
    )  # fmt: skip


def entries(around: CooccurrenceGraph, item: int) -> list[tuple[int, int, float]]:
    part = slice(around.offsets[item], around.offsets[item + 1])
    found = zip(around.item[part], around.user[part], around.weight[part], strict=True)
    return sorted((int(i), int(u), float(w)) for i, u, w in found)


def test_neighbours_by_hand() -> None:
    around = CooccurrenceGraph.of(timeline_of([[], [1, 2, 3], [2, 2], [3, 1]], 5), 5, 100, seed=0)
    raw = {
        (2, 1, 1): 1 / 2**0.5,  # 1 stands once in front of 2 for user 1, and twice in all
        (3, 2, 1): 1 / 3**0.5,
        (3, 1, 1): FADE / 2**0.5,
        (1, 3, 3): 1 / 2**0.5,
    }
    mean = sum(raw.values()) / len(raw)
    for item in range(5):
        wanted = sorted((i, u, w / mean) for (of, i, u), w in raw.items() if of == item)
        found = entries(around, item)
        assert [one[:2] for one in found] == [one[:2] for one in wanted]
        np.testing.assert_allclose([w for *_, w in found], [w for *_, w in wanted], rtol=1e-6)
    assert around.event_item.tolist() == [1, 2, 3, 2, 2, 3, 1]
    assert around.event_after.tolist() == [2, 1, 0, 1, 0, 1, 0]


def test_of_many_neighbours_a_seeded_sample_stays() -> None:
    histories = [[1, 2]] * 50 + [[3, 2]] * 50 + [[2, 4]]
    one, again, other = (
        CooccurrenceGraph.of(timeline_of(histories, 5), 5, 20, seed) for seed in (0, 0, 1)
    )
    assert len(entries(one, 2)) == 20
    assert entries(one, 2) == entries(again, 2) != entries(other, 2)
    assert {i for i, *_ in entries(one, 2)} == {1, 3}
    assert len(entries(one, 4)) == 1


def surroundings(histories: list[list[int]], n: int, seed: int) -> tuple[ItemContext, Any]:
    around = CooccurrenceGraph.of(timeline_of(histories, n), n, 10_000, seed=0)
    torch.manual_seed(seed)
    ids = torch.nn.Embedding(n, D)
    return ItemContext(around, D, hidden=0.5), ids


@given(SEED, st.integers(1, 12), st.integers(2, 9), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_what_is_said_without_some_users_as_loops_say_it(
    seed: int, n_users: int, n: int, out: int
) -> None:
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, n, rng.integers(0, 12)).tolist() for _ in range(n_users)]
    model, ids = surroundings(histories, n, seed % 1000)
    left = rng.integers(0, n_users, out)
    rows = torch.from_numpy(rng.integers(0, n, 7))
    there, said = model(rows, ids, torch.from_numpy(left) if out else None)

    counts = np.bincount([i for row in histories for i in row], minlength=n)
    total = max(1, counts.sum())
    lasts = [row[-1] for row in histories if row]
    usual_last = len(lasts) / total
    usual_after = sum(min(len(row) - 1 - p, LATE) for row in histories for p in range(len(row)))
    usual_after = usual_after / total
    pairs = [
        (row[p], row[q], u, FADE ** (p - q - 1) / counts[row[q]] ** 0.5)
        for u, row in enumerate(histories)
        for p in range(len(row))
        for q in range(max(0, p - REACH), p)
        if row[p] != row[q]
    ]
    mean = np.mean([w for *_, w in pairs]) if pairs else 1.0
    order = Order.of(np.cumsum([0, *map(len, histories)]), np.concatenate(histories).astype(int), n)
    where, width = order.place[counts > 0], 2 * KNOTS_REACH / (KNOTS - 1)
    centre = where.mean() if len(where) > 1 else 0.0
    broad = max(where.std(ddof=1), 1e-3) if len(where) > 1 else 1e-3
    logs = np.log1p(counts[counts > 0])
    middle, spread = (logs.mean(), logs.std(ddof=1)) if len(logs) > 1 else (0.0, 0.0)
    for r, item in enumerate(rows.tolist()):
        here = [(i, w / mean) for j, i, u, w in pairs if j == item and u not in left]
        vector = sum((w * ids.weight[i] for i, w in here), torch.zeros(D))
        vector = vector / (sum(w for _, w in here) + 1)
        events = [
            min(len(row) - 1 - p, LATE)
            for u, row in enumerate(histories)
            if u not in left
            for p in range(len(row))
            if row[p] == item
        ]
        assert bool(there[r]) == bool(events)
        c, last, after = len(events), events.count(0), sum(events)
        stands = torch.zeros(3 + KNOTS)
        if c:
            x, pull, hold = order.place[item], 0.0, 0.0
            for u, row in enumerate(histories):
                for p, q in itertools.combinations(range(len(row)), 2):
                    if q - p > REACH:
                        continue
                    if u not in left and item in (row[p], row[q]) and row[p] != row[q]:
                        wrong = 1 / (1 + np.exp(order.place[row[q]] - order.place[row[p]]))
                        pull += FADE ** (q - p - 1) * wrong * (1 if row[q] == item else -1)
                        hold += FADE ** (q - p - 1) * wrong * (1 - wrong)
            x += (pull - 2 * PRIOR * x) / (hold + 2 * PRIOR)
            far = np.clip((x - centre) / broad, -KNOTS_REACH - width, KNOTS_REACH + width)
            knots = np.linspace(-KNOTS_REACH, KNOTS_REACH, KNOTS)
            stands = torch.tensor([
                (np.log1p(c) - max(middle, 1e-3)) / max(spread, 1e-3),
                2 * np.log((last + USUAL * usual_last) / ((c + USUAL) * usual_last)),
                1.5 * ((after + USUAL * usual_after) / (c + USUAL) - usual_after),
                *np.exp(-0.5 * ((far - knots) / width) ** 2),
            ], dtype=torch.float32)  # fmt: skip
        wanted = model.share * vector + model.standing(stands)
        torch.testing.assert_close(said[r], wanted, rtol=1e-3, atol=1e-3)


def test_a_place_without_some_users_is_near_that_of_a_fit_without_them() -> None:
    rng = np.random.default_rng(1)
    histories = [sorted(rng.integers(1, 30, 8).tolist()) for _ in range(80)]
    histories = [rng.permutation(row).tolist() if u % 3 else row for u, row in enumerate(histories)]
    histories += [[30, 1]]  # nobody else has 30
    model, _ = surroundings(histories, 31, 0)
    left = torch.tensor([0, 3, 6, 9, 80])
    again = [[] if u in left else row for u, row in enumerate(histories)]
    refitted, _ = surroundings(again, 31, 0)
    rows = torch.arange(1, 30)
    whole, wanted = model.place[rows], refitted.place[rows]
    found = model.places(rows, model._counts_without(left)[rows])
    # Apart from a step that all take together, which says nothing of their order.
    near, far = ((places - wanted).std() for places in (found, whole))
    assert near < 0.35 * far
    assert model.place[30] < -0.5
    assert model.places(torch.tensor([30]), model._counts_without(left)[30:]).abs() < 1e-3


@given(SEED, st.integers(0, 8), st.integers(1, 9), st.integers(1, 12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_alike_as_loops_find_it(seed: int, n: int, others: int, most: int, own: bool) -> None:
    rng = np.random.default_rng(seed)
    among = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(others, 3))), dim=1)
    among = (among * torch.from_numpy(rng.random((others, 1)) > 0.2)).float()
    texts = torch.cat([among, among.flip(0)])[: max(n, others) if own else n]
    rows, weight = alike(texts, among, most, own=own)
    assert rows.shape == weight.shape == (len(texts), max(1, min(most, others - 1)))
    for r, text in enumerate(texts):
        near = [
            (float(text @ among[i]), i)
            for i in range(1, others)
            if among[i].any() and text.any() and not (own and i == r)
        ]
        near = sorted(near, reverse=True)[:most]
        found = {int(i): float(w) for i, w in zip(rows[r], weight[r], strict=True) if w > 0}
        scale = sum(np.exp(SHARPNESS * s) for s, _ in near)
        likenesses = sorted((float(text @ among[i]) for i in found), reverse=True)
        np.testing.assert_allclose(likenesses, [s for s, _ in near], atol=1e-5)
        for i, w in found.items():
            assert w == pytest.approx(np.exp(SHARPNESS * float(text @ among[i])) / scale, rel=1e-4)


def test_likenesses_are_found_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(40, 3), dim=1)
    at_once = alike(texts, texts[:30], 4, own=True)
    monkeypatch.setattr("recsys.towers.item_context.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("recsys.towers.item_context.AMONG_AT_ONCE", 5)
    in_blocks = alike(texts, texts[:30], 4, own=True)
    torch.testing.assert_close(at_once[0], in_blocks[0])
    torch.testing.assert_close(at_once[1], in_blocks[1])


def test_text_neighbours_are_the_mean_of_their_id_vectors() -> None:
    texts = torch.tensor([[0, 0], [1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [0, 0]])
    model, ids = TextNeighbours(texts, 4, 2), torch.nn.Embedding(4, D)
    near = np.exp(SHARPNESS * np.array([[0.0, 0.6], [0.0, 0.8], [0.6, 0.8], [0.8, 0.96]]))
    rows = [(2, 3), (1, 3), (1, 2), (1, 3)]  # of items 1, 2, 3 and 4; item 5 has no text
    said = model(torch.arange(6), ids)
    for item, of, weight in zip((1, 2, 3, 4), rows, near, strict=True):
        wanted = sum(w * ids.weight[i] for i, w in zip(of, weight / weight.sum(), strict=True))
        torch.testing.assert_close(said[item], (0.5 * wanted).float(), rtol=1e-4, atol=1e-5)
    assert not said[0].any() and not said[5].any()


def test_what_does_not_go_together_is_refused(tiny: Any) -> None:
    for name in ("cooccurrence_neighbours", "text_neighbours"):
        for other in ({"id_dropout": 1}, {"history": {"table": "own"}}):
            with pytest.raises(ValidationError, match=f"{name} = 3 is read of items beside"):
                TowerRules(**{name: 3, **other})
    with pytest.raises(ConfigError, match="Name text columns"):
        build_model(tiny.dataset, TowerRules(text_neighbours=3), item_text=None, seed=0)


@pytest.fixture(scope="module")
def context_run(shop_run: str) -> str:
    return shop_run.replace(
        "[towers]\n", "[towers]\ncooccurrence_neighbours = 6\ntext_neighbours = 3\n"
    )


def test_a_bundle_answers_as_the_towers_that_learned(context_run: str, tmp_path: Path) -> None:
    from recsys.experiments.bundling import make_bundle
    from recsys.experiments.config import loads
    from recsys.experiments.run import Untrained, prepare
    from recsys.serving.recommender import Recommender

    config = loads(f'out = "{tmp_path.as_posix()}"\n{context_run}')
    dataset = prepare(config)
    untrained = Untrained(config, dataset)
    model = settle(untrained.remake()).eval()
    inputs = model.item_tower.inputs
    assert inputs.context is not None and inputs.text_neighbours is not None
    path = make_bundle(config, dataset, model, untrained.encoder, tmp_path / "bundle")
    bundle = Recommender.load(path).bundle
    assert bundle.model.item_tower.inputs.context is None
    rows = 1 + np.array([dataset.items.ids.to_list().index(id) for id in bundle.items.ids])
    statistics = torch.from_numpy(
        bundle.timeline.statistics(np.arange(1, len(rows) + 1), bundle.cutoff)
    )
    with torch.inference_mode():
        wanted = model.item_tower(model.embed_items(torch.from_numpy(rows), statistics)).numpy()
    cold = np.arange(1, len(rows) + 1) >= bundle.model.item_spec.ids
    assert cold.any() and not cold.all()
    np.testing.assert_allclose(bundle.vectors[1:], wanted, atol=4e-3)
    # The surroundings and the likenesses do say something.
    inputs.surround(None, None)
    with torch.inference_mode():
        bare = model.item_tower(model.embed_items(torch.from_numpy(rows), statistics)).numpy()
    assert np.abs(bare - wanted)[cold].max() > 0.05
    assert np.abs(bare - wanted)[~cold].max() > 0.05


def test_training_leaves_out_who_is_asked_for(
    context_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys.experiments.config import loads
    from recsys.experiments.run import Untrained, prepare
    from recsys.features.batching.examples import training_events

    # Few at once: of a log whose every user is asked for, nothing would be left.
    run = context_run.replace("batch_size = 256", "batch_size = 8")
    config = loads(f'out = "{tmp_path.as_posix()}"\n{run}')
    dataset = prepare(config)
    module = TwoTowerModule(settle(Untrained(config, dataset).make()), config.training)
    data = InteractionData(
        training_events(dataset, skips=False), None, config.training,
        towers=config.towers, statistics=module.model.uses_statistics,
    )  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    heard: list[torch.Tensor | None] = []
    honest = ItemContext.forward

    def listening(self: ItemContext, rows: Any, ids: Any, left_out: Any = None) -> Any:
        if len(rows) == len(batch.rows):  # what is alike is worked out from everybody
            heard.append(left_out)
        return honest(self, rows, ids, left_out)

    monkeypatch.setattr(ItemContext, "forward", listening)
    module.train().batch_loss(batch).backward()
    module.eval().batch_loss(batch)
    learning, answering = heard
    assert learning is not None and torch.equal(learning, batch.user.users) and answering is None
    inputs = module.model.item_tower.inputs
    assert inputs.context is not None and inputs.text_neighbours is not None
    learned = [inputs.context.share, inputs.context.standing.weight, inputs.text_neighbours.share]
    assert [one.grad is not None and bool(one.grad.any()) for one in learned] == [True] * 3


def test_new_items_are_read_as_cold_ones_of_the_bundle(
    build: Callable[..., Any], context_run: str, tmp_path: Path, table: dict[str, dict[str, Any]]
) -> None:
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.live.new_items import encode_described
    from recsys.serving.recommender import Recommender

    bundle = Recommender.load(build(context_run, tmp_path, trained=True).bundle).bundle
    ids = bundle.items.ids.to_list()
    assert bundle.coder is not None
    described = [bundle.coder.describe(table[id]) for id in ids]
    rows = np.arange(1, len(ids) + 1)
    found = encode_described(bundle, described, rows)
    np.testing.assert_allclose(found.vectors, bundle.vectors[1:], atol=2e-3)
    warm = bundle.model.item_spec.ids - 1
    starts = bundle.model.item_tower.inputs.starts.weight[1:].float()
    assert len(starts) == len(ids) - warm and starts.abs().max() > 1e-3
    # So is a mere text: nothing else is known of the item.
    text = "oak table for the garden"
    only = bundle.coder.describe({"title": text})
    assert only.text == text
    put = encode_described(bundle, [only], np.zeros(1, np.int64)).vectors
    np.testing.assert_allclose(LoadedModel(bundle).text_vectors([text]), put, atol=2e-3)
