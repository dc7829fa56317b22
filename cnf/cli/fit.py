"""`cnf fit`: data in, a run folder and the figures of its flow out."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cnf.cli.device import usable_device
from cnf.cli.folder import (
    CONFIG,
    FIGURES,
    MODEL,
    RunFolder,
    claimed_folder,
    json_text,
    versions,
)
from cnf.cli.picture import save_density, save_training
from cnf.cli.source import Source, read_source
from cnf.flow.flow import Flow
from cnf.flow.regularizer import Regularizer
from cnf.flow.report import held_out
from cnf.training.loop import Progress


def run(arguments: Namespace) -> None:
    """Fit, judge and draw; the figures go to stdout and into the run folder.

    All input is checked before the folder is touched; the model is saved before it is judged.
    """
    start = time.perf_counter()
    device = usable_device(arguments.device)
    source = _source(arguments)
    flow = _flow(source, arguments).to(device)
    with claimed_folder(_out(arguments, source), arguments.overwrite) as folder:
        if arguments.tensorboard:
            folder.show_on_board()
        history = _train(flow, source, arguments, folder)
        _tell(arguments, "judging the density and drawing it")
        rows, context = source.parts(source.held_out)
        context = None if context is None else context[0]
        report = held_out(flow, rows, source.law, source.levels, context)
        save_density(flow, source, folder.path)
        save_training(history, folder.path, source.name, report.entropy)
        figures = {
            "run": str(folder.path),
            "data": source.name,
            **report.as_dict(),
            **_cost(flow, history),
            "seconds": time.perf_counter() - start,
        }
        folder.write_json(FIGURES, figures)
    if arguments.json:
        print(json_text(figures))
    else:
        print("\n".join([*report.lines(), *_closing_lines(figures, folder.path)]))


def _source(arguments: Namespace) -> Source:
    """The data, once what is doubtful about them has been told."""
    source = read_source(
        arguments.data,
        seed=arguments.seed,
        rows=arguments.rows,
        columns=arguments.columns,
        context=arguments.context or (),
        dequantized=arguments.dequantize,
    )
    for warning in source.warnings:
        print(f"cnf: warning: {warning}", file=sys.stderr)
    return source


def _flow(source: Source, arguments: Namespace) -> Flow:
    return Flow(
        source.dim,
        context=len(source.context),
        hidden=arguments.hidden,
        bandwidth=arguments.bandwidth,
        seed=arguments.seed,
    )


def _out(arguments: Namespace, source: Source) -> str:
    return str(Path("runs", source.name)) if arguments.out is None else arguments.out


def _tell(arguments: Namespace, message: str) -> None:
    if not arguments.quiet:
        print(message, file=sys.stderr)


def _train(flow: Flow, source: Source, arguments: Namespace, folder: RunFolder) -> list[Progress]:
    """The records of all steps; the model and every record are in the folder."""
    history: list[Progress] = []
    config = _config(flow, source, arguments)

    def keep(record: Progress) -> None:
        if not history:  # by now `fit` has accepted its input
            folder.begin(config)
        history.append(record)
        folder.add_step(asdict(record))

    rows = f"{len(source.train):,} rows of {source.dim} columns"
    _tell(arguments, f"fitting {source.name}, {rows}, into {folder.path}")
    x, context = source.parts(source.train)
    try:
        flow.fit(
            x,
            context=context,
            validation=source.parts(source.validation) if source.context else source.validation,
            callback=keep,
            progress=not arguments.quiet,
            **_settings(arguments),
        )
    except KeyboardInterrupt:
        if not history:
            raise
        flow.save(folder.path / MODEL)
        raise KeyboardInterrupt(f"the best weights so far are in {folder.path}") from None
    if not history:  # a budget too small for one step
        folder.begin(config)
    flow.save(folder.path / MODEL)
    folder.write_json(CONFIG, _config(flow, source, arguments))  # the field is chosen by now
    return history


def _settings(arguments: Namespace) -> dict[str, Any]:
    """What goes to `Flow.fit`."""
    names = ("method", "seconds", "steps", "seed", "lr", "batch_size", "device", "coupling")
    return {name: getattr(arguments, name) for name in names} | {
        "regularizer": Regularizer(
            kinetic=arguments.kinetic, jacobian=arguments.jacobian, steer=arguments.steer
        )
    }


def _config(flow: Flow, source: Source, arguments: Namespace) -> dict[str, Any]:
    """What it takes to repeat the run."""
    return {
        "arguments": vars(arguments),
        "data": source.description,
        "flow": flow.config,
        "versions": versions(),
    }


def _cost(flow: Flow, history: list[Progress]) -> dict[str, Any]:
    """What training took, and the field that it chose."""
    skipped = {record.phase: record.skipped for record in history}  # counted anew in each phase
    return {
        "steps": len(history),
        "skipped": sum(skipped.values()),
        "hidden": flow.shape.hidden,
        "bandwidth": flow.shape.bandwidth,
        "parameters": sum(weight.numel() for weight in flow.parameters()),
        "training_seconds": history[-1].seconds if history else 0.0,
    }


def _closing_lines(figures: dict[str, Any], folder: Path) -> list[str]:
    trained, total = figures["training_seconds"], figures["seconds"]
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    lines = [
        ("time", f"{trained:.1f} s for {figures['steps']:,} steps, {total:.1f} s in all"),
    ]
    lines.append(("field", _described(figures)))
    if figures["skipped"]:
        lines.append(("skipped", f"{figures['skipped']:,} batches whose loss was not finite"))
    lines += [
        ("files", f"{folder}: {names}"),
        ("next", f"cnf check {folder}"),
        ("", f"cnf sample {folder} -n 1000 -o samples.npy"),
        ("", f"cnf logprob {folder} FILE -o log_prob.csv"),
    ]
    return [f"{name:<14}{text}" for name, text in lines]


def _described(figures: dict[str, Any]) -> str:
    """The default field in words."""
    widths, band = " and ".join(map(str, figures["hidden"])), figures["bandwidth"]
    sines = "no sines" if band is None else f"sines of {band[0]:g} to {band[1]:g}"
    return f"hidden layers of {widths}, {sines}, {figures['parameters']:,} parameters"
