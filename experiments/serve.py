"""`recsys serve`: models, journal, keys and rules assembled to a service."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.errors import ConfigError

if TYPE_CHECKING:
    from recsys.serving.api.auth import Keys, Role
    from recsys.serving.api.limits import Rate
    from recsys.serving.manifest import Check

MAIN = "main"
"""The variant that SOURCE is."""
REGISTRY = "models:/"
CACHE = Path("runs/registry")
"""Holds the bundles that were downloaded from a registry."""
LOOK_EVERY, ASK_EVERY = 1.0, 10.0
"""Seconds between two looks at a folder, which are one `stat`, and between two questions to a
registry, which many services may share."""


def serve(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A bundle, a folder with CURRENT, or models:/N@A."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8100,
    journal: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Takes items and events; none: read-only.")
    ] = None,
    impressions: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Gets what was shown and what was done.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE:SHARE", help="Another model, beside SOURCE (main)."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hashes of API keys; or RECSYS_KEYS.")
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]NUMBER", help="Requests a second of each key; none: any."),
    ] = None,
    burst: Annotated[
        list[str] | None,
        typer.Option(metavar="[ROLE=]NUMBER", help="Requests at once; else a second's worth."),
    ] = None,
    make_key: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Print a new key, read or write, and exit.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing is written.")] = False,
    open_writes: Annotated[bool, typer.Option("--open-writes", help="Without keys.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys on an address others reach.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(min=0.05, help="Seconds between looks at SOURCE; else 1, a registry: 10."),
    ] = None,
    deadline: Annotated[float, typer.Option(min=0.01, help="Seconds for a question.")] = 2.0,
    log_every: Annotated[int, typer.Option(min=0, help="Every which request is logged.")] = 100,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Answer over HTTP: similar items, recommendations, search.

    A new model at SOURCE is loaded beside the old one and takes over without a pause. The file of
    keys is read again when it changes. Without keys, --rate bounds all callers together. SIGTERM
    finishes what runs.

    \b
    Example:
      recsys serve runs/shop/bundle --port 8100
      recsys serve models:/shop@champion --journal live --keys keys.txt --host 0.0.0.0
      recsys serve --make-key read
    """
    if make_key is not None:
        from recsys.serving.api.auth import make_key as make

        key, hashed = make(make_key)
        print(f"{key}\n{hashed.line()}")
        print("The key is for the caller; the second line is for the --keys file.", file=sys.stderr)
        return
    if source is None:
        raise ConfigError("Name a SOURCE: a bundle, a folder with CURRENT, or models:/NAME@ALIAS.")
    if log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log_level} is none of debug, info, warning and error.")
    from recsys.serving.api.limits import parse_rates

    who = _keys(keys, open_writes)
    _serve(
        Plan(
            {MAIN: source}, host=host, port=port, journal=journal, impressions=impressions,
            keys=who, rates=parse_rates(rate or (), burst or (), keys=who.needed),
            read_only=read_only, every=every, deadline=deadline,
            log_every=log_every, log_level=log_level, insecure=insecure,
        ).with_variants(variant or ())
    )  # fmt: skip


@dataclass
class Plan:
    """What a service is made of."""

    sources: dict[str, str]
    keys: Keys
    host: str = "127.0.0.1"
    port: int = 8100
    journal: Path | None = None
    impressions: Path | None = None
    rates: Mapping[Role | None, Rate] = field(default_factory=dict)
    read_only: bool = False
    insecure: bool = False
    every: float | None = None
    deadline: float = 2.0
    log_every: int = 100
    log_level: str = "info"
    shares: dict[str, float] = field(default_factory=lambda: {MAIN: 1.0})

    def with_variants(self, said: Sequence[str]) -> Plan:
        """Take variants NAME=SOURCE:SHARE in; what they leave is main's.

        Raises:
            ConfigError: one is not of that form, is named twice, or the shares are too large.
        """
        for one in said:
            name, _, rest = one.partition("=")
            source, _, share = rest.rpartition(":")
            try:
                part = float(share)
            except ValueError:
                part = -1.0
            if not (name and source and 0 < part < 1):
                raise ConfigError(
                    f"--variant {one} is not of the form NAME=SOURCE:SHARE with a share between 0 "
                    "and 1, such as next=runs/next/bundle:0.1."
                )
            if name in self.sources:
                raise ConfigError(f"There are two variants {name!r}. Name one otherwise.")
            self.sources[name], self.shares[name] = source, part
        rest_ = 1.0 - sum(part for name, part in self.shares.items() if name != MAIN)
        if rest_ <= 0:
            raise ConfigError(
                f"The shares of the variants leave {rest_:g} for {MAIN!r}. Make them smaller."
            )
        self.shares[MAIN] = rest_
        return self


