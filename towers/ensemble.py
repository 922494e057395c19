"""Members: towers of an ensemble that stand side by side in one vector.

A vector of D dimensions is K parts of D / K, one after another, and each part is a tower of its
own: linear layers and tables are as wide as all of them, what is not linear is there once a member.
Each part has length 1/√K, so that the inner product of two vectors is the mean of the members'
cosines, and an index sees one vector as ever. Members start and drop out differently, and each
learns by itself (or all as one, `training.together`): what they rank wrongly differs, and their
mean ranks better than one tower of as many dimensions, which learns its log by heart (deep
ensembles; Lakshminarayanan et al., 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Members(nn.Module):
    """Modules side by side, each on its own part of the last dimension.

    Args:
        each: the modules, one a member.
    """

    def __init__(self, each: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """(..., D) → (..., D); what else is given, each member is given."""
        parts = x.chunk(len(self.each), -1)
        return torch.cat(
            [member(part, *rest) for member, part in zip(self.each, parts, strict=True)], -1
        )


def side_by_side(make: Callable[[], nn.Module], members: int) -> nn.Module:
    """What `make` gives, as often as there are members; of one member, the module itself."""
    return make() if members == 1 else Members([make() for _ in range(members)])


def unit_vectors(x: Tensor, members: int = 1) -> Tensor:
    """(..., D) float32 of length 1, each member's part alike long.

    What is almost 0 stays short: its gradient has bounds.
    """
    x = x.float()
    if members == 1:
        return F.normalize(x, dim=-1, eps=0.01)
    parts = F.normalize(x.unflatten(-1, (members, -1)), dim=-1, eps=0.01)
    return parts.flatten(-2) / members**0.5
