"""Learning: a world with a known answer, runs that repeat and go on, somebody else's Trainer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.features.batching.batch import Batch, Queries
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.prepared.timeline import STATISTICS, Timeline
from recsys.ragged import Ragged
from recsys.towers import training
from recsys.towers.data import InteractionData, Validation
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.rules import SampledNegatives, TowerRules, TrainingRules, metric_at
from recsys.towers.training import Temperature, TwoTowerModule
from recsys.towers.two_tower import TwoTower

lightning = pytest.importorskip("pytorch_lightning")
TASTES, EACH, PEOPLE = 2, 6, 40
N_ITEMS = 1 + TASTES * EACH


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(before)


def checkerboard(seed: int = 0, timed: bool = False) -> tuple[TrainingEvents, Validation]:
    """User u likes the items of parity u, and has had all of them but one, which comes next."""
    rng = np.random.default_rng(seed)
    user, item, missing = [], [], []
    for person in range(1, PEOPLE + 1):
        taste = 1 + person % TASTES + TASTES * np.arange(EACH)
        order = rng.permutation(taste)
        user += [person] * (EACH - 1)
        item += order[1:].tolist()
        missing.append([int(order[0])])
    timeline = Timeline.build(
        np.array(user), np.array(item, np.int32), np.tile(np.arange(EACH - 1), PEOPLE),
        n_users=PEOPLE + 1, first_seen=np.zeros(N_ITEMS, np.int64), timed=timed,
    )  # fmt: skip
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, N_ITEMS))
    people = np.arange(1, PEOPLE + 1)
    history = timeline.histories(people)
    validation = Validation(
        Queries(people, history), Ragged.from_lists(missing), history, timeline, None
    )
    return events, validation


def towers(seed: int = 0, statistics: int = 0, **rules: Any) -> TwoTower:
    items = FeatureTable(N_ITEMS)
    settled = TowerRules(**{"dimension": 8, "hidden": 8, "history": {"length": 5}, **rules})
    torch.manual_seed(seed)
    return TwoTower(
        settled, items, FeatureTable(PEOPLE + 1), items.spec(N_ITEMS, {}, statistics), FeatureSpec()
    )


SHORT = TowerRules(history={"length": 5})
RULES = TrainingRules(batch_size=32, monitor="recall_at_1", learning_rate=0.02, temperature=0.1)


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARMUP_STEPS", 3)


class Steps(lightning.Callback):
    """What was asked of the module, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        self.seen.append((trainer.current_epoch, i))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.seen.append("validated")


def trainer(epochs: int, *callbacks: Any, **options: Any) -> Any:
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu",
    }  # fmt: skip
    return lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})


def learn(
    epochs: int, *callbacks: Any, seed: int = 0, rules: TrainingRules = RULES,
    tower_rules: dict[str, Any] | None = None, resume: str | None = None, **options: Any,
) -> tuple[TwoTowerModule, Any]:  # fmt: skip
    events, validation = checkerboard(timed=rules.batches == "in_time")
    module = TwoTowerModule(towers(seed, **(tower_rules or {})), rules)
    data = InteractionData(events, validation, rules, towers=SHORT, statistics=False, seed=seed)
    torch.manual_seed(seed if resume is None else 999)
    running = trainer(epochs, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging intervals
        running.fit(module, data, ckpt_path=resume)
    return module, running


def equal(left: TwoTowerModule, right: TwoTowerModule) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("history", ["mean", "attention"])
def test_the_only_unseen_item_of_my_taste_comes_first(history: str) -> None:
    _, running = learn(12, tower_rules={"history": history})
    assert running.callback_metrics["val/recall_at_1"] > 0.95


def test_every_epoch_trains_on_all_batches_and_is_validated_once() -> None:
    for rules in (RULES, RULES.model_copy(update={"batches": "in_time", "batch_size": 30})):
        steps = Steps()
        learn(3, steps, rules=rules)
        events, _ = checkerboard()
        size = rules.batch_size
        length = len(
            Batches(
                events,
                batch_size=size,
                sampler="in_time" if rules.batches == "in_time" else "random",
            )
        )
        wanted = [[*((epoch, i) for i in range(length)), "validated"] for epoch in range(3)]
        assert steps.seen == [step for epoch in wanted for step in epoch]


def test_seeded_runs_repeat_bit_for_bit_and_other_seeds_differ() -> None:
    one, again, other = (learn(2, seed=seed)[0] for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, other)


@pytest.mark.parametrize("at_step", [7, 9, 14])
def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, at_step: int
) -> None:
    """7 batches an epoch: stops after an epoch, within one, after two; dropout included.

    Bit for bit on a CPU. Only what the checkpoint does not hold may differ: Python's and NumPy's
    global generators (not used here), and the order of sums on an accelerator.
    """
    whole, _ = learn(3)
    saving = lightning.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    learn(3, saving, enable_checkpointing=True)
    resumed, running = learn(3, resume=str(tmp_path / f"step={at_step}.ckpt"))
    assert running.global_step == 21
    assert equal(whole, resumed)


