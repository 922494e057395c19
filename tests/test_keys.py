"""Keys: only hashes are kept, two of a role are valid at once, all are compared."""

from __future__ import annotations

import hmac
from typing import Any

import pytest

from recsys.errors import ConfigError
from serving.http import keys
from serving.http.keys import Keys, given, make_key


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
