"""Reading logs: what is read, what is refused, and that a refusal names the place."""

from __future__ import annotations

import gzip
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest

from recsys.errors import ConfigError, DataError
from recsys.features.readers.read import DataSource, read, scan
from recsys.features.readers.times import clock
from recsys.tables import Kind, Log, Schema

SECOND = 1_000_000


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def events(log: Path | str, **columns) -> Log:
    return read(DataSource(log=str(log), columns=Schema(**columns)))


def rows(log: Log) -> list[dict]:
    return log.interactions.sort("row").collect().to_dicts()


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.csv.gz", "a.ndjson", "a.jsonl.gz", "a.parquet"]
)
def test_every_form_reads_alike_and_007_stays_007(tmp_path, name):
    frame = pl.DataFrame({"user": ["007", "u2"], "item": ["01", "2"], "time": [10, 20]})
    path = tmp_path / name
    mark = "\t" if ".tsv" in name else ","
    if "parquet" in name:
        frame.write_parquet(path)
    else:
        text = frame.write_ndjson() if "js" in name else frame.write_csv(separator=mark)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = rows(events(path))
    assert [(r["user"], r["item"], r["time"]) for r in found] == [
        ("007", "01", 10 * SECOND),
        ("u2", "2", 20 * SECOND),
    ]


@pytest.mark.parametrize("name", ["a.csv.zst", "a.ndjson.zst"])
def test_zstd_is_read(tmp_path, name):
    frame = pl.DataFrame({"user": ["a"], "item": ["b"], "time": [1]})
    save = frame.write_csv if "csv" in name else frame.write_ndjson
    save(tmp_path / name, compression="zstd")
    assert len(rows(events(tmp_path / name))) == 1


def test_the_frame_has_the_canonical_columns_and_types(tmp_path):
    log = events(write(tmp_path / "a.csv", "user,item,time\nu,i,5\n"))
    assert dict(log.interactions.collect_schema()) == {
        "row": pl.Int64,
        "user": pl.String,
        "item": pl.String,
        "time": pl.Int64,
        "weight": pl.Float32,
        "kind": pl.UInt8,
    }
    assert isinstance(log.interactions, pl.LazyFrame)
    assert log.timed and not log.given_split and log.impressions is None


def test_integer_and_float_ids_of_parquet_are_written_without_a_point(tmp_path):
    frame = pl.DataFrame({"user": [7, 8], "item": [12.0, 3.5], "time": [1, 2]})
    frame.write_parquet(tmp_path / "a.parquet")
    assert [(r["user"], r["item"]) for r in rows(events(tmp_path / "a.parquet"))] == [
        ("7", "12"),
        ("8", "3.5"),
    ]


def test_files_whose_ids_have_different_widths_are_read_together(tmp_path):
    for i, dtype in enumerate((pl.Int32, pl.UInt64, pl.String)):
        frame = pl.DataFrame(
            {"extra": [0.5] * i + [0.1], "user": [7] * (i + 1), "time": [1] * (i + 1)}
        )
        frame = frame.with_columns(item=pl.lit(3).cast(dtype)).drop("extra" if i else [])
        frame.write_parquet(tmp_path / f"{i}.parquet")
    assert [r["item"] for r in rows(events(tmp_path / "*.parquet"))] == ["3"] * 6


def test_rows_are_numbered_across_files_in_the_order_of_their_names(tmp_path):
    for day in (2, 1, 3):
        write(tmp_path / f"day{day}.csv", f"user,item,time\nu,i{day},{day}\nu,j{day},{day}\n")
    log = events(tmp_path / "day*.csv")
    assert [(r["row"], r["item"]) for r in rows(log)] == list(
        enumerate(["i1", "j1", "i2", "j2", "i3", "j3"])
    )
    assert [path.name for path in log.sources] == ["day1.csv", "day2.csv", "day3.csv"]


def test_hive_folders_become_columns(tmp_path):
    for event in ("click", "view"):
        frame = pl.DataFrame({"user": ["u"], "item": [event[0]], "time": [1]})
        (tmp_path / f"event={event}").mkdir()
        frame.write_parquet(tmp_path / f"event={event}" / "part.parquet")
    log = events(tmp_path, event="event", positive={"click": 2.0}, shown_events=("view",))
    assert [(r["item"], r["kind"], r["weight"]) for r in rows(log)] == [
        ("c", Kind.POSITIVE, 2.0),
        ("v", Kind.SHOWN, 1.0),
    ]


