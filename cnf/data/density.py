"""Toy sets in the plane: samples, exact log-densities and entropies.

The laws are those of FFJORD's generators (Grathwohl et al. 2019, `lib/toy_data.py`), with every
point drawn independently, so that the law of a sample never depends on how many are drawn.
A model's test NLL cannot fall below the entropy: that is the floor to compare it with.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.utils.checkpoint import checkpoint

from cnf.error import InputError

_ROWS = 1024  # points whose log-density is computed at once: bounds the memory, fits the cache
_TURN = 2 * math.pi


def toy(name: str) -> Toy:
    """The toy set of that name, a torch distribution over the plane.

    name: one of TOY_NAMES.  Raises InputError for any other.

    >>> moons = toy("moons")
    >>> x = moons.sample((100,))
    >>> x.shape, moons.log_prob(x).shape
    (torch.Size([100, 2]), torch.Size([100]))
    >>> round(moons.entropy().item(), 3)
    2.394
    """
    if name not in TOY_NAMES:
        close = difflib.get_close_matches(str(name), TOY_NAMES, n=1, cutoff=0)[0]
        raise InputError(
            f"unknown toy set {name!r}; did you mean {close!r}? known: {', '.join(TOY_NAMES)}"
        )
    nats, law = _SETS[name]
    return law(name, nats)


class Toy(Distribution):
    """A law on the plane with known log-density and entropy; two verbs make a new one.

    `_draw(count)` gives float64 points (count, 2); `_log_density(x)` maps float64 points (n, 2)
    to nats (n,).  nats: the entropy.
    """

    # torch declares properties, and its own distributions put values in their place
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}  # pyright: ignore
    support = constraints.real_vector  # pyright: ignore
    has_rsample = False

    def __init__(self, name: str, nats: float, validate_args: bool | None = None) -> None:
        self.name = name
        self._nats = nats
        super().__init__(torch.Size(), torch.Size([2]), validate_args=validate_args)

    def __repr__(self) -> str:
        return f"toy({self.name!r})"

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Independent points, shape sample_shape + (2,), in torch's default dtype."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            x = self._draw(math.prod(shape[:-1]))
        return x.to(torch.get_default_dtype()).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape (...) for points (..., 2); value's dtype, float64 inside.

        Differentiable twice.  Raises InputError if value is no floating-point tensor of that
        shape or, with validate_args, contains NaN.
        """
        self._check(value)
        rows = value.reshape(-1, 2).double()
        if len(rows) <= _ROWS:
            log_p = self._log_density(rows) if len(rows) else rows.sum(-1)
        else:  # checkpoint: the graph of a million points would hold every node of every row
            chunks = rows.split(_ROWS)
            log_p = torch.cat([self._chunk_log_density(chunk) for chunk in chunks])
        return log_p.to(value.dtype).reshape(value.shape[:-1])

    def entropy(self) -> Tensor:
        """The entropy in nats, 0-d, correct to 1e-8 before it is rounded to the default dtype.

        Stored; found by the midpoint rule for -p log p on a grid over the plane, refined until
        the digits stood still; the tests repeat it to 1e-7.  Exact for checkerboard.
        """
        return torch.tensor(self._nats)

    def _chunk_log_density(self, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled() and rows.requires_grad:
            log_p = checkpoint(
                self._log_density, rows, use_reentrant=False, preserve_rng_state=False
            )
            assert isinstance(log_p, Tensor)
            return log_p
        return self._log_density(rows)

    def _check(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{self!r}.log_prob takes a floating-point tensor, not {kind}; "
                "convert with torch.as_tensor(x, dtype=torch.get_default_dtype())"
            )
        if value.shape[-1:] != self.event_shape:
            raise InputError(
                f"{self!r}.log_prob takes points of shape (..., 2), not {tuple(value.shape)}; "
                "put the two coordinates in the last dimension"
            )
        if self._validate_args and value.isnan().any():
            raise InputError(
                f"{self!r}.log_prob was given NaN; drop those points, or switch the check off "
                "with Distribution.set_default_validate_args(False) to get NaN back"
            )

    def _draw(self, count: int) -> Tensor:
        raise NotImplementedError

    def _log_density(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Noise(Protocol):
    """Independent noise in the plane: points (count, 2), and nats at an offset (dx, dy)."""

    def draw(self, count: int) -> Tensor: ...

    def log_density(self, dx: Tensor, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Gaussian:
    """N(0, sigma²) in each coordinate."""

    sigma: float

    def draw(self, count: int) -> Tensor:
        return self.sigma * torch.randn(count, 2, dtype=torch.float64)

    def log_density(self, dx: Tensor, dy: Tensor) -> Tensor:
        variance = self.sigma**2
        return -(dx * dx + dy * dy) / (2 * variance) - math.log(_TURN * variance)


@dataclass(frozen=True)
class BoxGaussian:
    """Uniform on [-half, half] plus N(0, sigma²), in each coordinate."""

    half: float
    sigma: float

    def draw(self, count: int) -> Tensor:
        box = 2 * torch.rand(count, 2, dtype=torch.float64) - 1
        return self.half * box + Gaussian(self.sigma).draw(count)

    def log_density(self, dx: Tensor, dy: Tensor) -> Tensor:
        quadratic_x, factor_x = self._split(dx)
        quadratic_y, factor_y = self._split(dy)
        return (factor_x * factor_y).log() - quadratic_x - quadratic_y

    def _split(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """(q, f) with density f e^{-q}: (erfc(near) - erfc(far)) / 4 half, free of underflow."""
        scale, distance = self.sigma * math.sqrt(2), offset.abs()
        near, far = (distance - self.half) / scale, (distance + self.half) / scale
        ratio = torch.exp(-2 * self.half / self.sigma**2 * distance)  # e^{near² - far²}
        factor = torch.special.erfcx(near) - ratio * torch.special.erfcx(far)
        return near * near, factor / (4 * self.half)


Curve = Callable[[Tensor, Tensor], Tensor]  # (arm, u in [0, 1]) → points (..., 2)


class Blurred(Toy):
    """Points curve(arm, u) plus noise; arm uniform on 0 … arms-1, u uniform on [0, 1].

    The density is a Gauss–Legendre sum over u, with `panels` panels of equal probability on each
    arm.  Measured error of the log-density: below 1e-11 for |x| ≤ 6, and far out, where the
    integrand is a spike narrower than the nodes' spacing, below 2e-5 of its value (|x| ≤ 100);
    8gaussians, whose curve is a point, is exact to rounding.
    nearest: how many nodes to keep for each point; None keeps all.
    """

    def __init__(
        self,
        name: str,
        nats: float,
        *,
        arms: int,
        curve: Curve,
        noise: Noise,
        panels: int,
        order: int = 64,
        nearest: int | None = None,
    ) -> None:
        super().__init__(name, nats)
        self._arms = arms
        self._curve = curve
        self._noise = noise
        self._nearest = nearest
        u, weights = _quadrature(panels, order)
        self._nodes = curve(torch.arange(arms).repeat_interleave(len(u)), u.repeat(arms))
        self._log_weights = (weights / arms).log().repeat(arms)

    def _draw(self, count: int) -> Tensor:
        arm = torch.randint(self._arms, (count,))
        u = torch.rand(count, dtype=torch.float64)
        return self._curve(arm, u) + self._noise.draw(count)

    def _log_density(self, x: Tensor) -> Tensor:
        nodes, log_weights = self._nodes.to(x.device), self._log_weights.to(x.device)
        dx = x[:, :1] - nodes[:, 0]  # (n, nodes)
        dy = x[:, 1:] - nodes[:, 1]
        if self._nearest is not None:
            distance = (dx * dx + dy * dy).detach()
            keep = distance.topk(self._nearest, largest=False, sorted=False).indices
            dx, dy, log_weights = dx.gather(1, keep), dy.gather(1, keep), log_weights[keep]
        return torch.logsumexp(log_weights + self._noise.log_density(dx, dy), -1)


def _quadrature(panels: int, order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (panels · order,) of the integral over u in [0, 1], float64.

    Gauss–Legendre in v = √u on panels of equal length in u: the spirals have a square root at 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.sqrt(np.linspace(0, 1, panels + 1))
    width = np.diff(edges)[:, None]
    v = edges[:-1, None] + width * (nodes + 1) / 2
    return torch.from_numpy((v * v).ravel()), torch.from_numpy((v * width * weights).ravel())


def _eight_points(arm: Tensor, u: Tensor) -> Tensor:
    """Eight points at equal angles on the circle of radius 4/1.414; u moves nothing."""
    angle = _TURN / 8 * (arm + 0 * u)
    return torch.stack([angle.cos(), angle.sin()], -1) * (4 / 1.414)


def _moons(arm: Tensor, u: Tensor) -> Tensor:
    """scikit-learn's make_moons, doubled and moved by (-1, -0.2): two half circles."""
    angle = math.pi * u
    side = 1 - 2 * arm  # the second moon is the first turned by half a turn about (.5, .25)
    moon = torch.stack([arm + side * angle.cos(), arm / 2 + side * angle.sin()], -1)
    return 2 * moon - moon.new_tensor([1, 0.2])


def _swissroll(arm: Tensor, u: Tensor) -> Tensor:
    """x and z of scikit-learn's make_swiss_roll, divided by 5: an Archimedean spiral."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([angle * angle.cos(), angle * angle.sin()], -1) / 5


def _spirals(arm: Tensor, u: Tensor) -> Tensor:
    """Two spirals of 540°; the shift by .25 is the mean of FFJORD's box [0, .5]²."""
    angle = 3 * math.pi * u.sqrt()
    spiral = torch.stack([0.25 - angle * angle.cos(), 0.25 + angle * angle.sin()], -1) / 3
    return (1 - 2 * arm)[:, None] * spiral


class Circles(Toy):
    """Circles about the origin, equally likely, plus N(0, sigma²): a Bessel function each.

    p(x) = mean over R of exp(-(|x| - R)²/2σ²) I₀ᵉ(|x| R/σ²) / 2πσ², exact to rounding.
    """

    def __init__(self, name: str, nats: float, *, radii: Sequence[float], sigma: float) -> None:
        super().__init__(name, nats)
        self._radii = torch.tensor(radii, dtype=torch.float64)
        self._sigma = sigma

    def _draw(self, count: int) -> Tensor:
        radius = self._radii[torch.randint(len(self._radii), (count,))]
        angle = _TURN * torch.rand(count, dtype=torch.float64)
        circle = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        return circle + Gaussian(self._sigma).draw(count)

    def _log_density(self, x: Tensor) -> Tensor:
        variance = self._sigma**2
        radii = self._radii.to(x.device)
        rho = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # its gradient at 0 is 0
        bessel = torch.special.i0e(rho * radii / variance).log()
        log_p = torch.logsumexp(bessel - (rho - radii) ** 2 / (2 * variance), -1)
        return log_p - math.log(_TURN * variance * len(radii))


class Checkerboard(Toy):
    """Uniform on the eight dark squares, of side 2, of the board [-4, 4]²; -inf elsewhere.

    Squares are closed: rounding a sample to float32 may put it on an edge, never beyond.
    """

    def _draw(self, count: int) -> Tensor:
        column = torch.randint(-2, 2, (count,))
        row = 2 * torch.randint(-1, 1, (count,)) + column % 2
        corner = torch.stack([column, row], -1)
        return 2 * (corner + torch.rand(count, 2, dtype=torch.float64))

    def _log_density(self, x: Tensor) -> Tensor:
        lower, upper = (x / 2).ceil() - 1, (x / 2).floor()  # squares of a point; differ on edges
        dark = torch.zeros_like(x[:, 0], dtype=torch.bool)
        for column in (lower[:, 0], upper[:, 0]):
            for row in (lower[:, 1], upper[:, 1]):
                on_board = (column >= -2) & (column < 2) & (row >= -2) & (row < 2)
                dark |= on_board & ((column + row) % 2 == 0)
        log_p = 0 * x.sum(-1) - math.log(32)  # hangs on x: the gradient is zero, not missing
        return log_p.masked_fill(~dark & ~x.isnan().any(-1), -math.inf)


class Pinwheel(Toy):
    """Five Gaussian arms wound about the origin.

    (r, s) ~ N(1, .3²) × N(0, .1²) is turned clockwise by e^r/4 + 2πk/5, k uniform on 0 … 4, and
    doubled.  In polar coordinates (ρ, φ) of (r, s), x/2 lies at radius ρ and at the angle
    θ = h(φ) - 2πk/5, h(φ) = φ - e^{ρ cos φ}/4.  Hence
        p(x) = 1/20 · Σ N(r; 1, .3²) N(s; 0, .1²) / |1 + s e^r/4|  over all h(φ) = θ + 2πj/5.
    Measured error of the log-density: below 1e-11, save near the caustics: the arms fold where
    s = -4 e^{-r}, and there, at 1e-8 of the peak and less, the true density has a 1/√distance
    singularity.  Beyond |x| = 16 (a probability of 1e-120) dozens of folds overlap and the
    density is averaged over the angle, which is right to about 1.5 nats in 300.
    """

    _SECTOR = _TURN / 5
    _RATE, _RADIAL, _TANGENTIAL = 0.25, 0.3, 0.1
    _FAR = 8.0  # ρ beyond which the angle is averaged
    _ROOTS = 64  # on each side of a fold's dip; at ρ = 8 the others are e^{-60} of the sum

    def _draw(self, count: int) -> Tensor:
        r, s = torch.randn(2, count, dtype=torch.float64)
        r, s = 1 + self._RADIAL * r, self._TANGENTIAL * s
        angle = self._RATE * r.exp() + self._SECTOR * torch.randint(5, (count,))
        return 2 * torch.stack(_turn(r, s, -angle), -1)

    def _log_density(self, x: Tensor) -> Tensor:
        y = x / 2
        rho = torch.linalg.vector_norm(y, dim=-1)
        near = rho < self._FAR
        # each branch is fed points that it can differentiate, chosen or not
        folded = self._log_folded(y.where(near[:, None], y.new_tensor([1.0, 0.0])))
        averaged = self._log_averaged(rho.where(~near, rho.new_tensor(self._FAR)))
        constant = math.log(4 * _TURN * self._RADIAL * self._TANGENTIAL)
        return folded.where(near, averaged) - constant

    def _log_folded(self, y: Tensor) -> Tensor:
        """log of 1/5 Σ e^{-energy} / |determinant| over the preimages of y, (n,)."""
        phi, arm, valid = self._preimages(y.detach())
        rho = torch.linalg.vector_norm(y.detach(), dim=-1)[:, None, None]
        r, s = rho * phi.cos(), rho * phi.sin()
        for _ in range(2):  # Newton, inside the graph: two steps carry two derivatives
            r, s = self._newton(r, s, arm, y)
        determinant = 1 + self._RATE * s * r.exp()
        log_p = -self._energy(r, s) - determinant.abs().log()
        return torch.logsumexp(log_p.masked_fill(~valid, -math.inf), (1, 2)) - math.log(5)

    def _log_averaged(self, rho: Tensor) -> Tensor:
        """log of 1/2π ∫ e^{-energy} dφ by Laplace's method, (n,); error below 1e-3."""
        across, along = self._TANGENTIAL**-2, self._RADIAL**-2
        curvature = rho**2 * (across - along) + rho * along  # of the energy, at φ = 0
        return -self._energy(rho, torch.zeros_like(rho)) - (_TURN * curvature).log() / 2

    def _energy(self, r: Tensor, s: Tensor) -> Tensor:
        return ((r - 1) / self._RADIAL) ** 2 / 2 + (s / self._TANGENTIAL) ** 2 / 2

    def _newton(self, r: Tensor, s: Tensor, arm: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(r, s) moved by one Newton step towards the preimage of y on that arm."""
        slope = self._RATE * r.exp()
        target = _turn(y[:, :1, None], y[:, 1:, None], slope + self._SECTOR * arm)
        step = (target[0] - r) / (1 + slope * s)
        return r + step, target[1] + slope * r * step

    @torch.no_grad()
    def _preimages(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Angles φ, arms j and which of them are real, each (n, 2, roots).

        h rises from its dip on both sides: forward to the next crest, backward to the last one.
        """
        rho = torch.linalg.vector_norm(y, dim=-1)[:, None, None]
        theta = torch.atan2(y[:, 1], y[:, 0])[:, None, None]
        crest, dip = self._fold(rho)
        height = self._wound(crest, rho)
        top = torch.cat([height + _TURN, height], 1)  # (n, 2, 1)
        reach = torch.cat([crest + _TURN - dip, dip - crest], 1)
        arm = self._arms_between(self._wound(dip, rho) - theta, top - theta)
        target = theta + self._SECTOR * arm  # (n, 1, roots)
        valid = target < top
        side = y.new_tensor([[1.0], [-1.0]])
        distance = _bisect(
            lambda distance: self._wound(dip + side * distance, rho) > target,
            torch.zeros_like(valid, dtype=y.dtype),
            reach.expand(valid.shape),
            steps=30,
        )
        # a place without a root gets a point where Newton stands still: no infinite gradients
        straight = (self._wound(torch.zeros_like(rho), rho) - theta) / self._SECTOR
        phi = torch.where(valid, dip + side * distance, 0.0)
        return phi, torch.where(valid, arm, straight), valid

    def _arms_between(self, low: Tensor, high: Tensor) -> Tensor:
        """Consecutive j from 2πj/5 ≥ low up to the largest below high, or _ROOTS of them."""
        first = torch.ceil(low / self._SECTOR)
        count = int((torch.ceil(high / self._SECTOR) - first).max())
        return first + torch.arange(min(max(count, 1), self._ROOTS), device=low.device)

    def _wound(self, phi: Tensor, rho: Tensor) -> Tensor:
        """h(φ), the angle after winding."""
        return phi - self._RATE * torch.exp(rho * phi.cos())

    def _fold(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """(crest, dip), crest ≤ dip in [-π, 0]: h falls between them; equal if h never falls."""

        def rises(phi: Tensor) -> Tensor:
            return self._RATE * rho * phi.sin() * torch.exp(rho * phi.cos()) > -1

        steepest = -torch.acos(2 * rho / (1 + torch.sqrt(1 + 4 * rho**2)))  # h' is least there
        crest = _bisect(lambda phi: ~rises(phi), torch.full_like(rho, -math.pi), steepest, 52)
        dip = _bisect(rises, steepest, torch.zeros_like(rho), 52)
        return crest, dip


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) turned counterclockwise by the angle."""
    cos, sin = angle.cos(), angle.sin()
    return cos * x - sin * y, sin * x + cos * y


def _bisect(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Where `above` turns from false to true, to 2^-steps of the interval [low, high]."""
    for _ in range(steps):
        middle = (low + high) / 2
        passed = above(middle)
        low, high = torch.where(passed, low, middle), torch.where(passed, middle, high)
    return (low + high) / 2


Law = Callable[[str, float], Toy]  # (name, entropy) → the law

_EIGHT = partial(
    Blurred, arms=8, curve=_eight_points, noise=Gaussian(0.5 / 1.414), panels=1, order=1
)
_MOONS = partial(Blurred, arms=2, curve=_moons, noise=Gaussian(0.2), panels=3)
_ROLL = partial(Blurred, arms=1, curve=_swissroll, noise=Gaussian(0.2), panels=6)
_SPIRALS = partial(
    Blurred, arms=2, curve=_spirals, noise=BoxGaussian(1 / 12, 0.1), panels=7, nearest=192
)
_SETS: dict[str, tuple[float, Law]] = {  # name: (entropy in nats, law)
    "8gaussians": (2.83188040614, _EIGHT),
    "checkerboard": (math.log(32), Checkerboard),
    "moons": (2.39387919597, _MOONS),
    "circles": (3.26813571171, partial(Circles, radii=(1.5, 3.0), sigma=0.24)),
    "rings": (2.62318277030, partial(Circles, radii=(0.75, 1.5, 2.25, 3.0), sigma=0.08)),
    "swissroll": (2.66964617388, _ROLL),
    "2spirals": (2.64545028360, _SPIRALS),
    "pinwheel": (2.31778803, Pinwheel),
}
TOY_NAMES: tuple[str, ...] = tuple(_SETS)
