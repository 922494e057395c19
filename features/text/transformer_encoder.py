"""Small BERT for a catalogue: WordPiece and random weights, without a model hub.

It reads word order, which the static encoder does not. From few texts it learns little by itself;
it is meant to go on learning inside the item tower (`text.train = "all"`).

Shapes: n texts, L tokens of the longest, T tokens of all, D dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from recsys.features.text.pretrained import quiet
from recsys.features.text.static_encoder import (
    FREQUENT,
    MAX_TOKENS,
    VOCABULARY,
    contrast,
    learned_from,
    make_pairs,
    one_thread,
    read_as_words,
    rows_of,
    tokenized,
)

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from recsys.features.text.rules import SmallTransformerText

LEARNING_RATE = 5e-4
PAD, UNKNOWN = "[PAD]", "[UNK]"
HEAD = 64
"""Dimensions of an attention head, as in BERT, where the width allows it."""


def train_transformer(
    texts: pl.Series,
    fields: list[pl.Series],
    rules: SmallTransformerText,
    seed: int,
    progress: Callable[[str], None],
    cooccurrence: np.ndarray | None = None,
) -> SentenceTransformer:
    """Fit a tokenizer on a catalogue, and train a transformer so that two views of an item meet.

    Args:
        texts: the whole text of each item.
        fields: columns as long as `texts`, the title first.
        rules: [text] of the configuration; with `epochs = 0` the weights stay random.
        seed: the same texts and seed give the same encoder.
        progress: is told in words what is going on.
        cooccurrence: (2, P) places in `texts` of items chosen one after the other, or None.

    Raises:
        DataError: no text has a letter in it.
    """
    rng = np.random.default_rng(seed)
    items = learned_from(texts, fields, rng)
    tokenizer = fit_wordpiece(items["text"].to_list())
    tokens = tokenized(tokenizer, items, len(texts), progress)
    model = small_transformer(tokenizer, rules.dimension, rules.layers, seed)
    together = rows_of(texts, items, cooccurrence)
    pairs = make_pairs(tokens, items, tokenizer, rules.views, together) if rules.epochs else []
    import torch

    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        contrast(model, pairs, rules.epochs, LEARNING_RATE, rng, progress, padded)
    return model.eval()


def fit_wordpiece(texts: list[str]) -> Tokenizer:
    """WordPiece of a catalogue, without marks of begin and end: the vectors' mean needs none."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    alphabet = read_as_words(trained, texts)
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        min_frequency=FREQUENT,
        # Letters within a word are numbered here: else the trainer would number them as it meets
        # them, in the order of a hash, and break ties between pieces by that.
        special_tokens=[PAD, UNKNOWN, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer, length=len(texts))
    # A new one, in which those letters are pieces like all others.
    model = models.WordPiece(trained.get_vocab(), unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.add_special_tokens([PAD, UNKNOWN])
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def small_transformer(
    tokenizer: Tokenizer, width: int, layers: int, seed: int
) -> SentenceTransformer:
    """A BERT of `layers` layers and `width` with seeded random weights.

    Args:
        tokenizer: its token 0 fills up.
        width: of the vectors.
        layers: of attention.
        seed: of the weights.
    """
    import torch
    from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

    # DistilBERT: a BERT without a pooler, whose weights nothing would train.
    config = DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        dim=width,
        n_layers=layers,
        n_heads=heads(width),
        hidden_dim=4 * width,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = DistilBertModel(config)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
    )
    # The library makes its modules of files, so files they become.
    with tempfile.TemporaryDirectory(prefix="recsys-text-") as folder, quiet():
        bert.save_pretrained(folder)
        words.save_pretrained(folder)
        return _of_folder(Path(folder))


def _of_folder(folder: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = Transformer(
        str(folder), config_kwargs={"local_files_only": True},
        model_kwargs={"local_files_only": True}, processor_kwargs={"local_files_only": True},
    )  # fmt: skip
    return SentenceTransformer(
        modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu"
    )


def heads(width: int) -> int:
    """Attention heads of a width: as near to `HEAD` dimensions each as it can be divided."""
    return next(h for h in range(max(1, width // HEAD), 0, -1) if width % h == 0)


def padded(tokens: np.ndarray, lengths: np.ndarray) -> dict[str, torch.Tensor]:
    """Tokens (T,) of texts one after another and lengths (n,) → (n, L) tokens and their mask."""
    import torch

    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = tokens
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
