"""Files that are whole or absent."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recsys.files as files
from recsys.errors import DataError
from recsys.files import (
    atomic_folder,
    atomic_write,
    canonical_json,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_first_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_writer_may_replace_the_temporary_file(tmp_path: Path) -> None:
    """Libraries that write aside and rename by themselves."""
    with atomic_write(tmp_path / "a") as temporary:
        (tmp_path / "b").write_text("b")
        os.replace(tmp_path / "b", temporary)
    assert (tmp_path / "a").read_text() == "b"


def test_results_are_as_readable_as_other_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain folder").mkdir()
    write_json(tmp_path / "a.json", {})
    with atomic_folder(tmp_path / "folder"):
        pass
    for ours, plain in (("a.json", "plain"), ("folder", "plain folder")):
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (ours, plain)}
        assert len(modes) == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_it_is_synced_before_it_is_renamed_and_its_folder_after(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a loss of power: content, then name, then the folder of names."""
    done: list[str] = []
    sync, replace, rename = files.sync, os.replace, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (done.append(f"sync {kind(path)}"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))

    def kind(path: Path) -> str:
        return "parent" if path == tmp_path else "inside" if path.name == "part" else "new"

    if what == "file":
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("x")
        assert done == ["sync new", "rename", "sync parent"]
    else:
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "part").write_text("x")
        assert done == ["sync inside", "sync new", "rename", "sync parent"]


def test_a_folder_appears_whole_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for version in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / version).write_text(version)
            (temporary / "deep").mkdir()
            (temporary / "deep" / "x").write_text(version)
            assert not (path / version).exists()
        assert names(path) == sorted(["deep", version])
        assert (path / "deep" / "x").read_text() == version
    assert names(tmp_path) == ["bundle"]


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_a_rename_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("old")
    rename = os.rename

    def fail_on_the_new(source: Path, target: Path) -> None:
        if Path(target) == path and not str(source).endswith(".old"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="no"), atomic_folder(path) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


WRITER = """
import sys
from recsys.files import atomic_folder, atomic_write
folder, size = sys.argv[1], 200_000
for version in range(10**9):
    text = f"{version} " * size
    with atomic_write(f"{folder}/file") as temporary:
        temporary.write_text(text)
    with atomic_folder(f"{folder}/folder") as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)
    if version == 0:
        print("started", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file_and_no_half_folder(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        words = (folder / "file").read_text().split()
        assert len(words) == 200_000 and len(set(words)) == 1
        # Between two renames there may be no folder for a moment, but never half of one.
        if (folder / "folder").exists():
            texts = {(folder / "folder" / part).read_text() for part in "ab"}
            assert len(texts) == 1 and len(texts.pop().split()) == 200_000


def test_digests_are_those_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"hello" * 100_000).hexdigest()


def test_two_splits_of_the_same_bytes_have_two_digests() -> None:
    parts = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), ()]
    assert len({sha256_bytes(*split) for split in parts}) == len(parts)


def test_equal_values_are_equal_text_and_nan_is_refused(tmp_path: Path) -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == canonical_json({"a": [1.5, "é"], "b": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert names(tmp_path) == []


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"no file .*b\.json"):
        read_json(tmp_path / "b.json")
