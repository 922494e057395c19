"""docs/examples: each runs as it stands, by the doors that its first lines name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    from recsys.features.readers.read import DataSource, read

    log = tmp_path / "likes.txt"
    log.write_text("2024-05-01 ann likes rye bread\n2024-05-02 bob likes tea\n")
    found = read(DataSource(format="reader:likes", log=str(log))).interactions.collect()
    assert found["user"].to_list() == ["ann", "bob"]
    assert found["item"].to_list() == ["rye bread", "tea"]
    assert found["time"].diff()[1] == 86_400_000_000


def test_a_tower_of_ones_own_is_trained_saved_and_answers(
    build: Callable[..., Any], market_run: str, tmp_path: Path
) -> None:
    from tower import GRUHistory

    from recsys import Recommender

    custom = '[towers.history]\nkind = "custom"\nmodule = "tower:GRUHistory"\nlength = 6\n'
    run = f"{market_run}{custom}[training]\nepochs = 1\nbatch_size = 64\n"
    built = build(run, tmp_path, trained=True)
    recommender = Recommender.load(built.bundle)
    assert isinstance(recommender.bundle.model.user_tower.history, GRUHistory)
    items = recommender.bundle.items.ids.to_list()
    forward = recommender.recommend(history=items[:4], k=5, drop_seen=False)
    backward = recommender.recommend(history=items[3::-1], k=5, drop_seen=False)
    assert forward.fallback is None and len(forward.ids) == 5
    assert not np.allclose(forward.scores, backward.scores)  # it reads the order


@pytest.mark.parametrize(
    ("module", "says"),
    [("tower", "not known"), ("tower:nothing", "imported"), ("os:getcwd", "no class")],
)
def test_a_tower_that_is_none_is_refused(module: str, says: str) -> None:
    from recsys.experiments.config import loads

    with pytest.raises(ConfigError, match=says):
        loads(f'[data]\nlog = "x.csv"\n[towers.history]\nkind = "custom"\nmodule = "{module}"\n')


def test_a_text_encoder_of_ones_own(tmp_path: Path) -> None:
    from recsys.features.text.encoder import fit_encoder
    from recsys.features.text.rules import PretrainedText

    vectors = tmp_path / "vectors.txt"
    vectors.write_text("tea 1 0\ncoffee 0.8 0.6\nlamp 0 1\n")
    folder = tmp_path / "my-encoder"
    command = [sys.executable, str(EXAMPLES / "text_encoder.py"), str(vectors), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    encoder = fit_encoder([], PretrainedText(model=str(folder)))
    found = encoder.encode(["Tea", "tea, coffee", "lamp", "nothing known"])
    expected = [[1, 0], np.array([1.8, 0.6]) / np.hypot(1.8, 0.6), [0, 1], [0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_trainer_of_ones_own_writes_a_bundle(market_run: str, tmp_path: Path) -> None:
    import trainer

    run = tmp_path / "run.toml"
    run.write_text(f'out = "runs"\n{market_run}[training]\nbatch_size = 64\n')
    options = {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False}
    recommender = trainer.main(str(run), str(tmp_path / "bundle"), **options)
    answers = recommender.similar(recommender.bundle.items.ids[0], k=3)
    assert len(answers.ids) == 3


def test_frames_are_logs_and_item_tables(market: Path, tmp_path: Path) -> None:
    """The same run from files, from Polars frames and from pandas frames."""
    import recsys

    events = pl.read_csv(market / "events.csv", infer_schema=False)
    items = pl.read_parquet(market / "items.parquet")
    rest = {
        "split": {"test": "2d", "valid": "1d"},
        "towers": {"dimension": 8, "hidden": 8},
        "training": {"epochs": 1, "batch_size": 64},
        "track": {"enabled": False},
    }
    found = []
    for log, table in (
        (str(market / "events.csv"), str(market / "items.parquet")),
        (events, items),
        (events.lazy(), items),
        (events.to_pandas(), items.to_pandas()),
    ):
        config = recsys.RunConfig(
            out=str(tmp_path), data={"log": log, "items": table, "catalog": {"title": "title"}},
            **rest,
        )  # fmt: skip
        dataset = recsys.prepare(config)
        found.append((dataset.items.ids.to_list(), dataset.event_item.tolist()))
    assert found[0] == found[1] == found[2] == found[3]
    result = recsys.train(config)
    # What was trained from frames can be trained again, and judged, without them.
    run = result.bundle.parent / "run.toml"
    assert recsys.RunConfig.load(run).data.log.endswith(".parquet")
    recommender = recsys.Recommender.load(result.bundle)
    card = recommender.evaluate(events)
    assert card == recsys.evaluate(result.bundle, str(market / "events.csv")) | {
        "protocol": card["protocol"]
    }
    assert recommender.evaluate()["model"] == result.scorecard["model"]


def test_frames_of_sequences_and_of_impressions_are_read() -> None:
    from recsys.features.readers.read import DataSource, read

    frame = pl.DataFrame({"user": ["u", "v"], "items": [["a", "b"], ["c"]]})
    found = read(DataSource(format="sequences", log=frame)).interactions.collect()
    assert found["item"].to_list() == ["a", "b", "c"]
    frame = pl.DataFrame(
        {"user": ["u"], "time": [1_700_000_000], "shown": [["a", "b"]], "clicked": [["b"]]}
    )
    read_ = read(DataSource(format="impressions", log=frame))
    assert read_.interactions.collect()["item"].to_list() == ["b"]
    assert read_.impressions.collect()["shown"].to_list() == [["a", "b"]]


def test_a_frame_needs_a_format_of_rows() -> None:
    import recsys

    with pytest.raises(ConfigError, match=r"data\.log is a frame.*set data\.format to events"):
        recsys.RunConfig(data={"format": "mind", "log": pl.DataFrame({"a": [1]})})


def test_what_the_library_offers_is_listed() -> None:
    import recsys

    assert {"Recommender", "RunConfig", "evaluate", "prepare", "train"} <= set(dir(recsys))
