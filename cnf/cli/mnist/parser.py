"""The arguments of `cnf mnist` and the pages that its `--help` prints; imports no torch."""

from __future__ import annotations

from typing import Any

from cnf.cli.argument import (
    count,
    device_argument,
    files_arguments,
    names,
    page,
    place_arguments,
    positive,
    run_arguments,
    seed,
    share,
    shares,
)
from cnf.cli.mnist.image_parser import add_flow_tasks
from cnf.odenet.settings import DATASETS, NETS, PRESETS, QUICK

MNIST_PAGE = """\
Classify images by a neural ODE, and draw them by a continuous normalizing flow.

TASKS
  cnf mnist classify                       train an ODE-Net on MNIST and judge it
  cnf mnist generate                       train a flow that draws digits and knows their density
  cnf mnist sample RUN                     draw images from it, of any digit or of those you name
  cnf mnist bpd RUN                        bits per dimension of the test images under it

  cnf mnist sample --pretrained            the same with the flow that comes with cnf
  cnf mnist bpd --pretrained

  `cnf mnist TASK --help` lists every parameter.
"""

MNIST_EXAMPLES = """\
examples:
  cnf mnist classify --preset quick
  cnf mnist classify --dataset digits --net resnet
  cnf mnist generate --dataset digits      8 x 8 images, nothing to download, under two minutes
  cnf mnist sample --pretrained --classes 3 -o threes.png
"""

CLASSIFY_PAGE = """\
Train a classifier of MNIST's images and report its error on the test images.

The four IDX files are found in the folder of --data, in that of CNF_DATA or in the cache, else they
are downloaded.  A part of the training images selects the weights; the test images are read once,
at the end.

Presets set all parameters, and any parameter that is given takes its place:
  quick   an ODE-Net of 32 channels, 4 evaluations of the field an image: minutes on a CPU
  paper   the nets and the recipe of Chen et al. 2018: 64 channels, dopri5 at 1e-3, 160 epochs
"""

CLASSIFY_EXAMPLES = """\
the run folder:
  model.safetensors   the weights with the lowest error on the images held back
  config.json         settings, seed and versions: what it takes to repeat the run
  metrics.jsonl       a line for every training step
  metrics.json        the final figures, with the confusion matrix
  training.png        loss, validation error and evaluations over training, and confusion.png
  tensorboard         with --tensorboard: the same as metrics.jsonl, for its curves
  snapshot.pt         where training stands, until it is finished: --resume goes on from it

examples:
  cnf mnist classify                                        the quick preset, on MNIST
  cnf mnist classify --dataset digits                       8 x 8 images, nothing to download
  cnf mnist classify --net resnet --width 64 --stem residual
  cnf mnist classify --method dopri5 --rtol 1e-3 --gradient adjoint
  cnf mnist classify --preset paper --device cuda
  cnf mnist classify --resume --out runs/mnist-odenet       after Ctrl-C, SIGTERM or a crash
"""


EXPORT_PAGE = """\
Write the ODE-Net of a run as a program of fixed steps, for devices that have torch but no solver.

The steps are as many of the method as at most N evaluations of the field pay for.  The program is
written by torch.export, for batches of any size, reloaded, and compared with the net.
"""

EXPORT_EXAMPLES = """\
examples:
  cnf export runs/mnist-odenet --nfe 8
  cnf export runs/mnist-odenet --nfe 4 --method rk4 -o small.pt2

  program = torch.export.load("small.pt2").module()
  program(torch.rand(5, 1, 28, 28))           logits, (5, 10)
"""


REPRODUCE_PAGE = """\
Measure here what Chen et al. 2018 showed: a table or a figure, with the numbers behind it.

  fig2     Euler's polygon beside the exact solution, and better methods
  fig3     what accuracy costs in a trained ODE-Net: evaluations, time, the adjoint's evaluations
  table1   test errors over seeds, sizes, memory and time of the ODE-Net and of the nets that it
           is compared with
  fig4     planar normalizing flows of depth 2, 8, 32 against planar continuous flows of that
           width, by reverse KL to four densities
  fig5     two circles and two moons, densities and samples over time
  adjoint  a(t) of an ODE beside the chain rule through residual layers (equations 4 to 6)

--quick takes small nets, 8 x 8 digits and few steps, a few minutes at most; else the nets are the
paper's, and table1 trains for hours: each training has a run folder in --out, and the command goes
on where it stopped.  Rows may be trained side by side, with --train-only; --no-training tells what
is finished, and measures memory and time.
"""

REPRODUCE_EXAMPLES = """\
examples:
  cnf reproduce fig2
  cnf reproduce fig3 --quick
  cnf reproduce fig3 --run runs/table1/odenet-adjoint-0
  cnf reproduce fig4 --quick
  cnf reproduce table1 --quick --seeds 2
  cnf reproduce table1 --rows resnet,odenet-checkpoint --seeds 3
  cnf reproduce table1 --rows resnet --seed 1 --train-only --threads 1
  cnf reproduce table1 --no-training
"""


