"""Newton's iteration for the stages of an implicit step, and the gradient of what it finds.

The root k of k = f(t, z + wk) is found with one matrix I − wJ for all stages of a step, and with
the Jacobian J of an earlier step as long as the iteration converges fast with it.  Its gradient is
that of the equation (implicit function theorem): no iteration is ever differentiated.
Source: Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.jacobian import Layout, jacobian_of
from cnf.ode.state import Leaves

Array = np.ndarray
Factors = tuple[Tensor, Tensor]

_SHARE = 0.01  # of the tolerance, for what the iteration leaves over
_TURNS, _TURNS_TO_ROUNDING = 8, 16  # with one matrix
_FULL_TURNS = 25  # with a matrix of its own each
_FAST = 0.02  # converging at this rate, a Jacobian is good for the next step too
_ROUNDING = 10.0  # machine epsilons of the state: a smaller change is none


@dataclass(frozen=True)
class Equation:
    """k = f(t, z + wk) over vectors of a layout, (blocks, size); field: f, with its Jacobian."""

    field: Any
    t: float
    weight: float
    layout: Layout

    def slope(self, at: Tensor) -> Tensor:
        """f(t, at)."""
        return self.layout.vector(self.field(self.t, self.layout.leaves(at)).slope)

    def matrix(self, at: Tensor) -> Tensor:
        """I − wJ(t, at), (blocks, size, size)."""
        return shifted(jacobian_of(self.field, self.t, self.layout.leaves(at)), self.weight)


class Root(torch.autograd.Function):
    """k as a function of value = f(t, z + wk) and of k: one exact step of Newton's iteration,
    k + (I − wJ)⁻¹(value − k), with J held fixed.

    Called with (equation, root, z, k, value), where `root`, what comes back, equals k.  From a k
    without a graph the first derivative is exact; from one with exact derivatives up to some order,
    that of twice the order.
    """

    @staticmethod
    def forward(
        ctx: Any, equation: Equation, root: Tensor, base: Tensor, k: Tensor, value: Tensor
    ) -> Tensor:
        ctx.equation = equation
        ctx.save_for_backward(base, root)
        return root.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, bar: Tensor
    ) -> tuple[Any, ...]:
        base, root = ctx.saved_tensors
        with torch.no_grad():
            matrix = ctx.equation.matrix(torch.add(base, root, alpha=ctx.equation.weight))
        found = torch.linalg.solve_ex(matrix.mT, bar.unsqueeze(-1))[0].squeeze(-1)
        if torch.is_grad_enabled():
            found = _NoMore.apply(found, root)
        return None, None, None, bar - found if ctx.needs_input_grad[3] else None, found


class _NoMore(torch.autograd.Function):
    """`found`, which is differentiated once more with the root, and not again: J was held fixed."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, root: Tensor) -> Tensor:
        return found.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, bar: Tensor
    ) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise InputError(
                "implicit methods have first and second derivatives; for a third take an explicit "
                "method"
            )
        return bar, None


