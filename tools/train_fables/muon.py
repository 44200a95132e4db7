"""Muon: momentum whose step is the nearest orthogonal matrix, for matrices and stacks of them.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (the coefficients are that post's).
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Parameters are [.., rows, columns]; each matrix of a stack is orthogonalised alone.

    A stack [E, 2 I, D] of gates over ups is two matrices each: `halves` names such parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.0,
        halves: Iterable[Tensor] = (),
    ) -> None:
        self._halves = {id(p) for p in halves}
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Make one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                if id(p) in self._halves:
                    update = update.view(-1, p.shape[-2] // 2, p.shape[-1])
                scale = max(1.0, update.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(orthogonalised(update).view_as(p), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return nearly U V^T of each matrix's U S V^T, by a Newton-Schulz iteration."""
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        a = x @ x.mT
        x = _A * x + (_B * a + _C * (a @ a)) @ x
    return x.mT if is_tall else x
