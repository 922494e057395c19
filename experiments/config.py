"""An experiment as a value: read from TOML, checked at birth, written beside the run.

Each section is owned by the room that obeys it. `load` reads a run file and the overrides of the
command line, `dump` writes a value that can start the run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from recsys.experiments import toml
from recsys.experiments.evaluation.evaluate import EvaluateRules
from recsys.experiments.tracking.track import TrackRules
from recsys.features.prepared.skips import SkipRules
from recsys.features.readers.read import DataSource
from recsys.features.text.rules import StaticText, TextRules
from recsys.serving.index import IndexRules
from recsys.split import SplitRules
from recsys.tables import Strict
from recsys.towers.rules import TowerRules, TrainingRules


class RunConfig(Strict):
    """Everything that decides a run; relative paths are relative to the current directory."""

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


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: a TOML file.
        overrides: `section.key=value`; the value is TOML, and a bare word is text.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or a value cannot be meant.
    """
    return toml.read(RunConfig, path, overrides)


def loads(text: str, source: str = "The configuration") -> RunConfig:
    """Read a run from TOML text; the inverse of `dump`."""
    return toml.parse(RunConfig, text, source)


def dump(config: RunConfig) -> str:
    """TOML that starts the same run again, defaults written out."""
    return toml.dump(config)
