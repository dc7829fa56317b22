"""A flow as torch's distributions and transforms know them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from cnf.flow.transform import Support


class Flowing(Protocol):
    """What is asked of a flow."""

    dim: int
    support: Support
    base: Any

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def log_prob(self) -> Any: ...
    @property
    def rsample(self) -> Any: ...
    @property
    def encode(self) -> Any: ...
    @property
    def decode(self) -> Any: ...


class FlowDistribution(Distribution):
    """A flow's law over vectors, given contexts of shape (*batch_shape, k) if it takes any.

    Parameters of the flow that change afterwards change this law too.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore

    def __init__(
        self,
        flow: Flowing,
        context: Tensor | None = None,
        *,
        batch_shape: torch.Size | None = None,
        guidance: float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.context, self.guidance = flow, context, guidance
        if batch_shape is None:
            batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size([flow.dim]), validate_args)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.flow.base is None or self.flow.base.has_rsample

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # pyright: ignore
        return constraint_of(self.flow.support, self.flow.dtype, self.flow.device)

    @property
    def transform(self) -> FlowTransform:
        """The map from the base's points to this law's, for a batch shape of ()."""
        return FlowTransform(self.flow, self.context, self.guidance)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same law in more places of a batch."""
        shape = torch.Size(batch_shape)
        context = self.context
        if context is not None:
            context = context.expand(*shape, context.shape[-1])
        return type(self)(
            self.flow,
            context,
            batch_shape=shape,
            guidance=self.guidance,
            validate_args=self._validate_args,
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape (*sample_shape, *batch_shape, dim), with gradients."""
        return self._draw(sample_shape)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities, (*sample_shape, *batch_shape), from one solve."""
        x, log_prob = self._draw(sample_shape, return_log_prob=True)
        return x, log_prob

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of value (…, dim) in nats; its leading shape and the batch's broadcast."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(*shape, self.flow.dim)
        return self.flow.log_prob(value, self.context, guidance=self.guidance)

    def _draw(self, sample_shape: Any, **settings: Any) -> Any:
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        context = self.context
        if context is not None:
            context = context.expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
        n = math.prod(shape)
        drawn = self.flow.rsample(n, context, guidance=self.guidance, **settings)
        if isinstance(drawn, tuple):
            return tuple(part.reshape(*shape, *part.shape[1:]) for part in drawn)
        return drawn.reshape(*shape, self.flow.dim)


class FlowTransform(Transform):
    """The map from the base's points to the data's, as a torch transform of vectors.

    `TransformedDistribution(base, flow.transform)` is the flow's law.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(
        self,
        flow: Flowing,
        context: Tensor | None = None,
        guidance: float | None = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size)
        self.flow, self.context, self.guidance = flow, context, guidance

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def codomain(self) -> constraints.Constraint:  # pyright: ignore
        return constraint_of(self.flow.support, self.flow.dtype, self.flow.device)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return FlowTransform(self.flow, self.context, self.guidance, cache_size)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy/dx|, where y is the data's point and x the base's."""
        return -self.flow.encode(y, self.context, guidance=self.guidance, return_logdet=True)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.decode(x, self.context, guidance=self.guidance)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.encode(y, self.context, guidance=self.guidance)


def constraint_of(
    support: Support, dtype: torch.dtype, device: torch.device
) -> constraints.Constraint:
    """torch's word for a support."""
    if support.is_everything:
        return constraints.real_vector

    def number(end: float) -> Tensor:
        return torch.tensor(end, dtype=dtype, device=device)

    def between(low: float, high: float) -> Any:
        if math.isinf(low):
            return constraints.real if math.isinf(high) else constraints.less_than(number(high))
        above = constraints.greater_than(number(low))
        return above if math.isinf(high) else constraints.interval(number(low), number(high))

    # one for each column: torch maps an interval that ends at infinity to no number
    columns = [between(*ends) for ends in zip(support.low, support.high, strict=True)]
    return constraints.independent(constraints.stack(columns, dim=-1), 1)
