"""The arguments of flows over images under `cnf mnist`, and their pages; imports no torch."""

from __future__ import annotations

from typing import Any

from cnf.cli.argument import (
    count,
    device_argument,
    files_arguments,
    finite,
    labels,
    page,
    place_arguments,
    positive,
    run_arguments,
    seed,
    share,
    weight,
)
from cnf.flow.image_settings import DEQUANTIZATIONS, FIELDS, METHODS, PRECISIONS

GENERATE_PAGE = """\
Train a flow over images and report what it is worth: bits per dimension of test images, and what
a classifier finds in its samples, beside the same figures of test images.

Bits per dimension are an upper bound, since the flow is told pixels with uniform noise; several
--draws of the noise also give an importance-weighted bound, which is tighter.  Samples are judged
by the ODE-Net of `cnf mnist classify`, which is trained first unless --classifier names a run.
Images are found as for `cnf mnist classify`; the test images are read once training has ended.
"""

GENERATE_EXAMPLES = """\
the run folder:
  model.safetensors   the weights with the fewest bits on the images held back
  config.json         settings, seed and versions: what it takes to repeat the run
  metrics.jsonl       a line for every training step
  metrics.json        the final figures
  samples.png         64 samples; classes.png, samples of each class; interpolation.png, from one
                      test image to another; neighbours.png, samples and the training images most
                      like them; training.png
  classifier          the run of the classifier that judged the samples
  snapshot.pt         where training stands, until it is finished: --resume goes on from it

examples:
  cnf mnist generate                                  a small U-Net by flow matching: hours on a CPU
  cnf mnist generate --dataset digits                 8 x 8 images, under two minutes
  cnf mnist generate --field mlp                      an exact trace in 784 dimensions
  cnf mnist generate --method auto --steps 40000      then maximum likelihood
  cnf mnist generate --field multiscale --width 64 --unconditional --method ml
  cnf mnist generate --resume --out runs/mnist-flow   after Ctrl-C, SIGTERM or a crash; of a run
                                                      that is trained, the report anew
"""

DRAW_PAGE = """\
Draw images from the flow in a run folder, or with --pretrained from the one that comes with cnf,
and write them as a picture (.png, .pdf) or as whole-number pixels (.npy, of shape n, channels,
height, width).
"""

DRAW_EXAMPLES = """\
examples:
  cnf mnist sample --pretrained                                   64 digits, in samples.png
  cnf mnist sample --pretrained --classes 0,1,2,3,4,5,6,7,8,9 -n 100 -o digits.png
  cnf mnist sample runs/mnist-flow --classes 7 --guidance 1.5 --seed 1
  cnf mnist sample runs/mnist-flow -n 1000 --nfe 32 -o samples.npy
"""

BPD_PAGE = """\
Measure bits per dimension of test images under the flow in a run folder, or with --pretrained
under the one that comes with cnf.

The figure is the mean over images of -log2 p(x) a pixel, with the error of that mean over images,
draws of the noise between whole numbers, and probes of the trace.  It is an upper bound on what
the flow's best code needs; so is the importance-weighted figure, which needs --draws 2 or more.
"""

BPD_EXAMPLES = """\
examples:
  cnf mnist bpd runs/mnist-flow
  cnf mnist bpd runs/mnist-flow --images 1000 --draws 8 --probes 4
  cnf mnist bpd --pretrained --images 100 --json
  cnf mnist bpd runs/mnist-flow --dataset fashion --images 500        of images it never saw
"""

# settings that are true unless a flag says no
FLAGS_OFF = {"conditional": "--unconditional", "equalize": "--plain-logit"}


def add_flow_tasks(tasks: Any) -> None:
    """Add generate, sample and bpd to the tasks of `cnf mnist`."""
    task = page(
        tasks.add_parser, "generate", description=GENERATE_PAGE, epilog=GENERATE_EXAMPLES,
        help="train a flow over images, and judge it",
    )  # fmt: skip
    place_arguments(task, "runs/DATASET-flow")
    data = task.add_argument_group("data")
    files_arguments(data, "(mnist)")
    data.add_argument(
        "--validation", metavar="N", type=count, help="training images held back to select by"
    )
    _flow_arguments(task.add_argument_group("flow"))
    _matching_arguments(task.add_argument_group("training"))
    _report_arguments(task.add_argument_group("report"))
    task = page(
        tasks.add_parser, "sample", description=DRAW_PAGE, epilog=DRAW_EXAMPLES,
        help="draw images from a flow",
    )  # fmt: skip
    _draw_arguments(task)
    task = page(
        tasks.add_parser, "bpd", description=BPD_PAGE, epilog=BPD_EXAMPLES,
        help="bits per dimension of test images under a flow",
    )  # fmt: skip
    _bpd_arguments(task)


