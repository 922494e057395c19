"""What every test may use; no test reaches a network."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from recsys.experiments.config import RunConfig
    from recsys.features.prepared.dataset import Dataset

# Before any library reads them: no model hub, no telemetry.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

# A shared machine is slow now and then, and a test run repeats.
settings.register_profile("recsys", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("recsys")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Give the folder of a real log by name; the test skips where it is not there."""

    def folder(name: str) -> Path:
        root = os.environ.get("RECSYS_DATA")
        if not root:
            pytest.skip("RECSYS_DATA does not name the folder of the real logs")
        path = Path(root) / name
        if not path.exists():
            pytest.skip(f"RECSYS_DATA has no {name}")
        return path

    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no accelerator; torch is only asked when one is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="this machine has no accelerator"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
            host = str(address[0])
            try:
                local = ipaddress.ip_address(host).is_loopback
            except ValueError:
                local = host == "localhost"
            if not local:
                raise AssertionError(f"A test wants to reach {host}; tests use no network.")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


# --- small worlds, made once ----------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A configuration, its prepared dataset, and the bundle that was made of it."""

    config: RunConfig
    dataset: Dataset
    bundle: Path


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> SimpleNamespace:
    """Run the `recsys` command in this process: code, out, err."""
    from recsys.experiments import cli

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)


@pytest.fixture
def recsys(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the `recsys` command in this process: code, out, err."""
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture(scope="session")
def build() -> Callable[..., Built]:
    """Give a function from the TOML of a run to a bundle, by the modules that `train` uses.

    Untrained towers answer as well-formed as trained ones, and sooner.
    """

    def build(toml: str, folder: Path, *, trained: bool = False) -> Built:
        import torch

        from recsys.experiments.bundling import make_bundle
        from recsys.experiments.config import loads
        from recsys.experiments.run import Untrained, fit, prepare

        torch.set_num_threads(1)
        config = loads(f'out = "{folder.as_posix()}"\n{toml}')
        dataset = prepare(config)
        towers = Untrained(config, dataset)
        if trained:
            model = fit(
                config, dataset, towers.make, remake=towers.remake, folder=folder / "fit"
            ).model
        else:
            model = towers.remake()
        path = make_bundle(config, dataset, model.eval(), towers.encoder, folder / "bundle")
        return Built(config, dataset, path)

    return build


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated shop: impressions with positions and devices, items with texts."""
    from recsys.experiments.shop.simulate import simulate

    folder = tmp_path_factory.mktemp("shop")
    simulate(users=120, items=120, days=8, requests_per_user=10).write(folder)
    return folder


@pytest.fixture(scope="session")
def shop_run(shop: Path) -> str:
    """TOML of a run on the small shop that trains in a second."""
    return f"""
[data]
format = "impressions"
log = "{shop.as_posix()}/impressions.parquet"
items = "{shop.as_posix()}/items.parquet"
[data.columns]
position = "position"
context_categories = ["device"]
[data.catalog]
title = "title"
text = ["description"]
categories = ["category", "brand"]
numbers = ["price"]
published = "published"
fields = ["category", "price"]
[split]
test = "2d"
valid = "1d"
[text]
epochs = 1
[towers]
dimension = 16
hidden = 16
[training]
epochs = 2
batch_size = 256
[evaluate]
"""


@pytest.fixture(scope="session")
def tiny(
    build: Callable[..., Built], shop_run: str, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """Towers trained on the small shop, with text, context and item statistics."""
    return build(shop_run, tmp_path_factory.mktemp("tiny"), trained=True)


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Event rows of 30 users and 40 items over ten days, with repeats and an item table.

    The table lacks i36 to i39; i39 is first chosen on the last day. i05 is over on the third day,
    i06 is never to be recommended, i07 only from the ninth day on.
    """
    import numpy as np
    import polars as pl

    folder = tmp_path_factory.mktemp("market")
    rng = np.random.default_rng(7)
    size, day = 600, 86_400
    item = (40 * rng.random(size) ** 1.5).astype(int)
    time = 1_704_067_200 + np.sort(rng.integers(0, 10 * day, size))
    early = time < time[0] + 9 * day
    item[early & (item == 39)] = 38
    item[-3] = 39
    pl.DataFrame(
        {
            "user": [f"u{u:02}" for u in rng.integers(0, 30, size)],
            "item": [f"i{i:02}" for i in item],
            "time": time,
        }
    ).write_csv(folder / "events.csv")
    start = 1_704_067_200
    pl.DataFrame(
        {
            "item": [f"i{i:02}" for i in range(36)],
            "title": [f"Thing number {i}" for i in range(36)],
            "score": [float(i) for i in range(36)],
            "from": [start + 8 * day if i == 7 else None for i in range(36)],
            "until": [start + 2 * day if i == 5 else None for i in range(36)],
            "sold": [i != 6 for i in range(36)],
        }
    ).write_parquet(folder / "items.parquet")
    return folder


@pytest.fixture(scope="session")
def market_run(market: Path) -> str:
    """TOML of a run on the market: no text, no context, no statistics."""
    return f"""
[data]
log = "{market.as_posix()}/events.csv"
items = "{market.as_posix()}/items.parquet"
[data.catalog]
title = "title"
available_from = "from"
available_until = "until"
available = "sold"
fields = ["score"]
[split]
test = "2d"
valid = "1d"
[evaluate]
ks = [1, 5, 20]
[towers]
dimension = 8
hidden = 8
"""


@pytest.fixture(scope="session")
def plain(
    build: Callable[..., Built], market_run: str, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """Untrained towers on the market."""
    return build(market_run, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; making one takes seconds, copying it none."""
    from recsys.experiments.tracking.store import Store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Store(f"sqlite:///{path}", 5)
    return path


@pytest.fixture
def out(tmp_path: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with a store of its own."""
    import shutil

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(fresh_database, folder / "mlflow.db")
    return folder
