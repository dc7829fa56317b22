"""A flow survives the disk bit for bit; any other file is refused in a sentence."""

from __future__ import annotations

import json
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Independent, StudentT

import cnf
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.storage import write

F64 = torch.float64
MINE = cnf.Tableau("mine", 2, (0, 1), ((), (1,)), (0.5, 0.5))


class Field(nn.Module):
    """A field of one's own whose two layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight

    def forward(self, t, x):
        return self.two(torch.tanh(self.one(x)))


def student() -> Independent:
    return Independent(StudentT(torch.full((2,), 4.0)), 1)


SETTINGS = {
    "as it comes": {},
    "one layer": dict(hidden=(5,)),
    "three layers": dict(hidden=(5, 4, 3)),
    "no whitening": dict(whiten=False),
    "fixed steps": dict(step_size=0.25, method="rk4"),
    "tolerances": dict(rtol=1e-3, atol=1e-7, logdet_atol=1e-2),
    "logdet left out of the steps": dict(logdet_atol=None),
    "tsit5": dict(method="tsit5"),
    "a tableau of one's own": dict(method=MINE, step_size=0.5),
    "tangents": dict(divergence=cnf.Tangents()),
    "hutchinson": dict(divergence=cnf.Hutchinson(3, "gaussian", None)),
    "hutchinson by name": dict(divergence="hutchinson"),
    "closed form": dict(divergence="closed_form"),
    "adjoint": dict(gradient="adjoint"),
    "backprop": dict(gradient=cnf.Backprop()),
    "checkpoint": dict(gradient=cnf.Checkpoint()),
    "numpy's numbers": dict(
        hidden=np.array([4, 4]),
        rtol=np.float32(1e-3),
        atol=np.float64(1e-4),
        logdet_atol=np.float32(1e-3),
        divergence=cnf.Hutchinson(np.int64(2), seed=np.int64(1)),
    ),
}
EACH_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def shaken(flow: Flow) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def some(**settings) -> Flow:
    flow = shaken(Flow(2, **{"hidden": (6, 5), **settings}))
    return flow.whiten(torch.randn(50, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]]) + 7)


def same(one: Flow, other: Flow) -> bool:
    """Whether two flows have equal settings, weights and results."""
    x = torch.randn(4, 2)
    weights, others = one.state_dict(), other.state_dict()
    assert one.config == other.config
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(weights[name].dtype == others[name].dtype for name in weights)
    if one.divergence != cnf.Hutchinson(3, "gaussian", None):  # which differs every time
        assert torch.equal(one.log_prob(x), other.log_prob(x))
    assert torch.equal(one.sample(3, seed=0), other.sample(3, seed=0))
    return True


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "flow.safetensors"
    some().save(path)
    return path


def refusal(path, **own) -> str:
    with pytest.raises(InputError) as caught:
        Flow.load(path, **own)
    sentence = str(caught.value)
    assert sentence.isprintable() and "; " in sentence and not sentence.endswith(".")
    return sentence


# there and back -----------------------------------------------------------------------------


@EACH_SETTING
def test_a_flow_comes_back_bit_for_bit(settings, tmp_path):
    flow = some(**settings)
    flow.save(tmp_path / "a flow")
    loaded = Flow.load(tmp_path / "a flow")
    assert same(flow, loaded)
    assert loaded.solver == flow.solver
    assert loaded.divergence == flow.divergence
    assert type(loaded.field) is type(flow.field)
    assert bool(loaded.whitening.is_fitted)


@EACH_SETTING
def test_settings_are_plain_json(settings):
    config = some(**settings).config
    assert json.loads(json.dumps(config, allow_nan=False)).keys() == config.keys()


def test_a_flow_of_double_precision_comes_back_as_one(tmp_path):
    flow = some().double()
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow")
    assert loaded.dtype == F64 and same(flow, loaded)


def test_an_untrained_flow_comes_back(tmp_path):
    flow = Flow(3, hidden=(4, 4))
    flow.save(tmp_path / "flow")
    loaded = Flow.load(tmp_path / "flow")
    assert not loaded.whitening.is_fitted
    assert torch.equal(loaded.log_prob(torch.ones(3)), flow.log_prob(torch.ones(3)))


def test_a_loaded_flow_can_be_saved_and_trained_again(saved, tmp_path):
    flow = Flow.load(saved)
    flow.save(tmp_path / "again")
    assert same(flow, Flow.load(tmp_path / "again"))
    before = flow.whitening.factor.clone()
    flow.fit(torch.randn(60, 2), steps=2, progress=False)
    assert torch.equal(flow.whitening.factor, before)
    assert all(p.requires_grad for p in flow.parameters())


def test_a_field_of_ones_own_is_handed_in_again(tmp_path):
    flow = shaken(Flow(2, field=Field(), whiten=False))
    flow.save(tmp_path / "flow")
    field = Field()
    loaded = Flow.load(tmp_path / "flow", field=field)
    assert loaded.field is field and same(flow, loaded)
    sentence = refusal(tmp_path / "flow")
    assert "field" in sentence and "Field" in sentence and "Flow.load(path, field=…)" in sentence


def test_a_function_as_a_field_is_handed_in_again(tmp_path):
    flow = Flow(2, field=lambda t, x: -x)
    flow.save(tmp_path / "flow")
    assert same(flow, Flow.load(tmp_path / "flow", field=flow.field))
    assert "hand it in again" in refusal(tmp_path / "flow")


def test_a_base_of_ones_own_is_handed_in_again(tmp_path):
    flow = some(base=student())
    flow.save(tmp_path / "flow")
    assert same(flow, Flow.load(tmp_path / "flow", base=student()))
    assert "Flow.load(path, base=…)" in refusal(tmp_path / "flow")
    assert "event_shape" in refusal(tmp_path / "flow", base=StudentT(4.0))


def test_another_field_than_the_saved_one_is_refused(tmp_path, saved):
    assert "another field= or base=" in refusal(saved, field=nn.Linear(2, 2))
    shaken(Flow(2, field=nn.Linear(2, 2))).save(tmp_path / "own")
    assert "shape" in refusal(tmp_path / "own", field=nn.Linear(2, 3))


def test_a_divergence_of_ones_own_cannot_be_stored(tmp_path):
    class Mine(cnf.Tangents):
        pass

    with pytest.raises(InputError, match="of your own making and cannot be stored"):
        some(divergence=Mine()).save(tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_plain_memory_are_stored(tmp_path):
    flow = some()
    flow.field.out = nn.Parameter(flow.field.out.detach().T.contiguous().T)  # strides of another
    flow.save(tmp_path / "flow")
    assert torch.equal(Flow.load(tmp_path / "flow").field.out, flow.field.out)


# writing ------------------------------------------------------------------------------------


def test_an_older_file_is_replaced_and_nothing_else_is_left(saved):
    flow = some()
    flow.save(saved)
    assert same(flow, Flow.load(saved))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_paths_may_be_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = some()
    flow.save("flow")
    assert same(flow, Flow.load(os.fspath(tmp_path / "flow")))


def test_others_may_read_it_as_they_may_read_any_file(saved, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("where", ["missing/flow", "", "file/flow", "a\0b", "n" * 300])
def test_a_place_that_cannot_be_written_is_said(where, tmp_path):
    (tmp_path / "file").write_text("taken")
    with pytest.raises(InputError, match=r"(?s)cannot be written to .* name a file in a folder"):
        some().save(tmp_path / where)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_older_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        some().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# reading what is no flow --------------------------------------------------------------------


class Evil:
    """What a pickle would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


