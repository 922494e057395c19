"""Two static encoders side by side in one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from recsys.features.text.encoder import fit_encoder
from recsys.features.text.rules import SmallTransformerText, StaticText, learns_cooccurrence
from recsys.features.text.static_encoder import tokenize
from tests.test_text import SMALL, world


def test_a_second_encoder_stands_beside_the_first() -> None:
    texts = world(200, 0)[0]
    alone = fit_encoder(texts, SMALL)
    rules = SMALL.model_copy(update={"beside": ("dropout",)})
    both = fit_encoder(texts, rules)
    assert both.dimension == 2 * alone.dimension
    first, second = np.split(both.encode(texts), 2, axis=1)
    lengths = np.linalg.norm(first, axis=1)
    np.testing.assert_allclose(first / lengths[:, None], alone.encode(texts), atol=1e-5)
    # Each half has its say: as they come, before both together are brought to length 1, they are
    # alike long in the mean over the texts.
    table = both.model[0].embedding.weight.detach().numpy()
    tokens = tokenize(both.model.tokenizer, pl.Series(texts))
    for half in np.split(table, 2, axis=1):
        means = [half[tokens.values[a:b]].mean(0) for a, b in pairwise(tokens.offsets)]
        assert np.linalg.norm(means, axis=1).mean() == pytest.approx(1, abs=1e-3)
    other = second / np.linalg.norm(second, axis=1, keepdims=True)
    assert np.abs(other - alone.encode(texts)).max() > 0.05
    assert fit_encoder(texts, rules).fingerprint == both.fingerprint
    unknown = both.encode(["", "\u0001"])
    assert not unknown.any()


def test_what_a_second_encoder_learns_from_the_log_counts() -> None:
    assert learns_cooccurrence(StaticText(views=("split",), beside=("cooccurrence",)))
    assert learns_cooccurrence(StaticText(views=("cooccurrence",), beside=("split",)))
    assert learns_cooccurrence(SmallTransformerText(views=("cooccurrence",)))
    assert not learns_cooccurrence(StaticText(views=("split",), beside=("halves",)))
