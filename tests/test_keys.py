"""The list of keys: every key told, docs/CONFIG.md current, and no key without an effect."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from recsys.errors import ConfigError
from recsys.experiments import config, keys

ROOT = Path(__file__).parents[1]


def test_every_key_has_a_meaning_a_range_and_a_default_that_can_be_read() -> None:
    seen = set()
    for section in keys.sections():
        for key in section.keys:
            assert key.meaning and key.range, (section.name, key.name)
            if key.default is not None:
                tomllib.loads(f"key = {key.default}")
            seen.add((section.name, key.name))
    assert {("training", "epochs"), ("towers.history", "layers"), ("", "seed")} <= seen


def test_the_page_of_keys_is_current() -> None:
    written = (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")
    assert written == keys.page(), "recsys keys --markdown > docs/CONFIG.md"


def test_keys_prints_a_section_with_kinds_defaults_and_ranges(
    recsys: Callable[..., SimpleNamespace],
) -> None:
    said = recsys("keys", "towers.history").out
    assert '"none" | "mean" | "attention" | "transformer"' in said
    assert "layers = 1 (kind = transformer)" in said and "whole number, at least 1" in said
    assert "[training.negatives]" in recsys("keys", "training").out
    (listed,) = json.loads(recsys("keys", "towers.history", "--json").out)
    layers = next(key for key in listed["keys"] if key["name"] == "layers")
    assert layers["default"] == "1" and layers["kinds"] == ["transformer"]
    assert "## [index]" in recsys("keys", "index", "--markdown").out
    wrong = recsys("keys", "trainings")
    assert wrong.code == 2 and "Did you mean 'training'?" in wrong.err


def test_defaults_written_out_are_the_defaults() -> None:
    lines = ["[data]", 'log = "x.csv"']
    for section in keys.sections():
        if section.name.startswith(("towers", "training", "text", "index", "evaluate")):
            kind = next((k.default for k in section.keys if k.name == "kind"), None)
            lines.append(f"[{section.name}]")
            lines += [
                f"{key.name} = {key.default}"
                for key in section.keys
                if key.default and (not key.kinds or (kind or "").strip('"') in key.kinds)
            ]
    assert config.loads("\n".join(lines)) == config.loads('[data]\nlog = "x.csv"')


EFFECTLESS = [
    ("towers.history", 'kind = "attention"', "decay = 1.0"),
    ("towers.history", 'kind = "attention"', "layers = 2"),
    ("towers.history", 'kind = "mean"', "heads = 2"),
    ("towers.history", 'kind = "mean"', "hidden = 64"),
    ("towers.history", 'kind = "attention"', "entry_dropout = 0.1"),
    ("towers.history", 'kind = "none"', "length = 5"),
    ("towers.history", 'kind = "none"', 'inputs = ["recency"]'),
    ("towers.history", 'kind = "none"', 'table = "own"'),
    ("training.negatives", 'kind = "all"', "uniform = 8"),
    ("training.negatives", 'kind = "all"', "queue = 2"),
    ("training.negatives", 'kind = "all"', "logq = 0.5"),
    ("training.id_init", 'kind = "random"', "powers = [0, 0, 0]"),
    ("text", 'kind = "static"', 'model = "m"'),
    ("text", 'kind = "static"', 'device = "cpu"'),
    ("text", 'kind = "static"', "layers = 3"),
    ("text", 'kind = "small_transformer"', 'beside = ["split"]'),
    ("text", 'kind = "pretrained"\nmodel = "m"', "dimension = 64"),
    ("text", 'kind = "pretrained"\nmodel = "m"', 'views = ["split"]'),
    ("text", 'kind = "pretrained"\nmodel = "m"', "epochs = 2"),
    ("index", 'kind = "exact"', "m = 8"),
    ("index", 'kind = "exact"', "ef_construction = 50"),
    ("index", 'kind = "exact"', "ef = 50"),
    ("index", 'kind = "exact"', "threads = 2"),
    ("split", 'kind = "leave_one_out"', "test = 0.2"),
    ("split", 'kind = "leave_one_out"', "valid = 0.2"),
    ("training", "", "text_learning_rate = 0.5"),
    ("data.columns", "", 'shown = "list"'),
    ("data.columns", "", 'clicked = "list"'),
    ("data.columns", "", 'items = "list"'),
    ("data.columns", "", 'separator = ";"'),
    ("data.columns", "", "positive_from = 3"),
    ("data.columns", "", "rejected_to = 2"),
    ("data.columns", "", "short_dwell = 2"),
    ("data.columns", "", "positive = { buy = 2 }"),
    ("data.columns", "", 'rejected = ["hide"]'),
    ("data.columns", "", 'shown_events = ["seen"]'),
    ("data.catalog", "", 'title = "name"'),
    ("data.user_table", "", 'numbers = ["age"]'),
]


@pytest.mark.parametrize(
    ("section", "kind", "line"), EFFECTLESS, ids=[f"{s}.{x.split()[0]}" for s, _, x in EFFECTLESS]
)
def test_a_key_without_an_effect_is_refused_with_the_way_out(
    section: str, kind: str, line: str
) -> None:
    head = '[data]\nlog = "x.csv"\n'
    config.loads(f"{head}[{section}]\n{kind}\n")
    with pytest.raises(ConfigError) as refused:
        config.loads(f"{head}[{section}]\n{kind}\n{line}\n")
    said = str(refused.value)
    assert line.split()[0] in said
    assert "eave" in said or "Set " in said or "key" in said


def test_paths_in_a_file_are_relative_to_it_and_those_of_the_command_to_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my shop"
    folder.mkdir()
    run = folder / "run.toml"
    run.write_text(
        'out = "runs"\n[data]\nlog = ["a.csv", "/abs/b.csv"]\nitems = "s3://shop/items.parquet"\n'
        '[training.negatives]\nfile = "n.csv"\n'
    )
    monkeypatch.chdir(tmp_path)
    found = config.load("my shop/run.toml", ["data.users=people.csv"])
    assert found.out == os.path.join("my shop", "runs")
    assert found.data.log == (os.path.join("my shop", "a.csv"), "/abs/b.csv")
    assert found.data.items == "s3://shop/items.parquet" and found.data.users == "people.csv"
    assert found.training.negatives.file == os.path.join("my shop", "n.csv")
    assert config.RunConfig.load(run).data.log == (str(folder / "a.csv"), "/abs/b.csv")
    # What is written beside a run starts it again from anywhere.
    again = config.loads(config.dump(config.absolute(found)))
    assert again.data.log == (str(folder / "a.csv"), "/abs/b.csv")
    assert again.data.users == str(tmp_path / "people.csv")
