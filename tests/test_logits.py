"""BatchLogits: what is a negative for whom, sums of exponentials, tiles, precision, other views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logits_cases import SIZES, Naive, Size, case, gradients, learning, logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.features.batching.batch import Source
from recsys.towers.logits import BatchLogits, ragged_logaddexp
from recsys.towers.losses import bsl, softmax, symmetric, triplet


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def listed(fields: dict[str, Any], of: Callable[[list[tuple[Tensor, Tensor]]], float]) -> Tensor:
    """A number of the listed negatives of every query."""
    batch = Naive(fields)
    return torch.tensor([of(batch.negatives(q)) for q in range(len(fields["users"]))]).double()


def the_same_as_each_of(size: Size) -> tuple[BatchLogits, BatchLogits]:
    """With owners, and with each example as a query that knows its siblings' targets."""
    fields = case(size)
    return logits(fields), logits(fields).per_example()


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_and_means_are_over_the_listed_negatives(size: Size, tile: int | None) -> None:
    fields = case(size)
    batch = logits(fields, tile=tile)

    def logsumexp(pairs: list[tuple[Tensor, Tensor]]) -> float:
        total = sum(float(w) * math.exp(float(s) / 0.3) for s, w in pairs)
        return math.log(total) if pairs else -math.inf

    def log_mass(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return math.log(sum(float(w) for _, w in pairs)) if pairs else -math.inf

    torch.testing.assert_close(batch.logsumexp(), listed(fields, logsumexp))
    torch.testing.assert_close(batch.log_mass(), listed(fields, log_mass))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_positives_are_those_of_the_loop(size: Size) -> None:
    fields = case(size)
    batch = Naive(fields)
    expected = torch.stack([batch.positive(b) for b in range(len(fields["target"]))])
    torch.testing.assert_close(logits(fields).positive_score, expected)
    torch.testing.assert_close(logits(fields).positive, expected / 0.3)


def test_a_target_is_never_a_negative_of_its_own_query_though_of_others() -> None:
    """Query 0 chose items 0 and 1, query 1 chose item 2; all scores are 0."""
    batch = BatchLogits(
        users=torch.zeros(2, 2),
        items=torch.zeros(4, 2),
        target=torch.tensor([0, 2, 1]),
        temperature=1.0,
        log_weight=torch.zeros(4),
        owner=torch.tensor([0, 1, 0]),
    )
    assert batch.logsumexp().exp().tolist() == pytest.approx([2, 3])


def test_an_edge_that_is_named_twice_blocks_once() -> None:
    fields = case(SIZES[3])
    twice = {**fields, "positive_mask": torch.cat([fields["positive_mask"]] * 2, 1)}
    torch.testing.assert_close(logits(twice).log_mass(), logits(fields).log_mass())


def test_negatives_of_no_named_source_count_as_skipped() -> None:
    fields = {**case(SIZES[3]), "per_query_source": None}
    assert len(logits(fields).per_query_scores([Source.SKIPPED])[0]) == 10
    assert len(logits(fields).per_query_scores([Source.MINED, Source.FILE])[0]) == 0


@pytest.mark.parametrize("size", SIZES[3:], ids=str)
def test_examples_as_queries_of_their_own_have_the_sums_of_their_owners(size: Size) -> None:
    owned, each = the_same_as_each_of(size)
    assert each.owner is None
    torch.testing.assert_close(each.positive, owned.positive)
    torch.testing.assert_close(each.logsumexp(), owned.of_examples(owned.logsumexp()))
    torch.testing.assert_close(each.log_mass(), owned.of_examples(owned.log_mass()))


def test_a_row_of_one_item_against_its_users_by_hand() -> None:
    """Users 0 and 1 chose item 0, user 1 knows item 1 as well; user 2 chose item 1."""
    users = torch.tensor([[1.0], [2.0], [3.0]])
    batch = BatchLogits(
        users=users,
        items=torch.tensor([[1.0], [10.0], [5.0]]),
        target=torch.tensor([0, 0, 1]),
        temperature=1.0,
        log_weight=torch.zeros(3),
        positive_mask=torch.tensor([[1, 0], [1, 2]]),
        user_log_weight=torch.tensor([2.0, 1.0, 4.0]).log(),
    ).transposed()
    assert batch.positive.tolist() == [1, 2, 30]
    # Item 0 is left with user 2, item 1 with user 0.
    expected = [3 + math.log(4), 10 + math.log(2)]
    assert batch.logsumexp().tolist() == pytest.approx(expected)


def test_asking_under_no_grad_first_costs_no_gradient() -> None:
    fields, leaves = learning(case(SIZES[3]))
    batch = logits(fields)
    with torch.no_grad():
        softmax(batch)
        triplet(batch)
    asked = gradients(triplet(batch), leaves)
    for ours, fresh in zip(asked, gradients(triplet(logits(fields)), leaves), strict=True):
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("tile", [None, 3])
def test_the_gradient_is_that_of_finite_differences(tile: int | None) -> None:
    fields = case(SIZES[2])

    def losses(users: Tensor, items: Tensor, queued: Tensor, temperature: Tensor) -> Tensor:
        changed = {"users": users, "items": items, "queued": queued, "temperature": temperature}
        return softmax(logits(fields, **changed, tile=tile))

    inputs = [
        fields[name].clone().requires_grad_()
        for name in ("users", "items", "queued", "temperature")
    ]
    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("learned", ["users", "items"])
def test_a_frozen_side_changes_nothing_for_the_other(learned: str) -> None:
    fields = case(SIZES[3])
    both, leaves = learning(fields)
    expected = gradients(softmax(logits(both)), leaves)[["users", "items"].index(learned)]
    alone = fields[learned].clone().requires_grad_()
    (found,) = gradients(softmax(logits(fields, **{learned: alone})), [alone])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_of", [softmax, bsl, triplet, symmetric])
def test_autocast_and_half_precision_vectors_leave_the_sums_exact(
    loss_of: Callable[[BatchLogits], Tensor],
) -> None:
    """bfloat16 vectors, scored in float32: as if they had been widened by hand."""
    half = case(SIZES[3], dtype=torch.bfloat16)
    wide = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in half.items()
    }
    found = []
    for fields, automatic in ((half, True), (wide, True), (wide, False)):
        for tile in (None, 2):
            leaves_of, leaves = learning(fields)
            with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
                loss = loss_of(logits(leaves_of, tile=tile))
            assert loss.dtype == torch.float32
            found.append((loss, gradients(loss, leaves)))
    exact, exact_slopes = found[-1]
    for loss, slopes in found:
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(slopes, exact_slopes, strict=True):
            tolerance = 1e-5 if ours.dtype == torch.float32 else 2e-2  # stored as bfloat16
            torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """The most elements that anything made meanwhile had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, list | tuple) else [made]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return made


@pytest.mark.parametrize("loss_of", [softmax, bsl, triplet])
def test_no_matrix_is_larger_than_a_tile_forward_or_backward(
    loss_of: Callable[[BatchLogits], Tensor],
) -> None:
    rng = torch.Generator().manual_seed(0)
    queries, columns, tile = 60, 50, 7

    def most(tile: int | None) -> int:
        users = torch.randn(queries, 2, generator=rng, requires_grad=True)
        batch = BatchLogits(
            users=users,
            items=torch.randn(columns, 2, generator=rng, requires_grad=True),
            target=torch.randint(columns, (queries,), generator=rng),
            temperature=1.0,
            log_weight=torch.zeros(columns),
            tile=tile,
        )
        with Largest() as largest:
            loss_of(batch).sum().backward()
        return largest.elements

    assert most(None) == queries * columns
    assert most(tile) == tile * columns


def test_of_a_tiled_matrix_nothing_is_kept_until_the_gradient() -> None:
    kept: list[int] = []

    def note(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    nothing = dict.fromkeys(
        ("positive_mask", "per_query", "per_query_log_weight", "per_query_source")
    )
    fields, _ = learning({**case(Size(40, None, 30)), **nothing})
    for tile, limit in ((None, 40 * 30), (7, 40 * 3)):  # the matrix; the users
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            softmax(logits(fields, tile=tile))
        assert max(kept) == limit


def test_without_tiles_the_matrix_is_made_once_and_kept_once() -> None:
    """One (Q, N) result forward, whatever is corrected and blocked; none but gradients backward."""
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == (40, 30):
                made.append(str(function))
            return result

    fields, _ = learning(case(Size(40, None, 30)))
    with Made():
        loss = softmax(logits(fields)).sum()
    new = [
        name for name in made if not name.endswith("_out") and not name.split(".")[1].endswith("_")
    ]
    assert new == ["aten.addmm.default"]
    made.clear()
    with Made():
        loss.backward()
    assert set(made) <= {"aten.t.default", "aten.detach.default"}


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
@settings(max_examples=40)
def test_ragged_logaddexp_equals_a_loop_in_value_and_gradient(seed: int, terms: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    total = (5 * torch.randn(5, generator=rng)).double()
    total[rng.initial_seed() % 5] = -torch.inf
    total.requires_grad_()
    added = (5 * torch.randn(terms, generator=rng)).double().requires_grad_()
    row = torch.randint(5, (terms,), generator=rng)
    fast = ragged_logaddexp(total, added, row)
    # A row of nothing is -inf, and has no gradient in ours, while that of torch is NaN.
    there = [b for b in range(5) if total[b] > -torch.inf or b in row]
    assert fast[[b for b in range(5) if b not in there]].eq(-torch.inf).all()
    slow = torch.stack([torch.cat([total[b : b + 1], added[row == b]]).logsumexp(0) for b in there])
    torch.testing.assert_close(fast[there], slow)
    mix = torch.arange(1.0, 6.0).double()
    ours = torch.autograd.grad(
        fast.nan_to_num(neginf=0.0) @ mix, [total, added], materialize_grads=True
    )
    theirs = torch.autograd.grad(slow @ mix[there], [total, added], materialize_grads=True)
    for fast_slope, slow_slope in zip(ours, theirs, strict=True):
        torch.testing.assert_close(fast_slope, slow_slope)


def test_what_does_not_fit_together_is_refused() -> None:
    fields = case(SIZES[3])
    for changes, words in [
        ({"log_weight": torch.zeros(40)}, "40 columns, but there are 11 items and 1 queued"),
        ({"owner": None}, "11 examples and 5 queries"),
        ({"owner": fields["owner"][1:]}, "11 targets, but 10 owners"),
        (
            {"per_query_source": torch.zeros(3)},
            "per_query_source has 3 entries for 10 per-query negatives",
        ),
        ({"tile": 0}, "tile is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            logits(fields, **changes)


def test_the_dense_matrix_has_the_sums_of_the_tiles_where_nothing_is_of_one_query_alone() -> None:
    nothing = dict.fromkeys(("per_query", "per_query_log_weight", "per_query_source"))
    batch = logits({**case(SIZES[3]), **nothing})
    torch.testing.assert_close(batch.dense().logsumexp(1), batch.logsumexp())
