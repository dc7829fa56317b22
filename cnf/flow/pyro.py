"""A flow's law as Pyro knows distributions."""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin

from cnf.flow.distribution import FlowDistribution


class PyroFlowDistribution(FlowDistribution, TorchDistributionMixin):  # pyright: ignore
    """A flow's law that `pyro.sample` takes: as a guide, as a prior and as a likelihood.

    `Flow.dist` gives one where Pyro has been imported.
    """

    expand = FlowDistribution.expand  # of its own class, not one of Pyro's around it
