"""A flow over images scores what it should, whatever the solver, batch and order; it samples,
encodes and fills in images; it learns, goes on from a snapshot, and survives the disk.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, SigmoidTransform, TransformedDistribution, Uniform

import cnf
from cnf.error import InputError
from cnf.flow.image import ImageFlow
from cnf.flow.image_recipe import TOLERANCE, ImageTraining, _Score, plans_of
from cnf.flow.image_settings import ImageSettings
from cnf.flow.keyed import keys_of, uniform
from cnf.flow.objective import training_solver

SHAPE, DIM = (1, 4, 4), 16
IMAGES = torch.randint(
    0, 256, (6, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def logistic(dim):
    uniform = Uniform(torch.zeros(dim), torch.ones(dim))
    return Independent(TransformedDistribution(uniform, SigmoidTransform().inv), 1)


def stirred(flow, scale=0.1, seed=0):
    """The flow with weights that move points."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


def small(**settings):
    return stirred(ImageFlow(SHAPE, **({"width": 4, "seed": 0} | settings)))


# --- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 2, 2)])
def test_a_flow_that_is_uniform_on_the_cube_scores_eight_bits(alpha, shape):
    flow = ImageFlow(shape, width=4, alpha=alpha, base=logistic(math.prod(shape)))
    images = torch.randint(0, 256, (3, *shape))
    expected = 8 - math.log2(1 - 2 * alpha)

    bits = flow.bits_per_dim(images)

    assert float(bits) == pytest.approx(expected, abs=2e-5)
    assert torch.allclose(bits.per_image, torch.full((3,), expected).double(), atol=5e-5)


class Growth(nn.Module):
    """dx/dt = rate · x, of which every point keeps its own rate."""

    row_wise = True

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-0.5, 0.5, DIM))

    def forward(self, t, x):
        return self.rate * x


@pytest.mark.parametrize("divergence", ["auto", "tangents"])
def test_a_flow_of_independent_pixels_scores_its_closed_form(divergence):
    flow = ImageFlow(SHAPE, field=Growth(), divergence=divergence, alpha=0.01)
    pixels = IMAGES.flatten(1)
    s = 0.01 + 0.98 * (pixels + uniform(keys_of(pixels), DIM, 5)) / 256
    scale = flow.field.rate.detach().double().exp()
    law = torch.distributions.Normal(torch.zeros(DIM).double(), scale)
    expected = law.log_prob(torch.logit(s)) + math.log(0.98) - (s * (1 - s)).log()

    found = flow.log_prob(IMAGES, seed=5)

    assert torch.allclose(found.double(), expected.sum(1), atol=1e-3)


def test_equalized_pixels_score_the_entropy_of_their_histogram():
    images = torch.randint(0, 3, (400, *SHAPE), dtype=torch.uint8) ** 2
    flow = ImageFlow(SHAPE, width=4, levels=8)
    flow.fit_maps(images.flatten(1))
    share = torch.bincount(images.flatten().long(), minlength=8).double() / images.numel()
    entropy = -(share[share > 0] * share[share > 0].log2()).sum().item()

    assert float(flow.bits_per_dim(images)) == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"field": "mlp", "width": 1},
        {"field": "multiscale", "width": 2},
        {"dequantization": "variational"},
    ],
    ids=str,
)
def test_the_density_is_that_of_the_jacobian(settings):
    settings = {"width": 4, "divergence": "tangents", "rtol": 1e-6, "atol": 1e-6} | settings
    flow = stirred(ImageFlow((1, 2, 2), **settings)).double()
    images = IMAGES[:1, :, :2, :2]
    pixels = images.flatten(1)
    x = (pixels + uniform(keys_of(pixels), 4, 0)) / 256
    request = flow.request()

    def to_base(x):
        return flow.encoded(x[None], None, request, False)[0][0]

    jacobian = torch.autograd.functional.jacobian(to_base, x[0])
    z = flow.encode(images).flatten()
    expected = torch.linalg.slogdet(jacobian)[1] - 0.5 * (z.square() + math.log(2 * math.pi)).sum()

    assert torch.allclose(flow.log_prob(images)[0], expected, atol=1e-3)


