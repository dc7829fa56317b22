"""`cnf plot`: a picture of each kind, and what cannot be drawn is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from cnf.cli.plot import KINDS

TINY = ("--steps", "3", "--hidden", "8,8", "--batch-size", "32", "--quiet")

STILL = [name for name, kind in KINDS.items() if ".png" in kind.suffixes]


@pytest.mark.parametrize("what", STILL)
def test_every_kind_is_drawn_into_the_run_folder(what: str, moons: Path, cnf_command) -> None:
    shutil.copytree(moons, "run")
    code, out, err = cnf_command("plot", "run", "--what", what)
    assert (code, err) == (0, "") and out.endswith(f"run/{what}.png\n")
    picture = imread(f"run/{what}.png")[..., :3]
    assert min(picture.shape[:2]) >= 300 and (picture < 0.9).any()


def test_an_animation_is_a_gif_that_moves(moons: Path, cnf_command) -> None:
    shutil.copytree(moons, "run")
    assert cnf_command("plot", "run", "--what", "animation").code == 0
    with Image.open("run/animation.gif") as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 3, 0)


@pytest.mark.parametrize("what", KINDS)
def test_every_kind_is_named_on_the_help_page(what: str, capsys, cnf_command) -> None:
    assert f"\n  {what} " in cnf_command("plot", "--help").out


def test_a_picture_goes_where_it_is_asked_to(moons: Path, cnf_command) -> None:
    outcome = cnf_command("plot", moons, "--what", "training", "-o", "t.svg", "--json")
    assert json.loads(outcome.out) == {"file": "t.svg", "what": "training"}
    assert Path("t.svg").read_text().startswith("<?xml")


def test_the_columns_of_a_table_keep_their_names(named: Path, cnf_command) -> None:
    assert cnf_command("plot", named, "--what", "pairs", "-o", "p.svg").code == 0
    assert cnf_command("plot", named, "--what", "density", "-o", "p.png").code == 0


def test_a_file_of_the_user_is_replaced_only_on_request(moons: Path, refusal, cnf_command) -> None:
    Path("t.png").write_text("mine")
    arguments = ("plot", moons, "--what", "training", "-o", "t.png")
    assert "t.png exists" in refusal(*arguments)
    assert cnf_command(*arguments, "--overwrite").code == 0
    assert imread("t.png").size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--what", "lines"), "--what lines is no kind of picture; known are density, samples"),
        (("--what", "training", "-o", "t.txt"), "is no file for training; give it the suffix .png"),
        (("--what", "animation", "-o", "a.png"), "no file for animation; give it the suffix .gif"),
        (("--what", "training", "-o", "no/t.png"), "there is no folder no to write t.png to"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, words: str, moons: Path, refusal) -> None:
    assert words in refusal("plot", moons, *arguments)


@pytest.mark.parametrize("content", ["", "[]\n", '{"step": 1}\n', "nonsense"])
def test_a_damaged_record_of_steps_is_refused(content: str, moons: Path, refusal) -> None:
    shutil.copytree(moons, "run")
    Path("run/metrics.jsonl").write_text(content)
    assert "metrics.jsonl" in refusal("plot", "run", "--what", "training")


def test_a_table_that_is_gone_is_named(named: Path, refusal) -> None:
    shutil.copytree(named, "run")
    config = json.loads(Path("run/config.json").read_text())
    config["data"]["file"] = "gone.csv"
    Path("run/config.json").write_text(json.dumps(config))
    assert "gone.csv" in refusal("plot", "run", "--what", "pairs")


def test_what_needs_a_plane_is_refused_elsewhere(cnf_command, refusal) -> None:
    for columns in (1, 3):
        np.save(f"t{columns}.npy", np.random.default_rng(0).normal(size=(40, columns)))
        assert cnf_command("fit", f"t{columns}.npy", "--out", f"r{columns}", *TINY).code == 0
        assert "for flows of two columns" in refusal("plot", f"r{columns}", "--what", "field")
        assert cnf_command("plot", f"r{columns}", "--what", "trajectories").code == 0
    assert "has one column" in refusal("plot", "r1", "--what", "animation")
    assert cnf_command("plot", "r3", "--what", "animation").code == 0
    assert cnf_command("plot", "r3", "--what", "samples").code == 0


@pytest.mark.parametrize("more", [("t.csv",), ("--columns", "a")])
def test_rows_that_would_not_be_looked_at_are_refused(more, moons: Path, refusal) -> None:
    sentence = refusal("plot", moons, *more, "-o", "x.png")
    assert f"{more[0]} is for --what tradeoff; --what density draws the run's own" in sentence


def test_the_seed_is_that_of_the_samples_beside_a_density(moons: Path, cnf_command) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert cnf_command("plot", moons, "--seed", seed, "-o", f"{name}.png").code == 0
    one, same, other = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert one == same and one != other
