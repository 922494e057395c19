"""Simulate the shop of `recsys.experiments.shop.world`, and plain logs of any size.

Legend: U users, N items, P personas, R requests, L things on a page.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from recsys.errors import ConfigError
from recsys.experiments.shop import words
from recsys.experiments.shop.world import (
    CHUNK,
    DEVICE_SHARES,
    FRONT_PAGE,
    KIND_SHARES,
    PHONE_HASTE,
    START,
    World,
)
from recsys.tables import DAY, SECOND

__all__ = ["World", "simulate", "simulate_events"]

SCENES, CHARACTERS = 6, 4
"""What people come for, and what they like whatever they come for; a persona is one of each."""
LIKED_STYLES, AVOIDED_STYLES = 3, 2
FLAWED, TOLERANCE = 0.1, 0.1
"""Share of the items that have a flaw; share of the users who do not mind it."""
OWN_FINISHES, OWN_BRANDS = 7, 1
"""How many finishes and brands each user cannot stand, of 10 and of 16."""
PAST_DAYS = 60
"""Items of before the first day were published within so many days."""
NEW_ITEMS = 0.4
"""Share of the items that are published while the log runs."""
EARLY_USERS = 0.5
"""Share of the users who are there from the first day; the others arrive evenly."""
TURNING_USERS = 0.35
"""Share of the users whose main persona changes while the log runs."""
HOURS = np.array(
    [2, 1, 1, 1, 1, 2, 4, 7, 9, 9, 9, 10, 12, 11, 9, 9, 10, 12, 15, 19, 21, 19, 12, 6], float
)
"""How busy the shop is, by hour of the day."""


def simulate(
    *,
    users: int = 2000,
    items: int = 1500,
    days: int = 30,
    requests_per_user: float = 40.0,
    page: int = 10,
    popularity_skew: float = 0.5,
    seed: int = 0,
) -> World:
    """A simulated shop with known tastes; the same arguments give the same world.

    Args:
        users: how many people may come; some of the light ones never do.
        items: how many things there are, 40 % of them published while the log runs.
        days: length of the log.
        requests_per_user: pages a user sees, on average; a few users see ten times as many.
        page: things on a page.
        popularity_skew: exponent of Zipf's law for how readily the shop shows a thing.
        seed: of all randomness.

    Raises:
        ConfigError: an argument is out of its range.
    """
    given = {"users": users, "items": items, "days": days, "page": page, "seed": seed}
    _check(given, requests_per_user=requests_per_user, popularity_skew=popularity_skew)
    item_rng, user_rng, request_rng, page_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4)
    )
    catalog, truth = _items(item_rng, items, days, popularity_skew)
    truth |= _personas(user_rng) | _users(user_rng, users, days)
    parameters = given | {
        "requests_per_user": requests_per_user,
        "popularity_skew": popularity_skew,
    }
    empty = World(pl.DataFrame(), catalog, truth, parameters)
    user, time = _requests(request_rng, truth, days, requests_per_user)
    impressions, hidden = _pages(page_rng, empty, user, time)
    return World(impressions, catalog, truth | hidden, parameters)


def simulate_events(
    rows: int, *, users: int = 200_000, items: int = 100_000, seed: int = 0, skew: float = 0.9
) -> pl.DataFrame:
    """A plain simulated event log for benchmarks: Zipf users and items, no tastes, in time order.

    Args:
        rows: how many events; made in chunks, a million at a time.
        skew: Zipf exponent of items; users are half as skewed.

    Returns:
        user, item: String; time: Datetime (us, UTC); event: String (view, cart or buy).
    """
    given = {"rows": rows, "users": users, "items": items, "seed": seed}
    _check(given, popularity_skew=skew)
    rng = np.random.default_rng(seed)
    user_ids = pl.Series(words.numbered("u", users, 7))
    item_ids = pl.Series(words.numbered("i", items, 7))
    event_ids = pl.Series(["view", "cart", "buy"])
    # Who is popular has nothing to do with the number in the id.
    user_order, item_order = rng.permutation(users), rng.permutation(items)
    user_steps, item_steps = _zipf_steps(users, skew / 2), _zipf_steps(items, skew)
    gap = 30 * DAY / rows  # one clock for all chunks: events lie evenly over 30 days
    parts = []
    for start in range(0, rows, 1_000_000):
        n = min(1_000_000, rows - start)
        user = user_order[_draw(user_steps, rng.random(n))]
        item = item_order[_draw(item_steps, rng.random(n))]
        time = START + ((start + np.arange(n) + rng.random(n)) * gap).astype(np.int64)
        event = np.searchsorted([0.7, 0.9], rng.random(n))
        part = {"user": user_ids.gather(user), "item": item_ids.gather(item)}
        part |= {"time": _clock(time), "event": event_ids.gather(event)}
        parts.append(pl.DataFrame(part))
    return pl.concat(parts)


def _check(whole: dict[str, int], **positive: float) -> None:
    for name, value in whole.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ConfigError(
                f"{name} is {value!r}, but must be a whole number of {least} or more."
            )
    for name, number in positive.items():
        if not 0 <= number < np.inf:
            raise ConfigError(f"{name} is {number!r}, but must be a finite number of 0 or more.")


def _clock(time: np.ndarray) -> pl.Series:
    return pl.Series(time).cast(pl.Datetime("us", "UTC"))


def _zipf_steps(count: int, skew: float) -> np.ndarray:
    steps = np.cumsum(np.arange(1, count + 1, dtype=float) ** -skew)
    return steps / steps[-1]


def _draw(steps: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Where each uniform number falls among the steps; never behind the last."""
    return np.minimum(np.searchsorted(steps, uniform, side="right"), len(steps) - 1)


