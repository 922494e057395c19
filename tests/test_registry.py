"""The model registry as a source of models: aliases, whole bundles in a cache, a dying store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swapping import renamed, until
from tracking_server import TrackingServer

from recsys.errors import BundleError, ConfigError
from recsys.experiments.tracking import registry
from recsys.experiments.tracking.registry import RegistrySource, promote
from recsys.experiments.tracking.store import Store
from recsys.experiments.tracking.track import Tracker, TrackRules
from recsys.serving.live.updates import LiveUpdates
from recsys.serving.models.manager import ModelManager


@pytest.fixture
def register(out: Path) -> Callable[..., str]:
    """Give a function that registers a bundle as `recsys train` does, and says its version."""

    def register(bundle: Path | None = None, out: Path = out, uri: str = "", **files: str) -> str:
        rules = TrackRules(model="shop", uri=uri)
        with Tracker(rules, out / "run", run_name="run", out=out) as run:
            path = run.folder / "bundle"
            shutil.rmtree(path, ignore_errors=True)
            if bundle is not None:
                shutil.copytree(bundle, path)
            else:
                (path / "text").mkdir(parents=True)
                (path / "manifest.json").write_text("{}")
                for name, text in files.items():
                    (path / "text" / name).write_text(text)
            run.log_bundle(path)
        assert run.model_version is not None
        return run.model_version.rpartition("/")[2]

    return register


def test_an_alias_names_a_version_which_is_downloaded_once(
    out: Path, register: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = register(weights="1"), register(weights="2")
    promote("shop", first, out=out)
    source = RegistrySource("models:/shop@champion", tmp_path / "cache", out=out, every=0)
    token, folder = source.latest()
    assert token.startswith("1-") and (folder / "text" / "weights").read_text() == "1"
    promote("shop", second, out=out)
    token, folder = source.latest()
    assert token.startswith("2-") and (folder / "text" / "weights").read_text() == "2"
    fixed = RegistrySource("models:/shop/1", tmp_path / "cache", out=out)
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("it is there already"))
    assert (fixed.latest()[1] / "text" / "weights").read_text() == "1"
    assert source.latest() == (token, folder)
    # Nothing half-made lies about.
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_store_is_asked_now_and_then_only(
    out: Path, register: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(weights="1")
    asked = []
    version_of = Store.version_of

    def counted(self: Store, *args: Any) -> tuple[str, str]:
        asked.append(time.monotonic())
        return version_of(self, *args)

    monkeypatch.setattr(Store, "version_of", counted)
    source = RegistrySource("models:/shop@candidate", tmp_path / "cache", out=out, every=0.3)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        source.latest()
        time.sleep(0.01)
    assert 2 <= len(asked) <= 4


def test_a_store_that_goes_away_raises_until_it_is_back(
    out: Path, register: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(weights="1")
    source = RegistrySource("models:/shop@candidate", tmp_path / "cache", out=out, every=0)
    found = source.latest()
    with monkeypatch.context() as broken:
        broken.setattr(Store, "version_of", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(BundleError, match=r"does not give models:/shop@candidate: gone"):
            source.latest()
    assert source.latest() == found


def test_a_download_that_breaks_off_leaves_nothing_and_is_made_again(
    out: Path, register: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(weights="1")
    source = RegistrySource("models:/shop@candidate", tmp_path / "cache", out=out, every=0)

    def half(self: Store, place: str, folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")
        raise ConnectionError("broken off")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "download", half)
        with pytest.raises(BundleError, match="broken off"):
            source.latest()
    assert list((tmp_path / "cache").iterdir()) == []
    assert (source.latest()[1] / "text" / "weights").read_text() == "1"


def test_the_cache_keeps_a_few_bundles_of_each_model(
    out: Path, register: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "KEPT", 2)
    cache = tmp_path / "cache"
    (cache / "shop window-1-00000000").mkdir(parents=True)  # of another model
    for number in range(4):
        register(weights=str(number))
        source = RegistrySource("models:/shop@candidate", cache, out=out)
        folder = source.latest()[1]
    kept = sorted(path.name.partition("-")[0] for path in cache.iterdir())
    assert kept == ["shop", "shop", "shop window"] and folder.is_dir()


def test_a_version_number_of_a_store_that_was_made_anew_is_another_bundle(
    out: Path, register: Callable[..., str], tmp_path: Path, fresh_database: Path
) -> None:
    register(weights="old")
    RegistrySource("models:/shop/1", tmp_path / "cache", out=out).latest()
    anew = tmp_path / "anew"  # another path, since SQLAlchemy keeps files open
    anew.mkdir()
    shutil.copy(fresh_database, anew / "mlflow.db")
    register(out=anew, weights="new")
    folder = RegistrySource("models:/shop/1", tmp_path / "cache", out=anew).latest()[1]
    assert (folder / "text" / "weights").read_text() == "new"


@pytest.mark.parametrize(
    "uri", ["models:/shop", "models:/shop@", "models:/a/b/1", "models:/shop/latest", "runs:/x", ""]
)
def test_a_uri_of_another_form_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models:/NAME@champion or models:/NAME/3"):
        RegistrySource(uri, tmp_path)


def test_what_is_not_registered_is_said(
    out: Path, register: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="There is no database"):
        RegistrySource("models:/shop/1", tmp_path, out=tmp_path / "none").latest()
    with pytest.raises(BundleError, match="shop"):
        RegistrySource("models:/shop@champion", tmp_path / "cache", out=out).latest()
    register(weights="1")
    with pytest.raises(BundleError, match="champion"):
        RegistrySource("models:/shop@champion", tmp_path / "cache", out=out).latest()
    with pytest.raises(BundleError, match="does not make shop/7 champion"):
        promote("shop", 7, out=out)


def test_a_server_that_is_down_costs_seconds_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    uri = f"http://me:secret@127.0.0.1:{port}"
    source = RegistrySource("models:/shop@champion", tmp_path, tracking=uri, timeout=1)
    begin = time.monotonic()
    with pytest.raises(BundleError, match="does not give models:/shop@champion") as caught:
        source.latest()
    assert "secret" not in str(caught.value)
    with pytest.raises(BundleError):
        source.latest()  # at once, the store is not asked again
    assert time.monotonic() - begin < 10


def begins(host: ModelManager, prefix: str) -> bool:
    """Whether the ids of the model that answers begin so."""
    return bool(host.choose(None)[1].model.bundle.items.ids[0].startswith(prefix))


def test_the_service_follows_the_champion_and_survives_the_store(
    out: Path,
    register: Callable[..., str],
    tmp_path: Path,
    plain: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = register(renamed(plain.bundle, tmp_path / "a", "a-"))
    second = register(renamed(plain.bundle, tmp_path / "b", "b-"))
    promote("shop", first, out=out)
    source = RegistrySource("models:/shop@champion", tmp_path / "cache", out=out, every=0.1)
    host = ModelManager({"main": source}, LiveUpdates(None), every=0.05)
    host.start()
    try:
        assert begins(host, "a-")
        with monkeypatch.context() as broken:
            broken.setattr(Store, "version_of", lambda *_: (_ for _ in ()).throw(OSError("gone")))
            until(lambda: host.facts()[0]["last_error"])
            assert "gone" in host.facts()[0]["last_error"] and begins(host, "a-")
        promote("shop", second, out=out)
        until(lambda: begins(host, "b-"))
        assert host.facts()[0]["last_error"] is None
        assert host.facts()[0]["token"].startswith("2-")
    finally:
        host.stop()


# --- a registry over HTTP -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_service_follows_a_registry_over_http(
    out: Path,
    register: Callable[..., str],
    tmp_path: Path,
    plain: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bundles go up and come down through the server alone; it goes away and comes back."""
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    kept, cache = tmp_path / "kept", tmp_path / "cache"
    with TrackingServer(out / "mlflow.db", kept) as server:
        made = {name: renamed(plain.bundle, tmp_path / name, f"{name}-") for name in "ab"}
        first, second = (register(made[name], uri=server.address) for name in "ab")
        promote("shop", first, tracking=server.address)
        # Only the server knows where the artifacts lie.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        source = RegistrySource("models:/shop@champion", cache, every=0.2, timeout=2)
        assert source._ask()[1].is_relative_to(cache) and len(list(cache.iterdir())) == 1
        assert source._store is not None
        place = source._store.version_of("shop", None, "champion")[1]
        assert place.startswith("mlflow-artifacts:")
        found = RegistrySource(f"models:/shop/{second}", cache).latest()[1]
        for file in (path for path in made["b"].rglob("*") if path.is_file()):
            assert (found / file.relative_to(made["b"])).read_bytes() == file.read_bytes()
        shutil.rmtree(found)

        host = ModelManager({"main": source}, LiveUpdates(None), every=0.05)
        host.start()
        try:
            assert begins(host, "a-")
            promote("shop", second, tracking=server.address)
            until(lambda: begins(host, "b-"), 60)
            assert host.facts()[0]["last_error"] is None
            server.stop()
            until(lambda: host.facts()[0]["last_error"], 60)
            assert begins(host, "b-") and "shop@champion" in host.facts()[0]["last_error"]
            server.start()
            promote("shop", first, tracking=server.address)
            until(lambda: begins(host, "a-"), 90)
        finally:
            host.stop()


def test_a_registry_is_asked_every_ten_seconds_unless_the_plan_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys.experiments.serve import _source

    asked: list[float] = []

    def ask(self: RegistrySource) -> tuple[str, Path]:
        asked.append(clock[0])
        return "1-x", tmp_path

    clock = [1000.0]
    monkeypatch.setattr(RegistrySource, "_ask", ask)
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for every, gaps in ((None, 10), (0.5, 1), (30.0, 30)):
        source = _source("models:/shop@champion", every)
        asked.clear()
        for second in range(91):  # as a host does that looks every second
            clock[0] = 2000.0 + second
            source.latest()
        assert [later - asked[0] for later in asked] == list(range(0, 91, gaps))
