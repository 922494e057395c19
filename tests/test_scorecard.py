"""The scorecard: who is judged on what, what each query may know, and what is said of it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError
from recsys.experiments.evaluation.comparison import Baselines, Ranking, rank
from recsys.experiments.evaluation.evaluate import (
    test_side as later_side,  # the name is not that of a test
)
from recsys.experiments.evaluation.queries import EvaluateRules, questions_of, without_later_events
from recsys.experiments.evaluation.scorecard import judge, slices, verdict
from recsys.features.batching.batch import Queries
from recsys.features.batching.examples import Questions
from recsys.ragged import Ragged
from recsys.serving.later_events import Later, extend
from recsys.serving.recommender import Recommender
from recsys.towers.encode import encode_users

HOUR = 3_600_000_000


@pytest.fixture(scope="module")
def trader(plain: Any) -> Recommender:
    return Recommender.load(plain.bundle)


@pytest.fixture(scope="module")
def shopkeeper(tiny: Any) -> Recommender:
    return Recommender.load(tiny.bundle)


def _ranking(
    recommender: Recommender, later: Later, rules: EvaluateRules, each_event: bool = True
) -> tuple[dict[str, dict[tuple[str, int], list[str]]], dict[tuple[str, int], list[str]]]:
    """Name → (user, time) → answered ids; and (user, time) → targets."""
    past = recommender.bundle.timeline
    bundle, coded = extend(recommender.bundle, later)
    if not each_event:
        bundle = without_later_events(bundle, past)
    extended = Recommender(bundle)
    questions, as_of_times = questions_of(bundle, coded, rules, each_event=each_event, seed=0)
    cold = np.arange(bundle.items.size) > recommender.bundle.manifest["warm_items"]
    baselines = Baselines(extended, past)
    found = rank(extended, baselines, questions, as_of_times, rules, cold)
    users = bundle.users.decode(questions.queries.users).to_list()
    times = questions.queries.times
    keys = list(zip(users, [0] * len(users) if times is None else times.tolist(), strict=True))
    answers = {
        name: {
            key: [i for i in bundle.items.decode(row).to_list() if i is not None]
            for key, row in zip(keys, ranked, strict=True)
        }
        for name, ranked in found.ranked.items()
    }
    targets = {
        key: bundle.items.decode(questions.targets[q]).to_list() for q, key in enumerate(keys)
    }
    return answers, targets


# --- a slow twin on event rows --------------------------------------------------------------------


def _slow(recommender: Recommender, events: pl.DataFrame, cutoff: int) -> dict[str, Any]:
    """Recall and hit rate at 5 of popularity and the towers, one query at a time."""
    bundle = recommender.bundle
    rows = list(events.select("user", "item", "t").iter_rows())
    known = set(bundle.items.ids.to_list())
    queries: dict[tuple[str, int], list[str]] = {}
    for user, item, t in rows:
        if t >= cutoff:
            queries.setdefault((user, t), []).append(item)
    values: dict[str, list[float]] = {"popularity": [], "model": []}
    users, repeats = [], 0
    order = {item: n for n, item in enumerate(bundle.items.ids.to_list())}
    for (user, t), chosen in queries.items():
        had = [i for u, i, s in rows if u == user and s < t]
        repeats += sum(i in had for i in chosen)
        targets = {i for i in chosen if i not in had}
        if not targets:
            continue
        as_of = t // HOUR * HOUR
        counts = Counter(i for _, i, s in rows if s < as_of)
        offered = [
            i for i in known - set(had)
            if (i != "i05") and i != "i06" and (i != "i07" or as_of >= recommender_from(bundle))
        ]  # fmt: skip
        popular = sorted(offered, key=lambda i: (-counts[i], order[i]))[:5]
        history = bundle.items.encode([i for i in had if i in known][-50:]).astype(np.int64)
        row = bundle.users.encode([user]).astype(np.int64)
        vector = encode_users(bundle.model, Queries(row, Ragged.from_lists([history])))[0]
        score = {i: float(bundle.vectors[order[i] + 1] @ vector) for i in offered}
        best = sorted(offered, key=lambda i: (-score[i], order[i]))[:5]
        values["popularity"].append(len(targets & set(popular)) / len(targets))
        values["model"].append(len(targets & set(best)) / len(targets))
        users.append(user)
    return {"values": values, "users": users, "repeats": repeats}


def recommender_from(bundle: Any) -> int:
    return int(bundle.window[int(bundle.items.encode(["i07"])[0]), 0])


def test_the_scorecard_is_what_a_slow_twin_counts(
    trader: Recommender, plain: Any, market: Any
) -> None:
    """History strictly before, unknown items missed, repeats left out, every test user judged."""
    events = pl.read_csv(market / "events.csv").with_columns(t=pl.col("time") * 1_000_000)
    slow = _slow(trader, events, plain.dataset.test_from)
    card = judge(
        trader, later_side(plain.dataset), plain.config.evaluate, each_event=True, protocol={}
    )
    for name, found in (("model", card["model"]), ("popularity", card["baselines"]["popularity"])):
        assert found["recall_at_5"]["value"] == pytest.approx(np.mean(slow["values"][name]))
    said = card["protocol"]
    assert said["queries_judged"] == len(slow["users"])
    assert said["users_judged"] == len(set(slow["users"]))
    assert said["repeats_left_out"] == slow["repeats"] > 0
    assert said["queries"] == "each event"
    # i39 came after the cut-off: a target all the same, and nobody can hit it.
    answers, targets = _ranking(trader, later_side(plain.dataset), plain.config.evaluate)
    assert any("i39" in chosen for chosen in targets.values())
    for lists in answers.values():
        assert not any("i39" in found for found in lists.values())


def test_everybody_ranks_the_same_items_and_none_that_was_had(
    trader: Recommender, plain: Any
) -> None:
    rules = plain.config.evaluate.model_copy(update={"ks": (50,)})  # more than there are
    answers, _ = _ranking(trader, later_side(plain.dataset), rules)
    assert set(answers) == {
        "model", "popularity", "recent_popularity", "newest", "co_occurrence", "text",
    }  # fmt: skip
    for key, ours in answers["model"].items():
        assert len(ours) == len(set(ours)) > 10
        for name, lists in answers.items():
            assert sorted(lists[key]) == sorted(ours), name


# --- nothing is known too early -------------------------------------------------------------------


def _scrambled(later: Later, keep: np.ndarray, seed: int = 1) -> Later:
    """The same positives and requests, with other items wherever `keep` is false."""
    rng = np.random.default_rng(seed)
    pool = later.item.unique(maintain_order=True)
    other = pool.gather(rng.integers(0, len(pool), len(later.item)))
    item = pl.select(pl.when(pl.Series(keep)).then(later.item).otherwise(other)).to_series()
    return replace(later, item=item.alias("item"))


@pytest.mark.parametrize("world", ["trader", "shopkeeper"])
def test_a_query_sees_nothing_at_or_after_its_time(
    world: str, request: pytest.FixtureRequest, plain: Any, tiny: Any
) -> None:
    """Other events at and after a moment leave every answer up to it as it was."""
    recommender, built = (
        request.getfixturevalue(world),
        {"trader": plain, "shopkeeper": tiny}[world],
    )
    later, rules = later_side(built.dataset), built.config.evaluate
    as_of = int(np.quantile(later.time, 0.5))
    changed = _scrambled(later, later.time < as_of)
    if later.requests is not None:
        asked = later.requests
        rng = np.random.default_rng(2)
        late = np.repeat(asked.time >= as_of, asked.shown.lengths)
        other = rng.permutation(len(late))
        values = np.where(late, asked.shown.values[other], asked.shown.values)
        changed = replace(
            changed, requests=replace(asked, shown=Ragged(asked.shown.offsets, values))
        )
    before, _ = _ranking(recommender, later, rules)
    after, _ = _ranking(recommender, changed, rules)
    same = [key for key in before["model"] if key[1] <= as_of and key in after["model"]]
    assert len(same) > 10
    for name in before:
        for key in same:
            assert before[name][key] == after[name][key], (name, key)
    rest = [key for key in before["model"] if key[1] > as_of and key in after["model"]]
    assert any(before["popularity"][key] != after["popularity"][key] for key in rest)


@pytest.mark.parametrize("world", ["trader", "shopkeeper"])
def test_at_one_cut_off_nothing_of_the_later_log_is_known(
    world: str, request: pytest.FixtureRequest, plain: Any, tiny: Any
) -> None:
    recommender, built = (
        request.getfixturevalue(world),
        {"trader": plain, "shopkeeper": tiny}[world],
    )
    later, rules = later_side(built.dataset), built.config.evaluate
    before, targets = _ranking(recommender, later, rules, each_event=False)
    changed = _scrambled(later, np.zeros(len(later.time), bool))
    after, _ = _ranking(recommender, changed, rules, each_event=False)
    cutoff = recommender.bundle.cutoff
    assert {time for _, time in before["model"]} == {cutoff}
    both = set(before["model"]) & set(after["model"])
    assert len(both) > 10
    for name in before:
        for key in both:
            assert before[name][key] == after[name][key], (name, key)
    assert sum(len(t) for t in targets.values()) > len(targets)  # several targets a user
    # What was shown is scored with the past of the cut-off, too.
    card = judge(recommender, later, rules, each_event=False, protocol={})
    if card["impressions"]:
        late = replace(later.requests, time=later.requests.time + 20 * HOUR)
        other = judge(
            recommender, replace(later, requests=late), rules, each_event=False, protocol={}
        )
        assert other["impressions"] == card["impressions"]
    assert card["protocol"]["queries"] == "one cut-off"
    assert card["protocol"]["refresh"] == "once, at the cut-off"


def test_an_item_exists_only_after_the_event_that_it_came_with(trader: Recommender) -> None:
    """Not at its very time: "it is there" would give the answer away."""
    cutoff = trader.bundle.cutoff
    later = Later(
        pl.Series(["u01", "u02"]),
        pl.Series(["fresh", "i00"]),
        np.array([cutoff, cutoff + 10]),
        np.empty((2, 0), np.int64),
    )
    bundle, _ = extend(trader.bundle, later)
    row = int(bundle.items.encode(["fresh"])[0])
    assert not bundle.timeline.alive(cutoff)[row] and bundle.timeline.alive(cutoff + 1)[row]
    rules = EvaluateRules(ks=(5,), primary="recall_at_5")
    newest = Baselines(Recommender(bundle), trader.bundle.timeline, rules).at(cutoff)["newest"]
    assert newest.scores[row] == newest.scores[1:].min()


def test_an_item_shown_for_the_first_time_is_the_newest_of_what_was_shown(
    shopkeeper: Recommender,
) -> None:
    bundle = shopkeeper.bundle
    as_of = int(np.median(bundle.timeline.first_seen[1:]))
    rules = EvaluateRules(ks=(5,), primary="recall_at_5")
    newest = Baselines(shopkeeper, bundle.timeline, rules).at(as_of, shown=True)["newest"]
    unmet = bundle.timeline.first_seen >= as_of
    unmet[0] = False
    assert unmet.any() and (newest.scores[unmet] == newest.scores.max()).all()


# --- without a clock ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adjacency(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LightGCN lists: no order, a given split. Items 0 to 9 for even users, 10 to 19 for odd."""
    folder = tmp_path_factory.mktemp("lightgcn")
    rng = np.random.default_rng(3)
    train, test = [], []
    for user in range(20):
        liked = rng.permutation(10) + 10 * (user % 2)
        train.append(f"{user} " + " ".join(map(str, liked[:7])))
        test.append(f"{user} " + " ".join(map(str, liked[7:])))
    (folder / "train.txt").write_text("\n".join(train) + "\n")
    (folder / "test.txt").write_text("\n".join(test) + "\n")
    run = f"""
[data]
format = "lightgcn"
train = "{folder.as_posix()}/train.txt"
test = "{folder.as_posix()}/test.txt"
[evaluate]
ks = [3]
primary = "recall_at_3"
"""
    return build(run, folder / "out")


