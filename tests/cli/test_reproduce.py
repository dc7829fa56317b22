"""`cnf reproduce`: figures and the table, with the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from cnf.cli import finished, reproduce
from cnf.cli.mnist import classify
from cnf.cli.reproduce import adjoint, table1
from cnf.cli.reproduce.footprint import Footprint

TINY = (
    "--dataset", "digits", "--width", "4", "--stem", "fine", "--steps", "3", "--batch-size", "32"
)  # fmt: skip
SIZE = Footprint("evaluation", (24, 48), (2.0**20, 3 * 2.0**20), (0.5, 0.75), "a machine")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "QUICK", TINY)
    monkeypatch.setattr(classify, "SOLVERS", {"dopri5, 1e-5": {"method": "dopri5", "rtol": 1e-5}})
    monkeypatch.setattr(table1, "footprint", lambda *asked: SIZE)


# figures ------------------------------------------------------------------------------------------


def test_errors_fall_at_the_order_of_each_method(cnf_command) -> None:
    code, out, err = cnf_command("reproduce", "fig2", "--quick", "--json")
    assert code == 0 and "drawn in runs/fig2/fig2.png" in err
    assert imread("runs/fig2/fig2.png").ndim == 3
    found = json.loads(out)
    assert found == json.loads(Path("runs/fig2/fig2.json").read_text())
    for name, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        (_, coarse), (_, fine) = found["errors"][name][-2:]
        assert 0.7 * 2**order < coarse / fine < 1.6 * 2**order


def test_costs_are_measured_on_a_net_that_is_trained_once(cnf_command, monkeypatch) -> None:
    code, out, _ = cnf_command("reproduce", "fig3", "--quick", "--json")
    assert code == 0 and imread("runs/fig3/fig3.png").ndim == 3
    found = json.loads(out)
    spent = [one["nfe"] for one in found["costs"]]
    errors = [one["error"] for one in found["costs"]]
    assert spent == sorted(spent) and errors[-1] < errors[0] < 1
    assert all(one["nfe_backward"] > 0 for one in found["costs"])
    assert [step for step, *_ in found["training"]] == [1, 2, 3]
    monkeypatch.setattr(classify, "classified", lambda arguments: pytest.fail("trained again"))
    assert cnf_command("reproduce", "fig3", "--quick").code == 0
    code, out, _ = cnf_command(
        "reproduce", "fig3", "--quick", "--run", "runs/fig3/odenet", "--out", "o"
    )
    assert code == 0 and out.startswith("rtol 1e-01: ") and imread("o/fig3.png").ndim == 3


def test_costs_are_those_of_an_ode(cnf_command) -> None:
    train = ("mnist", "classify", *TINY, "--net", "mlp", "--out", "mlp", "--quiet")
    assert cnf_command(*train).code == 0
    outcome = cnf_command("reproduce", "fig3", "--run", "mlp")
    assert outcome.code == 2 and "the net in mlp has no ODE" in outcome.err


def test_the_chain_rule_comes_to_the_adjoint_at_first_order(cnf_command) -> None:
    code, out, _ = cnf_command("reproduce", "adjoint", "--json")
    assert code == 0 and imread("runs/adjoint/adjoint.png").ndim == 3
    rows = json.loads(out)["rows"]
    assert [row["layers"] for row in rows] == list(adjoint.LAYERS)
    for name in ("to_ode", "adjoint", "adjoint_weights"):
        assert rows[0][name] > 0.02
        assert rows[-2][name] / rows[-1][name] == pytest.approx(2, rel=0.1)


# the table ----------------------------------------------------------------------------------------


def test_the_table_goes_on_where_it_stopped(cnf_command, monkeypatch) -> None:
    rows = ("--rows", "mlp,odenet-adjoint", "--seeds", 2)
    trained = []
    whole = classify.classified

    def counted(arguments):
        trained.append(Path(arguments.out).name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole(arguments)

    monkeypatch.setattr(classify, "classified", counted)
    assert cnf_command("reproduce", "table1", "--quick", *rows).code == 130
    code, out, _ = cnf_command("reproduce", "table1", "--quick", *rows)
    assert code == 0
    assert trained == ["mlp-0", "mlp-1", "odenet-adjoint-0", "odenet-adjoint-0", "odenet-adjoint-1"]
    header, mlp, *_ = out.splitlines()
    assert header.split() == " ".join(table1.HEADER).split()
    assert mlp.startswith("mlp ") and "(2 seeds)" in mlp
    line = next(line for line in out.splitlines() if line.startswith("odenet-adjoint "))
    assert "  1    +0.08 an evaluation  500  +10.4 an evaluation" in line


def test_rows_are_paired_and_those_not_run_say_how(cnf_command) -> None:
    rows = ("--rows", "resnet,one-block", "--train-only")
    assert cnf_command("reproduce", "table1", "--quick", *rows).code == 0
    assert cnf_command("reproduce", "table1", "--quick", *rows, "--seed", 3).code == 0
    code, out, _ = cnf_command("reproduce", "table1", "--quick", "--no-training", "--json")
    found = json.loads(out)["rows"]
    assert code == 0 and found.keys() == table1.ROWS.keys()
    assert found["resnet"]["seeds"] == found["one-block"]["seeds"] == [0, 3]
    assert found["resnet"]["difference"] is None
    difference = found["one-block"]["difference"]
    both = (found[row]["error"]["mean"] for row in ("one-block", "resnet"))
    assert difference["mean"] == pytest.approx(next(both) - next(both)) and difference["over"]
    command = "cnf reproduce table1 --rows mlp --out runs/table1 --quick"
    assert found["mlp"]["command"] == command and "error" not in found["mlp"]
    assert found["mlp"]["parameters"] > 0 and found["mlp"]["footprint"]["machine"] == "a machine"
    text = cnf_command("reproduce", "table1", "--quick", "--no-training").out
    assert f"mlp was not run: {command}" in text and "mlp                not run" in text


def test_one_seed_is_judged_over_images() -> None:
    ours = {"test_error": 0.2, "rows": {"test": 10}, "wrong": [1, 2], "test_standard_error": 0.13}
    theirs = ours | {"test_error": 0.1, "wrong": [1]}
    found = table1.paired_difference({0: ours}, {0: theirs, 1: theirs})
    assert found is not None
    assert found == {
        "mean": pytest.approx(0.1),
        "standard_error": pytest.approx(0.1),
        "over": "images",
    }
    assert table1.paired_difference({0: ours}, {1: theirs}) is None
    assert table1.mean_error({0: ours})["standard_error"] == 0.13
    several = table1.mean_error({0: ours, 1: theirs})
    assert (several["mean"], several["standard_error"]) == (
        pytest.approx(0.15),
        pytest.approx(0.05),
    )


def test_runs_of_other_settings_are_not_taken_for_these(cnf_command, monkeypatch) -> None:
    command = ("reproduce", "table1", "--quick", "--rows", "mlp")
    assert cnf_command(*command).code == 0
    monkeypatch.setattr(finished, "QUICK", (*TINY, "--lr", "0.1"))
    outcome = cnf_command(*command)
    assert outcome.code == 2 and "mlp-0 holds a run of other settings" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fig9",), "invalid choice: 'fig9'"),
        (("table1", "--quick", "--rows", "vgg"), "'vgg' is no row of the table"),
        (("table1", "--train-only", "--no-training"), "not allowed with argument"),
        (("fig3", "--run", "nowhere"), "nowhere holds no model.safetensors"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], words: str, cnf_command) -> None:
    outcome = cnf_command("reproduce", *arguments)
    assert outcome.code == 2 and words in outcome.err


def test_a_gpu_is_not_promised_where_none_is_used(cnf_command) -> None:
    outcome = cnf_command("reproduce", "fig2", "--device", "nonsense")
    assert outcome.code == 2 and "nonsense" in outcome.err
    outcome = cnf_command("reproduce", "fig2", "--device", "meta")
    assert outcome.code == 2 and not Path("runs/fig2/fig2.png").exists()


def test_threads_are_given_to_torch(cnf_command) -> None:
    before = torch.get_num_threads()
    try:
        assert cnf_command("reproduce", "fig2", "--threads", "1", "--quiet").code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_errors_of_the_polygons_are_a_table(cnf_command) -> None:
    head, first, *rest = cnf_command("reproduce", "fig2", "--quiet").out.splitlines()
    assert head.split() == ["evaluations", "euler", "midpoint", "rk4"]
    assert first.split()[0] == "8" and len(rest) == 8


def test_a_folder_that_cannot_be_made_is_said(cnf_command) -> None:
    Path("f").write_text("mine")
    outcome = cnf_command("reproduce", "fig2", "--out", "f")
    assert outcome.code == 2 and "the folder f cannot be made (File exists); choose" in outcome.err


def test_what_was_stopped_on_the_way_to_a_figure_goes_on_by_the_same_command(
    cnf_command, monkeypatch
) -> None:
    def stopped(out, arguments):
        raise KeyboardInterrupt("`cnf mnist classify --resume --out x` goes on from here")

    monkeypatch.setitem(reproduce.MAKERS, "fig3", stopped)
    outcome = cnf_command("reproduce", "fig3")
    assert outcome.code == 130
    assert outcome.err == "cnf: interrupted; the same command goes on from here\n"
