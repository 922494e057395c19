"""Candidates in a file: what `recommend` says for each user, whole or not there at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError, DataError
from recsys.serving import candidates
from recsys.serving.candidates import write_candidates
from recsys.serving.engine.engine import Engine
from recsys.serving.recommender import Recommender


@pytest.fixture(scope="module")
def shopkeeper(tiny: Any) -> Recommender:
    return Recommender.load(tiny.bundle)


@pytest.fixture(scope="module")
def trader(plain: Any) -> Recommender:
    return Recommender.load(plain.bundle)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "PART", 7)


def _lists(path: Path) -> dict[str, tuple[list[str], list[float]]]:
    frame = pl.read_parquet(path)
    assert frame.schema == {
        "user": pl.String, "item": pl.String, "rank": pl.Int32, "score": pl.Float32,
    }  # fmt: skip
    found = {}
    for (user,), part in frame.group_by("user", maintain_order=True):
        assert part["rank"].to_list() == list(range(1, len(part) + 1))
        found[user] = (part["item"].to_list(), part["score"].to_list())
    return found


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("drop_seen", [True, False])
def test_the_file_says_what_recommend_says_for_every_user_in_order(
    shopkeeper: Recommender, tmp_path: Path, drop_seen: bool
) -> None:
    """A slow twin: one call a user."""
    told: list[tuple[int, int]] = []
    written = write_candidates(
        shopkeeper, tmp_path / "c.parquet", k=6, drop_seen=drop_seen,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    found, users = _lists(written.path), shopkeeper.bundle.users.ids.to_list()
    assert list(found) == users and written.users == len(users) > 14
    assert told == [(min(n * 7, len(users)), len(users)) for n in range(len(told))]
    assert told[-1][0] == len(users)
    for user, (items, scores) in found.items():
        one = shopkeeper.recommend(user=user, k=6, drop_seen=drop_seen)
        assert items == one.ids
        np.testing.assert_allclose(scores, one.scores, rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["c.parquet"]


def test_what_a_user_had_is_not_among_the_candidates(trader: Recommender, tmp_path: Path) -> None:
    bundle = trader.bundle
    path = write_candidates(trader, tmp_path / "c.parquet", k=1000).path
    had = pl.DataFrame(
        {
            "user": bundle.users.decode(bundle.timeline.user),
            "item": bundle.items.decode(bundle.timeline.item),
        }
    )
    frame = pl.read_parquet(path)
    assert not len(frame.join(had, on=["user", "item"]))
    # Everything else is: k is larger than the catalogue.
    offered = set(bundle.items.decode(bundle.rows).to_list())
    for user, (items, _) in _lists(path).items():
        assert set(items) == offered - set(had.filter(pl.col("user") == user)["item"])


@pytest.mark.usefixtures("small_parts")
def test_a_call_that_was_stopped_goes_on_where_it_ended(
    trader: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_candidates(trader, tmp_path / "whole.parquet", k=5).path.read_bytes()
    out = tmp_path / "c.parquet"

    def stop_at(done: int, total: int) -> None:
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(trader, out, k=5, progress=stop_at)
    assert not out.exists()
    # One that dies in the middle of a part leaves half a file under a temporary name.
    (tmp_path / "c.parquet.parts" / ".000000000014.parquet.x.parquet").write_bytes(b"PAR1 half")
    asked: list[int] = []
    real = Engine.recommend_rows

    def watched(self: Engine, queries: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(queries))
        return real(self, queries, *args, **kwargs)

    monkeypatch.setattr(Engine, "recommend_rows", watched)
    written = write_candidates(trader, out, k=5)
    assert written.resumed == 14 and sum(asked) == written.users - 14
    assert out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.parquet", "whole.parquet"]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "other", [{"k": 4}, {"drop_seen": False}, {"exact": True}, {"users": "some.csv"}]
)
def test_parts_of_another_question_are_not_taken_up(
    trader: Recommender, tmp_path: Path, other: dict[str, Any]
) -> None:
    pl.DataFrame({"user": trader.bundle.users.ids[::-1]}).write_csv(tmp_path / "some.csv")

    def stop(done: int, total: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(trader, tmp_path / "c.parquet", k=5, progress=stop)
    if "users" in other:
        other = {"users": tmp_path / "some.csv"}
    written = write_candidates(trader, tmp_path / "c.parquet", **{"k": 5, **other})
    assert written.resumed == 0
    fresh = write_candidates(trader, tmp_path / "d.parquet", **{"k": 5, **other})
    assert written.path.read_bytes() == fresh.path.read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_bundle_are_not_taken_up(
    trader: Recommender, build: Callable[..., Any], market_run: str, tmp_path: Path
) -> None:
    other = Recommender.load(build(f"seed = 9\n{market_run}", tmp_path / "b").bundle)

    def stop(done: int, total: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(other, tmp_path / "c.parquet", k=5, progress=stop)
    assert write_candidates(trader, tmp_path / "c.parquet", k=5).resumed == 0


def test_a_list_of_users_may_name_strangers_and_name_somebody_twice(
    trader: Recommender, tmp_path: Path
) -> None:
    (tmp_path / "users.csv").write_text("user,age\nu03,1\nnobody,2\nu01,3\nu03,4\n")
    written = write_candidates(trader, tmp_path / "c.parquet", k=4, users=tmp_path / "users.csv")
    found = _lists(written.path)
    assert list(found) == ["u03", "nobody", "u01"]
    assert (written.users, written.unknown) == (3, 1)
    for user, (items, _) in found.items():
        assert items == trader.recommend(user=user, k=4).ids


@pytest.mark.parametrize("form", ["lists", "text", "rows"])
def test_histories_from_a_file_answer_new_users_too(
    trader: Recommender, tmp_path: Path, form: str
) -> None:
    histories = {"new": ["i01", "i02"], "u03": ["i09"], "odd": ["x", "i04"], "blank": ["x"]}
    path = tmp_path / ("h.parquet" if form == "lists" else "h.csv")
    if form == "lists":
        pl.DataFrame({"user": list(histories), "history": list(histories.values())}).write_parquet(
            path
        )
    elif form == "text":
        lines = [f'{u},"{" ".join(h)}"' for u, h in histories.items()]
        path.write_text("\n".join(["user,history", *lines]))
    else:
        lines = [f"{u},{item}" for u, h in histories.items() for item in h]
        path.write_text("\n".join(["user,item", *lines]))
    written = write_candidates(trader, tmp_path / "c.parquet", k=5, histories=path)
    found = _lists(written.path)
    assert list(found) == list(histories) and written.unknown == 3
    for user, history in histories.items():
        known = user if user == "u03" else None
        one = trader.recommend(user=known, history=history, k=5)
        assert found[user][0] == one.ids


def test_numbers_may_be_ids_in_a_file(trader: Recommender, tmp_path: Path) -> None:
    pl.DataFrame({"user": [17, 4]}).write_parquet(tmp_path / "u.parquet")
    written = write_candidates(trader, tmp_path / "c.parquet", k=2, users=tmp_path / "u.parquet")
    assert list(_lists(written.path)) == ["17", "4"] and written.unknown == 2


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("users", None, DataError, "u.csv"),
        ("users", "usr\na\n", DataError, "u.csv has no column 'user'. Did you mean 'usr'?"),
        ("users", "user,x\na,1\n,2\n", DataError, "null or empty user in row 2"),
        ("users", "user\n", DataError, "u.csv names no user"),
        ("histories", "user,items\na,b\n", DataError, "no column 'item'. Did you mean 'items'?"),
        ("histories", "user,history\na,b\na,c\n", DataError, "more than one history of user 'a'"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_and_nothing_is_written(
    trader: Recommender, tmp_path: Path, name: str, text: str | None, kind: type, message: str
) -> None:
    if text is not None:
        (tmp_path / "u.csv").write_text(text)
    with pytest.raises(kind) as refused:
        write_candidates(trader, tmp_path / "c.parquet", **{name: tmp_path / "u.csv"})
    assert message in str(refused.value)
    assert not [p for p in tmp_path.iterdir() if p.name != "u.csv"]


def test_a_question_that_cannot_be_meant_is_refused(trader: Recommender, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k is 0"):
        write_candidates(trader, tmp_path / "c.parquet", k=0)
    with pytest.raises(ConfigError, match="not both"):
        write_candidates(trader, tmp_path / "c.parquet", users="a", histories="b")
    with pytest.raises(ConfigError, match="is a folder"):
        write_candidates(trader, tmp_path)
