"""How the parts of training meet: samplers, queue, mining, audit, losses, schedule, resuming."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import RULES, checkerboard, equal, towers, trainer
from torch import Tensor, nn

from recsys.features.batching.batch import Batch, Source
from recsys.features.batching.batches import Batches
from recsys.towers import data as data_module
from recsys.towers import training
from recsys.towers.data import InteractionData
from recsys.towers.logits import BatchLogits
from recsys.towers.losses import softmax
from recsys.towers.rules import MiningRules, TowerRules, TrainingRules
from recsys.towers.training import TwoTowerModule, learning_rate_at

lightning = pytest.importorskip("pytorch_lightning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Short runs on one thread: they warm up in three steps, and use the queue after three."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "WARMUP_STEPS", 3)
        patched.setattr(data_module, "QUEUE_AFTER", 3)
        yield
    torch.set_num_threads(before)


def rules_of(**changes: Any) -> TrainingRules:
    return TrainingRules(**{**RULES.model_dump(exclude_unset=True), **changes})


def parts(
    rules: TrainingRules, audits: Path | None = None, **shape: Any
) -> tuple[TwoTowerModule, InteractionData]:
    events, validation = checkerboard(timed=rules.batches == "in_time")
    settled = TowerRules(**{"dimension": 8, "hidden": 8, "history": {"length": 5}, **shape})
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
        found = [module.batch_loss(batch).item() for batch in batches]
    module.train(was)
    return float(np.mean(found))


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


# --- plans and histories --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        ("random", {"history": "attention"}),
        ("random", {"history": {"kind": "mean", "decay": 1.0}}),
        ("in_time", {"history": "mean", "score": "dot"}),
        ("by_user", {"history": {"kind": "mean", "table": "own"}}),
        ("sequences", {"history": {"kind": "transformer", "hidden": 16}}),
        ("random", {"history": "attention", "ensemble": 2, "example_age": 3}),
        ("sequences", {"history": "transformer", "ensemble": 2, "example_age": 3}),
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
    assert data.batches.query_kind.whole_users == (plan in ("by_user", "sequences"))
    before = mean_loss(module, parts(rules, **shape)[1].batches)
    running = run(module, data, 1)
    after = mean_loss(module, parts(rules, **shape)[1].batches)
    assert math.isfinite(before) and after < 0.97 * before
    assert 0 <= running.callback_metrics["val/recall_at_1"] <= 1
    assert math.isfinite(running.callback_metrics["train/loss"])


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
@pytest.mark.parametrize("plan", ["random", "by_user"])
def test_tiles_change_neither_loss_nor_gradient(
    loss: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = [], []
    plain = BatchLogits._by_tiles
    monkeypatch.setattr(
        BatchLogits, "_by_tiles", lambda self, work, *rows: (
            seen.append(self.tile < len(rows[0]) if self.tile else False), plain(self, work, *rows)
        )[1],
    )  # fmt: skip
    for most in (1 << 28, 64):
        monkeypatch.setattr(training, "MAX_LOGITS", most)
        rules = rules_of(loss=loss, batches=plan, symmetric=0.3)
        module, data = parts(rules)
        module.eval()
        value = module.batch_loss(next(iter(data.batches)))
        value.backward()
        gradients = {
            n: p.grad.to_dense() for n, p in module.named_parameters() if p.grad is not None
        }
        found.append((value.detach(), gradients))
    calls = len(seen) // 2
    assert [any(seen[i : i + calls]) for i in range(0, len(seen), calls)] == [False, True]
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-6)


# --- queue ----------------------------------------------------------------------------------------


def test_the_queue_stands_beside_the_candidates_with_the_vectors_of_its_steps() -> None:
    """The twin keeps each batch's vectors in a dictionary and joins them by hand."""
    rules = rules_of(negatives={"queue": 2}, batch_size=12)
    module, data = parts(rules, id_dropout=0.0, dropout=0.0, history={"kind": "mean"})
    module.train()
    memory: dict[int, Tensor] = {}
    with_queue, blocked = [], 0
    for number, batch in enumerate(data.batches):
        if number == 6:
            break
        if number == 5:  # as if one of them had never been encoded
            gone = int(batch.queued[0])
            module.memory_bank.written[gone] = False
            del memory[gone]
        with torch.no_grad():
            users, items = module.encode(batch)
            assert (number >= 3) == bool(len(batch.queued))
            rows = batch.rows[: batch.n_candidates].tolist()
            known = set(zip(*batch.positive_mask.tolist(), strict=True))
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
        loss = module.batch_loss(batch)
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
        with_queue.append(len(batch.queued))
        memory |= dict(zip(rows, items[: len(rows)], strict=True))
        loss.backward()
        with torch.no_grad():  # the vectors of today are not those of tomorrow
            for parameter in module.model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    assert with_queue[3:] and min(with_queue[3:]) > 0 and blocked


