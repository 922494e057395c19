"""The correction of sampled negatives: the gradient bias of each form on a Zipf catalogue."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recsys.towers.logits import BatchLogits
from recsys.towers.losses import softmax


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bias(items: int, batch: int, draws: int, positives: int = 40) -> dict[str, float]:
    """Relative gradient bias of an example, against the softmax over all items.

    An example has one of `positives` items, and the batch - 1 others of its batch are drawn by
    popularity. Expected gradients by the logits, given the positive, are means over so many draws;
    errors of all positives count as often as they are chosen. A correction is made by

        none: nothing;
        standard: log np from the logits of negatives and of the positive, as if it were drawn too;
        corrected: the same from negatives alone;

    where p is the popularity of an item and n = batch - 1. Columns are draws (an item drawn c times
    counts c times), or distinct items, and for these `inclusion` has log(1 - (1 - p)^n), the
    probability to be there, in place of log np, the expected count.
    """
    rng = np.random.default_rng(5)
    share = 1 / np.arange(1, items + 1) ** 1.1
    share /= share.sum()
    # Half way to the popular, as the logits of a model in training are.
    logits = torch.from_numpy(rng.normal(size=items) + np.log(share)).float() / 2
    others = batch - 1
    expected = torch.from_numpy(np.log(others * share)).float()
    included = torch.from_numpy(np.log(-np.expm1(others * np.log1p(-share)))).float()
    target = torch.arange(0, items, items // positives)  # (B,)

    mean: dict[str, torch.Tensor] = {}
    for drawn in rng.multinomial(others, share, size=draws):
        count = torch.from_numpy(drawn).float().log()  # (N,), -inf for what was not drawn
        once = torch.where(count > -torch.inf, 0.0, -torch.inf)
        for name, log_weight in {
            "none, draws": count,
            "standard, draws": count - expected,
            "corrected, draws": count - expected,
            "none, distinct": once,
            "standard, distinct": once - expected,
            "corrected, distinct": once - expected,
            "inclusion, distinct": once - included,
        }.items():
            users = logits.repeat(len(target), 1).requires_grad_()
            scores = BatchLogits(
                users=users,
                items=torch.eye(items),  # so that the gradient by a user is that by its logits
                target=target,
                temperature=1.0,
                log_weight=log_weight,
            )
            if name.startswith("standard"):
                loss = F.softplus(scores.logsumexp() - (scores.positive - expected[target]))
            else:
                loss = softmax(scores)
            (gradient,) = torch.autograd.grad(loss.sum(), users)
            mean[name] = mean.get(name, torch.zeros(())) + gradient / draws
    exact = logits.softmax(0) - torch.eye(items)[target]  # (B, N)
    often = torch.from_numpy(share).float()[target, None].sqrt()
    return {
        name: float(((found - exact) * often).norm() / (exact * often).norm())
        for name, found in mean.items()
    }


@pytest.mark.parametrize(("batch", "draws"), [(8, 200), (32, 100), (128, 50)])
def test_corrected_logq_has_less_gradient_bias_than_standard_logq_and_that_than_none(
    batch: int, draws: int
) -> None:
    """In per cent at 8 / 32 / 128 of distinct columns: 5 / 3 / 2, 15 / 6 / 6, 33 / 18 / 10."""
    found = bias(200, batch, draws)
    for columns in ("distinct", "draws"):
        none, standard = found[f"none, {columns}"], found[f"standard, {columns}"]
        assert found["inclusion, distinct"] < 0.7 * standard < 0.7 * none
        assert found[f"corrected, {columns}"] < standard


def test_in_very_large_batches_distinct_columns_need_the_inclusion_probability() -> None:
    """At 4,096 / 65,536 inclusion 1.3 / .09 %, a column a draw 1.5 / .4 %, log count 3.3 / 7 %."""
    large, very_large = bias(2000, 4096, 4), bias(2000, 65_536, 4)
    for found in (large, very_large):
        standard, none = found["standard, draws"], found["none, draws"]
        assert found["inclusion, distinct"] < found["corrected, draws"] < standard < none
        for correction in ("standard", "corrected"):
            assert found["inclusion, distinct"] < 0.5 * found[f"{correction}, distinct"]
        assert found["inclusion, distinct"] < found["none, distinct"]
    # With all items there, nothing has to be corrected, and the expected count is far from one.
    assert very_large["inclusion, distinct"] < 0.1 * large["inclusion, distinct"]
    assert very_large["inclusion, distinct"] < 0.05 * very_large["corrected, distinct"]
