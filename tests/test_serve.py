"""`recsys serve`: what it refuses to do, the whole of it over a real bundle, and its end."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from service_cases import FakeEngine, FakeHost, FakeImpressions, raw, served
from swapping import until
from typer.testing import CliRunner

from recsys.errors import ConfigError, RecsysError
from recsys.experiments import cli
from recsys.experiments.serve import MAIN, Plan, _keys, _serve, begun_checks, service
from recsys.serving import manifest
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys, make_key
from recsys.serving.api.limits import parse_rates
from recsys.serving.api.server import bind, is_local, json_logs, own_names, run
from recsys.serving.client import Client, ServiceError

OPEN = Keys(open_writes=True)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name a SOURCE"),
        (["bundle", "--host", "0.0.0.0"], "there are no keys"),
        (["bundle", "--keys", "/nothing/there"], "cannot be read"),
        (["bundle", "--log-level", "loud"], "none of debug"),
        (["bundle", "--variant", "b=models/b"], "of the form NAME=SOURCE:SHARE"),
        (["bundle", "--variant", "b=models/b:2"], "of the form NAME=SOURCE:SHARE"),
        (["bundle", "--variant", "main=models/b:0.5"], "two variants 'main'"),
        (["bundle", "--variant", "a=x:0.5", "--variant", "b=x:0.5"], "leave 0 for 'main'"),
        (["/no/bundle/there", "--port", "0"], "/no/bundle/there"),
        (["--make-key", "admin"], "no role"),
    ],
)
def test_mistakes_end_with_2_and_say_the_way_out(arguments: list[str], said: str) -> None:
    ended = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert ended.exit_code == 2, ended.output
    assert said in ended.stderr
    assert "Traceback" not in ended.output


def test_a_key_is_made_once_and_its_line_opens_the_service(tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli.app, ["serve", "--make-key", "write"])
    key, line = ended.stdout.splitlines()
    (tmp_path / "keys").write_text(f"# ours\n{line}\n")
    assert Keys.load(tmp_path / "keys").role(key.encode()) == "write"
    assert key not in line


def test_variants_take_their_share_from_main() -> None:
    plan = Plan({MAIN: "x"}, OPEN).with_variants(["b=models:/shop@next:0.25", "c=runs/c:0.25"])
    assert plan.sources == {MAIN: "x", "b": "models:/shop@next", "c": "runs/c"}
    assert plan.shares == {"b": 0.25, "c": 0.25, MAIN: 0.5}


def test_a_taken_port_is_said_before_a_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be listened on"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_a_port_that_was_taken_meanwhile_ends_the_second_service() -> None:
    """Both were bound while neither listened, as when two are started at once."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})

    def started() -> None:
        told.append("started")
        os.kill(os.getpid(), signal.SIGTERM)  # else one that announces itself would serve on

    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(ConfigError, match="was taken meanwhile"):
            run(app, second, started=started)
    assert not told


def test_local_addresses() -> None:
    assert all(is_local(host) for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"))
    assert not any(is_local(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))
    assert b"[::1]" in own_names("::1")


def test_logs_are_json_lines_with_what_a_record_carries() -> None:
    to = io.StringIO()
    with json_logs("info", to):
        logging.getLogger("recsys.serve.requests").info("request", extra={"data": {"ms": 1.5}})
        logging.getLogger("x").debug("not this")
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("recsys.serve").exception("request %s failed", "r1")
    one, two = (json.loads(line) for line in to.getvalue().splitlines())
    assert (one["level"], one["message"], one["ms"]) == ("info", "request", 1.5)
    assert (two["message"], "ValueError: broken" in two["exception"]) == ("request r1 failed", True)


# --- the end --------------------------------------------------------------------------------------


def test_what_runs_is_finished_before_the_end(tmp_path: Path) -> None:
    engine, impressions = FakeEngine(), FakeImpressions()
    app = make_app(FakeHost({"a": engine}), impressions=impressions)
    answers: list[bytes] = []
    body = b'{"text":"slow"}'
    head = b"POST /v1/search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with served(app) as port:
        idle = socket.create_connection(("127.0.0.1", port))
        ask = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        thread = threading.Thread(target=lambda: answers.append(raw(port, ask)))
        thread.start()
        raw(port, b"GET /v1/items/i1/similar HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(0.1)
    thread.join()
    idle.close()
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert {row[1] for row in impressions.rows} == {None}
    assert len(impressions.rows) == 2
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port), 1).close()


# --- the whole of it ------------------------------------------------------------------------------


@contextmanager
def running(bundle: Path, folder: Path) -> Iterator[tuple[Client, int]]:
    plan = Plan(
        {MAIN: str(bundle)}, OPEN, journal=folder / "journal", impressions=folder / "shown",
        deadline=20,
    )  # fmt: skip
    with service(plan) as app, served(app) as port, Client(f"http://127.0.0.1:{port}") as client:
        yield client, port


