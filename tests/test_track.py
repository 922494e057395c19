"""Runs are recorded on disk and in MLflow, whatever the tracking store does."""

from __future__ import annotations

import json
import logging
import math
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tracking_server import TrackingServer, free_port

from recsys.errors import DataError, RecsysError
from recsys.experiments.tracking import track
from recsys.experiments.tracking.spool import Spool, finite, flatten, valid_name
from recsys.experiments.tracking.store import Store
from recsys.experiments.tracking.track import Tracker, TrackRules, lightning_logger, replay


@pytest.fixture
def client(out: Path) -> Any:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{out / 'mlflow.db'}"
    return MlflowClient(uri, uri)


@pytest.fixture
def open_run(out: Path) -> Iterator[Callable[..., Tracker]]:
    made: list[Tracker] = []

    def make(name: str = "one", rules: TrackRules | None = None, **more: Any) -> Tracker:
        run = Tracker(rules or TrackRules(), out / name, run_name=name, out=out, **more)
        made.append(run)
        return run

    yield make
    for run in made:
        run.finish()


def bundle_in(run: Tracker) -> Path:
    path = run.folder / "bundle"
    (path / "towers").mkdir(parents=True)
    (path / "towers" / "user.safetensors").write_bytes(b"weights")
    (path / "manifest.json").write_text("{}")
    return path


def history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in client.get_metric_history(run_id, name)]


def test_a_run_stands_in_the_store_with_all_that_it_said(
    open_run: Callable[..., Tracker], client: Any, out: Path
) -> None:
    params = {"seed": 3, "data": {"log": ["a", "b"], "items": None}, "rate": 1e-3, "on": True}
    with open_run(params=params, tags={"simulated": "yes"}) as run:
        for step in range(5):
            run.log_metrics({"loss": 1 / (step + 1), "recall@20": 0.1 * step}, step)
        run.log_dict({"model": {"recall_at_20": {"value": math.nan}}}, "scorecard.json")
        (run.folder / "curve.png").write_bytes(b"png")
        run.log_file(run.folder / "curve.png", "pictures")
        run.log_bundle(bundle_in(run), {"fingerprint": "f00"})
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "one"
    assert stored.data.params == {
        "seed": "3",
        "data.log": '["a", "b"]',
        "data.items": "null",
        "rate": "0.001",
        "on": "true",
    }
    assert stored.data.tags["simulated"] == "yes"
    assert history(client, run.run_id, "loss") == [(s, 1 / (s + 1)) for s in range(5)]
    assert len(history(client, run.run_id, "recall_at_20")) == 5
    root = Path(out / "artifacts" / run.run_id / "artifacts")
    assert json.loads((root / "scorecard.json").read_text())["model"]["recall_at_20"] == {
        "value": None
    }
    assert (root / "pictures" / "curve.png").read_bytes() == b"png"
    assert (root / "bundle" / "towers" / "user.safetensors").read_bytes() == b"weights"
    version = client.get_model_version_by_alias("one", "candidate")
    assert (int(version.version), version.run_id) == (1, run.run_id)
    assert version.tags == {"fingerprint": "f00"}
    assert run.model_version == "one/1"
    assert not list(out.rglob("*.pkl"))