class RootOnce(Root):
    """The same, of which a second derivative is refused."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, bar: Tensor
    ) -> tuple[Any, ...]:
        return Root.backward(ctx, bar)


class Memory:
    """What a run of steps has learnt: the last Jacobian and where it was taken, how fast the
    iteration converged with it on the last step, and LU of I − wJ for one w.
    """

    def __init__(self) -> None:
        self.jacobian: Tensor | None = None
        self.at: float | None = None
        self.rate = 0.0
        self.weight: float | None = None
        self.factors: Factors | None = None


class Newton:
    """Roots of the equations of one step from (t, y), all with the weight w.

    rtol, atol: the tolerance of the step, of which a share may be left over; both 0 to iterate down
    to rounding; patient: try with a matrix for each turn before a root is given up; twice: with
    second derivatives.
    Arrays hold a number for each block; failed: where a root was not found; calls: evaluations of
    the field so far.
    """

    def __init__(
        self,
        field: Any,
        t: float,
        y: Leaves,
        weight: float,
        memory: Memory,
        tolerance: tuple[float, float],
        patient: bool,
        twice: bool,
    ) -> None:
        self._field, self._t, self._y, self._weight = field, t, y, weight
        self._memory, self._patient, self._twice = memory, patient, twice
        self.layout = Layout(y, len(self._jacobian()))
        self._progress = Progress(self.layout, y, tolerance)
        self.failed = np.zeros(self.layout.blocks, dtype=bool)
        self.calls = np.zeros(self.layout.blocks, dtype=np.int64)

    def root(self, t: float, base: Tensor, guess: Tensor) -> Tensor:
        """The k of k = f(t, base + wk), searched from `guess`, with its gradient where enabled."""
        equation = Equation(self._field, t, self._weight, self.layout)
        with torch.no_grad():
            k = self._found(equation, base.detach(), guess.detach())
        if not torch.is_grad_enabled():
            return k
        value = equation.slope(torch.add(base, k, alpha=self._weight))
        if not value.requires_grad:
            return k
        if not self._twice:
            return RootOnce.apply(equation, k, base, k, value)
        once = Root.apply(equation, k, base, k, value)
        value = equation.slope(torch.add(base, once, alpha=self._weight))
        return Root.apply(equation, k, base, once, value)

    def spoiled(self, vector: Tensor) -> Tensor:
        """The vector, NaN in the blocks that failed."""
        if not self.failed.any():
            return vector
        return _mixed(self.failed, torch.full_like(vector, torch.nan), vector)

    def finish(self) -> bool:
        """Whether all roots were found; the next step may use what this one learnt."""
        solved = not self.failed.any()
        self._memory.rate = self._progress.rate if solved else np.inf
        return solved

    def _jacobian(self) -> Tensor:
        """Of this step, or of an earlier one that is good enough."""
        memory = self._memory
        if memory.jacobian is None or not (self._fresh or memory.rate <= _FAST):
            return self._renewed()
        return memory.jacobian

    def _renewed(self) -> Tensor:
        memory = self._memory
        with torch.no_grad():
            found = jacobian_of(self._field, self._t, self._y)
        memory.jacobian, memory.at, memory.weight = found, self._t, None
        return found

    @property
    def _fresh(self) -> bool:
        return self._memory.at == self._t

    def _factors(self) -> Factors:
        memory = self._memory
        if memory.factors is None or memory.weight != self._weight:
            assert memory.jacobian is not None
            memory.factors = _factored(shifted(memory.jacobian, self._weight))
            memory.weight = self._weight
        return memory.factors

    def _found(self, equation: Equation, base: Tensor, guess: Tensor) -> Tensor:
        """The root; where it fails with an old Jacobian, then with one of this step, then full."""
        k, lost = self._iterate(equation, base, guess, self.failed, False)
        if lost.any() and not self._fresh:
            self._renewed()
            self._progress.rate = 0.0  # that was the old one's
            k, lost = self._again(equation, base, guess, k, lost, False)
        if lost.any() and self._patient:
            k, lost = self._again(equation, base, guess, k, lost, True)
        self.failed = self.failed | lost
        return k

    def _again(
        self, equation: Equation, base: Tensor, guess: Tensor, k: Tensor, lost: Array, full: bool
    ) -> tuple[Tensor, Array]:
        return self._iterate(equation, base, _mixed(lost, guess, k), ~lost, full)

    def _iterate(
        self, equation: Equation, base: Tensor, k: Tensor, settled: Array, full: bool
    ) -> tuple[Tensor, Array]:
        """(k, lost) from k on in the blocks that are not settled; full: a matrix for each turn."""
        progress, lost = self._progress, np.zeros_like(settled)
        progress.start(full)
        while not settled.all():
            self.calls += ~settled
            at = torch.add(base, k, alpha=self._weight)
            factors = _factored(equation.matrix(at)) if full else self._factors()
            rest = (equation.slope(at) - k).unsqueeze(-1)
            change = torch.linalg.lu_solve(*factors, rest).squeeze(-1)
            k = _mixed(~settled, k + change, k)
            good, bad = progress.judge(change * self._weight, at, base, ~settled)
            lost = lost | (bad & ~settled)
            settled = settled | good | bad
        return k, lost


class Progress:
    """How the iteration converges: what is small enough, and what will not become so.

    rate: the slowest convergence so far, of the first two changes of a root.
    """

    def __init__(self, layout: Layout, y: Leaves, tolerance: tuple[float, float]) -> None:
        rtol, atol = tolerance
        size = layout.vector(y).detach().abs()
        self._exact = rtol == atol == 0.0
        limits = torch.finfo(size.dtype)
        units = (size * rtol + atol) * _SHARE
        self._units = torch.ones_like(size) if self._exact else units.clamp_(min=limits.tiny)
        self._epsilon = limits.eps
        self._ahead = np.ones(layout.blocks)  # what is left, over the size of the last change
        self.rate = 0.0

    def start(self, full: bool) -> None:
        """Another iteration begins; one with a matrix for each turn may wander for a while."""
        self._full, self._before, self._turn = full, None, 0
        self._turns = _FULL_TURNS if full else _TURNS_TO_ROUNDING if self._exact else _TURNS

    def judge(self, change: Tensor, at: Tensor, base: Tensor, asked: Array) -> tuple[Array, Array]:
        """(good, bad): the blocks that have converged, and those that will not.

        change: of the state at this turn; at: the state before it, whose rounding is that of its
        parts, of which base is one; asked: the blocks that matter.
        """
        size, *parts = self._sizes(change, at, base)
        whole = np.maximum(*parts)
        self._turn += 1
        rounding = _ROUNDING * self._epsilon * whole
        if self._before is None:
            ahead, slow = np.maximum(self._ahead, self._epsilon) ** 0.8, np.zeros_like(asked)
        else:
            limit = rounding if self._exact else np.maximum(rounding, 1.0)
            ahead, slow = self._outlook(size, limit, asked)
        self._before = size
        slow = slow | (self._turn == self._turns)
        good = (size <= rounding) | ((ahead * size <= 1.0) & (not self._exact))
        # close to rounding the changes shrink no more, and there is nothing left to be gained
        good = good | (slow & (size <= self._epsilon ** (2 / 3) * whole))
        given_up = self._turn == self._turns if self._full else slow
        return good, ~np.isfinite(size) | (given_up & ~good)

    def _sizes(self, *vectors: Tensor) -> Array:
        """RMS of each vector's blocks, in units of what may be left over: the one device-to-host
        read of a turn.
        """
        together = torch.stack(vectors) / self._units
        norms = torch.linalg.vector_norm(together, dim=-1) / max(together.shape[-1], 1) ** 0.5
        return norms.double().cpu().numpy()

    def _outlook(self, size: Array, limit: Array, asked: Array) -> tuple[Array, Array]:
        """(ahead, slow): what will be left over for each unit of this change, and whether it will
        still be too much after the turns that are left.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rate = np.where(size == 0.0, 0.0, size / self._before)
            ahead = np.where(rate < 1.0, rate / (1.0 - rate), np.inf)
            left = self._turns - self._turn
            slow = ~(rate < 1.0) | (ahead * rate**left * size > limit)
        if self._turn == 2 and asked.any():
            self.rate = max(self.rate, float(rate[asked].max()))
        self._ahead = np.where(asked, ahead, self._ahead)
        return ahead, slow


def shifted(jacobian: Tensor, weight: float) -> Tensor:
    """I − weight·J."""
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.add(eye, jacobian, alpha=-weight)


def _factored(matrix: Tensor) -> Factors:
    """LU; of a singular matrix too, whose solutions are not finite."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return factors, pivots


def _mixed(chosen: Array, yes: Tensor, no: Tensor) -> Tensor:
    """(blocks, size): `yes` in the chosen blocks, else `no`."""
    if chosen.all():
        return yes
    return torch.where(torch.from_numpy(chosen).to(yes.device)[:, None], yes, no)