def add_reproduce_arguments(verb: Any) -> None:
    """Add the arguments of `cnf reproduce` to its parser."""
    figures = ("table1", "fig2", "fig3", "fig4", "fig5", "adjoint")
    verb.add_argument("what", metavar="WHAT", choices=figures)
    verb.add_argument(
        "--seed", metavar="K", type=seed, default=0,
        help="of fig4, fig5 and adjoint; the first of table1 (0)",
    )  # fmt: skip
    verb.add_argument("--quick", action="store_true", help="small, in a minute or two")
    verb.add_argument("--out", metavar="FOLDER", help="where the results go (runs/WHAT)")
    verb.add_argument("--dataset", choices=DATASETS, help="which images (mnist)")
    verb.add_argument("--data", metavar="FOLDER", help="the folder that holds the IDX files")
    verb.add_argument("--epochs", metavar="N", type=count, help="times through the images (8)")
    verb.add_argument(
        "--seeds", metavar="N", type=count, default=1, help="trainings of each row of table1 (1)"
    )
    verb.add_argument(
        "--rows", metavar="A,B", type=names, help="rows of table1, such as resnet,odenet-adjoint"
    )
    training = verb.add_mutually_exclusive_group()
    training.add_argument(
        "--train-only", action="store_true", help="measure no memory and time for table1"
    )
    training.add_argument(
        "--no-training", action="store_true", help="take what is finished for table1"
    )
    verb.add_argument("--run", metavar="RUN", help="the trained ODE-Net for fig3")
    verb.add_argument("--threads", metavar="N", type=count, help="of torch on the CPU")
    verb.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    verb.add_argument("--quiet", action="store_true", help="no progress, nothing but warnings")
    device_argument(verb)


def add_export_arguments(verb: Any) -> None:
    """Add the arguments of `cnf export` to its parser."""
    verb.add_argument("run_folder", metavar="RUN", help="a run of `cnf mnist classify`")
    verb.add_argument(
        "--nfe", metavar="N", type=count, required=True, help="evaluations of the field, at most"
    )
    verb.add_argument("--method", metavar="NAME", help="euler, midpoint, rk4, ... (the run's own)")
    verb.add_argument(
        "-o", metavar="FILE", dest="output", help="where to write (default: RUN/model-nfeN.pt2)"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    device_argument(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def add_mnist_arguments(verb: Any) -> None:
    """Add the tasks of `cnf mnist` and their arguments to its parser."""
    tasks = verb.add_subparsers(prog="cnf mnist", dest="task", metavar="TASK", required=True)
    task = page(
        tasks.add_parser, "classify", description=CLASSIFY_PAGE, epilog=CLASSIFY_EXAMPLES,
        help="train an ODE-Net, or another net, and judge it",
    )  # fmt: skip
    place_arguments(task, "runs/DATASET-NET")
    _data_arguments(task.add_argument_group("data"))
    _net_arguments(task.add_argument_group("net"))
    _solver_arguments(task.add_argument_group("solver of the ODE"))
    _training_arguments(task.add_argument_group("training"))
    add_flow_tasks(tasks)


def _data_arguments(data: Any) -> None:
    files_arguments(data, "(mnist)")
    data.add_argument(
        "--validation", metavar="N", type=count, help="training images held back to select by"
    )


def _net_arguments(net: Any) -> None:
    net.add_argument(
        "--net",
        choices=NETS,
        help="odenet; rk-net, the same with gradients by backprop through the solver; resnet of "
        "six blocks, one-block, no-block; mlp of one hidden layer (odenet)",
    )
    net.add_argument("--width", metavar="N", type=count, help="channels of the features")
    net.add_argument(
        "--stem", metavar="KIND", help="layers before the ODE: residual, conv, strided or fine"
    )
    net.add_argument("--augment", metavar="N", type=seed, help="channels of zeros for the ODE (0)")
    net.add_argument(
        "--steady", dest="timed", action="store_false", default=None,
        help="a field that does not see the time",
    )  # fmt: skip


def _solver_arguments(solver: Any) -> None:
    solver.add_argument("--method", metavar="NAME", help="euler, midpoint, rk4, dopri5, tsit5, ...")
    steps = solver.add_mutually_exclusive_group()
    steps.add_argument("--rtol", metavar="X", type=positive, help="tolerance of adaptive steps")
    steps.add_argument("--step-size", metavar="H", type=positive, help="length of fixed steps")
    steps.add_argument(
        "--nfe", metavar="N", type=count, help="evaluations that fixed steps may take"
    )
    solver.add_argument(
        "--gradient", choices=("checkpoint", "backprop", "adjoint", "reversible"),
        help="how the solution is differentiated",
    )  # fmt: skip
    solver.add_argument(
        "--energy", metavar="X", type=positive, help="weight of the kinetic energy in the loss (0)"
    )


def _training_arguments(training: Any) -> None:
    training.add_argument(
        "--preset", choices=tuple(PRESETS), help=f"what the others start from ({QUICK})"
    )
    budget = training.add_mutually_exclusive_group()
    budget.add_argument("--epochs", metavar="N", type=count, help="times through the images")
    budget.add_argument("--steps", metavar="N", type=count, help="steps, instead of epochs")
    training.add_argument("--batch-size", metavar="N", type=count, help="images of a step")
    training.add_argument("--lr", metavar="X", type=positive, help="the largest learning rate")
    training.add_argument("--optimizer", choices=("adam", "sgd"))
    training.add_argument("--weight-decay", metavar="X", type=share, help="of kernels")
    training.add_argument(
        "--drops", metavar="A,B", type=shares,
        help="shares of the steps at which the learning rate falls to a tenth, none for one cycle",
    )  # fmt: skip
    training.add_argument("--smoothing", metavar="X", type=share, help="of the labels")
    training.add_argument(
        "--shift", metavar="N", type=seed, help="pixels that images are moved by at random"
    )
    training.add_argument(
        "--memory",
        metavar="X",
        type=positive,
        help="of the averaged weights, as a share",
    )
    run_arguments(training)