def test_a_run_that_goes_on_from_its_last_validated_epoch_ends_alike(tmp_path: Path) -> None:
    saving = lightning.callbacks.ModelCheckpoint(
        tmp_path, filename="last", enable_version_counter=False
    )  # not save_last of another: Lightning writes that only when the metric got better
    learn(2, saving, enable_checkpointing=True)
    whole, _ = learn(4)
    steps = Steps()
    resumed, _ = learn(4, steps, resume=str(tmp_path / "last.ckpt"))
    assert [step for step in steps.seen if step != "validated"] == [
        (epoch, i) for epoch in (2, 3) for i in range(7)
    ]
    assert equal(whole, resumed)


def test_the_module_works_in_somebodys_own_trainer() -> None:
    events, _ = checkerboard()
    module = TwoTowerModule(towers(), RULES)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = Batches(events, batch_size=32, max_history=5)
    steps = Steps()
    running = trainer(
        2, steps, gradient_clip_val=0.5, precision="bf16-mixed", limit_train_batches=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running.fit(module, train_dataloaders=batches)
    assert steps.seen == [(epoch, i) for epoch in range(2) for i in range(3)]
    assert math.isfinite(running.callback_metrics["train/loss"])
    after = module.state_dict()
    assert not torch.equal(before["model.item_tower.inputs.ids.weight"],
                           after["model.item_tower.inputs.ids.weight"])  # fmt: skip
    assert torch.equal(before["temperature.log"], after["temperature.log"])


def test_the_trainers_own_clipping_comes_before_the_rules() -> None:
    events, _ = checkerboard()
    for value, most in ((None, 0.25), (0.125, 0.125)):
        module = TwoTowerModule(towers(), RULES.model_copy(update={"gradient_clip": 0.25}))
        optimizer = module.configure_optimizers()["optimizer"]
        module.batch_loss(next(iter(Batches(events, batch_size=32)))).mul(100).backward()
        module.configure_gradient_clipping(optimizer, value)
        parts = [p.grad.to_dense().norm() for p in module.parameters() if p.grad is not None]
        assert torch.stack(parts).norm().item() == pytest.approx(most, rel=1e-4)


def batch_with_skips() -> Batch:
    events, _ = checkerboard()
    skips = Ragged.from_lists([[1 + i % 12, 12] for i in range(events.size)])
    full = TrainingEvents(
        events.timeline, np.linspace(1, 2, events.size, dtype=np.float32), skips,
        np.full(len(skips.values), 0.5, np.float32), None, events.candidates,
    )  # fmt: skip
    return next(iter(Batches(full, batch_size=32, uniform_negatives=2)))


def by_hand(
    users: torch.Tensor, items: torch.Tensor, batch: Batch, logq: float, share: float
) -> torch.Tensor:
    """The loss, one example and one negative at a time."""
    total = torch.zeros(())
    for b, target in enumerate(batch.target.tolist()):
        positive = users[b] @ items[target] / 0.1
        known = batch.positive_mask[1][batch.positive_mask[0] == b].tolist()
        drawn = [
            (users[b] @ items[n] / 0.1 - batch.log_inclusion[n] * logq).exp()
            for n in range(batch.n_candidates)
            if n != target and n not in known
        ]
        mine = batch.per_query[0] == b
        passed = [
            (users[b] @ items[row] / 0.1 + weight).exp()
            for row, weight in zip(
                batch.per_query[1][mine], batch.per_query_log_weight[mine], strict=True
            )
        ]
        loss = (positive.exp() + sum(drawn)).log() - positive
        loss = loss + share * ((positive.exp() + sum(passed)).log() - positive)
        total = total + batch.weight[b] * loss
    assert batch.mean_weight == pytest.approx(1.5)  # weights run evenly from 1 to 2
    return total / len(batch) / batch.mean_weight


@pytest.mark.parametrize("logq", [1.0, 0.4, 0.0])
def test_the_loss_of_a_batch_is_that_of_its_vectors_and_edges(logq: float) -> None:
    model, batch = towers(), batch_with_skips()
    rules = RULES.model_copy(update={"negatives": SampledNegatives(logq=logq), "skip_weight": 0.7})
    module = TwoTowerModule(model, rules).eval()
    embedded = model.embed_items(batch.rows)
    users = model.encode_users(batch.user, embedded)
    wanted = by_hand(users, model.item_tower(embedded), batch, logq, 0.7)
    assert batch.per_query.shape[1] and batch.positive_mask.shape[1]
    torch.testing.assert_close(module.batch_loss(batch), wanted)


def test_only_id_rows_of_the_batch_get_a_gradient() -> None:
    module, batch = TwoTowerModule(towers(), RULES), batch_with_skips()
    module.batch_loss(batch).backward()
    gradient = module.model.item_tower.inputs.ids.weight.grad
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices()[0].tolist()) <= {0, *batch.rows.tolist()}


