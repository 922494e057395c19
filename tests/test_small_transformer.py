"""The small transformer that is made of a catalogue alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.errors import DataError
from recsys.features.text.encoder import TextEncoder, fit_encoder
from recsys.features.text.rules import SmallTransformerText
from recsys.features.text.transformer_encoder import fit_wordpiece, heads, padded

TOPICS = {
    "cats": "whisker purr kitten litter claw feline tabby meow",
    "boats": "sail harbour anchor mast rudder deck tide keel",
    "bread": "flour dough oven yeast crust loaf rye knead",
}
RULES = SmallTransformerText(dimension=32, layers=1, epochs=0)


def world(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of four words of one topic, and the topic of each."""
    rng = np.random.default_rng(seed)
    words = [text.split() for text in TOPICS.values()]
    topic = rng.integers(len(words), size=n)
    return [" ".join(rng.choice(words[t], 4, replace=False)) for t in topic], topic


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return fit_encoder(world(200, 0)[0], RULES)


def test_it_learns_which_words_keep_company() -> None:
    # "feline" and "moggy" never stand in one text, but beside the same words.
    rng = np.random.default_rng(0)
    near, far = ["purr", "claw", "milk", "nap"], ["sail", "mast", "tide", "keel"]
    cooccurrence = {"feline": near, "moggy": near, "sloop": far}
    texts = [
        f"{word} {' '.join(rng.choice(beside, 2, replace=False))}"
        for word, beside in cooccurrence.items()
        for _ in range(60)
    ]
    rules = RULES.model_copy(update={"epochs": 150})
    a, b, c = fit_encoder(texts, rules).encode(list(cooccurrence))
    assert float(a @ b) > float(a @ c) + 0.3


def test_it_reads_the_order_of_words(encoder: TextEncoder) -> None:
    a, b = encoder.encode(["kitten claw sail", "sail claw kitten"])
    assert np.abs(a - b).max() > 1e-3


def test_the_same_texts_and_seed_give_the_same_one(encoder: TextEncoder) -> None:
    again = fit_encoder(world(200, 0)[0], RULES)
    assert again.fingerprint == encoder.fingerprint
    other = fit_encoder(world(200, 0)[0], RULES, seed=1)
    assert other.fingerprint != encoder.fingerprint


def test_it_comes_back_to_the_bit(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = [*world(20, 2)[0], "never met: zzz", "\U0001f6f8"]
    encoder.save(tmp_path / "text")
    again = TextEncoder.load(tmp_path / "text")
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.encode(texts), encoder.encode(texts))
    kinds = {file.suffix for file in (tmp_path / "text").rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_an_empty_text_is_zero_and_a_long_one_is_cut(encoder: TextEncoder) -> None:
    long = "kitten purr claw " * 90
    vectors = encoder.encode(["", None, "   ", "kitten", long, f"{long} sail"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0, 0, 0, 1, 1, 1], atol=1e-5)
    np.testing.assert_array_equal(vectors[4], vectors[5])
    learned = fit_encoder([long, f"sail {long}"], RULES.model_copy(update={"epochs": 1}))
    assert np.isfinite(learned.encode([long])).all()
    for nothing in ([], ["", None]):
        with pytest.raises(DataError, match="texts are empty"):
            fit_encoder(nothing, RULES)


def test_pieces_of_words_are_numbered_the_same_every_time() -> None:
    texts = world(200, 3)[0]
    first, second = fit_wordpiece(texts), fit_wordpiece(texts[::-1])
    assert first.get_vocab() == second.get_vocab()
    assert first.encode("kitten").tokens == ["kitten"]
    assert first.encode("kittens ##k").tokens[:1] == ["kitten"]
    assert "##k" not in first.encode("##k").tokens  # a mark of our own, not of the text
    assert [first.token_to_id(token) for token in ("[PAD]", "[UNK]")] == [0, 1]


def test_widths_and_padding_by_hand() -> None:
    assert [heads(width) for width in (2, 32, 64, 128, 200, 257)] == [1, 1, 1, 2, 2, 1]
    found = padded(np.array([5, 6, 7, 8]), np.array([1, 3]))
    assert found["input_ids"].tolist() == [[5, 0, 0], [6, 7, 8]]
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_rules_of_the_encoder() -> None:
    for wrong in ({"train": "some"}, {"layers": 0}, {"kind": "large"}, {"beside": ["split"]}):
        with pytest.raises(ValidationError):
            SmallTransformerText.model_validate(wrong)
