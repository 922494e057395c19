"""`recsys init`: what is drafted from a look at the files can be read as it stands."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from source_cases import write_ebnerd

from recsys.errors import DataError
from recsys.experiments import config
from recsys.experiments.config import loads
from recsys.experiments.wizard import comment, guess, toml
from recsys.features.readers.read import DataSource, read
from recsys.tables import Log


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def drafted(log: Path, items: Path | None = None) -> tuple[dict, Log]:
    """The parsed draft, and what it reads."""
    text = guess(log, items).text()
    loads(text)  # all of it can be read
    section = tomllib.loads(text)["data"]
    return section, read(DataSource(**section))


def test_event_rows_are_recognised_with_names_zone_and_item_table(tmp_path):
    log = write(
        tmp_path / "log.csv",
        "timestamp,eventType,contentId,personId,dwell\n"
        + "1465413032,VIEW,-34,u1,3\n" * 3
        + "1465413033,LIKE,12,u2,4\n1465413034,DISLIKE,12,u1,\n1465413035,IMPRESSION,12,u1,\n"
        + "1465413036,ODD ONE,12,u1,\n",
    )
    items = write(
        tmp_path / "items.csv",
        "id,name,description,brand,price,created_at\n"
        "-34,Tea,Green tea,Leaf,2.5,2024-01-01\n12,Rye,Rye bread,Oven,3,2024-01-02\n",
    )
    section, found = drafted(log, items)
    columns, catalog = section["columns"], section["catalog"]
    assert section["format"] == "events"
    assert (columns["user"], columns["item"]) == ("personId", "contentId")
    assert (columns["time"], columns["event"]) == ("timestamp", "eventType")
    assert columns["positive"] == {"VIEW": 1.0, "LIKE": 2.0}
    assert columns["shown_events"] == ["IMPRESSION"]
    assert columns["rejected"] == ["DISLIKE"]
    assert catalog["item"] == "id" and catalog["title"] == "name"
    assert catalog["text"] == ["name", "description"]
    assert catalog["categories"] == ["brand"] and catalog["numbers"] == ["price"]
    assert catalog["published"] == "created_at"
    assert found.notes == {"unknown_event": 1}
    text = guess(log, items).text()
    assert "VIEW (3)" in text and "Left out, for no list names them: ODD ONE" in text
    assert "numbers in s; the first rows are from 2016-06-08" in text


def test_ratings_are_recognised_with_thresholds(tmp_path):
    log = write(tmp_path / "r.csv", "uid,isbn,stars,date\nu,a,9,2024-01-01\nu,b,2,2024-01-02\n")
    section, found = drafted(log)
    assert section["columns"]["positive_from"] == 8.0
    assert section["columns"]["rejected_to"] == 4.0
    assert found.interactions.select("kind").collect()["kind"].to_list() == [0, 2]
    assert "times without a zone are taken as UTC" in guess(log).text()


def test_zeros_and_ones_of_clicks_are_event_names(tmp_path):
    log = write(tmp_path / "c.csv", "user_id,item_id,ts,click\nu,a,1,0\nu,b,2,1\n")
    section, _ = drafted(log)
    assert section["columns"]["positive"] == {"1": 1.0}
    assert section["columns"]["shown_events"] == ["0"]


def test_the_log_of_the_simulated_shop_is_recognised(tmp_path):
    log, items = tmp_path / "impressions.parquet", tmp_path / "items.parquet"
    pl.DataFrame(
        {
            "request": [1, 2],
            "user": ["u1", "u2"],
            "time": [1_700_000_000_000_000, 1_700_000_100_000_000],
            "shown": [["a", "b"], ["b"]],
            "clicked": [["a"], []],
            "position": [[1, 2], [1]],
        }
    ).write_parquet(log)
    pl.DataFrame(
        {
            "item": ["a", "b"],
            "title": ["Red mug", "Blue mug"],
            "description": ["A mug", "Another"],
            "category": ["mug", "mug"],
            "price": [1.0, 2.0],
            "published": [1_690_000_000_000_000] * 2,
        }
    ).write_parquet(items)
    section, found = drafted(log, items)
    assert section["format"] == "impressions"
    assert section["columns"]["position"] == "position"
    assert section["catalog"]["text"] == ["title", "description"]
    assert section["catalog"]["categories"] == ["category"]
    assert section["catalog"]["numbers"] == ["price"]
    assert section["catalog"]["published"] == "published"
    assert found.impressions.select(pl.len()).collect().item() == 2


def test_sequences_are_recognised_as_lines_and_as_lists(tmp_path):
    section, found = drafted(write(tmp_path / "s.tsv", "1\t5 6 7\n2\t5 8\n"))
    assert section == {"format": "sequences", "log": str(tmp_path / "s.tsv")}
    assert not found.timed
    path = tmp_path / "s.parquet"
    pl.DataFrame({"user_id": ["u", "v"], "history": [["a", "b"], ["c"]]}).write_parquet(path)
    section, _ = drafted(path)
    assert section["format"] == "sequences"
    assert section["columns"] == {"user": "user_id", "items": "history"}


def test_the_item_column_is_the_one_that_holds_the_ids_of_the_log(tmp_path):
    log = write(tmp_path / "s.txt", "u 901 902 903\nv 903\n")
    items = write(tmp_path / "i.csv", "item_id,asin,title\n1,901,x\n2,902,y\n3,903,z\n")
    section, _ = drafted(log, items)
    assert section["catalog"]["item"] == "asin"


def test_repeated_items_several_categories_and_vectors_are_noticed(tmp_path):
    log = write(tmp_path / "l.csv", "user,item,time\nu,a,1\nu,b,2\n")
    items = tmp_path / "i.parquet"
    pl.DataFrame(
        {
            "item": ["a", "a", "b"],
            "genres": ["x,y", "x", "y"],
            "emb": [[0.5, 1.0]] * 3,
            "available": [True, True, False],
        }
    ).write_parquet(items)
    section, found = drafted(log, items)
    assert section["catalog"]["category_separator"] == ","
    assert section["catalog"]["vector"] == "emb"
    assert section["catalog"]["available"] == "available"
    assert len(found.catalog.frame) == 2


def test_a_log_without_times_is_in_the_order_of_its_rows(tmp_path):
    section, found = drafted(write(tmp_path / "l.csv", "user,item\nu,a\nu,b\n"))
    assert section["columns"]["time"] == ""
    assert not found.timed
    assert 'kind = "leave_one_out"' in guess(tmp_path / "l.csv").text()


def test_a_log_without_users_says_which_column_is_missing(tmp_path):
    log = write(tmp_path / "l.csv", "timestamp,item_id,position,click\n2024-01-01,a,1,1\n")
    assert "MISSING: no column looks like a user" in guess(log).text()
    with pytest.raises(DataError, match=r"no column 'user', which data\.columns\.user names"):
        drafted(log)


def test_public_formats_are_recognised(tmp_path):
    ratings = "userId,movieId,rating,timestamp\n1,1,4.0,9\n"
    folder = write(tmp_path / "ml" / "ratings.csv", ratings).parent
    assert drafted(folder)[0]["format"] == "movielens"
    assert drafted(folder / "ratings.csv")[0]["format"] == "movielens"
    for name, text in (("ratings.dat", "1::1::4::9\n"), ("u.data", "1\t1\t4\t9\n")):
        assert drafted(write(tmp_path / name, text))[0]["format"] == "movielens"
    mind = write(tmp_path / "m" / "behaviors.tsv", "1\tU1\t11/12/2019 2:14:46 PM\tN5\tN1-0 N2-1\n")
    assert drafted(mind)[0]["format"] == drafted(mind.parent)[0]["format"] == "mind"


def test_the_published_split_of_adjacency_lists_is_taken(tmp_path):
    train = write(tmp_path / "train.txt", "0 1 2\n1 2\n")
    assert drafted(train)[0] == {"format": "lightgcn", "log": str(train)}
    write(tmp_path / "test.txt", "0 3\n")
    section, found = drafted(train)
    assert section == {
        "format": "lightgcn", "train": str(train), "test": str(tmp_path / "test.txt"),
    }  # fmt: skip
    assert found.given_split
    assert drafted(tmp_path)[0] == section


def test_ebnerd_is_recognised_by_its_columns(tmp_path):
    write_ebnerd(tmp_path)
    for path in (tmp_path, tmp_path / "behaviors.parquet"):
        section, found = drafted(path)
        assert section["format"] == "ebnerd"
        assert section["columns"]["context_categories"] == ["device_type"]
        assert found.interactions.select(pl.len()).collect().item() == 4


def test_an_archive_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match="Unpack it"):
        guess(write(tmp_path / "log.csv.zip", "PK"))


@pytest.mark.parametrize(
    "value",
    ['a "quoted" \\ path', "tab\tand\nline", "é€\x7f", 3, 0.5, True, ["a", 1], {"a b": 1.0}],
)
def test_values_come_back_from_toml_as_they_were(value):
    assert tomllib.loads(f"x = {toml(value)}  # {comment(str(value))}")["x"] == value


@pytest.mark.parametrize(
    ("log", "items", "form"),
    [
        ("ebnerd_demo_week1", None, "ebnerd"),
        ("ebnerd_demo_week1/behaviors.parquet", None, "ebnerd"),
        (
            "microlens-50k/MicroLens-50k_pairs.tsv",
            "microlens-50k/MicroLens-50k_titles.csv",
            "sequences",
        ),
        ("gowalla/train_without_valid.txt", None, "lightgcn"),
        ("amazon-beauty/sequences_s3rec.txt", None, "sequences"),
        ("amazon-beauty/user_sequence_asin.txt", None, "sequences"),
        ("ml-latest-small", None, "movielens"),
        ("ml-latest-small/ratings.csv", "ml-latest-small/movies.csv", "movielens"),
        (
            "mind-sample/behaviors_train_sample5000.tsv",
            "mind-sample/news_sample2000.tsv",
            "mind",
        ),
    ],
)
def test_drafts_of_real_logs_can_be_read(real_data, log, items, form):
    folder = real_data(log.split("/")[0]).parent
    section, found = drafted(folder / log, None if items is None else folder / items)
    assert section["format"] == form
    assert found.interactions.select(pl.len()).collect().item() > 10_000
    assert (found.catalog is not None) == (items is not None or log == "ml-latest-small")


def test_real_logs_that_cannot_be_read_say_why(real_data):
    with pytest.raises(DataError, match="Unpack it"):
        guess(real_data("deskdrop") / "users_interactions.csv.zip")
    log = real_data("obd-sample") / "men" / "men.csv"
    assert "MISSING: no column looks like a user" in guess(log).text()
    with pytest.raises(DataError, match="no column 'user'"):
        drafted(log)


def test_init_prints_what_it_guessed_and_a_next_command_that_can_be_pasted(
    recsys: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    log = tmp_path / "our shop.csv"
    log.write_text("user_id,product,ts\nu1,a,1700000000\nu1,b,1700000500\nu2,a,1700000900\n")
    run = tmp_path / "deep folder" / "run.toml"
    run.parent.mkdir()
    ended = recsys("init", log, "--out", run)
    assert ended.code == 0 and f"recsys train '{run}'" in ended.out
    assert "data.columns.item" in ended.out and "product" in ended.out
    text = run.read_text()
    assert 'name = "our_shop"' in text and "# epochs = 30" in text and "[index]" in text
    assert config.load(run).data.columns.item == "product"


def test_init_ends_with_2_where_something_needed_is_missing(
    recsys: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,what,ts\nu1,a,1700000000\nu2,b,1700000900\n")
    run = tmp_path / "run.toml"
    ended = recsys("init", log, "--out", run)
    assert ended.code == 2 and run.exists()
    assert "data.columns.item: no column looks like an item" in ended.err
