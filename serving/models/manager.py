"""Model manager: load beside, check, swap in one assignment, free the old one.

One thread watches the sources of all variants. Whatever fails there, the model that answers goes
on answering, and the host says what failed and why.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.errors import BundleError, ConfigError, QueryError, RecsysError, nearest
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.loaded_model import LoadedModel, give_back
from recsys.serving.engine.query import Query
from recsys.serving.live.overlay import Overlay
from recsys.serving.live.updates import LiveUpdates
from recsys.serving.manifest import Check
from recsys.serving.models.gate import GateRules, Verdict, check
from recsys.serving.models.sources import FolderSource, ModelSource
from recsys.serving.models.traffic_split import TrafficSplit

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0
"""Seconds at most between two tries of a model that failed."""
RELEASE_EVERY = 0.05
"""Seconds between two looks whether requests still hold the old model."""
COLLECT_AFTER = 5.0
"""Seconds that the old model is held until the garbage collector is asked: a request should be over
by then, so that a cycle of references holds it, as of an error that keeps its traceback."""

Listener = Callable[[str, Mapping[str, Any]], None]
"""Is told the name of an event and what there is to say of it."""


@dataclass(frozen=True)
class Loaded:
    """A model that answers. The host's only strong reference to the engine is here."""

    engine: Engine
    model: LoadedModel
    overlay: Overlay
    token: str
    loaded_at: float  # seconds since 1970
    seconds: float  # that loading took
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Held:
    """The model before, while requests have not let go of it."""

    engine: weakref.ref[Engine]
    model: weakref.ref[LoadedModel]
    overlay: Overlay | None  # None once it is detached
    since: float = field(default_factory=time.monotonic)
    collected: bool = False


@dataclass
class Variant:
    """What the watcher knows of one variant. `loaded` is read by every request."""

    name: str
    source: ModelSource
    loaded: Loaded | None = None
    swaps: int = 0
    failures: int = 0
    last_error: str | None = None
    last_error_at: float | None = None
    failed_token: str | None = None
    tries: int = 0
    again_at: float = 0.0  # monotonic seconds, before which nothing that failed is tried
    held: Held | None = None


