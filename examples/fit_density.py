"""Fit a density to toy data: with the library's training loop, or with one's own.

    python examples/fit_density.py                       # two moons, about a minute
    python examples/fit_density.py checkerboard --seconds 30
    python examples/fit_density.py moons --own-loop      # the same in plain PyTorch

Prints the held-out negative log-likelihood beside the entropy, below which it cannot fall, and
draws data, density and samples side by side.
"""

from __future__ import annotations

import argparse
import time

import torch

import cnf
from cnf.flow.report import grid_log_prob
from cnf.plot import density_figure, save_figure


def fit_with_the_library(x: torch.Tensor, seconds: float) -> cnf.Flow:
    return cnf.Flow(2, seed=0).fit(x, seconds=seconds, seed=0)


def fit_with_own_loop(x: torch.Tensor, seconds: float) -> cnf.Flow:
    """Flow matching for most of the time, maximum likelihood at the end: an ordinary loop."""
    torch.manual_seed(0)
    flow = cnf.Flow(2, seed=0).whiten(x)
    for loss, share, lr in (
        (cnf.FlowMatching(flow), 0.8, 3e-3),
        (cnf.MaximumLikelihood(flow), 0.2, 3e-4),
    ):
        optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
        start, elapsed = time.perf_counter(), 0.0
        while elapsed < share * seconds:
            elapsed = time.perf_counter() - start
            for group in optimizer.param_groups:
                group["lr"] = lr * max(0.0, 1 - elapsed / (share * seconds))
            batch = x[torch.randint(len(x), (1024,))]
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
    return flow


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a density to toy data.")
    parser.add_argument("name", nargs="?", default="moons", choices=cnf.data.TOY_NAMES)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--rows", type=int, default=100_000, help="training rows")
    parser.add_argument("--own-loop", action="store_true", help="train in plain PyTorch")
    parser.add_argument("--out", default="density.png", help="where to draw")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    law = cnf.data.toy(arguments.name)
    x = law.sample((arguments.rows,))
    fit = fit_with_own_loop if arguments.own_loop else fit_with_the_library
    flow = fit(x, arguments.seconds)

    fresh = law.sample((10_000,))
    with torch.no_grad():
        log_prob = flow.log_prob(fresh)
    gap = law.log_prob(fresh) - log_prob
    print(f"held-out NLL {-log_prob.mean():.4f} nats, entropy {law.entropy():.4f}")
    print(f"gap {gap.mean():.4f} ± {gap.std() / len(gap) ** 0.5:.4f} nats")

    low, high = fresh.min(0).values.tolist(), fresh.max(0).values.tolist()
    grid, extent = grid_log_prob(flow, (low[0] - 0.5, high[0] + 0.5, low[1] - 0.5, high[1] + 0.5))
    figure = density_figure(
        fresh.numpy(), grid, extent, flow.sample(10_000, seed=0).numpy(), arguments.name
    )
    save_figure(figure, arguments.out)
    print(f"drawn in {arguments.out}")


if __name__ == "__main__":
    main()