def test_validation_equals_ranking_everything_by_hand() -> None:
    """Per-query moments, seen items, and items that are not there yet."""
    rng = np.random.default_rng(0)
    born = np.where(np.arange(N_ITEMS) > 8, 50, 0)
    timeline = Timeline.build(
        rng.integers(1, PEOPLE, 200), rng.integers(1, 9, 200).astype(np.int32),
        rng.integers(0, 100, 200), n_users=PEOPLE + 1, first_seen=born,
    )  # fmt: skip
    users = np.arange(1, 22)
    times = np.sort(rng.integers(1, 100, 21))
    queries = Queries(users, timeline.histories(users, times, 5), times)
    seen = timeline.histories(users, times)
    targets = Ragged.from_lists([rng.permutation(np.arange(1, N_ITEMS))[:2] for _ in users])
    as_of_times = times // 10 * 10
    validation = Validation(queries, targets, seen, timeline, as_of_times)
    model = towers(statistics=len(STATISTICS))
    rules = RULES.model_copy(update={"monitor": "recall_at_3"})
    data = InteractionData(
        checkerboard()[0],
        validation,
        rules,
        towers=SHORT,
        statistics=True,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = trainer(1).validate(TwoTowerModule(model, rules), data, verbose=False)
    values = []
    for query, as_of in enumerate(as_of_times.tolist()):
        asked = queries.take(np.array([query]))
        vectors = encode_items(model, np.arange(N_ITEMS), timeline, as_of)
        score = (encode_users(model, asked, timeline, as_of) @ vectors.T)[0]
        score[0] = -np.inf
        score[born > as_of] = -np.inf
        score[seen[query]] = -np.inf
        best = [row for row in np.argsort(-score, kind="stable")[:3] if score[row] > -np.inf]
        values.append(len(set(best) & set(targets[query].tolist())) / 2)
    assert 0 < np.mean(values) < 1
    assert found["val/recall_at_3"] == pytest.approx(np.mean(values), abs=1e-6)


def test_blocks_share_a_moment_and_cover_every_query_once() -> None:
    queries = Queries(np.arange(7), Ragged.empty(7))
    _, base = checkerboard()
    timed = Validation(
        queries, Ragged.empty(7), None, base.timeline, np.array([3, 3, 3, 5, 8, 8, 8])
    )
    found = [(rows.tolist(), as_of) for rows, as_of in timed.blocks(2)]
    assert found == [([0, 1], 3), ([2], 3), ([3], 5), ([4, 5], 8), ([6], 8)]
    untimed = Validation(queries, Ragged.empty(7), None, base.timeline, None)
    assert [(rows.tolist(), m) for rows, m in untimed.blocks(4)] == [
        ([0, 1, 2, 3], None), ([4, 5, 6], None),
    ]  # fmt: skip


def test_decay_is_for_matrices() -> None:
    rules = RULES.model_copy(update={"weight_decay": 0.3, "temperature": "learned"})
    module = TwoTowerModule(towers(), rules)
    made = module.configure_optimizers()
    groups = made["optimizer"].param_groups
    table = module.model.item_tower.inputs.ids.weight
    by_weight = {id(p): group for group in groups for p in group["params"]}
    assert len(by_weight) == len(list(module.parameters()))
    # The first of three warming steps and one: a quarter of each rate.
    assert by_weight[id(table)]["lr"] == pytest.approx(0.02 / 4)
    assert by_weight[id(table)]["weight_decay"] == 0
    for name, weight in module.named_parameters():
        if weight is not table:
            assert by_weight[id(weight)]["lr"] == pytest.approx(0.02 / 4), name
            assert by_weight[id(weight)]["weight_decay"] == 0.3 * (weight.ndim > 1), name
    for _ in range(5):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert by_weight[id(table)]["lr"] == pytest.approx(0.02)


def test_a_learned_temperature_stays_within_bounds_and_comes_back() -> None:
    for start, bound, direction in ((0.011, 0.01, 1.0), (0.9, 1.0, -1.0)):
        temperature = Temperature("learned")
        temperature.log.data.fill_(math.log(start))
        optimizer = torch.optim.SGD(temperature.parameters(), lr=30.0 if direction > 0 else 1.0)
        (direction * temperature()).backward()
        optimizer.step()
        assert temperature().item() == pytest.approx(bound)
        optimizer.zero_grad()
        temperature().backward()
        assert temperature.log.grad.item() == pytest.approx(bound)  # not cut off
    assert Temperature(3.0)().item() == pytest.approx(3.0)
    assert not Temperature(3.0).log.requires_grad


def test_the_learned_temperature_moves_and_the_fixed_one_does_not() -> None:
    rules = RULES.model_copy(update={"temperature": "learned"})
    moved, running = learn(1, rules=rules)
    assert moved.temperature().item() != pytest.approx(0.1, rel=1e-3)
    assert running.callback_metrics["train/temperature"] == pytest.approx(
        moved.temperature().item()
    )
    fixed, _ = learn(1)
    assert fixed.temperature().item() == pytest.approx(0.1)


def test_without_a_validation_side_training_goes_through() -> None:
    events, _ = checkerboard()
    data = InteractionData(events, None, RULES, towers=SHORT, statistics=False, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = trainer(2)
        running.fit(TwoTowerModule(towers(), RULES), data)
    assert running.global_step == 14


@pytest.mark.parametrize("name", ["mrr_at_5", "recall_at_", "recall_at_0", "ndcg", "recall_at_x"])
def test_a_metric_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no metric; use recall_at_K"):
        metric_at(name)


def test_a_metric_is_a_name_and_a_k() -> None:
    assert metric_at("hit_rate_at_20") == ("hit_rate_at", 20)
