"""Tokenised item texts for an encoder that learns.

Shapes: N rows, U distinct texts, T tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.errors import ConfigError
from recsys.features.text.encoder import TextEncoder, Texts, distinct_texts
from recsys.ragged import Ragged

AT_ONCE = 4096
"""Texts tokenised at once: the library pads them to the longest."""


@dataclass(frozen=True)
class TextTokens:
    """Distinct texts as an encoder reads them.

    Args:
        tokens: U ragged int32 token numbers, prompt and marks of begin and end included; none for
            a text that is blank or says nothing to the tokenizer.
        text_of: (N,) int64 distinct text of each row.
        pad: number that fills up shorter texts.
        prompt: tokens of the prompt that pooling leaves out; 0 where there is none.
    """

    tokens: Ragged
    text_of: np.ndarray
    pad: int
    prompt: int = 0


def tokenise(encoder: TextEncoder, texts: Texts) -> TextTokens:
    """Token numbers of each distinct text, as `encoder.encode` would read it.

    Args:
        encoder: its model starts with a tokenizer of text.
        texts: of N rows; None is an empty text.

    Raises:
        ConfigError: the model reads something else than tokens.
    """
    model: Any = encoder.model
    distinct, text_of = distinct_texts(texts)
    read = np.flatnonzero((distinct.str.strip_chars() != "").to_numpy())
    prompt = model.prompts.get(model.default_prompt_name or "", "") or None
    lengths = np.zeros(len(distinct), np.int64)
    values, left_out = [np.zeros(0, np.int32)], 0
    for start in range(0, len(read), AT_ONCE):
        rows = read[start : start + AT_ONCE]
        features = model.preprocess(distinct.gather(rows).to_list(), prompt=prompt)
        ids, lengths[rows] = _ragged(features, type(model[0]).__name__)
        values.append(ids)
        left_out = int(features.get("prompt_length") or 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    pad = int(getattr(model.tokenizer, "pad_token_id", None) or 0)
    return TextTokens(
        Ragged(offsets, np.concatenate(values)), text_of.astype(np.int64), pad, left_out
    )


def _ragged(features: dict[str, Any], reader: str) -> tuple[np.ndarray, np.ndarray]:
    """Token numbers (T,) of texts one after another, and how many each has (n,)."""
    if "input_ids" in features and "offsets" in features:  # a static encoder's bags
        ids, starts = features["input_ids"].numpy(), features["offsets"].numpy()
        return ids.astype(np.int32), np.diff(starts, append=len(ids))
    if "input_ids" in features and "attention_mask" in features:
        mask = features["attention_mask"].numpy() > 0
        return features["input_ids"].numpy()[mask].astype(np.int32), mask.sum(axis=1)
    raise ConfigError(
        f"The text model starts with {reader}, which does not read tokens, so that it cannot learn "
        'inside the item tower. Set text.train = "frozen", or choose another text.model.'
    )
