"""Blocks, towers and encoding: against loops, and what serving and training must share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.errors import ConfigError, DataError
from recsys.features.batching.batch import Queries, UserSide
from recsys.features.prepared.timeline import STATISTICS, Timeline
from recsys.ragged import Ragged
from recsys.towers import encode
from recsys.towers.build import padded, uses_statistics
from recsys.towers.embedding import FeatureEmbedding, FeatureSpec, FeatureTable, Residual
from recsys.towers.encode import Embeddings, encode_items, encode_users
from recsys.towers.history import PooledHistory
from recsys.towers.history import segment_softmax as softmax_of_segments
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower

SEED = st.integers(0, 2**32 - 1)
DIMENSION, N_ITEMS, N_USERS, N_WARM = 6, 9, 5, 7


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def towers(seed: int = 0, statistics: bool = False, **rules: object) -> TwoTower:
    """Small towers with every kind of feature; rows N_WARM.. have no id vector."""
    torch.manual_seed(seed)
    text = torch.nn.functional.normalize(torch.randn(N_ITEMS, 4), dim=1)
    items = FeatureTable(
        N_ITEMS, text=text, vector=torch.randn(N_ITEMS, 2), numbers=torch.randn(N_ITEMS, 3),
        categories={"a.b": torch.randint(0, 4, (N_ITEMS, 3))},
    )  # fmt: skip
    users = FeatureTable(N_USERS, numbers=torch.randn(N_USERS, 2))
    settled = TowerRules(
        **{"dimension": DIMENSION, "history": {"length": 4}, "hidden": 8, "user_id": True, **rules}
    )
    return TwoTower(
        settled, items, users,
        items.spec(N_WARM, {"a.b": 4}, len(STATISTICS) if statistics else 0),
        users.spec(4, {}), (3,),
    )  # fmt: skip


def settle(model: TwoTower, seed: int = 1) -> TwoTower:
    """Weights away from their start, where last layers are 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=rng))
    return model


def side(histories: list[list[int]]) -> UserSide:
    n = len(histories)
    return UserSide(
        users=torch.arange(n) % N_USERS,
        history=torch.tensor([i for row in histories for i in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in histories], dtype=torch.int64),
        context=torch.ones(n, 1, dtype=torch.int64),
    )


@given(SEED, st.integers(0, 13), st.integers(1, 5))
@settings(max_examples=40)
def test_the_softmax_of_segments_equals_one_softmax_each(seed: int, size: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    score = (20 * torch.randn(size, generator=rng)).double().requires_grad_()
    segment = torch.randint(n, (size,), generator=rng)  # in any order
    mix = torch.randn(size, generator=rng).double()
    fast = softmax_of_segments(score, segment, n)
    slow = torch.zeros(size).double()
    for s in range(n):
        slow = slow.masked_scatter(segment == s, score[segment == s].softmax(0))
    torch.testing.assert_close(fast, slow)
    if size:
        for ours, theirs in zip(
            torch.autograd.grad((fast * mix).sum(), score),
            torch.autograd.grad((slow * mix).sum(), score),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def pooled_by_loop(pool: PooledHistory, items: Tensor, histories: list[list[int]]) -> Tensor:
    out = []
    for history in histories:
        if not history:
            out.append(pool.empty)
            continue
        entries = items[history]
        if pool.decay == 0:
            out.append(entries.mean(0))
            continue
        place = [min(len(history) - 1 - i, pool.length - 1) for i in range(len(history))]
        weight = (pool.content(entries)[:, 0] + pool.position[place]).softmax(0)
        out.append((weight[:, None] * entries).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=7), min_size=1, max_size=6),
    st.integers(1, 5),
    SEED,
)
@settings(max_examples=25)
def test_pooling_equals_a_loop_in_value_and_gradient(
    pooling: str, histories: list[list[int]], max_history: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pool = PooledHistory(3, max_history, decay=0.0 if pooling == "mean" else None)
    for weight in pool.parameters():
        torch.nn.init.normal_(weight)
    items = torch.randn(7, 3, requires_grad=True)
    asked = side(histories)
    mix = torch.randn(len(histories), 3)
    found = []
    for out in (
        pool(items, asked),
        pooled_by_loop(pool, items, histories),
    ):
        gradient = torch.autograd.grad(
            (out * mix).sum(), [items, *pool.parameters()], allow_unused=True
        )
        found.append([out, *(torch.zeros(()) if g is None else g.sum(0) for g in gradient)])
        found[-1].append(torch.zeros_like(items) if gradient[0] is None else gradient[0])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow.expand_as(fast), rtol=1e-4, atol=1e-5)


