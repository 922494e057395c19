"""Ensemble of towers side by side in one vector.

A vector of D dimensions is K parts of D / K, one after another, and each part is a tower of its
own: linear layers and tables are as wide as all of them, what is not linear is there once a tower.
Each part has length 1/√K, so that the inner product of two vectors is the mean of the towers'
cosines, and an index sees one vector as ever. Towers start and drop out differently and learn by
their mean cosine: what they rank wrongly differs, and their mean ranks better than one tower of as
many dimensions, which learns its log by heart (deep ensembles; Lakshminarayanan et al., 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Ensemble(nn.Module):
    """Modules side by side, each on its own part of the last dimension.

    Args:
        towers: the modules, one a tower.
    """

    def __init__(self, towers: list[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """(..., D) → (..., D); what else is given, each tower is given."""
        parts = x.chunk(len(self.towers), -1)
        return torch.cat(
            [tower(part, *rest) for tower, part in zip(self.towers, parts, strict=True)], -1
        )


def side_by_side(make: Callable[[], nn.Module], ensemble: int) -> nn.Module:
    """What `make` gives, once for each tower of the ensemble; of one, the module itself."""
    return make() if ensemble == 1 else Ensemble([make() for _ in range(ensemble)])


def unit_vectors(x: Tensor, ensemble: int = 1) -> Tensor:
    """(..., D) float32 of length 1, each tower's part alike long.

    What is almost 0 stays short: its gradient has bounds.
    """
    x = x.float()
    if ensemble == 1:
        return F.normalize(x, dim=-1, eps=0.01)
    parts = F.normalize(x.unflatten(-1, (ensemble, -1)), dim=-1, eps=0.01)
    return parts.flatten(-2) / ensemble**0.5
