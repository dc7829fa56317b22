"""The non-stiff problems of DETEST: classes A to E, each on 0 ≤ t ≤ 20.

Source: Hull, Enright, Fellen & Sedgwick 1972, Comparing numerical methods for ordinary differential
equations, SIAM J. Numer. Anal. 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

END = 20.0


class Initial(NamedTuple):
    """dy/dt = field(t, y), y(0) = y0, float64 of shape (parts,)."""

    field: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor


def problems() -> dict[str, Initial]:
    """The 25 problems by name."""
    scalar = {
        "A1": (lambda t, y: -y, 1.0),
        "A2": (lambda t, y: -(y**3) / 2, 1.0),
        "A3": (lambda t, y: y * torch.cos(t), 1.0),
        "A4": (lambda t, y: y / 4 * (1 - y / 20), 1.0),
        "A5": (lambda t, y: (y - t) / (y + t), 4.0),
    }
    found = {name: Initial(field, _vector(y0)) for name, (field, y0) in scalar.items()}
    found |= {
        "B1": Initial(_split(lambda t, a, b: (2 * (a - a * b), -(b - a * b))), _vector(1, 3)),
        "B2": Initial(_linear(_B2), _vector(2, 0, 1)),
        "B3": Initial(_split(lambda t, a, b, c: (-a, a - b**2, b**2)), _vector(1, 0, 0)),
        "B4": Initial(_split(_torus), _vector(3, 0, 0)),
        "B5": Initial(_split(lambda t, a, b, c: (b * c, -a * c, -0.51 * a * b)), _vector(0, 1, 1)),
        "C1": Initial(_linear(_chain([1.0] * 9)), _unit(10)),
        "C2": Initial(_linear(_chain([float(i) for i in range(1, 10)])), _unit(10)),
        "C3": Initial(_linear(_diffusion(10)), _unit(10)),
        "C4": Initial(_linear(_diffusion(51)), _unit(51)),
        "C5": Initial(_planets, torch.cat([_POSITIONS.flatten(), _VELOCITIES.flatten()])),
    }
    for i, eccentricity in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), start=1):
        speed = math.sqrt((1 + eccentricity) / (1 - eccentricity))
        found[f"D{i}"] = Initial(_split(_orbit), _vector(1 - eccentricity, 0, 0, speed))
    return found | {
        "E1": Initial(_split(_bessel), _vector(0.6713967071418030, 0.09540051444747446)),
        "E2": Initial(_split(lambda t, a, b: (b, (1 - a**2) * b - a)), _vector(2, 0)),
        "E3": Initial(
            _split(lambda t, a, b: (b, a**3 / 6 - a + 2 * torch.sin(2.78535 * t))), _vector(0, 0)
        ),
        "E4": Initial(_split(lambda t, a, b: (b, 0.032 - 0.4 * b**2)), _vector(30, 0)),
        "E5": Initial(_split(lambda t, a, b: (b, torch.sqrt(1 + b**2) / (25 - t))), _vector(0, 0)),
    }


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _unit(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[0]


def _split(field: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor, Tensor], Tensor]:
    """A field given part by part."""
    return lambda t, y: torch.stack(torch.broadcast_tensors(*field(t, *y.unbind())))


def _linear(matrix: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: matrix @ y


_B2 = torch.tensor([[-1.0, 1, 0], [1, -2, 1], [0, 1, -1]], dtype=torch.float64)


def _chain(rates: list[float]) -> Tensor:
    """Each part decays into the next; the last one stays."""
    loss = torch.diag(torch.tensor([*rates, 0.0], dtype=torch.float64))
    return torch.diag(torch.tensor(rates, dtype=torch.float64), -1) - loss


def _diffusion(size: int) -> Tensor:
    ones = torch.ones(size - 1, dtype=torch.float64)
    return torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(size, dtype=torch.float64)


def _torus(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    radius = torch.sqrt(a**2 + b**2)
    return -b - a * c / radius, a - b * c / radius, a / radius


def _orbit(t: Tensor, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    cube = (x**2 + y**2) ** 1.5
    return u, v, -x / cube, -y / cube


def _bessel(t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return b, -(b / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * a)


_GRAVITY, _SUN = 2.95912208286, 1.00000597682
_MASSES = _vector(
    9.54786104043e-4, 2.85583733151e-4, 4.37273164546e-5, 5.17759138449e-5, 2.77777777778e-6
)
_POSITIONS = torch.tensor(
    [
        [3.42947415189, 3.35386959711, 1.35494901715],
        [6.64145542550, 5.97156957878, 2.18231499728],
        [11.2630437207, 14.6952576794, 6.27960525067],
        [-30.1552268759, 1.65699966404, 1.43785752721],
        [-21.1238353380, 28.4465098142, 15.3882659679],
    ],
    dtype=torch.float64,
)
_VELOCITIES = torch.tensor(
    [
        [-0.557160570446, 0.505696783289, 0.230578543901],
        [-0.415570776342, 0.365682722812, 0.169143213293],
        [-0.325325669158, 0.189706021964, 0.0877265322780],
        [-0.0240476254170, -0.287659532608, -0.117219543175],
        [-0.176860753121, -0.216393453025, -0.0148647893090],
    ],
    dtype=torch.float64,
)


def _planets(t: Tensor, y: Tensor) -> Tensor:
    """The sun and its five outer planets, relative to the sun."""
    place, velocity = y[:15].reshape(5, 3), y[15:]
    pull = place / place.norm(dim=1, keepdim=True) ** 3
    apart = place[None] - place[:, None]
    distance = (apart.square().sum(-1) + torch.eye(5, dtype=y.dtype)).sqrt()
    between = (_MASSES[None, :, None] * (apart / distance[..., None] ** 3 - pull[None])).sum(1)
    own = _MASSES[:, None] * -pull  # k = j is no pair: take it out of the sum again
    force = -(_SUN + _MASSES)[:, None] * pull + between - own
    return torch.cat([velocity, _GRAVITY * force.flatten()])