def test_histories_that_are_all_empty_need_no_item() -> None:
    pool = PooledHistory(3, 4)
    out = pool(torch.zeros(0, 3), side([[], []]))
    assert torch.equal(out, pool.empty.expand(2, 3))


def test_features_add_up_by_hand() -> None:
    table = FeatureTable(
        3, text=torch.eye(3), numbers=torch.tensor([[0.0], [2.0], [0.0]]),
        categories={"x": torch.tensor([[0, 0], [1, 2], [1, 0]])},
    )  # fmt: skip
    embed = FeatureEmbedding(table.spec(2, {"x": 3}), 2)
    with torch.no_grad():
        embed.ids.weight.copy_(torch.tensor([[0.0, 7.0], [100.0, 0.0]]))
        embed.text.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
        embed.numbers.weight.fill_(10)
        embed.numbers.bias.fill_(0.5)
        embed.categories["0"].weight.copy_(torch.tensor([[0.0, 0], [1000, 0], [3000, 0]]))
    found = embed(torch.tensor([1, 2, 2]), table)
    # id 100 | text 2 | number 2·10 + .5 | mean of 1000 and 3000; row 2 has no id and one category.
    row_1 = [100 + 2 + 20.5 + 2000, 20.5]
    row_2 = [0 + 3 + 0.5 + 1000, 7 + 0.5]
    assert found.tolist() == [row_1, row_2, row_2]


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers has 2 rows, the table 3"):
        FeatureTable(3, numbers=torch.zeros(2, 1))


def test_a_row_of_which_nothing_is_known_is_zero() -> None:
    embed = FeatureEmbedding(FeatureSpec(), 4)
    assert torch.equal(embed(torch.tensor([0, 1]), FeatureTable(2)), torch.zeros(2, 4))


def test_id_dropout_uses_exactly_the_row_that_serving_uses_for_a_new_item() -> None:
    model = settle(towers(id_dropout=0.5, dropout=0.0))
    embed, rows = model.item_tower.inputs, torch.tensor([3])
    model.train()
    hidden = {tuple(model.embed_items(rows)[0].tolist()) for _ in range(50)}
    model.eval()
    shown = model.embed_items(rows)[0]
    assert len(hidden) == 2  # with its id, or without
    assert tuple(shown.tolist()) in hidden
    # The same content under a row that has no id vector.
    new = torch.tensor([N_WARM])
    with torch.no_grad():
        for buffer in model.items.buffers():
            buffer[N_WARM] = buffer[3]
    as_new = model.embed_items(new)[0]
    assert (hidden - {tuple(shown.tolist())}).pop() == tuple(as_new.tolist())
    assert not torch.equal(shown, as_new)
    # Training moves that very row.
    model.train()
    torch.manual_seed(0)
    model.embed_items(torch.arange(1, N_WARM).repeat(8)).sum().backward()
    assert 0 in embed.ids.weight.grad.coalesce().indices()[0]


def test_about_as_many_ids_are_hidden_as_configured_and_none_when_answering() -> None:
    table = FeatureTable(2)
    embed = FeatureEmbedding(table.spec(2, {}), 3, id_dropout=0.3)
    rows = torch.ones(20_000, dtype=torch.int64)
    torch.manual_seed(0)
    hidden = (embed(rows, table) == embed.ids.weight[0]).all(1).float().mean().item()
    assert hidden == pytest.approx(0.3, abs=0.02)
    assert (embed.eval()(rows, table) == embed.ids.weight[1]).all()


