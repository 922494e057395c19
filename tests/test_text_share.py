"""A share of the score is the plain likeness of texts, beside what the towers learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from recsys.errors import ConfigError
from recsys.towers import diagnosis
from recsys.towers.build import build_model
from recsys.towers.rules import TowerRules, TrainingRules
from recsys.towers.training import TwoTowerModule
from recsys.towers.two_tower import TEXT_DECAY, TwoTower
from tests.test_towers import DIMENSION, N_ITEMS, settle, side, towers

HISTORIES = [[1, 2, 3], [], [8], [4, 4], [5]]
ROWS = torch.arange(N_ITEMS)
TEXT = 4
KINDS = [
    {"history": "attention"},
    {"history": {"kind": "mean", "table": "offset"}},
    {"history": {"kind": "transformer", "table": "own"}, "dimension": 6},
]


def pair(share: float, **rules: Any) -> tuple[TwoTower, TwoTower]:
    """Towers with the share and without, of the same weights; item 8 has a blank text."""
    both = tuple(settle(towers(text_share=s, **rules)).eval() for s in (share, 0.0))
    for model in both:
        assert model.items.text is not None
        model.items.text[8] = 0
    return both  # type: ignore[return-value]


def vectors(model: TwoTower) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        items = model.item_tower(model.embed_items(ROWS))
        users = model.encode_users(side(HISTORIES), model.embed_history(ROWS))
    return users.double().numpy(), items.double().numpy()


@pytest.mark.parametrize("rules", KINDS)
def test_a_score_is_what_was_learned_and_the_likeness_of_texts_by_their_shares(
    rules: dict[str, Any],
) -> None:
    share = 0.3
    model, plain = pair(share, **rules)
    users, items = vectors(model)
    learned_users, learned_items = vectors(plain)
    assert model.vector_dimension == items.shape[1] == users.shape[1] == DIMENSION + TEXT
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)
    assert model.items.text is not None
    text = model.items.text.double().numpy()
    for q, history in enumerate(HISTORIES):
        said = sum(
            (TEXT_DECAY**after * text[i] for after, i in enumerate(reversed(history))),
            np.zeros(TEXT),
        )
        length = np.linalg.norm(said)
        for i in range(N_ITEMS):
            # Whoever says nothing by text is heard by what was learned alone, in full length.
            ours = 1 - share if length else 1.0
            theirs = 1 - share if text[i].any() else 1.0
            wanted = (ours * theirs) ** 0.5 * (learned_users[q] @ learned_items[i])
            if length:
                wanted += share * (said @ text[i]) / length
            assert users[q] @ items[i] == pytest.approx(wanted, abs=1e-5)


def test_learning_is_what_it_is_without_the_share() -> None:
    found = []
    for model in pair(0.3, history={"kind": "attention"}):
        model.train()
        torch.manual_seed(3)
        embedded = model.embed_items(ROWS)
        users = model.encode_users(side(HISTORIES), model.embed_history(ROWS, embedded=embedded))
        found.append((users @ model.item_tower(embedded).T).detach())
        assert users.shape[1] == DIMENSION
    assert torch.equal(*found)


def test_a_text_that_is_hidden_for_a_diagnosis_is_hidden_in_the_share_too() -> None:
    model, _ = pair(0.3, history={"kind": "attention"})
    users, items = vectors(model)
    with diagnosis.hidden(model, "text"):
        hidden_users, hidden_items = vectors(model)
    assert np.abs(items[:8, DIMENSION:]).max() > 0.1
    assert not hidden_items[:, DIMENSION:].any()
    assert not hidden_users[:, DIMENSION:].any()
    again = vectors(model)
    np.testing.assert_array_equal(users, again[0])
    np.testing.assert_array_equal(items, again[1])


@pytest.mark.parametrize(
    "rules",
    [{"score": "dot"}, {"history": "none"}],
)
def test_what_has_no_cosine_with_one_history_has_no_share(rules: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="text_share is a share of a cosine"):
        TowerRules(text_share=0.2, **rules)


def test_items_without_text_have_no_share(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="Name text columns"):
        build_model(tiny.dataset, TowerRules(text_share=0.2), item_text=None, seed=0)


def test_a_bundle_answers_by_the_share(
    build: Callable[..., Any], shop_run: str, tmp_path: Path
) -> None:
    from recsys.serving.recommender import Recommender

    toml = shop_run.replace("[towers]\n", "[towers]\ntext_share = 0.999\n")
    recommender = Recommender.load(build(toml, tmp_path).bundle)
    bundle = recommender.bundle
    text = bundle.model.items.text
    assert text is not None
    query = bundle.items.ids[4]
    found = recommender.similar(query, k=5).ids
    cosine = (text @ text[5]).numpy()
    cosine[[0, 5]] = -2
    best = bundle.items.ids.gather(np.argsort(-cosine)[:5] - 1).to_list()
    assert len(set(found) & set(best)) >= 4


def test_a_queue_remembers_what_is_learned_without_texts() -> None:
    model, _ = pair(0.3, history={"kind": "attention"})
    module = TwoTowerModule(model, TrainingRules(negatives={"queue": 2})).train()
    assert module.memory_bank is not None
    learned = model.item_tower(model.embed_items(ROWS)).detach()
    module.memory_bank.write(ROWS, learned)
    found, usable = module.memory_bank.read(ROWS)
    torch.testing.assert_close(found[usable], learned[usable])
    assert usable.any()
