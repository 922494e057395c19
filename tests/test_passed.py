"""What users were shown and passed over, as an input: by hand, by a loop, and served as trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import ConfigError
from recsys.experiments.evaluation.evaluate import later_log
from recsys.experiments.evaluation.evaluate import (
    test_side as later_side,  # the name is not that of a test
)
from recsys.experiments.evaluation.queries import without_later_events
from recsys.experiments.evaluation.scorecard import judge
from recsys.features.batching.batch import Queries, UserSide, query_side
from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.examples import asking, timeline_until, training_events
from recsys.features.batching.slices import Part
from recsys.features.prepared.dataset import Dataset
from recsys.features.prepared.passed import PASSED, PassedOver
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.serving import bundle as bundles
from recsys.serving.index import IndexRules
from recsys.serving.later_events import extend
from recsys.serving.recommender import Recommender
from recsys.tables import Side
from recsys.towers.build import build_model, validation_side
from recsys.towers.data import plan_of
from recsys.towers.embedding import FeatureTable
from recsys.towers.encode import encode_users
from recsys.towers.rules import TrainingRules
from recsys.towers.two_tower import TowerRules, TwoTower

N_USERS, N_ITEMS = 5, 9


def passed(
    requests: list[tuple[int, int, list[tuple[int, bool, int]]]], positions: bool = True
) -> PassedOver:
    """From (user, time, [(item, chosen, position), …])."""
    flat = np.array([part for request in requests for part in request[2]], np.int64).reshape(-1, 3)
    offsets = np.cumsum([0] + [len(request[2]) for request in requests])
    return PassedOver.of_requests(
        np.array([request[0] for request in requests], np.int64),
        np.array([request[1] for request in requests], np.int64),
        Ragged(offsets, flat[:, 0]), flat[:, 1], flat[:, 2] if positions else None, N_USERS,
    )  # fmt: skip


def test_passed_over_is_what_stands_above_the_last_choice() -> None:
    requests = [
        (2, 50, [(5, False, 1), (6, True, 2), (7, False, 3), (8, True, 4), (1, False, 5)]),
        (2, 40, [(4, True, 0), (3, False, -1), (2, False, 1)]),  # 3 has no position: it counts
        (2, 60, [(1, False, 1), (2, False, 2)]),  # nothing chosen: perhaps nobody looked
        (1, 50, [(3, True, -1), (7, False, 9)]),  # the choice has no position: all count
        (0, 10, [(1, False, 1), (2, True, 2)]),  # nobody
        (3, 70, [(0, False, 1), (6, False, 1), (2, True, 1)]),  # an unknown item; side by side
    ]
    found = passed(requests)
    assert [row.tolist() for row in (found.items[u] for u in range(N_USERS))] == [
        [], [7], [3, 5, 7], [6], [],
    ]  # fmt: skip
    assert found.time.tolist() == [50, 40, 50, 50, 70]
    unplaced = passed(requests, positions=False)
    assert unplaced.items[2].tolist() == [3, 2, 5, 7, 1]
    users = np.array([2, 2, 2, 2, 3])
    before = found.before(users, np.array([40, 41, 50, 51, 70]), None)
    assert [before[q].tolist() for q in range(5)] == [[], [3], [3], [3, 5, 7], []]
    assert found.before(users[:1], None, 2)[0].tolist() == [5, 7]
    assert found.before(users[:1], np.array([50]), 2)[0].tolist() == [3]
    assert found.before(np.empty(0, np.int64), None, 2).values.size == 0
    nobody = passed([])
    assert nobody.before(np.array([1, 4]), np.array([9, 9]), 3).lengths.tolist() == [0, 0]
    assert nobody.joined(found, N_USERS).items[2].tolist() == [3, 5, 7]


SHOWN = st.lists(
    st.tuples(st.integers(0, N_ITEMS - 1), st.booleans(), st.integers(-1, 4)), max_size=5
)
REQUESTS = st.lists(st.tuples(st.integers(0, N_USERS - 1), st.integers(0, 6), SHOWN), max_size=9)


def naive(
    requests: list[tuple[int, int, list[tuple[int, bool, int]]]], user: int, before: int
) -> list[int]:
    """By the definition, request by request."""
    found = []
    for who, when, shown in sorted(requests, key=lambda request: request[1]):
        chosen = [position for _, clicked, position in shown if clicked]
        if who != user or who == 0 or when >= before or not chosen:
            continue
        for item, clicked, position in shown:
            below = position >= 0 and max(chosen) >= 0 and position > max(chosen)
            if item and not clicked and not below:
                found.append(item)
    return found


@given(requests=REQUESTS, cut=st.integers(0, 7), last=st.integers(1, 4))
@settings(max_examples=150)
def test_passed_over_equals_a_loop_however_it_is_put_together(
    requests: list[tuple[int, int, list[tuple[int, bool, int]]]], cut: int, last: int
) -> None:
    whole = passed(requests)
    early = [request for request in requests if request[1] < cut]
    late = [request for request in requests if request[1] >= cut]
    joined = passed(early).joined(passed(late), N_USERS)
    np.testing.assert_array_equal(joined.items.values, whole.items.values)
    np.testing.assert_array_equal(joined.time, whole.time)
    everyone = np.arange(N_USERS)
    for moment in range(8):
        times = np.full(N_USERS, moment)
        found, newest = whole.before(everyone, times, None), whole.before(everyone, times, last)
        for user in range(N_USERS):
            expected = naive(requests, user, moment)
            assert found[user].tolist() == expected
            assert newest[user].tolist() == expected[-last:]


@given(requests=REQUESTS, later=REQUESTS, moment=st.integers(0, 7))
@settings(max_examples=100)
def test_nothing_of_the_future_enters(
    requests: list[tuple[int, int, list[tuple[int, bool, int]]]],
    later: list[tuple[int, int, list[tuple[int, bool, int]]]],
    moment: int,
) -> None:
    """Whatever happens at the moment or after it, even to the same users and items."""
    later = [(user, time + moment, shown) for user, time, shown in later]
    times, everyone = np.full(N_USERS, moment), np.arange(N_USERS)
    alone = passed([r for r in requests if r[1] < moment]).before(everyone, times, 3)
    for more in (passed([*requests, *later]), passed(requests).joined(passed(later), N_USERS)):
        found = more.before(everyone, times, 3)
        np.testing.assert_array_equal(found.offsets, alone.offsets)
        np.testing.assert_array_equal(found.values, alone.values)


def test_rows_are_renumbered_with_the_bundle() -> None:
    found = passed([(1, 5, [(4, False, 1), (6, True, 2)]), (3, 4, [(6, False, 1), (2, True, 2)])])
    place = np.full(N_ITEMS, -1)
    place[[0, 4, 6]] = [0, 1, 2]
    kept = found.renumbered(np.array([0, 3]), place)
    assert [kept.items[u].tolist() for u in range(2)] == [[], [2]]
    assert kept.time.tolist() == [4]


# ------------------------------------------------------------------------------ in batches


def events() -> TrainingEvents:
    """Three users, four choices each a request of four items, and who they are."""
    rng = np.random.default_rng(3)
    user = np.repeat(np.arange(1, 4), 4)
    item = rng.integers(1, N_ITEMS, 12)
    time = np.tile(np.array([10, 20, 20, 30]), 3)
    timeline = Timeline.build(
        user, item, time, n_users=N_USERS, first_seen=np.zeros(N_ITEMS, np.int64)
    )
    shown = np.stack([item, *(item % (N_ITEMS - 1) + k for k in (1, 2, 3))], 1) % N_ITEMS
    over = PassedOver.of_requests(
        user, time, Ragged(np.arange(13) * 4, shown.reshape(-1)), np.tile([1, 0, 0, 0], 12), None,
        N_USERS,
    )  # fmt: skip
    return TrainingEvents(
        replace(timeline, passed=over), None, None, None, None, np.arange(1, N_ITEMS)
    )


@pytest.mark.parametrize("plan", ["random", "in_time", "sequences"])
def test_a_batch_carries_what_each_query_would_be_served_with(plan: Any) -> None:
    training = events()
    timeline = training.timeline
    batches = Batches(training, plan=plan, max_history=3, passed=True)
    drawn = np.array([1, 2, 3]) if plan == "sequences" else np.array([0, 3, 5, 10])
    batch = batches.make(Part(drawn), np.random.default_rng(0))
    side = batch.user
    assert side.passed is not None and side.passed_lengths is not None
    if plan == "sequences":  # the queries stand before the events of moments 20 and 30
        users, times = np.repeat([1, 2, 3], 2), np.tile([20, 30], 3)
    else:
        users, times = timeline.user[drawn], timeline.time[drawn]
    expected = asking(timeline, users, times).passed
    assert expected is not None and len(expected.values) > 5
    found = batch.rows[side.passed].numpy()
    assert side.passed_lengths.tolist() == expected.lengths.tolist()
    np.testing.assert_array_equal(found, expected.values)
    history = timeline.item[batches.reading.ask(drawn, np.random.default_rng(0)).history]
    np.testing.assert_array_equal(batch.rows[side.history].numpy(), history)
    assert len(np.unique(batch.rows)) == len(batch.rows)
    without = Batches(training, plan=plan, max_history=3).make(
        Part(drawn), np.random.default_rng(0)
    )
    assert without.user.passed is None and without.user.passed_lengths is None
    np.testing.assert_array_equal(without.rows[: without.n_encoded], batch.rows[: batch.n_encoded])


def test_only_the_newest_hundred_are_read() -> None:
    many = [(1, t, [(1 + t % 7, False, 1), (8, True, 2)]) for t in range(PASSED + 20)]
    base = events().timeline
    queries = asking(replace(base, passed=passed(many)), np.array([1, 2]), np.array([115, 115]))
    assert queries.passed is not None
    assert queries.passed[0].tolist() == [1 + t % 7 for t in range(15, 115)]
    assert queries.passed[1].tolist() == []
    taken = queries.take(np.array([1, 0, 1]))
    assert taken.passed is not None and taken.passed.lengths.tolist() == [0, 100, 0]
    side, rows = query_side(taken, 3)
    assert side.passed is not None and side.passed_lengths is not None
    assert rows[side.passed.numpy()].tolist() == queries.passed[0].tolist()
    np.testing.assert_array_equal(rows[side.history.numpy()], taken.history.last(3).values)
    assert side.to("cpu").passed_lengths.tolist() == [0, 100, 0]  # type: ignore[union-attr]
    assert asking(base.select(np.ones(12, bool)), np.array([1])).passed is not None
    nothing = asking(replace(base, passed=None), np.array([1]))
    assert nothing.passed is None and query_side(nothing, 3)[0].passed is None


def test_what_cannot_be_asked_for_is_refused() -> None:
    training = events()
    silent = replace(training, timeline=replace(training.timeline, passed=None))
    with pytest.raises(ValueError, match="does not carry what was passed over"):
        Batches(silent, passed=True)
    with pytest.raises(ValueError, match="would tell it"):
        Batches(training, plan="by_user", passed=True)
    with pytest.raises(ConfigError, match=r"towers\.passed_over to false"):
        plan_of(TrainingRules(batches="by_user"), TowerRules(passed_over=True), False)


# ------------------------------------------------------------------------------ in the tower


def towers(**rules: Any) -> TwoTower:
    torch.manual_seed(4)
    items, users = FeatureTable(N_ITEMS), FeatureTable(N_USERS)
    model = TwoTower(
        TowerRules(**{"dimension": 8, "hidden": 8, **rules}), items, users,
        items.spec(N_ITEMS, {}, 0), users.spec(0, {}),
    )  # fmt: skip
    return model.eval()


def side(lengths: list[int], places: list[int]) -> UserSide:
    return UserSide(
        users=torch.zeros(3, dtype=torch.int64),
        history=torch.tensor([0, 1, 2, 3]),
        lengths=torch.tensor([2, 1, 1]),
        context=torch.zeros((3, 0), dtype=torch.int64),
        passed=torch.tensor(places, dtype=torch.int64),
        passed_lengths=torch.tensor(lengths),
    )


@pytest.mark.parametrize("history", ["attention", "multi_interest", "none"])
def test_towers_that_read_it_start_as_towers_that_do_not(history: str) -> None:
    with_it, without = towers(passed_over=True, history=history), towers(history=history)
    names = set(with_it.state_dict()) - set(without.state_dict())
    assert names == {"user_tower.passed.weight", "user_tower.passed.bias"}
    for name, weight in without.state_dict().items():
        torch.testing.assert_close(with_it.state_dict()[name], weight, rtol=0, atol=0)
    entries = with_it.embed_history(torch.arange(1, 7))
    asked = side([2, 0, 3], [1, 4, 0, 5, 5])
    before = with_it.encode_users(asked, entries)
    assert torch.equal(before, without.encode_users(asked, entries))
    # ... but it learns: the first gradient is not 0, and what is passed over then matters.
    before[..., 0].sum().backward()
    layer = with_it.user_tower.passed
    assert layer is not None and layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.weight.normal_()
    after = with_it.encode_users(asked, entries)
    changed = (after - before).abs().flatten(1).amax(1) > 1e-4
    assert changed.tolist() == [True, False, True]
    nobody = with_it.encode_users(side([0, 0, 0], []), entries)
    assert torch.equal(nobody, before)
    assert torch.equal(with_it.encode_users(replace(asked, passed=None), entries), before)


def test_the_mean_of_the_items_goes_through_the_layer() -> None:
    model = towers(passed_over=True, history="none", hidden=0, score="dot", dropout=0.0)
    layer = model.user_tower.passed
    assert layer is not None
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    entries = model.embed_history(torch.arange(1, 7)).detach()
    found = model.encode_users(side([2, 0, 3], [1, 4, 0, 5, 5]), entries)
    bare = model.encode_users(side([0, 0, 0], []), entries)
    said = (found - bare).detach()
    torch.testing.assert_close(said[0], layer((entries[1] + entries[4]) / 2).detach())
    torch.testing.assert_close(said[2], layer((entries[0] + 2 * entries[5]) / 3).detach())
    assert not said[1].any()


# ------------------------------------------------------------------------------ whole


@pytest.fixture(scope="module")
def reading(build: Callable[..., Any], shop_run: str, tmp_path_factory: Any) -> Any:
    """Untrained towers on the small shop that read what was passed over, and show it."""
    run = shop_run
    assert "[towers]\n" in run
    run = run.replace("[towers]\n", "[towers]\npassed_over = true\n")
    built = build(run, tmp_path_factory.mktemp("passed"))
    recommender = Recommender.load(built.bundle)
    torch.manual_seed(0)
    with torch.no_grad():
        recommender.bundle.model.user_tower.passed.weight.normal_(std=0.5)  # type: ignore[union-attr]
    path = built.bundle.parent / "loud"
    bundles.save(recommender.bundle, path, rules=IndexRules(kind="exact"))
    return replace(built, bundle=path)


def ids(bundle: bundles.Bundle, rows: Ragged) -> list[list[str]]:
    return [bundle.items.decode(rows[q]).to_list() for q in range(len(rows))]


def test_served_queries_carry_what_training_and_validation_queries_do(reading: Any) -> None:
    dataset, bundle = reading.dataset, Recommender.load(reading.bundle).bundle
    extended, coded = extend(bundle, later_side(dataset))
    names = dataset.users.decode(np.arange(1, dataset.n_users))
    whole = training_events(dataset, skips=False, until=Side.TEST, passed=True)
    timeline, served = whole.timeline, Recommender(extended)
    batches = Batches(whole, max_history=5, passed=True)
    drawn = np.random.default_rng(0).permutation(len(timeline.item))[:300]
    batch = batches.make(Part(drawn), np.random.default_rng(0))
    assert batch.user.passed is not None and batch.user.passed_lengths is not None
    rows = extended.users.encode(dataset.users.decode(timeline.user[drawn])).astype(np.int64)
    queries = served.queries(rows, timeline.time[drawn])
    assert queries.passed is not None and (queries.passed.lengths > 0).sum() > 150
    items = dataset.items.decode(batch.rows[batch.user.passed].numpy()).to_list()
    assert queries.passed.lengths.tolist() == batch.user.passed_lengths.tolist()
    assert extended.items.decode(queries.passed.values).to_list() == items
    # At the cut-off the bundle itself knows what the train and validation sides show.
    now = Recommender(bundle).queries(bundle.users.encode(names).astype(np.int64))
    past = timeline_until(dataset, Side.VALID, passed=True)
    known = asking(past, np.arange(1, dataset.n_users)).passed
    assert now.passed is not None and known is not None
    had = np.flatnonzero(bundle.users.encode(names) > 0)
    assert ids(bundle, now.passed.take(had)) == [
        dataset.items.decode(known[q]).to_list() for q in had.tolist()
    ]
    assert len(coded.shown)
    grown, before = extended.timeline.passed, bundle.timeline.passed
    assert grown is not None and before is not None and len(grown.time) > len(before.time)


def test_validation_asks_with_it(reading: Any) -> None:
    config, dataset = reading.config, reading.dataset
    rules = config.training.model_copy(update={"monitor": "auc"})
    options: dict[str, Any] = {
        "each_event": True, "refresh": 3_600_000_000, "max_history": 5, "drop_seen": True,
        "statistics": True, "seed": 0,
    }  # fmt: skip
    found = validation_side(dataset, rules, passed=True, **options)
    assert found is not None and found.shown is not None
    past = timeline_until(dataset, Side.VALID, passed=True)
    for queries in (found.queries, found.shown.queries):
        expected = asking(past, queries.users, queries.times).passed
        assert queries.passed is not None and expected is not None
        assert (queries.passed.lengths > 0).any()
        np.testing.assert_array_equal(queries.passed.values, expected.values)
    silent = validation_side(dataset, rules, **options)
    assert silent is not None and silent.queries.passed is None
    assert training_events(dataset, skips=False).timeline.passed is None


def test_it_survives_the_bundle_and_a_typed_history_has_none(reading: Any) -> None:
    recommender = Recommender.load(reading.bundle)
    bundle = recommender.bundle
    again = Recommender.load(
        bundles.save(bundle, reading.bundle.parent / "again", rules=IndexRules(kind="exact"))
    )
    users = np.arange(1, bundle.users.size)
    queries = recommender.queries(users)
    vectors = encode_users(bundle.model, queries, bundle.timeline, bundle.cutoff)
    other = again.bundle
    np.testing.assert_array_equal(
        encode_users(other.model, again.queries(users), other.timeline, other.cutoff), vectors
    )
    typed = Queries(users, queries.history, None, queries.context)
    alone = encode_users(bundle.model, typed, bundle.timeline, bundle.cutoff)
    some = queries.passed.lengths > 0  # type: ignore[union-attr]
    assert some.sum() > 50
    assert (np.abs(alone - vectors).max(1) > 1e-4).tolist() == some.tolist()
    one = bundle.users.ids[int(np.flatnonzero(some)[0])]
    row = bundle.users.encode([one]).astype(np.int64)
    assert again.recommend(user=one, k=7).ids == ids(
        bundle, Ragged(np.array([0, 7]), recommender.answer_rows(recommender.queries(row), 7)[0][0])
    )[0]  # fmt: skip
    history = bundle.items.decode(queries.history[int(row[0]) - 1]).to_list()
    scores = again.recommend(history=history, k=7).scores
    assert not np.allclose(scores, again.recommend(user=one, k=7).scores)


def test_a_later_log_gives_what_the_own_test_side_gives(reading: Any) -> None:
    """Positions, too, come back from the log."""
    recommender = Recommender.load(reading.bundle)
    own = extend(recommender.bundle, later_side(reading.dataset))[0]
    log = later_log(recommender, str(reading.config.data.log))
    other = extend(recommender.bundle, log)[0]
    users, times = own.timeline.user, own.timeline.time
    mine = asking(own.timeline, users, times).passed
    names = own.users.decode(users)
    theirs = asking(other.timeline, other.users.encode(names).astype(np.int64), times).passed
    assert mine is not None and theirs is not None
    assert ids(own, mine) == ids(other, theirs)
    unplaced = replace(log, requests=replace(log.requests, position=None))  # type: ignore[type-var]
    more = extend(recommender.bundle, unplaced)[0].timeline.passed
    assert len(more.time) > len(other.timeline.passed.time)  # type: ignore[union-attr]
    at_cutoff = without_later_events(own, recommender.bundle.timeline)
    known = at_cutoff.timeline.passed
    assert known is not None and len(known.items) == own.users.size
    np.testing.assert_array_equal(known.time, recommender.bundle.timeline.passed.time)  # type: ignore[union-attr]


def test_a_bundle_of_towers_without_it_knows_nothing_of_it(tiny: Any) -> None:
    bundle = Recommender.load(tiny.bundle).bundle
    assert bundle.timeline.passed is None
    extended = extend(bundle, later_side(tiny.dataset))[0]
    assert extended.timeline.passed is None
    assert Recommender(extended).queries(np.array([1])).passed is None


def test_a_rival_is_asked_with_what_its_own_towers_read(reading: Any, tiny: Any) -> None:
    """However the two stand: what one does not read, the other still has."""
    ours, theirs = Recommender.load(reading.bundle), Recommender.load(tiny.bundle)
    later, rules = later_side(reading.dataset), reading.config.evaluate
    options: dict[str, Any] = {"each_event": True, "protocol": {}}
    one = judge(ours, later, rules, rivals={"other": theirs}, **options)
    two = judge(theirs, later, rules, rivals={"other": ours}, **options)
    assert (
        one["model"]["recall_at_20"]["value"] == two["baselines"]["other"]["recall_at_20"]["value"]
    )
    assert (
        two["model"]["recall_at_20"]["value"] == one["baselines"]["other"]["recall_at_20"]["value"]
    )
    first, second = (card["impressions"] for card in (one, two))
    assert first["model"]["auc"]["value"] == second["baselines"]["other"]["auc"]["value"]
    assert first["model"]["auc"]["value"] != second["model"]["auc"]["value"]


def test_a_log_without_lists_is_refused(plain: Any) -> None:
    with pytest.raises(ConfigError, match="no impression lists"):
        build_model(plain.dataset, TowerRules(passed_over=True), item_text=None, seed=0)
    assert isinstance(plain.dataset, Dataset)
    assert timeline_until(plain.dataset, Side.VALID, passed=True).passed is None
