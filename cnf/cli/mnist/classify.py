"""`cnf mnist classify`: images in; a trained net, its error and its figures out."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import (
    CONFUSION,
    FIGURES,
    SNAPSHOT,
    TRAINING,
    json_text,
    unfinished,
)
from cnf.cli.mnist.classifier import settings_of, write_classifier
from cnf.cli.resumption import other_setting
from cnf.cli.training import (
    begun,
    config_of,
    costs_told,
    given_settings,
    opened_folder,
    out_of,
    settings_kept,
    stopped_config,
    tell,
    train_on,
)
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
from cnf.odenet.settings import ODE_NETS, QUICK, Settings, chosen
from cnf.plot import classifier_figure, confusion_figure, save_figure
from cnf.training.loop import Progress
from cnf.training.ranks import here
from cnf.training.seed import seeded
from cnf.training.snapshot import Snapshots


def run(arguments: Namespace) -> None:
    """Train, select, judge and draw; the figures go to stdout and into the run folder."""
    figures = classified(arguments)
    if not here().is_first:
        return
    print(json_text(figures) if arguments.json else "\n".join(_lines(figures)))


def classified(arguments: Namespace) -> dict[str, Any]:
    """The figures of a run, which is in its folder when they come; none for ranks but the first."""
    start = time.perf_counter()
    settings = _settings(arguments)
    device = usable_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    download = not (arguments.no_download or arguments.data)
    data = images_of(settings.dataset, arguments.data, download)
    parts = split(data, settings.validation, settings.seed)
    with opened_folder(arguments, settings.name) as folder, seeded(settings.seed, device):
        net = build(settings, parts.shape, parts.classes).to(device)
        with here().together():
            training = ImageTraining(net, parts, settings)
            verb = "going on with" if arguments.resume else "training"
            count = parameter_count(net)
            tell(arguments, f"{verb} {settings.name}, {count:,} parameters, in {folder.path}")
            history = begun(training, folder, config_of(settings, arguments), device, arguments)
            train_on(training, folder, history, device, arguments, _told)
        if not here().is_first:
            return {}
        training.select()
        write_classifier(folder.path, net, settings, parts.shape, parts.classes)
        figures = _figures(training, history, settings, arguments)
        figures |= {"run": str(folder.path), "seconds": time.perf_counter() - start}
        _draw(folder.path, history, figures, settings)
        folder.write_json(FIGURES, figures)
        Snapshots(folder.path / SNAPSHOT).remove()
    return figures


# --- what to do -----------------------------------------------------------------------------------


def _settings(arguments: Namespace) -> Settings:
    """Of the preset and the arguments; of the run itself where it is resumed."""
    given = given_settings(arguments, Settings)
    wanted = chosen(arguments.preset, given)
    if not arguments.resume:
        return wanted
    arguments.out = arguments.out or unfinished(out_of(arguments, wanted.name))
    config = stopped_config(arguments.out)
    kept = settings_kept(arguments, config, given, settings_of, "classifier")
    preset = (config.get("arguments") or {}).get("preset") or QUICK
    if arguments.preset not in (None, preset):
        raise other_setting(arguments.out, "preset", preset, arguments.preset)
    return kept


# --- doing it -------------------------------------------------------------------------------------


def _told(record: Progress) -> str:
    parts = [f"loss {record.loss:.3f}"]
    if record.error is not None:
        parts.append(f"accuracy {100 * (1 - record.error):.1f} %")
    if record.validation is not None:
        parts.append(f"validation error {100 * record.validation:.2f} %")
    return " · ".join([*parts, *costs_told(record)])


def _figures(
    training: ImageTraining, history: list[Progress], settings: Settings, arguments: Namespace
) -> dict[str, Any]:
    """What the selected weights are worth; the test images are read here, and only here."""
    net, parts = training.net, training.split
    held = judge(net, parts.validation_images, parts.validation_labels)
    solvers = _solvers(training, held, arguments) if settings.net in ODE_NETS else {}
    tell(arguments, "judging by the test images")
    test = judge(net, parts.test_images, parts.test_labels)
    spent = [record.nfe_backward for record in history if record.nfe_backward is not None]
    return {
        "data": settings.dataset,
        "net": settings.net,
        "test_error": test.error,
        "test_standard_error": test.standard_error,
        "test_nll": test.nll,
        "wrong": torch.nonzero(test.predictions != parts.test_labels).flatten().tolist(),
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
    tell(arguments, "judging with other solvers")
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