def _flow_arguments(flow: Any) -> None:
    flow.add_argument(
        "--field", choices=FIELDS,
        help="unet; mlp, two hidden layers with an exact trace; multiscale, FFJORD's stack, "
        "--unconditional and by --method ml (unet)",
    )  # fmt: skip
    flow.add_argument("--width", metavar="N", type=count, help="channels of the U-Net's top")
    flow.add_argument(
        FLAGS_OFF["conditional"], dest="conditional", action="store_false", default=None,
        help="a flow that is not told the classes",
    )  # fmt: skip
    flow.add_argument(
        "--label-dropout", metavar="X", type=share,
        help="share of images whose class is withheld in training",
    )  # fmt: skip
    flow.add_argument(
        "--dequantization", choices=DEQUANTIZATIONS,
        help="noise between whole numbers: uniform, or learned by maximum likelihood (uniform)",
    )  # fmt: skip
    flow.add_argument("--alpha", metavar="X", type=share, help="of the logit: how far from 0 and 1")
    flow.add_argument(
        FLAGS_OFF["equalize"], dest="equalize", action="store_false", default=None,
        help="the logit alone, without a map of grey levels chosen on the images",
    )  # fmt: skip


def _matching_arguments(training: Any) -> None:
    training.add_argument(
        "--method", choices=METHODS,
        help="flow matching, maximum likelihood, or auto: the first, then the second",
    )  # fmt: skip
    training.add_argument("--steps", metavar="N", type=count, help="steps of all of it")
    training.add_argument(
        "--steps-ml", metavar="N", type=count,
        help="of them, those of maximum likelihood with --method auto",
    )  # fmt: skip
    training.add_argument(
        "--late", metavar="X", type=share,
        help="share of flow matching's times that are drawn close to the images",
    )  # fmt: skip
    training.add_argument("--batch-size", metavar="N", type=count, help="images of a step")
    training.add_argument("--lr", metavar="X", type=positive, help="the largest learning rate")
    training.add_argument("--lr-ml", metavar="X", type=positive, help="of maximum likelihood")
    training.add_argument("--memory", metavar="X", type=positive, help="of the averaged weights")
    training.add_argument("--kinetic", metavar="X", type=weight, help="weight of paths' energy")
    training.add_argument(
        "--precision", choices=PRECISIONS, help="of the field in training (single)"
    )
    training.add_argument("--jacobian", metavar="X", type=weight, help="of the field's Jacobian")
    run_arguments(training)


def _report_arguments(report: Any) -> None:
    report.add_argument(
        "--images", metavar="N", type=count, default=1000,
        help="test images whose bits per dimension are measured (1000)",
    )  # fmt: skip
    _accuracy_arguments(report)
    report.add_argument(
        "--samples", metavar="N", type=count, default=1000,
        help="samples that are judged, of any class and of given ones (1000)",
    )  # fmt: skip
    report.add_argument(
        "--guidance", metavar="W", type=finite, help="how far samples of a class follow it (1)"
    )
    report.add_argument(
        "--nfe", metavar="N", type=count, help="evaluations of the field a sample may take"
    )
    report.add_argument(
        "--classifier", metavar="RUN", help="a run of `cnf mnist classify` to judge samples by"
    )


def _accuracy_arguments(place: Any) -> None:
    place.add_argument(
        "--draws", metavar="N", type=count, default=1, help="of the noise between whole numbers (1)"
    )
    place.add_argument(
        "--probes", metavar="N", type=count, default=1, help="of the trace, for every image (1)"
    )


def _draw_arguments(verb: Any) -> None:
    _flow_argument(verb)
    verb.add_argument("-n", metavar="N", type=count, default=64, help="how many images (64)")
    verb.add_argument(
        "--classes", metavar="A,B", type=labels, help="the classes to draw, in turn (any)"
    )
    verb.add_argument(
        "--guidance", metavar="W", type=finite, help="how far samples follow their class (1)"
    )
    verb.add_argument("--seed", metavar="K", type=seed, help="the same images every time")
    verb.add_argument("--nfe", metavar="N", type=count, help="evaluations a sample may take")
    verb.add_argument(
        "-o", metavar="FILE", dest="output", default="samples.png",
        help="where to write: .png, .pdf or .npy (samples.png)",
    )  # fmt: skip
    verb.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    device_argument(verb)


def _bpd_arguments(verb: Any) -> None:
    _flow_argument(verb)
    files_arguments(verb, "(those of the run)")
    verb.add_argument("--images", metavar="N", type=count, help="how many test images (all)")
    _accuracy_arguments(verb)
    verb.add_argument("--nfe", metavar="N", type=count, help="evaluations of the field, at most")
    verb.add_argument("--seed", metavar="K", type=seed, default=0, help="of noise and probes (0)")
    verb.add_argument("--threads", metavar="N", type=count, help="of torch on the CPU")
    verb.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    device_argument(verb)


def _flow_argument(verb: Any) -> None:
    verb.add_argument(
        "run_folder", metavar="RUN", nargs="?", help="a run folder of `cnf mnist generate`"
    )
    verb.add_argument(
        "--pretrained", action="store_true", help="the flow that comes with cnf instead"
    )
