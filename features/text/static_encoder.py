"""Static text encoder trained on a catalogue: token vectors, LSA start, contrastive loss.

A text is the mean of its tokens' vectors. The tokenizer is fitted on the catalogue; the vectors
start as latent semantic analysis (Deerwester et al., 1990) and are then trained so that two views
of one item find each other among the other items of the batch (InfoNCE; for static embeddings see
Hugging Face, "Train 400x faster static embedding models").

Shapes: n distinct texts, V tokens in the vocabulary, T tokens of all texts, D dimensions, B pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recsys.errors import DataError
from recsys.ragged import Ragged

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from recsys.features.text.rules import StaticText, View

Features = Callable[[np.ndarray, np.ndarray], dict[str, "torch.Tensor"]]
"""Tokens (T,) of texts one after another and lengths (n,) to a model's input."""
FREQUENT = 2
"""Times that a token stands at least. With 1, scripts without spaces would learn sentences."""
FIRST_SYLLABLE = "\u2e80"
"""From here on (Chinese, Japanese, Korean) one letter says something by itself."""
MAX_WORD = 32
"""Letters of a token at most: in scripts without spaces a whole sentence is one word."""
VOCABULARY = 32_768
"""Tokens at most; a token is a letter, a part of a word or a word that stands twice."""
MAX_TOKENS = 256
"""Of one text; what comes after is not read."""
MAX_TEXTS = 200_000
"""Distinct texts that training looks at; of more, a seeded sample."""
MAX_PAIRS = 1_000_000
"""Pairs seen over all epochs at most: what bounds the time on a large catalogue."""
KEEP = 0.5
"""Share of the tokens in a view of split (the first), dropout and cooccurrence (both)."""
BATCH_SIZE = 512
"""Pairs a step: each text stands against that many others."""
SCALE = 10.0
"""Multiplies the cosine (1 / temperature): larger looks at the nearest others only."""
LEARNING_RATE = 0.01
BESIDE_EPOCHS = 10
"""Of the second encoder."""
AT_ONCE = 20_000
"""Texts tokenized at once, so that the tokenizer's own objects stay small."""


