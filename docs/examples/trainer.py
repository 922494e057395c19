"""A Lightning Trainer of one's own around the towers, and a bundle of what it learned.

    python docs/examples/trainer.py run.toml my-bundle

`recsys.train` is these steps with early stopping, refit, scorecard and MLflow. Here the Trainer is
yours: callbacks, loggers, strategies and devices as Lightning takes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as lightning

from recsys import InteractionData, Recommender, RunConfig, TwoTowerModule, prepare
from recsys.experiments.bundling import make_bundle
from recsys.experiments.run import Untrained, validation_of
from recsys.towers.build import standardise


def main(run: str, folder: str, **trainer: object) -> Recommender:
    """Train, write a bundle, and answer from it.

    Args:
        run: a run file.
        folder: of the bundle.
        trainer: how Lightning trains; here it goes two epochs on the CPU.
    """
    config = RunConfig.load(run)
    dataset = prepare(config)
    towers = Untrained(config, dataset)
    model = towers.make()
    data = InteractionData(
        dataset,
        validation_of(config, dataset, model),
        config.training,
        towers=config.towers,
        statistics=model.uses_statistics,
        seed=config.seed,
    )
    standardise(model, data.events, config.seed)
    module = TwoTowerModule(model, config.training)
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, **trainer}
    lightning.Trainer(**options).fit(module, data)
    path = make_bundle(config, dataset, module.model.cpu().eval(), towers.encoder, Path(folder))
    return Recommender.load(path)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
