"""Peak memory and time of one training iteration of a net, and how they grow with its depth.

Every measurement is a process of its own: `python -m cnf.cli.reproduce.footprint REQUEST`, with a
request and an answer in JSON.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cnf.cli.device import hardware
from cnf.cli.mnist.classifier import settings_of
from cnf.error import InputError
from cnf.odenet.classification import Classification
from cnf.odenet.network import ODENet, ResNet
from cnf.odenet.recipe import build
from cnf.odenet.settings import ODE_NETS, Settings

BLOCKS = (6, 12, 24)
STEPS = (4, 8, 16)  # of dopri5, six evaluations each
TIMED = 3  # iterations, after one that warms up
FLAT = 1.05  # what grows by less, from the shallowest to the deepest, does not grow
# glibc is told to map every large block, so that what is freed goes back at once
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Footprint:
    """What an iteration, forward and backward, takes at each depth.

    unit: "block" or "evaluation", None of a net without a depth; depths: how many of them; bytes:
    the peak beyond what the process had before, None where the system does not tell; seconds:
    medians; machine: where it was measured.
    """

    unit: str | None
    depths: tuple[int, ...]
    bytes: tuple[float | None, ...]
    seconds: tuple[float, ...]
    machine: str

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Footprint:
        """What was written as JSON, where tuples are lists."""
        lists = {name: tuple(stored[name]) for name in ("depths", "bytes", "seconds")}
        return cls(stored["unit"], machine=stored["machine"], **lists)

    def growth(self, values: Sequence[float | None]) -> float | None:
        """What one more block or evaluation takes, 0 where that is next to nothing."""
        first, before, last = values[0], values[-2] if len(values) > 1 else None, values[-1]
        if self.unit is None or first is None or before is None or last is None:
            return None
        if last <= FLAT * first:
            return 0.0
        return (last - before) / (self.depths[-1] - self.depths[-2])


def footprint(
    settings: Settings, shape: Sequence[int], classes: int, device: str, threads: int | None
) -> Footprint:
    """The footprint of the net of these settings, on noise in the place of images.

    shape: of an image, (channels, height, width).
    """
    unit, depths = _depths(settings)
    found = []
    for depth in depths:
        request = {
            "settings": asdict(settings), "depth": depth, "shape": list(shape),
            "classes": classes, "device": device, "threads": threads,
        }  # fmt: skip
        memory = _asked(request | {"timed": 0}, MAPPED)
        found.append((memory, _asked(request | {"timed": TIMED}, {})))
    return Footprint(
        unit,
        tuple(timed["depth"] for _, timed in found),
        tuple(memory["bytes"] for memory, _ in found),
        tuple(timed["seconds"] for _, timed in found),
        found[0][1]["machine"],
    )


def _depths(settings: Settings) -> tuple[str | None, tuple[int, ...]]:
    """The unit of the depth, and what is asked for: numbers of blocks or of steps."""
    if settings.net in ODE_NETS:
        return "evaluation", STEPS
    return ("block", BLOCKS) if settings.net == "resnet" else (None, (1,))


def _asked(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The answer of a process of its own."""
    above = str(Path(__file__).parents[2])  # it runs this package, wherever it is started
    paths = os.pathsep.join([above, *filter(None, [os.environ.get("PYTHONPATH")])])
    answer = subprocess.run(
        [sys.executable, "-m", "cnf.cli.reproduce.footprint", json.dumps(request)],
        env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if answer.returncode:
        why = answer.stderr.strip().splitlines()[-1:] or [f"exit code {answer.returncode}"]
        raise InputError(
            f"an iteration of {request['settings']['net']} at depth {request['depth']} could not "
            f"be measured ({why[0]}); is there memory enough?"
        )
    return json.loads(answer.stdout)


# --- in the process of its own --------------------------------------------------------------------


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: peak bytes of the first iteration, or seconds of later ones."""
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    settings, device = settings_of(request["settings"]), torch.device(request["device"])
    torch.manual_seed(0)
    net = _of_depth(settings, request).to(device)
    iteration = _Iteration(net, settings, request, device)
    iteration.run(2)  # what is loaded and chosen at the first use
    before = _lowered_peak(device)
    iteration.run(settings.batch_size)
    after = _peak(device)
    seconds = [iteration.run(settings.batch_size) for _ in range(request["timed"])]
    return {
        "depth": iteration.evaluations() or request["depth"],
        "bytes": None if before is None or after is None else after - before,
        "seconds": statistics.median(seconds) if seconds else None,
        "machine": hardware(device),
    }


def _of_depth(settings: Settings, request: dict[str, Any]) -> torch.nn.Module:
    if settings.net == "resnet":
        channels, *_ = request["shape"]
        return ResNet(
            channels, request["classes"], width=settings.width, stem=settings.stem,
            blocks=request["depth"],
        )  # fmt: skip
    net = build(settings, request["shape"], request["classes"])
    if isinstance(net, ODENet):
        net.block.step_size = 1 / request["depth"]
    return net


class _Iteration:
    """Forward and backward of a net's loss on noise."""

    def __init__(
        self, net: torch.nn.Module, settings: Settings, request: dict[str, Any],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._objective = Classification(net, smoothing=settings.smoothing)
        self._shape, self._classes = request["shape"], request["classes"]
        self._device = device

    def run(self, batch: int) -> float:
        """Its seconds."""
        images = torch.rand(batch, *self._shape, device=self._device)
        labels = torch.randint(self._classes, (batch,), device=self._device)
        self._objective.zero_grad()
        start = time.perf_counter()
        self._objective(images, labels).backward()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def evaluations(self) -> int | None:
        """Of the field, forward; None of a net without an ODE."""
        return self._objective.nfe


def _lowered_peak(device: torch.device) -> int | None:
    """The same, once it has been brought down to what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    """The most bytes so far: of the device's memory, or of the process where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux; getrusage would tell the peak of the process that started this one, if higher
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return None if found is None else 1024 * int(found[1])


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
