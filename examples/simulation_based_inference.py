"""Learn a posterior from simulations alone, and hold it against the exact one.

    python examples/simulation_based_inference.py               # a minute and a half
    python examples/simulation_based_inference.py --quick       # some seconds
    python examples/simulation_based_inference.py --sign-lost   # a posterior of two modes

Two parameters θ with a correlated normal prior are measured three times, x = Aθ + noise; with
--sign-lost the measurement does not tell Aθ from −Aθ.  A flow conditional on x is fitted to
simulated pairs (θ, x).  Prints how the truths rank among its draws, how often its credible regions
hold the truth, both with what chance does to them, and its distance to the exact posterior in nats.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import cnf
from cnf.flow.calibration import Calibration, ranked
from cnf.plot import calibration_figure, save_figure

PRIOR = MultivariateNormal(torch.tensor([0.6, -0.4]), torch.tensor([[1.0, 0.7], [0.7, 1.0]]))
DESIGN = torch.tensor([[1.0, 0.0], [0.5, 0.5], [-0.4, 1.2]])
NOISE = 0.5


class Measurement:
    """x = g Aθ + noise, of shape (…, 3), with g one of `gains`; and the exact law of θ given x.

    Given g the model is linear and Gaussian, and so is the posterior; without g it is the mixture
    of these, each weighted by how likely it makes x.
    Source: Bishop 2006, equations 2.113 to 2.117.
    """

    def __init__(self, gains: tuple[float, ...] = (1.0,)) -> None:
        self.gains = torch.tensor(gains)

    def simulate(self, n: int) -> tuple[Tensor, Tensor]:
        """n pairs θ (n, 2) and x (n, 3)."""
        theta = PRIOR.sample((n,))
        gain = self.gains[torch.randint(len(self.gains), (n, 1))]
        return theta, gain * theta @ DESIGN.T + NOISE * torch.randn(n, 3)

    def posterior(self, x: Tensor) -> MixtureSameFamily:
        """The law of θ for each row of x (…, 3)."""
        design = self.gains[:, None, None] * DESIGN  # (gains, 3, 2)
        mean, covariance = PRIOR.mean, PRIOR.covariance_matrix
        precision = PRIOR.precision_matrix + design.mT @ design / NOISE**2
        pulled = torch.einsum("gij,...i->...gj", design, x) / NOISE**2
        pulled = pulled + PRIOR.precision_matrix @ mean
        centre = torch.linalg.solve(precision, pulled.unsqueeze(-1)).squeeze(-1)
        spread = design @ covariance @ design.mT + NOISE**2 * torch.eye(3)
        evidence = MultivariateNormal(design @ mean, spread).log_prob(x.unsqueeze(-2))
        parts = MultivariateNormal(centre, precision_matrix=precision)
        return MixtureSameFamily(Categorical(logits=evidence), parts)

    # what `ranked` asks of a density, so that the exact posterior can be ranked too

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        return self.posterior(x).log_prob(theta)

    def sample(
        self, n: int, x: Tensor, *, return_log_prob: bool, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """n draws, one for each of x's n rows, with their log-densities."""
        torch.manual_seed(0 if seed is None else seed)
        law = self.posterior(x)
        theta = law.sample()
        return theta, law.log_prob(theta)


class Inference(NamedTuple):
    """A fitted posterior, its calibration and that of the exact one on the same truths, and the
    paired gap to it: mean and standard error of log p(θ|x) − log q(θ|x), nats.
    """

    flow: cnf.Flow
    calibration: Calibration
    exact: Calibration
    gap: float
    gap_error: float


def infer(
    model: Measurement, flow: cnf.Flow, *, pairs: int, truths: int, seed: int = 0, **budget: float
) -> Inference:
    """The flow fitted to simulated pairs and judged on truths that it has not seen.

    budget: seconds= or steps=, as for `Flow.fit`.
    """
    torch.manual_seed(seed)
    theta, x = model.simulate(pairs)
    flow.fit(theta, x, seed=seed, **budget)
    fresh, measured = model.simulate(truths)
    with torch.no_grad():
        apart = model.log_prob(fresh, measured) - flow.log_prob(fresh, measured)
    return Inference(
        flow,
        ranked(flow, fresh, measured, seed=seed),
        ranked(model, fresh, measured, seed=seed),
        apart.mean().item(),
        apart.std().item() / truths**0.5,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn a posterior from simulations.")
    parser.add_argument("--sign-lost", action="store_true", help="two modes")
    parser.add_argument("--quick", action="store_true", help="a small flow, fewer truths")
    parser.add_argument("--seconds", type=float, default=60.0, help="of fitting")
    parser.add_argument("--truths", type=int, default=2000, help="that are ranked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="calibration.png", help="where to draw")
    arguments = parser.parse_args()

    model = Measurement((1.0, -1.0) if arguments.sign_lost else (1.0,))
    size = {"hidden": (64, 64), "bandwidth": None} if arguments.quick else {}
    found = infer(
        model,
        cnf.Flow(2, context=3, seed=arguments.seed, **size),
        pairs=20_000 if arguments.quick else 200_000,
        truths=400 if arguments.quick else arguments.truths,
        seed=arguments.seed,
        seconds=6.0 if arguments.quick else arguments.seconds,
    )
    print(f"THE FLOW\n{found.calibration}\n\nTHE EXACT POSTERIOR\n{found.exact}\n")
    print(f"gap to the exact posterior {found.gap:.4f} ± {found.gap_error:.4f} nats, paired")
    ranks = found.calibration
    figure = calibration_figure(
        ranks.ranks, ranks.density_ranks, ranks.draws, ["θ₁", "θ₂"], ranks.bins
    )
    print(f"drawn in {save_figure(figure, arguments.out)}")


if __name__ == "__main__":
    main()
