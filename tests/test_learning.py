"""How the parts of training meet: plans, queue, mining, audit, objectives, schedule, resuming."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_training
import torch
from test_training import RULES, checkerboard, equal, towers, trainer
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.experiments.config import load
from recsys.features.batching.batch import Batch, Source
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.prepared.timeline import Timeline
from recsys.tables import DAY
from recsys.towers import training
from recsys.towers.data import InteractionData
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.logits import Scores
from recsys.towers.losses import psl, softmax
from recsys.towers.mining import MiningRules
from recsys.towers.rules import TrainingRules
from recsys.towers.training import TwoTowerModule, learning_rate_at
from recsys.towers.two_tower import TowerRules, TwoTower

lightning = pytest.importorskip("pytorch_lightning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(before)


def rules_of(**changes: Any) -> TrainingRules:
    return TrainingRules(**{**RULES.model_dump(exclude_unset=True), **changes})


def parts(
    rules: TrainingRules, audits: Path | None = None, **shape: Any
) -> tuple[TwoTowerModule, InteractionData]:
    events, validation = checkerboard(timed=rules.batches == "in_time")
    settled = TowerRules(**{"dimension": 8, "hidden": 8, "max_history": 5, **shape})
    module = TwoTowerModule(towers(**shape), rules, audits=audits)
    return module, InteractionData(events, validation, rules, towers=settled)


def run(
    module: TwoTowerModule, data: InteractionData, epochs: int, *callbacks: Any,
    resume: Path | None = None, **options: Any,
) -> Any:  # fmt: skip
    torch.manual_seed(0 if resume is None else 999)
    running = trainer(epochs, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running.fit(module, data, ckpt_path=resume)
    return running


def mean_loss(module: TwoTowerModule, batches: Batches) -> float:
    """Over an epoch of batches, nothing hidden and nothing learned."""
    was = module.training
    module.eval()
    with torch.no_grad():
        found = [module.loss(batch).item() for batch in batches]
    module.train(was)
    return float(np.mean(found))


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


# --- plans and histories --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        ("random", {"history": "attention"}),
        ("random", {"history": "multi_interest", "interests": 2}),
        ("random", {"history": "mean", "score": "cosine_bias"}),
        ("in_time", {"history": "mean", "score": "dot"}),
        ("by_user", {"history": "mean", "history_norm": 0.5}),
        ("by_user", {"history": "mean", "history_table": "weighted"}),
        ("by_user", {"history": "multi_interest", "interests": 2, "history_table": "own"}),
        ("sequences", {"history": "transformer", "history_hidden": 16}),
        ("random", {"history": "attention", "members": 2, "example_age": 3}),
        ("sequences", {"history": "transformer", "members": 2, "example_age": 3}),
    ],
)
@pytest.mark.parametrize("symmetric", [0.0, 0.5])
def test_every_plan_learns_with_a_history_that_suits_it(
    plan: str, shape: dict[str, Any], symmetric: float
) -> None:
    rules = rules_of(
        batches=plan, batch_size=32 if plan in ("random", "in_time") else 8, symmetric=symmetric
    )
    module, data = parts(rules, **shape)
    assert data.batches.reading.whole_users == (plan in ("by_user", "sequences"))
    before = mean_loss(module, parts(rules, **shape)[1].batches)
    running = run(module, data, 1)
    after = mean_loss(module, parts(rules, **shape)[1].batches)
    assert math.isfinite(before) and after < 0.97 * before
    assert 0 <= running.callback_metrics["val/recall_at_1"] <= 1
    assert math.isfinite(running.callback_metrics["train/loss"])


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["softmax", "psl"])
@pytest.mark.parametrize("plan", ["random", "by_user"])
def test_tiles_change_neither_loss_nor_gradient(
    objective: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = [], []
    plain = Scores._by_tiles
    monkeypatch.setattr(
        Scores, "_by_tiles", lambda self, work, *rows: (
            seen.append(self.tile < len(rows[0]) if self.tile else False), plain(self, work, *rows)
        )[1],
    )  # fmt: skip
    for tile, most in ((None, 1), (5, 1), ("auto", 1 << 28), ("auto", 64)):
        monkeypatch.setattr(training, "MOST_LOGITS", most)
        rules = rules_of(tile=tile, objective=objective, batches=plan, symmetric=0.3)
        module, data = parts(rules)
        module.eval()
        loss = module.loss(next(iter(data.batches)))
        loss.backward()
        gradients = {
            n: p.grad.to_dense() for n, p in module.named_parameters() if p.grad is not None
        }
        found.append((loss.detach(), gradients))
    calls = len(seen) // 4
    assert [any(seen[i : i + calls]) for i in range(0, len(seen), calls)] == [
        False, True, False, True,
    ]  # fmt: skip
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-6)


# --- queue ----------------------------------------------------------------------------------------


def test_the_queue_stands_beside_the_candidates_with_the_vectors_of_its_steps() -> None:
    """The twin keeps each batch's vectors in a dictionary and joins them by hand."""
    rules = rules_of(queue=2, queue_after=3, batch_size=12, known="past")
    module, data = parts(rules, id_dropout=0.0, dropout=0.0, history="mean")
    module.train()
    memory: dict[int, Tensor] = {}
    with_queue, blocked = [], 0
    for number, batch in enumerate(data.batches):
        if number == 6:
            break
        if number == 5:  # as if one of them had never been encoded
            gone = int(batch.queued[0])
            module.remembered.written[gone] = False
            del memory[gone]
        with torch.no_grad():
            users, items = module.encode(batch)
            assert (number >= 3) == bool(len(batch.queued))
            rows = batch.rows[: batch.n_candidates].tolist()
            known = set(zip(*batch.known.tolist(), strict=True))
            assert not set(rows) & set(batch.queued.tolist())
            losses = []
            for b, positive in enumerate(batch.target.tolist()):
                total = math.exp(users[b] @ items[positive] / 0.1)
                for c, row in enumerate([*rows, *batch.queued.tolist()]):
                    if c == positive or (b, c) in known:
                        continue
                    if c >= len(rows) and row not in memory:
                        blocked += 1
                        continue
                    vector = items[c] if c < len(rows) else memory[row]
                    weight = math.exp(-batch.log_inclusion[c])
                    total += weight * math.exp(users[b] @ vector / 0.1)
                losses.append(math.log(total) - float(users[b] @ items[positive]) / 0.1)
        loss = module.loss(batch)
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
        with_queue.append(len(batch.queued))
        memory |= dict(zip(rows, items[: len(rows)], strict=True))
        loss.backward()
        with torch.no_grad():  # the vectors of today are not those of tomorrow
            for parameter in module.model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    assert with_queue[3:] and min(with_queue[3:]) > 0 and blocked


