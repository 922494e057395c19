"""What every test may use; no test reaches a network."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

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
