"""Tracking of runs: into the spool first, and to MLflow as soon as it answers.

What a run says goes to a spool in its own folder (spool.py) and from there, on a thread of its own
and in batches, to the tracking store (store.py). A store that is slow, dead
or dies half-way never holds or kills the training: `replay` sends the whole run again.
"""

from __future__ import annotations

import logging
import math
import queue
import re
import shlex
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from recsys.errors import DataError, RecsysError
from recsys.experiments.tracking.spool import Spool, finite
from recsys.experiments.tracking.store import METRICS, Job, Store, where
from recsys.experiments.tracking.store import bare as _bare
from recsys.files import write_json
from recsys.tables import Strict

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
TIMEOUT = 10.0
"""Seconds that one request to a tracking server may take; each is tried twice."""
_EVERY = 2.0
"""Seconds between two batches of curves."""
_AGAIN = 60.0
"""Seconds until a store that failed is asked again."""


class TrackRules(Strict):
    """Where runs are recorded."""

    enabled: bool = True
    """false: only the spool in the run's folder."""
    uri: str = ""
    """Tracking store: sqlite:///…, http://…; empty: MLFLOW_TRACKING_URI, else a SQLite file in
    `out`. Passwords belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: Annotated[str, Field(min_length=1)] = "recsys"
    """Experiment that the runs belong to."""
    model: Annotated[str, Field(pattern=r"^[^/:]*$")] | None = "auto"
    """Name of the registered model that the bundle becomes a new version of; auto: the name of the
    run; empty: no model is registered."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$")] = "candidate"
    """Alias that the newest version gets; which one serves is said by another."""

    @field_validator("alias")
    @classmethod
    def _ours(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias):
            raise ValueError(f"{alias!r} is a name that MLflow gives itself; choose another")
        return alias

    @field_validator("uri")
    @classmethod
    def _a_store(cls, uri: str) -> str:
        scheme = uri.partition(":")[0].partition("+")[0]
        if uri and scheme not in SCHEMES:
            raise ValueError(
                f"{uri!r} is no tracking store that MLflow still writes to. "
                "Name a database or a server: sqlite:///runs/mlflow.db or http://host:5000"
            )
        return uri