def test_without_a_clock_the_targets_are_not_history_and_not_seen(adjacency: Any) -> None:
    recommender = Recommender.load(adjacency.bundle)
    rules = adjacency.config.evaluate
    later = later_side(adjacency.dataset)
    each = rules.each_event(timed=False, split="given")
    assert not each
    answers, targets = _ranking(recommender, later, rules, each_event=each)
    assert len(targets) == 20 and all(len(t) == 3 for t in targets.values())
    # Three items of the taste are left, and they are the targets: co-occurrence finds them all.
    card = judge(recommender, later, rules, each_event=each, protocol={})
    assert card["baselines"]["co_occurrence"]["recall_at_3"]["value"] == 1.0
    assert card["protocol"]["refresh"] == "none"
    assert "recent_popularity" not in card["baselines"] and "newest" not in card["baselines"]
    assert card["verdict"].startswith("The baseline co_occurrence wins")
    changed = _scrambled(later, np.zeros(len(later.time), bool))
    after, _ = _ranking(recommender, changed, rules, each_event=each)
    for name, lists in answers.items():
        both = set(lists) & set(after[name])
        assert both and all(lists[key] == after[name][key] for key in both)


# --- repeats, samples, nothing to judge -----------------------------------------------------------


def test_where_people_come_back_repeats_are_targets_and_seen_items_answers(
    trader: Recommender, plain: Any
) -> None:
    later = later_side(plain.dataset)
    keep = plain.config.evaluate.model_copy(update={"drop_seen": False})
    card = judge(trader, later, keep, each_event=True, protocol={})
    without = judge(trader, later, plain.config.evaluate, each_event=True, protocol={})
    assert card["protocol"]["repeats_left_out"] == 0
    assert card["protocol"]["targets"] == len(later.item)
    left = without["protocol"]
    assert left["targets"] + left["repeats_left_out"] == len(later.item)
    answers, _ = _ranking(trader, later, keep)
    assert len({len(found) for found in answers["model"].values()}) == 1