def test_probabilities_of_all_pixels_add_up_to_one():
    flow = stirred(ImageFlow((1, 1, 1), width=4, levels=4, divergence="tangents"), 0.3)
    x = (torch.arange(300).double()[:, None] + 0.5) / 300
    log_prob = flow.log_prob_of_rows(x, flow.chosen_divergence(), flow.solver)[0]

    assert log_prob.exp().mean().item() == pytest.approx(1.0, abs=0.01)


# --- what must not matter -------------------------------------------------------------------------


def test_bits_do_not_depend_on_solver_tolerance_and_batch():
    flow = small(classes=3)
    found = [
        float(flow.bits_per_dim(IMAGES, LABELS, **how))
        for how in (
            {},
            {"chunk": 1},
            {"chunk": 4},
            {"nfe": 48},
            {"nfe": 60, "method": "dopri5"},
            {"nfe": 80, "method": "midpoint"},
        )
    ]
    for settings in ({"rtol": 1e-6, "atol": 1e-6}, {"method": "bosh3"}, {"method": "tsit5"}):
        other = small(classes=3, **settings)
        found.append(float(other.bits_per_dim(IMAGES, LABELS)))
    assert max(found) - min(found) < 1e-3


def test_an_image_keeps_its_density_wherever_it_is():
    # in single precision rounding may choose another step, of as small an error
    flow, order = small(classes=3).double(), torch.tensor([4, 2, 0, 5, 1, 3])
    there = flow.log_prob(IMAGES, LABELS)
    moved = flow.log_prob(IMAGES[order], LABELS[order], chunk=2)
    assert torch.allclose(moved, there[order], atol=1e-6)


def test_pixels_are_the_same_in_any_form():
    flow = small()
    expected = flow.log_prob(IMAGES)
    for images in (IMAGES.long(), IMAGES / 255, IMAGES.numpy(), IMAGES.squeeze(1)):
        assert torch.equal(flow.log_prob(images), expected)
    assert torch.equal(flow(IMAGES), expected)


