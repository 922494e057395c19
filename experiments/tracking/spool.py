"""On-disk spool of a run: curves, parameters, artifacts, status.

`curves.jsonl` has one point of every curve a line, `track.json` the rest. Both are whole at every
moment, so that a run can be sent to a tracking store long after it ended.
"""

from __future__ import annotations

import json
import logging
import math
import posixpath
import re
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys.errors import DataError
from recsys.files import read_json, write_json

CURVES = "curves.jsonl"
RECORD = "track.json"
PARAM_LENGTH = 6000
"""Characters of a parameter's value that MLflow keeps."""

log = logging.getLogger(__name__)


class Spool:
    """The record of one run in its folder.

    Attributes:
        folder: the run's folder.
        record: what `track.json` holds.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self._lock = threading.Lock()

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        *,
        run_id: str | None,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        **where: Any,
    ) -> Spool:
        """Open the folder for a new run, or for more of the run `run_id`.

        Args:
            folder: made if need be.
            run_id: goes on with this run; None: a new id.
            run_name: what people read.
            params: nested sections or flat.
            tags: short texts.
            where: further facts to keep: the store, the experiment.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before: dict[str, Any] = {}
        if run_id is not None and (folder / RECORD).exists():
            before = read_json(folder / RECORD)
            before = before if before.get("run_id") == run_id else {}
        record = {
            **where,
            "run_id": run_id or uuid.uuid4().hex,
            "mlflow_run_id": before.get("mlflow_run_id", run_id),
            "run_name": run_name,
            "params": {valid_name(k): _text(k, v) for k, v in flatten(params).items()},
            "tags": {valid_name(k): str(v) for k, v in tags.items()},
            "files": before.get("files", []),
            "models": before.get("models", []),
            "start": before.get("start", _now()),
            "end": None,
            "status": "RUNNING",
        }
        spool = cls(folder, record)
        spool.save()
        return spool

    @classmethod
    def open(cls, folder: str | Path) -> Spool:
        """Open the folder of a run.

        Raises:
            DataError: the folder has no record.
        """
        folder = Path(folder)
        if not (folder / RECORD).exists():
            raise DataError(f"{folder} is no run's folder: it has no {RECORD}.")
        return cls(folder, read_json(folder / RECORD))

    def save(self) -> None:
        with self._lock:
            write_json(self.folder / RECORD, self.record)

    def close(self, status: str) -> None:
        """Put down how the run ended."""
        self.record.update(status=status, end=_now())
        self.save()

    def add_point(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """Append a point of every curve; what is not finite stands as text ("nan", "inf")."""
        values = {valid_name(name): float(value) for name, value in metrics.items()}
        point = {"step": int(step), "time": _now(), "metrics": values}
        odd = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line = json.dumps({**point, "metrics": {**values, **odd}}, ensure_ascii=False)
        with self._lock, (self.folder / CURVES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return point

    def points(self) -> list[dict[str, Any]]:
        """Every point, in the order in which it was added."""
        if not (self.folder / CURVES).exists():
            return []
        points = []
        for line in (self.folder / CURVES).read_text(encoding="utf-8").splitlines():
            try:
                point = json.loads(line)
            except json.JSONDecodeError:
                continue  # The machine went down while this line was written.
            point["metrics"] = {name: float(v) for name, v in point["metrics"].items()}
            points.append(point)
        return points

    def add_file(self, path: str | Path, to: str) -> dict[str, str]:
        """Remember a file or folder as an artifact; relative to the run's folder when inside."""
        path = Path(path).resolve(strict=True)
        home = self.folder.resolve()
        kept = path.relative_to(home) if path.is_relative_to(home) else path
        entry = {"path": str(kept), "to": "" if to == "." else to}
        with self._lock:
            if entry not in self.record["files"]:
                self.record["files"].append(entry)
        self.save()
        return entry

    def add_model(self, name: str, alias: str, tags: Mapping[str, Any]) -> dict[str, Any]:
        """Remember that the artifact `bundle` is to be a version of a registered model."""
        entry = {
            "name": name,
            "source": "bundle",
            "alias": alias,
            "tags": {valid_name(k): str(v) for k, v in tags.items()},
            "version": None,
        }
        with self._lock:
            self.record["models"].append(entry)
        self.save()
        return entry


def flatten(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections as `section.key`, the names of MLflow's parameters."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def valid_name(name: str) -> str:
    """A name that MLflow takes: `recall@20` becomes `recall_at_20`."""
    name = re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"), flags=re.ASCII)[:250]
    # MLflow makes paths of names.
    if not name or posixpath.normpath(name) != name or name[0] in "./":
        name = "_" + name.replace("/", "_")[:249]
    return name


def finite(value: Any) -> Any:
    """The value in plain Python, with None for numbers that JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy and torch, numbers and arrays
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) > PARAM_LENGTH:
        log.warning(
            "Parameter %s has %d characters; MLflow gets the first %d.",
            *(name, len(text), PARAM_LENGTH),
        )
        text = text[:PARAM_LENGTH]
    return text


def _now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
