"""A bundle is whole or absent, says so itself, and answers the same wherever it is read."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.errors import BundleError
from recsys.files import sha256_file
from recsys.serving import bundle as bundles
from recsys.serving import manifest as manifests
from recsys.serving.index import HnswIndex, IndexRules
from recsys.serving.live import new_items as newcomers
from recsys.serving.recommender import Recommender
from recsys.towers.embedding import narrowed
from recsys.towers.encode import encode_items


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


def _said(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def _sign(bundle: Path, **changes: Any) -> None:
    """Write a manifest that matches the files again, as a careless tool would."""
    said = {**_said(bundle), **changes}
    for name in ("format", "format_version", "libraries", "files", "content", "self"):
        said.pop(name)
    manifests.write_manifest(bundle, said)


def test_a_bundle_that_was_written_again_gives_the_same_answers(tiny: Any, tmp_path: Path) -> None:
    first = bundles.load(tiny.bundle)
    again = bundles.save(first, tmp_path / "again", rules=IndexRules(), encoder=first.encoder)
    one, two = Recommender(first), Recommender.load(again)
    users = np.arange(first.users.size)
    for exact in (True, False):
        for a, b in zip(
            one.recommend_rows(one.queries(users), 7, exact=exact),
            two.recommend_rows(two.queries(users), 7, exact=exact),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    for ask in ({"item": first.items.ids[3]}, {"text": "oak lamp"}):
        assert one.similar(**ask).to_list() == two.similar(**ask).to_list()
    assert (
        one.recommend(user=first.users.ids[0]).to_list()
        == two.recommend(user=first.users.ids[0]).to_list()
    )
    assert _said(again)["content"] == _said(tiny.bundle)["content"]
    assert _said(again)["cutoff"] == first.cutoff == tiny.dataset.test_from


def test_what_is_looked_up_is_kept_in_half_the_memory_and_says_what_it_says(tiny: Any) -> None:
    bundle = bundles.load(tiny.bundle)
    inputs, items = bundle.model.item_tower.inputs, bundle.model.items
    assert inputs.ids.weight.dtype == items.text.dtype == torch.float16
    assert inputs.text.weight.dtype == torch.float32  # what is computed with
    rows = np.arange(bundle.items.size)
    again = encode_items(bundle.model, rows, bundle.timeline, bundle.cutoff)
    np.testing.assert_allclose(again, bundle.vectors, atol=1e-6)
    # By hand: the numbers of a row are rounded, and computed with as float32.
    whole = bundle.model.embed_items(torch.tensor([1]), _statistics(bundle)).detach()
    for table in (inputs.ids, bundle.model.items):
        table.float()
    assert inputs.ids.weight.dtype == items.text.dtype == torch.float32
    wide = bundle.model.embed_items(torch.tensor([1]), _statistics(bundle)).detach()
    np.testing.assert_array_equal(whole, wide)


def _statistics(bundle: bundles.Bundle) -> torch.Tensor | None:
    if not bundle.model.uses_statistics or bundle.cutoff is None:
        return None
    return torch.from_numpy(bundle.timeline.statistics(np.array([1]), bundle.cutoff))


def test_a_table_with_a_number_too_large_for_half_stays_as_it_is() -> None:
    table = torch.tensor([[0.1, -3.0], [65504.0, 1e-9]])
    assert narrowed(table).dtype == torch.float16
    np.testing.assert_allclose(narrowed(table).float(), table, rtol=2**-11, atol=1e-7)
    table[0, 0] = 70000.0
    assert narrowed(table) is table
    # An item that is put later is kept alike, and one too large for it is not lost.
    kept = torch.zeros(1, 2, dtype=torch.float16)
    assert newcomers._as_kept(table, kept) is table
    assert newcomers._as_kept(torch.ones(1, 2), kept).dtype == torch.float16


def test_two_trainings_of_one_run_make_the_same_content(
    tiny: Any, build: Callable[..., Any], shop_run: str, tmp_path: Path
) -> None:
    other = build(shop_run, tmp_path, trained=True)
    assert _said(other.bundle)["content"] == _said(tiny.bundle)["content"]
    assert _said(other.bundle)["fingerprint"] == _said(tiny.bundle)["fingerprint"]


def test_a_changed_byte_in_any_file_is_refused_with_both_digests(copy: Path) -> None:
    files = _said(copy)["files"]
    assert {"towers.safetensors", "vectors.safetensors", "timeline.safetensors"} <= set(files)
    on_disk = {f.relative_to(copy).as_posix() for f in copy.rglob("*") if f.is_file()}
    assert on_disk == {*files, "manifest.json"}
    for name, digest in files.items():
        file = copy / name
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(BundleError) as refused:
                bundles.load(copy)
            assert str(file) in str(refused.value)
            assert digest[:12] in str(refused.value)
            assert sha256_file(file)[:12] in str(refused.value)
        file.write_bytes(whole)
    bundles.load(copy)


@pytest.mark.parametrize("key", ["cutoff", "warm_items", "score", "prepared", "contexts"])
def test_a_changed_word_in_the_manifest_is_refused(copy: Path, key: str) -> None:
    said = _said(copy)
    said[key] = None
    (copy / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(BundleError, match="of itself"):
        bundles.load(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    for name in _said(copy)["files"]:
        file = copy / name
        file.rename(copy / "away")
        with pytest.raises(BundleError, match="lacks " + name.replace(".", r"\.")):
            bundles.load(copy)
        (copy / "away").rename(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no bundle: it has no manifest.json"),
        ("{", "is not JSON.* damaged"),
        ("[]", "the format 'list', not 'recsys-bundle'"),
        ('{"format": "recsys.prepared"}', "the format 'recsys.prepared', not 'recsys-bundle'"),
        ('{"format": "recsys-bundle"}', "format version None; this recsys reads 3"),
        ('{"format": "recsys-bundle", "format_version": 1}', "version 1; this recsys reads 3"),
        ('{"format": "recsys-bundle", "format_version": 3}', "says None… of itself"),
    ],
)
def test_what_is_no_bundle_of_ours_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        bundles.load(tmp_path)
    with pytest.raises(BundleError, match="no bundle"):
        bundles.load(tmp_path / "nowhere")


def test_vectors_of_another_bundle_are_refused_with_the_fingerprints(
    copy: Path, build: Callable[..., Any], shop_run: str, tmp_path: Path
) -> None:
    other = build(f"seed = 5\n{shop_run}", tmp_path / "other")
    ours, theirs = _said(copy)["fingerprint"], _said(other.bundle)["fingerprint"]
    assert ours != theirs
    for name in ("vectors.safetensors", "towers.safetensors"):
        kept = (copy / name).read_bytes()
        shutil.copy(other.bundle / name, copy / name)
        with pytest.raises(BundleError, match="SHA-256"):
            bundles.load(copy)
        _sign(copy)
        with pytest.raises(BundleError, match="not made together") as refused:
            bundles.load(copy)
        assert ours[:12] in str(refused.value)
        if name.startswith("vectors"):
            assert theirs[:12] in str(refused.value)
        (copy / name).write_bytes(kept)
        _sign(copy)
    bundles.load(copy)


def test_ids_of_another_bundle_are_refused(copy: Path, plain: Any) -> None:
    shutil.copy(plain.bundle / "item_ids.parquet", copy / "item_ids.parquet")
    _sign(copy)
    with pytest.raises(BundleError, match=r"has \d+ items, but its manifest says \d+"):
        bundles.load(copy)


def test_a_graph_index_comes_back_and_one_of_other_vectors_is_refused(
    build: Callable[..., Any], market_run: str, tmp_path: Path
) -> None:
    graph = '[index]\nkind = "hnsw"\n'
    one = build(f"seed = 1\n{market_run}{graph}", tmp_path / "one").bundle
    two = build(f"seed = 2\n{market_run}{graph}", tmp_path / "two").bundle
    loaded = bundles.load(one)
    assert isinstance(loaded.index, HnswIndex)
    said = _said(one)["index"]
    assert said["kind"] == "hnsw" and 0.9 <= said["recall"] <= 1
    assert said["recall_k"] == len(loaded.rows)
    recommender = Recommender(loaded)
    asked = recommender.queries(np.arange(1, 20))
    exact = recommender.recommend_rows(asked, 5, exact=True)[0]
    np.testing.assert_array_equal(recommender.recommend_rows(asked, 5)[0], exact)
    for name in ("index.bin", "index.bin.json"):
        shutil.copy(two / name, one / name)
    _sign(one)
    with pytest.raises(BundleError, match=r"index\.bin was built with vectors \w+.* have \w+"):
        bundles.load(one)


def test_a_save_that_fails_leaves_what_was_there(tiny: Any, copy: Path) -> None:
    bundle = bundles.load(tiny.bundle)

    class Full:
        def save(self, path: Path) -> None:
            raise OSError(28, "No space left on device")

    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    for path in (copy, copy.parent / "new"):
        with pytest.raises(OSError, match="No space"):
            bundles.save(bundle, path, rules=IndexRules(), encoder=Full())  # type: ignore[arg-type]
    assert [p.name for p in copy.parent.iterdir()] == ["bundle"]
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before


def test_a_folder_that_holds_something_else_is_never_replaced(tiny: Any, tmp_path: Path) -> None:
    bundle = bundles.load(tiny.bundle)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("love")
    with pytest.raises(BundleError, match="no bundle, and would be replaced"):
        bundles.save(bundle, tmp_path / "letters", rules=IndexRules())
    assert (tmp_path / "letters" / "dear.txt").read_text() == "love"
    (tmp_path / "empty").mkdir()
    bundles.save(bundle, tmp_path / "empty", rules=IndexRules())
    bundles.save(bundle, tmp_path / "empty", rules=IndexRules())  # a bundle may be
    bundles.load(tmp_path / "empty")


def test_all_files_are_as_readable_as_any_other_file(tiny: Any, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        saved = bundles.save(bundles.load(tiny.bundle), tmp_path / "b", rules=IndexRules())
    finally:
        os.umask(mask)
    modes = {f.name: oct(stat.S_IMODE(f.stat().st_mode)) for f in saved.rglob("*") if f.is_file()}
    assert set(modes.values()) == {"0o644"}, modes


def test_availability_by_hand() -> None:
    window = np.array([[-9, 9], [-9, 9], [5, 9], [-9, 5], [0, 0]])
    assert bundles.available(window, 4).tolist() == [False, True, False, True, False]
    assert bundles.available(window, 5).tolist() == [False, True, True, False, False]
    assert bundles.available(window, None).tolist() == [False, True, True, True, False]