def test_scan_gives_the_rows_as_text_and_the_files(tmp_path):
    write(tmp_path / "a.csv", "x;y\n01;2\n")
    frame, files = scan(tmp_path / "a.csv")
    assert frame.collect().rows() == [("01", "2")]
    assert files == (tmp_path / "a.csv",)


@pytest.mark.parametrize(
    ("make", "path", "says"),
    [
        ({}, "no.csv", "no file"),
        ({"log.csv": "user,item,time\n"}, "lgo.csv", "Did you mean 'log.csv'"),
        ({}, "*.csv", "No file matches"),
        ({"a.zip": "PK"}, "a.zip", "Unpack it"),
        ({"a.xlsx": ""}, "a.xlsx", "known form"),
        ({"a.csv": ""}, "a.csv", "is empty"),
        ({"f/a.csv": "x", "f/b.parquet": "x"}, "f", "several forms"),
        ({"f/readme.md": "x"}, "f", "holds no file"),
        ({"a.parquet": "not parquet"}, "a.parquet", "cannot be read"),
        ({"a.csv": "user,item,time\na,b,1\nc,d,2,3,4\n"}, "a.csv", "cannot be read"),
        (
            {"a.ndjson": '{"user": "a", "item": "b", "time": 1}\n{"user": \n'},
            "a.ndjson",
            "a.ndjson",
        ),
        ({"a.csv": "user,item,time\n"}, "a.csv", "no positive"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, path, says):
    for name, text in make.items():
        write(tmp_path / name, text)
    with pytest.raises(DataError, match=says):
        events(tmp_path / path)


# ------------------------------------------------------------------ columns and ids


def test_a_missing_column_names_file_key_and_the_nearest_column(tmp_path):
    write(tmp_path / "a.csv", "user,item_id,time\nu,i,1\n")
    with pytest.raises(
        DataError, match=r"a\.csv has no column 'itemid'.*data\.columns\.item.*'item_id'"
    ):
        events(tmp_path / "a.csv", item="itemid")


def test_a_column_missing_in_the_second_file_names_the_second_file(tmp_path):
    write(tmp_path / "a.csv", "user,item,time\nu,i,1\n")
    write(tmp_path / "b.csv", "user,item\nu,i\n")
    with pytest.raises(DataError, match=r"b\.csv has no column 'time'"):
        events(tmp_path / "*.csv")


@pytest.mark.parametrize("empty", ["", '""'])
def test_null_and_empty_ids_name_file_row_column_and_count(tmp_path, empty):
    write(tmp_path / "a.csv", "user,item,time\nu,i,1\n")
    write(tmp_path / "b.csv", f"user,item,time\nu,i,1\nu,{empty},1\nu,{empty},1\n")
    with pytest.raises(
        DataError, match=r"b\.csv, row 2: column 'item' is a null or empty item id.*2 rows"
    ):
        events(tmp_path / "*.csv")


# ------------------------------------------------------------------ times

NOON = int(datetime(2024, 3, 1, 12, tzinfo=UTC).timestamp())


def told(values: pl.Series, **schema) -> list[int | None]:
    """Times of a column, without a file around it."""
    tells = clock("t", values.dtype, values.head(1000), Schema(**schema))
    frame = values.alias("t").to_frame()
    largest = frame.select(tells.largest).item()
    return frame.select(tells.microseconds(largest)).to_series().to_list()


@pytest.mark.parametrize(
    "value",
    [
        NOON,
        NOON * 1_000,
        NOON * 1_000_000,
        NOON * 1_000_000_000,
        float(NOON),
        str(NOON),
        f"{NOON}.0",
        "2024-03-01T12:00:00Z",
        "2024-03-01 12:00:00",
        "2024-03-01T12:00:00.000",
        "2024-03-01 12:00",
        "2024-03-01 12:00:00 UTC",
        "2024-03-01T14:00:00+02:00",
        "2024-03-01T14:00:00.000+0200",
        "2024-03-01 07:00:00-05",
        "3/1/2024 12:00:00 PM",
        datetime(2024, 3, 1, 12),
        datetime(2024, 3, 1, 12, tzinfo=UTC),
    ],
)
def test_every_way_of_writing_noon_is_the_same_microsecond(value):
    assert told(pl.Series([value])) == [NOON * SECOND]


def test_dates_and_clocks_of_other_precision_are_told():
    assert told(pl.Series([date(1970, 1, 2)])) == [86_400 * SECOND]
    for unit in ("ms", "us", "ns"):
        series = pl.Series([datetime(2024, 3, 1, 12)]).dt.cast_time_unit(unit)
        assert told(series) == [NOON * SECOND]
        paris = series.dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Paris")
        assert told(paris) == [NOON * SECOND]


def test_fractions_of_a_second_are_kept():
    assert told(pl.Series(["2024-03-01T12:00:00.25Z", "2024-03-01T12:00:00Z"])) == [
        NOON * SECOND + 250_000,
        NOON * SECOND,
    ]
    assert told(pl.Series([1.5, 2.0])) == [1_500_000, 2_000_000]


def test_a_time_without_a_zone_is_in_the_zone_of_the_schema():
    summer = pl.Series(["2024-07-01 14:00:00"])
    there = told(summer, time_zone="Europe/Copenhagen")
    assert there == told(pl.Series(["2024-07-01T12:00:00Z"]))
    assert told(pl.Series([datetime(2024, 7, 1, 14)]), time_zone="Europe/Copenhagen") == there


def test_the_unit_is_that_of_the_largest_number_and_can_be_said():
    assert told(pl.Series([5, NOON * 1_000])) == [5_000, NOON * SECOND]
    assert told(pl.Series([NOON]), time_unit="ms") == [NOON * 1_000]


def test_an_hour_that_the_clock_leaves_out_is_refused(tmp_path):
    write(tmp_path / "a.csv", "user,item,time\nu,i,2024-03-31 02:30:00\n")
    with pytest.raises(DataError, match="not a time in Europe/Copenhagen"):
        events(tmp_path / "a.csv", time_zone="Europe/Copenhagen")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("2024-03-01T12:00:00Z", "2024-03-01 12:00:00", r"row 2.*'2024-03-01 12:00:00'.*no zone"),
        ("2024-03-01 12:00:00", "2024-03-01T12:00:00+01:00", r"row 2.*has a zone"),
        ("2024-03-01", "yesterday", r"row 2: column 'time' holds 'yesterday'"),
        ("2024-03-01", "2024-13-01", r"row 2.*'2024-13-01'"),
        ("1700000000", "soon", r"row 2.*'soon'"),
        ("1700000000", "", r"row 2.*has no time"),
    ],
)
def test_a_time_that_cannot_be_told_names_row_and_value(tmp_path, first, second, says):
    # 1,000 rows are looked at beforehand: the odd one is told whether it is among them or not.
    for before in (1, 1_200):
        text = "user,item,time\n" + f"u,i,{first}\n" * before + f"u,i,{second}\n"
        write(tmp_path / "a.csv", text)
        with pytest.raises(DataError, match=says.replace("row 2", f"row {before + 1}")):
            events(tmp_path / "a.csv")


