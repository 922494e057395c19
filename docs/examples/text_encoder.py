"""A text encoder of one's own: any sentence-transformers model that is saved to a folder.

Here word vectors that one has (GloVe, word2vec, one's own: lines of a word and its numbers) become
a static encoder. Call it once,

    python docs/examples/text_encoder.py vectors.txt my-encoder

and name the folder in the run file:

    [text]
    kind = "pretrained"
    model = "my-encoder"
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


def encoder_of(words: list[str], vectors: np.ndarray) -> SentenceTransformer:
    """The mean of known words' vectors.

    Args:
        words: V distinct words in small letters.
        vectors: (V, D) float32.
    """
    vocabulary = {"[UNK]": 0, **{word: place for place, word in enumerate(words, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    table = np.concatenate([np.zeros((1, vectors.shape[1])), vectors]).astype(np.float32)
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu"
    )


def main(file: str, folder: str) -> None:
    rows = [line.split() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    vectors = np.array([row[1:] for row in rows], np.float32)
    encoder_of([row[0] for row in rows], vectors).save(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
