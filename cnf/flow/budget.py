"""A number of evaluations instead of a tolerance, and what each number buys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cnf.error import InputError, whole_number
from cnf.flow.continuous import Solver
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.gradient.reversible import is_reversible
from cnf.ode.tableau import TABLEAUS, Tableau

METHODS = ("euler", "midpoint", "rk4", "dopri5")  # that a trade-off compares
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
STEPWISE = (("rk4", 16), ("midpoint", 2), ("euler", 1))  # the method from so many evaluations on
REFERENCE = 1e-8  # tolerance of what the others are compared with
REPEATS = 3  # of a timing, of which the fastest counts


def with_budget(solver: Solver, nfe: int | None, method: str | Tableau | None = None) -> Solver:
    """The solver with as many equal steps as at most `nfe` evaluations allow; itself for None.

    method: an explicit Runge–Kutta method, by default rk4 from 16 evaluations on, else midpoint,
    and euler for one.
    Raises InputError where not even one step can be taken.
    """
    if nfe is None:
        if method is not None:
            raise InputError(f"method={method!r} goes with a budget of evaluations; give nfe= too")
        return solver
    nfe = whole_number("nfe", nfe, 1)
    tableau = _explicit(_usual(nfe) if method is None else method)
    each = tableau.used_stages * (2 if is_reversible(solver.gradient) else 1)
    steps = nfe // each
    if steps < 1:
        raise InputError(
            f"nfe={nfe} is less than the {each} evaluations that one step of {tableau.name!r} "
            "takes; give more, or a method of fewer stages such as 'euler'"
        )
    return replace(solver, method=tableau.name if method is None else method,
                   control=FixedStep(1 / steps))  # fmt: skip


def _usual(nfe: int) -> str:
    return next(name for name, least in STEPWISE if nfe >= least)


def _explicit(method: str | Tableau) -> Tableau:
    tableau = TABLEAUS.get(method) if isinstance(method, str) else method
    if not isinstance(tableau, Tableau) or tableau.implicit:
        known = ", ".join(name for name, one in TABLEAUS.items() if not one.implicit)
        raise InputError(
            f"method must be an explicit Runge–Kutta method where nfe= counts, got {method!r}; "
            f"known are {known}"
        )
    return tableau


class Budgeted(Protocol):
    """What is asked of a flow."""

    dim: int
    solver: Solver

    @property
    def log_prob(self) -> Any: ...
    @property
    def decode(self) -> Any: ...
    @property
    def encode(self) -> Any: ...


@dataclass(frozen=True)
class Setting:
    """What a method achieves with so many evaluations.

    nfe: evaluations of the field, of the adaptive solver the mean over rows; log_prob_error: nats,
    mean |Δ log p|; sample_error: root mean square distance of samples, in standard deviations of
    the data; seconds, sample_seconds: of log_prob and of sampling for all rows.
    """

    method: str
    nfe: float
    log_prob_error: float
    sample_error: float
    seconds: float
    sample_seconds: float


@dataclass(frozen=True)
class Tradeoff:
    """Error and time against the number of evaluations, for several methods.

    rows: how many were looked at; settings: by method, then by evaluations; the last is the flow's
    own solver.
    """

    rows: int
    settings: tuple[Setting, ...]

    def cheapest(self, error: float) -> Setting:
        """The setting of fewest evaluations whose log-densities are off by at most `error` nats.

        Raises InputError where none is as good.
        """
        good = [one for one in self.settings if one.log_prob_error <= error]
        if not good:
            best = min(one.log_prob_error for one in self.settings)
            raise InputError(
                f"no setting is within {error:g} nats, the best is within {best:.1e}; allow more, "
                "or compare more evaluations with nfe="
            )
        return min(good, key=lambda one: (one.nfe, one.log_prob_error))

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The table as aligned lines of text."""
        head = f"{'method':<16}{'NFE':>8}{'log p error':>14}{'sample error':>14}"
        lines = [f"{head}{'log p time':>12}{'sample time':>13}"]
        for one in self.settings:
            errors = f"{one.log_prob_error:>9.1e} nats{one.sample_error:>12.1e} σ"
            times = f"{1e3 * one.seconds:>9.1f} ms{1e3 * one.sample_seconds:>10.1f} ms"
            lines.append(f"{one.method:<16}{one.nfe:>8.4g}{errors}{times}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


@torch.no_grad()
def tradeoff(
    flow: Budgeted,
    x: Tensor,
    context: Tensor | None = None,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = BUDGETS,
) -> Tradeoff:
    """What every method achieves with every number of evaluations, on rows x (rows, dim).

    Errors are distances to a solution to a tolerance of 1e-8 (single precision: as far as it goes).
    Samples are compared at the same points of the base.
    """
    reference = _Reference(flow, x, context)
    settings = []
    for method in methods:
        used = _explicit(method).used_stages
        counts = sorted({whole_number("nfe", n, 1) // used * used for n in budgets} - {0})
        settings += [reference.setting(method, n) for n in counts]
    return Tradeoff(len(x), (*settings, reference.own()))


class _Reference:
    """What log-densities and samples are, as exactly as they can be had."""

    def __init__(self, flow: Budgeted, x: Tensor, context: Tensor | None) -> None:
        self._flow, self._x, self._context = flow, x, context
        self._spread = x.double().std(0, correction=0).clamp_min(torch.finfo(x.dtype).tiny).cpu()
        kept = flow.solver
        tolerance = max(REFERENCE, 8 * torch.finfo(x.dtype).eps)
        exact = Adaptive(tolerance, tolerance, quadrature_atol=10 * tolerance)
        adapts = isinstance(kept.control, Adaptive)
        flow.solver = replace(kept, control=exact, method=kept.method if adapts else "dopri5")
        try:
            self._log_prob = flow.log_prob(x, context)
            self._z = flow.encode(x, context)
            self._samples = flow.decode(self._z, context)
        finally:
            flow.solver = kept

    def setting(self, method: str, nfe: int) -> Setting:
        """What the method achieves with exactly so many evaluations."""
        return self._measured(method, nfe, {"nfe": nfe, "method": method})

    def own(self) -> Setting:
        """What the flow's own solver achieves."""
        _, info = self._flow.log_prob(self._x, self._context, return_info=True)
        name = self._flow.solver.method
        name = name if isinstance(name, str) else getattr(name, "name", "own")
        return self._measured(f"{name} (own)", float(info.nfe_per_sample.double().mean()), {})

    def _measured(self, name: str, nfe: float, budget: dict[str, Any]) -> Setting:
        x, context, flow = self._x, self._context, self._flow
        log_prob, seconds = _timed(lambda: flow.log_prob(x, context, **budget))
        samples, sample_seconds = _timed(lambda: flow.decode(self._z, context, **budget))
        off = (samples.double() - self._samples.double()).cpu() / self._spread
        return Setting(
            method=name,
            nfe=nfe,
            log_prob_error=float((log_prob.double() - self._log_prob.double()).abs().mean()),
            sample_error=float(off.square().mean().sqrt()),
            seconds=seconds,
            sample_seconds=sample_seconds,
        )


def _timed(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The value, and the seconds that it took."""
    fastest, value = float("inf"), None
    for _ in range(REPEATS):
        start = time.perf_counter()
        value = compute()
        value.sum().item()  # a device computes on its own
        fastest = min(fastest, time.perf_counter() - start)
    assert value is not None
    return value, fastest