def test_a_shop_from_end_to_end(tiny: Any, tmp_path: Path) -> None:
    with running(tiny.bundle, tmp_path) as (shop, port):
        assert shop.live()
        assert shop.ready()
        (model,) = shop.model()
        version, columns = model["version"], model["engine"]["fields"]
        assert "category" in columns

        # A known item: hot and general way agree, and `k` is what it says.
        known = shop.search("lamp", k=5, fields=["*"]).ids
        hot = raw(
            port,
            b"GET /v1/items/%s/similar?k=4 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            % known[0].encode(),
        )
        said = json.loads(hot.split(b"\r\n\r\n", 1)[1])
        general = shop.similar(known[0], k=4)
        assert [item["id"] for item in said["items"]] == general.ids
        assert [item["score"] for item in said["items"]] == pytest.approx(
            [item.score for item in general], abs=2e-6
        )
        assert said["model"] == general.model == version

        # Histories, users, filters, pages, explanations.
        for_history = shop.recommend(history=known[:3], k=5, context={"device": "phone"})
        assert len(for_history) == 5
        assert not set(for_history.ids) & set(known[:3])
        category = shop.item(known[0])["fields"]["category"]
        tea = {"equals": {"category": [category]}}
        only = shop.similar(known[1], k=3, filter=tea, fields=["category"])
        assert {item.fields["category"] for item in only if item.fields} == {category}
        first = shop.similar(known[0], k=3, paged=True)
        second = shop.similar(known[0], k=3, paged=True, cursor=first.next)
        third = shop.batch(
            [{"kind": "similar", "items": [known[0]], "k": 2, "paged": True, "cursor": second.next}]
        )[0]
        assert not isinstance(third, ServiceError)
        assert not set(first.ids) & set(second.ids)
        assert first.ids + second.ids == shop.similar(known[0], k=6, exact=True).ids
        assert shop.similar(known[0], k=2, explain=True).items[0].explanation
        assert shop.recommend(user="nobody at all").fallback

        now = time.time_ns() // 1000
        # An item that comes is found, counts in a history, and goes again.
        lamp = shop.item(known[0])["fields"]
        shop.put_item("new/1", {"title": "A brass desk lamp", "category": lamp["category"]})
        assert shop.item("new/1")["live"] is True
        assert len(shop.similar("new/1", k=3)) == 3
        assert "new/1" in shop.similar(known[0], k=1000).ids
        events = [{"user": "newcomer", "item": id, "time": now} for id in ("new/1", known[0])]
        assert shop.post_events(events) == 2
        assert [one["id"] for one in shop.user("newcomer")["events"]] == ["new/1", known[0]]
        assert shop.recommend(user="newcomer", k=3).fallback is None
        shop.delete_item("new/1")
        with pytest.raises(ServiceError, match="new/1") as refused:
            shop.item("new/1")
        assert (refused.value.code, refused.value.status) == ("unknown_item", 404)

        # What is wrong is said in its place.
        with pytest.raises(ServiceError, match="color") as refused:
            shop.put_item("x", {"color": "red"})
        assert refused.value.code == "bad_query"
        with pytest.raises(ServiceError) as refused:
            shop.vector([1.0])
        assert refused.value.code == "bad_query"
        one, two = shop.batch([{"kind": "similar", "items": [known[0]], "k": 2},
                               {"kind": "vector", "vector": [1.0]}])  # fmt: skip
        assert not isinstance(one, ServiceError)
        assert len(one) == 2
        assert isinstance(two, ServiceError)
        metrics = raw(
            port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        assert f'model="{version}"'.encode() in metrics
        assert b"recsys_live_users 1.0" in metrics

    shown = pl.read_parquet(tmp_path / "shown" / "**" / "*.parquet")
    assert {"shown", "click"} <= set(shown["event"])
    assert set(shown["model"].drop_nulls()) >= {version}
    assert said["request_id"] in set(shown["request"])  # a hot answer
    # Positions go on from page to page.
    for page, positions in ((first, [1, 2, 3]), (second, [4, 5, 6]), (third, [7, 8])):
        rows = shown.filter(request=page.request_id).sort("position")
        assert rows.select("item", "position").rows() == list(zip(page.ids, positions, strict=True))

    # What was acknowledged is there after a start.
    with running(tiny.bundle, tmp_path) as (shop, _):
        user = shop.user("newcomer")
        assert (user["known"], [one["id"] for one in user["events"]]) == (True, [known[0]])


def test_without_a_journal_nothing_is_written(plain: Any) -> None:
    with service(Plan({MAIN: str(plain.bundle)}, OPEN, deadline=20)) as app, served(app) as port:
        with Client(f"http://127.0.0.1:{port}") as shop, pytest.raises(ServiceError) as refused:
            shop.post_events([{"user": "u", "item": "i01"}])
        assert refused.value.code == "forbidden"
        other = raw(
            port, b"GET /v1/live HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        )
        assert other.startswith(b"HTTP/1.1 403")


def test_the_plan_bounds_callers_and_follows_the_file_of_keys(plain: Any, tmp_path: Path) -> None:
    (first, one), (second, two) = make_key("read"), make_key("read")
    path = tmp_path / "keys"
    path.write_text(one.line())
    keys = _keys(path, open_writes=False)
    rates = parse_rates(["0.01"], ["3"], keys=keys.needed)
    plan = Plan({MAIN: str(plain.bundle)}, keys, rates=rates, deadline=20)
    with service(plan) as app, served(app) as port:
        url = f"http://127.0.0.1:{port}"

        def code(key: str) -> str:
            with Client(url, key, retries=0, timeout=20) as shop:
                try:
                    shop.item("i01")
                except ServiceError as error:
                    return error.code
                return "well"

        assert [code(first) for _ in range(4)] == ["well", "well", "well", "rate_limited"]
        assert code(second) == "no_key"
        (tmp_path / "aside").write_text(two.line())
        (tmp_path / "aside").rename(path)
        until(lambda: code(first) == "no_key")
        assert [code(second) for _ in range(4)] == ["well", "well", "well", "rate_limited"]


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose digests were made, slowly."""
    made: list[Path] = []
    digest = manifest._digest

    def slow(file: Path) -> str:
        made.append(file)
        time.sleep(0.05)
        return digest(file)

    monkeypatch.setattr(manifest, "_digest", slow)
    return made


def test_digests_are_made_once(plain: Any, digested: list[Path]) -> None:
    plan = Plan({MAIN: str(plain.bundle)}, OPEN, deadline=20)
    with begun_checks(plan) as begun, service(plan, begun):
        assert sorted(digested) == sorted(set(digested))
        assert len(digested) == len(manifest.read_manifest(plain.bundle)["files"])


@pytest.mark.parametrize("wrong", ["variant", "journal"])
def test_a_service_that_cannot_start_makes_no_more_digests(
    wrong: str, plain: Any, tmp_path: Path, digested: list[Path]
) -> None:
    plan = Plan({MAIN: str(plain.bundle)}, OPEN, port=0)
    if wrong == "variant":
        shutil.copy(plain.bundle / manifest.MANIFEST, tmp_path)  # and nothing else
        plan.with_variants([f"next={tmp_path}:0.5"])
    else:
        plan.journal = tmp_path / "file"
        plan.journal.write_text("no folder")
    with pytest.raises(RecsysError):
        _serve(plan)
    made = len(digested)
    time.sleep(0.2)
    assert len(digested) == made < len(manifest.read_manifest(plain.bundle)["files"])


HANGS = """
import asyncio
from recsys.serving.api.server import ServerRules, bind, run, url
async def app(scope, receive, send):
    if scope["type"] == "http":
        await asyncio.sleep(60)
bound = bind("127.0.0.1", 0)
print(url(bound), flush=True)
run(app, bound, ServerRules(drain=1))
"""


@pytest.mark.slow
def test_a_request_that_never_ends_does_not_hold_a_stop_for_longer_than_the_drain() -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        host, port = process.stdout.readline().strip().removeprefix("http://").split(":")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                connection = socket.create_connection((host, int(port)))
                break
            except OSError:
                time.sleep(0.05)
        with connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(10) == 1 and time.monotonic() - began < 5
    finally:
        process.kill()


@pytest.mark.slow
def test_sigterm_drains_flushes_and_exits_with_0(tiny: Any, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "recsys", "serve", str(tiny.bundle), "--port", "0", "--open-writes",
        "--journal", str(tmp_path / "journal"), "--impressions", str(tmp_path / "shown"),
        "--deadline", "20",
    ]  # fmt: skip
    with started(command) as (process, shop):
        shop.put_item("kept", {"title": "A brass desk lamp"})
        answers: list[Any] = []
        requests: list[Any] = [{"kind": "search", "text": f"lamp {n}"} for n in range(256)]
        thread = threading.Thread(target=lambda: answers.append(shop.batch(requests)))
        thread.start()
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert len(answers[0]) == 256
    with started(command) as (process, shop):
        assert shop.item("kept")["live"] is True
        process.send_signal(signal.SIGINT)
    shown = pl.read_parquet(tmp_path / "shown" / "**" / "*.parquet")
    assert len(shown.filter(event="shown")) == 2560


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The service as a process, which must end in order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate()
        with Client(url, timeout=20) as shop:
            yield process, shop
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, ""), err
        assert json.loads(err.splitlines()[-1])["message"] == "stopped"
    finally:
        process.kill()
