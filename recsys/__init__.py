"""Two-tower recommendation: train on interaction logs, answer with nearest items.

from recsys import Recommender
recommender = Recommender.load("runs/demo/bundle")
recommender.similar(text="brass desk lamp", k=5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_DOORS = {
    "Recommender": "recsys.serving.recommender",
    "TwoTower": "recsys.towers.two_tower",
    "TwoTowerModule": "recsys.towers.training",
    "InteractionData": "recsys.towers.data",
    "RunConfig": "recsys.experiments.config",
    "evaluate": "recsys.experiments.evaluation.evaluate",
    "prepare": "recsys.experiments.run",
    "train": "recsys.experiments.run",
}

if TYPE_CHECKING:
    from recsys.experiments.config import RunConfig
    from recsys.experiments.evaluation.evaluate import evaluate
    from recsys.experiments.run import prepare, train
    from recsys.serving.recommender import Recommender
    from recsys.towers.data import InteractionData
    from recsys.towers.training import TwoTowerModule
    from recsys.towers.two_tower import TwoTower

__all__ = [
    "InteractionData", "Recommender", "RunConfig", "TwoTower", "TwoTowerModule", "evaluate",
    "prepare", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazily: `import recsys` must not wait for torch.
    if name not in _DOORS:
        raise AttributeError(f"recsys has no {name!r}; it has {', '.join(sorted(_DOORS))}.")
    import importlib

    value = getattr(importlib.import_module(_DOORS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_DOORS, "__version__", "__doc__", "__all__"})
