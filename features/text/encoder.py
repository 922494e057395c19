"""Text encoders: unit vectors by sentence-transformers, and a cache of them.

Shapes: n texts, D dimensions of a text vector.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recsys.errors import BundleError, DataError
from recsys.features.text.pretrained import open_model, pretrained
from recsys.features.text.rules import (
    PretrainedText,
    SmallTransformerText,
    StaticText,
)
from recsys.files import atomic_folder, atomic_write, canonical_json, sha256_bytes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FORMAT_VERSION = 1
MANIFEST = "encoder.json"
DIGEST_BYTES = 16
"""Of a text: 128 bits, so that two of a billion texts meet with a chance of 1e-21."""
SILENT = 1e-6
"""A text vector at most so long says nothing and becomes zero: its direction would be rounding."""

Progress = Callable[[str], None]
Texts = Sequence[str | None] | pl.Series


class TextEncoder:
    """A sentence-transformers model that gives unit vectors, and zero where nothing is known.

    Args:
        model: any `SentenceTransformer`.
        batch: texts at once.
    """

    def __init__(self, model: SentenceTransformer, batch: int = 64) -> None:
        self.model = model.eval()
        self.batch = batch
        self.encoded = 0
        """Texts that went through the model so far: blank, repeated and cached ones did not."""

    @property
    def dimension(self) -> int:
        """D."""
        size = self.model.get_embedding_dimension()
        assert size is not None
        return int(size)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides a vector: weights, tokenizer, modules, prompt."""
        from tokenizers import Tokenizer

        tokenizer: Any = self.model.tokenizer
        inner = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
        rules = json.loads(inner.to_str())
        rules.pop("padding", None)  # a use of the tokenizer changes these two in place
        cut = rules.pop("truncation", None)
        limit = self.model.max_seq_length
        if inner is tokenizer:
            limit = cut["max_length"] if cut else None
        modules: list[Any] = [
            [type(module).__name__, getattr(module, "get_config_dict", dict)()]
            for module in self.model.children()
        ]
        prompt = self.model.prompts.get(self.model.default_prompt_name or "", "")
        # default=str: a configuration may hold a dtype or an activation.
        said = json.dumps([rules, limit, modules, prompt], sort_keys=True, default=str)
        parts = [said.encode()]
        for name, weights in sorted(self.model.state_dict().items()):
            parts.append(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
            parts.append(_bytes_of(weights))
        return sha256_bytes(*parts)

    def encode(self, texts: Texts, progress: Progress | None = None) -> np.ndarray:
        """Vectors of texts; a blank text, or one of unknown tokens only, is the zero vector.

        A zero vector has no nearest neighbours, only arbitrary ones: leave its row out.

        Returns:
            (n, D) float32, each row of length 1 or 0.

        Raises:
            DataError: the model gives a vector that is not finite.
        """
        distinct, code = distinct_texts(texts)
        read = np.flatnonzero((distinct.str.strip_chars() != "").to_numpy())
        vectors = np.zeros((len(distinct), self.dimension), np.float32)
        for start in range(0, len(read), 64 * self.batch):
            rows = read[start : start + 64 * self.batch]
            some = distinct.gather(rows).to_list()
            vectors[rows] = self.model.encode(
                some, batch_size=self.batch, show_progress_bar=False, convert_to_numpy=True
            )
            self.encoded += len(rows)
            if progress is not None:
                progress(f"text: {start + len(rows):,} of {len(read):,} encoded")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            row = int(np.flatnonzero(~np.isfinite(norms))[0])
            raise DataError(
                f"The text encoder gives a vector that is not finite for {distinct[row][:80]!r}. "
                "Its weights are damaged: load or train it again."
            )
        vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > SILENT)
        return vectors[code]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights (safetensors), tokenizer and manifest (JSON) as one folder, atomically."""
        with atomic_folder(folder) as temporary:
            self.model.save(str(temporary), create_model_card=False, safe_serialization=True)
            manifest = {
                "format": "recsys text encoder",
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "dimension": self.dimension,
                "batch": self.batch,
            }
            (temporary / MANIFEST).write_text(canonical_json(manifest) + "\n", encoding="utf-8")
            readable = (temporary / MANIFEST).stat().st_mode
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(readable)  # safetensors leaves its files to their owner alone

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str | None = "cpu") -> TextEncoder:
        """Read what `save` wrote; no network, no pickle.

        Raises:
            BundleError: the folder is missing, damaged, of another format or holds a pickle.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version, said = manifest["format_version"], manifest["fingerprint"]
            batch = int(manifest["batch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{folder} holds no text encoder of ours: {MANIFEST} is missing or damaged "
                f"({error}). Make the bundle again."
            ) from None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{folder} has text encoder format {version}, but this program reads "
                f"{FORMAT_VERSION}. Use the version of recsys that wrote it, or make it again."
            )
        try:
            encoder = TextEncoder(open_model(str(folder), device, local=True), batch)
            found = encoder.fingerprint
        except Exception as error:  # each library under it has its own words for a damaged file
            raise BundleError(
                f"The text encoder in {folder} cannot be read: {error}. Make the bundle again."
            ) from error
        if found != said:
            raise BundleError(
                f"{folder / MANIFEST} names the fingerprint {said[:12]}, but the files have "
                f"{found[:12]}. The folder is damaged or mixed: make the bundle again."
            )
        return encoder


