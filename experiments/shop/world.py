"""A simulated shop with known tastes, position bias, skips and drift; nothing in it is real.

How somebody chooses here is a decision process over words, not a product of vectors. A shopper is
in the mood of one of two personas. A persona asks its questions in order: is it a kind of thing I
came for? of a style I like? of a material I like? The first "no" ends the walk, and how far it
came gives the chance of a click. A style that the persona cannot stand, or a finish, brand or flaw
that this very shopper cannot stand, ends it at once; a price above their ceiling nearly does.

The shop shows ten things of the kind that the shopper came for, by popularity and newness, without
knowing any dealbreaker: most of what somebody skips is attractive but for one word. They stand in
random order; the shopper walks down from the top and stops at some depth. What lies deeper was not
seen and says nothing.

Each request draws its mood and kind anew, so that earlier clicks of a session tell no more than
the shopper's tastes do, and `World.oracle` (which knows the tastes) cannot be beaten but by luck.

Legend: U users, N items, P personas, K kinds, R requests, Q queries.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys.errors import DataError, QueryError
from recsys.experiments.shop import words
from recsys.files import atomic_folder, canonical_json, read_json
from recsys.ragged import Ragged
from recsys.tables import DAY, SECOND

FORMAT = "recsys simulated world"
FORMAT_VERSION = 1
START = 1_709_251_200 * SECOND
"""The shop's first day: 2024-03-01 00:00 UTC."""

KIND_SHARES = (0.4, 0.3, 0.2, 0.1)
"""How often a persona comes for its first, second, third and fourth kind."""
CLICK = np.array([0.01, 0.5, 0.75, 0.95], np.float32)
"""Chance of a click on a seen item, by the number of questions that ended with "yes"."""
ACCIDENT = 0.008
"""Chance of a click in spite of a dealbreaker."""
TOO_DEAR = 0.15
"""Factor on the chance of a click above the shopper's price ceiling."""
FASHION = 1.3
"""Factor for the finish that is the fashion of these ten days."""
SAME_DEPARTMENT, ELSEWHERE = 0.08, 0.002
"""Weight on a page of what is not the kind looked for, relative to what is."""
FRONT_PAGE = 0.12
"""Share of requests that look for no kind at all and get the shop's front page."""
NEWNESS, NEW_DAYS = 2.0, 2.0
"""A new item weighs 1 + NEWNESS times its popularity on a page; this halves in NEW_DAYS."""
SEASON = 0.6
"""How far the demand for a department swings, up and down, in SEASON_DAYS."""
SEASON_DAYS = 24.0
PHONE_HASTE = 0.08
"""On a phone the chance of looking one item further down is smaller by this."""
DEVICE_SHARES = (0.55, 0.35, 0.10)
CHUNK = 4_000_000
"""Cells of a (queries, items) table that are worked on at once."""


