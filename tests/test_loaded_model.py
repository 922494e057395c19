"""A bundle made ready: ids to rows and to JSON, fields as JSON takes them."""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import BundleError, QueryError
from recsys.serving import bundle as bundles
from recsys.serving import id_table
from recsys.serving.engine.loaded_model import LoadedModel, give_back, json_rows
from recsys.serving.id_table import IdTable
from recsys.serving.manifest import read_manifest
from recsys.serving.recommender import Recommender

NASTY = ["b", "a", 'say "x"', "back\\slash", "é\n", "\x7f", "\u2028", "日本語", "\x00", "b ", "𝄞"]
IDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), unique=True)


@pytest.fixture(scope="module")
def served(tiny: Any) -> LoadedModel:
    return LoadedModel.load(tiny.bundle)


def test_awkward_ids_by_hand() -> None:
    table = IdTable.of(pl.Series(NASTY))
    assert [table.row_of(name) for name in NASTY] == list(range(1, len(NASTY) + 1))
    assert [table.row_of(name) for name in ("c", "", "ab", "b  ", "\ud800")] == [0] * 5
    assert [json.loads(table.fragment(row)) for row in range(1, len(NASTY) + 1)] == NASTY
    assert table.fragment(1) == b'"b"' and table.fragment(0) == b"null"
    assert table.decode([3, 3, 1]) == ['say "x"', 'say "x"', "b"]


@given(IDS, st.lists(st.text(max_size=4)))
def test_the_table_is_a_dictionary_with_zero_for_the_unknown(
    ids: list[str], asked: list[str]
) -> None:
    table = IdTable.of(pl.Series(ids, dtype=pl.String))
    known = {name: row for row, name in enumerate(ids, 1)}
    for name in [*ids, *asked]:
        assert table.row_of(name) == known.get(name, 0)
    assert [json.loads(f) for f in table.fragments(range(1, len(ids) + 1))] == ids


def test_ids_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for same in (0, 2**32 - 1):  # all in one slot, the last one before the table's end too
        monkeypatch.setattr(id_table, "crc32", lambda _, same=same: same)
        names = [f"i{i}" for i in range(50)]
        table = IdTable.of(pl.Series(names))
        assert [table.row_of(name) for name in names] == list(range(1, 51))
        assert table.row_of("i50") == 0


