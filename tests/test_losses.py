"""Every loss: against a loop over every pair, by hand, and by what sets it apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logits_cases import LEARNED, SIZES, Naive, Size, case, gradients, learning, logits
from torch import Tensor
from torch.nn import functional as F

from recsys.features.batching.batch import Source
from recsys.towers.logits import BatchLogits
from recsys.towers.losses import LOSSES, bsl, skip_softmax, softmax, symmetric, triplet


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Pairs = list[tuple[Tensor, Tensor]]


def mass(pairs: Pairs, logit: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of exponentials, one after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for score, weight in pairs:
        total = total + weight * logit(score).exp()
    return total


def mean(pairs: Pairs, term: Callable[[Tensor], Tensor]) -> Tensor:
    weights = sum(weight for _, weight in pairs)
    return sum((weight * term(score) for score, weight in pairs), torch.zeros(())) / weights


def naive_softmax(batch: Naive, b: int, *, pairs: Pairs | None = None) -> Tensor:
    tau = batch.fields["temperature"]
    pairs = batch.negatives(batch.owner(b)) if pairs is None else pairs
    positive = batch.positive(b) / tau
    if not pairs:
        return positive * 0
    return (mass(pairs, lambda score: score / tau) + positive.exp()).log() - positive


def naive_bsl(batch: Naive, b: int, *, t2: float) -> Tensor:
    tau, query = batch.fields["temperature"], batch.owner(b)
    pairs = batch.negatives(query)
    if not pairs:
        return batch.positive(b) * 0
    siblings = batch.examples(query)
    liked = sum((batch.positive(other) / tau).exp() for other in siblings) / len(siblings)
    weights = sum(weight for _, weight in pairs)
    return -liked.log() + t2 * (mass(pairs, lambda score: score / tau) / weights).log()


def naive_triplet(batch: Naive, b: int, *, margin: float) -> Tensor:
    positive, pairs = batch.positive(b), batch.negatives(batch.owner(b))
    if not pairs:
        return positive * 0
    return mean(pairs, lambda score: torch.relu(margin - positive + score))


def naive_symmetric(batch: Naive, b: int, *, item_share: float) -> Tensor:
    back = naive_softmax(batch, b, pairs=batch.items_against_users(b))
    return (1 - item_share) * naive_softmax(batch, b) + item_share * back


def naive_skip_softmax(batch: Naive, b: int) -> Tensor:
    tau, positive = batch.fields["temperature"], batch.positive(b)
    pairs = batch.per_query(batch.owner(b), (int(Source.SKIPPED),))
    return (1 + mass(pairs, lambda score: (score - positive) / tau)).log()


TWINS: dict[str, tuple[Callable[[BatchLogits], Tensor], Callable[[Naive, int], Tensor]]] = {
    "softmax": (softmax, naive_softmax),
    "bsl": (partial(bsl, t2=1.22), partial(naive_bsl, t2=1.22)),
    "triplet": (partial(triplet, margin=0.4), partial(naive_triplet, margin=0.4)),
    "symmetric": (partial(symmetric, item_share=0.3), partial(naive_symmetric, item_share=0.3)),
    "skip_softmax": (skip_softmax, naive_skip_softmax),
}


def found(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *gradients(loss, leaves)]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradients_equal_a_loop_over_every_pair(size: Size, name: str) -> None:
    loss_of, loop = TWINS[name]
    fields, leaves = learning(case(size))
    slow_fields, slow_leaves = learning(case(size))
    fast = loss_of(logits(fields))
    batch = Naive(slow_fields)
    slow = torch.stack([loop(batch, b) for b in range(len(fields["target"]))])
    assert fast.shape == (len(fields["target"]),)
    for ours, theirs in zip(found(fast, leaves), found(slow, slow_leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("size", SIZES[2:4], ids=str)
def test_tiles_change_neither_value_nor_gradient(size: Size, name: str, tile: int) -> None:
    loss_of, _ = TWINS[name]
    whole_fields, whole_leaves = learning(case(size, seed=1))
    tiled_fields, tiled_leaves = learning(case(size, seed=1))
    whole = loss_of(logits(whole_fields))
    tiled = loss_of(logits(tiled_fields, tile=tile))
    for ours, theirs in zip(found(tiled, tiled_leaves), found(whole, whole_leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tile", [None, 1])
@pytest.mark.parametrize("name", TWINS)
def test_a_query_without_any_negative_has_loss_0_and_no_gradient(
    name: str, tile: int | None
) -> None:
    """Query 0 knows all three columns and was given nothing; query 1 is like any other."""
    fields = case(Size(2, 4, 3, dimension=3), seed=2)
    fields["owner"], fields["target"] = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 2, 0])
    fields["positive_mask"] = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 1, 2]])
    fields["per_query"] = torch.tensor([[1, 1], [2, 2]])
    fields["per_query_log_weight"] = torch.zeros(2, dtype=torch.float64)
    fields["per_query_source"] = torch.tensor([Source.SKIPPED, Source.MINED], dtype=torch.uint8)
    leaves_of, leaves = learning(fields)
    loss = TWINS[name][0](logits(leaves_of, tile=tile))
    assert loss.isfinite().all()
    assert loss[[0, 2]].eq(0).all()
    per_leaf = dict(zip((n for n in LEARNED if leaves_of.get(n) is not None),
                        gradients(loss, leaves), strict=True))  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in per_leaf.values())
    assert per_leaf["users"][0].eq(0).all()
    assert per_leaf["users"][1].ne(0).any()


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("name", TWINS)
def test_a_column_of_no_weight_is_as_one_that_all_know(name: str, tile: int | None) -> None:
    fields = case(SIZES[3])
    column = len(fields["log_weight"]) - 1  # remembered, so nobody's target
    weightless = {**fields, "log_weight": fields["log_weight"].clone()}
    weightless["log_weight"][column] = -torch.inf
    everyone = torch.stack([torch.arange(5), torch.full((5,), column)])
    blocked = {**fields, "positive_mask": torch.cat([fields["positive_mask"], everyone], 1)}
    (ours, our_leaves), (theirs, their_leaves) = learning(weightless), learning(blocked)
    loss_of = TWINS[name][0]
    fast = found(loss_of(logits(ours, tile=tile)), our_leaves)
    for one, other in zip(fast, found(loss_of(logits(theirs)), their_leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", TWINS)
def test_the_order_of_examples_is_of_no_consequence(name: str) -> None:
    fields = case(SIZES[3], seed=3)
    order = torch.randperm(len(fields["target"]), generator=torch.Generator().manual_seed(4))
    mixed = {**fields, "target": fields["target"][order], "owner": fields["owner"][order]}
    loss_of = TWINS[name][0]
    torch.testing.assert_close(loss_of(logits(mixed)), loss_of(logits(fields))[order])


@pytest.mark.parametrize("name", TWINS)
def test_extreme_scores_overflow_neither_value_nor_gradient(name: str) -> None:
    fields = case(SIZES[3], seed=5, dtype=torch.float32)
    fields["users"], fields["temperature"] = 20 * fields["users"], torch.tensor(0.01)
    fields, leaves = learning(fields)
    loss = TWINS[name][0](logits(fields))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, leaves))


def two(**changes: Any) -> BatchLogits:
    """A user at item 0; item 1 at right angles, item 2 opposite."""
    fields = {
        "users": torch.tensor([[1.0, 0.0]]),
        "items": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
        "target": torch.tensor([0]),
        "temperature": 0.5,
        "log_weight": torch.zeros(3),
    }
    return BatchLogits(**{**fields, **changes})


def test_softmax_by_hand() -> None:
    """Logits 2 for the positive, 0 and -2 for the negatives."""
    expected = math.log(1 + math.exp(-2) + math.exp(-4))
    assert softmax(two()).item() == pytest.approx(expected, rel=1e-6)


def test_the_correction_comes_after_the_temperature_and_spares_the_positive_by_hand() -> None:
    """Positive 1/.5 = 2 whatever its own weight; negatives weigh 4 and 8."""
    loss = softmax(two(log_weight=torch.tensor([16.0, 4.0, 8.0]).log()))
    assert loss.item() == pytest.approx(math.log(1 + 4 * math.exp(-2) + 8 * math.exp(-4)), rel=1e-6)


def test_bsl_by_hand() -> None:
    """-2 + 1.5 log((e^0 + e^-2)/2)."""
    expected = -2 + 1.5 * math.log((1 + math.exp(-2)) / 2)
    assert bsl(two(), t2=1.5).item() == pytest.approx(expected, rel=1e-6)


def test_bsl_pools_the_examples_of_a_query_by_hand() -> None:
    """Items 0 and 1 are liked, logits 2 and 0; item 2 is not, logit -2."""
    batch = two(target=torch.tensor([0, 1]), owner=torch.tensor([0, 0]))
    expected = -math.log((math.exp(2) + 1) / 2) + 1.5 * -2
    assert bsl(batch, t2=1.5).tolist() == pytest.approx([expected, expected], rel=1e-6)


def test_a_skip_of_weight_a_half_by_hand() -> None:
    """Only item 0 is a candidate; item 1 was skipped."""
    given_ = {
        "log_weight": torch.zeros(1),
        "per_query": torch.tensor([[0], [1]]),
        "per_query_log_weight": torch.tensor([0.5]).log(),
    }
    expected = math.log(1 + 0.5 * math.exp(-2))
    assert skip_softmax(two(**given_)).item() == pytest.approx(expected, rel=1e-6)


def test_the_term_of_skips_moves_the_clicked_and_the_skipped_and_leaves_the_random() -> None:
    """Item 0 was clicked, item 1 skipped, item 2 only drawn."""
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    batch = two(items=items, per_query=torch.tensor([[0], [1]]))
    (gradient,) = torch.autograd.grad(skip_softmax(batch).sum(), items)
    clicked, skipped, random = gradient[:, 0].tolist()
    assert clicked < 0 < skipped
    assert clicked == pytest.approx(-skipped)
    assert random == 0


def test_the_transposed_softmax_of_one_to_one_batches_is_clip() -> None:
    rng = torch.Generator().manual_seed(8)
    users, items = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    batch = BatchLogits(
        users=users,
        items=items,
        target=torch.arange(5),
        temperature=0.7,
        log_weight=torch.zeros(5),
    )
    logits = users @ items.T / 0.7
    clip = F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))
    torch.testing.assert_close(symmetric(batch).mean(), clip / 2)


@given(st.integers(0, 2**31), st.floats(-4, 4))
@settings(max_examples=15)
def test_shifting_log_weights_by_c_scales_every_drawn_negative_by_exp_c(
    seed: int, c: float
) -> None:
    fields = {
        **case(SIZES[3], seed),
        "per_query": None,
        "per_query_log_weight": None,
        "per_query_source": None,
    }
    shifted = {**fields, "log_weight": fields["log_weight"] + c}
    # exp(loss) - 1 is the mass of the negatives beside that of the positive.
    torch.testing.assert_close(
        softmax(logits(shifted)).expm1(), softmax(logits(fields)).expm1() * math.exp(c)
    )
    for mean_of in (triplet,):  # a mean does not care
        torch.testing.assert_close(mean_of(logits(shifted)), mean_of(logits(fields)))
    torch.testing.assert_close(bsl(logits(shifted)), bsl(logits(fields)))


def test_every_named_loss_is_tested() -> None:
    assert set(LOSSES) <= set(TWINS)
    for loss_of in LOSSES.values():
        assert loss_of(two()).shape == (1,)


def test_triplet_by_hand() -> None:
    assert triplet(two(), margin=1.5).item() == pytest.approx((0.5 + 0) / 2)