def test_seeds_draw_other_noise():
    flow = small()
    one, same = (flow.log_prob(IMAGES, seed=3) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.allclose(flow.log_prob(IMAGES, seed=4), one)
    assert not torch.allclose(flow.log_prob(IMAGES, seed=3, probe_seed=4), one)


# --- what a figure is worth -----------------------------------------------------------------------


def test_probes_do_no_harm_to_the_mean():
    exact = small(divergence="tangents").log_prob(IMAGES)
    one, many = small().log_prob(IMAGES), small().log_prob(IMAGES, probes=64)
    assert (many - exact).abs().mean() < 0.5 * (one - exact).abs().mean()


def tiny(**settings):
    flow = ImageFlow((1, 2, 2), **({"width": 4, "seed": 0, "rtol": 1e-3} | settings))
    return stirred(flow), torch.tensor([[[[0, 255], [90, 9]]], [[[4, 31], [250, 0]]]])


@torch.no_grad()
def test_an_error_that_is_asked_for_is_kept():
    flow, images = tiny(divergence="tangents")
    exact, (estimating, _) = flow.log_prob(images), tiny()
    found, info = estimating.log_prob(images, error=0.1, return_info=True)
    assert info.trace_error.max() <= 0.1 and (found - exact).abs().max() < 0.4
    bits = estimating.bits_per_dim(images, error=0.1 / (4 * math.log(2)))
    assert torch.allclose(bits.per_image, 8 - found.double() / (4 * math.log(2)), atol=1e-5)


@torch.no_grad()
def test_info_is_of_the_values_that_come_without_it():
    flow, images = tiny()
    found, info = flow.log_prob(images, return_info=True)
    assert torch.allclose(found, flow.log_prob(images))
    assert info.trace_error.shape == (2,) and (info.trace_error > 0).all()
    assert info.integration_error.max() < 0.1


def test_a_weighted_bound_is_the_tighter_one():
    flow = small(divergence="tangents", alpha=0.05)
    plain = flow.bits_per_dim(IMAGES, draws=8)
    weighted = flow.bits_per_dim(IMAGES, importance=8)
    assert float(weighted) == plain.weighted < plain.value
    assert plain.standard_error > 0 and flow.trace_is_exact


# --- images ---------------------------------------------------------------------------------------


def test_samples_are_pixels_that_a_seed_repeats():
    flow = small()
    images = flow.sample(5, seed=1)
    assert images.dtype == torch.uint8 and images.shape == (5, *SHAPE)
    assert torch.equal(images, flow.sample(5, seed=1, chunk=2))
    assert not torch.equal(images, flow.sample(5, seed=2))
    assert flow.sample(0).shape == (0, *SHAPE)
    assert ImageFlow(SHAPE, width=4, levels=1000).sample(1).dtype == torch.int32


def assert_same(images, expected):
    """Equal but for noise that lies within the tolerance of the next level."""
    off = (images.int() - expected.int()).abs()
    assert off.max() <= 1 and (off == 0).double().mean() > 0.95


@pytest.mark.parametrize("settings", [{}, {"classes": 3}, {"levels": 999}])
def test_images_survive_the_way_there_and_back(settings):
    flow = small(rtol=1e-6, atol=1e-6, **settings)
    labels = LABELS if "classes" in settings else None
    z = flow.encode(IMAGES, labels)
    assert z.shape == IMAGES.shape and z.dtype == torch.float32
    back = flow.decode(z, labels)
    assert back.dtype == flow.sample(1).dtype
    assert_same(back, IMAGES)


def test_labels_matter_and_none_is_minus_one():
    flow = small(classes=3)
    none = flow.log_prob(IMAGES)
    assert torch.equal(flow.log_prob(IMAGES, -1), none)
    assert torch.equal(flow.log_prob(IMAGES, np.full(6, -1)), none)
    assert not torch.allclose(flow.log_prob(IMAGES, LABELS), none)
    ones, column = flow.sample(3, 1, seed=0), flow.sample(3, [1, 1, 1], seed=0)
    assert torch.equal(ones, column) and not torch.equal(ones, flow.sample(3, 2, seed=0))


def test_guidance_follows_the_labels():
    flow = small(classes=3)
    one, none, more = (flow.log_prob(IMAGES, LABELS, guidance=w) for w in (1, 0, 3))
    assert torch.allclose(one, flow.log_prob(IMAGES, LABELS))
    assert torch.allclose(none, flow.log_prob(IMAGES), atol=1e-3)
    assert not torch.allclose(more, one, atol=1e-2)


def test_ways_between_images_begin_and_end_there():
    flow = small(classes=3, rtol=1e-6, atol=1e-6)
    ways = flow.interpolate(IMAGES[:3], IMAGES[3:], 5, labels=1)
    assert ways.shape == (5, 3, *SHAPE) and ways.dtype == torch.uint8
    assert_same(ways[0], IMAGES[:3])
    assert_same(ways[-1], IMAGES[3:])
    assert not torch.equal(ways[2], ways[0])


def test_what_is_hidden_is_filled_in_and_what_is_known_stays():
    flow, mask = small(), torch.rand(4, 4) < 0.5
    filled = flow.inpaint(IMAGES, mask, seed=0, steps=4)
    hidden = torch.where(mask, IMAGES, 17)
    assert torch.equal(filled[..., mask], IMAGES[..., mask])
    assert torch.equal(filled, flow.inpaint(hidden, mask, seed=0, steps=4))
    assert not torch.equal(filled, flow.inpaint(IMAGES, mask, seed=1, steps=4))


class Correlated(nn.Module):
    """The field of flow matching for normal data of a covariance, in closed form."""

    row_wise = True

    def __init__(self, covariance):
        super().__init__()
        self.covariance = covariance

    def forward(self, t, x):
        t = t.reshape(-1, 1, 1)
        eye = torch.eye(len(self.covariance)).to(x)
        law = (1 - t) ** 2 * eye + t**2 * self.covariance.to(x)
        slope = torch.linalg.solve(law, t * self.covariance.to(x) - (1 - t) * eye)
        return (x[:, None] @ slope.expand(len(x), -1, -1))[:, 0]


def test_hidden_pixels_follow_the_known_ones():
    flow = ImageFlow((1, 1, 2), field=Correlated(torch.tensor([[1.0, 0.9], [0.9, 1.0]])))
    images = torch.full((2000, 1, 1, 2), 200)
    known = torch.tensor([True, False])

    filled = flow.inpaint(images, known, seed=0)
    y = torch.logit((filled[..., 1].double().flatten() + 0.5) / 256)

    # the law of the guide is an approximation where pixels are correlated
    assert y.mean().item() == pytest.approx(0.9 * math.log(200.5 / 55.5), abs=0.12)
    assert y.std().item() == pytest.approx((1 - 0.9**2) ** 0.5, abs=0.08)


# --- learning -------------------------------------------------------------------------------------


def stripes(n):
    """Images of one of three grey levels in each half, by label."""
    labels = torch.arange(n) % 3
    images = (labels * 4).reshape(n, 1, 1, 1).repeat(1, *SHAPE)
    images[..., 2:] = 8 - images[..., 2:]
    return images.to(torch.uint8), labels


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fm"},
        {"method": "ml"},
        {"method": "auto"},
        {"method": "auto", "field": "mlp", "width": 1},
        {"method": "fm", "equalize": False},
        {"method": "auto", "dequantization": "variational"},
        {"method": "fm", "precision": "mixed"},
    ],
    ids=str,
)
def test_a_fit_saves_bits(settings):
    images, labels = stripes(240)
    settings = dict(settings)
    method = settings.pop("method")
    flow = ImageFlow(SHAPE, **({"width": 4, "classes": 3, "levels": 16, "seed": 0} | settings))
    given = labels if flow.classes else None
    before = copy.deepcopy(flow)
    before.fit_maps(images.flatten(1))
    records = []

    steps = 5 if method == "ml" else 30
    flow.fit(
        images, given, method=method, steps=steps, seed=0, batch_size=32, lr=1e-2,
        callback=records.append, progress=False,
    )  # fmt: skip

    assert (
        float(flow.bits_per_dim(images, given)) < float(before.bits_per_dim(images, given)) - 0.02
    )
    assert [record.step for record in records] == list(range(1, steps + 1))
    assert records[-1].validation is not None and records[-1].steps == steps