def test_an_unknown_user_adds_nothing_where_ids_are_never_hidden() -> None:
    model = towers()
    assert torch.equal(model.user_tower.features.ids.weight[0], torch.zeros(DIMENSION))


def test_a_new_layer_changes_nothing_at_first() -> None:
    x = torch.randn(5, DIMENSION)
    assert torch.equal(Residual(DIMENSION, 8, 0.5)(x), x)
    assert torch.equal(Residual(DIMENSION, 0, 0.5)(x), x)


@pytest.mark.parametrize("score", ["cosine", "dot", "projection"])
def test_the_inner_product_of_stored_vectors_is_the_score(score: str) -> None:
    model = settle(towers(score=score)).eval()
    embedded = model.embed_items(torch.arange(N_ITEMS))
    users = model.encode_users(side([[1, 2], [], [3]]), embedded)
    items = model.item_tower(embedded)
    assert users.shape[1] == items.shape[1] == model.vector_dimension
    found = users @ items.T
    u = users[:, :DIMENSION]
    deep = model.item_tower.deep(embedded)
    if score != "dot":
        torch.testing.assert_close(u.norm(dim=1), torch.ones(3))
    if score in ("dot", "projection"):
        wanted = u @ deep.T
    else:
        wanted = torch.cosine_similarity(u[:, None], deep[None], dim=-1)
    torch.testing.assert_close(found, wanted)


def test_a_user_of_whom_nothing_is_known_has_a_gradient_with_bounds() -> None:
    """The direction of a zero vector has none; it once drowned every other gradient of the step."""
    items = FeatureTable(N_ITEMS, text=torch.eye(N_ITEMS))
    users = FeatureTable(2)
    model = TwoTower(TowerRules(dimension=8), items, users, items.spec(N_ITEMS, {}), FeatureSpec())
    nobody = UserSide(
        torch.zeros(1).long(),
        torch.zeros(0).long(),
        torch.zeros(1).long(),
        torch.zeros(1, 0).long(),
    )
    embedded = model.embed_items(torch.arange(N_ITEMS))
    (model.encode_users(nobody, embedded) @ model.item_tower(embedded).T).logsumexp(1).backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
            assert gradient.norm() < 10, name


def test_an_item_of_which_nothing_is_known_has_a_gradient_with_bounds() -> None:
    items = FeatureTable(3)
    model = TwoTower(
        TowerRules(dimension=8, id_dropout=0),
        items,
        FeatureTable(2),
        items.spec(2, {}),
        FeatureSpec(),
    )
    model.item_tower(model.embed_items(torch.tensor([0, 1, 2]))).sum().backward()
    assert model.item_tower.deep.layers[-1].bias.grad.norm() < 1000


