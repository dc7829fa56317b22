"""What the pages say is so: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import nn

import cnf
from cnf.cli.parser import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("the documentation is not part of the package", allow_module_level=True)
ROOT_PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
PAGES = {path.name: path for path in (*ROOT_PAGES, *sorted(DOCS.glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch hides it itself
]


def blocks(name: str, kinds: tuple[str, ...]) -> list[str]:
    """The fenced blocks of a page that are of these kinds, flush left."""
    found = FENCE.finditer(TEXTS[name])
    return [inspect.cleandoc(f"\n{text}") for _, kind, text in (f.groups() for f in found)
            if kind in kinds]  # fmt: skip


# code ---------------------------------------------------------------------------------------


def some(name: str) -> dict[str, Any]:
    """What a page takes as given, for it shows what to do with it."""
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    common = {"cnf": cnf, "torch": torch, "nn": nn, "math": math, "x": torch.randn(300, 2)}
    ode = {
        "field": lambda t, y: torch.tanh(net(y)) * torch.cos(t.reshape(-1, 1)),
        "y0": torch.randn(6, 2),
        "W1": torch.randn(2, 3, requires_grad=True),
        "W2": torch.randn(3, 2),
    }
    given = {
        "README.md": ode,
        "images.md": {
            "flow": cnf.ImageFlow((1, 8, 8), classes=10, width=8, levels=17, step_size=0.5),
            **{name: torch.randint(17, (10, 1, 8, 8)) for name in ("images", "a", "b")},
            "labels": torch.arange(10),
            "mask": torch.rand(1, 8, 8) < 0.5,
        },
        "solve.md": ode,
        "flows.md": {"context": torch.randn(300, 3), "c": torch.randn(1000, 3)},
        "training.md": {"batch": torch.randn(64, 2), "flow": cnf.Flow(2, hidden=(8, 8))},
        "surviving.md": {
            "module": cnf.FlowMatching(cnf.Flow(2, hidden=(8, 8))),
            "batches": lambda: torch.randn(16, 2),
            "validate": lambda: 0.0,
            "device": torch.device("cpu"),
        },
        "odenet.md": {"images": torch.rand(4, 1, 28, 28), "labels": torch.tensor([0, 1, 2, 3])},
    }
    return common | given.get(name, {})


LATER: dict[str, str] = {  # what a page's code needs that only a long run leaves behind
    "odenet.md": "torch.export.load|cnf.data.mnist",
    "images.md": "cnf.data.mnist",
    "scale.md": "init_process_group",
}


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """Fits of a few steps, whatever a page says; results in a folder that goes."""
    for name in ("fit", "fit_to_density"):
        monkeypatch.setattr(cnf.Flow, name, shortened(getattr(cnf.Flow, name)))
    monkeypatch.setattr("cnf.flow.check.CELLS", 40)
    monkeypatch.setattr("cnf.flow.check.ROWS", 10)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


def shortened(fit: Any) -> Any:
    """The same with three steps in the place of its budget, on a thousand rows."""

    def fit_briefly(self: Any, x: Any, *rest: Any, **settings: Any) -> Any:
        inspect.signature(fit).bind(self, x, *rest, **settings)
        settings = {name: value for name, value in settings.items() if name != "seconds"}
        settings |= {"steps": 3, "progress": False, "batch_size": 64}
        return fit(self, x, *rest, **settings)

    return fit_briefly


def runnable(name: str) -> list[str]:
    skipped = LATER.get(name)
    return [small(block) for block in blocks(name, ("python",))
            if skipped is None or not re.search(skipped, block)]  # fmt: skip


def small(code: str) -> str:
    """The code with few rows, and few steps of a loop of one's own."""
    code = re.sub(r"\b\d+_000\b", "300", code)
    return re.sub(r"(range\(|steps ?= ?)\d{3,}", r"\g<1>3", code)


@pytest.mark.parametrize("name", [name for name in PAGES if runnable(name)])
def test_the_code_of_a_page_runs(name, brief):
    names = some(name)
    for block in runnable(name):
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, ("pycon",))])
def test_the_doctests_of_a_page_pass(name, brief):
    text = "\n\n".join(blocks(name, ("pycon",)))
    case = doctest.DocTestParser().get_doctest(text, some(name), name, name, 0)
    assert doctest.DocTestRunner(verbose=False).run(case).failed == 0


TUTORIALS = sorted(path.name for path in DOCS.glob("*.ipynb") if path.name != "mnist_odenet.ipynb")


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_the_code_of_a_tutorial_runs(name, brief, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    cells = json.loads((DOCS / name).read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = [line for line in cell["source"] if not line.startswith("%")]
            exec(compile(small("".join(lines)), name, "exec"), names)


def test_what_is_left_out_is_on_the_page():
    for name, pattern in LATER.items():
        found = [block for block in blocks(name, ("python",)) if re.search(pattern, block)]
        assert len(found) == len(pattern.split("|"))


# commands -----------------------------------------------------------------------------------


def commands(name: str) -> list[list[str]]:
    """The commands of a page's plain blocks, those of each line that && joins apart."""
    lines = (line for block in blocks(name, ("", "sh", "bash")) for line in block.splitlines())
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(part, comments=True) for part in parts if re.match("(cnf|python) ", part)]


def stated(name: str) -> list[list[str]]:
    """What stands in the text as a command of `cnf` or of a script, in full."""
    prose = FENCE.sub("", TEXTS[name])
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    whole = re.compile(r"cnf \w|python (benchmarks|examples)/")
    return [shlex.split(span) for span in spans if whole.match(span)]


PLACES = {"NAME": "moons", "FILE": "points.csv", "WHAT": "fig2", "K": "0", "N": "5", "S": "5"}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_parse(name, capsys):
    for words in commands(name) + stated(name):
        if words[0] != "cnf" or {"…", "...", "VERB"} & set(words):
            continue
        given = [PLACES.get(word, word) for word in words[1:]]
        if len(given) == 1 or "--help" in given:  # the verb's name alone
            with pytest.raises(SystemExit):
                parse([*given[:1], "--help"], "")
        else:
            parse(given, "")


@pytest.mark.parametrize("name", PAGES)
def test_the_scripts_of_a_page_take_the_options_that_it_gives(name):
    for words in commands(name) + stated(name):
        if words[0] == "python" and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            for option in (word for word in words[2:] if word.startswith("--")):
                assert f'"{option}"' in source, f"{words[1]} has no {option}"


# links --------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    text, here = FENCE.sub("", TEXTS[name]), PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = here.parent / path if path else here
        assert place.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{name} links to {target}"
    for target in re.findall(r"\{doc\}`([^`]+)`", text):
        assert any((DOCS / f"{target}{end}").exists() for end in (".md", ".ipynb")), target


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_a_page_names_are_there(name):
    own = re.compile(r"`((?:docs|examples|benchmarks|tests|cnf|\.ci|\.github)/[\w./]+\.\w+)`")
    for path in own.findall(TEXTS[name]):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", "\n".join(blocks("index.md", ("{toctree}",))), re.M))
    pages = {path.stem for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} - {"index"}
    assert listed == pages


def test_every_public_name_is_in_the_reference():
    text = TEXTS["api.md"]
    rooms = {"compat", "data", "nets", "sklearn"}
    listed = set(re.findall(r"cnf\.(\w+)$", text, re.MULTILINE))
    assert set(cnf.__all__) - rooms <= listed
    nets = re.findall(r"cnf\.nets\.(\w+)$", text, re.MULTILINE)
    from cnf import nets as room

    assert set(nets) == set(room._EXPORTS)
