"""Every objective: against a loop over every pair, by hand, and by what sets it apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cases import LEARNED, SIZES, Naive, Size, case, gradients, learning, scores
from torch import Tensor
from torch.nn import functional as F

from recsys.features.batching.batch import Source
from recsys.towers.logits import Scores
from recsys.towers.losses import (
    OBJECTIVES,
    bsl,
    ccl,
    full_softmax,
    margin_softmax,
    matryoshka,
    psl,
    skip_term,
    sl_at_k,
    softmax,
    symmetric,
    triplet,
)


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


def naive_softmax(
    batch: Naive,
    b: int,
    *,
    decoupled: bool = False,
    handicap: float = 0,
    pairs: Pairs | None = None,
) -> Tensor:
    tau = batch.fields["temperature"]
    pairs = batch.negatives(batch.owner(b)) if pairs is None else pairs
    positive = (batch.positive(b) - handicap) / tau
    if not pairs:
        return positive * 0
    total = mass(pairs, lambda score: score / tau)
    return (total if decoupled else total + positive.exp()).log() - positive


def naive_bsl(batch: Naive, b: int, *, t2: float) -> Tensor:
    tau, query = batch.fields["temperature"], batch.owner(b)
    pairs = batch.negatives(query)
    if not pairs:
        return batch.positive(b) * 0
    siblings = batch.examples(query)
    liked = sum((batch.positive(other) / tau).exp() for other in siblings) / len(siblings)
    weights = sum(weight for _, weight in pairs)
    return -liked.log() + t2 * (mass(pairs, lambda score: score / tau) / weights).log()


def naive_psl(batch: Naive, b: int, *, form: str, decoupled: bool) -> Tensor:
    tau, positive = batch.fields["temperature"], batch.positive(b)
    surrogate = {
        "tanh": lambda d: 1 + torch.tanh(d),
        "atan": lambda d: 1 + torch.atan(d),
        "relu": lambda d: torch.relu(1 + d),
    }[form]
    pairs = batch.negatives(batch.owner(b))
    if not pairs:
        return positive * 0
    total = sum(weight * surrogate((score - positive) / 2) ** (1 / tau) for score, weight in pairs)
    return (total if decoupled else total + 1).log()


def naive_sl_at_k(batch: Naive, b: int, *, k: int, tau_beta: float) -> Tensor:
    fields, query = batch.fields, batch.owner(b)
    columns = len(fields["log_weight"])
    vectors = list(
        fields["items"][: columns - (0 if fields["queued"] is None else len(fields["queued"]))]
    )
    vectors += [] if fields["queued"] is None else list(fields["queued"])
    ranked = sorted((fields["users"][query].dot(v).item() for v in vectors), reverse=True)
    weight = torch.sigmoid((batch.positive(b) - ranked[min(k, columns) - 1]) / tau_beta)
    return weight * naive_softmax(batch, b, decoupled=True)


def naive_triplet(batch: Naive, b: int, *, margin: float) -> Tensor:
    positive, pairs = batch.positive(b), batch.negatives(batch.owner(b))
    if not pairs:
        return positive * 0
    return mean(pairs, lambda score: torch.relu(margin - positive + score))


def naive_ccl(batch: Naive, b: int, *, margin: float, negative_weight: float) -> Tensor:
    positive, pairs = batch.positive(b), batch.negatives(batch.owner(b))
    if not pairs:
        return positive * 0
    hinge = mean(pairs, lambda score: torch.relu(score - margin))
    return 1 - positive + negative_weight * hinge


def naive_symmetric(batch: Naive, b: int, *, item_share: float) -> Tensor:
    back = naive_softmax(batch, b, pairs=batch.items_against_users(b))
    return (1 - item_share) * naive_softmax(batch, b) + item_share * back


def naive_matryoshka(
    batch: Naive, b: int, *, dimensions: list[int], weights: list[float]
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for dimension, weight in zip(dimensions, weights, strict=True):
        fields = {**batch.fields}
        for name in ("users", "items", "queued"):
            if fields[name] is not None:
                cut = fields[name][:, :dimension]
                fields[name] = cut / cut.norm(dim=1, keepdim=True)
        total = total + weight * naive_softmax(Naive(fields), b)
    return total


def naive_skip_term(batch: Naive, b: int, *, scale: float, source: Source) -> Tensor:
    tau, positive = batch.fields["temperature"], batch.positive(b)
    pairs = batch.own(batch.owner(b), (int(source),))
    return (1 + mass(pairs, lambda score: scale * (score - positive) / tau)).log()


TWINS: dict[str, tuple[Callable[[Scores], Tensor], Callable[[Naive, int], Tensor]]] = {
    "softmax": (softmax, naive_softmax),
    "full_softmax": (softmax, naive_softmax),
    "decoupled softmax": (
        partial(softmax, decoupled=True),
        partial(naive_softmax, decoupled=True),
    ),
    "bsl": (partial(bsl, t2=1.22), partial(naive_bsl, t2=1.22)),
    **{
        f"psl {form}{' with the positive' * (not decoupled)}": (
            partial(psl, form=form, decoupled=decoupled),
            partial(naive_psl, form=form, decoupled=decoupled),
        )
        for form, decoupled in [("tanh", False), ("atan", True), ("relu", True), ("relu", False)]
    },
    "psl": (psl, partial(naive_psl, form="tanh", decoupled=True)),
    "sl_at_k": (partial(sl_at_k, k=3, tau_beta=0.7), partial(naive_sl_at_k, k=3, tau_beta=0.7)),
    "triplet": (partial(triplet, margin=0.4), partial(naive_triplet, margin=0.4)),
    "margin_softmax": (
        partial(margin_softmax, margin=0.2),
        partial(naive_softmax, handicap=0.2),
    ),
    "ccl": (
        partial(ccl, margin=0.1, negative_weight=3.0),
        partial(naive_ccl, margin=0.1, negative_weight=3.0),
    ),
    "symmetric": (partial(symmetric, item_share=0.3), partial(naive_symmetric, item_share=0.3)),
    "matryoshka": (
        partial(matryoshka, dimensions=[2, 1], weights=[0.5, 2.0]),
        partial(naive_matryoshka, dimensions=[2, 1], weights=[0.5, 2.0]),
    ),
    "skip_term": (
        partial(skip_term, scale=0.6),
        partial(naive_skip_term, scale=0.6, source=Source.SKIPPED),
    ),
    "mined_term": (
        partial(skip_term, scale=1.0, source=Source.MINED),
        partial(naive_skip_term, scale=1.0, source=Source.MINED),
    ),
}


def found(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *gradients(loss, leaves)]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradients_equal_a_loop_over_every_pair(size: Size, name: str) -> None:
    objective, loop = TWINS[name]
    fields, leaves = learning(case(size))
    slow_fields, slow_leaves = learning(case(size))
    fast = objective(scores(fields))
    batch = Naive(slow_fields)
    slow = torch.stack([loop(batch, b) for b in range(len(fields["target"]))])
    assert fast.shape == (len(fields["target"]),)
    for ours, theirs in zip(found(fast, leaves), found(slow, slow_leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("size", SIZES[2:4], ids=str)
def test_tiles_change_neither_value_nor_gradient(size: Size, name: str, tile: int) -> None:
    objective, _ = TWINS[name]
    whole_fields, whole_leaves = learning(case(size, seed=1))
    tiled_fields, tiled_leaves = learning(case(size, seed=1))
    whole = objective(scores(whole_fields))
    tiled = objective(scores(tiled_fields, tile=tile))
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
    fields["known"] = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 1, 2]])
    fields["own"] = torch.tensor([[1], [2]])
    for field in ("own_log_weight", "own_source"):
        fields[field] = torch.zeros(1, dtype=fields[field].dtype)
    leaves_of, leaves = learning(fields)
    loss = TWINS[name][0](scores(leaves_of, tile=tile))
    assert loss.isfinite().all()
    assert loss[[0, 2]].eq(0).all()
    per_leaf = dict(zip((n for n in LEARNED if leaves_of.get(n) is not None),
                        gradients(loss, leaves), strict=True))  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in per_leaf.values())
    assert per_leaf["users"][0].eq(0).all()
    if name != "mined_term":
        assert per_leaf["users"][1].ne(0).any()


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("name", TWINS)
def test_a_column_of_no_weight_is_as_one_that_all_know(name: str, tile: int | None) -> None:
    fields = case(SIZES[3])
    column = len(fields["log_weight"]) - 1  # remembered, so nobody's target
    weightless = {**fields, "log_weight": fields["log_weight"].clone()}
    weightless["log_weight"][column] = -torch.inf
    everyone = torch.stack([torch.arange(5), torch.full((5,), column)])
    blocked = {**fields, "known": torch.cat([fields["known"], everyone], 1)}
    (ours, our_leaves), (theirs, their_leaves) = learning(weightless), learning(blocked)
    objective = TWINS[name][0]
    fast = found(objective(scores(ours, tile=tile)), our_leaves)
    for one, other in zip(fast, found(objective(scores(theirs)), their_leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", TWINS)
def test_the_order_of_examples_is_of_no_consequence(name: str) -> None:
    fields = case(SIZES[3], seed=3)
    order = torch.randperm(len(fields["target"]), generator=torch.Generator().manual_seed(4))
    mixed = {**fields, "target": fields["target"][order], "owner": fields["owner"][order]}
    objective = TWINS[name][0]
    torch.testing.assert_close(objective(scores(mixed)), objective(scores(fields))[order])


@pytest.mark.parametrize("name", TWINS)
def test_extreme_scores_overflow_neither_value_nor_gradient(name: str) -> None:
    fields = case(SIZES[3], seed=5, dtype=torch.float32)
    fields["users"], fields["temperature"] = 20 * fields["users"], torch.tensor(0.01)
    fields, leaves = learning(fields)
    loss = TWINS[name][0](scores(fields))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, leaves))


def two(**changes: Any) -> Scores:
    """A user at item 0; item 1 at right angles, item 2 opposite."""
    fields = {
        "users": torch.tensor([[1.0, 0.0]]),
        "items": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
        "target": torch.tensor([0]),
        "temperature": 0.5,
        "log_weight": torch.zeros(3),
    }
    return Scores(**{**fields, **changes})


def test_softmax_by_hand() -> None:
    """Logits 2 for the positive, 0 and -2 for the negatives."""
    expected = math.log(1 + math.exp(-2) + math.exp(-4))
    assert softmax(two()).item() == pytest.approx(expected, rel=1e-6)
    assert full_softmax(two()).item() == pytest.approx(expected, rel=1e-6)


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
    scores_ = two(target=torch.tensor([0, 1]), owner=torch.tensor([0, 0]))
    expected = -math.log((math.exp(2) + 1) / 2) + 1.5 * -2
    assert bsl(scores_, t2=1.5).tolist() == pytest.approx([expected, expected], rel=1e-6)


def test_psl_by_hand() -> None:
    """d is -1/2 and -1; the temperature .5 squares the surrogates."""
    expected = {
        "tanh": math.log((1 - math.tanh(0.5)) ** 2 + (1 - math.tanh(1)) ** 2),
        "atan": math.log((1 - math.atan(0.5)) ** 2 + (1 - math.atan(1)) ** 2),
        "relu": math.log(0.5**2),
    }
    for form, value in expected.items():
        assert psl(two(), form=form).item() == pytest.approx(value, rel=1e-5)


def test_sl_at_k_by_hand() -> None:
    """The second of the scores 1, 0, -1 is 0: weight sigmoid(1/.5) on log(e^-2 + e^-4)."""
    expected = math.log(math.exp(-2) + math.exp(-4)) / (1 + math.exp(-2))
    found = [
        sl_at_k(two(), k=2, tau_beta=0.5).item(),
        sl_at_k(two(), threshold=torch.tensor([0.0]), tau_beta=0.5).item(),
    ]
    assert found == pytest.approx([expected, expected], rel=1e-6)


def test_triplet_margin_softmax_and_ccl_by_hand() -> None:
    assert triplet(two(), margin=1.5).item() == pytest.approx((0.5 + 0) / 2)
    assert margin_softmax(two(), margin=0.25).item() == pytest.approx(
        math.log(1 + math.exp(-1.5) + math.exp(-3.5)), rel=1e-6
    )
    weighted = two(log_weight=torch.tensor([1.0, 3.0, 1.0]).log())
    assert ccl(weighted, margin=-0.5, negative_weight=2).item() == pytest.approx(
        (1 - 1) + 2 * (3 * 0.5 + 0) / 4
    )


def test_a_skip_of_weight_a_half_by_hand() -> None:
    """Only item 0 is a candidate; item 1 was skipped."""
    given_ = {
        "log_weight": torch.zeros(1),
        "own": torch.tensor([[0], [1]]),
        "own_log_weight": torch.tensor([0.5]).log(),
    }
    expected = math.log(1 + 0.5 * math.exp(-2))
    assert softmax(two(**given_)).item() == pytest.approx(expected, rel=1e-6)
    assert skip_term(two(**given_)).item() == pytest.approx(expected, rel=1e-6)


def test_the_term_of_skips_is_the_same_whether_or_not_they_join_the_columns() -> None:
    fields = case(SIZES[3])
    apart = scores(fields, joining=(1, 2))
    torch.testing.assert_close(skip_term(apart), skip_term(scores(fields)))
    assert softmax(apart).ne(softmax(scores(fields))).any()


def test_the_term_of_skips_moves_the_clicked_and_the_skipped_and_leaves_the_random() -> None:
    """Item 0 was clicked, item 1 skipped, item 2 only drawn."""
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    batch = two(items=items, own=torch.tensor([[0], [1]]))
    (gradient,) = torch.autograd.grad(skip_term(batch).sum(), items)
    clicked, skipped, random = gradient[:, 0].tolist()
    assert clicked < 0 < skipped
    assert clicked == pytest.approx(-skipped)
    assert random == 0


def test_the_transposed_softmax_of_one_to_one_batches_is_clip() -> None:
    rng = torch.Generator().manual_seed(8)
    users, items = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    batch = Scores(
        users=users,
        items=items,
        target=torch.arange(5),
        temperature=0.7,
        log_weight=torch.zeros(5),
    )
    logits = users @ items.T / 0.7
    clip = F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))
    torch.testing.assert_close(symmetric(batch).mean(), clip / 2)


def test_a_decoupled_loss_keeps_pushing_where_the_softmax_has_stopped() -> None:
    def push(objective: Callable[[Scores], Tensor]) -> float:
        users = torch.tensor([[1.0, 0.0]], requires_grad=True)
        loss = objective(two(users=users, temperature=0.02))
        (gradient,) = torch.autograd.grad(loss.sum(), users)
        return float(gradient.norm())

    assert push(softmax) < 1e-12 < 1 < push(partial(softmax, decoupled=True))


def test_no_pair_outweighs_all_others_in_psl() -> None:
    """A false negative far above the positive gets nearly all of a softmax, not so of PSL."""

    def share(objective: Callable[[Scores], Tensor]) -> float:
        items = torch.tensor([[-0.9, 0.0], [0.9, 0.0], [0.3, 0.0]], requires_grad=True)
        loss = objective(two(items=items, temperature=0.1))
        (gradient,) = torch.autograd.grad(loss.sum(), items)
        return float(gradient[1, 0] / gradient[1:, 0].sum())

    # PSL's d is half a difference, so half the temperature is the same steepness at 0.
    assert share(softmax) > 0.99
    assert share(psl) < 0.9


def test_an_example_below_its_threshold_weighs_less_in_sl_at_k() -> None:
    weights = [
        float(
            sl_at_k(two(), threshold=torch.tensor([beta]), tau_beta=0.1)
            / softmax(two(), decoupled=True)
        )
        for beta in (0.5, 1.0, 1.5)
    ]
    assert weights == pytest.approx([1 / (1 + math.exp(-5)), 0.5, 1 / (1 + math.exp(5))], rel=1e-5)


def test_thresholds_get_no_gradient() -> None:
    beta = torch.tensor([0.3], requires_grad=True)
    loss = sl_at_k(two(users=torch.tensor([[1.0, 0.0]], requires_grad=True)), threshold=beta)
    assert torch.autograd.grad(loss.sum(), beta, allow_unused=True) == (None,)


def test_matryoshka_of_the_full_length_alone_is_the_objective() -> None:
    fields = case(SIZES[3])
    torch.testing.assert_close(
        matryoshka(scores(fields), dimensions=[4], objective=bsl), bsl(scores(fields))
    )


def test_matryoshka_leaves_an_item_bias_in_every_length() -> None:
    """The last dimension is a bias: users have 1 there."""
    fields = case(SIZES[2])
    ones = torch.ones(len(fields["users"]), 1, dtype=torch.float64)
    bias = {name: torch.linspace(-1, 1, len(fields[name]), dtype=torch.float64)[:, None]
            for name in ("items", "queued")}  # fmt: skip
    biased = {**fields, "users": torch.cat([fields["users"], ones], 1)}
    for name, values in bias.items():
        biased[name] = torch.cat([fields[name], values], 1)
    cut = scores(biased).truncated(2, keep_last=1)
    expected = scores(fields).truncated(2).positive_score + bias["items"][fields["target"], 0]
    torch.testing.assert_close(cut.positive_score, expected)


@given(st.integers(0, 2**31), st.floats(-4, 4))
@settings(max_examples=15)
def test_shifting_log_weights_by_c_scales_every_drawn_negative_by_exp_c(
    seed: int, c: float
) -> None:
    fields = {**case(SIZES[3], seed), "own": None, "own_log_weight": None, "own_source": None}
    shifted = {**fields, "log_weight": fields["log_weight"] + c}
    # exp(loss) - 1 is the mass of the negatives beside that of the positive.
    torch.testing.assert_close(
        softmax(scores(shifted)).expm1(), softmax(scores(fields)).expm1() * math.exp(c)
    )
    for mean_of in (triplet, ccl):  # a mean does not care
        torch.testing.assert_close(mean_of(scores(shifted)), mean_of(scores(fields)))
    torch.testing.assert_close(bsl(scores(shifted)), bsl(scores(fields)))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cosh' is no form of PSL; use tanh, atan, relu\."):
        psl(two(), form="cosh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be cut to 3"):
        matryoshka(two(), dimensions=[1, 3])
    with pytest.raises(ValueError, match="are not pairs"):
        matryoshka(two(), dimensions=[1, 2], weights=[1.0])
    with pytest.raises(ValueError, match="no remembered columns"):
        full_softmax(two(queued=torch.ones(1, 2), log_weight=torch.zeros(4)))


def test_every_name_of_the_table_is_a_tested_objective_of_scores_alone() -> None:
    assert set(OBJECTIVES) <= set(TWINS)
    for objective in OBJECTIVES.values():
        assert objective(two()).shape == (1,)
