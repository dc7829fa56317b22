"""`cnf mnist generate`: images in; a flow that draws such images, its figures and pictures out."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.cli.device import usable_device
from cnf.cli.folder import (
    FIGURES,
    MODEL,
    SNAPSHOT,
    RunFolder,
    json_text,
    read_config,
    records_in,
    unfinished,
)
from cnf.cli.mnist.image_picture import save_pictures
from cnf.cli.mnist.image_report import (
    density_figures,
    density_lines,
    judging_net,
    named_classifier,
    sample_figures,
    sample_lines,
)
from cnf.cli.mnist.image_run import read_image_run
from cnf.cli.mnist.pixels import Part, Pixels, pixels_of
from cnf.cli.picture import save_training
from cnf.cli.training import (
    begun,
    config_of,
    costs_told,
    given_settings,
    is_trained,
    opened_folder,
    out_of,
    settings_kept,
    stopped_config,
    tell,
    train_on,
)
from cnf.flow.image import ImageFlow
from cnf.flow.image_recipe import ImageTraining
from cnf.flow.image_settings import ImageSettings, image_settings
from cnf.odenet.network import parameter_count
from cnf.training.loop import Progress
from cnf.training.ranks import here, parted
from cnf.training.seed import seeded
from cnf.training.snapshot import Snapshots

PHASES = {"fm": "flow matching", "ml": "maximum likelihood"}


def run(arguments: Namespace) -> None:
    """Train, judge and draw; the figures go to stdout and into the run folder."""
    figures = generated(arguments)
    if not figures:
        return
    print(json_text(figures) if arguments.json else "\n".join(_lines(figures)))


def generated(arguments: Namespace) -> dict[str, Any]:
    """The figures of a run, which is in its folder when they come; none for ranks but the first."""
    start = time.perf_counter()
    settings = _settings(arguments)
    arguments.device = arguments.device or "cpu"
    device = usable_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data = pixels_of(settings.dataset, arguments, settings.validation, settings.seed)
    if arguments.classifier is not None:  # hours before it is asked
        named_classifier(arguments.classifier, data)
    with _folder(arguments, settings) as folder:
        with here().together():
            flow, history = _trained(folder, data, settings, device, arguments)
        if not parted():  # the report is one process's work
            return {}
        net, classifier = judging_net(folder.path, data, arguments)
        tell(arguments, "judging by the test images, and drawing")
        with seeded(settings.seed, device):
            figures = _figures(flow, data, history, arguments)
            figures |= sample_figures(flow, net, data, arguments)
            save_pictures(flow, data, folder.path, arguments.guidance, arguments.nfe)
        save_training(history, folder.path, settings.name, None, "validation (bits/dim)")
        figures |= {
            "data": settings.dataset,
            "classifier": classifier,
            "run": str(folder.path),
            "seconds": time.perf_counter() - start,
        }
        folder.write_json(FIGURES, figures)
        Snapshots(folder.path / SNAPSHOT).remove()
    return figures


# --- what to do -----------------------------------------------------------------------------------


def _settings(arguments: Namespace) -> ImageSettings:
    """Of the arguments; of the run itself where it goes on."""
    given = given_settings(arguments, ImageSettings)
    wanted = image_settings(given)
    if not arguments.resume:
        return wanted
    arguments.out = arguments.out or unfinished(out_of(arguments, wanted.name))
    out = arguments.out
    config = read_config(Path(out)) if is_trained(out) else stopped_config(out)
    return settings_kept(arguments, config, given, image_settings, "flow over images")


@contextmanager
def _folder(arguments: Namespace, settings: ImageSettings) -> Iterator[RunFolder]:
    """The folder of the run: its own, where it is trained and its report is wanted anew."""
    out = out_of(arguments, settings.name)
    if arguments.resume and is_trained(out):
        yield RunFolder(Path(out))
        return
    with opened_folder(arguments, settings.name) as folder:
        yield folder


# --- doing it -------------------------------------------------------------------------------------


def _trained(
    folder: RunFolder,
    data: Pixels,
    settings: ImageSettings,
    device: torch.device,
    arguments: Namespace,
) -> tuple[ImageFlow, list[Progress]]:
    """The flow of the run, trained now unless the folder holds it; and the records of training."""
    if arguments.resume and is_trained(folder.path):
        tell(arguments, f"the flow in {folder.path} is trained")
        return read_image_run(folder.path, device).flow, records_in(folder.path)
    with seeded(settings.seed, device):
        flow = _flow(settings, data).to(device)
        training = _training(flow, data, settings)
        verb, count = ("going on with" if arguments.resume else "training"), parameter_count(flow)
        tell(arguments, f"{verb} {settings.name}, {count:,} parameters, in {folder.path}")
        history = begun(training, folder, config_of(settings, arguments), device, arguments)
        train_on(training, folder, history, device, arguments, _told)
        training.select()
    if here().is_first:
        flow.save(folder.path / MODEL)
    return flow.eval(), history


def _flow(settings: ImageSettings, data: Pixels) -> ImageFlow:
    """The flow of the settings, untrained."""
    return ImageFlow(
        data.shape,
        classes=data.classes if settings.conditional else 0,
        field=settings.field,
        width=settings.width,
        label_dropout=settings.label_dropout,
        dequantization=settings.dequantization,
        alpha=settings.alpha,
        levels=data.peak + 1,
        equalize=settings.equalize,
        precision=settings.precision,
        seed=settings.seed,
    )


def _training(flow: ImageFlow, data: Pixels, settings: ImageSettings) -> ImageTraining:
    def told(part: Part) -> tuple[Tensor, Tensor | None]:
        return part.pixels, part.labels if flow.classes else None

    return ImageTraining(
        flow, *told(data.train), validation=told(data.validation), settings=settings
    )


def _told(record: Progress) -> str:
    parts = [PHASES[record.phase], f"loss {record.loss:.3f}"]
    if record.validation is not None:
        parts.append(f"validation {record.validation:.4f} bits/dim")
    return " · ".join([*parts, *costs_told(record)])


# --- telling --------------------------------------------------------------------------------------


def _figures(
    flow: ImageFlow, data: Pixels, history: list[Progress], arguments: Namespace
) -> dict[str, Any]:
    """What the density is worth on test images, and what training took."""
    pixels = data.test.first(arguments.images).pixels
    return {
        **density_figures(flow, pixels, draws=arguments.draws, probes=arguments.probes),
        "parameters": parameter_count(flow),
        "steps": history[-1].step if history else 0,
        "skipped": history[-1].skipped if history else 0,
        "training_seconds": history[-1].seconds if history else 0.0,
        "rows": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
    }


def _lines(figures: dict[str, Any]) -> list[str]:
    folder = figures["run"]
    lines = [*density_lines(figures), *sample_lines(figures)]
    lines.append(("parameters", f"{figures['parameters']:,}"))
    if figures["skipped"]:
        lines.append(("skipped", f"{figures['skipped']:,} batches whose loss was not finite"))
    trained, total = figures["training_seconds"], figures["seconds"]
    names = ", ".join(sorted(path.name for path in Path(folder).iterdir()))
    lines += [
        ("time", f"{trained:.1f} s for {figures['steps']:,} steps, {total:.1f} s in all"),
        ("files", f"{folder}: {names}"),
        ("next", f"cnf mnist sample {folder} -n 64 -o samples.png"),
        ("", f"cnf mnist bpd {folder}"),
    ]
    return [f"{name:<14}{text}" for name, text in lines]