def test_a_format_that_first_shows_after_the_sample_is_read_all_the_same(tmp_path):
    text = "user,item,time\n" + "u,i,2024-03-01 12:00:00\n" * 1_500 + "u,i,2024-03-01 12:00:00.5\n"
    write(tmp_path / "a.csv", text)
    assert rows(events(tmp_path / "a.csv"))[-1]["time"] == NOON * SECOND + 500_000


def test_an_unknown_zone_or_unit_is_a_mistake_of_the_configuration(tmp_path):
    write(tmp_path / "a.csv", "user,item,time\nu,i,2024-03-01\n")
    with pytest.raises(ConfigError, match="Mars/Olympus"):
        events(tmp_path / "a.csv", time_zone="Mars/Olympus")
    with pytest.raises(ConfigError, match="time_unit"):
        events(tmp_path / "a.csv", time_unit="sec")


def test_without_a_time_column_the_position_within_the_user_stands_for_it(tmp_path):
    write(tmp_path / "a.csv", "user,item\nu,a\nv,b\nu,c\nu,d\nv,e\n")
    for none in (None, ""):
        log = events(tmp_path / "a.csv", time=none)
        assert [(r["item"], r["time"]) for r in rows(log)] == [
            ("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 1),
        ]  # fmt: skip
        assert not log.timed


# ------------------------------------------------------------------ item and user tables


def catalog(tmp_path, table, name="items.csv", log="user,item,time\nu,a,1\nu,zz,2\n", **more):
    write(tmp_path / "log.csv", log)
    if isinstance(table, pl.DataFrame):
        table.write_parquet(tmp_path / name)
    else:
        write(tmp_path / name, table)
    unknown = more.pop("unknown_items", "keep")
    source = DataSource(
        log=str(tmp_path / "log.csv"),
        items=str(tmp_path / name),
        catalog=more,
        unknown_items=unknown,
    )
    return read(source)


def test_an_item_table_keeps_its_columns_and_types_them(tmp_path):
    log = catalog(
        tmp_path,
        "sku,name,kind,price,out,on\n01,One,x|y,2.5,2024-03-01,true\n02,Two,,,,no\n",
        item="sku",
        title="name",
        categories=("kind",),
        numbers=("price",),
        published="out",
        available="on",
    )
    assert log.catalog.frame.to_dicts() == [
        {
            "item": "01",
            "name": "One",
            "kind": "x|y",
            "price": 2.5,
            "out": (NOON - 43_200) * SECOND,
            "on": True,
        },
        {"item": "02", "name": "Two", "kind": None, "price": None, "out": None, "on": False},
    ]


def test_events_on_unknown_items_are_counted_and_kept_or_dropped(tmp_path):
    kept = catalog(tmp_path, "item\na\nb\n")
    assert kept.notes == {"events_on_unknown_items": 1}
    assert [r["item"] for r in rows(kept)] == ["a", "zz"]
    dropped = catalog(tmp_path, "item\na\nb\n", unknown_items="drop")
    assert dropped.notes == {"events_on_unknown_items": 1}
    assert [r["item"] for r in rows(dropped)] == ["a"]


def test_lines_of_an_id_and_a_text_are_an_item_table_without_a_header(tmp_path):
    text = 'B01 lip "balm", 2 oz\n\nB02\tsoap;  white \nB03\n'
    log = catalog(
        tmp_path, text, "names.txt", header=False, item="sku", title="name", text=("name",)
    )
    assert log.catalog.frame.rows(named=True) == [
        {"item": "B01", "name": 'lip "balm", 2 oz'},
        {"item": "B02", "name": "soap;  white"},
        {"item": "B03", "name": None},
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "the columns of nothing"),
        ({"title": "name", "text": ("name", "story")}, "the columns name, story"),
        ({"title": "name", "numbers": ("price",)}, "the columns name, price"),
        ({"fields": ("colour",)}, "the columns colour"),
    ],
)
def test_lines_without_a_header_have_one_text(tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        catalog(tmp_path, "B01 soap\n", "names.txt", header=False, **more)


def test_of_an_item_that_stands_twice_the_first_row_is_kept_and_that_is_noted(tmp_path):
    log = catalog(tmp_path, "item,title\na,first\na,second\n", title="title")
    assert log.catalog.frame["title"].to_list() == ["first"]
    assert log.notes["item_rows_of_an_id_met_before"] == 1


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("item\na\n", {"title": "name"}, r"items\.csv has no column 'name'.*data\.catalog\.title"),
        ("item,p\na,1\nb,cheap\n", {"numbers": ("p",)}, r"items\.csv, row 2.*'p' holds 'cheap'"),
        ("item,t\na,x\n\n,y\n", {"title": "t"}, r"null or empty item id"),
        ("item,out\na,2024-01-01\nb,soon\n", {"published": "out"}, "'soon'"),
        ("item,on\na,maybe\n", {"available": "on"}, "'maybe'"),
    ],
)
def test_a_bad_item_table_names_the_place(tmp_path, text, more, says):
    with pytest.raises(DataError, match=says):
        catalog(tmp_path, text, **more)


