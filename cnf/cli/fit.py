"""`cnf fit`: data in, a run folder and the figures of its flow out."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cnf.cli.device import hardware, usable_device
from cnf.cli.folder import (
    FIGURES,
    RunFolder,
    claimed_folder,
    json_text,
    read_config,
    resumed_folder,
    unfinished,
    versions,
)
from cnf.cli.parser import FIT_DEFAULTS
from cnf.cli.picture import save_density, save_training
from cnf.cli.resumption import other_setting, resumable, snapshots_of
from cnf.cli.source import Source, read_source
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.regularizer import Regularizer
from cnf.flow.report import held_out
from cnf.training.loop import Progress
from cnf.training.ranks import here
from cnf.training.snapshot import Snapshots


def run(arguments: Namespace) -> None:
    """Fit, judge and draw; the figures go to stdout and into the run folder.

    All input is checked before the folder is touched; the model is saved before it is judged.
    """
    start = time.perf_counter()
    arguments = _resumed(arguments) if arguments.resume else _complete(arguments)
    device = usable_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    source = _source(arguments)
    flow = _flow(source, arguments).to(device)
    with _folder(arguments, source) as folder:
        if arguments.tensorboard:
            folder.show_on_board()
        snapshots = snapshots_of(folder, arguments)
        history = _train(flow, source, arguments, folder, snapshots)
        if not here().is_first:
            return
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
        snapshots.remove()
    if arguments.json:
        print(json_text(figures))
    else:
        print("\n".join([*report.lines(), *_closing_lines(figures, folder.path, source)]))


# --- what to do -----------------------------------------------------------------------------------


def _complete(arguments: Namespace) -> Namespace:
    """The arguments, with defaults for the settings that were not given."""
    if arguments.data is None:
        raise InputError("the following arguments are required: DATA; see cnf fit --help")
    return Namespace(**{**FIT_DEFAULTS, **vars(arguments)})


def _resumed(arguments: Namespace) -> Namespace:
    """The arguments of the run that goes on; refused where those that were given are others."""
    if arguments.out is None and arguments.data is None:
        raise InputError("--resume needs to know the run; name its folder with --out, or its DATA")
    out = arguments.out or unfinished(str(Path("runs", Path(arguments.data).stem)))
    with resumed_folder(out) as folder:
        config = read_config(folder.path)
    kept, data = config.get("arguments"), config.get("data")
    is_other = "settings" in config
    if is_other or not (isinstance(kept, dict) and isinstance(data, dict) and "data" in kept):
        raise InputError(f"{out} holds no fit to resume; leave --resume out to begin one")
    _refuse_other_data(arguments.data, kept["data"], data.get("file"), out)
    settings = {name: kept.get(name, value) for name, value in FIT_DEFAULTS.items()}
    for name in settings.keys() & vars(arguments).keys():
        given = json.loads(json_text(getattr(arguments, name)))
        if given != settings[name]:
            raise other_setting(out, name.replace("_", "-"), settings[name], given)
    known = {
        "data": data.get("file", kept["data"]),
        "out": out,
        "threads": arguments.threads or config.get("threads"),
        "device": arguments.device or kept.get("device"),
    }
    return Namespace(**{**vars(arguments), **settings, **known})


def _refuse_other_data(given: str | None, kept: str, file: str | None, out: str) -> None:
    if given not in (None, kept) and os.path.abspath(str(given)) != file:
        raise other_setting(out, "data", kept, given)


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


@contextmanager
def _folder(arguments: Namespace, source: Source) -> Iterator[RunFolder]:
    out = str(Path("runs", source.name)) if arguments.out is None else arguments.out
    opened = resumed_folder(out) if arguments.resume else claimed_folder(out, arguments.overwrite)
    with opened as folder, resumable("fit", folder):
        yield folder


# --- doing it -------------------------------------------------------------------------------------


def _tell(arguments: Namespace, message: str) -> None:
    if not arguments.quiet:
        print(message, file=sys.stderr)


def _train(
    flow: Flow, source: Source, arguments: Namespace, folder: RunFolder, snapshots: Snapshots
) -> list[Progress]:
    """The records of all steps; the model and every record are in the folder."""
    begun = snapshots.begun
    history = [] if begun is None else folder.go_on(begun.state.get("records", 0))
    config = _config(flow, source, arguments)

    def keep(record: Progress) -> None:
        if not folder.has_begun:  # by now `fit` has accepted its input
            folder.begin(config)
        history.append(record)
        folder.add_step(asdict(record))

    rows = f"{len(source.train):,} rows of {source.dim} columns"
    verb = "fitting" if begun is None else "going on with"
    _tell(arguments, f"{verb} {source.name}, {rows}, into {folder.path}")
    x, context = source.parts(source.train)
    try:
        with here().together():
            flow.fit(
                x,
                context=context,
                validation=source.parts(source.validation) if source.context else source.validation,
                callback=keep,
                progress=not arguments.quiet,
                snapshot=snapshots,
                **_settings(arguments),
            )
    except KeyboardInterrupt as interrupt:
        if not folder.has_begun:
            raise
        folder.save(flow)
        kept = f"the best weights so far are in {folder.path}"
        raise KeyboardInterrupt(kept, *interrupt.args) from None
    if not folder.has_begun:  # a budget too small for one step
        folder.begin(config)
    folder.save(flow)
    folder.write_config(_config(flow, source, arguments))  # the field is chosen by now
    return history


def _settings(arguments: Namespace) -> dict[str, Any]:
    """What goes to `Flow.fit`."""
    names = ("method", "seconds", "steps", "seed", "lr", "batch_size", "coupling")
    return {name: getattr(arguments, name) for name in names} | {
        "regularizer": Regularizer(
            kinetic=arguments.kinetic, jacobian=arguments.jacobian, steer=arguments.steer
        )
    }


def _config(flow: Flow, source: Source, arguments: Namespace) -> dict[str, Any]:
    """What it takes to repeat the run."""
    return {
        "arguments": {**vars(arguments), "resume": False},
        "data": source.description,
        "flow": flow.config,
        "ranks": here().world,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "hardware": hardware(usable_device(arguments.device)),
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


def _closing_lines(figures: dict[str, Any], folder: Path, source: Source) -> list[str]:
    given = f" --context {','.join(source.context)}" if source.context else ""
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
        ("next", f"cnf check {folder}{given}"),
        ("", f"cnf sample {folder} -n 1000{given} -o samples.npy"),
        ("", f"cnf logprob {folder} FILE -o log_prob.csv"),
    ]
    return [f"{name:<14}{text}" for name, text in lines]


def _described(figures: dict[str, Any]) -> str:
    """The default field in words."""
    widths, band = " and ".join(map(str, figures["hidden"])), figures["bandwidth"]
    sines = "no sines" if band is None else f"sines of {band[0]:g} to {band[1]:g}"
    return f"hidden layers of {widths}, {sines}, {figures['parameters']:,} parameters"