def test_what_is_remembered_is_written_in_training_only() -> None:
    module, data = parts(rules_of(queue=1))
    batch = next(iter(data.batches))
    module.eval().loss(batch)
    assert not module.remembered.written.any()
    module.train().loss(batch)
    written = module.remembered.written.nonzero()[:, 0]
    assert written.tolist() == sorted(batch.rows[: batch.n_candidates].tolist())


# --- mined ----------------------------------------------------------------------------------------


class Watch(lightning.Callback):
    """Mined edges of each batch, and whether all are of the table that was there when it began."""

    def __init__(self) -> None:
        self.edges: dict[int, list[int]] = defaultdict(list)
        self.strange = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        mined = batch.own_source == Source.MINED
        self.edges[trainer.current_epoch].append(int(mined.sum()))
        table = trainer.datamodule.batches.mined
        for query, place in batch.own[:, mined].T.tolist():
            user, item = int(batch.user.users[query]), int(batch.rows[place])
            self.strange += item not in table.items[table.offsets[user] : table.offsets[user + 1]]


def test_an_epoch_that_is_due_is_mined_for_before_its_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, tables = [], []
    plain = training.mine_again

    def watched(model: Any, batches: Batches, rules: MiningRules, epoch: int) -> bool:
        fresh = plain(model, batches, rules, epoch)
        calls.append((epoch, fresh, batches.done in (0, len(batches))))
        tables.append(batches.mined)
        return fresh

    monkeypatch.setattr(training, "mine_again", watched)
    rules = rules_of(mined=MiningRules(per_query=2, from_rank=0, to_rank=12, start=1, every=2))
    module, data = parts(rules)
    watch = Watch()
    run(module, data, 4, watch)
    assert calls == [(0, False, True), (1, True, True), (2, False, True), (3, True, True)]
    assert tables[1] is tables[2] and tables[1] is not tables[3]
    assert not np.array_equal(tables[1].items, tables[3].items)
    assert not any(watch.edges[0]) and not watch.strange
    assert all(min(watch.edges[epoch]) > 0 for epoch in (1, 2, 3))