class Tracker:
    """One run. A context manager: an error makes it FAILED, Ctrl-C makes it KILLED.

    Attributes:
        run_id: MLflow's id of the run, or one of our own while the store has not answered.
        folder: the run's folder, with the spool.
        uri: the tracking store, empty where tracking is off.
    """

    def __init__(
        self,
        rules: TrackRules,
        folder: str | Path,
        *,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        out: str | Path = "runs",
        run_id: str | None = None,
    ) -> None:
        """Open a run, or go on with `run_id`.

        Args:
            rules: where to.
            folder: made if need be.
            run_name: what people read.
            params: nested sections or flat; a value that is too long is cut, and says so.
            tags: short texts.
            out: holds the embedded store (mlflow.db and artifacts/).
            run_id: a run that stands in the store; it is RUNNING again.
        """
        self.uri = where(rules.uri, out) if rules.enabled else ""
        self._rules = rules
        self._spool = Spool.begin(
            folder,
            run_id=run_id,
            run_name=run_name,
            params=params or {},
            tags=tags or {},
            uri=_bare(self.uri),
            experiment=rules.experiment,
            timeout=TIMEOUT,
        )
        self.folder = self._spool.folder
        self._down_since: float | None = None
        self._queue: queue.SimpleQueue[tuple[Job | Literal["stop"], Any]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._warned: set[str] = set()
        self._finished = False
        self._store: Store | None = None
        record = self._spool.record
        if self.uri:
            try:
                self._store = Store(self.uri, TIMEOUT)
                self._store.open_run(self._spool)
                if run_id is None:
                    record["run_id"] = record["mlflow_run_id"]
            except Exception as error:
                self._fell(error)
            self._spool.save()
            self._worker = threading.Thread(target=self._work, name="track", daemon=True)
            self._worker.start()
        self.run_id: str = record["run_id"]

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Put down a point of every curve; costs microseconds.

        Args:
            metrics: numbers by name; an infinity reaches MLflow as "not a number".
            step: of the optimiser.
        """
        point = self._spool.add_point(metrics, step)
        for name, value in point["metrics"].items():
            if not math.isfinite(value):
                self._warn_once(f"{name} is {value} at step {step}.", name)
        self._queue.put(("metrics", point))

    def log_dict(self, value: Mapping[str, Any], name: str) -> Path:
        """Write JSON into the run's folder under `name`, and keep it as an artifact.

        Args:
            value: the scorecard, the data manifest; NaN and infinities become null.
            name: a path inside the run's folder, which ends in .json.
        """
        path = self.folder / name
        write_json(path, finite(value))
        self.log_file(path, str(Path(name).parent))
        return path

    def log_file(self, path: str | Path, to: str = "") -> None:
        """Keep a file, or a folder with all that is in it, as an artifact in the folder `to`."""
        self._queue.put(("file", self._spool.add_file(path, to)))

    def log_bundle(self, path: str | Path, tags: Mapping[str, str] | None = None) -> None:
        """Keep a bundle as the artifact `bundle`, and register it as a new version of the model.

        Args:
            path: the bundle's folder.
            tags: of the version, e.g. its fingerprint.
        """
        self.log_file(path, "bundle")
        if self._rules.model is not None:
            auto = self._rules.model == "auto"
            name = self._spool.record["run_name"] if auto else self._rules.model
            entry = self._spool.add_model(name, self._rules.alias, tags or {})
            self._queue.put(("model", entry))

    @property
    def model_version(self) -> str | None:
        """`name/version` of the registered model, once `finish` has sent it."""
        done = [entry for entry in self._spool.record["models"] if entry["version"]]
        return f"{done[-1]['name']}/{done[-1]['version']}" if done else None

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what is left and close the run; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._spool.close(status)
        if self._worker:
            self._queue.put(("stop", None))
            self._worker.join()
            self._try("status")
            if self._down_since:
                self._recover(last=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(_status(error))

    # --- the thread that sends ---

    def _work(self) -> None:
        stop = False
        while not stop:
            jobs = [self._queue.get()]
            if jobs[0][0] == "metrics":
                # Points come one by one; a little patience makes a batch of them.
                until = time.monotonic() + _EVERY
                while len(jobs) < METRICS and jobs[-1][0] == "metrics":
                    try:
                        jobs.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
                    except queue.Empty:
                        break
            points = [value for kind, value in jobs if kind == "metrics"]
            if points:
                self._try("metrics", points)
            for kind, value in jobs:
                stop = stop or kind == "stop"
                if kind != "metrics" and kind != "stop":
                    self._try(kind, value)
            if self._down_since and not stop and time.monotonic() - self._down_since > _AGAIN:
                self._recover()

    def _try(self, job: Job, value: Any = None) -> None:
        """Send one thing; after a failure nothing is sent until the store has been won back."""
        if self._down_since or self._store is None:
            return
        try:
            self._store.send(self._spool, job, value)
            if job == "model":
                self._spool.save()
        except Exception as error:
            self._fell(error)

    def _recover(self, last: bool = False) -> None:
        """Send the whole run again from the spool."""
        try:
            self._store = Store(self.uri, TIMEOUT)
            self._store.send_all(self._spool)
            self._down_since = None
            log.warning("The tracking store %s answers again; the run is there.", _bare(self.uri))
        except Exception as error:
            self._down_since = time.monotonic()
            if last:
                log.warning(
                    "The run is NOT in the tracking store %s: %s It is whole in %s; send it with: "
                    "recsys replay %s",
                    *(
                        _bare(self.uri),
                        _first_line(error),
                        self.folder,
                        shlex.quote(str(self.folder)),
                    ),
                )
        self._spool.save()

    def _fell(self, error: Exception) -> None:
        self._down_since = time.monotonic()
        self._warn_once(
            f"The tracking store {_bare(self.uri)} does not take this run: {_first_line(error)} "
            f"The run goes on and is recorded in {self.folder}.",
            "down",
        )

    def _warn_once(self, message: str, topic: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning("%s", message)


def replay(folder: str | Path, uri: str = "") -> str:
    """Send a run from its spool to a tracking store that missed it; twice does no harm.

    Args:
        folder: the run's folder.
        uri: another store than the run was meant for.

    Returns:
        MLflow's id of the run.

    Raises:
        DataError: the folder has no spool.
        RecsysError: the store does not take it.
    """
    spool = Spool.open(folder)
    record = spool.record
    if uri and uri != record["uri"]:
        record.update(uri=_bare(uri), mlflow_run_id=None)
        for entry in record["models"]:
            entry["version"] = None
    uri = uri or record["uri"]
    if not uri:
        raise DataError(f"The run in {folder} was not tracked. Say where it shall go: --uri.")
    try:
        Store(uri, record["timeout"]).send_all(spool)
    except Exception as error:
        raise RecsysError(
            f"The tracking store {_bare(uri)} does not take {folder}: {_first_line(error)}"
        ) from error
    finally:
        # A run that was made, or a model that was registered, is not made again.
        spool.save()
    return str(record["mlflow_run_id"])


def recorded_id(folder: str | Path) -> str:
    """The id of the run in `folder`, which `Tracker` goes on with.

    Raises:
        DataError: the folder has no spool.
    """
    return str(Spool.open(folder).record["run_id"])


def lightning_logger(tracker: Tracker) -> Logger:
    """A logger for pytorch_lightning's Trainer; it leaves the run open for what comes after."""
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only

    class TrackerLogger(Logger):
        @property
        def name(self) -> str:
            return tracker._rules.experiment

        @property
        def version(self) -> str:
            return tracker.run_id

        @property
        def save_dir(self) -> str:
            return str(tracker.folder)

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            # Lightning adds the epoch as if it were a metric; it is one here, too.
            tracker.log_metrics(metrics, step or 0)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the whole configuration was logged when the run was opened."""

    return TrackerLogger()


def _status(error: BaseException | None) -> Status:
    """What became of a block that ended in `error`."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    # Lightning answers Ctrl-C with SystemExit(1), and SIGTERM with an exception of its own.
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, KeyboardInterrupt) or type(link).__name__ == "SIGTERMException":
            return "KILLED"
        link = link.__cause__ or link.__context__
    return "FAILED"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    text = text if len(text) <= 160 else f"{text[:159]}…"
    return text if text.endswith((".", "…")) else f"{text}."
