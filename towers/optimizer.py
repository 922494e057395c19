"""Optimiser: sparse Adam for id tables, AdamW for dense weights, one schedule.

Two optimisers would take automatic optimisation, clipping, resuming and DDP away; one with two
rules keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class RowAdam(torch.optim.Optimizer):
    """Adam that moves only the touched rows of sparse gradients, and AdamW for dense ones.

    A row that no example of the batch touched keeps its value and its moments (lazy Adam): the
    cost of a step is that of the rows in it, not of the table.

    Args:
        params: parameters or groups; a group may set `lr` and `weight_decay`.
        lr: step size.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, for dense parameters only.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0:
            raise ValueError(f"The learning rate is {lr}; it has to be above 0.")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dense: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if parameter.grad.is_sparse:
                    self._move_rows(parameter, state, group)
                else:
                    dense.append(parameter)
            if dense:
                self._move_dense(dense, group)
        return loss

    def _move_rows(
        self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None  # step() has looked
        gradient = parameter.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        state["step"] += 1
        step = float(state["step"])
        first = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2)
        second.addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, first)
        state["exp_avg_sq"].index_copy_(0, rows, second)
        root = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        moved = parameter.index_select(0, rows)
        moved.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))
        parameter.index_copy_(0, rows, moved)

    def _move_dense(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients, sparse ones too, so that their common norm is at most `max_norm`.

    Returns:
        () the norm before.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        else:
            gradients.append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