def train_static(
    texts: pl.Series,
    fields: list[pl.Series],
    rules: StaticText,
    seed: int,
    progress: Callable[[str], None],
    cooccurrence: np.ndarray | None = None,
) -> SentenceTransformer:
    """Fit a tokenizer and token vectors on a catalogue.

    Args:
        texts: the whole text of each item.
        fields: columns as long as `texts`, the title first.
        rules: [text] of the configuration.
        seed: the same texts and seed give the same encoder.
        progress: is told in words what is going on.
        cooccurrence: (2, P) places in `texts` of items chosen one after the other, or None.

    Raises:
        DataError: no text has a letter in it.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    rng = np.random.default_rng(seed)
    items = learned_from(texts, fields, rng)
    tokenizer = fit_tokenizer(items["text"].to_list())
    tokens = tokenized(tokenizer, items, len(texts), progress)
    together = rows_of(texts, items, cooccurrence)
    tables = []
    with one_thread():
        start = lsa_vectors(tokens, tokenizer.get_vocab_size(), rules.dimension, rng)
        for views, epochs in ((rules.views, rules.epochs), (rules.beside, BESIDE_EPOCHS)):
            if not views:
                continue
            module = StaticEmbedding(tokenizer, embedding_weights=start.copy())
            model = SentenceTransformer(modules=[module], device="cpu")
            pairs = make_pairs(tokens, items, tokenizer, views, together)
            contrast(model, pairs, epochs, LEARNING_RATE, rng, progress)
            tables.append(inherit(tokenizer, tokens, module.embedding.weight.detach().numpy()))
    if len(tables) > 1:
        # Means of token vectors side by side are means of what stands side by side: one encoder.
        tables = [table / usual_length(tokens, table) for table in tables]
    module = StaticEmbedding(tokenizer, embedding_weights=np.concatenate(tables, axis=1))
    return SentenceTransformer(modules=[module], device="cpu").eval()


def usual_length(tokens: Ragged, vectors: np.ndarray) -> float:
    """Mean length of the texts' vectors; 1 where none has any.

    Args:
        tokens: of the texts.
        vectors: (V, D) of the tokens.
    """
    import torch

    values, starts = (
        torch.from_numpy(part.astype(np.int64)) for part in (tokens.values, tokens.offsets[:-1])
    )
    means = torch.nn.functional.embedding_bag(
        values, torch.from_numpy(vectors), starts, mode="mean"
    )
    return float(means.norm(dim=1).mean()) or 1.0


def learned_from(
    texts: pl.Series, fields: list[pl.Series], rng: np.random.Generator
) -> pl.DataFrame:
    """Distinct texts that say something, a sample of very many: column `text`, then `fields`."""
    items = pl.DataFrame({"text": texts, **{f"{i}": field for i, field in enumerate(fields)}})
    items = items.filter(pl.col("text").str.strip_chars() != "")
    items = items.unique("text", keep="first", maintain_order=True)
    if items.height > MAX_TEXTS:
        # In the old order: the sample decides the encoder, not the order of drawing.
        items = items[np.sort(rng.choice(items.height, MAX_TEXTS, replace=False))]
    return items


def rows_of(
    texts: pl.Series, items: pl.DataFrame, cooccurrence: np.ndarray | None
) -> np.ndarray | None:
    """(2, P) pairs of places in `texts` as rows of `items`, where both are there and differ."""
    if cooccurrence is None:
        return None
    rows = items.select("text").with_row_index("row")
    row = texts.alias("text").to_frame().join(rows, on="text", how="left", maintain_order="left")
    pairs = row["row"].cast(pl.Int64).fill_null(-1).to_numpy()[cooccurrence]
    return pairs[:, (pairs >= 0).all(axis=0) & (pairs[0] != pairs[1])]


def tokenized(
    tokenizer: Tokenizer, items: pl.DataFrame, given: int, progress: Callable[[str], None]
) -> Ragged:
    """Token numbers of `items`, and a word of how many there are.

    Args:
        tokenizer: fitted on them.
        items: column `text`.
        given: how many texts there were, empty ones included.
        progress: is told.

    Raises:
        DataError: no text has a letter in it.
    """
    tokens = tokenize(tokenizer, items["text"])
    if not len(tokens.values):
        raise DataError(
            f"All {given:,} item texts are empty, so there is nothing to train a text "
            "encoder on. Name columns that hold text in data.catalog.text, or leave it empty."
        )
    progress(
        f"text: {items.height:,} distinct texts, {tokenizer.get_vocab_size():,} tokens in the "
        f"vocabulary, {len(tokens.values) / items.height:.1f} a text"
    )
    return tokens


@contextmanager
def one_thread() -> Iterator[None]:
    """Let NumPy and torch work in one thread: the same sums on every machine.

    It is the steady choice too: the steps are so small that on a busy machine two threads wait
    for each other five times as long as one works.
    """
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def fit_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-pair encoding of whole words where they are frequent, of parts and letters elsewhere.

    No accents are stripped: in Japanese, Thai or Hindi that would make other words of them. An
    unknown letter is left out rather than read as some token.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    alphabet = read_as_words(tokenizer, texts)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=FREQUENT,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=MAX_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def read_as_words(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Let a tokenizer see words of normal letters; the letters that it has to know are returned."""
    from tokenizers import normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.normalizer = normalizer
    # Splits at spaces and punctuation, so that #comic and "# comic" are the same word.
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = Counter(normalizer.normalize_str("\n".join(texts)))
    # Chosen here: among letters of equal count the trainer would choose by chance.
    ranked = sorted((c for c in letters if not c.isspace()), key=lambda c: (-letters[c], c))
    return ranked[: VOCABULARY // 2]


def tokenize(tokenizer: Tokenizer, texts: pl.Series) -> Ragged:
    """Token numbers of each text."""
    lengths, values = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE].to_list()
        ids = [found.ids for found in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        values.extend(np.array(row, np.int32) for row in ids)
    return Ragged(np.cumsum(np.concatenate(lengths)), np.concatenate(values))


def lsa_vectors(
    tokens: Ragged, vocabulary: int, dimension: int, rng: np.random.Generator
) -> np.ndarray:
    """(V, D) float32 vectors whose sum over a text is its latent semantic analysis.

    A token's weight is log((n + 1) / (texts that have it + 1/2)), so a word that stands everywhere
    says little. Tokens that stand in no text have the zero vector.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    n = len(tokens)
    ones = np.ones(len(tokens.values), np.float32)
    # A copy: adding duplicates up happens in place, in the arrays that the matrix was made from.
    counts = sparse.csr_matrix((ones, tokens.values, tokens.offsets), (n, vocabulary), copy=True)
    counts.sum_duplicates()
    has = np.diff(counts.tocsc().indptr)  # (V,) texts that have the token
    weight = np.where(has > 0, np.log((n + 1) / (has + 0.5)), 0).astype(np.float32)
    counts.data = weight[counts.indices]  # once or often is the same
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    counts.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(counts.indptr))
    rank = min(dimension, n, vocabulary)
    seed = int(rng.integers(2**31))
    _, strength, axes = randomized_svd(counts, rank, n_iter=3, random_state=seed)
    axes[strength < 1e-4 * strength[0]] = 0  # directions that rounding made
    start = np.zeros((vocabulary, dimension), np.float32)
    start[:, :rank] = axes.T
    empty = np.flatnonzero(~start.any(axis=0))
    if len(empty):
        # Fewer texts than dimensions: what is left tells tokens apart at random.
        size = np.sqrt(np.square(start[has > 0]).sum() / ((has > 0).sum() * dimension))
        start[:, empty] = rng.normal(0, size, (vocabulary, len(empty)))
    return start * weight[:, None]


def inherit(tokenizer: Tokenizer, tokens: Ragged, vectors: np.ndarray) -> np.ndarray:
    """Give parts of words that stand in no text by themselves the mean of what they are part of.

    So "kitten" is near "kittens" where the catalogue only has the latter. One or two letters of
    an alphabet are part of anything and stay zero.

    Args:
        tokenizer: byte-pair encoding.
        tokens: of the texts that it was fitted on.
        vectors: (V, D) of the tokens.

    Returns:
        (V, D) float32.
    """
    model = json.loads(tokenizer.to_str())["model"]
    place, vectors = model["vocab"], vectors.copy()
    count = np.bincount(tokens.values, minlength=len(vectors)).astype(np.float64)
    new = count == 0
    total, weight = np.zeros(vectors.shape), np.zeros(len(vectors))
    # From the last merge down: what a token is part of was merged after it.
    for left, right in reversed(model["merges"]):
        whole = place[left + right]
        if new[whole] and weight[whole]:
            vectors[whole], count[whole] = total[whole] / weight[whole], weight[whole]
        for part in {place[left], place[right]}:
            if new[part]:
                total[part] += count[whole] * vectors[whole]
                weight[part] += count[whole]
    for token, row in place.items():
        if new[row]:
            says = len(token) > 2 or token[0] >= FIRST_SYLLABLE
            vectors[row] = total[row] / weight[row] if says and weight[row] else 0
    return vectors


@dataclass(frozen=True)
class Pairs:
    """Pairs of one kind: texts `left` and `right` of `tokens` that speak of the same item.

    Args:
        view: how each becomes a view; see `TextRules.views`.
        tokens: tokens of distinct texts.
        left, right: (P,) rows of `tokens`.
    """

    view: str
    tokens: Ragged
    left: np.ndarray
    right: np.ndarray


def make_pairs(
    tokens: Ragged,
    items: pl.DataFrame,
    tokenizer: Tokenizer,
    views: Sequence[View],
    cooccurrence: np.ndarray | None = None,
) -> list[Pairs]:
    """What `views` make of a catalogue; kinds without two pairs are left out.

    Args:
        tokens: of `items`.
        items: as `learned_from` gives them.
        tokenizer: reads single fields.
        views: which kinds.
        cooccurrence: (2, P) rows of `items` chosen one after the other, or None.
    """
    long = np.flatnonzero(tokens.lengths >= 2)
    of_one = [view for view in views if view not in ("fields", "cooccurrence")]
    kinds = [Pairs(view, tokens, long, long) for view in of_one]
    if "cooccurrence" in views and cooccurrence is not None:
        left, right = cooccurrence[:, (tokens.lengths[cooccurrence] > 0).all(axis=0)]
        kinds.append(Pairs("cooccurrence", tokens, left, right))
    columns = [name for name in items.columns if name != "text"]
    if "fields" in views:
        for other in columns[1:]:
            both = items.select(left=columns[0], right=other).unique(maintain_order=True)
            texts = pl.concat([both["left"], both["right"].alias("left")])
            distinct = texts.unique(maintain_order=True)
            place = texts.to_frame().join(
                distinct.to_frame().with_row_index("row"), "left", "left", maintain_order="left"
            )["row"]
            left, right = place.to_numpy().astype(np.int64).reshape(2, -1)
            found = tokenize(tokenizer, distinct)
            said = (found.lengths[left] > 0) & (found.lengths[right] > 0) & (left != right)
            kinds.append(Pairs("fields", found, left[said], right[said]))
    return [kind for kind in kinds if len(kind.left) >= 2]


def contrast(
    model: SentenceTransformer,
    kinds: list[Pairs],
    epochs: int,
    learning_rate: float,
    rng: np.random.Generator,
    progress: Callable[[str], None],
    features: Features | None = None,
) -> None:
    """Train in place: both views of an item find each other among the batch.

    Args:
        model: any whose first module reads what `features` gives.
        kinds: pairs to draw views of.
        epochs: over all pairs, of which at most `MAX_PAIRS` are seen.
        learning_rate: of Adam, falling to 0 in a straight line.
        rng: draws the views.
        progress: is told in words what is going on.
        features: tokens (T,) and lengths (n,) of texts to the model's input; None: as the static
            encoder reads them.
    """
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = sum(len(kind.left) for kind in kinds)
    if not pairs or not epochs:
        return
    # Whole epochs as far as they go, and of the last one what is left of `MAX_PAIRS`.
    steps_each = sum(-(-len(kind.left) // BATCH_SIZE) for kind in kinds)
    steps = min(epochs * steps_each, max(1, MAX_PAIRS * steps_each // pairs))
    loss_of = MultipleNegativesRankingLoss(
        model,
        scale=SCALE,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    step, losses = 0, []
    while step < steps:
        batches = [
            (kind, part)
            for kind in kinds
            for part in np.array_split(
                rng.permutation(len(kind.left)), -(-len(kind.left) // BATCH_SIZE)
            )
        ]
        for number in rng.permutation(len(batches))[: steps - step]:
            kind, part = batches[number]
            views = draw_views(kind, part, KEEP, rng, features)
            if views is not None:
                loss = loss_of(views, torch.empty(0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            falling.step()
            step += 1
        if losses:
            rounds = -(-steps // steps_each)
            progress(
                f"text: epoch {-(-step // steps_each)} of {rounds}, "
                f"loss {np.mean(losses[-steps_each:]):.3f}"
            )


def draw_views(
    kind: Pairs,
    part: np.ndarray,
    keep: float,
    rng: np.random.Generator,
    features: Features | None = None,
) -> list[dict[str, torch.Tensor]] | None:
    """Two views of each pair as the features of a model; None with fewer than two pairs.

    A text stands once in a batch on each side: a second one would be its own false negative.
    """
    left, right = kind.left[part], kind.right[part]
    once = np.zeros((2, len(part)), bool)
    for side, rows in enumerate((left, right)):
        once[side, np.unique(rows, return_index=True)[1]] = True
    left, right = left[once.all(axis=0)], right[once.all(axis=0)]
    a, b = kind.tokens.take(left), kind.tokens.take(right)
    if kind.view == "fields":
        in_a, in_b = np.ones(len(a.values), bool), np.ones(len(b.values), bool)
    elif kind.view == "halves":
        place = np.arange(len(a.values)) - np.repeat(a.offsets[:-1], a.lengths)
        cut = 1 + (rng.random(len(a)) * (a.lengths - 1)).astype(np.int64)
        in_a = place < np.repeat(cut, a.lengths)
        in_b = ~in_a
    else:
        in_a = rng.random(len(a.values)) < keep
        in_b = ~in_a if kind.view == "split" else rng.random(len(b.values)) < keep
    row_a, row_b = a.row_of()[in_a], b.row_of()[in_b]
    count_a, count_b = np.bincount(row_a, minlength=len(a)), np.bincount(row_b, minlength=len(b))
    both = (count_a > 0) & (count_b > 0)
    if both.sum() < 2:
        return None
    make = features or _bag
    return [
        make(a.values[in_a][both[row_a]], count_a[both]),
        make(b.values[in_b][both[row_b]], count_b[both]),
    ]


def _bag(tokens: np.ndarray, lengths: np.ndarray) -> dict[str, torch.Tensor]:
    import torch

    return {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "offsets": torch.from_numpy(np.cumsum(lengths) - lengths),
    }
