"""Logs in the forms in which public data sets come, and the data sets themselves."""

from __future__ import annotations

from datetime import datetime

import polars as pl
import pytest
from source_cases import requests, rows, write, write_ebnerd

from recsys.features.readers.read import DataSource, read
from recsys.tables import Kind, Log

SECOND = 1_000_000
POSITIVE, SHOWN, REJECTED = (int(kind) for kind in (Kind.POSITIVE, Kind.SHOWN, Kind.REJECTED))


# ------------------------------------------------------------------ public formats


NOON = int(datetime.fromisoformat("2023-05-21T12:00:00+00:00").timestamp()) * SECOND
DAY = 86_400 * SECOND


def test_ebnerd_is_history_then_clicks_and_its_articles(tmp_path):
    write_ebnerd(tmp_path)
    pl.DataFrame(
        {
            "article_id": [9, 10],
            "title": ["Nine", "Ten"],
            "subtitle": ["", "x"],
            "published_time": [datetime(2023, 5, 1)] * 2,
            "category_str": ["news", "sport"],
        }
    ).write_parquet(tmp_path / "articles.parquet")
    log = read(
        DataSource(
            format="ebnerd", log=str(tmp_path), columns={"context_categories": ["device_type"]}
        )
    )
    assert rows(log, "user", "item", "time", "request", "context.device_type") == [
        ("7", "9", NOON - 2 * DAY, None, None),
        ("7", "10", NOON - DAY, None, None),
        ("7", "11", NOON, 0, "2"),
        ("8", "12", NOON + 3_600 * SECOND, 1, "1"),
    ]
    assert requests(log, "shown", "clicked") == [(["10", "11"], ["11"]), (["12"], ["12"])]
    schema = log.catalog.schema
    assert (schema.title, schema.text) == ("title", ("title", "subtitle"))
    assert (schema.categories, schema.published) == (("category_str",), "published_time")
    assert log.catalog.frame["item"].to_list() == ["9", "10"]
    assert log.notes == {
        "clicks_from_history": 2, "events_on_unknown_items": 2, "shown_unknown_items": 2,
    }  # fmt: skip
    assert len(log.sources) == 3


def test_ebnerd_without_its_history_and_with_bounces(tmp_path):
    write_ebnerd(tmp_path)
    source = {"format": "ebnerd", "log": str(tmp_path / "behaviors.parquet")}
    history = tmp_path / "history.parquet"
    history.rename(tmp_path / "elsewhere.parquet")
    assert rows(read(DataSource(**source)), "item") == [("11",), ("12",)]
    (tmp_path / "elsewhere.parquet").rename(history)
    bounced = read(DataSource(**source, columns={"short_dwell": 5.0}))
    assert rows(bounced, "item", "kind") == [
        ("9", REJECTED), ("10", POSITIVE), ("11", REJECTED), ("12", POSITIVE),
    ]  # fmt: skip


def test_the_history_of_a_given_ebnerd_split_is_that_of_the_training_side(tmp_path):
    write_ebnerd(tmp_path / "train")
    write_ebnerd(tmp_path / "validation", first=1)
    log = read(
        DataSource(
            format="ebnerd", train=str(tmp_path / "train"), test=str(tmp_path / "validation")
        )
    )
    assert rows(log, "item", "side", "request") == [
        ("9", 0, None), ("10", 0, None), ("11", 0, 0), ("12", 0, 1), ("11", 2, 2), ("12", 2, 3),
    ]  # fmt: skip


def test_a_configuration_written_out_in_full_still_takes_the_format_s_columns(tmp_path):
    write_ebnerd(tmp_path)
    source = DataSource(format="ebnerd", log=str(tmp_path))
    again = DataSource.model_validate(source.model_dump())
    assert rows(read(again), "item") == rows(read(source), "item")


BEHAVIORS = (
    "1\tU1\t11/12/2019 2:14:46 PM\tN5 N3\tN1-0 N2-1\n"
    "2\tU1\t11/12/2019 2:14:40 PM\tN5 N3\tN4-1 N1-0\n"
    "3\tU2\t11/12/2019 11:00:00 AM\t\tN2-1\n"
)
MORNING = int(datetime.fromisoformat("2019-11-12T11:00:00+00:00").timestamp()) * SECOND
AFTERNOON = int(datetime.fromisoformat("2019-11-12T14:14:40+00:00").timestamp()) * SECOND


