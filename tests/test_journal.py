"""What was acknowledged is there after every start; what cannot be written is refused."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from recsys.errors import QueryError
from recsys.serving.live.journal import FILE, Change, Event, Journal, JournalError, body_of
from recsys.serving.live.updates import GroupCommit


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path, patience=0.05) as journal:
        yield journal


def state(journal: Journal) -> list[tuple[str, bytes | None]]:
    return [(id, body) for id, _, body in journal.items()]


def test_the_newest_state_of_each_item_in_the_order_of_changes(journal: Journal) -> None:
    journal.append([Change("a", b"1"), Change("b", b"2"), Change("c", b"3")], now=5)
    journal.append([Change("a", None), Change("b", b"4"), Change("b", b"5")], now=6)
    assert journal.items() == [("c", 5, b"3"), ("a", 6, None), ("b", 6, b"5")]


def test_events_in_the_order_in_which_they_came_each_id_once(journal: Journal) -> None:
    one, two = Event("u", "a", 9, id="x"), Event("u", "b", 3, "buy", 2.5, "r")
    assert journal.append(events=[one, two, one]) == [1, 2, None]
    again = journal.append(events=[one, two])
    assert again[0] is None and again[1] is not None
    assert [stored.event for stored in journal.events()] == [one, two, two]
    assert [stored.seq for stored in journal.events()] == [1, 2, again[1]]


def test_a_start_finds_what_the_last_one_left(tmp_path: Path) -> None:
    events = [Event("ü", "a\x00b", -(2**63), id="x"), Event("u", "b", 2**63 - 1)]
    with Journal(tmp_path) as journal:
        journal.append([Change("a", "é".encode()), Change("b", None)], events)
        before = journal.items(), list(journal.events())
    with Journal(tmp_path) as journal:
        assert (journal.items(), list(journal.events())) == before
        new = journal.append(events=events)
        assert new[0] is None and (new[1] or 0) > 2
        journal.append([Change("c", b"")])
        assert [id for id, _ in state(journal)] == ["a", "b", "c"]


def test_one_process_has_it_open(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=f"{tmp_path} is open in another process"):
        Journal(tmp_path)


def test_a_full_disk_refuses_the_write_and_nothing_of_it_stays(journal: Journal) -> None:
    journal.append([Change("a", b"1")])
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError, match=r"disk of .* is full: nothing was taken"):
        journal.append([Change("b", b"2"), Change("c", b"x" * 100_000)], [Event("u", "a", 1)])
    assert state(journal) == [("a", b"1")] and not list(journal.events())
    journal._db.execute("PRAGMA max_page_count = 1000000")
    journal.append([Change("b", b"2")], [Event("u", "a", 1)])
    assert [id for id, _ in state(journal)] == ["a", "b"]


def test_a_locked_database_refuses_the_write(journal: Journal, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalError, match="Another program holds"):
        journal.append([Change("a", b"1")])
    other.execute("ROLLBACK")
    other.close()
    journal.append([Change("a", b"1")])
    assert state(journal) == [("a", b"1")]


def test_a_foreign_or_later_database_is_not_touched(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(JournalError, match="no journal of recsys"):
        Journal(tmp_path)
    (tmp_path / FILE).unlink()
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(JournalError, match=r"format version 9; this recsys reads 1"):
        Journal(tmp_path)


def filled(folder: Path) -> Path:
    with Journal(folder) as journal:
        journal.append([Change(f"i{n}", b"x" * 200) for n in range(500)])
    return folder / FILE


@pytest.mark.parametrize("harm", ["header", "middle", "cut", "text"])
def test_a_damaged_database_is_named(harm: str, tmp_path: Path) -> None:
    file = filled(tmp_path)
    size = file.stat().st_size
    with file.open("r+b") as raw:
        if harm == "header":
            raw.write(b"not a database, surely")
        elif harm == "middle":
            raw.seek(size // 2)
            raw.write(random.Random(3).randbytes(8192))
        elif harm == "cut":
            raw.truncate(size // 2 + 100)
        else:
            raw.truncate(0)
            raw.write(b"hello" * 1000)
    with pytest.raises(JournalError, match=r"journal.sqlite is damaged .* move it away"):
        Journal(tmp_path)
    # Nothing is held: once it is moved away, a new one is made.
    file.unlink()
    for rest in tmp_path.glob(f"{FILE}-*"):
        rest.unlink()
    Journal(tmp_path).close()


def test_a_torn_end_of_the_log_loses_only_what_was_never_acknowledged(tmp_path: Path) -> None:
    with Journal(tmp_path / "a") as journal:
        journal.append([Change("a", b"1")])
        wal = tmp_path / "a" / f"{FILE}-wal"
        whole = wal.stat().st_size
        journal.append([Change("b", b"2")])
        later = tmp_path / "b"
        later.mkdir()
        (later / FILE).write_bytes((tmp_path / "a" / FILE).read_bytes())
        torn = wal.read_bytes()[: whole + 1000]
        (later / f"{FILE}-wal").write_bytes(torn)
    with Journal(later) as journal:
        assert state(journal) == [("a", b"1")]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be used for a journal"):
        Journal(tmp_path / "file")


def test_pruning_forgets_and_gives_room_back(journal: Journal) -> None:
    journal.append([Change(f"i{n}", b"x" * 1000) for n in range(1000)])
    journal.append(events=[Event("u", "a", time) for time in range(10)])
    large = journal.count()["bytes"]
    assert journal.prune([f"i{n}" for n in range(999)], 6, [2, 3]) == (999, 4)
    assert journal.count()["items"] == 1 and journal.count()["bytes"] < large / 10
    assert [stored.event.time for stored in journal.events()] == [1, 2, 6, 7, 8, 9]
    assert journal.append(events=[Event("u", "a", 3)]) == [11]  # places are never given twice


def test_what_json_cannot_say_is_refused() -> None:
    for wrong in ({"a": float("nan")}, {"a": {1}}, {"a": "\ud800"}, {"a": b"x"}):
        with pytest.raises(QueryError, match="cannot be written as JSON"):
            body_of(wrong)


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="is closed"):
        journal.append([Change("a", b"")])


# ---------------------------------------------------------------------------- sharing a commit


def test_many_writers_share_a_commit() -> None:
    goes: list[int] = []
    written = threading.Event()

    def work(asked: Sequence[int]) -> list[int | Exception]:
        goes.append(len(asked))
        assert written.wait(60)  # the disk, which takes until all others have come
        return [ValueError(n) if n % 10 == 7 else n * n for n in asked]

    together, found = GroupCommit(work, most=16), {}

    def ask(n: int) -> None:
        try:
            found[n] = together(n)
        except ValueError as error:
            found[n] = error.args

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while sum(goes[:1]) + len(together._waiting) < 60 and time.monotonic() < end:
        time.sleep(0.001)
    written.set()
    for thread in threads:
        thread.join()
    together.close()
    assert found == {n: (n,) if n % 10 == 7 else n * n for n in range(60)}
    assert sum(goes) == 60 and len(goes) == 1 + -(-(60 - goes[0]) // 16) and max(goes) == 16
    with pytest.raises(RuntimeError):
        together(1)


def test_work_that_fails_fails_for_all_who_wait_and_goes_on() -> None:
    def work(asked: Sequence[bool]) -> list[int | Exception]:
        if any(asked):
            raise OSError("the disk")
        return [0] * len(asked)

    together = GroupCommit(work)
    with pytest.raises(OSError, match="the disk"):
        together(True)
    assert together(False) == 0
    together.close()


# ---------------------------------------------------------------------------- power off

WRITER = """
import sys, threading
from recsys.serving.live.journal import Change, Event, Journal
from recsys.serving.live.updates import GroupCommit

