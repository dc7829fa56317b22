"""The same on a GPU as on the CPU, and no more reads of the device than are promised."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cnf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GRADIENTS = ("backprop", "checkpoint", "adjoint", "reversible")


class Field(nn.Module):
    """A smooth field of two dimensions."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        self.to(device, dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.reshape(-1, 1).expand(len(y), 1).to(y.dtype)], -1))


def start(device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return drawn.to(device, dtype)


def end_and_gradients(device: str, **how: object) -> list[Tensor]:
    """The end of a solve from start(device), and the gradients of its squares' sum."""
    field, y0 = Field(device), start(device).requires_grad_()
    y = cnf.solve(field, y0, [0.0, 0.5, 1.5], **how).y
    assert y.device.type == device
    wanted = torch.autograd.grad(y.square().sum(), [y0, *field.parameters()])
    return [x.cpu() for x in (y.detach(), *wanted)]


def same(how: dict[str, object], tolerance: float = 1e-9) -> None:
    for here, there in zip(
        end_and_gradients("cpu", **how), end_and_gradients("cuda", **how), strict=True
    ):
        torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4", "dopri8", "bosh3"])
def test_a_solve_and_its_gradients_are_those_of_the_cpu(method: str, gradient: str) -> None:
    if gradient == "reversible" or method == "rk4":
        same({"method": method, "gradient": gradient, "step_size": 0.05})
    else:
        same({"method": method, "gradient": gradient, "rtol": 1e-6, "atol": 1e-6}, 1e-7)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_step_size_per_sample_is_that_of_the_cpu(gradient: str) -> None:
    control = cnf.Adaptive(1e-6, 1e-6, per_sample=True)
    same({"control": control, "gradient": gradient}, 1e-7)


@pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5", "implicit_euler", "trapezoid"])
def test_stiff_methods_are_those_of_the_cpu(method: str) -> None:
    how: dict[str, object] = {"method": method}
    if method in ("implicit_euler", "trapezoid"):
        how["step_size"] = 0.05
    same(how, 1e-6)


def test_dense_output_and_events_work_on_the_device() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        field, y0 = Field(device), start(device)
        with torch.no_grad():
            curve = cnf.solve(field, y0, [0.0, 1.0], rtol=1e-8, atol=1e-8, dense=True)
            event = cnf.Event(lambda t, y: t - 0.7)
            landed = cnf.solve(field, y0, [0.0, 1.0], rtol=1e-8, atol=1e-8, event=event)
        found[device] = [curve(0.37).cpu(), landed.y[-1].cpu()]
    for here, there in zip(*found.values(), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_derivatives_and_float32_work_on_the_device(gradient: str) -> None:
    field, y0 = Field("cuda", torch.float32), start("cuda", torch.float32).requires_grad_()
    how = {"step_size": 0.1, "gradient": gradient}
    y = cnf.solve(field, y0, [0.0, 1.0], method="midpoint", **how).y[-1]
    (first,) = torch.autograd.grad(y.sum(), y0, create_graph=gradient != "reversible")
    if gradient != "reversible":
        first.square().sum().backward()
        assert y0.grad is not None and y0.grad.isfinite().all()


class Reads:
    """Counts the reads of the device that torch warns of."""

    def __enter__(self) -> Reads:
        torch.cuda.synchronize()
        self._caught = warnings.catch_warnings(record=True)
        self._seen = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.count = sum("synchroniz" in str(one.message) for one in self._seen or ())


def reads_of(run: Callable[[], object]) -> int:
    run()  # what is made once is made now
    with Reads() as reads:
        run()
    return reads.count


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_fixed_steps_read_nothing_of_the_device_whatever_their_number(gradient: str) -> None:
    field, y0 = Field("cuda", torch.float32), start("cuda", torch.float32)

    def run(steps: int) -> None:
        y = cnf.solve(field, y0, [0.0, 1.0], method="rk4", step_size=1 / steps, gradient=gradient)
        y.y[-1].sum().backward()

    few, many = (reads_of(lambda steps=steps: run(steps)) for steps in (4, 32))
    assert max(few, many) <= 2  # whether the end is finite


def test_adaptive_steps_read_one_number_each() -> None:
    field, y0 = Field("cuda"), start("cuda")
    with torch.no_grad():
        tried = []

        def run(rtol: float) -> None:
            stats = cnf.solve(field, y0, [0.0, 5.0], rtol=rtol, atol=rtol).stats
            tried.append(stats.accepted + stats.rejected)

        loose = reads_of(lambda: run(1e-2)), tried[-1]
        tight = reads_of(lambda: run(1e-9)), tried[-1]
    assert tight[1] > loose[1] + 5
    assert tight[0] - loose[0] == tight[1] - loose[1]


def test_a_flow_lives_where_its_parameters_are(tmp_path) -> None:
    x = cnf.data.toy("moons").sample((2000,))
    flow = cnf.Flow(2, hidden=(32, 32), seed=0).fit(x, steps=50, device="cuda")
    on_device = flow.log_prob(x[:200])
    assert on_device.device.type == "cuda" and flow.sample(10).device.type == "cuda"
    flow.save(tmp_path / "flow.safetensors")
    loaded = cnf.Flow.load(tmp_path / "flow.safetensors")
    torch.testing.assert_close(loaded.log_prob(x[:200]), on_device.cpu(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("divergence", [None, cnf.Hutchinson(4, seed=3), cnf.Tangents()])
def test_every_trace_is_that_of_the_cpu(divergence: object) -> None:
    x = start("cpu").repeat(3, 2)
    told = {} if divergence is None else {"divergence": divergence}
    flow = cnf.Flow(4, hidden=(16, 16), seed=0, **told).double()
    with torch.no_grad():
        for parameter in flow.field.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    here = flow.log_prob(x)
    there = flow.to("cuda").log_prob(x.to("cuda")).cpu()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", ["unet", "mlp", "multiscale"])
def test_image_flows_train_and_draw_on_the_device(field: str) -> None:
    images = torch.randint(0, 256, (60, 1, 8, 8))
    classes = 0 if field == "multiscale" else 3
    flow = cnf.ImageFlow((1, 8, 8), classes=classes, field=field, width=8, seed=0).to("cuda")
    labels = torch.arange(60) % 3 if classes else None
    flow.fit(images, labels, steps=3, batch_size=20)
    assert flow.sample(2, nfe=4).device.type == "cuda"
    assert math.isfinite(float(flow.bits_per_dim(images[:4], nfe=8)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_ode_nets_train_on_the_device(gradient: str) -> None:
    net = cnf.ODENet(1, 3, width=8, gradient=gradient, step_size=0.25, method="rk4").to("cuda")
    images, labels = torch.rand(8, 1, 28, 28, device="cuda"), torch.arange(8, device="cuda") % 3
    nn.functional.cross_entropy(net(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_solve_can_be_captured_as_a_graph() -> None:
    field, y0 = Field("cuda", torch.float32), start("cuda", torch.float32)

    def loss() -> Tensor:
        y = cnf.solve(field, y0, [0.0, 1.0], method="rk4", step_size=0.1).y[-1]
        return y.square().sum()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            field.zero_grad()
            loss().backward()
    torch.cuda.current_stream().wait_stream(stream)
    wanted = [p.grad.clone() for p in field.parameters() if p.grad is not None]
    field.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss().backward()
    graph.replay()
    for parameter, gradient in zip(field.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_torchdiffeq_interface_works_on_the_device(method: str) -> None:
    from cnf.compat.torchdiffeq import odeint_adjoint

    field, y0 = Field("cuda"), start("cuda").requires_grad_()
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64, device="cuda")
    y = odeint_adjoint(field, y0, t, method=method)
    y[-1].sum().backward()
    assert y.device.type == "cuda" and y0.grad is not None and y0.grad.isfinite().all()


def test_a_captured_field_trains_as_a_plain_one_does() -> None:
    images, found = torch.rand(40, 64), []
    for capture in (False, True):
        flow = cnf.ImageFlow((1, 8, 8), classes=3, width=8, seed=0).to("cuda")
        loss = cnf.FlowMatching(flow, neighbours=1, capture=capture, late=0.3)
        labels = (torch.arange(40) % 3).float()[:, None]
        optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
        torch.manual_seed(0)
        for _ in range(4):
            optimizer.zero_grad()
            loss(images, labels).backward()
            optimizer.step()
        found.append([p.detach() for p in flow.parameters()])
    assert any(p.abs().sum() > 0 for p in found[0])
    for plain, captured in zip(*found, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-6)
