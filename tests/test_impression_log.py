"""The impression log read back as positives, skips and positions; nothing acknowledged is torn."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
from conftest import Built

from recsys.errors import DataError
from recsys.serving.live.impression_log import SCHEMA, ImpressionLog, Parts
from recsys.serving.live.journal import Event
from recsys.serving.recommender import Recommender
from recsys.tables import DAY, SECOND

START = 1_704_067_200 * SECOND


def read(folder: Path) -> pl.DataFrame:
    """What a reader of the folder sees: no hidden names."""
    from recsys.features.readers.files import expand

    return pl.concat([pl.read_parquet(path) for path, _ in expand(str(folder))])


def test_one_row_an_item_shown_or_an_event(tmp_path: Path) -> None:
    with ImpressionLog(tmp_path, seconds=60) as log:
        assert log.shown("r1", "u1", 5, ["a", "b"], "main", "v1", [0.5, 0.25])
        assert log.events([Event("u1", "b", 9, "buy", 2.0, "r1", "e1")])
        assert log.shown("r2", None, 7, ["c"], "other", "v2", first=11)
        assert log.events([Event("", "c", 8, request="r2")])
        assert log.waiting == 5
    rows = read(tmp_path).sort("time", "position")
    assert rows.schema == SCHEMA
    assert rows.rows() == [
        ("u1", "a", 5, "shown", "r1", 1, 0.5, 1.0, "main", "v1"),
        ("u1", "b", 5, "shown", "r1", 2, 0.25, 1.0, "main", "v1"),
        ("request:r2", "c", 7, "shown", "r2", 11, None, 1.0, "other", "v2"),
        ("request:r2", "c", 8, "click", "r2", None, None, 1.0, None, None),
        ("u1", "b", 9, "buy", "r1", None, None, 2.0, None, None),
    ]
    assert (log.written, log.dropped, log.waiting) == (5, 0, 0)


def test_what_is_noted_is_on_disk_within_the_seconds(tmp_path: Path) -> None:
    with ImpressionLog(tmp_path, seconds=0.05) as log:
        log.shown("r", "u", 1, ["a"], "m", "v")
        wait_for(lambda: log.written == 1)
        assert read(tmp_path)["item"].to_list() == ["a"]


def test_a_full_memory_drops_and_counts(tmp_path: Path) -> None:
    with ImpressionLog(tmp_path, seconds=60, most=3) as log:
        assert log.shown("r", "u", 1, ["a", "b"], "m", "v")
        assert not log.shown("r", "u", 1, ["c", "d"], "m", "v")
        assert log.events([Event("u", "a", 2)])
        assert not log.events([Event("u", "b", 2)])
        assert log.dropped == 3
    assert len(read(tmp_path)) == 3
    assert not log.events([Event("u", "b", 2)])  # closed


def test_a_part_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, broken = Parts.write, [True]

    def failing(self: Parts, frame: pl.DataFrame) -> Path:
        if broken[0]:
            raise OSError(28, "No space left on device")
        return write(self, frame)

    monkeypatch.setattr(Parts, "write", failing)
    log = ImpressionLog(tmp_path, seconds=0.02)
    for n in range(5):
        log.shown(f"r{n}", "u", n, ["a"], "m", "v")
    wait_for(lambda: log.failures > 1)
    assert log.written == 0 and log.waiting == 5 and "No space" in str(log.last_error)
    broken[0] = False
    wait_for(lambda: log.written == 5)
    assert log.last_error is None
    broken[0] = True
    log.shown("r", "u", 1, ["a"], "m", "v")
    with pytest.raises(DataError, match=r"1 rows of the impression log cannot be written"):
        log.close()
    broken[0] = False
    log.close()
    assert read(tmp_path).sort("time")["request"].to_list()[:5] == ["r0", "r1", "r", "r2", "r3"]


def failing(*_: object, **__: object) -> None:
    """What Polars raises of a full disk, which is no OSError."""
    raise pl.exceptions.ComputeError("parquet: underlying IO error: No space left on device")


def test_what_polars_says_of_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ImpressionLog(tmp_path, seconds=0.02) as log:
        with monkeypatch.context() as patched:
            patched.setattr(pl.DataFrame, "write_parquet", failing)
            log.shown("r1", "u", 1, ["a", "b"], "m", "v")
            with pytest.raises(OSError, match="No space left"):
                log.flush()
            wait_for(lambda: log.failures > 2)
            assert log.alive and log.written == 0 and log.waiting == 2
            assert "No space left" in str(log.last_error)
        wait_for(lambda: log.written == 2)
        assert log.last_error is None
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be written" in one for one in said) == 1  # not one every second
    assert sum("written again" in one for one in said) == 1
    assert read(tmp_path)["item"].to_list() == ["a", "b"]


def test_the_thread_that_writes_outlives_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImpressionLog(tmp_path, seconds=0.02) as log:
        with monkeypatch.context() as patched:
            patched.setattr("recsys.serving.live.impression_log._frame", lambda some: 1 // 0)
            log.events([Event("u", "a", 1), Event("u", "b", 2)])
            wait_for(lambda: log.failures > 1)
            assert log.alive and log.waiting == 2
        wait_for(lambda: log.written == 2)
    assert read(tmp_path)["item"].to_list() == ["a", "b"] and not log.alive


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, where one may be made."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here (that takes root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_for_a_while_costs_no_row(small_disk: Path) -> None:
    with ImpressionLog(small_disk / "log", seconds=0.02) as log:
        log.shown("r0", "u", 0, ["a"], "m", "v")
        wait_for(lambda: log.written == 1)
        with open(small_disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        for n in range(1, 200):
            log.shown(f"r{n}", "u", n, [f"i{j}" for j in range(20)], "m", "v")
        wait_for(lambda: log.failures > 1)
        assert log.alive and log.written == 1 and log.waiting == 199 * 20
        (small_disk / "filler").unlink()
        wait_for(lambda: log.waiting == 0)
    assert read(small_disk / "log")["time"].sort().to_list() == sorted(
        [0, *(n for n in range(1, 200) for _ in range(20))]
    )


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    with ImpressionLog(tmp_path), pytest.raises(DataError, match="Another process writes"):
        ImpressionLog(tmp_path)
    ImpressionLog(tmp_path).close()


def frame(n: int) -> pl.DataFrame:
    return pl.DataFrame({"n": [n]})


def numbers(folder: Path) -> list[int]:
    return sorted(read(folder)["n"].to_list())


def test_parts_become_one_file(tmp_path: Path) -> None:
    parts = Parts(tmp_path, parts=3)
    for n in range(7):
        parts.write(frame(n))
        assert numbers(tmp_path) == list(range(n + 1))
    assert len(list(tmp_path.glob("log-*.parquet"))) == 2
    parts.close()
    Parts(tmp_path).close()
    assert len(list(tmp_path.glob("log-*.parquet"))) == 3 and not list(tmp_path.glob("open-*"))
    assert numbers(tmp_path) == list(range(7))


@pytest.mark.parametrize("step", range(1, 6))
def test_a_crash_at_any_step_of_joining_loses_and_repeats_nothing(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends just before the step-th change of a name, or removal."""
    parts = Parts(tmp_path, parts=3)
    for n in range(2):
        parts.write(frame(n))
    left = [step + 1]  # the part itself is renamed first

    def counted(name: str, module: object) -> None:
        real = getattr(module, name)

        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted("rename", os)
    counted("replace", os)
    counted("rmtree", shutil)
    if step < 5:
        with pytest.raises(KeyboardInterrupt):
            parts.write(frame(2))
    else:
        parts.write(frame(2))
    monkeypatch.undo()
    seen = numbers(tmp_path) if any(f for f in tmp_path.rglob("*.parquet") if visible(f)) else []
    assert seen in ([], [0, 1, 2]), "never twice, whatever a reader finds"
    parts.close()
    Parts(tmp_path).close()
    assert numbers(tmp_path) == [0, 1, 2]
    assert not [f for f in tmp_path.iterdir() if f.name != ".lock" and f.suffix != ".parquet"]