@pytest.mark.parametrize("item_id", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_half_precision_works_with_and_without_ids(item_id: bool, pooling: str) -> None:
    items = FeatureTable(N_ITEMS, text=torch.eye(N_ITEMS))
    model = TwoTower(
        TowerRules(dimension=8, id_dropout=0.2 if item_id else 1, history=pooling), items,
        FeatureTable(4),
        items.spec(N_ITEMS if item_id else 0, {}), FeatureSpec(),
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = model.embed_items(torch.arange(N_ITEMS))
        users = model.encode_users(side([[1, 2], [], [3]]), embedded)
        items_ = model.item_tower(embedded)
    (users @ items_.T).sum().backward()
    assert users.dtype == items_.dtype == torch.float32


def test_encoding_in_blocks_equals_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settle(towers())
    rows = np.array([4, 0, 8, 1, 1])
    queries = Queries(
        np.array([1, 0, 3]), Ragged.from_lists([[1, 2, 3, 4, 5, 6], [], [8]]),
        context=np.array([[1], [0], [2]]),
    )  # fmt: skip
    at_once = encode_items(model, rows), encode_users(model, queries)
    monkeypatch.setattr(encode, "ROWS_AT_ONCE", 2)
    in_blocks = encode_items(model, rows), encode_users(model, queries)
    for whole, parts in zip(at_once, in_blocks, strict=True):
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, parts, atol=1e-6)
    model.eval()
    wanted = model.item_tower(model.embed_items(torch.from_numpy(rows))).detach().numpy()
    np.testing.assert_allclose(at_once[0], wanted, atol=1e-6)
    # Only the newest four of a history are read.
    newest = Queries(queries.users, queries.history.last(4), None, queries.context)
    np.testing.assert_allclose(encode_users(model, newest), at_once[1], atol=1e-6)


def test_encoding_leaves_the_mode_of_the_towers_and_drops_nothing_out() -> None:
    model = settle(towers(id_dropout=0.9, dropout=0.9)).train()
    first, again = (encode_items(model, np.arange(N_ITEMS)) for _ in range(2))
    assert np.array_equal(first, again)
    assert model.training


def test_given_texts_take_the_place_of_the_tables() -> None:
    model = settle(towers()).eval()
    rows = np.array([2, 5])
    texts = model.items.text[[5, 2]].numpy()
    swapped = encode_items(model, rows, texts=texts)
    assert not np.allclose(swapped, encode_items(model, rows))
    with torch.no_grad():
        model.items.text[[2, 5]] = model.items.text[[5, 2]]
    np.testing.assert_allclose(swapped, encode_items(model, rows), atol=1e-6)


def test_towers_that_read_statistics_need_a_moment_and_read_only_what_was_before() -> None:
    model = settle(towers(statistics=True))
    with pytest.raises(ValueError, match="pass a timeline and a moment"):
        encode_items(model, np.array([1]))

    def timeline(last: int) -> Timeline:
        return Timeline.build(
            np.array([1, 1, 2]), np.array([1, 2, 3]), np.array([5, 6, last]),
            n_users=N_USERS, first_seen=np.zeros(N_ITEMS, np.int64),
        )  # fmt: skip

    rows = np.arange(N_ITEMS)
    at_10, changed = (encode_items(model, rows, timeline(t), 10) for t in (10, 99))
    earlier = encode_items(model, rows, timeline(9), 10)
    assert np.array_equal(at_10, changed)
    assert not np.array_equal(at_10, earlier)


def test_statistics_are_standardised_and_bounded() -> None:
    embed = FeatureEmbedding(FeatureSpec(statistics=2), 3)
    embed.standardise(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.1]))
    assert embed.standardised(torch.tensor([[3.0, 9.0]])).tolist() == [[1.0, 5.0]]


def test_embeddings_refuse_what_cannot_rank() -> None:
    with pytest.raises(DataError, match="2 ids, but 3 vectors"):
        Embeddings(pl.Series(["a", "b"]), np.zeros((3, 2), np.float32), "cosine")
    with pytest.raises(DataError, match="item 'b' holds NaN"):
        Embeddings(pl.Series(["a", "b"]), np.array([[0.0], [math.inf]], np.float32), "dot")


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5), st.integers(1, 7))
def test_codes_are_padded_with_0_and_the_first_kept(codes: list[list[int]], most: int) -> None:
    width = max(1, max(min(len(row), most) for row in codes))
    wanted = [(row[:most] + [0] * width)[:width] for row in codes]
    assert padded(Ragged.from_lists(codes), most).tolist() == wanted


def test_statistics_are_read_when_there_are_impressions_and_refused_without_a_clock() -> None:
    def dataset(timed: bool, requests: int) -> SimpleNamespace:
        return SimpleNamespace(manifest={"timed": timed}, request_user=np.zeros(requests))

    auto = TowerRules()
    assert uses_statistics(auto, dataset(True, 3))
    assert not uses_statistics(auto, dataset(True, 0))
    assert not uses_statistics(auto, dataset(False, 3))
    assert uses_statistics(TowerRules(statistics=True), dataset(True, 0))
    with pytest.raises(ConfigError, match="no clock"):
        uses_statistics(TowerRules(statistics=True), dataset(False, 0))
