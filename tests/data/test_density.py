"""Every toy set is one law: its samples, its density, its entropy and FFJORD's generator agree."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.data.density import TOY_NAMES, toy
from cnf.error import InputError

REFERENCE = {  # shared/reference/flows.md, section 2: nats, ±0.002
    "8gaussians": 2.832,
    "checkerboard": math.log(32),
    "moons": 2.394,
    "circles": 3.268,
    "rings": 2.623,
    "swissroll": 2.670,
    "2spirals": 2.646,
    "pinwheel": 2.318,
}
HALF, BINS, FINE = 6.0, 30, 10  # the board [-6, 6]²: bins for counting, each of 10 × 10 cells
CELL = 2 * HALF / (BINS * FINE)  # .04, which divides the checkerboard's squares

every_set = pytest.mark.parametrize("name", TOY_NAMES)
smooth_sets = pytest.mark.parametrize("name", [n for n in TOY_NAMES if n != "checkerboard"])


@cache
def log_density_on_the_board(name: str) -> Tensor:
    """Log-density in the middles of the cells, (300, 300), float64."""
    middle = (torch.arange(BINS * FINE, dtype=torch.float64) + 0.5) * CELL - HALF
    points = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), -1)
    return toy(name).log_prob(points)


def chi_square_p_value(name: str, points: np.ndarray) -> float:
    """How likely a draw from the density fits it worse than these points (n, 2) do."""
    mass = log_density_on_the_board(name).exp() * CELL**2
    expected = mass.reshape(BINS, FINE, BINS, FINE).sum((1, 3)).numpy() * len(points)
    edges = np.linspace(-HALF, HALF, BINS + 1)
    counts = np.histogram2d(*points.T, bins=(edges, edges))[0]
    full = expected >= 10  # the other bins are pooled with all that lies off the board
    expected = np.append(expected[full], max(len(points) - expected[full].sum(), 1e-9))
    counts = np.append(counts[full], len(points) - counts[full].sum())
    if expected[-1] < 1:  # hardly anything is left: nothing to compare
        assert counts[-1] <= 10
        expected, counts = expected[:-1], counts[:-1]
    return float(scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1))


# ---- the density


@every_set
def test_density_integrates_to_one(name):
    mass = log_density_on_the_board(name).exp().sum() * CELL**2
    assert mass.item() == pytest.approx(1, abs=1e-8)


def mixture(
    points: np.ndarray, centres: np.ndarray, kernel: Callable, weights: np.ndarray
) -> np.ndarray:
    """log of the weighted mean of the kernel about the centres (m, 2), at points (n, 2)."""
    return np.array([scipy.special.logsumexp(kernel(p - centres), b=weights) for p in points])


def gaussian(sigma: float) -> Callable:
    return lambda offset: scipy.stats.norm.logpdf(offset, scale=sigma).sum(-1)


def boxed_gaussian(width: float, sigma: float) -> Callable:
    """A uniform variable on [0, width] plus N(0, sigma²), in each coordinate."""

    def one(offset: np.ndarray) -> np.ndarray:
        centred = np.abs(offset - width / 2)  # the left tail keeps its digits
        high, low = width / 2 - centred, -width / 2 - centred
        above, below = scipy.special.log_ndtr(high / sigma), scipy.special.log_ndtr(low / sigma)
        return above + np.log1p(-np.exp(below - above)) - math.log(width)

    return lambda offset: one(offset).sum(-1)


MANY = np.linspace(0, 1, 40_001)
SIMPSON = np.array([1, *[4, 2] * 19_999, 4, 1]) / 120_000  # the weights of Simpson's rule


def circle(radius: float, turns: np.ndarray = MANY) -> np.ndarray:
    return radius * np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], -1)


def plain_circles(x: np.ndarray, radii: tuple[float, ...], sigma: float) -> np.ndarray:
    points = np.concatenate([circle(radius) for radius in radii])
    return mixture(x, points, gaussian(sigma), np.tile(SIMPSON / len(radii), len(radii)))


def plain_moons(x: np.ndarray) -> np.ndarray:
    outer = circle(1, MANY / 2)
    moons = np.concatenate([outer, np.array([1, 0.5]) - outer]) * 2 + [-1, -0.2]
    return mixture(x, moons, gaussian(0.2), np.tile(SIMPSON / 2, 2))


def plain_swissroll(x: np.ndarray) -> np.ndarray:
    t = 1.5 * np.pi * (1 + 2 * MANY)
    return mixture(x, np.stack([t * np.cos(t), t * np.sin(t)], -1) / 5, gaussian(0.2), SIMPSON)


def plain_spirals(x: np.ndarray) -> np.ndarray:
    n = 3 * np.pi * MANY  # u = (n/3π)², so that du = 2 MANY dMANY
    spiral = np.stack([-np.cos(n) * n, np.sin(n) * n], -1) / 3
    weights = 2 * MANY * SIMPSON
    arms = [mixture(s * x, spiral, boxed_gaussian(0.5 / 3, 0.1), weights) for s in (1, -1)]
    return np.logaddexp(*arms) - math.log(2)


def plain_pinwheel(x: np.ndarray) -> np.ndarray:
    """Change of variables, the preimages found by looking along the circle through each point."""
    phi = np.linspace(-np.pi, np.pi, 2_000_001)
    return np.array([one_pinwheel(np.hypot(*p) / 2, np.arctan2(p[1], p[0]), phi) for p in x])


def one_pinwheel(rho: float, theta: float, phi: np.ndarray) -> Any:
    winding = (phi - 0.25 * np.exp(rho * np.cos(phi)) - theta) / (2 * np.pi / 5)
    at = np.flatnonzero(np.diff(np.floor(winding)))
    whole = np.maximum(np.floor(winding[at]), np.floor(winding[at + 1]))
    angle = phi[at] + (whole - winding[at]) / np.diff(winding)[at] * (phi[1] - phi[0])
    r, s = rho * np.cos(angle), rho * np.sin(angle)
    log_p = scipy.stats.norm.logpdf(r, 1, 0.3) + scipy.stats.norm.logpdf(s, 0, 0.1)
    volume = 20 * np.abs(1 + 0.25 * np.exp(r) * s)
    return scipy.special.logsumexp(log_p - np.log(volume))


EIGHT = circle(4 / 1.414, np.arange(8) / 8)
PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "8gaussians": lambda x: mixture(x, EIGHT, gaussian(0.5 / 1.414), np.full(8, 1 / 8)),
    "moons": plain_moons,
    "circles": lambda x: plain_circles(x, (1.5, 3), 0.24),
    "rings": lambda x: plain_circles(x, (0.75, 1.5, 2.25, 3), 0.08),
    "swissroll": plain_swissroll,
    "2spirals": plain_spirals,
    "pinwheel": plain_pinwheel,
}


@smooth_sets
@pytest.mark.parametrize("reach, points, rtol", [(4.0, 20, 1e-8), (11.0, 8, 1e-6)])
def test_density_is_a_plain_sum_over_the_law(name, reach, points, rtol):
    x = np.random.default_rng(0).uniform(-reach, reach, (points, 2))
    found = toy(name).log_prob(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, PLAIN[name](x), rtol=rtol, atol=1e-8)


@smooth_sets
def test_density_is_finite_far_out(name):
    x = torch.tensor([[15.9, 0.0], [16.1, 0.0], [-40, 30], [1e4, 1e4], [-1e12, 0], [0, 0]])
    x.requires_grad_()
    log_p = toy(name).log_prob(x.double())
    (slope,) = torch.autograd.grad(log_p.sum(), x)
    assert log_p.isfinite().all() and slope.isfinite().all()
    assert (log_p[:-2].diff() < 0).all()


def test_checkerboard_is_flat_on_closed_squares_and_nothing_beyond():
    x = torch.tensor([[1, 1], [0, 0], [4, 3], [4, 2], [-4, -4], [4, 1], [1, 3], [9, 1], [-5, -5]])
    flat = -math.log(32)
    expected = [flat, flat, flat, flat, flat, -math.inf, -math.inf, -math.inf, -math.inf]
    torch.testing.assert_close(toy("checkerboard").log_prob(x.float()), torch.tensor(expected))


# ---- the entropy


@every_set
def test_entropy_is_the_reference_s(name):
    assert toy(name).entropy().item() == pytest.approx(REFERENCE[name], abs=0.002)


@every_set
def test_entropy_is_a_sum_over_the_board(name):
    log_p = log_density_on_the_board(name)
    summed = -(log_p.exp() * log_p.clamp(min=-1e3)).sum() * CELL**2
    assert toy(name)._nats == pytest.approx(summed.item(), abs=1e-7)


@every_set
def test_entropy_is_the_mean_of_minus_log_prob_over_samples(name):
    torch.manual_seed(1)
    p = toy(name)
    surprise = -p.log_prob(p.sample((100_000,)).double())
    error = surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - p.entropy()) <= 4 * error + 1e-6


# ---- the samples


@every_set
def test_samples_follow_the_density(name):
    torch.manual_seed(2)
    assert chi_square_p_value(name, toy(name).sample((100_000,)).double().numpy()) > 1e-3


@every_set
def test_samples_in_small_batches_follow_the_density(name):
    torch.manual_seed(3)
    p = toy(name)
    batches = torch.cat([p.sample((3,)) for _ in range(3000)])
    assert chi_square_p_value(name, batches.double().numpy()) > 1e-3


@every_set
def test_points_of_a_batch_know_nothing_of_each_other(name):
    """A generator that shares out arms or lays angles on a lattice fails here."""
    torch.manual_seed(4)
    p = toy(name)
    pairs = torch.stack([p.sample((2,)) for _ in range(2500)])  # (batches, 2, 2)
    angle = torch.atan2(pairs[..., 1], pairs[..., 0])
    statistics = torch.cat([pairs, pairs.square(), angle.cos()[..., None]], -1).numpy()
    for first, second in zip(statistics[:, 0].T, statistics[:, 1].T, strict=True):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(pairs))


def ffjord(name: str, n: int, rng: np.random.RandomState) -> np.ndarray:
    """FFJORD's generators (`lib/toy_data.py`), the angles of the circles drawn independently."""
    if name in ("moons", "circles", "swissroll"):
        return ffjord_from_sklearn(name, n, rng)
    if name == "8gaussians":
        corner = math.sqrt(0.5)
        axes = [(1, 0), (-1, 0), (0, 1), (0, -1)]
        corners = [(a * corner, b * corner) for a in (1, -1) for b in (1, -1)]
        return (
            rng.randn(n, 2) * 0.5 + 4 * np.array(axes + corners)[rng.randint(8, size=n)]
        ) / 1.414
    if name == "checkerboard":
        x = rng.rand(n) * 4 - 2
        y = rng.rand(n) - rng.randint(0, 2, n) * 2 + np.floor(x) % 2
        return np.stack([x, y], 1) * 2
    if name == "rings":
        angle, radius = (
            2 * np.pi * rng.rand(n),
            np.array([0.25, 0.5, 0.75, 1])[rng.randint(4, size=n)],
        )
        return 3 * circle(1, angle / (2 * np.pi)) * radius[:, None] + rng.normal(
            scale=0.08, size=(n, 2)
        )
    if name == "2spirals":
        t = np.sqrt(rng.rand(n // 2, 1)) * 540 * (2 * np.pi) / 360
        x = -np.cos(t) * t + rng.rand(n // 2, 1) * 0.5
        y = np.sin(t) * t + rng.rand(n // 2, 1) * 0.5
        arms = np.vstack([np.hstack([x, y]), np.hstack([-x, -y])]) / 3
        return arms + rng.randn(*arms.shape) * 0.1
    assert name == "pinwheel"
    features = rng.randn(n, 2) * np.array([0.3, 0.1]) + np.array([1, 0])
    angle = 2 * np.pi / 5 * rng.randint(5, size=n) + 0.25 * np.exp(features[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.einsum("ti,ijt->tj", features, np.array([[cos, -sin], [sin, cos]]))


def ffjord_from_sklearn(name: str, n: int, rng: np.random.RandomState) -> np.ndarray:
    datasets = pytest.importorskip("sklearn.datasets")
    if name == "moons":
        moons = datasets.make_moons(n_samples=n, noise=0.1, random_state=rng)[0]
        return moons * 2 + np.array([-1, -0.2])
    if name == "circles":
        return 3 * datasets.make_circles(n_samples=n, factor=0.5, noise=0.08, random_state=rng)[0]
    return datasets.make_swiss_roll(n_samples=n, noise=1.0, random_state=rng)[0][:, [0, 2]] / 5


@every_set
def test_the_law_is_ffjord_s(name):
    points = ffjord(name, 100_000, np.random.RandomState(5))
    assert chi_square_p_value(name, points) > 1e-3


@every_set
def test_samples_never_fall_where_the_density_is_zero(name):
    torch.manual_seed(6)
    p = toy(name)
    assert p.log_prob(p.sample((5000,))).isfinite().all()


# ---- the contract of a torch distribution


@every_set
def test_shapes_and_dtypes_are_kept(name):
    p = toy(name)
    assert isinstance(p, Distribution)
    assert (p.batch_shape, p.event_shape, p.has_rsample) == ((), (2,), False)
    assert p.entropy().shape == ()
    for shape in [(), (7,), (0,), (3, 1, 2), (0, 4)]:
        x = p.sample(shape)
        assert x.shape == (*shape, 2) and x.dtype == torch.get_default_dtype()
        assert not x.requires_grad
        assert p.log_prob(x).shape == shape and p.log_prob(x).dtype == x.dtype
        assert p.log_prob(x.double()).dtype == torch.float64
        torch.testing.assert_close(p.log_prob(x).double(), p.log_prob(x.double()))


@every_set
def test_the_global_seed_governs_the_samples(name):
    torch.manual_seed(7)
    first = toy(name).sample((5,))
    torch.manual_seed(7)
    assert torch.equal(first, toy(name).sample((5,)))


@every_set
def test_a_point_s_density_and_gradient_do_not_depend_on_its_batch(name):
    torch.manual_seed(8)
    p = toy(name)
    x = p.sample((2500,)).double().requires_grad_()  # more than one chunk of rows
    some = x[::500]
    torch.testing.assert_close(p.log_prob(x)[::500], p.log_prob(some), rtol=1e-12, atol=1e-12)
    (whole,) = torch.autograd.grad(p.log_prob(x).sum(), x)
    (part,) = torch.autograd.grad(p.log_prob(some).sum(), x)
    torch.testing.assert_close(whole[::500], part[::500], rtol=1e-9, atol=1e-9)


@every_set
def test_log_prob_is_differentiable_twice(name):
    torch.manual_seed(9)
    p = toy(name)
    x = p.sample((3,)).double().requires_grad_()
    assert torch.autograd.gradcheck(p.log_prob, x)
    assert torch.autograd.gradgradcheck(p.log_prob, x, atol=1e-4)


@every_set
def test_what_is_no_point_is_refused_in_a_sentence(name):
    p = toy(name)
    for wrong in [torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 1)]:
        with pytest.raises(InputError, match=r"points of shape \(\.\.\., 2\), not \("):
            p.log_prob(wrong)
    with pytest.raises(InputError, match=r"not torch\.int64"):
        p.log_prob(torch.tensor([1, 2]))
    with pytest.raises(InputError, match="not ndarray"):
        p.log_prob(np.zeros(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="NaN"):
        p.log_prob(torch.tensor([[0.0, 0.0], [0.0, math.nan]]))


@every_set
def test_without_validation_nan_stays_nan(name):
    p = toy(name)
    p._validate_args = False
    log_p = p.log_prob(torch.tensor([[1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0]]))
    assert log_p[0].isfinite() and log_p[1].isnan() and log_p[2] == -math.inf


# ---- the front door


def test_an_unknown_name_is_refused_with_the_known_ones_and_the_closest():
    with pytest.raises(InputError, match="unknown toy set 'moon'; did you mean 'moons'") as refusal:
        toy("moon")
    assert all(name in str(refusal.value) for name in TOY_NAMES)


def test_the_names_are_those_of_the_reference():
    assert tuple(REFERENCE) == TOY_NAMES
    assert [repr(toy(name)) for name in TOY_NAMES] == [f"toy({name!r})" for name in TOY_NAMES]


def test_the_package_offers_the_names_without_loading_torch():
    code = (
        "import sys, cnf.data; assert {'toy', 'TOY_NAMES'} <= set(dir(cnf.data));"
        "assert 'torch' not in sys.modules; cnf.data.toy; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
