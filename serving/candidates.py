"""Batch candidate generation into one Parquet file, in parts that survive a stop.

Legend: Q queries of a part, k answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recsys.errors import ConfigError, DataError
from recsys.features.batching.batch import Queries
from recsys.files import atomic_write, sha256_bytes, write_json
from recsys.ragged import Ragged
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.planner import NOTHING_KNOWN, unknown_user
from recsys.serving.user_lists import People, read_people

if TYPE_CHECKING:
    from recsys.serving.recommender import Recommender

PART = 8192
"""Users of one part: the most that a stop can cost."""
ANSWERS_AT_ONCE = 1 << 24
"""Answers that a part may hold; with a very large k it has fewer users."""


@dataclass(frozen=True)
class Written:
    """What `write_candidates` did.

    Args:
        path: the Parquet file: user, item, rank (1 is the best), score.
        users: how many were answered.
        unknown: users of the list that the bundle does not know, answered as new ones.
        resumed: users that an earlier, stopped call had answered.
    """

    path: Path
    users: int
    unknown: int
    resumed: int


def write_candidates(
    recommender: Recommender,
    out: str | Path,
    *,
    k: int = 100,
    users: str | Path | None = None,
    histories: str | Path | None = None,
    drop_seen: bool = True,
    exact: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write the best k items of each user; the most popular ones where nothing is known of them.

    Parts are written beside `out` under its name with `.parts`; a call that was stopped is taken
    up where it ended when bundle, k and users are the same, and only a whole file is ever seen
    under `out`.

    Args:
        recommender: answers.
        out: Parquet file.
        k: answers a user; fewer where there are fewer items.
        users: a file with a column `user`; None: everybody the bundle knows.
        histories: a file with `user` and `history` (a list, or items separated by blanks), or with
            rows of `user`, `item` in order; for new users too. Not together with `users`.
        drop_seen: leave out what each user had.
        exact: search every item, not the index.
        progress: is given how many users are done, and of how many.

    Raises:
        ConfigError: both `users` and `histories`, k below 1, or `out` is a folder.
        DataError: a file cannot be read, or names no user.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; ask for at least 1.")
    if users is not None and histories is not None:
        raise ConfigError("Give a list of users or their histories, not both.")
    out = Path(out)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file for the candidates.")
    people = _people(recommender, users, histories)
    total = len(people.ids)
    parts = out.with_name(out.name + ".parts")
    step = max(1, min(PART, ANSWERS_AT_ONCE // max(1, min(k, len(recommender.bundle.rows)))))
    resumed = _take_up(parts, _digest(recommender, people, k, drop_seen, exact, step), total, step)
    progress(resumed, total)
    for start in range(resumed, total, step):
        rows = np.arange(start, min(start + step, total))
        part = people.take(rows)
        frame = candidate_frame(recommender.engine, part, k, drop_seen=drop_seen, exact=exact)
        frame = frame.drop("fallback")
        with atomic_write(parts / f"{start:012d}.parquet") as temporary:
            frame.write_parquet(
                temporary, compression="zstd", compression_level=1, statistics=False
            )
        progress(int(rows[-1]) + 1, total)
    with atomic_write(out) as temporary:
        # Streams part after part, so that the whole never stands in memory.
        files = sorted(parts.glob("[0-9]*.parquet"))
        pl.scan_parquet(files).sink_parquet(temporary, compression="zstd", maintain_order=True)
    shutil.rmtree(parts)
    return Written(out, total, people.unknown, resumed)


def _people(
    recommender: Recommender, users: str | Path | None, histories: str | Path | None
) -> People:
    bundle = recommender.bundle
    if users is not None:
        people = read_people(users, bundle, histories=False)
    elif histories is not None:
        people = read_people(histories, bundle, histories=True)
    else:
        return People(bundle.users.ids, np.arange(1, bundle.users.size), None)
    if not len(people.ids):
        raise DataError(f"{users or histories} names no user.")
    return people


def candidate_frame(
    engine: Engine, people: People, k: int, *, drop_seen: bool = True, exact: bool = False
) -> pl.DataFrame:
    """The best k items of each user: user, item, rank (1 is the best), score, fallback.

    Args:
        engine: answers.
        people: users, perhaps with histories.
        k: answers a user; fewer where there are fewer items.
        drop_seen: leave out what each user had.
        exact: search every item, not the index.
    """
    if people.history is None:
        queries = engine.inputs.queries(people.rows)
    else:
        queries = Queries(people.rows, people.history)
    rows, scores, popular = engine.recommend_rows(queries, k, exact=exact, drop_seen=drop_seen)
    found = rows >= 0
    user = np.repeat(np.arange(len(people.ids)), found.sum(1))
    rank = np.broadcast_to(np.arange(1, rows.shape[1] + 1, dtype=np.int32), rows.shape)[found]
    notes: list[str | None] = [None] * len(people.ids)
    for number in np.flatnonzero(popular).tolist():
        known = [] if people.rows[number] else [unknown_user(people.ids[number])]
        notes[number] = "; ".join([*known, NOTHING_KNOWN])
    return pl.DataFrame(
        {
            "user": people.ids.gather(user),
            "item": engine.model.bundle.items.decode(rows[found]),
            "rank": rank,
            "score": scores[found],
            "fallback": pl.Series(notes, dtype=pl.String).gather(user),
        }
    )


def _digest(
    recommender: Recommender, people: People, k: int, drop_seen: bool, exact: bool, step: int
) -> str:
    about = (step, k, drop_seen, exact, recommender.bundle.manifest["content"])
    history = Ragged.empty(0) if people.history is None else people.history
    return sha256_bytes(
        repr(about).encode(),
        "\0".join(people.ids.to_list()).encode(),
        history.offsets.tobytes(),
        history.values.tobytes(),
    )


def _take_up(parts: Path, digest: str, total: int, step: int) -> int:
    """How many users earlier parts have answered; parts of another question are removed."""
    about = parts / "about.json"
    try:
        same = json.loads(about.read_text())["digest"] == digest
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_json(about, {"digest": digest})
        return 0
    done = 0
    while (parts / f"{done:012d}.parquet").exists():
        done = min(done + step, total)
        if done == total:
            break
    return done
