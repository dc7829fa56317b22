"""The flow that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cnf
from cnf.error import InputError
from cnf.flow import pretrained as module
from cnf.flow.image import ImageFlow
from cnf.flow.pretrained import pretrained, pretrained_config, pretrained_metrics

PLACE = Path(cnf.__file__).parent / "pretrained"
shipped = pytest.mark.skipif(
    not (PLACE / "mnist.safetensors").is_file(), reason="no flow is in the package yet"
)


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match="no flow 'faces' comes with cnf; there is mnist"):
        pretrained("faces")


def test_an_installation_without_weights_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"lacks mnist.safetensors; train a flow by"):
        pretrained()


def test_weights_and_what_is_known_of_them_are_read(monkeypatch, tmp_path: Path) -> None:
    place = tmp_path / "pretrained"
    place.mkdir()
    flow = ImageFlow((1, 8, 8), levels=17, field="mlp", width=1, seed=3)
    flow.save(place / "mnist.safetensors")
    (place / "mnist.json").write_text('{"command": "cnf mnist generate"}')
    (place / "mnist.metrics.json").write_text('{"bits_per_dim": 1.0}')
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    for name, weight in pretrained().state_dict().items():
        assert torch.equal(weight, flow.state_dict()[name])
    assert pretrained_config()["command"] == "cnf mnist generate"
    assert pretrained_metrics() == {"bits_per_dim": 1.0}


@shipped
def test_the_flow_in_the_package_draws_digits_and_is_small() -> None:
    assert (PLACE / "mnist.safetensors").stat().st_size <= 2 * 2**20
    flow = pretrained()
    assert (flow.shape, flow.levels, flow.classes) == ((1, 28, 28), 256, 10)
    pixels = flow.sample(2, 7, seed=0, nfe=8)
    assert pixels.shape == (2, 1, 28, 28) and pixels.float().std() > 20
    assert pretrained_config()["command"].startswith("cnf mnist generate")
    assert pretrained_config()["settings"]["dataset"] == "mnist"
    assert 0.5 < pretrained_metrics()["bits_per_dim"] < 1.5