def test_a_stack_is_trained_by_maximum_likelihood_alone():
    records = []
    flow = ImageFlow(SHAPE, width=4, levels=16, field="multiscale", seed=0)
    flow.fit(
        stripes(240)[0], steps=12, seed=0, batch_size=32, lr=1e-2, callback=records.append,
        progress=False,
    )  # fmt: skip
    judged = [record.validation for record in records if record.validation is not None]
    assert {record.phase for record in records} == {"ml"}
    assert judged[-1] < judged[0] - 0.01


def test_a_second_fit_goes_on_and_never_ends_worse():
    images, labels = stripes(60)
    flow = ImageFlow(SHAPE, width=4, classes=3, levels=16, seed=0)
    flow.fit(images, labels, method="fm", steps=15, seed=0, lr=1e-2, progress=False)
    law, held = flow.equalized.mass.clone(), (images[:20], labels[:20])
    first = float(flow.bits_per_dim(*held, nfe=24))

    flow.fit(
        images.flip(0) // 2, labels, method="fm", steps=3, lr=1.0, validation=held, progress=False
    )

    assert torch.equal(flow.equalized.mass, law)
    assert float(flow.bits_per_dim(*held, nfe=24)) <= first + 1e-4


def test_a_training_goes_on_from_its_state_as_if_nothing_had_happened():
    images, labels = stripes(60)
    settings = ImageSettings(method="auto", steps=8, batch_size=16, validation=10)

    def training():
        torch.manual_seed(1)
        flow = ImageFlow(SHAPE, width=4, classes=3, levels=16, seed=0)
        return ImageTraining(flow, images, labels, settings=settings)

    whole = training()
    losses = [record.loss for record in whole]
    for stop in (2, 7):  # in either phase
        part = training()
        records = iter(part)
        first = [next(records).loss for _ in range(stop)]
        state, random = copy.deepcopy(part.state_dict()), torch.get_rng_state()
        rest = training()
        rest.load_state_dict(state)
        torch.set_rng_state(random)
        assert rest.step == stop and not rest.is_done
        assert first + [record.loss for record in rest] == losses
        assert rest.is_done
        for one, other in zip(rest.best.weights, whole.best.weights, strict=True):
            assert torch.equal(one, other)


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"classes": 3},
        {"field": "mlp", "width": 1, "classes": 2, "label_dropout": 0.0},
        {"field": "multiscale", "equalize": False, "alpha": 0.05},
        {"method": "rk4", "step_size": 0.1, "levels": 300},
        {"divergence": cnf.Hutchinson(2), "rtol": 1e-3, "logdet_atol": 1.0},
        {"base": cnf.DiagonalGaussian(DIM)},
        {"dequantization": "variational", "precision": "mixed"},
    ],
    ids=str,
)
def test_a_flow_comes_back_from_the_disk(settings, tmp_path):
    flow = small(**settings)
    flow.fit_maps(IMAGES.flatten(1))
    flow.save(tmp_path / "flow.safetensors")
    back = ImageFlow.load(tmp_path / "flow.safetensors")
    labels = LABELS % flow.classes if flow.classes else None
    assert back.config == flow.config
    assert torch.equal(back.log_prob(IMAGES, labels), flow.log_prob(IMAGES, labels))