# --- audit ----------------------------------------------------------------------------------------


def test_each_epoch_leaves_an_audit_and_its_numbers(tmp_path: Path) -> None:
    rules = rules_of(
        queue=1, queue_after=2, uniform_negatives=3, batch_size=8,
        mined=MiningRules(per_query=1, from_rank=0, to_rank=12, start=1),
    )  # fmt: skip
    module, data = parts(rules, audits=tmp_path / "audit")
    running = run(module, data, 2)
    files = sorted((tmp_path / "audit").iterdir())
    assert [path.name for path in files] == ["epoch-000.json", "epoch-001.json"]
    first, second = (json.loads(path.read_text()) for path in files)
    assert first["negatives"]["mined"] == 0 < second["negatives"]["mined"]
    assert first["negatives"]["queue"] > 0
    assert first["draws"]["batches"] == len(data.batches)
    metrics = running.callback_metrics
    assert metrics["audit/gradient/mined"] == pytest.approx(second["gradient"]["mined"])
    assert metrics["audit/draws/error"] == pytest.approx(second["draws"]["error"])
    quiet, data = parts(rules)
    assert "audit/push" in run(quiet, data, 1).callback_metrics  # without a folder


# --- objectives -----------------------------------------------------------------------------------


def ranked(module: TwoTowerModule, data: InteractionData, dimensions: int) -> float:
    """Mean reciprocal rank of what comes next by the first dimensions, among what is new."""
    validation = data.validation
    users = encode_users(module.model, validation.queries)[:, :dimensions]
    items = encode_items(module.model, np.arange(test_training.N_ITEMS))[:, :dimensions]
    users, items = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (users, items))
    score = users @ items.T
    score[:, 0] = -np.inf
    score[validation.seen.row_of(), validation.seen.values] = -np.inf
    wanted = score[np.arange(len(score)), validation.targets.values]
    return float((1 / (score >= wanted[:, None]).sum(1)).mean())


def test_cut_vectors_rank_better_when_they_were_trained_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("TASTES", 8), ("EACH", 5), ("N_ITEMS", 41)):
        monkeypatch.setattr(test_training, name, value)  # two tastes have room in any vector
    found = {}
    for cut in ((), (4,)):
        module, data = parts(rules_of(matryoshka=cut), history="mean", dimension=16)
        run(module, data, 10)
        found[cut] = (ranked(module, data, 4), ranked(module, data, 16))
    assert found[4,][0] > found[()][0] + 0.15
    assert min(found[4,][1], found[()][1]) > 0.9