@pytest.mark.parametrize("step", ["sink", "rename", "replace", "rmtree"])
@pytest.mark.parametrize("again", ["later", "start"])
def test_parts_that_cannot_become_one_file_are_tried_again_and_never_written_twice(
    step: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.serving.live.impression_log.JOIN_AGAIN", 0.0)
    replace = os.replace

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def replaced(source: Path, target: Path) -> None:
        # Only the joined file; a part is renamed by the same function.
        full() if Path(source).name.startswith(".log-") else replace(source, target)

    with monkeypatch.context() as patched:
        if step == "sink":
            patched.setattr(pl, "scan_parquet", failing)  # what is laid together
        elif step == "rename":
            patched.setattr(os, "rename", full)
        elif step == "replace":
            patched.setattr(os, "replace", replaced)
        else:
            patched.setattr(shutil, "rmtree", full)
        parts = Parts(tmp_path, parts=3)
        for n in range(4):
            parts.write(frame(n))
        if again == "start":  # the disk is still full then
            parts.close()
            parts = Parts(tmp_path, parts=3)
    parts.write(frame(4))
    assert numbers(tmp_path) == list(range(5))
    parts.close()
    Parts(tmp_path).close()
    assert numbers(tmp_path) == list(range(5))
    assert not [f for f in tmp_path.iterdir() if f.name != ".lock" and f.suffix != ".parquet"]
    assert not list(tmp_path.glob(".log-*"))


def test_a_part_that_was_renamed_but_not_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(tmp_path)
    parts.write(frame(0))

    def failing_folders(path: Path) -> None:
        if path.is_dir():
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("recsys.files.sync", failing_folders)
        with pytest.raises(OSError, match="Input/output"):
            parts.write(frame(1))
    parts.write(frame(1))
    assert numbers(tmp_path) == [0, 1]
    parts.close()


def visible(file: Path) -> bool:
    return not any(part.startswith(".") for part in file.parts)


def test_a_killed_process_loses_at_most_the_last_seconds(tmp_path: Path) -> None:
    code = f"""
import time
from recsys.serving.live.impression_log import ImpressionLog
log = ImpressionLog({str(tmp_path)!r}, seconds=0.1)
n = 0
while True:
    log.shown(f"r{{n}}", "u", n, ["a", "b"], "m", "v")
    print(n, log.written // 2, flush=True)
    n += 1
    time.sleep(0.002)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        written = 0
        for line in process.stdout:
            written = int(line.split()[1])
            if written > 100:
                break
        process.send_signal(signal.SIGKILL)
    Parts(tmp_path).close()
    requests = read(tmp_path)["time"].unique().sort().to_list()
    assert requests == list(range(len(requests))) and len(requests) >= written


def wait_for(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_serving_makes_the_next_training_log(tmp_path: Path) -> None:
    """By hand: three users over six days; the recipe reads clicks, skips and their reasons."""
    from recsys.experiments import config
    from recsys.experiments.run import prepare

    items = [f"i{n}" for n in range(8)]
    with ImpressionLog(tmp_path / "log") as log:
        for day in range(6):
            for n, user in enumerate(("ann", "bob", None)):
                at = START + day * DAY + n * 3600 * SECOND
                name = f"d{day}-{n}"
                shown = [items[(day + n + j) % 8] for j in range(4)]
                log.shown(name, user, at, shown, "main", "v1", [0.25] * 4)
                # The third one; what stands above it was passed over, one below it was seen.
                # On the last day it comes later, so that no side ends within a request.
                after = (5 + 5 * (day == 5)) * SECOND
                click = Event(user or "", shown[2], at + after, request=name)
                log.events([click])
        log.events([Event("ann", "i7", START + 3 * DAY, "buy", 2.0)])
        log.events([Event("bob", "i1", START + 3 * DAY, "dislike")])
        log.events([Event("bob", "i2", START + 3 * DAY, "looked")])
    recipe = Path(config.__file__).parent / "recipes" / "served.toml"
    run = config.load(
        recipe,
        [
            f"out={tmp_path / 'runs'}", f"data.log={tmp_path / 'log'}",
            "split.test=1d", "split.valid=1d", "skips.horizon=1s",
        ],
    )  # fmt: skip
    dataset = prepare(run)
    assert len(dataset.event_item) == 6 * 3 + 1
    users = dataset.users.ids.to_list()
    assert {"ann", "bob", "request:d0-2"} <= set(users) and len(users) == 2 + 6
    weights = sorted(dataset.event_weight.tolist())
    assert weights == [1.0] * 18 + [6.0]  # a purchase counts three times, and was sent as 2
    total = dataset.manifest["skips"]["total"]
    assert total == {"skip_above": 2 * 18, "one_below_last_click": 18, "rejected": 1}
    # Of ann's first answer: i0 and i1 stand above the click on i2, i3 below it.
    ann, ids = users.index("ann") + 1, dataset.items.ids.to_list()
    first = int(dataset.user_offsets[ann])
    assert ids[dataset.event_item[first] - 1] == "i2"
    part = slice(int(dataset.skip_offsets[first]), int(dataset.skip_offsets[first + 1]))
    skips = zip(dataset.skip_item[part].tolist(), dataset.skip_weight[part].tolist(), strict=True)
    assert {ids[item - 1]: weight for item, weight in skips} == {"i0": 1, "i1": 1, "i3": 0.5}
    assert dataset.manifest["counts"]["unknown_event"] == 1


def test_the_next_bundle_takes_in_what_was_served(
    tmp_path: Path, build: Callable[..., Built]
) -> None:
    """Serve, train on the log, attach the new model: its overlay holds only what it never saw."""
    from recsys.experiments import config
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.live.updates import LiveUpdates

    items, told = [f"i{n}" for n in range(60)], []
    with LiveUpdates(None) as updates, ImpressionLog(tmp_path / "log") as log:
        for n in range(240):
            user, at = f"u{n % 16}", START + n * 3600 * SECOND + n
            shown = [items[(n * 7 + j * (n % 3 + 1)) % 60] for j in range(4)]
            log.shown(f"r{n}", user, at, shown, "main", "v1")
            events = [Event(user, shown[n % 3], at + SECOND, request=f"r{n}", id=f"e{n}")]
            log.events(events)
            updates.post_events(events)
            told += events
        log.close()
        recipe = Path(config.__file__).parent / "recipes" / "served.toml"
        text = recipe.read_text().replace('log = "log"', f'log = "{tmp_path / "log"}"')
        sizes = "[split]\ntest='1d'\nvalid='1d'\n[towers]\ndimension=8\nhidden=8\n"
        built = build(f"{text}{sizes}[training]\nepochs=2\n", tmp_path / "run", trained=True)
        served = LoadedModel.load(built.bundle)
        late = [event for event in told if event.time >= (served.bundle.cutoff or 0)]
        assert 0 < len(late) < len(told)
        view = updates.attach(served).view
        assert sorted((user, *one) for user, some in view.events.items() for one in some) == sorted(
            (event.user, event.item, event.time, 1.0) for event in late
        )
        assert len(Recommender(served).recommend(user="u3", k=3).ids) == 3


def test_positions_and_propensities_come_back(tmp_path: Path) -> None:
    from recsys.experiments import config
    from recsys.features.readers import read as logs

    with ImpressionLog(tmp_path / "log") as log:
        log.shown("r", "ann", START, ["a", "b", "c"], "main", "v1", [0.5, 0.25, 0.125], first=4)
        log.events([Event("ann", "b", START + 1, request="r")])
    recipe = Path(config.__file__).parent / "recipes" / "served.toml"
    run = config.load(recipe, [f"data.log={tmp_path / 'log'}"])
    rows = logs.read(run.data).interactions.collect().sort("time", "position")
    columns = rows.select("item", "kind", "position", "request").rows()
    assert [row[:3] for row in columns] == [
        ("a", 1, 4), ("b", 1, 5), ("c", 1, 6), ("b", 0, None),
    ]  # fmt: skip
    assert len({row[3] for row in columns}) == 1
