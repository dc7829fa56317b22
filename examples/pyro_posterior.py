"""Variational inference in Pyro with a flow as the guide, where the answer is known.

    python examples/pyro_posterior.py        # needs pyro-ppl; about a minute

A linear regression with a normal prior has a normal posterior.  Its two weights are correlated,
which a guide of independent normals cannot say; the flow's draws are compared with the formula.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import cnf

NOISE = 0.5  # standard deviation of an observation


def regression() -> tuple[Tensor, Tensor]:
    """Predictors, (12, 2), that resemble each other, and observations, (12,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator)
    x[:, 1] = 0.8 * x[:, 0] + 0.4 * x[:, 1]
    noise = NOISE * torch.randn(12, generator=generator)
    return x, x @ torch.tensor([1.0, -0.5]) + noise


def exact_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights, whose prior is standard normal."""
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / NOISE**2)
    return covariance @ x.T @ y / NOISE**2, covariance


def fitted_guide(x: Tensor, y: Tensor, steps: int) -> cnf.Flow:
    """A flow over the weights, fitted by stochastic variational inference."""
    pyro.clear_param_store()  # of an earlier flow of that name
    pyro.set_rng_seed(0)
    flow = cnf.Flow(2, hidden=(32,), seed=0)

    def model() -> None:
        weights = pyro.sample("weights", dist.Normal(0, 1).expand([2]).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((weights * x).sum(-1), NOISE), obs=y)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("weights", flow.dist())

    elbo = pyro.infer.Trace_ELBO(32, max_plate_nesting=1, vectorize_particles=True)
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.02 ** (1 / steps)})
    svi = pyro.infer.SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()
    return flow


def main() -> None:
    x, y = regression()
    mean, covariance = exact_posterior(x, y)
    draws = fitted_guide(x, y, steps=500).sample(10_000, seed=1)
    print("mean        ", mean.tolist(), "exactly,", draws.mean(0).tolist(), "by the flow")
    print("covariance  ", covariance.tolist(), "exactly,", torch.cov(draws.T).tolist())


if __name__ == "__main__":
    main()
