"""The arguments of every verb and the pages that `--help` prints; imports neither torch nor numpy.

What a verb does with its arguments stands in the file of its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cnf.cli.argument import (
    Parser,
    again_arguments,
    band,
    board_argument,
    count,
    device_argument,
    names,
    numbers,
    page,
    positive,
    running_arguments,
    seed,
    weight,
    widths,
)
from cnf.cli.doctor_parser import DOCTOR_EXAMPLES, DOCTOR_PAGE, add_doctor_arguments
from cnf.cli.mnist.parser import (
    EXPORT_EXAMPLES,
    EXPORT_PAGE,
    MNIST_EXAMPLES,
    MNIST_PAGE,
    REPRODUCE_EXAMPLES,
    REPRODUCE_PAGE,
    add_export_arguments,
    add_mnist_arguments,
    add_reproduce_arguments,
)

PAGE = """\
cnf learns a density from data by a continuous normalizing flow: an ODE that carries
a normal distribution to the data. The density can be evaluated, sampled and checked.

FIT A DENSITY
  cnf fit moons --seconds 30               a toy set, whose true density is known
  cnf fit digits --seconds 300             8 x 8 images of handwritten digits
  cnf fit wine.csv                         a table of your own: .csv, .npy or .npz
  cnf fit wine.csv --columns alcohol,hue --out runs/wine

  The run folder, here runs/moons, holds the model, the settings that repeat the run, a
  record of every step and pictures. A run is never overwritten: runs/moons-2 follows.

DRAW FROM IT
  cnf sample runs/moons -n 1000 -o moons.npy
  cnf sample runs/wine -n 500 --seed 1 -o wine.csv

EVALUATE IT
  cnf logprob runs/wine new.csv -o log_prob.csv

  gives log p(x) in nats for every row, and their mean.

TRUST IT, AND SEE IT
  cnf check runs/moons                     does it integrate to 1, invert, agree with itself?
  cnf plot runs/moons --what animation     the base on its way to the data; see cnf plot --help

IMAGES
  cnf mnist sample --pretrained            digits from the flow that comes with cnf
  cnf mnist generate --dataset digits      train one on 8 x 8 digits, in under two minutes
  cnf mnist classify --preset quick        an ODE-Net on MNIST, in minutes on a CPU
  cnf export runs/mnist-odenet --nfe 8     a program of 8 evaluations, for small devices

WHAT IS WRONG HERE?
  cnf doctor                               versions, devices, data, and a self-test of a second

EACH VERB HAS A PAGE
  cnf fit --help       cnf sample --help       cnf logprob --help     cnf check --help
  cnf plot --help      cnf mnist --help        cnf export --help      cnf reproduce --help
  cnf doctor --help
"""

CODES = """\
Results go to stdout, progress and messages to stderr; with --json stdout is one JSON object.
Exit codes: 0 done; 1 the program failed; 2 wrong input or use; 130 interrupted.
"""

FIT_PAGE = """\
Fit a flow to data and report what the density is worth on rows that it has not seen.

DATA is the name of a set that comes with cnf, or a file:
  8gaussians checkerboard moons circles rings swissroll 2spirals pinwheel
                 points in the plane, with a known density: the report gives the gap to it
  digits         1,797 images of 8 x 8 pixels 0 ... 16; the flow sees (pixel + u) / 17 in [0, 1)
                 with uniform noise u, and the report adds bits per dimension, an upper bound
  FILE.csv       numbers, with or without a header; FILE.npy, FILE.npz: one array (rows, columns)

A file is split by the seed: 15 % of its rows, at most 10,000, are held out for the report, as many
choose the best weights, the rest trains.  A .npy file of float32 or float64 above 256 MB is not
loaded, without --context; its last rows are held out.
"""

FIT_EXAMPLES = """\
the run folder:
  model.safetensors   the flow; cnf.Flow.load reads it
  config.json         data, settings, seed and versions: what it takes to repeat the run
  metrics.jsonl       a line for every training step
  metrics.json        the final figures
  density.png         data, density and samples (samples.png for images), and training.png
  tensorboard         with --tensorboard: the same as metrics.jsonl, for its curves
  snapshot.pt         where training stands, until it is finished: --resume goes on from it

examples:
  cnf fit checkerboard --seconds 60 --seed 1
  cnf fit moons --steps 2000 --rows 20000 --hidden 64,64 --method ml
  cnf fit wine.csv --columns alcohol,hue,ash --out runs/wine
  cnf fit wine.csv --columns alcohol,hue --context class     the density given the class
  cnf fit counts.csv --dequantize          whole numbers have no density: add uniform noise
  cnf fit points.npy --json --quiet > figures.json
  cnf fit moons --tensorboard              then: tensorboard --logdir runs
  cnf fit --resume --out runs/moons        after Ctrl-C, SIGTERM or a crash
  cnf fit moons --resume                   the newest run of moons that has not ended
"""

SAMPLE_PAGE = """\
Draw samples from the flow in a run folder and write them to a table, one row for each.

