"""Rows of sparse gradients and dense weights under one optimiser, against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from recsys.towers.optimizer import RowAdam, clip_gradients


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sparse(rows: list[int], values: Tensor, size: int) -> Tensor:
    """An uncoalesced gradient, as an embedding gives it."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (size, values.shape[1]), check_invariants=True
    )


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in [(11, 3), (5, 3), (7,)]
    ]


def set_gradients(weights: list[torch.nn.Parameter], seed: int) -> None:
    """The first is a table of which rows 2 and 6 are touched, row 6 twice."""
    rng = torch.Generator().manual_seed(seed)
    weights[0].grad = sparse([2, 6, 6], torch.randn(3, 3, generator=rng), 11)
    for weight in weights[1:]:
        weight.grad = torch.randn(weight.shape, generator=rng)


def test_untouched_rows_keep_value_and_moments_bit_for_bit() -> None:
    table = torch.nn.Parameter(torch.randn(9, 4))
    optimizer = RowAdam([table], lr=0.1, weight_decay=0.5)
    table.grad = sparse(list(range(9)), torch.randn(9, 4), 9)
    optimizer.step()  # every row has moments now
    state = optimizer.state[table]
    before = [t.clone() for t in (table.data, state["exp_avg"], state["exp_avg_sq"])]
    table.grad = sparse([1, 4, 1], torch.randn(3, 4), 9)
    optimizer.step()
    touched = torch.zeros(9, dtype=torch.bool)
    touched[[1, 4]] = True
    for old, new in zip(before, (table.data, state["exp_avg"], state["exp_avg_sq"]), strict=True):
        assert torch.equal(old[~touched], new[~touched])
        assert (old[touched] != new[touched]).all()


def test_the_first_step_moves_a_touched_row_by_the_learning_rate_by_hand() -> None:
    """Bias corrected, the first step of Adam is lr · sign(gradient); rows that repeat add up."""
    table = torch.nn.Parameter(torch.zeros(3, 2))
    table.grad = sparse([1, 1], torch.tensor([[1.0, -5.0], [1.0, 1.0]]), 3)
    RowAdam([table], lr=0.1).step()
    torch.testing.assert_close(table.data, torch.tensor([[0.0, 0.0], [-0.1, 0.1], [0.0, 0.0]]))


def test_dense_weights_move_as_with_adamw() -> None:
    ours = parameters()[1:]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = [RowAdam(ours, **options), torch.optim.AdamW(theirs, **options)]
    for step in range(7):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            rng = torch.Generator().manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=rng)
            optimizer.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_sparse_gradients_that_touch_every_row_move_as_with_adam() -> None:
    ours, theirs = parameters()[0], parameters()[0]
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = RowAdam([ours], weight_decay=0.7, **options)  # decay is for dense weights
    reference = torch.optim.Adam([theirs], **options)
    rng = torch.Generator().manual_seed(1)
    for _ in range(7):
        rows = [*torch.randperm(11, generator=rng).tolist(), 3, 3]
        ours.grad = sparse(rows, torch.randn(13, 3, generator=rng), 11)
        theirs.grad = ours.grad.to_dense()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_sparse_gradients_move_touched_rows_as_sparse_adam_does() -> None:
    ours, theirs = parameters()[0], parameters()[0]
    optimizer = RowAdam([ours], lr=0.05)
    reference = torch.optim.SparseAdam([theirs], lr=0.05)
    rng = torch.Generator().manual_seed(2)
    for _ in range(7):
        rows = torch.randint(11, (4,), generator=rng).tolist()
        ours.grad = sparse(rows, torch.randn(4, 3, generator=rng), 11)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_equals_that_of_the_dense_gradients(most: float) -> None:
    ours, theirs = parameters(), parameters()
    set_gradients(ours, seed=3)
    set_gradients(theirs, seed=3)
    theirs[0].grad = theirs[0].grad.to_dense()
    norm = clip_gradients(ours, most)
    reference = torch.nn.utils.clip_grad_norm_(theirs, most)
    torch.testing.assert_close(norm, reference)
    for mine, other in zip(ours, theirs, strict=True):
        gradient = mine.grad.to_dense() if mine.grad.is_sparse else mine.grad
        torch.testing.assert_close(gradient, other.grad)


def test_clipping_nothing_is_no_error() -> None:
    assert clip_gradients(parameters(), 1.0).item() == 0


def test_a_saved_and_loaded_state_takes_the_same_next_step() -> None:
    ours = parameters()
    groups = [{"params": ours[:1], "lr": 0.2}, {"params": ours[1:], "weight_decay": 0.1}]
    optimizer = RowAdam(groups, lr=0.01)
    for step in range(3):
        set_gradients(ours, seed=step)
        optimizer.step()
    later = copy.deepcopy(ours)
    resumed = RowAdam([{"params": later[:1]}, {"params": later[1:]}], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weights, stepping in ((ours, optimizer), (later, resumed)):
        set_gradients(weights, seed=9)
        stepping.step()
    for mine, other in zip(ours, later, strict=True):
        assert torch.equal(mine, other)


def test_a_weight_without_a_gradient_stays_and_a_closure_is_asked() -> None:
    weights = parameters()
    before = copy.deepcopy(weights)
    optimizer = RowAdam(weights, lr=0.1, weight_decay=0.5)

    def closure() -> float:
        assert torch.is_grad_enabled()
        weights[1].grad = torch.ones(5, 3)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert torch.equal(weights[0], before[0]) and torch.equal(weights[2], before[2])
    assert (weights[1] != before[1]).all()


def test_a_learning_rate_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate is 0"):
        RowAdam(parameters(), lr=0)