def test_infinite_and_missing_numbers_are_kept_on_disk_and_said_aloud(
    open_run: Callable[..., Tracker], client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run() as run:
        run.log_metrics({"loss": math.inf, "auc": math.nan, "low": -math.inf}, 7)
    points = Spool.open(run.folder).points()
    assert points[0]["metrics"]["loss"] == math.inf
    assert points[0]["metrics"]["low"] == -math.inf
    assert math.isnan(points[0]["metrics"]["auc"])
    assert math.isnan(history(client, run.run_id, "loss")[0][1])
    assert "loss is inf at step 7" in caplog.text


def test_a_parameter_that_is_too_long_is_cut_aloud(
    open_run: Callable[..., Tracker], client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(params={"columns": "x" * 7000}) as run:
        pass
    assert client.get_run(run.run_id).data.params["columns"] == "x" * 6000
    assert "columns has 7000 characters" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_the_status_says_how_a_run_ended(
    open_run: Callable[..., Tracker], client: Any, error: type[BaseException] | None, status: str
) -> None:
    run = open_run()
    try:
        with run:
            if error:
                raise error
    except BaseException as raised:
        assert type(raised) is error
    assert client.get_run(run.run_id).info.status == status
    assert Spool.open(run.folder).record["status"] == status


def test_the_exit_that_lightning_makes_of_an_interrupt_counts_as_killed(
    open_run: Callable[..., Tracker],
) -> None:
    run = open_run(rules=TrackRules(enabled=False))
    with pytest.raises(SystemExit), run:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    assert Spool.open(run.folder).record["status"] == "KILLED"


def test_a_run_goes_on_with_its_curves_and_tells_changed_parameters(
    open_run: Callable[..., Tracker], client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError), open_run(params={"rate": 0.1, "dim": 8}) as first:
        first.log_metrics({"loss": 3.0}, 0)
        raise ValueError
    second = open_run(params={"rate": 0.2, "dim": 8, "new": 1}, run_id=first.run_id)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log_metrics({"loss": 2.0}, 1)
    second.finish()
    stored = client.get_run(first.run_id)
    assert second.run_id == first.run_id
    assert stored.info.status == "FINISHED"
    assert history(client, first.run_id, "loss") == [(0, 3.0), (1, 2.0)]
    assert stored.data.params == {"rate": "0.1", "dim": "8", "new": "1"}
    assert json.loads(stored.data.tags["recsys.changed_params"]) == {"rate": "0.2"}
    assert "other values of rate" in caplog.text


def test_without_tracking_the_spool_has_the_run(
    open_run: Callable[..., Tracker], client: Any, out: Path
) -> None:
    with open_run(rules=TrackRules(enabled=False)) as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.log_bundle(bundle_in(run))
    assert client.search_experiments(filter_string="name = 'recsys'") == []
    assert run.uri == "" and run.model_version is None
    assert Spool.open(run.folder).points()[0]["metrics"] == {"loss": 1.0}
    # And it can be sent when somebody wants it after all.
    with pytest.raises(DataError, match="--uri"):
        replay(run.folder)
    run_id = replay(run.folder, f"sqlite:///{out / 'mlflow.db'}")
    assert history(client, run_id, "loss") == [(1, 1.0)]


def dead_address() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_a_server_that_is_down_costs_seconds_and_the_run_is_sent_later(
    open_run: Callable[..., Tracker],
    client: Any,
    out: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys.experiments.tracking.track.TIMEOUT", 1)
    begin = time.monotonic()
    with open_run(rules=TrackRules(uri=dead_address()), params={"seed": 3}) as run:
        for step in range(20):
            run.log_metrics({"loss": 1.0 * step}, step)
        run.log_bundle(bundle_in(run))
    assert time.monotonic() - begin < 10
    assert f"recsys replay '{run.folder}'" in caplog.text
    assert caplog.text.count("does not take this run") == 1
    with pytest.raises(RecsysError, match="does not take"):
        replay(run.folder)
    # Twice into another store: one run, each point once, one version.
    for _ in range(2):
        run_id = replay(run.folder, f"sqlite:///{out / 'mlflow.db'}")
    assert history(client, run_id, "loss") == [(s, 1.0 * s) for s in range(20)]
    stored = client.get_run(run_id)
    assert (stored.info.status, stored.data.params) == ("FINISHED", {"seed": "3"})
    assert stored.data.tags["recsys.run_id"] == run.run_id
    assert [int(v.version) for v in client.search_model_versions("name = 'one'")] == [1]


def test_a_server_that_never_answers_does_not_hold_the_run(
    open_run: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    monkeypatch.setattr("recsys.experiments.tracking.track.TIMEOUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with open_run(rules=TrackRules(uri=uri)) as run:
            run.log_metrics({"loss": 1.0}, 0)
        assert time.monotonic() - begin < 15


def test_a_store_that_fails_half_way_is_made_good_at_the_end(
    open_run: Callable[..., Tracker],
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    run = open_run()
    send, dead = Store.send, [True]

    def fail(self: Store, *args: Any) -> None:
        if dead[0]:
            raise ConnectionError("gone")
        send(self, *args)

    monkeypatch.setattr(Store, "send", fail)
    run.log_dict({"a": 1}, "data/manifest.json")
    until = time.monotonic() + 10
    while "gone" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    run.log_metrics({"loss": 1.0}, 1)
    dead[0] = False
    run.finish()
    assert "answers again" in caplog.text
    assert history(client, run.run_id, "loss") == [(1, 1.0)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(run.run_id, "data")] == ["data/manifest.json"]


def test_a_point_costs_next_to_nothing(open_run: Callable[..., Tracker]) -> None:
    with open_run(rules=TrackRules(model=None)) as run:
        begin = time.monotonic()
        for step in range(500):
            run.log_metrics({"loss": 1.0, "rate": 2.0}, step)
        assert (time.monotonic() - begin) / 500 < 5e-3  # MLflow's own call takes 22 ms


def test_lightning_logs_through_the_tracker_and_leaves_the_run_open(
    open_run: Callable[..., Tracker], client: Any
) -> None:
    run = open_run()
    logger = lightning_logger(run)
    logger.log_hyperparams({"rate": 1})
    logger.log_metrics({"train/loss": 0.5}, step=3)
    logger.log_metrics({"epoch": 1.0})
    logger.save()
    logger.finalize("success")
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert (logger.version, logger.save_dir) == (run.run_id, str(run.folder))
    run.finish()
    assert history(client, run.run_id, "train/loss") == [(3, 0.5)]


OPEN = """
import sys
from recsys.experiments.tracking.track import Tracker, TrackRules
out, name = sys.argv[1:]
with Tracker(TrackRules(), f"{out}/{name}", run_name=name, out=out) as run:
    run.log_metrics({"loss": 1.0}, 1)
assert not run._down_since, "the store failed"
"""


@pytest.mark.slow
def test_four_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(tmp_path), f"run{n}"]) for n in range(4)
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0, 0]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recsys")
    assert len(client.search_runs([experiment.experiment_id])) == 4


@pytest.mark.slow
def test_a_tracking_server_keeps_the_run(out: Path, tmp_path: Path) -> None:
    """Over HTTP, through the artifact proxy; the server dies and comes back."""
    from mlflow.tracking import MlflowClient

    with TrackingServer(out / "mlflow.db", tmp_path / "kept") as server:
        address = server.address
        run = Tracker(TrackRules(uri=address), out / "far", run_name="far")
        run.log_metrics({"loss": 1.0}, 1)
        server.stop()
        run.log_metrics({"loss": 0.5}, 2)
        run.log_bundle(bundle_in(run))
        run.finish()
        server.start()
        assert replay(run.folder) == run.run_id
        client = MlflowClient(address, address)
        assert history(client, run.run_id, "loss") == [(1, 1.0), (2, 0.5)]
        assert client.get_model_version_by_alias("far", "candidate").run_id == run.run_id
        paths = [a.path for a in client.list_artifacts(run.run_id, "bundle")]
        assert "bundle/manifest.json" in paths


def test_a_torn_last_line_of_the_curves_is_passed_over(open_run: Callable[..., Tracker]) -> None:
    with open_run(rules=TrackRules(enabled=False)) as run:
        run.log_metrics({"loss": 1.0}, 1)
    with (run.folder / "curves.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
    assert len(Spool.open(run.folder).points()) == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no track\.json"):
        replay(tmp_path)


@pytest.mark.parametrize("uri", ["./mlruns", "file:///runs", "C:/runs", "ftp://host"])
def test_a_file_store_is_refused_with_the_way_out(uri: str) -> None:
    with pytest.raises(ValidationError, match="sqlite:///runs"):
        TrackRules(uri=uri)


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", ""])
def test_an_alias_that_mlflow_keeps_for_itself_is_refused(alias: str) -> None:
    with pytest.raises(ValidationError):
        TrackRules(alias=alias)


def test_passwords_stay_out_of_the_spool() -> None:
    assert track._bare("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert track._bare("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_names_are_made_valid_by_hand() -> None:
    assert valid_name("recall@20") == "recall_at_20"
    assert valid_name("val/recall_at_20") == "val/recall_at_20"
    assert valid_name("data.columns.positive.café!") == "data.columns.positive.caf__"
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
    assert finite({"a": (math.nan, 1), "b": [math.inf]}) == {"a": [None, 1], "b": [None]}


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(valid_name(name))
    _validate_param_name(valid_name(name))