def fit_encoder(
    texts: Texts,
    rules: StaticText | SmallTransformerText | PretrainedText | None = None,
    *,
    seed: int = 0,
    fields: Sequence[Texts] = (),
    cooccurrence: np.ndarray | None = None,
    progress: Progress | None = None,
) -> TextEncoder:
    """The encoder that `rules` ask for: trained on these texts, or loaded.

    Args:
        texts: the whole text of each item known at the cut-off.
        rules: [text] of the configuration.
        seed: the same texts and seed give the same encoder.
        fields: columns as long as `texts`, the title first, then description, category words, …;
            with the view "fields" the title is drawn to each of the others.
        cooccurrence: (2, P) places in `texts` of items that a user chose one after the other, for
            the view of that name; None: none are known, and the view is left out.
        progress: is told in words what is going on.

    Raises:
        ConfigError: the model that `rules` name cannot be had.
        DataError: there is no text to learn from.
    """
    rules = rules or StaticText()
    if isinstance(rules, PretrainedText):
        return TextEncoder(pretrained(rules.model, rules.device or None))
    # Here, so that a model which is only loaded does not pay for scipy and scikit-learn.
    from recsys.features.text.static_encoder import train_static
    from recsys.features.text.transformer_encoder import train_transformer

    whole = _series(texts)
    columns = [_series(field) for field in fields]
    for number, column in enumerate(columns):
        if len(column) != len(whole):
            raise DataError(
                f"Field {number + 1} has {len(column)} texts for {len(whole)} items. "
                "Give one text an item in each field, empty where there is none."
            )
    report = progress or (lambda _: None)
    if isinstance(rules, SmallTransformerText):
        model = train_transformer(whole, columns, rules, seed, report, cooccurrence)
        return TextEncoder(model, 256)
    return TextEncoder(train_static(whole, columns, rules, seed, report, cooccurrence), 1024)


