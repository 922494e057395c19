"""Keys: only hashes are kept, two of a role are valid at once, all are compared."""

from __future__ import annotations

import hmac
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from service_cases import FakeHost, FakeLiving, served
from swapping import until

from recsys.errors import ConfigError
from recsys.serving.api import auth as keys
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import KeyFile, Keys, given, make_key
from recsys.serving.client import Client, ServiceError


def test_a_key_opens_its_role_and_two_of_a_role_are_valid_at_once() -> None:
    old, new, write = make_key("read"), make_key("read"), make_key("write")
    text = "\n".join(["# rotated in May", *(one.line() for _, one in (old, new, write)), ""])
    assert all(key not in text for key, _ in (old, new, write))
    found = Keys.parse(text)
    assert found.needed
    assert [found.role(key.encode()) for key, _ in (old, new, write)] == ["read", "read", "write"]
    for wrong in (None, b"", b"rk_", old[0].encode() + b"x", old[1].digest, b"x" * 10_000):
        assert found.role(wrong) is None


def test_the_same_key_in_both_roles_may_write() -> None:
    key, one = make_key("write")
    read = keys.Hashed("read", one.salt, one.digest)
    for order in ((one, read), (read, one)):
        assert Keys(order).role(key.encode()) == "write"


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key("read") for _ in range(4)]
    compared, constant = [], hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(1)
        return constant(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    Keys(tuple(one for _, one in made)).role(made[0][0].encode())
    assert len(compared) == 4


@pytest.mark.parametrize(
    "line",
    [
        "read", "admin sha256 00 00", "read md5 00 00", "read sha256 zz zz",
        f"read sha256 {'00' * 8} {'00' * 32}", f"read sha256 {'00' * 16} {'00' * 31}",
        "rk_a-key-that-was-put-here-by-mistake",
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number_and_never_shown(line: str) -> None:
    with pytest.raises(ConfigError, match=r"Line 2 of the keys is no hash") as refused:
        Keys.parse(f"# keys\n{line}\n")
    assert "rk_" not in str(refused.value)
    assert "zz" not in str(refused.value)


def test_a_file_without_keys_or_with_too_many_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no key"):
        Keys.parse("# nothing yet\n")
    with pytest.raises(ConfigError, match="at most 16"):
        Keys.parse("\n".join(make_key("read")[1].line() for _ in range(17)))
    with pytest.raises(ConfigError, match="no role"):
        make_key("admin")


def test_a_key_is_found_in_either_header() -> None:
    assert given([(b"authorization", b"Bearer  abc")]) == b"abc"
    assert given([(b"host", b"x"), (b"x-api-key", b"abc")]) == b"abc"
    assert given([(b"authorization", b"Basic abc")]) is None
    assert given([]) is None


# --- a file that changes --------------------------------------------------------------------------


def test_keys_are_rotated_while_the_service_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (old, one), (new, two), (write, three) = (make_key(r) for r in ("read", "read", "write"))
    path = tmp_path / "keys"

    def write_down(*lines: str) -> None:
        """At once: a look in between would find half a file."""
        (tmp_path / "aside").write_text("\n".join(lines))
        (tmp_path / "aside").rename(path)

    write_down(one.line())
    kept = KeyFile(path, every=0.02)
    app = make_app(FakeHost(), FakeLiving(), keys=kept)
    kept.watch()
    try:
        with served(app) as port:

            def may(key: str, hot: bool = True) -> bool:
                with Client(f"http://127.0.0.1:{port}", key) as client:
                    try:
                        if hot:  # the client posts its questions; this is the other way
                            got = client._pool.request(
                                "GET", f"{client.url}/v1/items/i1/similar", headers=client._headers
                            )
                            return bool(got.status == 200)
                        client.put_item("a", {"title": "b"})
                    except ServiceError as error:
                        assert error.code in ("no_key", "forbidden")
                        return False
                    return True

            def counted(name: str) -> float:
                with Client(f"http://127.0.0.1:{port}", old) as client:
                    text = client._pool.request(
                        "GET", f"{client.url}/metrics", headers=client._headers
                    ).data.decode()
                (line,) = [
                    one for one in text.splitlines() if one.startswith(f"recsys_keys_{name} ")
                ]
                return float(line.split()[-1])

            assert may(old) and not may(new)
            write_down(one.line(), two.line(), three.line())
            until(lambda: may(new))
            assert may(old) and may(write, hot=False) and not may(new, hot=False)
            assert counted("valid") == 3 and counted("broken") == 0

            # A broken file, and none at all, change nothing, and it is said once.
            caplog.clear()
            write_down("rk_put_here_by_mistake")
            until(lambda: counted("broken") == 1)
            time.sleep(0.1)
            assert may(old) and may(new) and may(write, hot=False)
            assert counted("failures_total") == 1
            (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert "Line 1 of" in said.getMessage() and "rk_put" not in said.getMessage()
            path.unlink()
            until(lambda: counted("failures_total") == 2)
            assert may(old) and may(new)

            reads = counted("reads_total")
            write_down(two.line(), one.line())
            until(lambda: counted("broken") == 0)
            assert counted("reads_total") == reads + 1 and not may(write, hot=False)
            write_down(two.line())
            until(lambda: not may(old))
            assert may(new)
    finally:
        kept.stop()


def test_a_file_that_stays_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(make_key("read")[1].line())
    kept = KeyFile(path)
    kept.look()
    read = []
    monkeypatch.setattr(Keys, "load", staticmethod(lambda path: read.append(path)))
    for _ in range(3):
        kept.look()
    assert not read and kept.facts()["reads"] == 1


def test_a_file_of_keys_must_be_there_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(tmp_path / "none")


def test_a_pipe_of_keys_is_read_once_and_never_waited_for(tmp_path: Path) -> None:
    path, (key, known) = tmp_path / "pipe", make_key("read")
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(known.line(),))
    writer.start()
    keys = KeyFile(path, every=0.01)
    writer.join()
    keys.watch()
    end = threading.Thread(target=keys.stop, daemon=True)
    end.start()
    end.join(5)
    assert not end.is_alive()
    assert keys.role(key.encode()) == "read"
    assert keys.facts() == {"valid": 1, "broken": 0, "reads": 0, "failures": 0}
