"""`cnf logprob`: the log-density of a table's rows under the flow of a run."""

from __future__ import annotations

import sys
from argparse import Namespace

import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text, read_run
from cnf.cli.output import checked_output
from cnf.cli.trained import rows_of
from cnf.data.rows import listed
from cnf.data.table import write_table
from cnf.flow.report import mean_and_error, measured
from cnf.training.ranks import here


@torch.no_grad()
def run(arguments: Namespace) -> None:
    """Write log p(x) of every row in nats, and print their mean with its standard error.

    Of several ranks each evaluates its share of the rows, and the first writes.
    """
    output = checked_output(arguments.output, arguments.overwrite)
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    x, context = rows_of(arguments.file, arguments.columns, trained)
    if trained.dequantized:
        noisy = f"uniform noise in column {listed(trained.dequantized)}"
        message = f"cnf: {trained.path} was trained with {noisy}; rows are taken as they are"
        print(message, file=sys.stderr)
    ranks = here()
    own = ranks.share(len(x))
    given = None if context is None else context[own]
    part, info = trained.flow.log_prob(x[own], given, return_info=True)
    log_prob = ranks.whole(part, len(x))
    if not ranks.is_first:
        return
    write_table(output, log_prob, ["log_prob"])
    mean, error = mean_and_error(log_prob.cpu().double())
    figures = {"file": str(output), "rows": len(log_prob), "mean": mean, "mean_error": error}
    if arguments.json:
        print(json_text({**figures, "nfe": info.nfe, "divergence": info.divergence}))
    else:
        print(f"mean log p(x) {measured(mean, error)} nats, {len(log_prob):,} rows in {output}")
