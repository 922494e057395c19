"""Histories to try towers on, shared by the tests of pooled and of causal ones."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from recsys.features.batching.batch import UserSide

SEED = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(0, 21), min_size=1, max_size=7)
N_ITEMS, D = 9, 8


def side(lengths: list[int], seed: int = 0, **others: Tensor) -> UserSide:
    rng = torch.Generator().manual_seed(seed)
    return UserSide(
        users=torch.arange(len(lengths)),
        history=torch.randint(N_ITEMS, (sum(lengths),), generator=rng),
        lengths=torch.tensor(lengths),
        context=torch.zeros(len(lengths), 0, dtype=torch.int64),
        **others,
    )


def stirred(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Double precision, no dropout, weights away from their start, where last layers are 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.6 * torch.randn(weight.shape, generator=rng))
    return module.double().eval()


def entries_of(asked: UserSide) -> list[Tensor]:
    return list(asked.history.split(asked.lengths.tolist()))
