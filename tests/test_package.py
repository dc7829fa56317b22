"""What is installed: a light import, a typed package, one version, and a floor for every file."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import cnf

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import cnf", "import cnf; dir(cnf)"])
def test_import_does_not_wait_for_heavy_libraries(statement: str) -> None:
    heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "pandas"}
    assert not modules_after(statement) & heavy


FIRST_USE = """
import time, torch
start = time.process_time()  # of the processor: others may keep it busy
import cnf
cnf.{name}
print(time.process_time() - start)
"""


@pytest.mark.parametrize("name", ["Flow", "solve", "ODENet"])
def test_the_first_use_of_a_name_costs_little_beyond_torch(name: str) -> None:
    def spent() -> float:
        code = FIRST_USE.format(name=name)
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return float(run.stdout)

    # the second time its bytecode is kept; twice 0.3 s, for a machine that is slow
    assert min(spent() for _ in range(3)) < 0.6


def test_figures_need_no_torch_and_no_pyplot() -> None:
    assert not modules_after("import cnf.plot") & {"torch", "matplotlib.pyplot"}


@pytest.mark.parametrize("name", cnf.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(cnf, name) is not None
    assert name in dir(cnf)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'cnf' has no attribute 'odeint'"):
        cnf.odeint  # noqa: B018


def test_version_is_that_of_the_installed_package() -> None:
    assert cnf.__version__ == version("cnf-torch")


def test_types_are_shipped() -> None:
    assert (Path(cnf.__file__).parent / "py.typed").is_file()


def test_every_file_stands_on_a_floor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floors = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {room.strip("() ") for floor in floors for room in floor.replace("|", ":").split(":")}
    files = (path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("cnf/**/*.py"))
    modules = {".".join(path.parts) for path in files if path.name != "__init__"}
    homeless = {m for m in modules if not any(f"{m}.".startswith(f"{room}.") for room in rooms)}
    assert not homeless, "name their floor in pyproject.toml"