Columns are those of the training data, in its units.  A run of digits gives (pixel + u) / 17 in
64 columns: floor(17 x) is the pixel.
"""

SAMPLE_EXAMPLES = """\
examples:
  cnf sample runs/moons -n 1000 -o moons.npy
  cnf sample runs/wine -n 500 --seed 1 -o wine.csv     the same 500 every time
  cnf sample runs/wine -n 500 --context 2 -o wine.csv  given the context, for a run that has one
  cnf sample runs/moons -n 100000 --nfe 8 -o moons.npy at most 8 evaluations of the field
"""

LOGPROB_PAGE = """\
Evaluate log p(x), in nats, for every row of a table, and print the mean with its standard error.

Rows are in the units of the training data.  If the run was trained on named columns and FILE has
a header, the columns are found by name and others are ignored; otherwise they are taken in order.
A run of digits expects 64 columns (pixel + u) / 17 in [0, 1), with u uniform on [0, 1).
"""

LOGPROB_EXAMPLES = """\
examples:
  cnf logprob runs/moons points.npy -o log_prob.npy
  cnf logprob runs/wine new.csv -o log_prob.csv
  cnf logprob runs/wine other.csv --columns 0,3 -o log_prob.csv --json
"""

PLOT_PAGE = """\
Draw a picture of the flow in a run folder and write it there, or to a file of your own.

WHAT is one of
  density       data, density and samples side by side
  samples       data and samples: images in a grid, other rows by their columns
  pairs         histograms and pairs of columns, data and samples over each other
  trajectories  the paths of some points from the base to the data
  field         density, vector field and points at several times (two columns)
  animation     points moving from the base to the data, and their density: a GIF
  training      loss, validation score and evaluations of the field over time
  tradeoff      error and time of log p(x) against the number of evaluations of the field, for
                several methods with fixed steps, and for the flow's own solver; a table as well

Data are read or drawn again, as config.json says: a table must still be where it was.
The rows of a tradeoff come from FILE, in the units of the training data, or from the flow.
A conditional run has one density for each context: trajectories, field and animation, and a
density, are drawn given --context; data beside a density are then those of the nearest contexts.
"""

PLOT_EXAMPLES = """\
examples:
  cnf plot runs/moons --what density              writes runs/moons/density.png
  cnf plot runs/moons --what animation -o moons.gif
  cnf plot runs/wine --what pairs -o pairs.pdf
  cnf plot runs/dose --what field --context 5,40  of a conditional run, at those values
  cnf plot runs/wine new.csv --what tradeoff -o tradeoff.pdf --json
"""

CHECK_PAGE = """\
Measure what must agree if log p(x) can be trusted, and print a table and a verdict:

  integration    log p(x) against tolerances a hundred times tighter, in double precision
  trace          the standard error of an estimated trace; an exact one has none
  round trip     decode(encode(x)) - x
  mass           the density's integral, on a grid in two dimensions, else by importance
  determinant    the log-determinant against that of the Jacobian, up to 32 dimensions
  batch, modes   a row alone, in another order, in train() and in eval()

Rows come from FILE, in the units of the training data, or are drawn from the flow, of a
conditional run given --context.
"""

CHECK_EXAMPLES = """\
examples:
  cnf check runs/moons
  cnf check runs/wine new.csv --json
