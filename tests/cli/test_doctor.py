"""`cnf doctor`: what it says, and how it says that something is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import cnf
from cnf.cli import doctor
from cnf.data.idx import NAMES


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("CNF_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_sound_installation_is_told_so(cnf_command):
    code, out, err = cnf_command("doctor")
    assert (code, err) == (0, "")
    assert out.endswith("all is well\n") and "\x1b" not in out
    for word in (cnf.__version__, torch.__version__, "threads", "CNF_DATA", "MNIST", "log_prob"):
        assert word in out


def test_programs_read_one_object(cnf_command):
    code, out, err = cnf_command("doctor", "--json")
    found = json.loads(out)
    assert (code, err, found["faults"]) == (0, "", [])
    assert found["versions"]["torch"] == torch.__version__
    assert "cpu" in found["devices"] and found["threads"]["torch"] >= 1
    assert {trial["name"] for trial in found["self_test"]} == {"solver", "gradient", "log_prob"}
    assert all(trial["passed"] and trial["error"] < 1e-5 for trial in found["self_test"])


def test_a_set_is_found_where_all_its_files_are(cnf_command, tmp_path, monkeypatch):
    folder = tmp_path / "images" / "mnist"
    folder.mkdir(parents=True)
    for name, _ in NAMES:
        (folder / name).write_bytes(b"")
    monkeypatch.setenv("CNF_DATA", str(tmp_path / "images"))
    found = json.loads(cnf_command("doctor", "--json").out)["data"]
    assert found["mnist"] == str(folder) and found["kmnist"] is None
    (folder / NAMES[3][0]).unlink()
    assert json.loads(cnf_command("doctor", "--json").out)["data"]["mnist"] is None


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (lambda device: 0.3, "the self-test of the solver is off by 3.0e-01"),
        (lambda device: float("nan"), "the self-test of the solver is off by nan"),
        (lambda device: 1 / 0, "the self-test of the solver stopped (ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_ends_with_code_1_and_a_sentence(
    trial, words, flags, cnf_command, monkeypatch
):
    monkeypatch.setitem(doctor.TRIALS, "solver", trial)
    code, out, err = cnf_command("doctor", *flags)
    assert code == 1
    assert err.startswith(f"cnf: {words}") and err.count("\n") == 1
    assert "all is well" not in out
    if flags:
        assert [one["passed"] for one in json.loads(out)["self_test"]] == [False, True, True]
    else:
        assert "FAILED" in out


def test_a_data_folder_that_is_not_there_is_a_fault(cnf_command, tmp_path, monkeypatch):
    monkeypatch.setenv("CNF_DATA", str(tmp_path / "nowhere"))
    code, _, err = cnf_command("doctor")
    assert code == 1 and "CNF_DATA names" in err and "correct or unset it" in err


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "scipy is not installed"), ("1.2.3", "scipy is 1.2.3, but cnf needs 1.11")],
)
def test_a_package_that_is_missing_or_too_old_is_a_fault(version, words, cnf_command, monkeypatch):
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: version if p == "scipy" else known(p))
    code, _, err = cnf_command("doctor")
    assert code == 1 and words in err and "pip install" in err


def test_versions_compare_by_their_numbers():
    assert doctor._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor._numbers("1.10") > doctor._numbers("1.9.3rc1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(refusal):
    assert "device 'cuda' is not on this machine; try --device cpu" in refusal(
        "doctor", "--device", "cuda"
    )