@dataclass(frozen=True)
class World:
    """A simulated shop: what its log says, and what only the simulation can know.

    Args:
        impressions: request: Int64; user: String; time: Datetime (us, UTC); shown, clicked:
            List(String); position: List(Int32), 1 is the top; propensity: List(Float32), the
            chance that somebody of this patience on this device looks that far; device: String.
        items: item, title, description, category ("Department|kind"), brand: String;
            price: Float64; published: Datetime (us, UTC).
        truth: arrays of hidden facts, rows as in `items`, `users` and `impressions`.
        parameters: what `simulate` was called with.
    """

    impressions: pl.DataFrame
    items: pl.DataFrame
    truth: dict[str, np.ndarray]
    parameters: dict[str, float]

    @property
    def users(self) -> list[str]:
        """The ids of all U users, those who never came among them."""
        return words.numbered("u", len(self.truth["user_personas"]), 4)

    def write(self, folder: str | Path) -> Path:
        """Write impressions.parquet, items.parquet, truth.npz and world.json, or nothing."""
        folder = Path(folder)
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "simulated": True,
            "note": "Made by recsys simulate. No person, shop, brand or click in it is real. "
            "truth.npz holds the hidden tastes: it is for the oracle, never for a model.",
            "parameters": self.parameters,
            "counts": self.counts(),
        }
        with atomic_folder(folder) as temporary:
            self.impressions.write_parquet(temporary / "impressions.parquet")
            self.items.write_parquet(temporary / "items.parquet")
            facts: Any = self.truth
            np.savez(temporary / "truth.npz", **facts)
            (temporary / "world.json").write_text(canonical_json(about) + "\n", encoding="utf-8")
        return folder

    @staticmethod
    def load(folder: str | Path) -> World:
        """Open a world that `write` wrote.

        Raises:
            DataError: a file is missing, or this is no world of this format version.
        """
        folder = Path(folder)
        about = read_json(folder / "world.json")
        version = (about.get("format"), about.get("format_version"))
        if version != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"{folder}/world.json says format {version[0]!r} version {version[1]!r}, but this "
                f"reads {FORMAT!r} version {FORMAT_VERSION}. "
                f"Make it again: recsys simulate {folder}."
            )
        for name in ("impressions.parquet", "items.parquet", "truth.npz"):
            if not (folder / name).exists():
                again = f"Make it again: recsys simulate {folder}."
                raise DataError(f"The simulated world {folder} lacks {name}. {again}")
        try:
            with np.load(folder / "truth.npz", allow_pickle=False) as truth:
                facts = {name: truth[name] for name in truth.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{folder}/truth.npz is damaged ({error}). Make it again: recsys simulate {folder}."
            ) from None
        return World(
            pl.read_parquet(folder / "impressions.parquet"),
            pl.read_parquet(folder / "items.parquet"),
            facts,
            about["parameters"],
        )

    def counts(self) -> dict[str, int]:
        """How many users came, and how many items, requests, showings and clicks there are."""
        return {
            "users": self.impressions["user"].n_unique(),
            "items": len(self.items),
            "requests": len(self.impressions),
            "shown": int(self.impressions["shown"].list.len().sum()),
            "clicks": int(self.impressions["clicked"].list.len().sum()),
        }

    def oracle(
        self,
        users: Sequence[str],
        times: np.ndarray,
        item_ids: Sequence[str] | None = None,
        *,
        kind: Literal["clicks", "taste"] = "clicks",
    ) -> np.ndarray:
        """The true score of every item for a user at a time.

        "clicks" is the expected number of clicks on the item in one request of the user at that
        time: shown under the shop's known policy × looked at × chosen, over all moods, kinds,
        devices and places on the page. Clicks in the log are drawn from it, so ranking by it
        (after dropping what the user clicked before, which the shop never shows again) gives the
        best recall of logged clicks that is possible. "taste" is the chance of a click on the item
        when it is looked at: the best answer to "what would they like", whatever the shop shows.

        The chance to be among the ten shown is that of an exponential race stopped when ten are
        expected: 1 - exp(-weight × stop); in error by a few percent, the same for like items.

        Args:
            users: (Q,) ids.
            times: (Q,) int64 microseconds.
            item_ids: (N,) ids; None: all, in the order of `items`.
            kind: "clicks" or "taste".

        Returns:
            (Q, N) float32; -inf where the item is not published yet. Call it in chunks of Q.

        Raises:
            QueryError: an id is not of this world.
        """
        user = _rows(users, self.users, "user")
        item = np.arange(len(self.items))
        if item_ids is not None:
            item = _rows(item_ids, self.items["item"].to_list(), "item")
        times = np.asarray(times, np.int64)
        scores = np.empty((len(user), len(item)), np.float32)
        step = max(1, CHUNK // max(1, len(self.items)))
        for start in range(0, len(user), step):
            part = slice(start, start + step)
            scores[part] = self._oracle(user[part], times[part], kind)[:, item]
        return scores

    def best(
        self,
        users: Sequence[str],
        times: np.ndarray,
        k: int,
        *,
        exclude: Ragged | None = None,
        kind: Literal["clicks", "taste"] = "clicks",
    ) -> np.ndarray:
        """The oracle's first `k` rows of `items` for each query, best first.

        Args:
            exclude: Q rows of item rows never answered: what the user clicked before the time.

        Returns:
            (Q, k) int64, padded with -1 where fewer items are published.
        """
        k = min(k, len(self.items))
        answers = np.full((len(users), k), -1, np.int64)
        step = max(1, CHUNK // max(1, len(self.items)))
        for start in range(0, len(users), step):
            rows = np.arange(start, min(start + step, len(users)))
            scores = self.oracle(users[start : start + step], times[rows], kind=kind)
            if exclude is not None:
                seen = exclude.take(rows)
                scores[seen.row_of(), seen.values] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            empty = np.take_along_axis(scores, order, 1) == -np.inf
            answers[rows] = np.where(empty, -1, order)
        return answers

    def taste(self, user: str) -> dict[str, list[str] | float]:
        """What this user likes and cannot stand, in the words that stand in the item texts.

        Returns:
            kinds (most wanted first), styles, materials, finishes, brands: liked in some mood;
            avoided: styles, finishes, brands and flaws that end it at once;
            price_rank_ceiling: up to where in the prices of a kind they look.
        """
        t = self.truth
        u = int(_rows([user], self.users, "user")[0])
        personas = t["user_personas"][u]
        middle = np.array([START + int(self.parameters["days"]) * DAY // 2])
        mood = self.moods(np.array([u]), middle)[0]
        kinds = mood @ t["persona_kinds"][personas]
        # Materials are named of the departments that they come for, not of the whole shop.
        department = np.arange(len(words.MATERIALS)) // words.MATERIALS_EACH
        used = np.isin(department, words.DEPARTMENT_OF_KIND[kinds > 0])
        avoided = _named(words.STYLES, t["persona_avoids_style"][personas[0]])
        avoided += _named(words.FINISHES, t["user_avoids_finish"][u])
        avoided += _named(words.BRANDS, t["user_avoids_brand"][u])
        avoided += _named(words.FLAWS, t["user_avoids_flaw"][u])
        return {
            "kinds": [words.KINDS[k] for k in np.argsort(-kinds, kind="stable") if kinds[k] > 0],
            "styles": _named(words.STYLES, t["persona_styles"][personas].any(0)),
            "materials": _named(words.MATERIALS, t["persona_materials"][personas].any(0) & used),
            "finishes": _named(words.FINISHES, ~t["user_avoids_finish"][u]),
            "brands": _named(words.BRANDS, t["user_brands"][u]),
            "avoided": avoided,
            "price_rank_ceiling": float(t["user_ceiling"][u]),
        }

    def moods(self, user: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(Q, 2) chance of each of the user's two personas; some turn over within a few days."""
        days = (times - START) / DAY
        turn = self.truth["user_turn_day"][user]
        first, last = self.truth["user_first_share"][user].T
        share = first + (last - first) / (1 + np.exp(-np.clip(days - turn, -30, 30)))
        return np.stack([share, 1 - share], axis=1).astype(np.float32)

    def kinds(self, persona: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(Q, K) chance that somebody in the mood of `persona` comes for each kind; seasons."""
        phase = np.arange(len(words.DEPARTMENTS)) / len(words.DEPARTMENTS)
        turn = (times[:, None] - START) / DAY / SEASON_DAYS + phase
        demand = (1 + SEASON * np.sin(2 * np.pi * turn))[:, words.DEPARTMENT_OF_KIND]
        demand = demand * self.truth["persona_kinds"][persona]
        return (demand / demand.sum(1, keepdims=True)).astype(np.float32)

    def weights(self, times: np.ndarray) -> np.ndarray:
        """(Q, N) weight of each item on a page: popularity and newness, 0 when unpublished."""
        age = (times[:, None] - self.truth["item_published"][None, :]).astype(np.float32) / DAY
        new = 1 + NEWNESS * np.exp2(-np.maximum(age, 0) / NEW_DAYS)
        return np.where(age >= 0, new * self.truth["item_popularity"], 0)

    @cached_property
    def nearness(self) -> np.ndarray:
        """(K + 1, N) factor on a page for somebody who came for a kind; the last row: for none."""
        kind = self.truth["item_kind"]
        wanted = np.arange(len(words.KINDS))[:, None]
        department = words.DEPARTMENT_OF_KIND
        near = np.where(department[wanted] == department[kind], SAME_DEPARTMENT, ELSEWHERE)
        near = np.where(wanted == kind, 1.0, near)
        return np.vstack([near, np.ones((1, len(kind)))]).astype(np.float32)

    @cached_property
    def _levels(self) -> np.ndarray:
        """(P, N) int8 how many of a persona's questions end with yes; -1: a style it avoids."""
        t = self.truth
        kind = t["persona_kinds"][:, t["item_kind"]] > 0
        style = kind & t["persona_styles"][:, t["item_style"]]
        material = style & t["persona_materials"][:, t["item_material"]]
        avoided = t["persona_avoids_style"][:, t["item_style"]]
        levels = kind.astype(np.int8) + style + material
        return np.where(avoided, np.int8(-1), levels).astype(np.int8)

    def chance(
        self, user: np.ndarray, persona: np.ndarray, times: np.ndarray, item: np.ndarray
    ) -> np.ndarray:
        """Chance of a click on an item that is looked at; all arguments broadcast.

        Args:
            user, persona, item: rows.
            times: int64 microseconds.
        """
        t = self.truth
        brand, finish = t["item_brand"][item], t["item_finish"][item]
        level = self._levels[persona, item]
        level = np.where(level > 0, np.minimum(level + t["user_brands"][user, brand], 3), level)
        chance = CLICK[np.maximum(level, 0)] * t["item_quality"][item]
        fashion = t["fashion"][np.clip((times - START) // (10 * DAY), 0, len(t["fashion"]) - 1)]
        chance = chance * np.where(fashion == finish, np.float32(FASHION), np.float32(1))
        dear = t["item_price_rank"][item] > t["user_ceiling"][user]
        chance = np.where(dear, chance * np.float32(TOO_DEAR), chance)
        avoided = t["user_avoids_brand"][user, brand] | t["user_avoids_finish"][user, finish]
        avoided |= t["user_avoids_flaw"][user, t["item_flaw"][item]]
        chance = np.where(avoided | (level < 0), np.float32(ACCIDENT), chance)
        return np.minimum(chance, np.float32(0.97))

    @cached_property
    def _stops(self) -> np.ndarray:
        """(days + 1, K + 1) where the race stops, by day and kind: when the page is full."""
        days = int(self.parameters["days"])
        page = float(self.parameters["page"])
        noon = START + np.arange(days + 1) * DAY + DAY // 2
        weights = self.weights(noon).astype(np.float64)
        stops = np.empty((len(noon), len(self.nearness)))
        for kind, near in enumerate(self.nearness):
            rate = weights * near
            room = np.minimum(page, 0.999 * (rate > 0).sum(1))
            stop = room / np.maximum(rate.sum(1), 1e-30)
            for _ in range(12):  # Newton from the left on a concave function never overshoots
                kept = np.exp(-rate * stop[:, None])
                slope = np.maximum((rate * kept).sum(1), 1e-30)
                stop = (
                    stop + (room - (rate > 0).sum(1) + np.where(rate > 0, kept, 0).sum(1)) / slope
                )
            stops[:, kind] = stop
        return stops.astype(np.float32)

    def _oracle(self, user: np.ndarray, times: np.ndarray, kind: str) -> np.ndarray:
        weights = self.weights(times)  # (Q, N)
        moods = self.moods(user, times)  # (Q, 2)
        item = np.arange(len(self.items))[None, :]
        day = np.clip((times - START) // DAY, 0, len(self._stops) - 1)
        front = -np.expm1(-weights * self._stops[day, -1, None])
        scores = np.zeros(weights.shape, np.float32)
        for mood in range(2):
            persona = self.truth["user_personas"][user, mood]
            chance = self.chance(user[:, None], persona[:, None], times[:, None], item)
            if kind == "clicks":
                shown = FRONT_PAGE * front
                wanted = self.kinds(persona, times)  # (Q, K)
                # Each persona comes for a few kinds only: its kinds in order, then their chances.
                few = np.argsort(-wanted, axis=1, kind="stable")[:, : len(KIND_SHARES)]
                for place in range(few.shape[1]):
                    k = few[:, place]
                    stop = self._stops[day, k]
                    near = self.nearness[k]
                    share = (1 - FRONT_PAGE) * np.take_along_axis(wanted, k[:, None], 1)
                    shown += share * -np.expm1(-weights * near * stop[:, None])
                chance = chance * shown
            scores += moods[:, mood, None] * chance
        if kind == "clicks":
            scores *= self._looks(user)[:, None]
        return np.where(weights > 0, scores, -np.inf).astype(np.float32)

    def _looks(self, user: np.ndarray) -> np.ndarray:
        """(Q,) chance that a place on the page is looked at, over places and devices."""
        depth = np.arange(int(self.parameters["page"]))
        further = self.truth["user_patience"][user][:, None] - np.array([PHONE_HASTE, 0, 0])
        looks = (further[:, :, None] ** depth).mean(2)
        return (looks @ np.array(DEVICE_SHARES)).astype(np.float32)


def _rows(ids: Sequence[str], known: list[str], what: str) -> np.ndarray:
    place = {name: row for row, name in enumerate(known)}
    unknown = next((name for name in ids if name not in place), None)
    if unknown is not None:
        raise QueryError(
            f"There is no {what} {unknown!r} in this simulated world; "
            f"its {what}s run from {known[0]!r} to {known[-1]!r}."
        )
    return np.fromiter((place[name] for name in ids), np.int64, len(ids))


def _named(names: tuple[str, ...], chosen: np.ndarray) -> list[str]:
    return [name for name, yes in zip(names, chosen, strict=True) if yes]
