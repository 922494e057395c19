"""A published bundle is whole or absent, and CURRENT names a whole one whenever it is read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Built
from serving_cases import NEW
from serving_cases import table as table

from recsys.errors import BundleError
from recsys.serving.manifest import check, read_manifest, write_manifest
from recsys.serving.models.publish import current, publish, rollback, versions
from recsys.serving.recommender import Recommender


def small(path: Path, says: str, size: int = 2000) -> Path:
    """What publishing sees of a bundle: files and a manifest with their digests."""
    (path / "text").mkdir(parents=True)
    (path / "vectors").write_bytes(says.encode() * size)
    (path / "text" / "words").write_text(says)
    write_manifest(path, {"says": says})
    return path


def version(path: Path) -> str:
    return str(read_manifest(path)["content"])[:12]


def whole(folder: Path) -> str:
    """What the current bundle says; raises unless all of it is there."""
    found = current(folder)
    manifest = read_manifest(found)
    check(found, manifest)
    assert manifest["content"].startswith(found.name)
    return manifest["says"]


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    return [small(tmp_path / "made" / name, name) for name in "abcde"]


def test_a_published_bundle_is_current_and_answers(plain: Any, tmp_path: Path) -> None:
    from recsys.serving.engine.loaded_model import LoadedModel

    path = publish(plain.bundle, tmp_path / "shop")
    assert path == current(tmp_path / "shop") == tmp_path / "shop" / "versions" / path.name
    assert (tmp_path / "shop" / "CURRENT").read_text() == f"versions/{path.name}\n"
    served = LoadedModel.load(path)
    assert served.version == path.name == version(plain.bundle)
    assert Recommender(served).similar(item="i01", k=3).ids


def test_publishing_rolling_back_and_publishing_again_by_hand(
    bundles: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    with pytest.raises(BundleError, match=r"no CURRENT.*recsys publish"):
        current(folder)
    with pytest.raises(BundleError, match="no CURRENT"):
        rollback(folder)
    a, b, c, *_ = bundles
    publish(a, folder)
    with pytest.raises(BundleError, match="no bundle before"):
        rollback(folder)
    publish(b, folder)
    assert whole(folder) == "b"
    assert rollback(folder) == current(folder)
    assert whole(folder) == "a"
    assert [v.name for v in versions(folder)] == [version(b), version(a)]
    assert [v.current for v in versions(folder)] == [False, True]
    publish(c, folder)
    assert whole(folder) == "c"
    rollback(folder)  # b was rolled back and is not what came before c
    assert whole(folder) == "a"
    with pytest.raises(BundleError, match="no bundle before"):
        rollback(folder)
    publish(a, folder), publish(c, folder), publish(a, folder)
    assert whole(folder) == "a"
    rollback(folder)
    assert whole(folder) == "c"


def test_the_current_bundle_and_the_one_before_are_never_pruned(
    bundles: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    for keep in (1, 0, 2):
        for bundle in bundles:
            before = [v.name for v in versions(folder)][:1]
            publish(bundle, folder, keep=keep)
            assert [v.name for v in versions(folder)] == [version(bundle), *before]
    for bundle in bundles:
        publish(bundle, folder, keep=4)
    assert [v.name for v in versions(folder)] == [version(b) for b in bundles[:0:-1]]
    rollback(folder)
    rollback(folder)
    publish(bundles[0], folder, keep=2)
    assert [v.name for v in versions(folder)] == [version(bundles[0]), version(bundles[2])]


@pytest.mark.parametrize("link", [True, False])
def test_files_are_linked_where_wanted_and_copied_otherwise(
    link: bool, bundles: list[Path], tmp_path: Path
) -> None:
    path = publish(bundles[0], tmp_path / "shop", link=link)
    for name in ("vectors", "text/words", "manifest.json"):
        assert (path / name).samefile(bundles[0] / name) is link
        assert (path / name).read_bytes() == (bundles[0] / name).read_bytes()


def test_a_disk_without_links_gets_copies(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    path = publish(bundles[0], tmp_path / "shop")
    assert whole(tmp_path / "shop") == "a"
    assert not (path / "vectors").samefile(bundles[0] / "vectors")


def test_a_damaged_bundle_is_not_published(bundles: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    publish(bundles[0], folder)
    (bundles[1] / "vectors").write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256"):
        publish(bundles[1], folder)
    with pytest.raises(BundleError, match="is no bundle"):
        publish(tmp_path / "nowhere", folder)
    assert whole(folder) == "a"
    publish(bundles[2], folder)
    assert not list((folder / "versions").glob(".half*"))
    assert len(versions(folder)) == 2


def test_a_published_bundle_that_was_damaged_is_mended_by_publishing_it_again(
    bundles: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    path = publish(bundles[0], folder, link=False)
    (path / "vectors").write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256"):
        whole(folder)
    assert publish(bundles[0], folder) == path
    assert whole(folder) == "a"
    publish(bundles[1], folder, link=False)
    (path / "text" / "words").unlink()
    with pytest.raises(BundleError):
        rollback(folder)
    assert whole(folder) == "b"


def test_two_publishers_at_once_leave_a_whole_bundle(bundles: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    publish(bundles[0], folder)
    failed: list[BaseException] = []
    seen: set[str] = set()

    def work(mine: list[Path]) -> None:
        try:
            for _ in range(4):
                for bundle in mine:
                    publish(bundle, folder, keep=2)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(part,)) for part in (bundles[:3], bundles[2:])]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        # A reader that dawdles may find its bundle pruned; then CURRENT names another one.
        found = current(folder)
        try:
            seen.add(read_manifest(found)["says"])
        except BundleError:
            assert current(folder) != found
    assert not failed
    assert whole(folder) in "abcde" and len(versions(folder)) == 2 and len(seen) > 1


LOOP = """
import sys
from pathlib import Path
from recsys.serving.models.publish import publish, rollback
folder, bundles = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
print("ready", flush=True)
turn = int(sys.argv[3])
while True:
    turn += 1
    publish(bundles[turn % len(bundles)], folder, keep=2, link=turn % 2 == 0)
    if turn % 5 == 0:
        rollback(folder)
