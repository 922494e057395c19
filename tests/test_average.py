"""What keeps towers from learning a log by heart: the average of the weights, dropped texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.towers import training
from recsys.towers.training import Average
from tests.test_learning import _one_thread as one_thread
from tests.test_learning import equal, parts, rules_of, run

lightning = pytest.importorskip("pytorch_lightning")
assert one_thread  # a fixture that runs by itself


class Watches(lightning.Callback):
    """The weights after each step, and those that each validation saw."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validated: list[dict[str, Any]] = []

    def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
        self.steps.append(weights(module))

    def on_validation_batch_start(self, _: Any, module: Any, *__: Any) -> None:
        self.validated.append(weights(module))


def weights(module: torch.nn.Module) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_kept_and_validated_is_the_average_of_what_was_learned(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "AVERAGE_EVERY", every)
    monkeypatch.setattr(training, "WARMUP_STEPS", 2)
    rules = rules_of(average=0.8)
    module, data = parts(rules, ensemble=2)
    watches = Watches()
    running = run(module, data, 2, Average(rules), watches)
    steps, size = watches.steps, running.num_training_batches
    assert len(steps) == 2 * size > 6
    averages, average = [], None
    for step, now in enumerate(steps):
        if step < 2 or average is None:
            average = now
        elif step % every == 0:
            average = {k: 0.8**every * average[k] + (1 - 0.8**every) * now[k] for k in now}
        averages.append(average)
    for name, kept in weights(module).items():
        torch.testing.assert_close(kept, averages[-1][name])
        torch.testing.assert_close(watches.validated[0][name], averages[size - 1][name])
    moved = "model.item_tower.inputs.ids.weight"
    assert (weights(module)[moved] - steps[-1][moved]).abs().max() > 1e-3
    untouched, data = parts(rules_of(), ensemble=2)
    run(untouched, data, 2, plain := Watches())
    assert all(
        torch.equal(one[k], other[k])
        for one, other in zip(plain.steps, steps, strict=True)
        for k in one
    )  # it only watches


def test_an_average_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "AVERAGE_EVERY", 1)
    monkeypatch.setattr(training, "WARMUP_STEPS", 2)
    rules = rules_of(average=0.9)

    def learn(*callbacks: Any, **options: Any) -> Any:
        module, data = parts(rules)
        run(module, data, 3, Average(rules), *callbacks, **options)
        return module

    ended = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = learn(ended, enable_checkpointing=True)
    assert equal(whole, learn(resume=tmp_path / "epoch=0.ckpt"))
    # What a checkpoint is read for is the average.
    last = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    for name, kept in weights(whole).items():
        torch.testing.assert_close(last[name], kept)


def test_texts_are_dropped_from_in_training_only() -> None:
    from recsys.towers.embedding import FeatureEmbedding, FeatureSpec, FeatureTable

    texts = torch.eye(40)
    layer = FeatureEmbedding(FeatureSpec(text=40), 6, text_dropout=0.3)
    table, rows = FeatureTable(40, text=texts), torch.arange(40)
    torch.testing.assert_close(layer.eval()(rows, table), layer.text.weight.T)
    torch.manual_seed(0)
    learned = layer.train()(rows, table)
    kept = learned.abs().amax(1) > 0
    assert 18 <= kept.sum() < 40
    torch.testing.assert_close(learned[kept], layer.text.weight.T[kept] / 0.7)


def test_a_run_shorter_than_its_warm_up_keeps_what_it_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "WARMUP_STEPS", 100)
    kept = []
    rules = rules_of(average=0.998)
    for callbacks in ([], [Average(rules)]):
        module, data = parts(rules)
        run(module, data, 1, *callbacks)
        kept.append(module)
    assert equal(*kept)