def test_a_field_of_ones_own_is_handed_in_again(tmp_path):
    path = tmp_path / "flow.safetensors"
    flow = ImageFlow(SHAPE, field=Growth())
    flow.save(path)
    with pytest.raises(InputError, match="field of its own, Growth"):
        ImageFlow.load(path)
    back = ImageFlow.load(path, field=Growth())
    assert torch.equal(back.log_prob(IMAGES), flow.log_prob(IMAGES))


def test_other_files_are_refused(tmp_path):
    cnf.Flow(2).save(tmp_path / "flow.safetensors")
    with pytest.raises(InputError, match="holds no image flow"):
        ImageFlow.load(tmp_path / "flow.safetensors")


# --- what cannot be meant -------------------------------------------------------------------------

WRONG = {
    "a shape of two sides": (lambda: ImageFlow((28, 28)), "shape must be"),
    "an unknown dequantization": (
        lambda: ImageFlow(SHAPE, dequantization="none"), "known are uniform, variational"
    ),
    "an unknown precision": (lambda: ImageFlow(SHAPE, precision="half"), "known are single, mixed"),
    "mixed precision of a closed form": (
        lambda: ImageFlow(SHAPE, field="mlp", width=1, precision="mixed"), "precision='single'"
    ),
    "an unknown field": (lambda: ImageFlow(SHAPE, field="vit"), "unknown field 'vit'"),
    "classes of the stack": (
        lambda: ImageFlow(SHAPE, field="multiscale", classes=2), "told no classes"
    ),
    "one level": (lambda: ImageFlow(SHAPE, levels=1), "levels"),
    "labels of a flow without classes": (lambda: small().log_prob(IMAGES, LABELS), "no labels"),
    "a label too many": (lambda: small(classes=2).log_prob(IMAGES, LABELS), "labels hold 2"),
    "a label short": (lambda: small(classes=3).log_prob(IMAGES, LABELS[:5]), r"shape \(5,\) for 6"),
    "labels that are shares": (
        lambda: small(classes=3).log_prob(IMAGES, LABELS / 2), "whole numbers"
    ),
    "guidance without classes": (lambda: small().sample(1, guidance=2.0), "guidance"),
    "guidance without dropout": (
        lambda: small(classes=3, label_dropout=0.0).sample(1, 1, guidance=2.0), "guidance"
    ),
    "a budget and an aim": (lambda: small().log_prob(IMAGES, nfe=8, error=0.1), "one of them"),
    "a mask of numbers": (lambda: small().inpaint(IMAGES, torch.ones(4, 4)), "truths"),
    "a mask of another shape": (
        lambda: small().inpaint(IMAGES, torch.ones(3, 4, dtype=torch.bool)), "does not go with"
    ),
    "flow matching of a stack": (
        lambda: small(field="multiscale").fit(IMAGES, method="fm", steps=1), "method='ml'"
    ),
    "an unknown method": (lambda: small().fit(IMAGES, method="gan", steps=1), "unknown method"),
    "points of another shape": (lambda: small().decode(torch.zeros(2, 3)), "z must be of shape"),
    "ends of different numbers": (
        lambda: small().interpolate(IMAGES[:2], IMAGES[:1]), "as many of both"
    ),
    "nothing to learn from": (lambda: small().fit(IMAGES[:1], steps=1), "none of 1 images"),
}  # fmt: skip


