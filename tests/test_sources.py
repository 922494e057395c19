"""Readers: each format by hand, and the public ones on real files where they are."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_cases import requests, rows, write

from recsys.errors import DataError
from recsys.features.readers.read import DataSource, read
from recsys.tables import Kind, Log, Schema, Side

SECOND = 1_000_000
POSITIVE, SHOWN, REJECTED = (int(kind) for kind in (Kind.POSITIVE, Kind.SHOWN, Kind.REJECTED))


# ------------------------------------------------------------------ event rows


def read_events(tmp_path: Path, text: str, **columns) -> Log:
    return read(DataSource(log=write(tmp_path / "log.csv", text), columns=Schema(**columns)))


def test_event_names_have_the_meanings_and_strengths_of_the_schema(tmp_path):
    log = read_events(
        tmp_path,
        "user,item,time,what\nu,a,1,click\nu,b,2,buy\nu,c,3,seen\nu,d,4,hide\nu,e,5,ping\nu,f,6,\n",
        event="what",
        positive={"click": 1.0, "buy": 3.0},
        shown_events=("seen",),
        rejected=("hide",),
    )
    assert rows(log, "item", "kind", "weight") == [
        ("a", POSITIVE, 1.0),
        ("b", POSITIVE, 3.0),
        ("c", SHOWN, 1.0),
        ("d", REJECTED, 1.0),
    ]
    assert log.notes == {"unknown_event": 2}
    # Rows are numbered as they are handed on, in the order of the source.
    assert [row for (row,) in rows(log, "row")] == [0, 1, 2, 3]


def test_an_event_column_without_meanings_leaves_every_row_a_positive(tmp_path):
    log = read_events(tmp_path, "user,item,time,what\nu,a,1,x\nu,b,2,y\n", event="what")
    assert rows(log, "kind") == [(POSITIVE,)] * 2


def test_no_positives_is_refused_with_the_events_that_are_there(tmp_path):
    with pytest.raises(DataError, match=r"'view' \(2\), 'hide' \(1\).*data\.columns\.positive"):
        read_events(
            tmp_path,
            "user,item,time,what\nu,a,1,view\nu,b,2,view\nu,c,3,hide\n",
            event="what",
            positive={"click": 1.0},
        )


RATINGS = "user,item,time,stars\nu,a,1,5\nu,b,2,4\nu,c,3,3\nu,d,4,2\nu,e,5,1\nu,f,6,\n"


def test_ratings_are_positive_rejected_or_between(tmp_path):
    log = read_events(tmp_path, RATINGS, value="stars", positive_from=4.0, rejected_to=2.0)
    assert rows(log, "item", "kind") == [
        ("a", POSITIVE), ("b", POSITIVE), ("d", REJECTED), ("e", REJECTED),
    ]  # fmt: skip
    assert log.notes == {"value_between": 1, "value_missing": 1}


def test_with_one_threshold_a_rating_is_on_its_side_or_the_other(tmp_path):
    high = read_events(tmp_path, RATINGS, value="stars", positive_from=4.0)
    assert rows(high, "item") == [("a",), ("b",)]
    low = read_events(tmp_path, RATINGS, value="stars", rejected_to=2.0)
    assert rows(low, "item", "kind") == [
        ("a", POSITIVE), ("b", POSITIVE), ("c", POSITIVE), ("d", REJECTED), ("e", REJECTED),
    ]  # fmt: skip


def test_a_click_among_ratings_stays_a_click(tmp_path):
    log = read_events(
        tmp_path,
        "user,item,time,what,stars\nu,a,1,click,\nu,b,2,rate,1\nu,c,3,rate,5\nu,d,4,seen,1\n",
        event="what",
        positive={"click": 1.0, "rate": 2.0},
        shown_events=("seen",),
        value="stars",
        positive_from=4.0,
        rejected_to=2.0,
    )
    assert rows(log, "item", "kind", "weight") == [
        ("a", POSITIVE, 1.0), ("b", REJECTED, 1.0), ("c", POSITIVE, 2.0), ("d", SHOWN, 1.0),
    ]  # fmt: skip


def test_weights_multiply_and_a_short_dwell_is_a_bounce(tmp_path):
    log = read_events(
        tmp_path,
        "user,item,time,w,sec\nu,a,1,2.5,60\nu,b,2,2.5,1.5\nu,c,3,,\nu,d,4,1,3.0\n",
        weight="w",
        dwell="sec",
        short_dwell=3.0,
    )
    assert rows(log, "item", "kind", "weight") == [
        ("a", POSITIVE, 2.5), ("b", REJECTED, 1.0), ("c", POSITIVE, 1.0),
        ("d", POSITIVE, 1.0),
    ]  # fmt: skip
    assert log.notes == {"short_dwell": 1}


@pytest.mark.parametrize(
    ("value", "columns", "says"),
    [
        ("many", {"weight": "w"}, "'w' holds 'many', which is not a finite number"),
        ("nan", {"weight": "w"}, "not a finite number"),
        ("-1", {"weight": "w"}, "not negative"),
        ("good", {"value": "w", "positive_from": 1.0}, "'good'"),
        ("long", {"dwell": "w", "short_dwell": 1.0}, "'long'"),
        ("warm", {"context_numbers": ("w",)}, "'warm'"),
    ],
)
def test_text_where_a_number_must_stand_names_row_and_column(tmp_path, value, columns, says):
    with pytest.raises(DataError, match=r"log\.csv, row 2: .*" + says):
        read_events(tmp_path, f"user,item,time,w\nu,a,1,1\nu,b,2,{value}\n", **columns)


def test_requests_positions_and_context_are_carried(tmp_path):
    log = read_events(
        tmp_path,
        "user,item,time,r,p,dev,temp\nu,a,1,x9,1,tv,3\nu,b,1,x9,2,tv,\nu,c,2,,1,,1.5\n",
        request="r",
        position="p",
        context_categories=("dev",),
        context_numbers=("temp",),
    )
    assert rows(log, "request", "position", "context.dev", "context.temp") == [
        (1, 1, "tv", 3.0), (1, 2, "tv", None), (None, 1, None, 1.5),
    ]  # fmt: skip
    whole = read_events(tmp_path, "user,item,time,r\nu,a,1,-77\nu,b,1,9000000000\n", request="r")
    assert rows(whole, "request") == [(-77,), (9_000_000_000,)]


def test_the_same_request_number_on_two_sides_is_two_requests(tmp_path):
    named = {
        side: write(tmp_path / f"{side}.csv", f"user,item,time,r\nu,{side},1,7\n")
        for side in ("train", "test")
    }
    log = read(DataSource(**named, columns={"request": "r"}))
    (first,), (second,) = rows(log, "request")
    assert first != second


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["u", "v"]),
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 50),
            st.sampled_from(["click", "buy", "seen", "hide", "other"]),
            st.one_of(st.none(), st.integers(0, 9)),
        ),
        min_size=1,
    )
)
def test_kinds_and_weights_equal_a_loop_over_rows(tmp_path_factory, events):
    schema = Schema(
        event="event",
        positive={"click": 1.0, "buy": 3.0},
        shown_events=("seen",),
        rejected=("hide",),
        dwell="dwell",
        short_dwell=2.0,
    )
    expected = []
    for user, item, time, event, dwell in events:
        if event == "other":
            continue
        kind = {"seen": SHOWN, "hide": REJECTED}.get(event, POSITIVE)
        weight = 3.0 if event == "buy" else 1.0
        if kind == POSITIVE and dwell is not None and dwell < 2:
            kind, weight = REJECTED, 1.0
        expected.append((user, item, time * SECOND, kind, weight))
    path = tmp_path_factory.mktemp("loop") / "a.parquet"
    frame = pl.DataFrame(events, schema=["user", "item", "time", "event", "dwell"], orient="row")
    frame.with_columns(pl.col("dwell").cast(pl.Int64)).write_parquet(path)
    source = DataSource(log=str(path), columns=schema)
    if not any(kind == POSITIVE for *_, kind, _ in expected):
        with pytest.raises(DataError, match="no positive"):
            read(source)
    else:
        assert rows(read(source), "user", "item", "time", "kind", "weight") == expected


# ------------------------------------------------------------------ impression lists


def shop(tmp_path: Path, **change) -> str:
    values = {
        "user": ["u", "v", "u"],
        "time": [10, 20, 30],
        "shown": [["a", "b", "c"], ["b"], ["c", "a"]],
        "clicked": [["b"], [], ["a", "c"]],
        "position": [[1, 2, 3], [1], [1, 2]],
    } | change
    path = tmp_path / "shop.parquet"
    pl.DataFrame(values).write_parquet(path)
    return str(path)


def test_clicks_stand_in_the_interactions_with_their_request(tmp_path):
    log = read(
        DataSource(format="impressions", log=shop(tmp_path), columns={"position": "position"})
    )
    assert requests(log, "request", "user", "time", "shown", "clicked", "position") == [
        (0, "u", 10 * SECOND, ["a", "b", "c"], ["b"], [1, 2, 3]),
        (1, "v", 20 * SECOND, ["b"], [], [1]),
        (2, "u", 30 * SECOND, ["c", "a"], ["a", "c"], [1, 2]),
    ]
    assert rows(log, "row", "user", "item", "time", "request", "kind") == [
        (0, "u", "b", 10 * SECOND, 0, POSITIVE),
        (1, "u", "a", 30 * SECOND, 2, POSITIVE),
        (2, "u", "c", 30 * SECOND, 2, POSITIVE),
    ]


def test_the_order_of_a_list_is_not_a_position(tmp_path):
    log = read(DataSource(format="impressions", log=shop(tmp_path)))
    assert "position" not in log.impressions.collect_schema()


@pytest.mark.parametrize(
    ("shown", "clicked", "separator"),
    [
        ("a b  c", "b", " "),
        ("[a, b, c]", "[b]", " "),
        ("['a' 'b'\n 'c']", "['b']", " "),
        ('["a", "b", "c"]', '["b"]', " "),
        ("a|b|c", "b", "|"),
        ("a, b,c", "b", ","),
    ],
)
def test_lists_written_as_text_are_lists(tmp_path, shown, clicked, separator):
    path = tmp_path / "a.csv"
    frame = pl.DataFrame({"user": ["u"], "time": [1], "shown": [shown], "clicked": [clicked]})
    frame.write_csv(path)
    source = DataSource(format="impressions", log=str(path), columns={"separator": separator})
    assert requests(read(source), "shown", "clicked") == [(["a", "b", "c"], ["b"])]


def test_integer_lists_are_ids_and_a_null_list_of_clicks_is_empty(tmp_path):
    path = shop(tmp_path, shown=[[7, 8], [9], [7]], clicked=[[8], None, [12]])
    log = read(DataSource(format="impressions", log=path))
    assert requests(log, "shown", "clicked")[:2] == [(["7", "8"], ["8"]), (["9"], [])]
    assert log.notes == {"clicked_but_not_shown": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shown": [["a"], None, ["b"]]}, "row 2: column 'shown' is null"),
        (
            {"shown": [["a"], ["b", None], ["b"]]},
            "row 2: column 'shown' holds a null or empty item",
        ),
        ({"clicked": [["a"], [""], ["b"]]}, "row 2: column 'clicked' holds a null or empty item"),
        ({"position": [[1, 2, 3], [1, 2], [1, 2]]}, "row 2: column 'position' does not hold one"),
        ({"position": [[1, 2, 3], None, [1, 2]]}, "row 2: column 'position' does not hold one"),
        ({"position": [1, 2, 3]}, "must hold a list"),
        ({"user": ["u", None, "u"]}, "row 2: column 'user' is a null or empty user id"),
        ({"clicked": [[], [], []]}, "no positive"),
    ],
)
def test_a_bad_request_names_the_row(tmp_path, change, says):
    change = {key: pl.Series(value, dtype=None) for key, value in change.items()}
    if "clicked" in change:
        change["clicked"] = change["clicked"].cast(pl.List(pl.String))
    with pytest.raises(DataError, match=says):
        read(
            DataSource(
                format="impressions",
                log=shop(tmp_path, **change),
                columns={"position": "position"},
            )
        )


def test_a_bounce_is_a_rejection_and_stays_in_the_list_of_clicks(tmp_path):
    path = shop(tmp_path, sec=[1.0, 50.0, 50.0])
    log = read(
        DataSource(format="impressions", log=path, columns={"dwell": "sec", "short_dwell": 3.0})
    )
    assert rows(log, "item", "kind") == [("b", REJECTED), ("a", POSITIVE), ("c", POSITIVE)]
    assert requests(log, "clicked")[0] == (["b"],)
    assert log.notes == {"short_dwell": 1}


def test_unknown_items_are_dropped_from_lists_with_their_positions(tmp_path):
    items = write(tmp_path / "items.csv", "item\na\nc\n")
    log = read(
        DataSource(
            format="impressions",
            log=shop(tmp_path),
            items=items,
            unknown_items="drop",
            columns={"position": "position"},
        )
    )
    assert requests(log, "request", "shown", "clicked", "position") == [
        (0, ["a", "c"], [], [1, 3]),
        (2, ["c", "a"], ["a", "c"], [1, 2]),
    ]
    assert rows(log, "row", "item") == [(1, "a"), (2, "c")]
    assert log.notes == {"events_on_unknown_items": 1, "shown_unknown_items": 2}


# ------------------------------------------------------------------ sequences


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("u1\tb a c\nu2\ta\n", {}),
        ("u1 b a c\nu2 a\n", {}),
        ("u1 b a c\n\nu2 a", {}),
        ("u1\tb,a,c\nu2\ta\n", {"separator": ","}),
        ("u1,b,a,c\nu2,a\n", {"separator": ","}),
        ("user\titems\nu1\tb a c\nu2\ta\n", {}),
        ("who\twhat\nu1\tb a c\nu2\ta\n", {"user": "who", "items": "what"}),
    ],
)
def test_a_sequence_is_in_order_and_its_position_is_its_time(tmp_path, text, columns):
    path = write(tmp_path / "s.tsv" if "\t" in text else tmp_path / "s.txt", text)
    log = read(DataSource(format="sequences", log=path, columns=columns))
    assert rows(log, "user", "item", "time", "kind") == [
        ("u1", "b", 0, POSITIVE), ("u1", "a", 1, POSITIVE), ("u1", "c", 2, POSITIVE),
        ("u2", "a", 0, POSITIVE),
    ]  # fmt: skip
    assert not log.timed


def test_list_columns_of_parquet_are_sequences(tmp_path):
    path = tmp_path / "s.parquet"
    pl.DataFrame({"user": [1, 2, 3], "items": [[5, 6], [7], []]}).write_parquet(path)
    log = read(DataSource(format="sequences", log=str(path)))
    assert rows(log, "user", "item", "time") == [("1", "5", 0), ("1", "6", 1), ("2", "7", 0)]
    assert log.notes == {"users_without_items": 1}


def test_a_user_on_two_lines_goes_on_where_they_stood(tmp_path):
    log = read(DataSource(format="sequences", log=write(tmp_path / "s.txt", "u a b\nv c\nu d\n")))
    assert rows(log, "user", "item", "time") == [
        ("u", "a", 0), ("u", "b", 1), ("v", "c", 0), ("u", "d", 2),
    ]  # fmt: skip


def test_a_misnamed_header_of_sequences_is_refused(tmp_path):
    path = write(tmp_path / "s.tsv", "user_id\tmovies\nu1\ta b\n")
    with pytest.raises(DataError, match="no column 'user'"):
        read(DataSource(format="sequences", log=path))


def test_adjacency_lists_have_sides_and_no_order_within_the_test(tmp_path):
    named = {
        "train": write(tmp_path / "train.txt", "0 5 3\n1 4\n"),
        "valid": write(tmp_path / "valid.txt", "0 9\n"),
        "test": write(tmp_path / "test.txt", "0 1 2\n1\n"),
    }
    log = read(DataSource(format="lightgcn", **named))
    assert rows(log, "user", "item", "time", "side") == [
        ("0", "5", 0, Side.TRAIN), ("0", "3", 1, Side.TRAIN), ("1", "4", 0, Side.TRAIN),
        ("0", "9", 1, Side.VALID), ("0", "1", 3, Side.TEST), ("0", "2", 3, Side.TEST),
    ]  # fmt: skip
    assert log.given_split and not log.timed
    assert log.notes == {"users_without_items": 1}


def test_validation_items_of_adjacency_lists_are_spread_over_the_training_items(tmp_path):
    named = {
        "train": write(tmp_path / "train.txt", "0 a b c d e f\n2 x\n"),
        "valid": write(tmp_path / "valid.txt", "0 v w\n1 y\n"),
        "test": write(tmp_path / "test.txt", "0 t\n1 z\n"),
    }
    log = read(DataSource(format="lightgcn", **named))
    time = {item: time for _, item, time in rows(log, "user", "item", "time")}
    assert [time[item] for item in "abcdef"] == [0, 1, 2, 3, 4, 5]
    assert (time["v"], time["w"], time["t"]) == (1, 4, 8)
    assert (time["y"], time["z"], time["x"]) == (0, 1, 0)