def _busy_hours(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) int64 microseconds since midnight, as busy as the hours are."""
    hour = _draw(np.cumsum(HOURS) / HOURS.sum(), rng.random(count))
    return ((hour + rng.random(count)) * 3600 * SECOND).astype(np.int64)


def _items(
    rng: np.random.Generator, count: int, days: int, skew: float
) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """The item table in order of publication, and what is true of the items."""
    kinds, departments = len(words.KINDS), words.DEPARTMENT_OF_KIND
    kind = rng.integers(0, kinds, count)
    material = departments[kind] * words.MATERIALS_EACH
    material = material + rng.integers(0, words.MATERIALS_EACH, count)
    style = rng.integers(0, len(words.STYLES), count)
    finish = rng.integers(0, len(words.FINISHES), count)
    brand = _draw(_zipf_steps(len(words.BRANDS), 0.5), rng.random(count))
    brand = (brand + 5 * departments[kind]) % len(words.BRANDS)  # each department has its own star
    material_price = rng.lognormal(0.0, 0.35, len(words.MATERIALS))[material]
    price = words.PRICE_OF_DEPARTMENT[departments[kind]] * material_price
    price = np.round(price * rng.lognormal(0.0, 0.3, count), 2)
    price_rank = _rank_within(price, kind)
    band = np.minimum((price_rank * len(words.BANDS)).astype(np.int64), len(words.BANDS) - 1)
    flaw = rng.integers(1, len(words.FLAWS), count) * (rng.random(count) < FLAWED)
    new = rng.random(count) < NEW_ITEMS
    day = np.where(new, rng.integers(0, days, count), rng.integers(-PAST_DAYS, 0, count))
    published = np.sort(START + day * DAY + _busy_hours(rng, count))
    popularity = rng.permutation(np.arange(1, count + 1, dtype=float) ** -skew)
    table = words.write_items(
        kind, material, style, finish, brand, band, flaw, rng.integers(0, 1 << 20, (count, 3))
    )
    table = table.with_columns(price=price, published=_clock(published))
    table = table.insert_column(0, pl.Series("item", words.numbered("i", count, 5)))
    return table, {
        "item_kind": kind,
        "item_material": material,
        "item_style": style,
        "item_finish": finish,
        "item_brand": brand,
        "item_flaw": flaw,
        "item_price_rank": price_rank.astype(np.float32),
        "item_published": published,
        "item_popularity": (popularity / popularity.mean()).astype(np.float32),
        "item_quality": rng.uniform(0.7, 1.3, count).astype(np.float32),
        "fashion": rng.integers(0, len(words.FINISHES), days // 10 + 1),
    }


def _rank_within(value: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(N,) share of the group that is cheaper, in [0, 1)."""
    frame = pl.DataFrame({"value": value, "group": group})
    rank = (pl.col("value").rank("ordinal") - 1) / pl.len()
    return frame.select(rank.over("group").alias("rank"))["rank"].to_numpy()


