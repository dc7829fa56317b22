"""A training step, and log-densities, by one process and by several, a thread each.

    python benchmarks/processes.py [--processes 2] [--rounds 30] [--quick]

The total batch is the same: several processes share it.  The flow has the default net and takes 8
steps of rk4, 32 evaluations of its field, exact trace.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from timing import machine

import cnf
from cnf.training.batches import Shuffled
from cnf.training.loop import Best, Plan, Training
from cnf.training.ranks import current, here

CASES = ((2, 2048), (2, 16_384), (64, 2048), (64, 8192))  # dimension and total batch
WARM = 5  # steps that are not timed


def flow(dim: int) -> cnf.Flow:
    return cnf.Flow(dim, method="rk4", step_size=1 / 8, seed=0)


def trained(objective: str, dim: int, batch: int, rounds: int) -> float:
    """Seconds of a step."""
    x = torch.randn(2 * batch, dim)
    made = flow(dim).whiten(x)
    module = {"matching": cnf.FlowMatching, "likelihood": cnf.MaximumLikelihood}[objective](made)
    plan = Plan(objective, steps=WARM + rounds, validations=1)
    training = Training(module, Shuffled((x,), batch), plan, validate=lambda: 0.0, best=Best())
    return timed(iter(training).__next__, rounds)


@torch.no_grad()
def evaluated(dim: int, batch: int, rounds: int) -> float:
    """Seconds of the log-densities of a batch."""
    ranks, made, x = current(), flow(dim), torch.randn(batch, dim)
    own = x[ranks.share(batch)]
    return timed(lambda: ranks.whole(made.log_prob(own), batch), rounds)


def timed(run: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(WARM + rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM:])


def as_rank(rounds: int, cases: Sequence[tuple[int, int]]) -> None:
    """Measure in this process, with the others if there are any; the first prints JSON."""
    torch.manual_seed(0)
    if os.environ["WORLD_SIZE"] != "1":
        dist.init_process_group("gloo")
    found = {}
    with here().together():
        for dim, batch in cases:
            case = f"D = {dim}, batch {batch:,}"
            found[f"flow matching, {case}"] = trained("matching", dim, batch, rounds)
            found[f"maximum likelihood, {case}"] = trained("likelihood", dim, batch, rounds)
            found[f"log_prob, {case}"] = evaluated(dim, batch, rounds)
    if here().is_first:
        print(json.dumps(found))
    if here().world > 1:
        dist.destroy_process_group()


def measured(processes: int, *more: str) -> dict[str, float]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(processes), __file__, "--as-rank", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="the smallest case alone")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        return as_rank(arguments.rounds, CASES[: 1 if arguments.quick else None])
    print(machine())
    more = ["--rounds", str(arguments.rounds), *(["--quick"] if arguments.quick else [])]
    one, several = measured(1, *more), measured(arguments.processes, *more)
    print(f"{'ms':44s} {'1 process':>10s} {f'{arguments.processes} processes':>12s} {'ratio':>7s}")
    for name, alone in one.items():
        together = several[name]
        print(f"{name:44s} {alone * 1e3:10.1f} {together * 1e3:12.1f} {alone / together:7.2f}")


if __name__ == "__main__":
    main()