DAMAGE = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in the weights": lambda data: data[:-7],
    "one byte more": lambda data: data + b"x",
    "no header length": lambda data: b"\xff" * 8 + data[8:],
    "random bytes": lambda data: bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
    "text": lambda data: b"x,y\n1,2\n",
    "zeros": lambda data: bytes(len(data)),
    "a pickle": lambda data: pickle.dumps(Evil()),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(harm, saved):
    saved.write_bytes(harm(saved.read_bytes()))
    assert "is damaged or is no file that flow.save wrote" in refusal(saved)


def test_a_file_cut_anywhere_is_refused(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 97):
        saved.write_bytes(data[:length])
        refusal(saved)


def test_torchs_own_files_are_refused_and_not_run(saved):
    torch.save(Evil(), saved)
    assert "is damaged or is no file" in refusal(saved)


def test_what_is_not_there_is_said(tmp_path):
    assert "there is no file" in refusal(tmp_path / "nowhere")
    assert "there is no file" in refusal(tmp_path / ("n" * 5000))
    assert "is a folder; give the model file in it" in refusal(tmp_path)


def rewritten(path, change=None, settings=None):
    """The file with other tensors or settings; "…" as a setting removes it."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cnf"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {k: v for k, v in {**header, **(settings or {})}.items() if v != "…"}
    if change is not None:
        change(tensors)
    save_file(tensors, path, {"cnf": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"format": "pt"}, {"cnf": ""}, {"cnf": "no json"}, {"cnf": "[1]"}, {"cnf": "{}"},
     {"cnf": '{"format": 2}'}, {"cnf": "[" * 100_000}],
)  # fmt: skip
def test_another_programs_safetensors_are_refused(metadata, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other", metadata)
    assert "is damaged or is no file that flow.save wrote" in refusal(tmp_path / "other")


@pytest.mark.parametrize("number", [1, 3, 0, "2", None, 1.5])
def test_another_format_is_refused(number, saved):
    sentence = refusal(rewritten(saved, settings={"format": number}))
    assert f"has format {number!r}, this version reads format 2" in sentence


@pytest.mark.parametrize(
    "settings",
    [
        {"dim": "…"},
        {"dim": 10**12},
        {"hidden": [10**8, 10**8]},
        {"unheard": 1},
        {"field": "os.system"},
        {"divergence": {"kind": "Evil"}},
        {"divergence": {"kind": "Hutchinson", "unheard": 1}},
        {"divergence": {"kind": ["Hutchinson"]}},
        {"gradient": {"kind": "Tableau"}},
    ],
    ids=str,
)
def test_settings_that_make_no_flow_are_refused(settings, saved):
    assert "is damaged" in refusal(rewritten(saved, settings=settings))


@pytest.mark.parametrize(
    "settings", [{"dim": 0}, {"dim": None}, {"hidden": 8}, {"method": "x"}, {"rtol": "x"}], ids=str
)
def test_settings_that_no_flow_takes_are_refused(settings, saved):
    with pytest.raises(InputError):
        Flow.load(rewritten(saved, settings=settings))


def nan(name):
    def change(tensors):
        tensors[name].view(-1)[0] = torch.nan

    return change


def dropped(tensors):
    del tensors["field.out"]


def added(tensors):
    tensors["field.more"] = torch.zeros(2)


def reshaped(tensors):
    tensors["field.out"] = torch.zeros(2, 9)


def whole(tensors):
    tensors["whitening.mean"] = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, said",
    [
        (nan("field.out"), "field.out holds values that are not finite"),
        (nan("whitening.factor"), "whitening.factor holds values that are not finite"),
        (dropped, "missing ['field.out']"),
        (added, "unknown ['field.more']"),
        (reshaped, "field.out has shape (2, 9), expected (2, 5)"),
        (whole, "is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, said, saved):
    assert said in refusal(rewritten(saved, change))


def test_the_helper_alone_changes_nothing(saved):
    before = Flow.load(saved)
    assert same(before, Flow.load(rewritten(saved)))


@pytest.mark.parametrize("base", [None, {"kind": "GaussianMixture", "dim": 2, "components": 2**40}])
def test_settings_that_ask_for_more_than_the_file_holds_are_refused_at_once(base, tmp_path):
    path = tmp_path / "flow.safetensors"
    settings = Flow(2, hidden=(8,)).config | {"hidden": [8 if base else 2**40], "base": base}
    write(path, Flow(2, hidden=(8,)), settings)
    with pytest.raises(InputError, match="is damaged"):
        Flow.load(path)


def test_a_base_s_seed_is_no_size(tmp_path):
    path = tmp_path / "flow.safetensors"
    flow = Flow(2, hidden=(8,), base=cnf.GaussianMixture(2, components=2, seed=2**40))
    flow.save(path)
    torch.testing.assert_close(Flow.load(path).base.mean, flow.base.mean)


@pytest.mark.parametrize("bandwidths", [(None, (0.5, 6.0)), ((0.5, 6.0), None)])
def test_weights_bring_the_first_activation_that_they_are_for(bandwidths):
    """A fit chooses it, so that whoever makes the flow again cannot know."""
    one, other = (Flow(2, hidden=(5, 4), bandwidth=wanted) for wanted in bandwidths)
    nn.init.normal_(one.field.out)
    other.load_state_dict(one.state_dict())
    x = torch.randn(7, 2)
    assert torch.equal(other.log_prob(x), one.log_prob(x))


def test_weights_stored_without_their_first_activation_are_for_that_of_the_settings(tmp_path):
    flow = Flow(2, hidden=(5, 4), bandwidth=None)
    nn.init.normal_(flow.field.out)
    flow.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    del tensors["field.sines"]
    save_file(tensors, tmp_path / "old.safetensors", header)
    x = torch.randn(7, 2)
    assert torch.equal(Flow.load(tmp_path / "old.safetensors").log_prob(x), flow.log_prob(x))


def test_a_file_of_images_is_said_to_be_one(tmp_path):
    cnf.ImageFlow((1, 4, 4), width=4).save(tmp_path / "digits.safetensors")
    with pytest.raises(InputError, match=r"holds an image flow; read it by cnf\.ImageFlow\.load"):
        Flow.load(tmp_path / "digits.safetensors")