def _ranks(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """(rows, width) each row 0 to width - 1 in random order."""
    return rng.random((rows, width)).argsort(1)


def _personas(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """P personas: every scene (the kinds they come for) with every character (their taste).

    Characters meet at the same kinds and cannot stand different things there: what is popular with
    one is skipped by the next, and only the skips say so outright.
    """
    scene, character = np.divmod(np.arange(SCENES * CHARACTERS), CHARACTERS)
    # Deal the kinds out evenly, so that none is everybody's and none is nobody's.
    dealt = rng.permutation(len(words.KINDS)).reshape(SCENES, len(KIND_SHARES))
    wanted = np.zeros((SCENES, len(words.KINDS)), np.float32)
    wanted[np.arange(SCENES)[:, None], dealt] = KIND_SHARES
    style = _ranks(rng, CHARACTERS, len(words.STYLES))
    materials = _ranks(rng, CHARACTERS * len(words.DEPARTMENTS), words.MATERIALS_EACH) < 2
    return {
        "persona_kinds": wanted[scene],
        "persona_styles": (style < LIKED_STYLES)[character],
        "persona_avoids_style": (style >= len(words.STYLES) - AVOIDED_STYLES)[character],
        "persona_materials": materials.reshape(CHARACTERS, -1)[character],
    }


def _users(rng: np.random.Generator, count: int, days: int) -> dict[str, np.ndarray]:
    """U users: their two personas and when they turn, quirks, patience, diligence, arrival."""
    character = rng.integers(0, CHARACTERS, count)
    first = rng.integers(0, SCENES, count)
    second = (first + rng.integers(1, SCENES, count)) % SCENES
    personas = np.stack([first, second], axis=1) * CHARACTERS + character[:, None]
    share = np.repeat(rng.uniform(0.75, 0.95, count)[:, None], 2, axis=1)
    turning = rng.random(count) < TURNING_USERS
    share[turning, 1] = rng.uniform(0.1, 0.4, turning.sum())
    brands = _ranks(rng, count, len(words.BRANDS))
    avoids_flaw = rng.random((count, len(words.FLAWS))) >= TOLERANCE
    avoids_flaw[:, 0] = False
    arrival = np.where(rng.random(count) < EARLY_USERS, 0.0, rng.random(count) * days)
    return {
        "user_personas": personas,
        "user_first_share": share,
        "user_turn_day": rng.uniform(0.2, 0.8, count) * days,
        "user_brands": brands < 2,
        "user_avoids_brand": brands >= len(words.BRANDS) - OWN_BRANDS,
        "user_avoids_finish": _ranks(rng, count, len(words.FINISHES)) < OWN_FINISHES,
        "user_avoids_flaw": avoids_flaw,
        "user_ceiling": rng.uniform(0.7, 1.6, count).astype(np.float32),
        "user_patience": rng.uniform(0.85, 0.97, count),
        "user_arrival_day": arrival,
        "user_diligence": rng.lognormal(0.0, 0.9, count),
    }


def _requests(
    rng: np.random.Generator, truth: dict[str, np.ndarray], days: int, per_user: float
) -> tuple[np.ndarray, np.ndarray]:
    """User and time of R requests in order of time: sessions of one page or several."""
    here = (days - truth["user_arrival_day"]) / days * truth["user_diligence"]
    pages_a_session = 2.5
    sessions = rng.poisson(here / here.mean() * per_user / pages_a_session)
    user = np.repeat(np.arange(len(sessions)), sessions)
    arrival = truth["user_arrival_day"][user]
    day = (arrival + rng.random(len(user)) * (days - arrival)).astype(np.int64)
    start = START + np.minimum(day, days - 1) * DAY + _busy_hours(rng, len(user))
    pages = rng.geometric(1 / pages_a_session, len(user))
    session = np.repeat(np.arange(len(user)), pages)
    gap = (20 * SECOND + rng.exponential(60 * SECOND, len(session))).astype(np.int64)
    passed = np.cumsum(gap)
    first = np.cumsum(pages) - pages
    time = start[session] + passed - passed[first][session]
    user = user[session]
    order = np.lexsort((np.arange(len(time)), user, time))
    order = order[time[order] < START + days * DAY]
    return user[order], time[order]


def _pages(
    rng: np.random.Generator, world: World, user: np.ndarray, time: np.ndarray
) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """What each request was shown and what was chosen.

    Round by round: the first page of every user, then the second, …: what somebody has clicked is
    not shown to them again, and nothing else ties the pages together.
    """
    truth, length = world.truth, int(world.parameters["page"])
    items = len(world.items)
    requests = len(user)
    persona, kind = _intents(rng, world, user, time)
    device = _draw(np.cumsum(DEVICE_SHARES), rng.random(requests))
    further = truth["user_patience"][user] - PHONE_HASTE * (device == 0)
    depth = rng.geometric(1 - further)  # places that are looked at, from the top
    shown = np.full((requests, length), -1, np.int64)
    clicked = np.zeros((requests, length), bool)
    taken = np.zeros((len(truth["user_personas"]), items), bool)
    step = max(1, CHUNK // items)
    for rows in _rounds(user):
        for start in range(0, len(rows), step):
            r = rows[start : start + step]
            weight = world.weights(time[r]) * world.nearness[kind[r]]
            weight[taken[user[r]]] = 0
            page = _race(rng, weight, length)  # (r, L), -1 where nothing is left to show
            chance = world.chance(user[r, None], persona[r, None], time[r, None], page)
            yes = rng.random(page.shape) < chance
            yes &= (np.arange(page.shape[1]) < depth[r, None]) & (page >= 0)
            shown[r, : page.shape[1]] = page
            clicked[r, : page.shape[1]] = yes
            chosen = np.nonzero(yes)
            taken[user[r][chosen[0]], page[chosen]] = True
    looks = further[:, None] ** np.arange(length)
    frame = _table(world, user, time, device, shown, clicked, looks)
    hidden = {
        "request_depth": np.minimum(depth, 1 << 14).astype(np.int16),
        "request_persona": persona.astype(np.int8),
        "request_kind": kind.astype(np.int8),
    }
    return frame, hidden


def _intents(
    rng: np.random.Generator, world: World, user: np.ndarray, time: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The persona of each request and the kind it came for (K: none, the front page)."""
    mood = (rng.random(len(user)) >= world.moods(user, time)[:, 0]).astype(np.int64)
    persona = world.truth["user_personas"][user, mood]
    steps = np.cumsum(world.kinds(persona, time), axis=1)
    kind = (rng.random(len(user))[:, None] * steps[:, -1:] >= steps).sum(1)
    kind = np.minimum(kind, len(words.KINDS) - 1)
    return persona, np.where(rng.random(len(user)) < FRONT_PAGE, len(words.KINDS), kind)


def _rounds(user: np.ndarray) -> list[np.ndarray]:
    """The requests that are their users' first, second, …; requests are in order of time."""
    frame = pl.DataFrame({"user": user}).select(nth=pl.int_range(pl.len()).over("user"))
    nth = frame["nth"].to_numpy()
    order = np.argsort(nth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(nth))[:-1]) if len(user) else []


def _race(rng: np.random.Generator, weight: np.ndarray, length: int) -> np.ndarray:
    """Draw without replacement by weight (the first to arrive), then shuffle the places."""
    arrival = np.full(weight.shape, np.inf, np.float32)
    np.divide(rng.standard_exponential(weight.shape, np.float32), weight, arrival, where=weight > 0)
    length = min(length, weight.shape[1])
    first = np.argpartition(arrival, length - 1, axis=1)[:, :length]
    missing = ~np.isfinite(np.take_along_axis(arrival, first, 1))
    place = np.where(missing, 2, rng.random(first.shape)).argsort(1)
    return np.take_along_axis(np.where(missing, -1, first), place, 1)


def _table(
    world: World,
    user: np.ndarray,
    time: np.ndarray,
    device: np.ndarray,
    shown: np.ndarray,
    clicked: np.ndarray,
    looks: np.ndarray,
) -> pl.DataFrame:
    """The impression lists as the log tells them."""
    there = shown >= 0
    request, place = np.nonzero(there)
    flat = pl.DataFrame(
        {
            "request": request,
            "shown": world.items["item"].gather(shown[there]),
            "position": (place + 1).astype(np.int32),
            "propensity": looks[there].astype(np.float32),
            "yes": clicked[there],
        }
    )
    lists = flat.group_by("request", maintain_order=True).agg(
        "shown", pl.col("shown").filter("yes").alias("clicked"), "position", "propensity"
    )
    log = pl.DataFrame(
        {
            "request": np.arange(len(user)),
            "user": pl.Series(world.users, dtype=pl.String).gather(user),
            "time": _clock(time),
            "device": pl.Series(words.DEVICES).gather(device),
        }
    )
    empty = [pl.col(c).fill_null([]) for c in ("shown", "clicked", "position", "propensity")]
    log = log.join(lists, on="request", how="left", maintain_order="left").with_columns(empty)
    names = ("request", "user", "time", "shown", "clicked", "position", "propensity", "device")
    return log.select(names)
