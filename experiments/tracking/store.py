"""MLflow tracking store: the only file that imports mlflow.

Opening a run and sending the same things twice changes nothing, so that a run can be sent again
whole. Artifacts of an embedded store lie beside its database.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from recsys.experiments.tracking.spool import Spool
from recsys.files import sha256_bytes

log = logging.getLogger(__name__)

Job = Literal["metrics", "file", "model", "status"]
METRICS = 1000
"""Metrics in one request, the most that MLflow takes."""
_PARAMS = 100


class Store:
    """A connection to a tracking store.

    Raises:
        Exception: whatever MLflow, its database or the network raise, here and in every method.
    """

    def __init__(self, uri: str, timeout: float) -> None:
        """Connect; a database is made or brought up to date by one process at a time.

        Args:
            uri: sqlite:///…, http://…, …
            timeout: seconds of one request to a server.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own: 7 retries of 120 seconds. A server that is down would hold us for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(timeout))))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        from mlflow.tracking import MlflowClient

        # Their news are none of the user's; of what fails we tell ourselves.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._database = (
            Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        )
        with self._lock():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def open_run(self, spool: Spool) -> None:
        """Make the run, or go on with it; the record learns its id."""
        from mlflow.entities import Param, RunTag

        record = spool.record
        tags = {**record["tags"], "recsys.run_id": record["run_id"]}
        known: dict[str, str] = {}
        if record["mlflow_run_id"] is None:
            run = self._client.create_run(
                self._experiment(record["experiment"]),
                start_time=record["start"],
                tags=tags,
                run_name=record["run_name"],
            )
            record["mlflow_run_id"] = run.info.run_id
        else:
            known = self._client.get_run(record["mlflow_run_id"]).data.params
            self._client.update_run(record["mlflow_run_id"], status="RUNNING")
        run_id, params = record["mlflow_run_id"], record["params"]
        # MLflow never changes a parameter: a resumed run says in a tag what is different now.
        drift = {k: v for k, v in params.items() if k in known and known[k] != v}
        if drift:
            tags["recsys.changed_params"] = json.dumps(drift, ensure_ascii=False)[:5000]
            log.warning("The run goes on with other values of %s.", ", ".join(sorted(drift)))
        new = [Param(k, v) for k, v in params.items() if k not in known]
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(run_id, params=new[start : start + _PARAMS])
        self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def send(self, spool: Spool, job: Job, value: Any = None) -> None:
        """Send one thing of a run that is open.

        Args:
            spool: of the run.
            job: what.
            value: points, or the entry of a file or model in the record.
        """
        run_id = spool.record["mlflow_run_id"]
        if job == "metrics":
            self._send_points(run_id, value)
        elif job == "file":
            path = spool.folder / value["path"]
            client = self._client
            send = client.log_artifacts if path.is_dir() else client.log_artifact
            send(run_id, str(path), value["to"] or None)
        elif job == "model":
            self._register(run_id, value)
        elif job == "status":
            self._client.set_terminated(run_id, spool.record["status"], spool.record["end"])

    def send_all(self, spool: Spool) -> None:
        """Send a whole run; a point of the same step and time is stored once."""
        record = spool.record
        self.open_run(spool)
        self.send(spool, "metrics", spool.points())
        for entry in list(record["files"]):
            if (spool.folder / entry["path"]).exists():
                self.send(spool, "file", entry)
        if record["status"] != "RUNNING":
            self.send(spool, "status")
        # Last: a store without a registry has at least the whole run.
        for entry in list(record["models"]):
            self.send(spool, "model", entry)

    def version_of(self, name: str, version: str | None, alias: str | None) -> tuple[str, str]:
        """The version that a registered model's alias names, and where its bundle lies.

        Args:
            name: of the registered model.
            version: its number; None: the alias says.
            alias: such as champion; looked at only without a version.

        Returns:
            A token that no other bundle has, even in a store that was made anew, and a URI.
        """
        client = self._client
        if version is None:
            registered = client.get_model_version_by_alias(name, alias)
        else:
            registered = client.get_model_version(name, version)
        place = client.get_model_version_download_uri(name, registered.version)
        made = f"{registered.creation_timestamp} {registered.run_id} {place}"
        return f"{registered.version}-{sha256_bytes(made.encode())[:8]}", place

    def download(self, place: str, folder: Path) -> None:
        """Copy the artifact at a URI into a folder that is there."""
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as aside:
            downloaded = Path(
                download_artifacts(
                    artifact_uri=place,
                    dst_path=aside,
                    tracking_uri=self._client.tracking_uri,
                    registry_uri=self._client._registry_uri,
                )
            )
            # The bundle's own folder where its parent was registered.
            if not (downloaded / "manifest.json").exists() and (downloaded / "bundle").is_dir():
                downloaded = downloaded / "bundle"
            for file in downloaded.iterdir():
                shutil.move(file, folder / file.name)

    def set_alias(self, name: str, version: str, alias: str) -> None:
        """Let an alias of a registered model name another version."""
        self._client.get_model_version(name, version)  # MLflow sets aliases of what is not there
        self._client.set_registered_model_alias(name, alias, version)

    def _lock(self) -> AbstractContextManager[Any]:
        """Four processes that open a fresh database at once break its migration: one by one."""
        if self._database is None:
            return nullcontext()
        from filelock import FileLock

        self._database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._database}.lock", timeout=300)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        place = None
        if self._database:
            place = (self._database.parent / "artifacts").resolve().as_uri()
        with self._lock():
            known = self._client.get_experiment_by_name(name)
            if known is not None and known.lifecycle_stage == "deleted":
                self._client.restore_experiment(known.experiment_id)
            if known is not None:
                return str(known.experiment_id)
            try:
                return str(self._client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return str(self._client.get_experiment_by_name(name).experiment_id)

    def _send_points(self, run_id: str, points: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            # MLflow stores an infinity as 1.8e308, which spoils every chart.
            Metric(name, value if math.isfinite(value) else math.nan, point["time"], point["step"])
            for point in points
            for name, value in point["metrics"].items()
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + METRICS])

    def _register(self, run_id: str, entry: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        if entry["version"] is not None:
            return
        try:
            self._client.create_registered_model(entry["name"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{entry['source']}"
        made = self._client.create_model_version(entry["name"], source, run_id, tags=entry["tags"])
        entry["version"] = str(made.version)
        self._client.set_registered_model_alias(entry["name"], entry["alias"], made.version)


def where(uri: str = "", out: str | Path = "runs") -> str:
    """The tracking store: what is said, else MLFLOW_TRACKING_URI, else a SQLite file in `out`."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri or f"sqlite:///{(Path(out) / 'mlflow.db').resolve()}"


def bare(uri: str) -> str:
    """The address without a password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
