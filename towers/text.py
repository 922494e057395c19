"""Text encoder inside the item tower, trained by the towers' loss.

A batch may name more texts than memory holds the intermediate results of. They are then encoded in
chunks, each under `torch.utils.checkpoint`: the vectors are kept, what lies between is not, the
loss is taken back to the vectors of the whole batch, and each chunk is encoded again, with the same
random state, when its gradient is due. These are the cached gradients of GradCache (Gao et al.,
2021), done by the library: value and gradient are those of the whole batch at once.

Legend: R rows asked for, N rows, U distinct texts, T dimensions of a text vector.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys.features.text.encoder import SILENT, TextEncoder

if TYPE_CHECKING:
    from recsys.features.text.tokens import TextTokens

CHUNK = 2**14
"""Tokens, padding included, whose intermediate results are held at once while a transformer
learns: memory is bounded, a step takes a third longer."""
ANSWERING = 2**16
"""Tokens at once where no gradient is wanted."""


class TextTower(nn.Module):
    """Item rows → unit text vectors (zero where there is no text), by an encoder that learns.

    A transformer's texts are sorted by length and worked through in chunks. A static encoder is
    never chunked: it keeps nothing but token numbers for its gradient, which is sparse.

    Args:
        encoder: where learning starts; it is copied and stays as it is.
        tokens: text of every row, tokenised for this encoder.
        train: "all", or "last" for the last layer and what follows it.
        chunk: tokens, padding included, whose intermediate results are held at once; None: all.
    """

    text_of: Tensor
    values: Tensor
    offsets: Tensor
    lengths: Tensor

    def __init__(
        self,
        encoder: TextEncoder,
        tokens: TextTokens,
        *,
        train: str = "all",
        chunk: int | None = CHUNK,
    ) -> None:
        super().__init__()
        # Halved precision, in which some models are kept, would swallow small steps.
        self.encoder: nn.Module = copy.deepcopy(encoder.model).cpu().float().train()
        self.dimension, self.chunk = encoder.dimension, chunk
        self._batch, self._pad, self._prompt = encoder.batch, tokens.pad, tokens.prompt
        for name, array in (
            ("text_of", tokens.text_of),
            ("values", np.append(tokens.tokens.values, np.int32(tokens.pad))),  # never empty
            ("offsets", tokens.tokens.offsets[:-1]),
            ("lengths", tokens.tokens.lengths),
        ):
            self.register_buffer(name, torch.from_numpy(np.array(array)), persistent=False)
        bags = [module for module in self.encoder.modules() if isinstance(module, nn.EmbeddingBag)]
        self.static = bool(bags)
        for bag in bags:
            bag.sparse = True  # only the words of the batch get a gradient, and only they are moved
        self.encoder.requires_grad_(False)
        for parameter in learning(self.encoder, train):
            parameter.requires_grad_(True)
        self._known: tuple[object, Tensor] | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """Text vectors of rows, each distinct text encoded once.

        Where no gradient is wanted of a model that answers, they are looked up in `vectors`.

        Args:
            rows: (R,) int64.

        Returns:
            (R, T) float32, of length 1 or 0.
        """
        if not self.training and not torch.is_grad_enabled():
            return self.vectors()[self.text_of[rows]]
        texts, place = torch.unique(self.text_of[rows], return_inverse=True)
        return self._encode(texts, keep=True)[place]

    def vectors(self) -> Tensor:
        """(U, T) vectors of all distinct texts with the weights as they stand, without dropout.

        They are made once and kept until a weight changes.
        """
        # A step of an optimiser and a checkpoint that is loaded both count a weight's version up.
        state = tuple((p.data_ptr(), p._version) for p in self.encoder.parameters())
        if self._known is None or self._known[0] != state:
            training = self.encoder.training
            self.encoder.eval()
            # Kept for later, so that they may not belong to this pass alone.
            with torch.inference_mode(False), torch.no_grad():
                texts = torch.arange(len(self.lengths), device=self.lengths.device)
                self._known = (state, self._encode(texts, keep=False))
            self.encoder.train(training)
        return self._known[1]

    def trained(self) -> TextEncoder:
        """The encoder as it stands now, a copy, for texts that come later."""
        model: Any = copy.deepcopy(self.encoder)
        return TextEncoder(model.cpu(), self._batch)

    def _encode(self, texts: Tensor, *, keep: bool) -> Tensor:
        """(u,) distinct texts → (u, T); with `keep` for a gradient."""
        lengths, order = self.lengths[texts].sort(stable=True)
        sorted_texts = texts[order]
        sizes = lengths.cpu().numpy()
        empty = int(np.searchsorted(sizes, 1))
        most = ANSWERING if not keep else None if self.static else self.chunk
        parts = pieces(sizes, empty, most)
        again = keep and len(parts) > 1 and torch.is_grad_enabled()
        found = [torch.zeros(empty, self.dimension, device=texts.device)]
        for part in parts:
            some, longest = sorted_texts[part], int(sizes[part.stop - 1])
            found.append(
                checkpoint(self._chunk, some, longest, use_reentrant=False, preserve_rng_state=True)
                if again
                else self._chunk(some, longest)
            )
        return torch.cat(found)[_inverse(order)]

    def _chunk(self, texts: Tensor, longest: int) -> Tensor:
        """(n,) distinct texts of 1 to `longest` tokens → (n, T)."""
        features = self._bags(texts) if self.static else self._padded(texts, longest)
        out: Tensor = self.encoder(features)["sentence_embedding"].float()
        norm = out.norm(dim=1, keepdim=True)
        # Chosen before the division: what is silent would have a gradient without bounds.
        silent = norm <= SILENT
        return torch.where(silent, 0.0, out / torch.where(silent, 1.0, norm))

    def _padded(self, texts: Tensor, longest: int) -> dict[str, Any]:
        """What a transformer reads: (n, longest) token numbers and which of them are there."""
        place = torch.arange(longest, device=texts.device)
        mask = place < self.lengths[texts, None]
        at = (self.offsets[texts, None] + place).clamp(max=len(self.values) - 1)
        ids = torch.where(mask, self.values[at], self._pad).long()
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if self._prompt:
            features["prompt_length"] = self._prompt
        return features

    def _bags(self, texts: Tensor) -> dict[str, Any]:
        """What a static encoder reads: token numbers one text after another, and their starts."""
        lengths = self.lengths[texts]
        starts = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(self.offsets[texts] - starts, lengths)
        at = torch.arange(len(shift), device=texts.device) + shift
        return {"input_ids": self.values[at].long(), "offsets": starts}


def learning(encoder: nn.Module, train: str) -> list[nn.Parameter]:
    """Which weights of a sentence-transformers model learn.

    Args:
        encoder: modules in a row, the first reads tokens.
        train: "all"; "last": of the first module the last of its layers, and all modules after it.
            A model without layers, such as a static encoder, is one layer: all of it.

    Raises:
        ValueError: another word.
    """
    if train not in ("last", "all"):
        raise ValueError(f"train is {train!r}; a text encoder in the tower learns 'last' or 'all'.")
    first, *after = encoder.children()
    stacks = [m for m in first.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if train == "all" or not stacks:
        return list(encoder.parameters())
    layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return [p for module in (layers[-1], *after) for p in module.parameters()]


def pieces(lengths: np.ndarray, start: int, most: int | None) -> list[slice]:
    """Cut texts sorted by length so that no piece, padded, has more than `most` tokens.

    Args:
        lengths: (u,) ascending.
        start: the first text to be in a piece.
        most: tokens; a longer text is a piece by itself. None: one piece.

    Returns:
        slices of at least one text, in order.
    """
    parts = []
    while start < len(lengths):
        stop = len(lengths)
        if most is not None:
            ahead = lengths[start : start + most]
            # Padded size grows with each text, so those that fit stand in front.
            fit = np.count_nonzero(ahead * np.arange(1, len(ahead) + 1) <= most)
            stop = start + max(1, int(fit))
        parts.append(slice(start, stop))
        start = stop
    return parts


def text_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: weights of the text encoders that learn inside `model`.

    Only matrices are decayed: not the vectors of tokens, of which a batch sees few, and not biases
    and scales.

    Returns:
        groups that are not empty; none where every encoder is frozen.
    """
    towers = [module for module in model.modules() if isinstance(module, TextTower)]
    learned = [p for tower in towers for p in tower.parameters() if p.requires_grad]
    tables = {
        id(module.weight)
        for tower in towers
        for module in tower.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    decayed = [p for p in learned if p.ndim > 1 and id(p) not in tables]
    matrices = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in learned if id(p) not in matrices], "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
