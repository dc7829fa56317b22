"""`cnf export`: the classifier of a run as a fixed-grid program, reloaded and compared."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text
from cnf.cli.mnist.classifier import images_like, read_classifier
from cnf.error import InputError
from cnf.odenet.block import blocks_of
from cnf.odenet.fixed_grid import exported, unrolled, write_program
from cnf.replace import replacing

ROUNDING = 1e-4  # of logits, between the program and the net
ROUNDS = 20  # of timing


@torch.no_grad()
def run(arguments: Namespace) -> None:
    """Write the program, and print how close to the net it is and how long an image takes."""
    device = usable_device(arguments.device)
    net, _, shape = read_classifier(arguments.run_folder)
    net = net.to(device)
    _budgeted(net, arguments)
    output = _output(arguments)
    program = exported(net, shape)
    with replacing(output) as file:
        write_program(program, file)
    reloaded = torch.export.load(output).module()
    difference = max(_apart(net, reloaded, images_like(shape, n).to(device)) for n in (1, 7))
    if not difference <= ROUNDING:
        output.unlink()
        raise RuntimeError(f"the exported program differs from the net by {difference:.1e}")
    (grid,) = (part for part in unrolled(net).modules() if hasattr(part, "nfe"))
    figures = {
        "file": str(output),
        "method": str(blocks_of(net)[0].method),
        "nfe": grid.nfe,
        "difference": difference,
        "milliseconds": 1e3 * _seconds(reloaded, images_like(shape, 1).to(device)),
        "bytes": output.stat().st_size,
    }
    print(json_text(figures) if arguments.json else _told(figures))


def _budgeted(net: nn.Module, arguments: Namespace) -> None:
    """Give the net's ODE the method and the budget that were asked for."""
    blocks = blocks_of(net)
    if not blocks:
        raise InputError(
            f"the net in {arguments.run_folder} has no ODE, so it has no budget; export an ODE-Net"
        )
    for block in blocks:
        if arguments.method is not None:
            block.method = arguments.method
        block.gradient = "checkpoint"  # the reversible scheme is no plain grid
        block.nfe = arguments.nfe
        _ = block.control  # raises where the budget pays for no step


def _output(arguments: Namespace) -> Path:
    """Where to write, checked before the work is done."""
    named = arguments.output or Path(arguments.run_folder, f"model-nfe{arguments.nfe}.pt2")
    output = Path(named)
    if output.suffix != ".pt2":
        raise InputError(f"-o {output} is no program; give it the suffix .pt2")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent} to write {output.name} to; make it")
    if output.exists() and not arguments.overwrite:
        raise InputError(f"{output} exists; give another name, or --overwrite to replace it")
    return output


def _apart(net: nn.Module, program: Any, images: torch.Tensor) -> float:
    """The largest difference of logits."""
    return float((net(images) - program(images)).abs().max())


def _seconds(program: Any, images: torch.Tensor) -> float:
    """The shortest time of a call, until its logits are there."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        program(images).sum().item()
        best = min(best, time.perf_counter() - start)
    return best


def _told(figures: dict[str, Any]) -> str:
    return (
        f"{figures['file']}: {figures['nfe']} evaluations by {figures['method']}, "
        f"{figures['milliseconds']:.2f} ms an image, reloaded and within "
        f"{figures['difference']:.0e} of the net; torch.export.load reads it"
    )
