"""Whether a log-density can be trusted: what must agree, measured, and a verdict in a sentence."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cnf.flow.report import Given, LearnedDensity, grid_mass, round_trip_error
from cnf.training.mode import InMode

ROWS = 500  # that are looked at
CELLS = 400  # a side, of the grid on which the mass is found
MOST_DIM = 32  # in which the Jacobian is taken
JACOBIANS = 4  # rows whose Jacobian is taken
CENTRES, DRAWS = 1000, 4000  # of the estimate of the mass
LEAST_DRAWS = 100.0  # that the estimate must be worth
TYPICAL, WORST = 0.01, 0.1  # nats that log-densities may be off, in the mean and at most
MASS = 0.02
ROUND_TRIP = 2e-2  # of a column's standard deviation
SAME = {torch.float32: 1e-3, torch.float64: 1e-6}  # nats between places in a batch


class Checkable(Protocol):
    """What is asked of a flow, which is an nn.Module besides."""

    dim: int

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def log_prob(self) -> Any: ...
    @property
    def sample(self) -> Any: ...
    @property
    def encode(self) -> Any: ...
    @property
    def decode(self) -> Any: ...


@dataclass(frozen=True)
class Finding:
    """Something that was measured: in words; whether it is as it must be, None for undecided."""

    name: str
    text: str
    passed: bool | None
    value: float
    limit: float


@dataclass(frozen=True)
class Check:
    """What was found of a flow's log-densities; printed it is a table and a sentence.

    rows: how many were looked at; off: nats by which log-densities are off, in the mean.
    """

    rows: int
    off: float
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; what could not be decided does not count."""
        return all(finding.passed is not False for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The sentence."""
        wrong = [finding.name for finding in self.findings if finding.passed is False]
        open_ones = [finding.name for finding in self.findings if finding.passed is None]
        if wrong:
            return f"Do not trust these log-densities: {_listed(wrong)} {_is(wrong)} off."
        doubt = f"; {_listed(open_ones)} could not be decided" if open_ones else ""
        return f"These log-densities can be trusted to {max(self.off, 1e-6):.1g} nats{doubt}."

    def as_dict(self) -> dict[str, Any]:
        """Verdict and findings as plain values."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}

    def lines(self) -> list[str]:
        """The table and the sentence as lines of text."""
        marks = {True: "ok", False: "OFF", None: "?"}
        rows = [f"{one.name:<18}{marks[one.passed]:<5}{one.text}" for one in self.findings]
        return [*rows, self.verdict]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def examined(flow: Checkable, x: Tensor, context: Tensor | None = None) -> Check:
    """What is found of a flow on rows x (rows, dim) given contexts (rows, k).

    At most 500 rows are looked at, spread over all of them.
    """
    chosen = torch.linspace(0, len(x) - 1, min(len(x), ROWS)).round().long().unique()
    x = x[chosen.to(x.device)]
    context = None if context is None else context[chosen.to(context.device)]
    with torch.no_grad():
        log_prob, info = flow.log_prob(x, context, return_info=True)
        findings = [
            _integration(info.integration_error),
            _trace(info.trace_error, info.divergence),
            _round_trip(Given(flow, context), x),
            _mass(flow, x, context),
            _neighbours(flow, x, context, log_prob),
            _modes(flow, x, context),
        ]
    if flow.dim <= MOST_DIM:
        findings.insert(4, _jacobian(flow, x, context))
    off = info.integration_error.mean() + info.trace_error.nan_to_num(0.0).mean()
    return Check(len(x), float(off), tuple(findings))


def _integration(error: Tensor) -> Finding:
    mean, worst = float(error.mean()), float(error.max())
    text = f"{mean:.1e} nats in the mean, {worst:.1e} at most, to tolerances 100 times tighter"
    return Finding("integration", text, mean <= TYPICAL and worst <= WORST, mean, TYPICAL)


def _trace(error: Tensor, divergence: str) -> Finding:
    mean = float(error.mean())
    if math.isnan(mean):
        return Finding("trace", f"{divergence}, of which nothing is known", None, mean, WORST)
    text = "exact" if mean == 0 else f"standard error {mean:.1e} nats"
    return Finding("trace", f"{text} ({divergence})", mean <= WORST, mean, WORST)


def _round_trip(flow: Given, x: Tensor) -> Finding:
    found = round_trip_error(flow, x)
    error = found.largest if math.isnan(found.relative) else found.relative
    text = f"{found.largest:.1e} at most, {error:.1e} of a column's spread"
    return Finding("round trip", text, error <= ROUND_TRIP, error, ROUND_TRIP)


def _mass(flow: Checkable, x: Tensor, context: Tensor | None) -> Finding:
    """Of a conditional flow that of the first row's density."""
    given = Given(flow, context)
    if context is not None:
        given = Given(flow, context[:1])
        x = given.sample(CENTRES, seed=1)
    if flow.dim <= 2:
        mass = grid_mass(given, x, CELLS)
        text = f"{mass:.4f} on a grid"
        return Finding("mass", text, abs(mass - 1) <= MASS, mass, MASS)
    mass, error, worth = estimated_mass(given)
    text = f"{mass:.3f} ± {error:.3f} by importance, worth {worth:.0f} of {DRAWS} draws"
    decided = worth >= LEAST_DRAWS
    good = abs(mass - 1) <= MASS + 3 * error
    return Finding("mass", text, good if decided else None, mass, MASS)


def estimated_mass(flow: LearnedDensity) -> tuple[float, float, float]:
    """The integral of the density with its standard error, and how many draws it is worth.

    An importance estimate: draws come from normal laws around the flow's own samples, as wide as a
    kernel estimate would have them, which know nothing of the flow's log-determinant.  In many
    dimensions few of them land where the density is, and the estimate is worth few draws.
    Source: Owen 2013, chapter 9; width: Scott 1992, equation 6.42.
    """
    samples = flow.sample(CENTRES, seed=0)
    centres, dim = samples.double().cpu(), samples.shape[1]
    generator = torch.Generator().manual_seed(0)
    width = CENTRES ** (-1.0 / (dim + 4))
    ridge = 1e-6 * torch.diag(centres.var(0).clamp_min(1e-300))
    factor = torch.linalg.cholesky(torch.atleast_2d(torch.cov(centres.T)) + ridge) * width
    noise = torch.randn(DRAWS, dim, generator=generator, dtype=torch.float64)
    chosen = torch.randint(CENTRES, (DRAWS,), generator=generator)
    points = (centres[chosen] + noise @ factor.T).to(samples.dtype).double()
    white = torch.linalg.solve_triangular(factor, points.T, upper=False).T
    white_centres = torch.linalg.solve_triangular(factor, centres.T, upper=False).T
    squares = torch.cdist(white, white_centres).square()
    log_kernel = -0.5 * squares - 0.5 * dim * math.log(2 * math.pi)
    log_q = torch.logsumexp(log_kernel, 1) - math.log(CENTRES) - factor.diagonal().log().sum()
    weights = (flow.log_prob(points.to(samples)).cpu().double() - log_q).exp()
    mean, error = weights.mean(), weights.std() / DRAWS**0.5
    worth = weights.sum().square() / weights.square().sum().clamp_min(1e-300)
    return float(mean), float(error), float(worth)


def _jacobian(flow: Checkable, x: Tensor, context: Tensor | None) -> Finding:
    """log |det| of the first rows against slogdet of the map that the solver's steps make."""
    apart = []
    for i in range(min(JACOBIANS, len(x))):
        given = None if context is None else context[i]
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(
                lambda row, given=given: flow.encode(row, given), x[i]
            )
        with torch.no_grad():
            _, logdet = flow.encode(x[i], given, return_logdet=True)
        known = torch.linalg.slogdet(jacobian.double())[1]
        apart.append(float((known - logdet.double()).abs()))
    worst = max(apart)
    text = f"log-determinants within {worst:.1e} nats of slogdet, {len(apart)} rows"
    return Finding("determinant", text, worst <= WORST, worst, WORST)


def _neighbours(flow: Checkable, x: Tensor, context: Tensor | None, log_prob: Tensor) -> Finding:
    """Rows alone and in another order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    shuffled = flow.log_prob(x[order], None if context is None else context[order])
    alone = [
        flow.log_prob(x[i], None if context is None else context[i]) for i in range(min(8, len(x)))
    ]
    apart = torch.cat([shuffled - log_prob[order], torch.stack(alone) - log_prob[: len(alone)]])
    return _same("batch", apart, "between a row alone, shuffled and among others", flow)


def _modes(flow: Checkable, x: Tensor, context: Tensor | None) -> Finding:
    """The same rows in train() and in eval()."""
    values, module = [], cast(nn.Module, flow)
    for training in (True, False):
        with InMode(module, training):
            values.append(flow.log_prob(x, context))
    return _same("modes", values[0] - values[1], "between train() and eval()", flow)


def _same(name: str, apart: Tensor, where: str, flow: Checkable) -> Finding:
    worst, limit = float(apart.abs().nan_to_num(0.0).max()), SAME.get(flow.dtype, 1e-3)
    return Finding(name, f"{worst:.1e} nats at most {where}", worst <= limit, worst, limit)
