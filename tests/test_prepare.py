"""The prepared dataset: what is written, for which log, and what opening it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import BundleError, DataError
from recsys.features.prepared.dataset import MANIFEST, Dataset
from recsys.features.prepared.prepare import prepare
from recsys.features.prepared.skips import SkipRules
from recsys.split import SplitRules
from recsys.tables import Catalog, CatalogSchema, Kind, Log, Schema, Side, UserSchema

HOUR = 3_600_000_000
NEVER = np.iinfo(np.int64).max
BEGINNING = np.iinfo(np.int64).min
THIRDS = SplitRules(test=0.25, valid=0.25)


def interactions(*rows: tuple, **columns: list) -> pl.DataFrame:
    """(user, item, time[, kind]) in source order, weight 1."""
    rows = [(*row, int(Kind.POSITIVE)) if len(row) == 3 else row for row in rows]
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64, "kind": pl.UInt8}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        pl.lit(1.0, pl.Float32).alias("weight"),
        *(pl.Series(name, values) for name, values in columns.items()),
    )


def a_log(frame: pl.DataFrame, **more) -> Log:
    standard = {
        "impressions": None, "catalog": None, "users": None, "timed": True, "given_split": False,
        "sources": (), "schema": Schema(),
    }  # fmt: skip
    return Log(interactions=frame.lazy(), **(standard | more))


# Train: b x 1, a y 2, a x 3, b z 4; valid: a z 5, c x 5; test: a w 7, b w 8.
ROWS = interactions(
    ("a", "y", 2), ("b", "x", 1), ("a", "x", 3), ("b", "z", 4),
    ("c", "x", 5), ("a", "w", 7), ("a", "z", 5), ("b", "w", 8),
)  # fmt: skip


def test_events_stand_by_user_and_time_with_warm_rows_first(tmp_path):
    data = prepare(a_log(ROWS), THIRDS, SkipRules(), tmp_path / "p")
    # w and c appear only after the cut-off.
    assert data.items.ids.to_list() == ["x", "y", "z", "w"]
    assert data.users.ids.to_list() == ["a", "b", "c"]
    assert (data.n_items, data.n_warm_items, data.n_users, data.n_warm_users) == (5, 3, 4, 2)
    assert data.event_user.tolist() == [1, 1, 1, 1, 2, 2, 2, 3]
    assert data.items.decode(data.event_item).to_list() == list("yxzwxzwx")
    assert data.event_time.tolist() == [2, 3, 5, 7, 1, 4, 8, 5]
    assert data.event_side.tolist() == [0, 0, 1, 2, 0, 0, 2, 1]
    assert data.user_offsets.tolist() == [0, 0, 4, 7, 8]
    assert (data.valid_from, data.test_from) == (5, 7)
    assert data.fresh and data.timed
    assert data.manifest["counts"]["train_positives"] == 4
    assert data.manifest["counts"]["valid_users"] == 2


def test_the_past_of_an_event_is_strictly_earlier_and_duplicates_are_kept(tmp_path):
    rows = interactions(
        ("a", "x", 1), ("a", "y", 1), ("a", "x", 2), ("a", "x", 2), ("a", "z", 3), ("a", "y", 4)
    )  # fmt: skip
    data = prepare(a_log(rows), SplitRules(test=0, valid=0), SkipRules(), tmp_path / "p")
    assert data.items.decode(data.event_item).to_list() == list("xyxxzy")
    assert data.event_past.tolist() == [0, 0, 2, 2, 4, 5]


def test_source_order_breaks_ties_whatever_order_the_frame_has(tmp_path):
    rows = interactions(*[("a", f"{n:02d}", 5) for n in range(40)], ("a", "x", 1))
    ways = (rows, rows.reverse(), rows.sample(fraction=1, shuffle=True, seed=1))
    for place, frame in enumerate(ways):
        data = prepare(
            a_log(frame), SplitRules(test=0, valid=0), SkipRules(), tmp_path / f"{place}"
        )
        found = data.items.decode(data.event_item).to_list()
        assert found == ["x", *(f"{n:02d}" for n in range(40))]


def test_weights_are_kept(tmp_path):
    frame = ROWS.with_columns(pl.Series("weight", np.arange(8), dtype=pl.Float32))
    data = prepare(a_log(frame), THIRDS, SkipRules(), tmp_path / "p")
    assert data.event_weight.tolist() == [0, 2, 6, 5, 1, 3, 7, 4]


def catalog(**columns: list) -> Catalog:
    schema = CatalogSchema(
        item="id", title="name", text=("name", "about"), categories=("genre",), numbers=("size",),
        published="born", vector="picture", available_until="until", available="live",
    )  # fmt: skip
    frame = pl.DataFrame(
        {
            "item": ["w", "x", "y", "q", "z"],
            "name": ["Wool", "Xylophone", None, "Quill ", ""],
            "about": ["warm", None, "yes", None, None],
            "genre": ["later|soft", "loud", "loud| soft", None, ""],
            "size": [100.0, 1.0, 3.0, None, 5.0],
            "born": [5_000_000, 1_000_000_000, 2_000_000_000, None, 1_500_000_000],
            "picture": [[1.0, 2.0], None, [0.0, 1.0], [3.0, 4.0], []],
            "until": [None, 2_000_000_000, None, None, None],
            "live": [True, False, None, True, True],
            **columns,
        }
    )
    return Catalog(frame, schema)


def in_seconds(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(pl.col("time") * 1_000_000 + 1_600_000_000_000_000)


def test_item_features_are_fitted_on_items_known_at_the_cut_off(tmp_path):
    # At the cut-off (second 1,600,000,005) y is not yet born, but it is in train; w is, by far.
    table = catalog(born=[1_700_000_000, 1_000_000_000, 2_000_000_000, None, 1_500_000_000])
    data = prepare(a_log(in_seconds(ROWS), catalog=table), THIRDS, SkipRules(), tmp_path / "p")
    assert data.items.ids.to_list() == ["x", "y", "z", "q", "w"]
    assert data.item_known.tolist() == [0, 1, 1, 1, 1, 0]
    second = 1_000_000
    base = 1_600_000_000 * second
    expected = [NEVER, 1_000_000_000 * second, base + 2 * second, 1_500_000_000 * second, NEVER]
    assert data.item_first_seen.tolist() == [*expected, base + 7 * second]
    assert data.item_exists_from.tolist()[4] == BEGINNING
    codes, size = data.item_categories["genre"]
    assert data.category_vocab("item", "genre").ids.to_list() == ["loud", "soft"] and size == 3
    assert [codes[row].tolist() for row in range(6)] == [[], [1], [1, 2], [], [], [0, 2]]
    # Mean and deviation of 1, 3, 5; q has none and gets 0.
    deviation = np.sqrt(8 / 3)
    expected = np.array([0, -2, 0, 2, 0, 97]) / deviation
    np.testing.assert_allclose(data.item_numbers[:, 0], expected, rtol=1e-6)
    assert data.item_text == ["", "Xylophone", "yes", "", "Quill", "Wool. warm"]
    assert data.item_vectors.tolist() == [[0, 0], [0, 0], [0, 1], [0, 0], [3, 4], [1, 2]]
    assert data.item_available_from is None
    assert data.item_available_until.tolist()[1] == 2_000_000_000 * second
    assert data.item_available_until.tolist()[2] == NEVER
    assert data.item_available.tolist() == [0, 0, 1, 1, 1, 1]
    assert data.catalog["item"].to_list() == data.items.ids.to_list()
    assert data.catalog["title"].to_list()[0] == "Xylophone"
    assert "picture" not in data.catalog.columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [[1.0], [1.0], [1.0], [1.0, 2.0], [1.0]]}, "item 'q' has 2 numbers"),
        ({"picture": [[1.0], [1.0], [float("nan")], None, [1.0]]}, "item 'y' has a NaN"),
        ({"picture": [None] * 5}, "empty for every item"),
        ({"size": ["1", "2", "big", None, "4"]}, "'size' of item 'y' is 'big'"),
        ({"born": ["2020-01-01", "soon", None, None, "2020-01-02"]}, "'born' of item 'x'"),
    ],
)  # fmt: skip
def test_a_bad_cell_of_the_item_table_is_named_and_nothing_is_written(tmp_path, columns, message):
    log = a_log(in_seconds(ROWS), catalog=catalog(**columns))
    with pytest.raises(DataError, match=message):
        prepare(log, THIRDS, SkipRules(), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_users_have_categories_and_numbers_of_their_table(tmp_path):
    users = pl.DataFrame({"user": ["b", "d", "a"], "city": ["B", "D", "A"], "age": [20, 99, 40]})
    schema = UserSchema(categories=("city",), numbers=("age",), text=("city",))
    log = a_log(ROWS, users=users, user_schema=schema)
    data = prepare(log, THIRDS, SkipRules(), tmp_path / "p")
    assert data.users.ids.to_list() == ["a", "b", "c", "d"]
    codes, size = data.user_categories["city"]
    # D is not in train: unknown; c is not in the table: none.
    assert [codes[row].tolist() for row in range(5)] == [[], [1], [2], [], [0]] and size == 3
    np.testing.assert_allclose(data.user_numbers[:, 0], [0, 1, -1, 0, 6.9], rtol=1e-6)
    assert data.user_text == ["", "A", "B", "", "D"]


def test_context_becomes_codes_of_the_training_side(tmp_path):
    frame = ROWS.with_columns(
        pl.Series("context.page", ["p", "q", "p", None, "new", "q", "p", "p"]),
        pl.Series("context.depth", [1.0, 2, 3, 4, 100, None, 2.5, -7]),
    )
    log = a_log(frame, schema=Schema(context_categories=("page",), context_numbers=("depth",)))
    data = prepare(log, THIRDS, SkipRules(), tmp_path / "p")
    assert data.context_sizes == {"depth": 6, "page": 3}
    # Events in final order: y2 x3 z5 w7 | x1 z4 w8 | x5.
    assert data.event_context[:, 1].tolist() == [1, 1, 1, 2, 2, 0, 1, 0]
    assert data.event_context[:, 0].tolist() == [1, 3, 3, 0, 2, 4, 1, 5]
    assert data.context_vocab("page").ids.to_list() == ["p", "q"]
    assert data.context_vocab("depth") is None


def shown(*rows: tuple, **columns) -> pl.LazyFrame:
    """(request, user, time, shown, clicked) with items as letters."""
    rows = [(r, u, t, list(s), list(c)) for r, u, t, s, c in rows]
    schema = {"request": pl.Int64, "user": pl.String, "time": pl.Int64,
              "shown": pl.List(pl.String), "clicked": pl.List(pl.String)}  # fmt: skip
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(pl.Series(name, v) for name, v in columns.items()).lazy()


REQUESTS = shown(
    (4, "a", 9 * HOUR, "xw", "w"),
    (1, "a", 1 * HOUR, "xyz", "y"),
    (2, "b", 2 * HOUR, "xy", ""),
    (3, "b", 3 * HOUR, "vxz", "z"),
    (5, "b", 12 * HOUR, "x", "x"),
)
CLICKS = interactions(
    ("a", "y", 1 * HOUR), ("b", "z", 3 * HOUR), ("a", "w", 9 * HOUR), ("b", "x", 12 * HOUR),
    request=[1, 3, 4, 5],
)  # fmt: skip


def test_impressions_become_requests_and_skips_of_their_clicks(tmp_path):
    log = a_log(CLICKS, impressions=REQUESTS)
    data = prepare(log, THIRDS, SkipRules(horizon="1h"), tmp_path / "p")
    assert data.items.ids.to_list() == ["y", "z", "w", "v", "x"]
    assert data.request_user.tolist() == [1, 1, 2, 2, 2]
    assert data.request_time.tolist() == [n * HOUR for n in (1, 9, 2, 3, 12)]
    assert data.request_side.tolist() == [0, 1, 0, 0, 2]
    assert data.request_offsets.tolist() == [0, 3, 5, 7, 10, 11]
    assert "".join(data.items.decode(data.shown_item)) == "xyzxwxyvxzx"
    assert data.shown_clicked.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]
    assert data.shown_position is None
    # Events: a y 1 h, a w 9 h, b z 3 h, b x 12 h.
    assert data.skip_offsets.tolist() == [0, 2, 3, 5, 5]
    skipped = "".join(data.items.decode(data.skip_item))
    assert (sorted(skipped[:2]), skipped[2], sorted(skipped[3:])) == (["x", "z"], "x", ["v", "x"])
    assert set(data.skip_weight.tolist()) == {0.5}
    assert data.manifest["skips"]["total"] == {"same_request": 5, "no_click": 2}
    assert data.manifest["skips"]["labelled"]
    # v was shown, never chosen; its first appearance counts.
    assert data.item_first_seen[4] == 3 * HOUR and data.item_known.tolist() == [0, 1, 1, 0, 1, 1]


def test_skips_can_be_switched_off(tmp_path):
    log = a_log(CLICKS, impressions=REQUESTS)
    data = prepare(log, THIRDS, SkipRules(enabled=False), tmp_path / "p")
    assert len(data.skip_item) == 0 and data.skip_offsets.tolist() == [0] * 5
    assert data.manifest["skips"] == {"labelled": False, "total": {}, "by_side": {}}


def test_positions_stay_beside_the_shown_items(tmp_path):
    position = [[2, 1], [1, 2, 3], [1, None], None, [7]]
    requests = REQUESTS.with_columns(pl.Series("position", position, dtype=pl.List(pl.Int32)))
    data = prepare(a_log(CLICKS, impressions=requests), THIRDS, SkipRules(), tmp_path / "p")
    assert data.shown_position.tolist() == [1, 2, 3, 2, 1, 1, -1, -1, -1, -1, 7]
    wrong = requests.with_columns(pl.Series("position", [[1], [1, 2, 3], [1, 2], None, [7]]))
    with pytest.raises(DataError, match="Request 4 shows 2 items, but its 'position' list has 1"):
        prepare(a_log(CLICKS, impressions=wrong), THIRDS, SkipRules(), tmp_path / "q")


def test_a_skip_of_a_user_without_a_positive_on_its_side_is_counted_as_alone(tmp_path):
    rows = [("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "y", 4), ("b", "x", 1, 2)]
    data = prepare(a_log(interactions(*rows)), THIRDS, SkipRules(), tmp_path / "p")
    assert data.manifest["skips"]["total"] == {"rejected": 1, "alone": 1}
    assert len(data.skip_item) == 0


def test_where_only_short_visits_are_rejections_they_are_named_so(tmp_path):
    rows = [("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "y", 4), ("a", "z", 1, 2)]
    schema = Schema(dwell="seconds", short_dwell=3.0)
    data = prepare(a_log(interactions(*rows), schema=schema), THIRDS, SkipRules(), tmp_path / "p")
    assert data.manifest["skips"]["total"] == {"short_dwell": 1}


def test_cold_items_have_no_event_before_the_test_and_leave_no_trace(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{rng.integers(20):02d}", t) for t in range(40) for u in range(10)]
    rules = SplitRules(test=0.2, valid=0.2, cold_items=0.25)
    listed = Catalog(pl.DataFrame({"item": [f"i{n:02d}" for n in range(20)]}), CatalogSchema())
    log = a_log(interactions(*rows), catalog=listed)
    data = prepare(log, rules, SkipRules(), tmp_path / "p")
    assert data.manifest["cold_items"] == 5 and data.n_warm_items == 15
    cold = data.event_item > data.n_warm_items
    assert set(data.event_side[cold]) == {int(Side.TEST)}
    assert not data.item_known[data.n_warm_items + 1 :].any()
    assert (data.item_first_seen[data.n_warm_items + 1 :] >= data.test_from).all()
    taken = data.manifest["counts"]["events_of_cold_items_taken_out"]
    assert taken + len(data.event_item) == len(rows)


def test_cold_items_are_not_among_what_was_shown_before_the_test(tmp_path):
    rules = SplitRules(test=0.25, valid=0)
    for share in (0.25, 0.45, 0.65, 0.85):
        data = prepare(
            a_log(CLICKS, impressions=REQUESTS),
            rules.model_copy(update={"cold_items": share}),
            SkipRules(horizon="1s"),
            tmp_path / "p",
        )
        cold = data.items.encode(["x"])[0]
        if cold > data.n_warm_items and not data.item_known[cold]:
            break
    request = np.repeat(np.arange(5), np.diff(data.request_offsets))
    assert set(data.request_side[request[data.shown_item == cold]]) == {int(Side.TEST)}
    assert cold not in data.skip_item


def test_sequences_have_positions_for_times_and_items_that_always_existed(tmp_path):
    rows = [(user, item, place) for user in "ab" for place, item in enumerate("wxyz")]
    data = prepare(
        a_log(interactions(*rows), timed=False), SplitRules(), SkipRules(), tmp_path / "p"
    )
    assert data.event_side.tolist() == [0, 0, 1, 2] * 2
    assert data.event_past.tolist() == [0, 1, 2, 3] * 2
    assert not data.timed and data.valid_from is None
    assert data.item_first_seen.tolist() == [NEVER, 0, 0, 0, 0]


def test_given_sides_that_overlap_in_time_are_put_one_after_the_other(tmp_path):
    frame = interactions(*[("a", item, time) for time, item in enumerate("uvwxyz")])
    frame = frame.with_columns(pl.Series("side", [2, 0, 1, 0, 2, 0], dtype=pl.UInt8))
    data = prepare(a_log(frame, given_split=True), SplitRules(), SkipRules(), tmp_path / "p")
    assert "".join(data.items.decode(data.event_item)) == "vxzwuy"
    assert data.event_side.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.event_past.tolist() == [0, 1, 2, 3, 4, 4]
    assert not data.timed and data.manifest["counts"]["users_with_overlapping_sides"] == 1
    shown_too = frame.with_columns(pl.Series("kind", [0, 0, 0, 0, 0, 1], dtype=pl.UInt8))
    with pytest.raises(DataError, match="do not follow each other in time"):
        prepare(a_log(shown_too, given_split=True), SplitRules(), SkipRules(), tmp_path / "q")
    by_time = SplitRules(kind="time", test=0.2, valid=0.2)
    assert prepare(a_log(shown_too, given_split=True), by_time, SkipRules(), tmp_path / "q").timed


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), st.integers(0, 9)),
        min_size=4,
        max_size=40,
    ),
    st.sampled_from(["time", "leave_one_out"]),
)
def test_no_users_future_is_in_anyones_past(tmp_path_factory, rows, kind):
    rules = SplitRules(kind=kind, test=0.2, valid=0.2)
    try:
        data = prepare(
            a_log(interactions(*rows)), rules, SkipRules(), tmp_path_factory.mktemp("p") / "p"
        )
    except DataError:
        return
    frame = sorted(enumerate(rows), key=lambda row: (row[1][0], row[1][2], row[0]))
    assert data.users.decode(data.event_user).to_list() == sorted(
        (row[0] for _, row in frame), key=lambda user: data.users.encode([user])[0]
    )
    for event in range(len(rows)):
        start = data.user_offsets[data.event_user[event]]
        past = slice(start, start + data.event_past[event])
        assert (data.event_time[past] < data.event_time[event]).all()
        assert (data.event_side[past] <= data.event_side[event]).all()
        after = slice(past.stop, data.user_offsets[data.event_user[event] + 1])
        assert (data.event_time[after] >= data.event_time[event]).all()
    warm = set(data.event_item[data.event_side == Side.TRAIN])
    assert warm == set(range(1, data.n_warm_items + 1))
    for rows, most in (
        (data.event_item, data.n_refit_items),
        (data.event_user, data.n_refit_users),
    ):
        assert set(rows[data.event_side != Side.TEST]) == set(range(1, most + 1))


def on_disk(folder: Path) -> Log:
    """A log whose source is a file, so that it can be known again."""
    path = folder / "log.parquet"
    if not path.exists():
        CLICKS.write_parquet(path)
    return a_log(CLICKS, impressions=REQUESTS, sources=(path,))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_preparations_are_equal_byte_for_byte(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in rng.integers(0, 300, (5000, 3))]
    kinds = rng.choice([0, 0, 1, 2], len(rows)).astype(np.uint8)
    frame = interactions(*rows).with_columns(pl.Series("kind", kinds))
    frame = frame.with_columns(pl.Series("context.c", [f"c{n % 7}" for n in range(5000)]))
    (tmp_path / "one").mkdir()
    for name, shuffled in (("one", frame), ("two", frame.reverse())):
        prepare(a_log(shuffled), SplitRules(), SkipRules(horizon="10s"), tmp_path / name / "p")
    one, two = contents(tmp_path / "one" / "p"), contents(tmp_path / "two" / "p")
    assert one == two and len(one) > 25


def test_preparing_again_does_nothing_until_something_changes(tmp_path):
    log, said = on_disk(tmp_path), []
    first = prepare(log, THIRDS, SkipRules(), tmp_path / "p", progress=said.append)
    assert first.fresh and len(said) > 3
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    said.clear()
    again = prepare(log, THIRDS, SkipRules(), tmp_path / "p", progress=said.append)
    assert not again.fresh and "nothing to do" in said[0]
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    for changed in (
        {"split": SplitRules(test=0.5, valid=0.25)},
        {"skips": SkipRules(horizon="2h")},
        {"options": {"unknown_items": "drop"}},
        {"log": replace(log, schema=Schema(separator=","))},
    ):
        asked = {"log": log, "split": THIRDS, "skips": SkipRules()} | changed
        assert prepare(**asked, out=tmp_path / "p").fresh
        assert not prepare(**asked, out=tmp_path / "p").fresh
    CLICKS.head(4).with_columns(weight=2.0).write_parquet(tmp_path / "log.parquet")
    assert prepare(**asked, out=tmp_path / "p").fresh


def test_a_stranger_s_folder_is_not_replaced_but_a_damaged_dataset_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="no prepared dataset"):
        prepare(a_log(ROWS), THIRDS, SkipRules(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    log = on_disk(tmp_path)
    data = prepare(log, THIRDS, SkipRules(), tmp_path / "p")
    (data.path / "event_item.npy").unlink()
    assert prepare(log, THIRDS, SkipRules(), tmp_path / "p").fresh


def test_opening_refuses_what_does_not_match_itself_and_names_both_values(tmp_path):
    path = prepare(a_log(ROWS), THIRDS, SkipRules(), tmp_path / "p").path
    with pytest.raises(BundleError, match="is no prepared dataset"):
        Dataset.open(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())

    def altered(**change) -> None:
        (path / MANIFEST).write_text(json.dumps(manifest | change))

    altered(format="recsys.bundle")
    with pytest.raises(BundleError, match=r"'recsys.bundle', but .* 'recsys.prepared'"):
        Dataset.open(path)
    altered(format_version=99)
    with pytest.raises(BundleError, match="version 99, but this program reads version"):
        Dataset.open(path)
    altered()
    np.save(path / "event_item.npy", np.zeros(7, np.int32))
    with pytest.raises(BundleError, match=r"has 156 bytes, but manifest.json says 160"):
        Dataset.open(path)
    np.save(path / "event_item.npy", np.zeros(4, np.int64))
    with pytest.raises(BundleError, match=r"<i8 \[4\], but manifest.json says <i4 \[8\]"):
        Dataset.open(path)
    np.save(path / "event_item.npy", np.zeros(8, np.int32))
    data = Dataset.open(path)
    with pytest.raises(BundleError, match=r"event_item.npy has the SHA-256 .*, but manifest"):
        data.verify()


def test_a_whole_dataset_verifies_and_cannot_be_written_to(tmp_path):
    data = prepare(a_log(CLICKS, impressions=REQUESTS), THIRDS, SkipRules(), tmp_path / "p")
    data.verify()
    assert isinstance(data.event_item, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.event_item[0] = 3


def test_a_null_user_is_named_by_its_row(tmp_path):
    frame = ROWS.with_columns(
        pl.when(pl.col("row") == 4).then(None).otherwise("user").alias("user")
    )
    with pytest.raises(DataError, match="Row 5 of the log has no user"):
        prepare(a_log(frame), THIRDS, SkipRules(), tmp_path / "p")


def test_real_news_impressions_are_prepared_with_their_skips(tmp_path, real_data):
    from recsys.features.readers.read import DataSource, read

    log = read(DataSource(format="ebnerd", log=str(real_data("ebnerd_demo_week1"))))
    rules = SplitRules(test="1d", valid="1d")
    data = prepare(log, rules, SkipRules(), tmp_path / "p")
    assert len(data.request_user) == 24_724
    total = data.manifest["skips"]["total"]
    assert total["same_request"] > 150_000 and set(total) <= {
        "same_request", "rescued", "censored", "alone", "no_click",
    }  # fmt: skip
    # Every skip of the training side belongs to an event of it.
    per_event = np.diff(data.skip_offsets)
    assert per_event[data.event_side == Side.TRAIN].sum() > 100_000


def test_validation_items_that_a_reader_laid_between_the_training_items_stay_there(tmp_path):
    """Adjacency lists: what is learned from both sides together keeps the order of the lists."""
    from recsys.features.readers.read import read
    from recsys.features.readers.source import DataSource

    lists = {"train": "0 a b c d\n1 a c\n", "valid": "0 v w\n", "test": "0 t\n1 d\n"}
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    named = {name: str(tmp_path / f"{name}.txt") for name in lists}
    log = read(DataSource(format="lightgcn", **named))
    data = prepare(log, SplitRules(), SkipRules(), tmp_path / "p")
    own = data.event_item[data.event_user == data.users.encode(["0"])[0]]
    assert data.items.decode(own).to_list() == ["a", "b", "v", "c", "d", "w", "t"]