@pytest.mark.parametrize(("act", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused_in_a_sentence(act, words):
    with pytest.raises(InputError, match=words):
        act()


class Spike(nn.Module):
    """A field that is large where every solve ends, and nowhere else."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -30.0 * torch.exp(-(((t - 1) / 2e-3) ** 2)).reshape(-1, 1) * x


def test_weights_are_judged_by_the_density_not_by_a_few_fixed_steps():
    images = torch.randint(0, 256, (64, 1, 4, 4))
    flow = ImageFlow((1, 4, 4), field=Spike(), seed=0)
    flow.fit_maps(images.flatten(1))
    bits = float(flow.bits_per_dim(images))
    assert _Score(flow, images.flatten(1), None)() == pytest.approx(bits, abs=0.02)
    assert abs(float(flow.bits_per_dim(images, nfe=32)) - bits) > 0.1


def test_maximum_likelihood_steps_to_a_tolerance():
    flow = small(classes=0)
    training = ImageTraining(
        flow, IMAGES, settings=ImageSettings(method="ml", steps=1, validation=2)
    )
    record = next(iter(training))
    solver = training_solver(flow.solver, TOLERANCE)
    assert isinstance(solver.control, cnf.Adaptive) and solver.control.rtol == TOLERANCE
    assert record.nfe is not None and record.nfe % 6 in (1, 2)  # dopri5 with its first step's trial


def test_steps_of_maximum_likelihood_are_said_or_a_share():
    flow = small()
    said = plans_of(ImageSettings(method="auto", steps=100, steps_ml=30), flow)
    assert [(plan.phase, plan.steps) for plan in said] == [("fm", 70), ("ml", 30)]
    shared = plans_of(ImageSettings(method="auto", steps=100), flow)
    assert [(plan.phase, plan.steps) for plan in shared] == [("fm", 95), ("ml", 5)]
    with pytest.raises(InputError, match="is for method='auto'"):
        ImageSettings(steps_ml=30)
    with pytest.raises(InputError, match="leaves nothing for one of both phases"):
        ImageSettings(method="auto", steps=30, steps_ml=30)


@pytest.mark.parametrize("width", [4, 10, 43])
def test_a_u_net_may_have_any_width(width):
    flow = ImageFlow((1, 8, 8), width=width, seed=0)
    assert flow.sample(2, nfe=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_labels_may_be_of_any_whole_numbers(dtype):
    flow = small(classes=3)
    assert torch.equal(flow.log_prob(IMAGES, LABELS.to(dtype)), flow.log_prob(IMAGES, LABELS))


def test_the_law_of_its_probes_is_the_divergences():
    """16 orthogonal probes in 16 dimensions are exact, whatever was drawn."""
    flow = small(divergence=cnf.Hutchinson(DIM, law="orthogonal"), rtol=1e-6, atol=1e-6)
    one, other = (flow.log_prob(IMAGES, seed=0, probe_seed=noise) for noise in (0, 1))
    assert torch.allclose(one, other, atol=1e-3)


class Told(nn.Module):
    """A field of one's own that is told a label."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(DIM + 1, DIM)

    def forward(self, t, x, label):
        return torch.tanh(self.net(torch.cat([x, label], 1)))


def test_a_field_of_ones_own_is_told_labels_of_its_dtype():
    flow = ImageFlow(SHAPE, classes=3, field=Told())
    images, labels = IMAGES.repeat(5, 1, 1, 1), LABELS.repeat(5)
    flow.fit(images, labels, steps=2, seed=0, progress=False)
    assert torch.isfinite(flow.log_prob(IMAGES, LABELS)).all()