def test_mind_is_history_before_the_whole_log_and_no_positions(tmp_path):
    write(tmp_path / "behaviors.tsv", BEHAVIORS)
    write(
        tmp_path / "news.tsv",
        'N1\tnews\tus\tA "quoted\tText\turl\t[]\t[]\nN2\ta\tb\tT\t\tu\t[]\t[]\n',
    )
    log = read(DataSource(format="mind", log=str(tmp_path)))
    history = log.interactions.filter(pl.col("request").is_null()).sort("time")
    assert history.select("user", "item", "time").collect().rows() == [
        ("U1", "N5", MORNING - 2), ("U1", "N3", MORNING - 1),
    ]  # fmt: skip
    clicks = log.interactions.filter(pl.col("request").is_not_null()).sort("row")
    assert clicks.select("user", "item", "time", "request").collect().rows() == [
        ("U1", "N2", AFTERNOON + 6 * SECOND, 0),
        ("U1", "N4", AFTERNOON, 1),
        ("U2", "N2", AFTERNOON - (3 * 3600 + 14 * 60 + 40) * SECOND, 2),
    ]
    assert requests(log, "shown", "clicked") == [
        (["N1", "N2"], ["N2"]), (["N4", "N1"], ["N4"]), (["N2"], ["N2"]),
    ]  # fmt: skip
    assert "position" not in log.impressions.collect_schema()
    assert log.catalog.frame.rows()[0][:2] == ("N1", 'A "quoted')
    assert log.catalog.schema.categories == ("category", "subcategory")
    assert log.notes["clicks_from_history"] == 2


def movies(log: Log) -> list[tuple]:
    return log.catalog.frame.select("item", "title", "genres", "year").rows()


MOVIES = [("1", "Toy Story (1995)", "Animation|Comedy", 1995.0), ("2", "Amélie", None, None)]
RATED = [("1", "1", POSITIVE, 964982703 * SECOND), ("1", "2", REJECTED, 964981247 * SECOND)]


def test_movielens_csv(tmp_path):
    write(
        tmp_path / "ratings.csv",
        "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,2,2.0,964981247\n1,3,3.0,9\n",
    )
    write(
        tmp_path / "movies.csv",
        "movieId,title,genres\n1,Toy Story (1995),Animation|Comedy\n2,Amélie,(no genres listed)\n",
    )
    log = read(DataSource(format="movielens", log=str(tmp_path)))
    assert rows(log, "user", "item", "kind", "time") == RATED
    assert movies(log) == MOVIES
    assert log.notes["value_between"] == 1
    file = str(tmp_path / "ratings.csv")
    every = read(DataSource(format="movielens", log=file, columns={"positive_from": 3.0}))
    assert rows(every, "item", "kind") == [("1", POSITIVE), ("2", REJECTED), ("3", POSITIVE)]
    assert every.catalog is None


def test_movielens_1m_with_double_colons_and_latin_1(tmp_path):
    write(tmp_path / "ratings.dat", "1::1::4::964982703\n1::2::2::964981247\n")
    write(
        tmp_path / "movies.dat", "1::Toy Story (1995)::Animation|Comedy\n2::Amélie::\n", "latin-1"
    )
    log = read(DataSource(format="movielens", log=str(tmp_path)))
    assert rows(log, "user", "item", "kind", "time") == RATED
    assert movies(log) == MOVIES


def test_movielens_100k_with_flags(tmp_path):
    write(tmp_path / "u.data", "1\t1\t4\t964982703\n1\t2\t2\t964981247\n")
    flags = ["0"] * 19
    flags[3] = flags[5] = "1"
    write(
        tmp_path / "u.item",
        f"1|Toy Story (1995)|01-Jan-1995||url|{'|'.join(flags)}\n"
        f"2|Amélie|||url|{'|'.join('0' * 19)}\n",
        "latin-1",
    )
    log = read(DataSource(format="movielens", log=str(tmp_path)))
    assert rows(log, "user", "item", "kind", "time") == RATED
    assert movies(log) == MOVIES


# ------------------------------------------------------------------ real files


@pytest.mark.parametrize(
    ("source", "interactions", "impressions"),
    [
        ({"format": "ebnerd", "log": "ebnerd_demo_week1"}, 283_206, 24_724),
        ({"format": "sequences", "log": "microlens-50k/MicroLens-50k_pairs.tsv"}, 359_708, None),
        ({"format": "movielens", "log": "ml-latest-small"}, 62_103, None),
        ({"format": "mind", "log": "mind-sample/behaviors_train_sample5000.tsv"}, 146_474, 5_000),
        ({"format": "sequences", "log": "amazon-beauty/sequences_s3rec.txt"}, 198_502, None),
        (
            {
                "format": "lightgcn",
                "train": "gowalla/train_without_valid.txt",
                "valid": "gowalla/valid.txt",
                "test": "gowalla/test.txt",
            },
            1_027_370,
            None,
        ),
    ],
    ids=["ebnerd", "microlens", "movielens", "mind", "beauty", "gowalla"],
)
def test_real_logs_have_as_many_rows_as_they_had(real_data, source, interactions, impressions):
    paths = {key: str(real_data(value)) for key, value in source.items() if key != "format"}
    log = read(DataSource(format=source["format"], **paths))
    frame = log.interactions.collect(engine="streaming")
    assert len(frame) == interactions
    assert frame["row"].n_unique() == interactions
    assert frame.null_count().select("user", "item", "time", "weight", "kind").row(0) == (0,) * 5
    if impressions is not None:
        assert log.impressions.select(pl.len()).collect().item() == impressions