@given(IDS)
def test_a_table_that_was_written_reads_as_it_was(ids: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ids"
        IdTable.of(pl.Series(ids, dtype=pl.String)).save(path)
        table = IdTable.load(path, len(ids))
    assert [table.row_of(name) for name in ids] == list(range(1, len(ids) + 1))
    assert table.row_of("\ud800") == 0 and table.decode(range(1, len(ids) + 1)) == ids


def test_a_table_of_other_ids_is_refused(tmp_path: Path) -> None:
    IdTable.of(pl.Series(NASTY)).save(tmp_path / "ids")
    with pytest.raises(BundleError, match=rf"has {len(NASTY)} ids, but there are 3"):
        IdTable.load(tmp_path / "ids", 3)


def test_a_bundle_without_tables_of_ids_answers_alike(tiny: Any, tmp_path: Path) -> None:
    """Bundles made before there were such files are read; what differs is the time it takes."""
    with_tables = LoadedModel.load(tiny.bundle)
    for name in (bundles.ITEM_IDS, bundles.USER_IDS):
        assert (tiny.bundle / name).is_file()
    bundle = with_tables.bundle
    without = LoadedModel(bundle, with_tables.neighbours)
    rows = range(1, bundle.items.size)
    assert [without.row_of(id) for id in bundle.items.ids] == list(rows)
    assert without.ids.fragments(rows) == with_tables.ids.fragments(rows)
    assert [with_tables.user_ids.row_of(id) for id in bundle.users.ids] == list(
        range(1, bundle.users.size)
    )


def test_what_is_given_back_is_there_again(tmp_path: Path) -> None:
    """Of a file it is read again; any other memory is left alone, for it would come as zeros."""
    rng = np.random.default_rng(0)
    values = rng.random((300, 64), np.float32)
    np.save(tmp_path / "a.npy", values)
    of_a_file = np.load(tmp_path / "a.npy", mmap_mode="r")
    in_memory = rng.random((100_000, 64), np.float32)
    before = in_memory.copy()
    give_back(of_a_file, in_memory, in_memory[:0])
    np.testing.assert_array_equal(of_a_file, values)
    np.testing.assert_array_equal(in_memory, before)


def test_what_a_start_reads_as_a_whole_is_given_back_and_the_narrow_table_is_not(
    served: LoadedModel,
) -> None:
    bundle, table = served.bundle, served.neighbours
    assert table is not None and table.first is not None
    seldom = {id(array) for array in served.seldom_read()}
    assert {id(a) for a in (bundle.vectors, bundle.window, table.rows, table.scores)} <= seldom
    assert not {id(a) for a in (bundle.rows, table.first.rows, table.first.scores)} & seldom
    alone = LoadedModel(bundle, table.first).seldom_read()
    assert id(table.first.rows) not in {id(array) for array in alone}


def test_what_is_ready_is_what_the_bundle_says(served: LoadedModel, tiny: Any) -> None:
    bundle = served.bundle
    rows = np.arange(1, bundle.items.size)
    assert [served.row_of(name) for name in bundle.items.ids] == rows.tolist()
    assert [json.loads(served.ids.fragment(r)) for r in rows] == bundle.items.ids.to_list()
    assert served.position.dtype == np.int32 and served.position[0] == -1
    assert served.position[bundle.rows].tolist() == list(range(len(bundle.rows)))
    assert (served.position >= 0).sum() == len(bundle.rows)
    assert served.version == read_manifest(tiny.bundle)["content"][:12]
    assert served.neighbours is not None
    assert LoadedModel(bundle, None, version="mine").version == "mine"


def test_fields_are_those_of_the_catalogue(served: LoadedModel) -> None:
    assert served.field_names == ["title", "category", "price"]
    rows = np.array([5, 2, 5])
    said = served.fields(rows)
    assert said == [
        {k: v for k, v in served.bundle.catalog.row(r - 1, named=True).items() if k != "item"}
        for r in rows
    ]
    assert served.fields(rows, ["price"]) == [{"price": one["price"]} for one in said]
    assert served.fields(rows, []) == [{}, {}, {}]
    assert served.fields(np.array([], np.int64)) == []
    with pytest.raises(
        QueryError, match=r"no field 'colour'. Known fields: title, category, price"
    ):
        served.fields(rows, ["colour"])
    with pytest.raises(QueryError, match="no field 'item'"):
        served.fields(rows, ["item"])


def test_every_kind_of_field_becomes_json() -> None:
    frame = pl.DataFrame(
        {
            "number": [1.5, float("nan"), float("inf"), None],
            "small": pl.Series([1.5, float("-inf"), 0.0, None], dtype=pl.Float32),
            "whole": [1, 2**60, -1, None],
            "yes": [True, False, None, True],
            "day": [date(2024, 2, 29), None, None, None],
            "moment": [datetime(2024, 2, 29, 12, 30, 0, 250000), None, None, None],
            "hour": [time(12, 30), None, None, None],
            "lasts": [timedelta(minutes=1), None, None, None],
            "money": pl.Series([Decimal("1.25"), None, None, None], dtype=pl.Decimal(10, 2)),
            "kind": pl.Series(["a", "b", None, "a"], dtype=pl.Categorical),
            "many": [[1.0, float("nan")], [], None, None],
            "of": [{"x": float("nan"), "y": [date(2024, 1, 1)]}] * 4,
            "bytes": [b"\x00\xff", None, None, None],
        }
    )
    rows = json_rows(frame)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0] == {
        "number": 1.5,
        "small": 1.5,
        "whole": 1,
        "yes": True,
        "day": "2024-02-29",
        "moment": "2024-02-29T12:30:00.250000",
        "hour": "12:30:00",
        "lasts": 60.0,
        "money": 1.25,
        "kind": "a",
        "many": [1.0, None],
        "of": {"x": None, "y": ["2024-01-01"]},
        "bytes": "00ff",
    }
    assert rows[1]["number"] is rows[2]["number"] is rows[1]["small"] is None


def test_an_unverified_load_reads_no_digest_and_a_verified_one_refuses(
    tiny: Any, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    table = copy / "neighbours.scores.npy"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"neighbours\.scores\.npy has the SHA-256"):
        LoadedModel.load(copy)
    assert Recommender(LoadedModel.load(copy, verify=False)).similar(item="i00001", k=3).ids


def test_a_bundle_is_read_without_drawing_weights_or_copying_vectors(tiny: Any) -> None:
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    with bundles._Unfilled():
        torch.nn.Embedding(50, 4)
        torch.nn.Linear(4, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.nn.Linear(4, 4).weight.abs().sum() > 0  # outside all is as ever
    one, two = bundles.load(tiny.bundle), bundles.load(tiny.bundle)
    assert isinstance(one.model.item_tower.inputs.ids.weight, torch.nn.Parameter)
    again = two.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
    assert not one.vectors.flags.owndata and not one.model.training
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert f"{tiny.bundle}/vectors.safetensors" in maps.read_text()
        assert f"{tiny.bundle}/towers.safetensors" in maps.read_text()