def test_too_many_queries_are_a_seeded_sample(
    trader: Recommender, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = later_side(plain.dataset)
    monkeypatch.setattr("recsys.experiments.evaluation.queries.MOST_QUERIES", 20)
    few = plain.config.evaluate
    one, two, other = (
        judge(trader, later, few, each_event=True, protocol={}, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two != other
    assert one["protocol"]["queries_judged"] == 20


def test_nothing_to_judge_is_said_and_every_number_is_null(trader: Recommender, plain: Any) -> None:
    past = trader.bundle.timeline
    user, item = int(past.user[0]), int(past.item[0])
    repeat = Later(
        trader.bundle.users.decode([user]), trader.bundle.items.decode([item]),
        np.array([trader.bundle.cutoff + 5]), np.empty((1, 0), np.int64),
    )  # fmt: skip
    rules = plain.config.evaluate
    for each in (True, False):
        card = judge(trader, repeat, rules, each_event=each, protocol={})
        assert card["verdict"] == (
            "Nothing was judged: all 1 later positives repeat what their users had "
            "(evaluate.drop_seen)."
        )
        assert card["model"]["recall_at_5"] == {"value": None, "low": None, "high": None}
        json.dumps(card, allow_nan=False)
    nothing = repeat.since(trader.bundle.cutoff + 6)
    card = judge(trader, nothing, rules, each_event=True, protocol={})
    assert card["verdict"] == "Nothing was judged: there is no later positive."
    assert set(card["baselines"]) >= {"popularity", "recent_popularity", "co_occurrence"}


# --- the contract ---------------------------------------------------------------------------------


def test_every_metric_is_value_low_high_under_the_names_of_the_contract(
    shopkeeper: Recommender, tiny: Any
) -> None:
    later = later_side(tiny.dataset)
    card = judge(shopkeeper, later, tiny.config.evaluate, each_event=True, protocol={"a": 1})
    card = json.loads(json.dumps(card, allow_nan=False))
    assert set(card) == {
        "model", "baselines", "differences", "slices", "index", "impressions", "protocol",
        "verdict",
    }  # fmt: skip
    names = {
        f"{m}_at_{k}" for m in ("recall", "ndcg", "mrr", "hit_rate") for k in (5, 10, 20, 50, 100)
    }
    names |= {"coverage_at_20", "gini_at_20", "novelty_at_20", "popularity_at_20"}
    assert set(card["model"]) == names
    assert set(card["baselines"]) == set(card["differences"]) == {
        "popularity", "recent_popularity", "newest", "co_occurrence", "text",
    }  # fmt: skip
    assert {"warm_items", "cold_items", "cold_items_among_cold"} <= set(card["slices"])
    shown = card["impressions"]
    assert set(shown["model"]) == {"auc", "mrr", "ndcg_at_5", "ndcg_at_10"}
    assert shown["requests"] > 10 and set(shown["slices"]) <= {"warm", "cold"}
    assert card["protocol"]["a"] == 1 and card["protocol"]["item_statistics"] == "1h"
    assert card["protocol"]["refresh"] == shown["refresh"] == "1h"
    index = {k: v for k, v in card["index"].items() if isinstance(v, dict)}
    assert len(index) == 2 and all("recall_at_" in name for name in index)
    groups = [card, shown, *card["slices"].values(), *shown["slices"].values()]
    for group in groups:
        for metrics in (
            group["model"],
            *group["baselines"].values(),
            *group["differences"].values(),
        ):
            for metric in metrics.values():
                assert list(metric) == ["value", "low", "high"]
                if metric["low"] is not None:
                    assert metric["low"] <= metric["value"] <= metric["high"]
    for metric in index.values():
        assert list(metric) == ["value", "low", "high"]


def test_the_same_question_twice_gives_the_same_scorecard(
    shopkeeper: Recommender, tiny: Any
) -> None:
    later = later_side(tiny.dataset)
    one, two = (
        judge(shopkeeper, later, tiny.config.evaluate, each_event=True, protocol={})
        for _ in range(2)
    )
    assert one == two


# --- slices ---------------------------------------------------------------------------------------


def test_slices_and_chance_by_hand() -> None:
    """Rows 1 to 3 are warm (chosen 9, 2, 1 times), 4 and 5 cold."""
    rules = EvaluateRules(ks=(1, 2), primary="recall_at_1")
    cold = np.array([False, False, False, False, True, True])
    counts = np.array([0, 9, 2, 1, 0, 0])
    targets = Ragged.from_lists([[1, 4], [2], [5, 3], [4]])
    questions = Questions(
        Queries(np.array([1, 2, 3, 3]), Ragged.empty(4)), targets, 0, np.arange(4)
    )
    ranked = np.array([[1, 4], [3, 1], [3, 5], [2, 1]])
    among = np.array([[5, 4], [-1, -1], [5, 4], [4, 5]])
    ranking = Ranking({"model": ranked}, {"model": among}, np.array([2, 0, 4, 1]), np.ones(6, bool))
    found = slices(ranking, questions, np.array([0, 3, 10, 99]), counts, cold, rules, 0)
    recall = {
        name: [part["model"][f"recall_at_{k}"]["value"] for k in (1, 2)]
        for name, part in found.items()
    }
    assert recall == {
        "warm_items": [pytest.approx(2 / 3)] * 2,  # item 1, not item 2, item 3
        "cold_items": [0, pytest.approx(2 / 3)],  # 4 and 5 second, 4 never
        "tail_items": [0.5, 0.5],  # chosen twice at most: item 2 missed, item 3 found
        "new_users": [0.5, 1],
        "light_users": [0, 0],
        "heavy_users": [0.25, 0.5],
        "cold_items_among_cold": [pytest.approx(2 / 3), 1],
    }
    part = found["cold_items_among_cold"]
    assert (part["queries"], part["candidates"]) == (3, 2)
    assert part["chance"]["recall_at_1"] == pytest.approx((1 / 2 + 1 / 4 + 1) / 3)
    assert part["chance"]["recall_at_2"] == pytest.approx((1 + 1 / 2 + 1) / 3)


# --- verdict and rules ----------------------------------------------------------------------------


def _card(**gaps: tuple[float, float | None, float | None]) -> dict[str, Any]:
    """Model at .30; each baseline with its value and the interval of the difference."""

    def number(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        return {"recall_at_20": {"value": value, "low": low, "high": high}}

    return {
        "model": number(0.3),
        "baselines": {name: number(value) for name, (value, _, _) in gaps.items()},
        "differences": {n: number(0.3 - v, low, high) for n, (v, low, high) in gaps.items()},
    }


@pytest.mark.parametrize(
    ("gaps", "sentence"),
    [
        (
            {"popularity": (0.1, 0.15, 0.25), "text": (0.2, 0.05, 0.15)},
            "The towers beat every baseline; the best is text: recall_at_20 0.3000 against 0.2000 "
            "(95 % interval of the difference +0.0500 to +0.1500).",
        ),
        (
            {"popularity": (0.4, -0.2, -0.05), "text": (0.5, -0.3, -0.1)},
            "The baseline text wins: recall_at_20 0.3000 against 0.5000 (95 % interval of the "
            "difference -0.3000 to -0.1000). Use it, or look at the slices for why.",
        ),
        (
            {"popularity": (0.31, -0.1, 0.1)},
            "The towers and the baseline popularity cannot be told apart: recall_at_20 0.3000 "
            "against 0.3100 (95 % interval of the difference -0.1000 to +0.1000).",
        ),
        (  # the best of the two is beaten, the other one not surely
            {"popularity": (0.2, 0.05, 0.15), "text": (0.19, -0.01, 0.3)},
            "The towers and the baseline text cannot be told apart: recall_at_20 0.3000 against "
            "0.1900 (95 % interval of the difference -0.0100 to +0.3000).",
        ),
        (
            {"popularity": (0.2, None, None)},
            "The towers and the baseline popularity cannot be told apart: recall_at_20 0.3000 "
            "against 0.2000 (too few users for an interval).",
        ),
        ({}, "The towers have recall_at_20 0.3000; no baseline was asked for."),
    ],
)
def test_the_verdict_says_plainly_who_wins(gaps: dict[str, Any], sentence: str) -> None:
    card = _card(**gaps)
    assert verdict(copy.deepcopy(card), "recall_at_20") == sentence


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("primary = 'recall_at_7'", "primary = 'recall_at_7' is not measured"),
        ("primary = 'coverage_at_20'", "is not measured"),
        ("ks = [5, 10]", "primary = 'recall_at_20' is not measured.*K one of ks = .5, 10."),
        ("ks = []", "name at least one k"),
        ("ks = [0]", "name at least one k, each 1 or more"),
        ("refresh = '0s'", "no time at all"),
        ("refresh = 'soon'", "'soon' is no duration"),
    ],
)
def test_a_protocol_that_cannot_be_meant_is_refused(line: str, message: str) -> None:
    from recsys.experiments.config import loads

    with pytest.raises(ConfigError, match=message):
        loads(f"[data]\nlog = 'x.csv'\n[evaluate]\n{line}\n")


def test_when_queries_stand_at_each_event_by_hand() -> None:
    auto = EvaluateRules()
    assert auto.each_event(timed=True, split="time") and auto.each_event(timed=True, split="given")
    assert auto.each_event(timed=False, split="leave_one_out")
    assert not auto.each_event(timed=False, split="given")
    assert not EvaluateRules(queries="cutoff").each_event(timed=True, split="time")
    assert EvaluateRules(queries="each_event").each_event(timed=False, split="given")