def test_given_vectors_are_finite_and_of_one_length(tmp_path):
    good = pl.DataFrame({"item": ["a", "b", "c"], "v": [[1.0, 2.0], None, [3.0, 4.0]]})
    log = catalog(tmp_path, good, "i.parquet", vector="v")
    assert log.catalog.frame["v"].to_list() == [[1.0, 2.0], None, [3.0, 4.0]]
    for bad, says in (
        ([[1.0, 2.0], None, [3.0]], "'c'.* has 1 numbers, but others have 2"),
        ([[1.0, 2.0], None, [3.0, float("nan")]], "'c'.*not a finite"),
        ([[1.0, 2.0], [1.0, float("inf")], [3.0, 4.0]], "'b'.*not a finite"),
        ([[1.0, 2.0], [1.0, None], [3.0, 4.0]], "'b'.*not a finite"),
    ):
        frame = pl.DataFrame({"item": ["a", "b", "c"], "v": bad})
        # Of two lengths equally common the shorter is taken as the usual one.
        frame = pl.concat([frame, pl.DataFrame({"item": ["d"], "v": [[0.0, 0.0]]})])
        with pytest.raises(DataError, match=says):
            catalog(tmp_path, frame, "i.parquet", vector="v")
    text = catalog(tmp_path, 'item,v\na,"[1.0, 2.5]"\nb,3 4\n', vector="v")
    assert text.catalog.frame["v"].to_list() == [[1.0, 2.5], [3.0, 4.0]]


