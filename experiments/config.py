"""Run configuration: read from TOML, validated, written beside the run.

Each section is owned by the room that obeys it. `load` reads a run file and the overrides of the
command line, `dump` writes a value that can start the run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from recsys.errors import ConfigError
from recsys.experiments import toml
from recsys.experiments.evaluation.queries import EvaluateRules
from recsys.experiments.tracking.track import TrackRules
from recsys.features.prepared.skips import SkipRules
from recsys.features.readers.read import DataSource
from recsys.features.text.rules import StaticText, TextRules
from recsys.serving.index import IndexRules
from recsys.split import SplitRules
from recsys.tables import Strict
from recsys.towers.rules import TowerRules, TrainingRules


class RunConfig(Strict):
    """Everything that decides a run.

    Paths are relative to the current folder here, and to the folder of the file in a TOML file.
    """

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w][\w.-]*$")] = "run"
    """Names the run's folder and its MLflow run: letters, digits, `_`, `.` and `-`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Two runs of one configuration and seed on one machine give the same numbers."""
    out: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of prepared data, runs, bundles and the embedded MLflow store."""
    data: DataSource
    """Which files, in which form, with which columns."""
    split: SplitRules = Field(default_factory=SplitRules)
    skips: SkipRules = Field(default_factory=SkipRules)
    text: TextRules = Field(default_factory=StaticText)
    towers: TowerRules = Field(default_factory=TowerRules)
    training: TrainingRules = Field(default_factory=TrainingRules)
    index: IndexRules = Field(default_factory=IndexRules)
    evaluate: EvaluateRules = Field(default_factory=EvaluateRules)
    track: TrackRules = Field(default_factory=TrackRules)

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        rate = TrainingRules.model_fields["text_learning_rate"].default
        if self.text.train == "frozen" and self.training.text_learning_rate != rate:
            raise ConfigError(
                'training.text_learning_rate has no effect: text.train = "frozen" leaves the text '
                'encoder as it is. Set text.train = "all", or leave it out.'
            )
        if self.split.kind == "leave_one_out":
            for key in ("test", "valid"):
                if getattr(self.split, key) != SplitRules.model_fields[key].default:
                    raise ConfigError(
                        f'split.{key} has no effect: kind = "leave_one_out" takes the last '
                        'positive of each user. Set kind = "last_share" or "time", or leave it out.'
                    )
        return self

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a run file, see `recsys.experiments.config.load`."""
        return load(path, overrides)


PATHS = (
    "out", "data.log", "data.train", "data.valid", "data.test", "data.items", "data.users",
    "training.negatives.file",
)  # fmt: skip
"""Keys that hold paths."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: a TOML file; paths in it are relative to its folder.
        overrides: `section.key=value`; the value is TOML, and a bare word is text. Paths are
            relative to the current folder.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or a value cannot be meant.
    """
    return toml.read(RunConfig, path, overrides, paths=PATHS)


def loads(text: str, source: str = "The configuration") -> RunConfig:
    """Read a run from TOML text; the inverse of `dump`."""
    return toml.parse(RunConfig, text, source)


def dump(config: RunConfig) -> str:
    """TOML that starts the same run again, defaults written out."""
    return toml.dump(config)


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that its TOML starts the run from any folder."""
    values = config.model_dump(mode="json")
    for key in PATHS:
        toml.beside(values, key.split("."), Path.cwd())
    return toml.check(RunConfig, values, "The configuration")