"""


# the settings of a fit: those that were not given are left out of its arguments, so that a run that
# goes on can tell
FIT_DEFAULTS: dict[str, Any] = {
    "columns": None,
    "context": None,
    "dequantize": False,
    "rows": None,
    "seconds": None,
    "steps": None,
    "seed": 0,
    "hidden": None,
    "bandwidth": "auto",
    "method": "auto",
    "coupling": "independent",
    "kinetic": 0.0,
    "jacobian": 0.0,
    "steer": 0.0,
    "batch_size": None,
    "lr": None,
}


def parse(argv: Sequence[str] | None, version: str) -> argparse.Namespace:
    """The arguments; `verb` among them names the file that runs them.

    Raises InputError for wrong use, SystemExit once --help or --version is answered.
    """
    parser = page(Parser, prog="cnf", description=PAGE, epilog=CODES, usage="cnf VERB ...")
    parser.add_argument("--version", action="version", version=f"cnf {version}")
    verbs = parser.add_subparsers(prog="cnf", dest="verb", metavar="VERB", help=argparse.SUPPRESS)
    for name, text, examples, add_arguments in VERBS:
        verb = page(verbs.add_parser, name, description=text, epilog=examples)
        add_arguments(verb)
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.error(f"name a verb: {', '.join(name for name, *_ in VERBS)}")
    return arguments


def _fit_arguments(verb: Parser) -> None:
    verb.add_argument("data", metavar="DATA", nargs="?", help="the name of a set, or a file")
    place = verb.add_argument_group("where the results go")
    place.add_argument("--out", metavar="RUN", help="the run folder (default: runs/NAME)")
    again_arguments(place)
    place.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    board_argument(place)
    place.add_argument("--quiet", action="store_true", help="no progress, nothing but warnings")

    data = verb.add_argument_group("data", argument_default=argparse.SUPPRESS)
    data.add_argument(
        "--columns", metavar="A,B", type=names, help="columns of the file, by name or index"
    )
    data.add_argument(
        "--context",
        metavar="C,D",
        type=names,
        help="columns of the file that the density is to be conditional on",
    )
    data.add_argument(
        "--dequantize",
        action="store_true",
        help="add uniform noise to the file's columns of repeated or whole numbers",
    )
    data.add_argument(
        "--rows", metavar="N", type=count, help="points of a toy set to train on (500000)"
    )

    training = verb.add_argument_group("training", argument_default=argparse.SUPPRESS)
    budget = training.add_mutually_exclusive_group()
    budget.add_argument("--seconds", metavar="S", type=positive, help="time to train (50)")
    budget.add_argument("--steps", metavar="N", type=count, help="steps to train, instead of time")
    training.add_argument("--seed", metavar="K", type=seed, help="of data, weights and batches (0)")
    training.add_argument(
        "--hidden",
        metavar="128,128",
        type=widths,
        help="widths of the field's hidden layers (default: chosen on the data)",
    )
    training.add_argument(
        "--bandwidth",
        metavar="LOW,HIGH",
        type=band,
        help="frequencies of the first layer's sines, none, or auto: chosen on the data (auto)",
    )
    training.add_argument(
        "--method",
        choices=("auto", "fm", "ml"),
        help="flow matching, maximum likelihood, or auto: the first, then the second",
    )
    training.add_argument(
        "--coupling",
        choices=("independent", "ot"),
        help="of noise and data in flow matching; ot: the shortest paths of a group",
    )
    training.add_argument(
        "--kinetic", metavar="X", type=weight, help="weight of the paths' energy (0)"
    )
    training.add_argument(
        "--jacobian", metavar="X", type=weight, help="of the field's Jacobian (0)"
    )
    training.add_argument(
        "--steer", metavar="X", type=weight, help="spread of random end times (0)"
    )
    training.add_argument("--batch-size", metavar="N", type=count, help="rows of a step")
    training.add_argument("--lr", metavar="X", type=positive, help="the largest learning rate")
    running_arguments(training)


def _sample_arguments(verb: Parser) -> None:
    verb.add_argument("run_folder", metavar="RUN", help="a run folder that `cnf fit` wrote")
    verb.add_argument("-n", metavar="N", type=count, required=True, help="how many samples")
    verb.add_argument("--seed", metavar="K", type=seed, help="the same samples every time")
    _context_argument(verb)
    verb.add_argument(
        "--nfe", metavar="N", type=count, help="at most so many evaluations of the field"
    )
    _output_arguments(verb)


def _logprob_arguments(verb: Parser) -> None:
    verb.add_argument("run_folder", metavar="RUN", help="a run folder that `cnf fit` wrote")
    verb.add_argument("file", metavar="FILE", help="a table: .csv, .npy or .npz")
    verb.add_argument(
        "--columns", metavar="A,B", type=names, help="columns of FILE, by name or index"
    )
    _output_arguments(verb)


def _check_arguments(verb: Parser) -> None:
    _rows_arguments(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    device_argument(verb)


def _plot_arguments(verb: Parser) -> None:
    _rows_arguments(verb)
    verb.add_argument("--what", metavar="WHAT", default="density", help="the picture (density)")
    verb.add_argument(
        "-o", metavar="FILE", dest="output", help="where to write (default: RUN/WHAT.png; .gif)"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    verb.add_argument("--seed", metavar="K", type=seed, default=0, help="of the samples (0)")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    device_argument(verb)


def _rows_arguments(verb: Parser) -> None:
    verb.add_argument("run_folder", metavar="RUN", help="a run folder that `cnf fit` wrote")
    verb.add_argument("file", metavar="FILE", nargs="?", help="a table: .csv, .npy or .npz")
    verb.add_argument(
        "--columns", metavar="A,B", type=names, help="columns of FILE, by name or index"
    )
    _context_argument(verb)


def _context_argument(verb: Parser) -> None:
    verb.add_argument(
        "--context",
        metavar="X,Y",
        type=numbers,
        help="values of the context, in its order; --context=-1,2 where the first is negative",
    )


def _output_arguments(verb: Parser) -> None:
    verb.add_argument(
        "-o", metavar="FILE", dest="output", required=True, help="where to write: .csv or .npy"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    device_argument(verb)


VERBS = (
    ("fit", FIT_PAGE, FIT_EXAMPLES, _fit_arguments),
    ("sample", SAMPLE_PAGE, SAMPLE_EXAMPLES, _sample_arguments),
    ("logprob", LOGPROB_PAGE, LOGPROB_EXAMPLES, _logprob_arguments),
    ("check", CHECK_PAGE, CHECK_EXAMPLES, _check_arguments),
    ("plot", PLOT_PAGE, PLOT_EXAMPLES, _plot_arguments),
    ("mnist", MNIST_PAGE, MNIST_EXAMPLES, add_mnist_arguments),
    ("export", EXPORT_PAGE, EXPORT_EXAMPLES, add_export_arguments),
    ("reproduce", REPRODUCE_PAGE, REPRODUCE_EXAMPLES, add_reproduce_arguments),
    ("doctor", DOCTOR_PAGE, DOCTOR_EXAMPLES, add_doctor_arguments),
)
