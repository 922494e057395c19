"""The in-batch softmax: by hand, against a loop over every pair, and by its properties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from towers.losses import in_batch_softmax, ragged_logaddexp


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def naive(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    log_inclusion: Tensor,
    temperature: Tensor | float,
    known: Tensor | None = None,
    skips: Tensor | None = None,
    skip_log_weight: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The same, one exponential at a time."""
    edges = set() if known is None else set(zip(*known.tolist(), strict=True))
    losses = []
    for b in range(len(users)):
        positive = users[b].dot(items[target[b]]) / temperature
        total = positive.exp()
        for n in range(len(log_inclusion)):
            if n != int(target[b]) and (b, n) not in edges:
                score = users[b].dot(items[n]) / temperature
                total = total + score.exp() / log_inclusion[n].exp()
        for s in range(0 if skips is None else skips.shape[1]):
            if int(skips[0, s]) == b:
                factor = 1.0 if skip_log_weight is None else skip_log_weight[s].exp()
                total = total + factor * (users[b].dot(items[skips[1, s]]) / temperature).exp()
        losses.append(total.log() - positive)
    weights = torch.ones(len(users)) if weight is None else weight
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / weights.sum()


def case(examples: int, candidates: int, extra: int, dimension: int, seed: int) -> dict[str, Any]:
    """A random batch with known edges, skips (some of them candidates) and weights."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(candidates, (examples,), generator=rng)
    blocked = torch.rand(examples, candidates, generator=rng) < 0.3
    blocked[torch.arange(examples), target] = False
    skip_count = 2 * examples
    return {
        "users": torch.randn(examples, dimension, generator=rng),
        "items": torch.randn(candidates + extra, dimension, generator=rng),
        "target": target,
        "log_inclusion": torch.rand(candidates, generator=rng).clamp(0.05).log(),
        "temperature": torch.tensor(0.7),
        "known": blocked.nonzero().T,
        "skips": torch.stack(
            [
                torch.randint(examples, (skip_count,), generator=rng),
                torch.randint(candidates + extra, (skip_count,), generator=rng),
            ]
        ),
        "skip_log_weight": torch.rand(skip_count, generator=rng).clamp(0.05).log(),
        "weight": torch.rand(examples, generator=rng) + 0.1,
    }


SIZES = [(1, 1, 0, 2), (1, 5, 0, 3), (3, 2, 1, 5), (7, 5, 4, 3), (5, 11, 3, 1), (13, 9, 6, 7)]
OPTIONS = [
    (),
    ("known",),
    ("weight",),
    ("skips",),
    ("skips", "skip_log_weight"),
    ("known", "skips", "skip_log_weight", "weight"),
]
SEED = st.integers(0, 2**32 - 1)


def test_two_users_two_items_by_hand() -> None:
    eye = torch.eye(2)
    loss = in_batch_softmax(
        eye, eye, torch.tensor([0, 1]), log_inclusion=torch.zeros(2), temperature=1.0
    )
    assert loss.item() == pytest.approx(math.log(1 + 1 / math.e), rel=1e-6)


def test_the_temperature_divides_before_the_correction_by_hand() -> None:
    """Positive 1/.5 = 2 without correction; negative 0/.5 - log .25 = log 4."""
    loss = in_batch_softmax(
        torch.tensor([[1.0, 0.0]]),
        torch.eye(2),
        torch.tensor([0]),
        log_inclusion=torch.tensor([0.125, 0.25]).log(),
        temperature=0.5,
    )
    assert loss.item() == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-6)


def test_a_skip_of_weight_a_half_by_hand() -> None:
    loss = in_batch_softmax(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([0]),
        log_inclusion=torch.zeros(1),
        temperature=1.0,
        skips=torch.tensor([[0], [1]]),
        skip_log_weight=torch.tensor([0.5]).log(),
    )
    assert loss.item() == pytest.approx(math.log(1 + 0.5 / math.e), rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradients_equal_a_loop_over_every_pair(
    size: tuple[int, int, int, int], options: tuple[str, ...]
) -> None:
    given_ = case(*size, seed=sum(size))
    optional = {"known", "skips", "skip_log_weight", "weight"}
    kept = {name: v for name, v in given_.items() if name not in optional or name in options}
    learned = [n for n in ("users", "items", "temperature", "skip_log_weight") if n in kept]
    found = {}
    for loss_of in (in_batch_softmax, naive):
        inputs = {
            name: v.clone().requires_grad_() if name in learned else v for name, v in kept.items()
        }
        loss = loss_of(**inputs)
        found[loss_of] = [loss.detach()]
        found[loss_of] += torch.autograd.grad(
            loss, [inputs[name] for name in learned], allow_unused=True
        )
    for fast, slow in zip(found[in_batch_softmax], found[naive], strict=True):
        torch.testing.assert_close(fast, slow, rtol=2e-4, atol=2e-6)


@given(SEED, st.floats(-4, 4))
@settings(max_examples=25)
def test_shifting_log_counts_by_c_scales_every_negative_by_exp_minus_c(seed: int, c: float) -> None:
    batch = case(5, 7, 0, 3, seed)
    for name in ("skips", "skip_log_weight", "weight"):
        del batch[name]
    one = {**batch, "users": batch["users"][:1], "target": batch["target"][:1]}
    one["known"] = batch["known"][:, batch["known"][0] == 0]
    # exp(loss) - 1 is the mass of the negatives beside that of the positive.
    plain = in_batch_softmax(**one).double().expm1()
    one["log_inclusion"] = one["log_inclusion"] + c
    shifted = in_batch_softmax(**one).double().expm1()
    assert shifted.item() == pytest.approx(plain.item() * math.exp(-c), rel=1e-3, abs=1e-5)


@given(SEED)
@settings(max_examples=25)
def test_permuting_a_batch_leaves_the_loss(seed: int) -> None:
    batch = case(6, 5, 3, 4, seed)
    rng = torch.Generator().manual_seed(seed)
    example = torch.randperm(6, generator=rng)
    # Candidates among themselves, and the rows that are only skipped among themselves.
    row = torch.cat([torch.randperm(5, generator=rng), 5 + torch.randperm(3, generator=rng)])
    edge = torch.randperm(batch["skips"].shape[1], generator=rng)
    to_example, to_row = example.argsort(), row.argsort()
    permuted = {
        **batch,
        "users": batch["users"][example],
        "items": batch["items"][row],
        "target": to_row[batch["target"][example]],
        "log_inclusion": batch["log_inclusion"][row[:5]],
        "known": torch.stack([to_example[batch["known"][0]], to_row[batch["known"][1]]]),
        "skips": torch.stack([to_example[batch["skips"][0]], to_row[batch["skips"][1]]])[:, edge],
        "skip_log_weight": batch["skip_log_weight"][edge],
        "weight": batch["weight"][example],
    }
    torch.testing.assert_close(in_batch_softmax(**permuted), in_batch_softmax(**batch))


@given(SEED)
@settings(max_examples=25)
def test_an_item_that_everyone_knows_gets_no_gradient(seed: int) -> None:
    batch = case(4, 5, 0, 3, seed)
    batch["target"] = batch["target"] % 4  # nobody chose item 4
    batch["known"] = torch.stack([torch.arange(4), torch.full((4,), 4)])
    batch["skips"] = batch["skips"][:, batch["skips"][1] != 4]
    batch["skip_log_weight"] = batch["skip_log_weight"][: batch["skips"].shape[1]]
    items = batch["items"].requires_grad_()
    (gradient,) = torch.autograd.grad(in_batch_softmax(**batch), items)
    assert gradient[4].eq(0).all()
    assert gradient[:4].ne(0).any(1).all()


@given(SEED, st.integers(0, 5))
@settings(max_examples=25)
def test_a_skip_of_weight_1_is_one_more_negative_column_for_that_user_only(
    seed: int, who: int
) -> None:
    batch = case(6, 5, 1, 4, seed)
    for name in ("weight", "skip_log_weight"):
        del batch[name]
    skipping = {**batch, "skips": torch.tensor([[who], [5]])}
    others = torch.tensor([b for b in range(6) if b != who])
    column = {
        **batch,
        "skips": None,
        "log_inclusion": torch.cat([batch["log_inclusion"], torch.zeros(1)]),
        "known": torch.cat(
            [batch["known"], torch.stack([others, torch.full_like(others, 5)])], dim=1
        ),
    }
    torch.testing.assert_close(in_batch_softmax(**skipping), in_batch_softmax(**column))


def test_an_example_of_weight_2_counts_as_two() -> None:
    batch = case(4, 5, 0, 3, seed=1)
    for name in ("known", "skips", "skip_log_weight", "weight"):
        del batch[name]
    twice = torch.tensor([0, 1, 1, 2, 3])
    repeated = {**batch, "users": batch["users"][twice], "target": batch["target"][twice]}
    weighted = {**batch, "weight": torch.tensor([1.0, 2.0, 1.0, 1.0])}
    torch.testing.assert_close(in_batch_softmax(**weighted), in_batch_softmax(**repeated))


def test_a_batch_in_which_nothing_weighs_gives_zero_and_no_nan() -> None:
    batch = case(3, 4, 0, 2, seed=2)
    batch["weight"] = torch.zeros(3)
    users = batch["users"].requires_grad_()
    loss = in_batch_softmax(**batch)
    loss.backward()
    assert loss.item() == 0
    assert users.grad.eq(0).all()


def test_large_scores_overflow_neither_value_nor_gradient() -> None:
    batch = case(5, 6, 2, 3, seed=3)
    batch["temperature"] = torch.tensor(1e-3)
    items = batch["items"].requires_grad_()
    loss = in_batch_softmax(**batch)
    (gradient,) = torch.autograd.grad(loss, items)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@given(SEED, st.integers(0, 12))
@settings(max_examples=40)
def test_ragged_logaddexp_equals_a_loop_in_value_and_gradient(seed: int, terms: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    total = (5 * torch.randn(5, generator=rng)).double().requires_grad_()
    added = (5 * torch.randn(terms, generator=rng)).double().requires_grad_()
    row = torch.randint(5, (terms,), generator=rng)
    fast = ragged_logaddexp(total, added, row)
    slow = torch.stack(
        [torch.cat([total[b : b + 1], added[row == b]]).logsumexp(0) for b in range(5)]
    )
    torch.testing.assert_close(fast, slow)
    mix = torch.arange(1.0, 6.0).double()
    for ours, theirs in zip(
        torch.autograd.grad(fast @ mix, [total, added]),
        torch.autograd.grad(slow @ mix, [total, added]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_on_a_zipf_toy_inclusion_has_the_least_gradient_bias_of_deduplicated_columns() -> None:
    """Full softmax over 200 items against the mean gradient of many in-batch estimates."""
    n_items, batch_size, batches = 200, 256, 60
    rng = np.random.default_rng(5)
    share = 1 / np.arange(1, n_items + 1) ** 1.1
    share /= share.sum()
    log_share = torch.from_numpy(np.log(share)).float()
    logits = torch.from_numpy(rng.normal(size=n_items)).float() + 0.7 * (log_share + 5)
    others = batch_size - 1
    corrections = {
        "none": torch.zeros(n_items),
        "count": log_share + math.log(others),
        "inclusion": torch.from_numpy(np.log(-np.expm1(others * np.log1p(-share)))).float(),
    }
    mean = {name: torch.zeros(n_items) for name in corrections}
    chosen = torch.zeros(n_items)
    for _ in range(batches):
        drawn = rng.choice(n_items, batch_size, p=share)
        columns, target = np.unique(drawn, return_inverse=True)
        items = torch.eye(n_items)[columns]  # so that the score of item n is logits[n]
        chosen += torch.from_numpy(np.bincount(drawn, minlength=n_items)) / batch_size / batches
        for name, correction in corrections.items():
            users = logits.repeat(batch_size, 1).requires_grad_()
            loss = in_batch_softmax(
                users,
                items,
                torch.from_numpy(target),
                log_inclusion=correction[columns],
                temperature=1.0,
            )
            mean[name] += torch.autograd.grad(loss, users)[0].sum(0) / batches
    exact = logits.softmax(0) - chosen
    bias = {name: ((m - exact).norm() / exact.norm()).item() for name, m in mean.items()}
    assert bias["inclusion"] < 0.5 * bias["count"]
    assert bias["inclusion"] < 0.5 * bias["none"]
    assert bias["inclusion"] < 0.1


def test_skips_apart_add_a_softmax_of_the_positive_against_them() -> None:
    # One user, the positive and a drawn negative score 1 and 0, a skip of weight 2 scores 0.
    users = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    loss = in_batch_softmax(
        users, items, torch.tensor([0]), log_inclusion=torch.zeros(2), temperature=1.0,
        skips=torch.tensor([[0], [2]]), skip_log_weight=torch.log(torch.tensor([2.0])),
        skip_share=0.5,
    )  # fmt: skip
    main, apart = math.log(1 + math.exp(-1)), math.log(1 + 2 * math.exp(-1))
    assert loss.item() == pytest.approx(main + 0.5 * apart)


def test_an_example_without_skips_has_no_term_apart() -> None:
    users, items = torch.eye(2), torch.eye(2)
    plain = in_batch_softmax(
        users, items, torch.tensor([0, 1]), log_inclusion=torch.zeros(2), temperature=1.0
    )
    skips = torch.tensor([[0], [1]])
    with_skips = in_batch_softmax(
        users, items, torch.tensor([0, 1]), log_inclusion=torch.zeros(2), temperature=1.0,
        skips=skips, skip_share=1.0, weight=torch.tensor([0.0, 1.0]),
    )  # fmt: skip
    assert with_skips.item() == pytest.approx(plain.item())