"""


@pytest.mark.slow
def test_whoever_is_killed_while_publishing_leaves_a_whole_current_bundle(
    bundles: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    publish(bundles[0], folder)
    publish(bundles[1], folder)
    rng = random.Random(0)
    seen, left = set(), 0
    for turn in range(60):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, folder, bundles[0].parent, str(turn)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # not an error of its own
        process.stdout.close()
        seen.add(whole(folder))
        left += len(list((folder / "versions").glob(".half*")))
        names = [v.name for v in versions(folder)]
        assert current(folder).name in names
        for name in names:
            check(folder / "versions" / name, read_manifest(folder / "versions" / name))
    assert len(seen) > 2 and left > 5  # it was at work when it was killed
    publish(bundles[3], folder)
    assert whole(folder) == "d"
    assert not list((folder / "versions").glob(".half*"))
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "CURRENT",
        "HISTORY",
        "versions",
    ]


def test_the_commands_say_where_the_bundle_is(
    bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recsys.experiments import cli

    folder = tmp_path / "shop"

    def said(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert said("publish", bundles[0], folder) == f"{folder}/versions/{version(bundles[0])}\n"
    said("publish", bundles[1], folder, "--copy", "--keep", 2)
    assert whole(folder) == "b"
    assert f'"version": "{version(bundles[0])}"' in said("rollback", folder, "--json")
    assert whole(folder) == "a"


def test_a_journal_forgets_what_every_bundle_holds(
    tiny: Built,
    plain: Built,
    table: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from recsys.experiments import cli
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.live.journal import Event
    from recsys.serving.live.updates import LiveUpdates

    def said(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["prune", *(str(argument) for argument in arguments)])
        assert (ended.value.code or 0) == code
        out, err = capsys.readouterr()
        return err if code else out

    def kept() -> tuple[set[str], int]:
        with LiveUpdates(journal) as updates:
            return set(updates._items), updates.facts()["journal"]["events"]

    journal, shop, bundle = (
        tmp_path / "live",
        tmp_path / "shop",
        LoadedModel.load(tiny.bundle).bundle,
    )
    publish(plain.bundle, shop)  # of another shop: it holds nothing of this
    publish(tiny.bundle, shop)
    user, row, at = (
        int(column[0])
        for column in (bundle.timeline.user, bundle.timeline.item, bundle.timeline.time)
    )
    name, item = bundle.users.ids[user - 1], bundle.items.ids[row - 1]
    with LiveUpdates(journal) as updates:
        updates.put_item(item, table[item])
        updates.put_item("new", NEW)
        updates.post_events(
            [Event(name, item, at), Event(name, item, at + 1), Event("x", item, at)]
        )
        assert "open in another process" in said(journal, tiny.bundle, code=2)
    # What the service may be rolled back to counts, too.
    assert said(journal, shop) == f"{journal}: 0 items and 0 events forgotten that 2 bundles hold\n"
    assert kept() == ({item, "new"}, 3)
    assert "1 items and 1 events" in said(journal, tiny.bundle)
    assert kept() == ({"new"}, 2)
    assert '"items": 0' in said(journal, tiny.bundle, "--json")
    assert "no journal" in said(tmp_path / "lvie", tiny.bundle, code=2)
    assert not (tmp_path / "lvie").exists()
    assert "neither a bundle" in said(journal, tmp_path, code=2)