def test_what_is_remembered_is_written_in_training_only() -> None:
    module, data = parts(rules_of(negatives={"queue": 1}))
    batch = next(iter(data.batches))
    module.eval().batch_loss(batch)
    assert not module.memory_bank.written.any()
    module.train().batch_loss(batch)
    written = module.memory_bank.written.nonzero()[:, 0]
    assert written.tolist() == sorted(batch.rows[: batch.n_candidates].tolist())


# --- mined ----------------------------------------------------------------------------------------


class Watch(lightning.Callback):
    """Mined edges of each batch, and whether all are of the table that was there when it began."""

    def __init__(self) -> None:
        self.edges: dict[int, list[int]] = defaultdict(list)
        self.strange = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        mined = batch.per_query_source == Source.MINED
        self.edges[trainer.current_epoch].append(int(mined.sum()))
        table = trainer.datamodule.batches.mined
        for query, place in batch.per_query[:, mined].T.tolist():
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
    rules = rules_of(mined=MiningRules(per_query=2, from_rank=0, to_rank=12))
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
        negatives={"queue": 1, "uniform": 3}, batch_size=8,
        mined=MiningRules(per_query=1, from_rank=0, to_rank=12),
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


# --- from item to user ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["random", "by_user"])
def test_the_module_hands_the_correction_of_users_to_its_loss(plan: str) -> None:
    module, data = parts(rules_of(batches=plan, symmetric=0.25), history="mean")
    module.eval()
    batch = next(iter(data.batches))
    scores = module.logits(batch, *module.encode(batch))
    log_weight = -batch.user_log_inclusion
    torch.testing.assert_close(scores.user_log_weight, log_weight)
    loss = 0.75 * softmax(scores) + 0.25 * softmax(scores.transposed())
    torch.testing.assert_close(module.batch_loss(batch), loss.mean())
    bare, _ = parts(rules_of(batches=plan, symmetric=0.25, negatives={"logq": 0.0}), history="mean")
    assert bare.eval().logits(batch, *bare.encode(batch)).user_log_weight is None


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
    module, data = parts(rules_of(schedule="cosine", epochs=4))
    rates = Rates()
    run(module, data, fitted, rates)
    assert len(rates.seen) == 7 * fitted
    wanted = [0.02 * learning_rate_at(step, warmup=3, steps=28) for step in range(7 * fitted)]
    assert rates.seen == pytest.approx(wanted)


def test_sparse_and_dense_gradients_are_clipped_as_dense_ones_would_be() -> None:
    module, data = parts(
        rules_of(gradient_clip=0.2),
        history={"kind": "attention", "length": 5, "table": "own"},
        user_id=True,
    )
    twin = copy.deepcopy(module)
    for each in twin.modules():
        if isinstance(each, nn.Embedding):
            each.sparse = False
    batch, found = next(iter(data.batches)), []
    for each in (module.eval(), twin.eval()):
        each.batch_loss(batch).mul(50).backward()
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
    "temperature": "learned", "negatives": {"queue": 2, "uniform": 3},
    "schedule": "cosine", "epochs": 4, "symmetric": 0.3,
    "mined": MiningRules(per_query=2, from_rank=0, to_rank=12),
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
    assert module.memory_bank.written.any() and module.temperature().item() != 0.1
