"""`cnf mnist classify`: images in; a trained net, its error and its figures out."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cnf.cli.classifier import settings_of, write_classifier
from cnf.cli.device import usable_device
from cnf.cli.folder import (
    CONFIG,
    CONFUSION,
    FIGURES,
    SNAPSHOT,
    TRAINING,
    RunFolder,
    claimed_folder,
    json_text,
    read_json,
    resumed_folder,
    versions,
)
from cnf.error import InputError
from cnf.odenet.classification import (
    FINE,
    SOLVERS,
    Judgement,
    depends_on_solver,
    judge,
    judge_solvers,
)
from cnf.odenet.network import parameter_count
from cnf.odenet.recipe import ImageTraining, build, images_of, split
from cnf.odenet.settings import ODE_NETS, Settings, chosen
from cnf.plot import classifier_figure, confusion_figure, save_figure
from cnf.training.loop import Progress
from cnf.training.seed import seeded
from cnf.training.snapshot import Interval, postponed_signals, read_snapshot, write_snapshot


def run(arguments: Namespace) -> None:
    """Train, select, judge and draw; the figures go to stdout and into the run folder."""
    figures = classified(arguments)
    print(json_text(figures) if arguments.json else "\n".join(_lines(figures)))


def classified(arguments: Namespace) -> dict[str, Any]:
    """The figures of a run, which is in its folder when they come."""
    start = time.perf_counter()
    device = usable_device(arguments.device)
    settings = _settings(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    download = not (arguments.no_download or arguments.data)
    data = images_of(settings.dataset, arguments.data, download)
    parts = split(data, settings.validation, settings.seed)
    with _folder(arguments, settings) as folder, seeded(settings.seed, device):
        if arguments.tensorboard:
            folder.show_on_board()
        net = build(settings, parts.shape, parts.classes).to(device)
        training = ImageTraining(net, parts, settings)
        history = _begin(training, folder, settings, device, arguments)
        _train(training, folder, history, device, arguments)
        training.select()
        write_classifier(folder.path, net, settings, parts.shape, parts.classes)
        figures = _figures(training, history, settings, arguments)
        figures |= {"run": str(folder.path), "seconds": time.perf_counter() - start}
        _draw(folder.path, history, figures, settings)
        folder.write_json(FIGURES, figures)
        (folder.path / SNAPSHOT).unlink(missing_ok=True)
    return figures


# --- what to do -----------------------------------------------------------------------------------


def given_settings(arguments: Namespace) -> dict[str, Any]:
    """The settings that were given."""
    values = ((one.name, getattr(arguments, one.name, None)) for one in fields(Settings))
    return {name: value for name, value in values if value is not None}


def _settings(arguments: Namespace) -> Settings:
    """Of the preset and the arguments; of the run itself where it is resumed."""
    given = given_settings(arguments)
    wanted = chosen(arguments.preset, given)
    if not arguments.resume:
        return wanted
    out = _out(arguments, wanted)
    with resumed_folder(out) as folder:
        config = read_json(folder.path / CONFIG)
    if not isinstance(config.get("settings"), dict):
        raise InputError(f"{out} holds no classifier to resume; leave --resume out to begin one")
    kept = settings_of(config["settings"])
    for name, value in given.items():
        if getattr(kept, name) != value:
            raise InputError(
                f"the run in {out} has {name} {getattr(kept, name)!r}, not {value!r}; leave that "
                "out, or begin a new run without --resume"
            )
    torch.set_num_threads(arguments.threads or config["threads"])
    return kept


def _out(arguments: Namespace, settings: Settings) -> str:
    return str(Path("runs", settings.name)) if arguments.out is None else arguments.out


@contextmanager
def _folder(arguments: Namespace, settings: Settings) -> Iterator[RunFolder]:
    out = _out(arguments, settings)
    opened = resumed_folder(out) if arguments.resume else claimed_folder(out, arguments.overwrite)
    with opened as folder:
        yield folder


def _begin(
    training: ImageTraining,
    folder: RunFolder,
    settings: Settings,
    device: torch.device,
    arguments: Namespace,
) -> list[Progress]:
    """The records so far: none, or those of the run that goes on."""
    count = parameter_count(training.net)
    verb = "going on with" if arguments.resume else "training"
    _tell(arguments, f"{verb} {settings.name}, {count:,} parameters, in {folder.path}")
    path = folder.path / SNAPSHOT
    if not arguments.resume:
        folder.begin(_config(settings, arguments))
        write_snapshot(path, training.state_dict(), device)
        return []
    state = read_snapshot(path, device)
    try:
        training.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not of this run; begin a new one without --resume") from error
    return [_record(line) for line in folder.go_on(training.step)]


def _record(line: dict[str, Any]) -> Progress:
    """A record of steps as it was; null was no finite number."""
    return Progress(**{**line, "loss": math.nan if line["loss"] is None else line["loss"]})


def _config(settings: Settings, arguments: Namespace) -> dict[str, Any]:
    """What it takes to repeat the run, or to go on with it."""
    return {
        "arguments": vars(arguments),
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


# --- doing it -------------------------------------------------------------------------------------


def _train(
    training: ImageTraining,
    folder: RunFolder,
    history: list[Progress],
    device: torch.device,
    arguments: Namespace,
) -> None:
    """Train to the end; every record goes into the history and the folder.

    A snapshot is kept at an interval and, before the program ends, on Ctrl-C and SIGTERM.
    """
    path, due = folder.path / SNAPSHOT, Interval(arguments.save_every)
    with postponed_signals() as is_asked_to_stop, _shown(arguments) as show:
        for record in training:
            folder.add_step(asdict(record))
            history.append(record)
            show(record)
            stops = is_asked_to_stop()
            if stops or due.is_over() or training.is_done:
                write_snapshot(path, training.state_dict(), device)
            if stops:
                raise KeyboardInterrupt(
                    f"`cnf mnist classify --resume --out {folder.path}` goes on from here"
                )


@contextmanager
def _shown(arguments: Namespace) -> Iterator[Any]:
    """A function that shows a record: a bar on stderr where that is a terminal, and a line whenever
    the images held back were judged.
    """
    is_drawn = sys.stderr.isatty() and not arguments.quiet
    with tqdm(
        file=sys.stderr, disable=not is_drawn, leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {desc}",
    ) as bar:  # fmt: skip

        def show(record: Progress) -> None:
            if arguments.quiet:
                return
            text = _progress(record)
            if record.validation is not None:
                line = f"step {record.step:,} of {record.steps:,} · {text}"
                tqdm.write(line, file=sys.stderr)
            bar.total, bar.n = record.steps, record.step
            bar.set_description_str(text, refresh=False)
            bar.update(0)

        yield show


def _progress(record: Progress) -> str:
    parts = [f"loss {record.loss:.3f}"]
    if record.error is not None:
        parts.append(f"accuracy {100 * (1 - record.error):.1f} %")
    if record.validation is not None:
        parts.append(f"validation error {100 * record.validation:.2f} %")
    if record.nfe is not None:
        parts.append(f"NFE {record.nfe} + {record.nfe_backward}")
    if record.skipped:
        parts.append(f"{record.skipped} batches skipped")
    return " · ".join([*parts, f"{record.remaining:.0f} s left"])


def _figures(
    training: ImageTraining, history: list[Progress], settings: Settings, arguments: Namespace
) -> dict[str, Any]:
    """What the selected weights are worth; the test images are read here, and only here."""
    net, parts = training.net, training.split
    held = judge(net, parts.validation_images, parts.validation_labels)
    solvers = _solvers(training, held, arguments) if settings.net in ODE_NETS else {}
    _tell(arguments, "judging by the test images")
    test = judge(net, parts.test_images, parts.test_labels)
    spent = [record.nfe_backward for record in history if record.nfe_backward is not None]
    return {
        "data": settings.dataset,
        "net": settings.net,
        "test_error": test.error,
        "test_standard_error": test.standard_error,
        "test_nll": test.nll,
        "validation_error": held.error,
        "nfe": test.nfe,
        "nfe_backward": spent[-1] if spent else None,
        "parameters": parameter_count(net),
        "steps": training.step,
        "skipped": training.skipped,
        "training_seconds": history[-1].seconds,
        "rows": {
            "train": len(parts.labels),
            "validation": len(parts.validation_labels),
            "test": len(parts.test_labels),
        },
        "solvers": solvers,
        "confusion": test.confusion.tolist(),
    }


def _solvers(
    training: ImageTraining, trained: Judgement, arguments: Namespace
) -> dict[str, dict[str, Any]]:
    """Error and evaluations with each of the solvers, on the images held back.

    Says so where the net needs the solver that it was trained with.
    """
    parts = training.split
    _tell(arguments, "judging with other solvers")
    images, labels = parts.validation_images, parts.validation_labels
    judged = dict(judge_solvers(training.net, images, labels, SOLVERS))
    if depends_on_solver(trained, judged[FINE], labels):
        print(
            f"cnf: warning: the net is no ODE, but its solver's steps: with {FINE} the validation "
            f"error is {100 * judged[FINE].error:.2f} %, with those steps "
            f"{100 * trained.error:.2f} %; train with shorter steps to use it with another solver",
            file=sys.stderr,
        )
    return {
        name: {"validation_error": one.error, "nfe": one.nfe, "seconds": one.seconds}
        for name, one in judged.items()
    }


def _draw(
    folder: Path, history: list[Progress], figures: dict[str, Any], settings: Settings
) -> None:
    seconds = [record.seconds for record in history]
    judged = [record for record in history if record.validation is not None]

    def counts(name: str) -> list[float]:
        found = (getattr(record, name) for record in history)
        return [math.nan if value is None else value for value in found]

    figure = classifier_figure(
        seconds,
        [record.loss for record in history],
        [record.seconds for record in judged],
        [record.validation or 0.0 for record in judged],
        counts("nfe"),
        counts("nfe_backward"),
        settings.name,
    )
    save_figure(figure, folder / TRAINING)
    save_figure(confusion_figure(figures["confusion"], settings.name), folder / CONFUSION)


# --- telling --------------------------------------------------------------------------------------


def _tell(arguments: Namespace, message: str) -> None:
    if not arguments.quiet:
        print(message, file=sys.stderr)


def _lines(figures: dict[str, Any]) -> list[str]:
    count = figures["rows"]["test"]
    wrong = round(figures["test_error"] * count)
    error, standard = 100 * figures["test_error"], 100 * figures["test_standard_error"]
    lines = [
        ("test error", f"{error:.2f} ± {standard:.2f} %, {wrong} of {count:,} images"),
        ("validation", f"{100 * figures['validation_error']:.2f} %, which selected the weights"),
        ("parameters", f"{figures['parameters']:,}"),
    ]
    if figures["nfe"] is not None:
        lines.append(
            ("evaluations", f"{figures['nfe']:g} forward, {figures['nfe_backward']} backward")
        )
    if figures["skipped"]:
        lines.append(("skipped", f"{figures['skipped']:,} batches whose loss was not finite"))
    for i, (name, one) in enumerate(figures["solvers"].items()):
        judged = f"{name:<14}{100 * one['validation_error']:.2f} %, {one['nfe']:g} evaluations"
        lines.append(("with solver" if i == 0 else "", judged))
    trained, total = figures["training_seconds"], figures["seconds"]
    names = ", ".join(sorted(path.name for path in Path(figures["run"]).iterdir()))
    lines += [
        ("time", f"{trained:.1f} s for {figures['steps']:,} steps, {total:.1f} s in all"),
        ("files", f"{figures['run']}: {names}"),
    ]
    return [f"{name:<14}{text}" for name, text in lines]
