"""docs/examples/losses.py: its losses by hand, and by name in a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from logits_cases import SIZES, case, gradients, learning, logits
from test_losses import two

from recsys.towers.losses import softmax
from recsys.towers.rules import TrainingRules
from recsys.towers.training import loss_of

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def test_the_losses_by_hand() -> None:
    """Scores 1 of the positive, 0 and -1 of the negatives; temperature .5."""
    import losses

    psl = math.log((1 - math.tanh(0.5)) ** 2 + (1 - math.tanh(1)) ** 2)
    assert losses.psl(two()).item() == pytest.approx(psl, rel=1e-5)
    # Of the negatives -1 and 0 the best is 0.
    sl_at_k = math.log(math.exp(-2) + math.exp(-4)) / (1 + math.exp(-2))
    assert losses.sl_at_k(two(), k=1, tau_beta=0.5).item() == pytest.approx(sl_at_k, rel=1e-5)
    margin = math.log(1 + math.exp(-1.5) + math.exp(-3.5))
    assert losses.margin_softmax(two(), margin=0.25).item() == pytest.approx(margin, rel=1e-5)
    weighted = two(log_weight=torch.tensor([1.0, 3.0, 1.0]).log())
    found = losses.cosine_contrastive(weighted, margin=-0.5, negative_weight=2)
    assert found.item() == pytest.approx(2 * (3 * 0.5 + 0) / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["psl", "sl_at_k", "margin_softmax", "cosine_contrastive"])
def test_a_loss_of_ones_own_is_named_in_the_run_and_learns(name: str) -> None:
    loss = loss_of(TrainingRules(loss=f"losses:{name}"))
    assert loss is getattr(sys.modules["losses"], name)
    fields, leaves = learning(case(SIZES[3], dtype=torch.float32))
    value = loss(logits(fields))
    assert value.shape == softmax(logits(fields)).shape
    assert value.isfinite().all() and gradients(value, leaves)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hinge", "'hinge' is not known; use softmax, bsl, triplet, or a function of your own"),
        ("losses:nothing", "'losses:nothing' cannot be imported"),
        ("no_such_module:loss", "cannot be imported: No module named 'no_such_module'"),
        ("losses:F", "not a function"),
    ],
)
def test_a_loss_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRules(loss=name)