def test_a_user_table_is_read_and_checked(tmp_path):
    log = write(tmp_path / "log.csv", "user,item,time\n01,a,1\n")
    table = write(tmp_path / "users.csv", "id,age,city\n01,30,Aarhus\n02,,\n")
    source = {"log": str(log), "users": str(table)}
    keys = {"user": "id", "numbers": ("age",), "categories": ("city",)}
    read_ = read(DataSource(**source, user_table=keys))
    assert read_.users.sort("user").to_dicts() == [
        {"user": "01", "city": "Aarhus", "age": 30.0},
        {"user": "02", "city": None, "age": None},
    ]
    write(table, "id,age,city\n01,30,x\n01,31,y\n")
    again = read(DataSource(**source, user_table=keys))
    assert again.users["age"].to_list() == [30.0]
    assert again.notes["user_rows_of_an_id_met_before"] == 1


# ------------------------------------------------------------------ the configuration


def test_train_valid_and_test_files_say_the_side(tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path / f"{name}.csv", f"user,item,time\nu,{name},1\n")
    given = {name: str(tmp_path / f"{name}.csv") for name in ("train", "valid", "test")}
    log = read(DataSource(**given))
    assert log.given_split
    assert [(r["item"], r["side"]) for r in rows(log)] == [("train", 0), ("valid", 1), ("test", 2)]
    del given["valid"]
    assert [r["side"] for r in rows(read(DataSource(**given)))] == [0, 2]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "names no log"),
        ({"log": "a", "train": "b", "test": "c"}, "both log and train"),
        ({"train": "b"}, "names no log"),
        ({"log": "a", "format": "evnts"}, "'events'"),
        ({"log": "a", "unknown_items": "lose"}, "unknown_items"),
        ({"log": "a", "columns": {"value": "v", "positive_from": 2.0, "rejected_to": 3.0}}, "both"),
        ({"log": "a", "columns": {"event": "e", "positive": {"x": 1}, "rejected": ("x",)}}, "'x'"),
    ],
)
def test_contradictions_in_the_data_section_are_refused(keys, says):
    with pytest.raises(ConfigError, match=says):
        DataSource(**keys)


def my_reader(source: DataSource) -> Log:
    """A reader of one's own: lines "user likes item"."""
    lines = pl.scan_lines(source.log, name="line").select(pl.col("line").str.split(" likes "))
    frame = lines.select(
        row=pl.int_range(pl.len(), dtype=pl.Int64),
        user=pl.col("line").list.first(),
        item=pl.col("line").list.last(),
        time=pl.int_range(pl.len(), dtype=pl.Int64),
        weight=pl.lit(1.0, pl.Float32),
        kind=pl.lit(int(Kind.POSITIVE), pl.UInt8),
    )
    return Log(frame, None, None, None, False, False, (Path(source.log),), source.columns)


def not_a_reader(source: DataSource) -> int:
    return 1


def test_a_reader_of_ones_own_plugs_in_as_a_function_or_by_its_name(tmp_path):
    path = write(tmp_path / "likes.txt", "ann likes tea\nbob likes rye bread\n")
    for log in (
        read(DataSource(format=f"{__name__}:my_reader", log=str(path))),
        read(DataSource(log=str(path)), reader=my_reader),
    ):
        assert [(r["user"], r["item"]) for r in rows(log)] == [("ann", "tea"), ("bob", "rye bread")]
    for name, says in (
        (":x", "imported"),
        ("no.such:x", "imported"),
        (f"{__name__}:no", "imported"),
    ):
        with pytest.raises(ConfigError, match=says):
            read(DataSource(format=name, log=str(path)))
    with pytest.raises(ConfigError, match="answered a int"):
        read(DataSource(format=f"{__name__}:not_a_reader", log=str(path)))