def encode_cached(
    encoder: TextEncoder,
    texts: Texts,
    cache: str | os.PathLike[str],
    progress: Progress | None = None,
) -> np.ndarray:
    """What `encoder.encode` gives, but texts met before are looked up, not encoded.

    The folder holds one file an encoder, by fingerprint; a text is known by its digest. A file
    that does not match itself is set aside with a warning and made anew. Two processes that
    write at once leave the whole file of one of them.

    Returns:
        (n, D) float32, each row of length 1 or 0.
    """
    path = Path(cache) / f"text-{encoder.fingerprint[:32]}.safetensors"
    distinct, code = distinct_texts(texts)
    digests = _digests(distinct)
    old_digests, old_vectors = _read_cache(path, encoder)
    asked = pl.DataFrame(digests, schema=["a", "b"])
    known = pl.DataFrame(old_digests, schema=["a", "b"]).with_row_index("row")
    place = asked.join(known, on=["a", "b"], how="left", maintain_order="left")["row"]
    new = place.is_null().to_numpy()
    vectors = np.empty((len(distinct), encoder.dimension), np.float32)
    vectors[~new] = old_vectors[place.drop_nulls().to_numpy()]
    if new.any():
        vectors[new] = encoder.encode(distinct.filter(pl.Series(new)), progress)
        _write_cache(
            path,
            encoder,
            np.concatenate([old_digests, digests[new]]),
            np.concatenate([old_vectors, vectors[new]]),
        )
    if progress is not None:
        progress(f"text: {int(new.sum()):,} texts encoded, {int((~new).sum()):,} from the cache")
    return vectors[code]


def _digests(texts: pl.Series) -> np.ndarray:
    """(n, 2) uint64 BLAKE2b of each text: stable over versions and machines, unlike Series.hash.

    A comprehension, because no vectorized hash is both stable and free of collisions: a million
    texts of 100 letters take about a second.
    """
    blake = hashlib.blake2b
    joined = b"".join(
        [blake(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts.to_list()]
    )
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def _checksum(digests: np.ndarray, vectors: np.ndarray) -> str:
    return sha256_bytes(digests.tobytes(), vectors.tobytes())


def _read_cache(path: Path, encoder: TextEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Digests (m, 2) uint64 and vectors (m, D) float32 of a cache file; none where it is absent."""
    from safetensors import SafetensorError, safe_open

    empty = np.empty((0, 2), np.uint64), np.empty((0, encoder.dimension), np.float32)
    if not path.exists():
        return empty
    try:
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
            digests, vectors = file.get_tensor("digests"), file.get_tensor("vectors")
        if notes.get("fingerprint") != encoder.fingerprint:
            raise ValueError("it belongs to another encoder")
        if digests.shape != (len(vectors), 2) or vectors.shape[1:] != (encoder.dimension,):
            raise ValueError(f"it has the shapes {digests.shape} and {vectors.shape}")
        if notes.get("sha256") != _checksum(digests, vectors):
            raise ValueError("its content does not match its digest")
    except (SafetensorError, ValueError, OSError) as error:
        warnings.warn(
            f"The text vectors in {path} are damaged: {error}. They are made again.",
            RuntimeWarning,
            stacklevel=3,
        )
        return empty
    return digests, vectors


def _write_cache(
    path: Path, encoder: TextEncoder, digests: np.ndarray, vectors: np.ndarray
) -> None:
    from safetensors.numpy import save_file

    notes = {"fingerprint": encoder.fingerprint, "sha256": _checksum(digests, vectors)}
    with atomic_write(path) as temporary:
        save_file({"digests": digests, "vectors": vectors}, temporary, metadata=notes)


def _series(texts: Texts) -> pl.Series:
    series = texts if isinstance(texts, pl.Series) else pl.Series(list(texts), dtype=pl.String)
    return series.cast(pl.String).fill_null("").alias("text")


def distinct_texts(texts: Texts) -> tuple[pl.Series, np.ndarray]:
    """Distinct texts in order of appearance, and for each text (n,) which of them it is."""
    texts = _series(texts)
    distinct = texts.unique(maintain_order=True)
    rows = distinct.to_frame().with_row_index("code")
    code = texts.to_frame().join(rows, on="text", how="left", maintain_order="left")["code"]
    return distinct, code.to_numpy()


def _bytes_of(weights: Any) -> bytes:
    import torch

    flat = weights.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
