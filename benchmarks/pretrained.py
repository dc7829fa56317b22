"""Put the flow of a finished run of `cnf mnist generate` into the package.

    python benchmarks/pretrained.py runs/mnist-flow

Weights, what it takes to repeat the training, and its figures; nothing that names this machine.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import cnf
from cnf.cli.folder import CONFIG, FIGURES, MODEL, json_text, read_json
from cnf.cli.mnist.image_parser import FLAGS_OFF
from cnf.flow.image_settings import ImageSettings, image_settings

LARGEST = 2 * 2**20  # bytes of the weights
PLACE = Path(cnf.__file__).parent / "pretrained"
NOT_TOLD = ("run", "classifier", "seconds")  # of the figures: places, and a time of no meaning


def command_of(settings: ImageSettings) -> str:
    """The command that trains by these settings."""
    usual = image_settings({"dataset": settings.dataset})
    words = ["cnf", "mnist", "generate"]
    for one in fields(settings):
        value = getattr(settings, one.name)
        if one.name == "dataset" or value == getattr(usual, one.name):
            continue
        flag = f"--{one.name.replace('_', '-')}"
        words += [FLAGS_OFF[one.name]] if one.name in FLAGS_OFF else [flag, str(value)]
    if settings.dataset != "mnist":
        words += ["--dataset", settings.dataset]
    return shlex.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--name", default="mnist")
    arguments = parser.parse_args()
    folder: Path = arguments.run_folder
    config, figures = read_json(folder / CONFIG), read_json(folder / FIGURES)
    weights = (folder / MODEL).read_bytes()
    if len(weights) > LARGEST:
        raise SystemExit(f"{folder / MODEL} has {len(weights):,} bytes, more than {LARGEST:,}")
    cnf.ImageFlow.load(folder / MODEL)
    told: dict[str, Any] = {
        "command": command_of(ImageSettings(**config["settings"])),
        **{name: config[name] for name in ("settings", "threads", "versions", "hardware")},
    }
    worth = {name: value for name, value in figures.items() if name not in NOT_TOLD}
    PLACE.mkdir(exist_ok=True)
    (PLACE / f"{arguments.name}.safetensors").write_bytes(weights)
    for suffix, value in ((".json", told), (".metrics.json", worth)):
        text = f"{json_text(value, indent=2)}\n"
        (PLACE / f"{arguments.name}{suffix}").write_text(text, encoding="utf-8")
    print(f"{told['command']}\n{len(weights):,} bytes in {PLACE}")


if __name__ == "__main__":
    main()
