"""Adam in the eigenbases of the gradients: far fewer steps where a matrix is badly conditioned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LARGEST = 256  # side of a matrix that is turned: what a basis costs grows with its cube
MEMORY = 0.95  # of the gradients' second moments, from which the bases come
INTERVAL = 10  # steps from one refinement of the bases to the next
SIDES = ("rows", "columns")  # of a matrix; a state has a basis and a moment for each that is turned


class SOAP(Optimizer):
    """Adam on the gradients G of matrices, turned into the eigenbases of E[G Gᵀ] and E[Gᵀ G].

    The bases begin as the identity and follow by a step of orthogonal iteration every INTERVAL
    steps.  A side above LARGEST is not turned; vectors, kernels and numbers of half precision are
    not at all, and stepped as by Adam.
    Source: Vyas et al. 2024, algorithm 3.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; raises ValueError for the state of another optimizer."""
        if any("mean" not in state for state in state_dict["state"].values()):
            raise ValueError("the state is that of another optimizer, not of SOAP")
        super().load_state_dict(state_dict)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_begun(parameter))
        state["step"] += 1
        count, (first, second) = state["step"], group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].lerp_(_turned(gradient, state).square(), 1 - second)
        scale = (square / (1 - second**count)).sqrt_().add_(group["eps"])
        turned = _turned(mean, state) / scale
        lr = group["lr"] / (1 - first**count)
        parameter.add_(_turned(turned, state, back=True), alpha=-lr)
        for axis, side in enumerate(SIDES):
            if side in state:
                along = gradient.transpose(0, axis)
                state[f"{side}_moment"].lerp_(along @ along.T, 1 - MEMORY)
        if count % INTERVAL == 0:
            _refine(state)


def _begun(parameter: Tensor) -> dict[str, Any]:
    """A parameter's state before its first step: moments of zero, bases of the identity."""
    state: dict[str, Any] = {"step": 0}
    state |= {name: torch.zeros_like(parameter) for name in ("mean", "square")}
    if parameter.ndim != 2 or parameter.dtype not in (torch.float32, torch.float64):
        return state
    for size, side in zip(parameter.shape, SIDES, strict=True):
        if 1 < size <= LARGEST:
            state[side] = torch.eye(size, dtype=parameter.dtype, device=parameter.device)
            state[f"{side}_moment"] = torch.zeros_like(state[side])
    return state


def _turned(matrix: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """The matrix in the bases of its sides, or out of them."""
    rows, columns = map(state.get, SIDES)
    if rows is not None:
        matrix = (rows if back else rows.T) @ matrix
    if columns is not None:
        matrix = matrix @ (columns.T if back else columns)
    return matrix


def _refine(state: dict[str, Any]) -> None:
    """One orthogonal iteration of each basis, its columns in the order of their eigenvalues."""
    for axis, side in enumerate(SIDES):
        if side in state:
            basis = state[side]
            power = state[f"{side}_moment"] @ basis
            order = (basis * power).sum(0).argsort(descending=True)
            state["square"] = state["square"].index_select(axis, order)
            state[side] = torch.linalg.qr(power[:, order]).Q