def test_options_are_bound_to_the_objective() -> None:
    for options in ({}, {"form": "atan"}, {"form": "relu", "decoupled": False}):
        module, data = parts(rules_of(objective="psl", objective_options=options))
        batch = next(iter(data.batches))
        module.eval()
        scores = module.scores(batch, *module.encode(batch))
        torch.testing.assert_close(module.loss(batch), psl(scores, **options).mean())
    assert not torch.equal(psl(scores, form="atan"), psl(scores, form="relu"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('objective = "bsl"\nobjective_options = {t1 = 1.0}', "'bsl' has no option 't1'.*takes t2"),
        ('objective = "sl_at_k"\nobjective_options = {threshold = 1.0}', "no option 'threshold'"),
        ('objective = "psl"\nobjective_options = {form = "cosh"}', "'cosh'.*'tanh', 'atan' or"),
        ("objective_options = {decoupled = 2}", "'decoupled'.*is 2, but it should be a.*boolean"),
        ('objective = "bsl"\nobjective_options = {t2 = "1"}', "'t2'.*is '1'.*valid number"),
        ('objective = "hinge"', "'softmax'.*'triplet'"),
        ("symmetric = 1.5", "symmetric.*at most 1"),
    ],
)
def test_an_option_that_an_objective_does_not_take_is_refused_when_it_is_read(
    tmp_path: Path, lines: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\nlog = "x.csv"\n[training]\n{lines}\n')
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_options_that_can_be_meant_survive_being_written_and_read() -> None:
    from recsys.experiments.config import dump, loads

    said = '{form = "relu", decoupled = false}'
    text = f'[data]\nlog = "x"\n[training]\nobjective = "psl"\nobjective_options = {said}\n'
    config = loads(text)
    assert config.training.objective_options == {"form": "relu", "decoupled": False}
    assert loads(dump(config)) == config


# --- from item to user ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["random", "by_user"])
@pytest.mark.parametrize("history", ["mean", "multi_interest"])
def test_the_module_hands_the_correction_of_users_to_its_objective(plan: str, history: str) -> None:
    module, data = parts(rules_of(batches=plan, symmetric=0.25), history=history)
    module.eval()
    batch = next(iter(data.batches))
    scores = module.scores(batch, *module.encode(batch))
    log_weight = -batch.user_log_inclusion
    if plan == "by_user" and history == "multi_interest":
        # A column for each example: those of a user together weigh what the user did.
        weight = torch.zeros(batch.n_queries).index_add(
            0, batch.owner, scores.user_log_weight.exp()
        )
        torch.testing.assert_close(weight, log_weight.exp())
    else:
        torch.testing.assert_close(scores.user_log_weight, log_weight)
    loss = 0.75 * softmax(scores) + 0.25 * softmax(scores.transposed())
    torch.testing.assert_close(module.loss(batch), loss.mean())
    bare, _ = parts(rules_of(batches=plan, symmetric=0.25, logq=0.0), history=history)
    assert bare.eval().scores(batch, *bare.encode(batch)).user_log_weight is None


# --- how it is made small -------------------------------------------------------------------------


def test_the_rate_rises_and_falls_by_hand() -> None:
    constant = partial(learning_rate_at, warmup=3, steps=None)
    assert [constant(step) for step in (0, 1, 2, 3, 900)] == [0.25, 0.5, 0.75, 1, 1]
    cosine = partial(learning_rate_at, warmup=3, steps=12)
    assert [cosine(step) for step in (0, 12, 13)] == [0.25, 0, 0]
    assert cosine(6) == pytest.approx(0.5)
    assert cosine(4) == pytest.approx(0.75) and cosine(8) == pytest.approx(0.25)
    assert cosine(2) == pytest.approx(0.75 * 0.5 * (1 + math.sqrt(0.75)))


class Rates(lightning.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("fitted", [2, 4])
def test_a_refit_of_fewer_epochs_follows_the_curve_of_all(fitted: int) -> None:
    module, data = parts(rules_of(schedule="cosine", epochs=4, warmup_steps=3))
    rates = Rates()
    run(module, data, fitted, rates)
    assert len(rates.seen) == 7 * fitted
    wanted = [0.02 * learning_rate_at(step, warmup=3, steps=28) for step in range(7 * fitted)]
    assert rates.seen == pytest.approx(wanted)


def test_sparse_and_dense_gradients_are_clipped_as_dense_ones_would_be() -> None:
    module, data = parts(rules_of(gradient_clip=0.2), history_table="own", user_id=True)
    twin = copy.deepcopy(module)
    for each in twin.modules():
        if isinstance(each, nn.Embedding):
            each.sparse = False
    batch, found = next(iter(data.batches)), []
    for each in (module.eval(), twin.eval()):
        each.loss(batch).mul(50).backward()
        norm = torch.stack(
            [p.grad.to_dense().norm() for p in each.parameters() if _moves(p)]
        ).norm()
        assert norm > 0.5
        if each is module:
            assert sum(p.grad.is_sparse for p in each.parameters() if _moves(p)) == 2
            each.configure_gradient_clipping(each.configure_optimizers()["optimizer"])
        else:
            assert not any(p.grad.is_sparse for p in each.parameters() if _moves(p))
            nn.utils.clip_grad_norm_(each.parameters(), 0.2)
        found.append({n: p.grad.to_dense() for n, p in each.named_parameters() if _moves(p)})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert torch.stack([g.norm() for g in found[0].values()]).norm() == pytest.approx(0.2, rel=1e-4)


# --- going on -------------------------------------------------------------------------------------

EVERYTHING = {
    "queue": 2, "queue_after": 2, "counts": "streaming", "learn_temperature": True,
    "schedule": "cosine", "epochs": 4, "symmetric": 0.3, "uniform_negatives": 3,
    "mined": MiningRules(per_query=2, from_rank=0, to_rank=12, start=1, every=2),
}  # fmt: skip


class Saves(lightning.Callback):
    """A checkpoint after some steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (3, 7, 10, 14, 18):
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TwoTowerModule, Path]:
    """Three epochs of 7 batches with all that has a state, and checkpoints on the way."""
    folder = tmp_path_factory.mktemp("whole")
    module, data = parts(rules_of(**EVERYTHING))
    ended = lightning.callbacks.ModelCheckpoint(folder, filename="ended-{epoch}", save_top_k=-1)
    run(module, data, 3, Saves(folder), ended, enable_checkpointing=True)
    return module, folder


@pytest.mark.parametrize(
    "name", ["step=3", "step=7", "step=10", "step=14", "step=18", "ended-epoch=0", "ended-epoch=1"]
)
def test_a_run_with_every_state_goes_on_bit_for_bit(
    whole: tuple[TwoTowerModule, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, at its last step, and between two; what was mined is not mined again."""
    uninterrupted, folder = whole
    mined = []
    plain = training.mine_again
    monkeypatch.setattr(
        training, "mine_again", lambda *given: mined.append((given[3], plain(*given)))
    )
    module, data = parts(rules_of(**EVERYTHING))
    running = run(module, data, 3, resume=folder / f"{name}.ckpt")
    assert running.global_step == 21
    assert mined == {
        "step=3": [(1, True), (2, False)],
        "step=7": [(1, True), (2, False)],
        "ended-epoch=0": [(1, True), (2, False)],
        "step=18": [],
    }.get(name, [(2, False)])
    assert equal(uninterrupted, module)
    assert module.remembered.written.any() and module.temperature().item() != 0.1


def test_a_window_of_old_events_weighs_less_than_one_of_new_ones() -> None:
    """With a half-life, windows in time hold events of one age; their losses must not be evened."""
    rng = np.random.default_rng(0)
    size = 200
    timeline = Timeline.build(
        rng.integers(1, 9, size), rng.integers(1, 60, size).astype(np.int32),
        np.arange(size) * DAY, n_users=9, first_seen=np.zeros(60, np.int64),
    )  # fmt: skip
    events = TrainingEvents(timeline, None, None, None, None, np.arange(1, 60))
    batches = list(Batches(events, plan="in_time", batch_size=50, half_life=20 * DAY, known="none"))
    items = FeatureTable(60)
    model = TwoTower(
        TowerRules(dimension=4, hidden=0, dropout=0.0, id_dropout=0.0), items, FeatureTable(9),
        items.spec(60, {}), FeatureSpec(),
    )  # fmt: skip
    module = TwoTowerModule(model, TrainingRules()).eval()
    plain = [replace(one, weight=torch.ones(len(one)), usual_weight=None) for one in batches]
    with torch.no_grad():
        share = [
            float(module.loss(a) / module.loss(b)) for a, b in zip(batches, plain, strict=True)
        ]
    wanted = [float(one.weight.mean()) / batches[0].usual_weight for one in batches]
    assert share == pytest.approx(wanted, rel=0.1) and max(wanted) > 4 * min(wanted)