class ModelManager:
    """Models by variant, kept up to date.

    Memory: at most two models of a variant at a time, the one that answers and the one that is
    being loaded, or the one before as long as requests hold it; until they are done, no other is
    loaded.

    Args:
        sources: variant → where its models come from.
        updates: items and events that came since; every model is attached to it.
        split: variant → share of the traffic; equal shares when absent.
        gate: what a new model must show.
        every: seconds between two looks at the sources.
        on_event: is told "loaded", "failed", "held" and "freed", with the variant and what there is
            to say, in the watcher's thread.
        salt: names the experiment: another salt deals units to variants independently.
        engine: makes the engine of a model; `functools.partial(Engine, rules=…)` for other rules.
        begun: folder → the comparison of a bundle's digests that has begun already.

    Raises:
        ConfigError: the split names other variants than the sources, or is none.
    """

    def __init__(
        self,
        sources: Mapping[str, ModelSource],
        updates: LiveUpdates,
        *,
        split: Mapping[str, float] | None = None,
        gate: GateRules | None = None,
        every: float = 1.0,
        on_event: Listener | None = None,
        salt: str = "recsys",
        engine: Callable[[LoadedModel, Overlay], Engine] = Engine,
        begun: Mapping[Path, Check] | None = None,
    ) -> None:
        if split is not None and set(split) != set(sources):
            raise ConfigError(
                f"The split is over {', '.join(sorted(split))}, but there are models for "
                f"{', '.join(sorted(sources))}. Give each variant both."
            )
        self.shares = (
            TrafficSplit.equal(list(sources), salt) if split is None else TrafficSplit(split, salt)
        )
        self._variants = {name: Variant(name, source) for name, source in sources.items()}
        self._updates = updates
        self._gate = gate or GateRules()
        self._every = every
        self._on_event = on_event
        self._engine = engine
        self._begun = dict(begun or {})
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ asked by requests

    def choose(self, unit: str | None, variant: str | None = None) -> tuple[str, Engine]:
        """The variant that answers and its engine; takes no lock.

        Hold on to the engine for the whole request: it is one model, whatever is swapped
        meanwhile, and it is freed when the last request lets go of it.

        Args:
            unit: who asks (a user, a session), always the same variant; None: by chance.
            variant: answer with this one.

        Raises:
            QueryError: there is no such variant, or no model is loaded yet.
        """
        name = self.shares.variant(unit) if variant is None else variant
        found = self._variants.get(name)
        if found is None:
            raise QueryError(f"There is no variant {name!r}. {nearest(name, self._variants)}")
        loaded = found.loaded
        if loaded is None:
            raise QueryError(f"No model of variant {name!r} is loaded yet. Query again later.")
        return name, loaded.engine

    @property
    def ready(self) -> bool:
        """Whether every variant has a model."""
        return all(variant.loaded is not None for variant in self._variants.values())

    def facts(self) -> list[dict[str, Any]]:
        """What there is to say of each variant, JSON-ready; times in seconds since 1970."""
        return [self._facts(variant) for variant in self._variants.values()]

    def _facts(self, variant: Variant) -> dict[str, Any]:
        loaded = variant.loaded
        return {
            "name": variant.name,
            "share": self.shares.shares[variant.name],
            "version": None if loaded is None else loaded.model.version,
            "token": None if loaded is None else loaded.token,
            "items": None if loaded is None else len(loaded.model.bundle.rows),
            "loaded_at": None if loaded is None else loaded.loaded_at,
            "load_seconds": None if loaded is None else loaded.seconds,
            "gate": {} if loaded is None else dict(loaded.measured),
            "swaps": variant.swaps,
            "failures": variant.failures,
            "last_error": variant.last_error,
            "last_error_at": variant.last_error_at,
            "failed_token": variant.failed_token,
            "old_model_held": variant.held is not None,
        }

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Load the first model of each variant, then watch for others.

        Raises:
            RecsysError: a model cannot be had, is damaged or does not pass the gate.
        """
        for variant in self._variants.values():
            begin = time.monotonic()
            token, folder = variant.source.latest()
            self._take_over(variant, token, folder, begin)
        for begun in self._begun.values():  # of a folder that is not wanted any more
            begun.close()
        self._begun.clear()
        self._thread = threading.Thread(target=self._watch, name="recsys-host", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; models go on answering. Waits for a model that is being loaded."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        look_at = time.monotonic() + self._every
        while True:
            held = any(variant.held for variant in self._variants.values())
            wait = max(0.0, look_at - time.monotonic())
            if self._stop.wait(min(wait, RELEASE_EVERY) if held else wait):
                return
            for variant in self._variants.values():
                self._release(variant)
            if time.monotonic() < look_at:
                continue
            for variant in self._variants.values():
                if not self._stop.is_set():
                    self._look(variant)
            look_at = time.monotonic() + self._every

    # ------------------------------------------------------------------ the watcher's thread

    def _look(self, variant: Variant) -> None:
        """Load what the source names, if that is something new."""
        token = None
        begin = time.monotonic()
        if begin < variant.again_at and variant.failed_token is None:
            return  # the source itself failed
        try:
            token, folder = variant.source.latest()
            if variant.loaded is not None and token == variant.loaded.token:
                self._well(variant)
                return
            if token == variant.failed_token and begin < variant.again_at:
                return
            if variant.held is not None:  # two models are in memory
                if begin - variant.held.since < 2 * COLLECT_AFTER:
                    return
                raise BundleError(
                    f"{folder} is not loaded, for the model before the one that answers is still "
                    "in use, and there is room for two. Find the request that holds it, or restart."
                )
            self._take_over(variant, token, folder, begin)
        except Exception as error:  # whatever it is, the old model answers on
            self._failed(variant, token, error)

    def _take_over(self, variant: Variant, token: str, folder: Path, begin: float) -> None:
        """Load, judge, attach and warm a model; then it answers."""
        loaded = self._load(variant, token, folder, begin)
        if self._stop.is_set():
            self._updates.detach(loaded.overlay)
            return
        old = variant.loaded
        if old is not None:
            variant.held = Held(weakref.ref(old.engine), weakref.ref(old.model), old.overlay)
            variant.swaps += 1
        variant.loaded = loaded  # the swap
        self._well(variant)
        self._tell("loaded", variant, version=loaded.model.version, seconds=loaded.seconds)

    def _load(self, variant: Variant, token: str, folder: Path, begin: float) -> Loaded:
        model = LoadedModel.load(folder, begun=self._begun.pop(folder, None))
        previous = variant.loaded
        before = None if previous is None else previous.model
        verdict = check(model, before, self._gate, folder=folder)
        if not verdict.passed:
            raise BundleError(f"{folder} is refused. {' '.join(verdict.refusals)}")
        overlay = self._updates.attach(model)
        try:
            engine = self._engine(model, overlay)
            _warm(engine, model)
            give_back(*model.seldom_read())
        except BaseException:
            self._updates.detach(overlay)
            raise
        seconds = time.monotonic() - begin
        return Loaded(engine, model, overlay, token, time.time(), seconds, verdict.measured)

    def _well(self, variant: Variant) -> None:
        variant.last_error = variant.last_error_at = variant.failed_token = None
        variant.tries, variant.again_at = 0, 0.0

    def _failed(self, variant: Variant, token: str | None, error: Exception) -> None:
        """Remember the text alone: an exception holds the half-loaded model by its traceback."""
        expected = isinstance(error, (RecsysError, OSError))
        text = str(error) if isinstance(error, RecsysError) else f"{type(error).__name__}: {error}"
        if token != variant.failed_token or text != variant.last_error:
            variant.tries = 0
        variant.failures += 1
        variant.last_error, variant.last_error_at = text, time.time()
        variant.failed_token = token
        wait = min(LONGEST_WAIT, self._every * 2**variant.tries)
        variant.tries = min(variant.tries + 1, 30)
        variant.again_at = time.monotonic() + wait
        self._tell("failed", variant, token=token, error=text, again_in=wait)
        if not expected:
            log.error("Variant %s: a new model fails.", variant.name, exc_info=error)

    def _release(self, variant: Variant) -> None:
        """Let the old model go when no request holds it any more."""
        held = variant.held
        if held is None:
            return
        if held.overlay is not None and held.engine() is None:
            self._updates.detach(held.overlay)
            held.overlay = None
        seconds = time.monotonic() - held.since
        if held.model() is None:
            variant.held = None
            self._tell("freed", variant, seconds=seconds)
        elif seconds > COLLECT_AFTER and not held.collected:
            held.collected = True
            self._tell("held", variant, seconds=seconds)
            gc.collect()

    def _tell(self, event: str, variant: Variant, **said: Any) -> None:
        level = logging.WARNING if event in ("failed", "held") else logging.INFO
        log.log(level, "Variant %s: %s %s", variant.name, event, said)
        if self._on_event is None:
            return
        try:
            self._on_event(event, {"variant": variant.name, **said})
        except Exception:  # the listener's fault; no reason to stop watching
            log.exception("The listener fails at the event %s.", event)


def _warm(engine: Engine, model: LoadedModel) -> None:
    """Ask a few questions, so that the first reader does not wait for what is made lazily.

    Raises:
        Exception: whatever the engine raises; one that cannot answer is not swapped in.
    """
    bundle = model.bundle
    item = bundle.items.decode(bundle.rows[:1])[0]
    asks = [
        Query("similar", items=(item,)),
        Query("similar", items=(item,), exact=True),
        Query("recommend", history=(item,)),
        Query("recommend", user=None if not len(bundle.users.ids) else bundle.users.ids[0]),
        Query("vector", vector=bundle.vectors[bundle.rows[0]].copy()),
    ]
    if bundle.encoder_folder is not None:
        asks.append(Query("search", text=item))
    engine.answer(asks)


__all__ = [
    "FolderSource",
    "GateRules",
    "Listener",
    "Loaded",
    "ModelManager",
    "ModelSource",
    "TrafficSplit",
    "Variant",
    "Verdict",
]
