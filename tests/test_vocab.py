"""Ids to rows and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.vocab import Vocab

IDS = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), unique=True, max_size=12
)


def test_three_ids_by_hand() -> None:
    vocab = Vocab(["b", "a", "c"])
    assert vocab.size == 4
    assert vocab.encode(["a", "b", "?", "c", "a"]).tolist() == [2, 1, 0, 3, 2]
    assert vocab.decode([3, 0, 1, -1]).to_list() == ["c", None, "b", None]


@given(IDS, st.data())
def test_encoding_is_a_dictionary_with_zero_for_the_unknown(
    ids: list[str], data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.one_of(st.text(max_size=4), st.sampled_from([*ids, "x"]))))
    rows = Vocab(ids).encode(pl.Series(asked, dtype=pl.String))
    known = {name: row for row, name in enumerate(ids, 1)}
    assert rows.dtype == np.int32
    assert rows.tolist() == [known.get(name, 0) for name in asked]


@given(IDS)
def test_decoding_undoes_encoding(ids: list[str]) -> None:
    vocab = Vocab(ids)
    assert vocab.decode(vocab.encode(ids)).to_list() == ids
    assert vocab.encode(vocab.decode(np.arange(vocab.size))).tolist() == list(range(vocab.size))


def test_null_is_unknown_and_no_id() -> None:
    assert Vocab(["None", "a"]).encode(pl.Series([None, "a"], dtype=pl.String)).tolist() == [0, 2]
    assert Vocab(["None", "a"]).encode([None, "a"]).tolist() == [0, 2]


def test_numbers_and_categories_are_asked_for_by_their_text() -> None:
    vocab = Vocab(["7", "12"])
    assert vocab.encode(pl.Series([12, 7, 3])).tolist() == [2, 1, 0]
    assert vocab.encode([12, np.int64(7)]).tolist() == [2, 1]
    assert vocab.encode(pl.Series(["12", "7"], dtype=pl.Categorical)).tolist() == [2, 1]


def test_an_empty_vocabulary_knows_nothing() -> None:
    vocab = Vocab([])
    assert vocab.size == 1
    assert vocab.encode(["a"]).tolist() == [0]
    assert vocab.decode([0, 0]).to_list() == [None, None]
    assert Vocab(["a"]).encode([]).tolist() == []


def test_a_row_beyond_the_vocabulary_is_an_error_and_no_other_id() -> None:
    with pytest.raises((IndexError, pl.exceptions.OutOfBoundsError)):
        Vocab(["a", "b"]).decode([3])


@pytest.mark.parametrize("ids", [["a", ""], ["a", None]])
def test_a_null_or_empty_id_is_refused(ids: list) -> None:
    with pytest.raises(DataError, match="null or empty"):
        Vocab(pl.Series(ids, dtype=pl.String))


def test_an_id_that_stands_twice_is_named() -> None:
    with pytest.raises(DataError, match="'b' stands twice"):
        Vocab(["a", "b", "c", "b"])


def test_new_ids_come_after_the_old_rows() -> None:
    vocab = Vocab(["a", "b"]).extended(["c", "a", "d"])
    assert vocab.ids.to_list() == ["a", "b", "c", "d"]
    assert Vocab([]).extended(["a"]).ids.to_list() == ["a"]
    assert Vocab(["a"]).extended([]).ids.to_list() == ["a"]


def test_the_digest_tells_order_and_boundaries_apart() -> None:
    lists = [[], ["ab"], ["a", "b"], ["b", "a"], ["a", "bc"], ["ab", "c"], ["é"], ["e"]]
    assert len({Vocab(ids).digest for ids in lists}) == len(lists)
    assert Vocab(["a", "b"]).digest == Vocab(pl.Series(["a", "b"])).digest


@given(IDS)
def test_a_saved_vocabulary_is_loaded_as_it_was(ids: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.parquet"
        Vocab(ids).save(path)
        again = Vocab.load(path)
    assert again.ids.to_list() == ids and again.digest == Vocab(ids).digest


def test_a_file_that_is_no_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no vocabulary .*none\.parquet"):
        Vocab.load(tmp_path / "none.parquet")
    pl.DataFrame({"other": ["a"]}).write_parquet(tmp_path / "o.parquet")
    with pytest.raises(DataError, match="no column 'id'"):
        Vocab.load(tmp_path / "o.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        Vocab.load(tmp_path / "bad.parquet")
