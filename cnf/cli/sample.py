"""`cnf sample`: draws from the flow of a run, as a table."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text, read_run
from cnf.cli.output import checked_output
from cnf.cli.trained import context_of
from cnf.data.table import write_table
from cnf.flow.flow import Flow
from cnf.training.ranks import here


def run(arguments: Namespace) -> None:
    """Draw n samples and write them, with the columns of the training data."""
    output = checked_output(arguments.output, arguments.overwrite)
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    context = context_of(arguments.context, trained)
    samples = _drawn(trained.flow, arguments.n, context, arguments.seed, arguments.nfe)
    if not here().is_first:
        return
    write_table(output, samples, trained.columns if output.suffix.lower() == ".csv" else None)
    if arguments.json:
        print(json_text({"file": str(output), "rows": arguments.n, "columns": trained.columns}))
    else:
        print(f"{arguments.n:,} samples of {trained.flow.dim} columns in {output}")


@torch.no_grad()
def _drawn(
    flow: Flow, n: int, context: list[float] | None, seed: int | None, nfe: int | None
) -> Tensor:
    """Draws of the flow; of several ranks each carries its share of the base's to the data."""
    ranks = here()
    if ranks.world == 1:
        return flow.sample(n, context, seed=seed, nfe=nfe)
    z = flow.draw_base(n, ranks.seed(seed))
    return ranks.whole(flow.decode(z[ranks.share(n)], context, nfe=nfe), n)
