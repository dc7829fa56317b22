"""What a flow starts from: laws over vectors, fixed or learned with the flow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributions, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    constraints,
)

from cnf.error import InputError, whole_number
from cnf.flow.transform import standard_normal_log_prob


class LearnedBase(nn.Module):
    """A law over vectors of `dim` whose parameters are learned with the flow and stored with it.

    `distribution` makes torch's distribution of them; `settings` makes the module again.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = whole_number("dim", dim, 1)

    @property
    def distribution(self) -> Distribution:
        """The law with the parameters of now."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What the constructor was given."""
        return {"dim": self.dim}

    @property
    def has_rsample(self) -> bool:
        return self.distribution.has_rsample

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size([self.dim])

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of value (…, dim), of shape (…)."""
        return self.distribution.log_prob(value)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of shape (*sample_shape, dim), without gradients."""
        return self.distribution.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of shape (*sample_shape, dim), differentiable by the parameters."""
        return self.distribution.rsample(torch.Size(sample_shape))


class DiagonalGaussian(LearnedBase):
    """A normal law with a mean and a scale for each of `dim` columns, both learned.

    It starts as the standard normal.

    >>> DiagonalGaussian(2).log_prob(torch.zeros(2))  # −log 2π
    tensor(-1.8379, grad_fn=<SumBackward1>)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mean = nn.Parameter(torch.zeros(self.dim))
        self.log_scale = nn.Parameter(torch.zeros(self.dim))

    @property
    def distribution(self) -> Distribution:
        return Independent(Normal(self.mean, self.log_scale.exp(), validate_args=False), 1)


class StudentT(LearnedBase):
    """Student's t in each of `dim` columns, with degrees of freedom, mean and scale learned.

    df: where the degrees of freedom start, > 0; the smaller, the heavier the tails.  A flow with
    Lipschitz fields keeps the tails of its base, which a normal one has not.
    Source: Jaini et al. 2020.
    """

    def __init__(self, dim: int, df: float = 5.0) -> None:
        super().__init__(dim)
        if not 0 < df < math.inf:
            raise InputError(f"df must be a number > 0, got {df!r}")
        self.df = float(df)
        self.log_df = nn.Parameter(torch.full((self.dim,), math.log(df)))
        self.mean = nn.Parameter(torch.zeros(self.dim))
        self.log_scale = nn.Parameter(torch.zeros(self.dim))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "df": self.df}

    @property
    def distribution(self) -> Distribution:
        df, scale = self.log_df.exp(), self.log_scale.exp()
        columns = distributions.StudentT(df, self.mean, scale, validate_args=False)
        return Independent(columns, 1)


class GaussianMixture(LearnedBase):
    """A mixture of `components` normal laws with diagonal covariances, all of it learned.

    seed: of the means, which start spread like draws of the standard normal.  Which component a
    draw is of cannot be differentiated: `rsample` is not there, and draws carry the field's
    gradients alone.
    """

    def __init__(self, dim: int, components: int = 8, *, seed: int = 0) -> None:
        super().__init__(dim)
        self.components = whole_number("components", components, 1)
        self.seed = whole_number("seed", seed, 0)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(self.components, self.dim, generator=generator, device="cpu")
        self.mean = nn.Parameter(start.to(torch.get_default_dtype()))
        self.log_scale = nn.Parameter(torch.zeros(self.components, self.dim))
        self.logits = nn.Parameter(torch.zeros(self.components))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "components": self.components, "seed": self.seed}

    @property
    def distribution(self) -> Distribution:
        parts = Independent(Normal(self.mean, self.log_scale.exp(), validate_args=False), 1)
        weights = Categorical(logits=self.logits, validate_args=False)
        return MixtureSameFamily(weights, parts, validate_args=False)


LEARNED = {kind.__name__: kind for kind in (DiagonalGaussian, StudentT, GaussianMixture)}


def base_log_prob(base: Any, z: Tensor) -> Tensor:
    """Log-density of z (batch, dim) under a base, the standard normal for None; −∞ beyond its
    support.
    """
    if base is None or len(z) == 0:  # torch's Independent fails without rows
        return standard_normal_log_prob(z)
    if _is_everywhere(base):
        return base.log_prob(z)
    inside = base.support.check(z)
    if not inside.any():
        return z.new_full((len(z),), -torch.inf)
    log_prob = base.log_prob(z[inside])  # of the precision of both
    return log_prob.new_full((len(z),), -torch.inf).index_put((inside,), log_prob)


def _is_everywhere(base: Any) -> bool:
    """Whether a base's density is above 0 in all places, or it does not say where."""
    try:
        support = None if isinstance(base, LearnedBase) else base.support
    except NotImplementedError:
        support = None
    while (inner := getattr(support, "base_constraint", None)) is not None:
        support = inner
    return support is None or isinstance(support, type(constraints.real))


def drawn(base: Any, n: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """n draws of a base, (n, dim), with gradients where it has them; of a normal one for None."""
    if base is None:
        return torch.randn(n, dim, dtype=dtype).to(device)
    points = base.rsample((n,)) if base.has_rsample else base.sample((n,))
    return points.to(device, dtype)


def checked_base(base: Any, dim: int) -> Any:
    """The base as it is.  Raises InputError for what is no law over vectors of `dim`."""
    if base is None:
        return None
    if not isinstance(base, Distribution | LearnedBase):
        raise InputError(
            f"base must be a torch distribution, or one of {', '.join(LEARNED)}, got {base!r}"
        )
    if tuple(base.event_shape) != (dim,) or base.batch_shape:
        raise InputError(
            f"base must be one distribution over vectors of {dim}, event_shape ({dim},) and "
            f"batch_shape (), got {tuple(base.event_shape)} and {tuple(base.batch_shape)}; wrap it "
            "in torch.distributions.Independent"
        )
    return base