folder, start = sys.argv[1], int(sys.argv[2])
journal = Journal(folder)

def work(asked):
    changes = [Change(f"i{n}", b"%d" % n) for n in asked]
    journal.append(changes, [Event("u", f"i{n}", n) for n in asked])
    return [None] * len(asked)

together, out = GroupCommit(work), threading.Lock()

def write(first):
    n = first
    while True:
        together(n)
        with out:
            sys.stdout.write(f"{n}\\n")
            sys.stdout.flush()
        n += 4

for thread in range(4):
    threading.Thread(target=write, args=(start + thread,), daemon=True).start()
threading.Event().wait()
"""


def killed(folder: Path, rounds: int, seed: int) -> None:
    rng, acknowledged, start = random.Random(seed), set[int](), 0
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(start)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()  # it has begun
        timer = threading.Timer(rng.random() * 0.1, process.send_signal, [signal.SIGKILL])
        timer.start()
        lines = [first, *process.stdout.read().splitlines(keepends=True)]
        process.wait()
        timer.join()
        acknowledged |= {int(line) for line in lines if line.endswith("\n")}
        with Journal(folder) as journal:
            there = {id: body for id, _, body in journal.items()}
            happened = {stored.event.item for stored in journal.events()}
        lost = [n for n in acknowledged if there.get(f"i{n}") != str(n).encode()]
        assert not lost and happened == there.keys()
        start = max(int(id[1:]) for id in there) + 1
    assert len(acknowledged) > rounds


def test_killed_while_writing_three_times(tmp_path: Path) -> None:
    killed(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_while_writing_sixty_times(tmp_path: Path) -> None:
    killed(tmp_path, 60, seed=2)
