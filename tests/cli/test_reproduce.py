"""`cnf reproduce`: figures and the table, with the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from cnf.cli import classify, reproduce

TINY = (
    "--dataset", "digits", "--width", "4", "--stem", "fine", "--steps", "3", "--batch-size", "32"
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.setattr(classify, "SOLVERS", {"dopri5, 1e-5": {"method": "dopri5", "rtol": 1e-5}})


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
    assert [step for step, _ in found["training"]] == [1, 2, 3]
    monkeypatch.setattr(classify, "classified", lambda arguments: pytest.fail("trained again"))
    assert cnf_command("reproduce", "fig3", "--quick").code == 0


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
    header, mlp, odenet = out.splitlines()
    assert header == reproduce.HEADER
    assert mlp.startswith("mlp ") and "(2)" in mlp and mlp.endswith("–")
    assert odenet.startswith("odenet-adjoint ") and not odenet.endswith("–")


def test_runs_of_other_settings_are_not_taken_for_these(cnf_command, monkeypatch) -> None:
    command = ("reproduce", "table1", "--quick", "--rows", "mlp")
    assert cnf_command(*command).code == 0
    monkeypatch.setattr(reproduce, "QUICK", (*TINY, "--lr", "0.1"))
    outcome = cnf_command(*command)
    assert outcome.code == 2 and "mlp-0 holds a run of other settings" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fig9",), "invalid choice: 'fig9'"),
        (("table1", "--quick", "--rows", "vgg"), "'vgg' is no row of the table"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], words: str, cnf_command) -> None:
    outcome = cnf_command("reproduce", *arguments)
    assert outcome.code == 2 and words in outcome.err