def _keys(path: Path | None, open_writes: bool) -> Keys:
    from recsys.serving.api.auth import KeyFile, Keys

    if path is not None:
        return KeyFile(path)
    if said := os.environ.get("RECSYS_KEYS"):
        return Keys.parse(said, "RECSYS_KEYS")
    return Keys(open_writes=open_writes)


def _source(name: str, every: float | None) -> Any:
    if name.startswith(REGISTRY):
        from recsys.experiments.tracking.registry import RegistrySource

        return RegistrySource(name, CACHE, every=ASK_EVERY if every is None else every)
    from recsys.serving.models.sources import FolderSource

    return FolderSource(name)


def _serve(plan: Plan) -> None:
    from recsys.serving.api.server import bind, is_local, json_logs, run, url

    if not (plan.keys.needed or plan.insecure or is_local(plan.host)):
        raise ConfigError(
            f"Others reach {plan.host}, and there are no keys. Give --keys FILE (a key is made by "
            "recsys serve --make-key read), or say --insecure."
        )
    with bind(plan.host, plan.port) as bound, json_logs(plan.log_level):
        where = url(bound)
        with begun_checks(plan) as begun, service(plan, begun) as app:
            run(app, bound, started=lambda stop: print(where, flush=True))


@contextmanager
def begun_checks(plan: Plan) -> Iterator[dict[Path, Check]]:
    """Digests are compared while libraries are being imported, which takes about as long.

    At the end, which comes soon where the service cannot start, no more are made.

    Raises:
        BundleError: a folder holds no bundle, or one that lacks a file.
    """
    from recsys.serving.manifest import begin
    from recsys.serving.models.sources import FolderSource

    folders = dict.fromkeys(
        FolderSource(said).latest()[1]
        for said in plan.sources.values()
        if not said.startswith(REGISTRY)
    )
    with ExitStack() as stack:
        yield {folder: stack.enter_context(begin(folder)) for folder in folders}


@contextmanager
def service(plan: Plan, begun: Mapping[Path, Check] | None = None) -> Iterator[Any]:
    """The application with everything behind it, closed in order at the end.

    Args:
        plan: what it is made of.
        begun: of `begun_checks`.

    Raises:
        RecsysError: a model cannot be loaded, or a folder cannot be written.
    """
    import torch

    from recsys.serving.api.app import make_app
    from recsys.serving.api.auth import KeyFile
    from recsys.serving.api.handlers import ServiceRules
    from recsys.serving.api.server import is_local, own_names
    from recsys.serving.live.impression_log import ImpressionLog
    from recsys.serving.live.updates import LiveUpdates
    from recsys.serving.models.manager import ModelManager

    rules = ServiceRules(
        deadline=plan.deadline,
        read_only=plan.read_only or plan.journal is None,
        rates=plan.rates,
        hosts=own_names(plan.host) if is_local(plan.host) and not plan.keys.needed else None,
        log_every=plan.log_every,
    )
    with ExitStack() as stack:
        updates = LiveUpdates(plan.journal)
        stack.callback(updates.close)
        log = None
        if plan.impressions is not None:
            log = ImpressionLog(plan.impressions)
            stack.callback(log.close)
        sources = {name: _source(said, plan.every) for name, said in plan.sources.items()}
        every = LOOK_EVERY if plan.every is None else plan.every
        models = ModelManager(sources, updates, split=plan.shares, every=every, begun=begun)
        models.start()  # the first models are judged on all cores
        stack.callback(models.stop)
        # One question is too small to share among cores, and the event loop wants one of them.
        torch.set_num_threads(1)
        if isinstance(plan.keys, KeyFile):
            plan.keys.watch()
            stack.callback(plan.keys.stop)
        app = make_app(models, updates, log, rules, plan.keys)
        stack.callback(app.close)
        yield app
