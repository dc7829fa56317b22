"""One training iteration of the paper's ODE-Net: ours beside torchdiffeq on the same net.

    python benchmarks/odenet_step.py [--rounds 7] [--run RUN] [--data FOLDER] [--tolerance 1e-3]

64 channels, 128 images of 28 × 28, dopri5 at 1e-3, forward and backward of the loss, float32.
Stem, field and head are one and the same module for all; what differs is who solves the ODE.  --run
takes the net of a trained run of `cnf mnist classify` and images that were held back from it, else
the net is new and the images are noise.  Times are medians over rounds in which all take turns.
Memory is the peak of resident memory beyond what the process had before the iteration, each in a
process of its own, in which glibc is told to map every large block, so that what is freed goes back
at once.  The error is that of the gradient by the features, to checkpoint's at a tolerance of 1e-7.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rivals import available
from timing import machine, medians
from torch import Tensor, nn
from torch.nn import functional

import cnf
from cnf.cli.mnist.classifier import read_classifier
from cnf.odenet.recipe import images_of, split

EXACT = 1e-7
Batch = tuple[Tensor, Tensor]
MIB = 2**20
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
OURS: dict[str, str | cnf.Adjoint] = {
    "adjoint": "adjoint",
    "adjoint, size 1": cnf.Adjoint(size=1),
    "checkpoint": "checkpoint",
    "reversible": "reversible",
    "backprop": "backprop",
}
THEIRS = ("torchdiffeq adjoint", "torchdiffeq adjoint, seminorm", "torchdiffeq backprop")


class Counted(nn.Module):
    """A field that counts its evaluations."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.field(t, y)


class Iteration:
    """Forward and backward of one batch by one solver; nfe: evaluations there and back."""

    def __init__(self, name: str, net: cnf.ODENet, batch: Batch, tolerance: float) -> None:
        self.images, self.labels = batch
        self.net, self.nfe, self.tolerance = net, (0, 0), tolerance
        self.field = Counted(net.block.field)
        self._solve = self._theirs(name) if name.startswith("torchdiffeq") else self._ours(name)

    def _ours(self, name: str) -> Callable[[Tensor], Tensor]:
        return cnf.ODEBlock(self.field, method="dopri5", rtol=self.tolerance, gradient=OURS[name])

    def _theirs(self, name: str) -> Callable[[Tensor], Tensor]:
        import torchdiffeq

        solve = torchdiffeq.odeint if "backprop" in name else torchdiffeq.odeint_adjoint
        settings = {"rtol": self.tolerance, "atol": self.tolerance, "method": "dopri5"}
        if "seminorm" in name:
            settings["adjoint_options"] = {"norm": "seminorm"}
        times = torch.tensor([0.0, 1.0])
        return lambda y: solve(self.field, y, times, **settings)[-1]

    def __call__(self) -> None:
        self.net.zero_grad()
        self.field.calls = 0
        logits = self.net.head(self._solve(self.net.features(self.images)))
        loss = functional.cross_entropy(logits, self.labels)
        forward = self.field.calls
        loss.backward()
        self.nfe = (forward, self.field.calls - forward)

    def gradient(self) -> Tensor:
        """The gradient of the loss by the features."""
        with torch.no_grad():
            features = self.net.features(self.images)
        features.requires_grad_()
        loss = functional.cross_entropy(self.net.head(self._solve(features)), self.labels)
        return torch.autograd.grad(loss, features)[0]


def prepared(arguments: argparse.Namespace) -> tuple[cnf.ODENet, Batch]:
    """The net of the run with images that were held back from it, or a new one with noise."""
    torch.manual_seed(0)
    count = arguments.batch
    if arguments.run is None:
        net = cnf.ODENet(width=arguments.width)
        return net, (torch.rand(count, 1, 28, 28), torch.randint(10, (count,)))
    net, settings, _ = read_classifier(arguments.run)
    data = images_of(settings.dataset, arguments.data, not arguments.data)
    parts = split(data, settings.validation, settings.seed)
    return net, (parts.validation_images[:count], parts.validation_labels[:count])


def serve(name: str, arguments: argparse.Namespace) -> None:
    """Print the bytes of one iteration, after one of two images that loads the libraries."""
    net, (images, labels) = prepared(arguments)
    Iteration(name, net, (images[:2], labels[:2]), arguments.tolerance)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of reading the data
    before = peak()
    Iteration(name, net, (images, labels), arguments.tolerance)()
    print(json.dumps(peak() - before))


def peak() -> int:
    """The most bytes that this process held; getrusage would tell its parent's, if higher."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(name: str, arguments: argparse.Namespace) -> int:
    """The bytes of one iteration in a process of its own."""
    command = [sys.executable, __file__, "--serve", name]
    for key in ("batch", "width", "tolerance", "run", "data"):
        value = getattr(arguments, key)
        command += [] if value is None else [f"--{key}", str(value)]
    environment = os.environ | MAPPED
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", help="a run of `cnf mnist classify`")
    parser.add_argument("--data", help="the folder that holds the IDX files")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments)
        return
    print(machine(), flush=True)
    names = (*OURS, *(THEIRS if available("torchdiffeq") else ()))
    net, batch = prepared(arguments)
    runs = {name: Iteration(name, net, batch, arguments.tolerance) for name in names}
    exact = Iteration("checkpoint", net, batch, EXACT).gradient()
    seconds = medians(runs, arguments.rounds, warmup=1)
    print(f"{'':32s}{'ms':>8s}{'ratio':>8s}{'NFE':>6s}{'back':>6s}{'MiB':>8s}{'error':>8s}")
    for name, run in runs.items():
        ratio = seconds[name] / seconds["adjoint"]
        label = name if name in THEIRS else f"cnf {name}"
        size = memory(name, arguments) / MIB
        error = float((run.gradient() - exact).norm() / exact.norm())
        print(
            f"{label:32s}{1e3 * seconds[name]:8.0f}{ratio:8.2f}{run.nfe[0]:6d}{run.nfe[1]:6d}"
            f"{size:8.0f}{error:8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
