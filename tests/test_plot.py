"""Figures come out drawn, of a sane size, from whatever arrays a run may hand over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from cnf import plot

EXTENT = (-3.0, 3.0, -3.0, 3.0)


def points(count: int, columns: int = 2) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, columns))


def normal_grid(size: int = 40) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(-3, 3, size), np.linspace(-3, 3, size))
    return -0.5 * (x**2 + y**2) - np.log(2 * np.pi)


def density(**changed: object) -> Figure:
    arguments = {
        "data": points(50),
        "log_density_grid": normal_grid(),
        "extent": EXTENT,
        "samples": points(60),
        "title": "normal",
    }
    return plot.density_figure(**(arguments | changed))


def training(count: int = 40, **changed: object) -> Figure:
    seconds = np.arange(count)
    arguments = {"seconds": seconds, "loss": np.exp(-seconds / 10.0)}
    return plot.training_figure(**(arguments | changed))


def walks(times: int, count: int, columns: int = 2) -> np.ndarray:
    steps = np.random.default_rng(times).normal(size=(times, count, columns))
    return np.cumsum(0.3 * steps, axis=0)


def field(times: int, **changed: object) -> Figure:
    arguments = {
        "times": np.linspace(0, 1, times),
        "log_density_grids": np.stack([normal_grid(20)] * times),
        "extent": EXTENT,
        "velocities": np.random.default_rng(0).normal(size=(times, 5, 5, 2)),
        "points": walks(times, 40),
    }
    return plot.field_figure(**(arguments | changed))


FIGURES = {
    "density": density,
    "density of one sample": lambda: density(data=points(1), samples=points(1)),
    "density of many samples": lambda: density(data=points(50_000)),
    "density without samples": lambda: density(samples=np.empty((0, 2))),
    "line": lambda: plot.line_figure(
        np.linspace(-3, 3, 50), np.exp(normal_grid(50)[25]), points(200, 1), points(100, 1)
    ),
    "line of one sample": lambda: plot.line_figure([0.0, 1.0], [1.0, 1.0], [0.5], [0.4]),
    "marginals": lambda: plot.marginals_figure(points(100, 3), points(80, 3), ["a", "b", "c"]),
    "marginals of one column": lambda: plot.marginals_figure(points(9, 1), points(8, 1)),
    "marginals of one row": lambda: plot.marginals_figure(points(1, 3), points(1, 3)),
    "marginals of a constant": lambda: plot.marginals_figure(np.ones((5, 2)), points(5, 2)),
    "marginals with a hole": lambda: plot.marginals_figure(
        np.array([[np.nan, 1.0], [0.0, np.inf], [1.0, 2.0]]), points(5, 2)
    ),
    "training": lambda: training(
        validation_seconds=[10, 20],
        validation=[2.5, 2.4],
        nfe=np.full(40, 26),
        floor=2.39,
        phases=[(0, "first"), (20, "second")],
    ),
    "training of one step": lambda: training(1),
    "training that diverged": lambda: training(
        2, loss=[1.0, np.nan], validation_seconds=[0, 1], validation=[3.0, np.inf], floor=2.0
    ),
    "trajectories": lambda: plot.trajectory_figure(walks(20, 30), np.linspace(0, 1, 20)),
    "trajectories of one column": lambda: plot.trajectory_figure(
        walks(20, 30, 1), np.linspace(0, 1, 20), ["height"], "one"
    ),
    "trajectories of three columns": lambda: plot.trajectory_figure(walks(5, 2, 3), range(5)),
    "field": lambda: field(3),
    "field at one time": lambda: field(1),
    "comparison": lambda: plot.comparison_figure(
        [[normal_grid(20), normal_grid(30)]] * 3, EXTENT, "ab", "xyz", [["", "0.1 nats"]] * 3
    ),
    "field that stands still": lambda: field(2, velocities=np.zeros((2, 5, 5, 2))),
    "classifier": lambda: plot.classifier_figure(
        np.arange(40),
        np.exp(-np.arange(40) / 10),
        [10, 30],
        [0.02, 0.01],
        np.full(40, 26),
        np.full(40, 30),
        "mnist",
    ),
    "classifier without an ODE": lambda: plot.classifier_figure(
        [0, 1], [1.0, np.nan], [1], [0.0], [np.nan, np.nan], [np.nan, np.nan]
    ),
    "polygons": lambda: plot.polygon_figure(
        [0, 1], [1, 2], {"euler": ([0, 1], [1, 1.5])}, {"euler": [(1, 0.5), (2, 0.3)]}
    ),
    "costs": lambda: plot.cost_figure(
        [{"nfe": n, "error": 1 / n, "seconds": n / 9, "nfe_backward": n + 6} for n in (8, 20)],
        [(1, 8, 14), (2, 14, 20)],
    ),
    "adjoint": lambda: plot.adjoint_figure(
        [0, 1],
        [[1, 2], [3, 4]],
        {1: ([0, 1], [[1, 2], [3, 3]])},
        [{"layers": n, "to_ode": 1 / n, "adjoint": 0.5 / n} for n in (1, 2)],
    ),
    "confusion": lambda: plot.confusion_figure(np.eye(10) * 90 + np.arange(10), "mnist"),
    "confusion of none": lambda: plot.confusion_figure(np.zeros((3, 3)), names=["a", "b", "c"]),
    "digits": lambda: plot.digits_figure(points(7, 64), points(5, 64), (8, 8)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_saved_with_something_on_it(name: str, tmp_path: Path) -> None:
    path = plot.save_figure(FIGURES[name](), tmp_path / "figure.png")
    picture = imread(path)[..., :3]
    assert 300 <= min(picture.shape[:2]) <= max(picture.shape[:2]) <= 2000
    assert (picture[0, 0] == 1.0).all(), "the background is white, not transparent"
    assert 0.002 < (picture.min(axis=-1) < 0.9).mean() < 0.8


def test_density_panels_share_their_limits() -> None:
    panels = density().axes
    assert len(panels) == 3
    assert {(*axes.get_xlim(), *axes.get_ylim()) for axes in panels} == {EXTENT}


def test_first_row_of_the_grid_is_at_the_bottom() -> None:
    grid = np.full((4, 4), -np.inf)
    grid[0] = 0.0
    (image,) = density(log_density_grid=grid).axes[1].images
    assert image.origin == "lower"
    np.testing.assert_array_equal(image.get_array(), np.exp(grid))


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf, 5000.0, -5000.0])
def test_any_log_density_is_drawn(value: float, tmp_path: Path) -> None:
    grid = normal_grid()
    grid[3, 4] = value
    plot.save_figure(density(log_density_grid=grid), tmp_path / "part.png")
    plot.save_figure(density(log_density_grid=np.full((4, 4), value)), tmp_path / "whole.png")


def test_one_spike_does_not_hide_the_rest_of_the_density() -> None:
    grid = np.zeros((100, 100))
    grid[50, 50] = np.log(50.0)
    (image,) = density(log_density_grid=grid).axes[1].images
    drawn = np.asarray(image.get_array())
    assert drawn[0, 0] <= image.norm.vmax <= 2 * drawn[0, 0]


def test_histograms_are_densities_of_all_values() -> None:
    figure = plot.line_figure([0.0, 1.0], [1.0, 1.0], np.linspace(0, 2, 2001), [])
    (patch,) = figure.axes[0].patches
    heights, edges, _ = patch.get_data()
    assert np.sum(heights * np.diff(edges)) == pytest.approx(0.5, abs=1e-3)


def test_mean_of_the_loss_does_not_cross_phases() -> None:
    loss = np.r_[np.full(50, 1.0), np.full(50, 9.0)]
    figure = training(100, loss=loss, phases=[(0, "first"), (50, "second")])
    curves = [line.get_ydata() for line in figure.axes[0].lines]
    assert {float(y) for curve in curves if len(curve) == 50 for y in curve} == {1.0, 9.0}


def test_empty_panels_are_left_out() -> None:
    assert len(training().axes) == 1
    assert len(training(nfe=np.full(40, np.nan)).axes) == 1
    assert len(training(nfe=np.full(40, 20.0)).axes) == 2


def test_marginals_show_five_columns_at_most() -> None:
    assert len(plot.marginals_figure(points(10, 8), points(10, 8)).axes) == 25


@pytest.mark.parametrize(("shape", "tiled"), [((8, 6), (19, 15)), ((3, 8, 6), (19, 15, 3))])
def test_images_are_tiled_in_a_square(shape: tuple[int, ...], tiled: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(size=(3, *shape))
    grid = plot.image_grid(images, shape)
    assert grid.shape == tiled
    np.testing.assert_array_equal(
        grid[1:9, 1:7],
        np.moveaxis(images[0].reshape(-1, 8, 6), 0, -1).reshape(grid[1:9, 1:7].shape),
    )


def test_images_are_clipped_to_their_peak() -> None:
    grid = plot.image_grid([[[-3.0, 8.0], [16.0, np.nan]]], (2, 2), peak=16)
    np.testing.assert_array_equal(grid[1:3, 1:3], [[0.0, 0.5], [1.0, 0.0]])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: density(data=points(5, 3)),
        lambda: density(samples=np.zeros(5)),
        lambda: plot.marginals_figure(points(5, 3), points(5, 2)),
        lambda: plot.marginals_figure(points(5, 3), points(5, 3), ["a"]),
        lambda: plot.training_figure([1, 2], [1.0]),
        lambda: field(2, velocities=np.zeros((1, 5, 5, 2))),
        lambda: training(nfe=[1.0]),
        lambda: plot.image_grid(points(5, 8), (2, 2, 2)),
        lambda: plot.trajectory_figure(walks(4, 3), [0.0, 1.0]),
        lambda: plot.trajectory_figure(points(4), np.arange(4)),
        lambda: plot.flow_frames([0.0, 1.0], walks(3, 4), EXTENT),
        lambda: plot.comparison_figure([[normal_grid()]], EXTENT, "ab", "x", [["", ""]]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"shape|columns|names|steps|channels|fields"):
        wrong()


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"before")
    broken = density()
    broken.draw = lambda renderer: 1 / 0
    with pytest.raises(ZeroDivisionError):
        plot.save_figure(broken, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_suffix_names_the_format(tmp_path: Path) -> None:
    path = plot.save_figure(density(), tmp_path / "figure.svg")
    assert path.read_text().startswith("<?xml")


def test_arrows_point_where_the_field_does() -> None:
    """Unit vectors to the right are arrows at the cells' centres, each as long as a cell."""
    figure = field(1, velocities=np.broadcast_to([1.0, 0.0], (1, 6, 6, 2)))
    (arrows,) = (a for a in figure.axes[0].collections if hasattr(a, "U"))
    assert np.allclose(arrows.U, 1.0) and not np.any(arrows.V)
    assert arrows.scale == pytest.approx(1.0)  # arrows to a unit of the axes: 6 cells over 6
    assert np.allclose(arrows.XY, plot.cell_centres(EXTENT, 6))


def test_a_histogram_of_points_is_their_density() -> None:
    log_density = plot.histogram_log_density(points(200_000), EXTENT, 20)
    assert log_density.shape == (20, 20)
    shown = log_density[8:12, 8:12]
    assert np.abs(shown - (-0.5 * 0.3 - np.log(2 * np.pi))).max() < 0.3
    corner = plot.histogram_log_density([[2.9, -2.9]], EXTENT, 6)
    assert corner[0, 5] == 0.0 and np.isneginf(np.delete(corner.ravel(), 5)).all()


def test_cells_fill_the_extent_from_below() -> None:
    centres = plot.cell_centres((0.0, 4.0, 10.0, 12.0), 2)
    np.testing.assert_allclose(centres, [[1, 10.5], [3, 10.5], [1, 11.5], [3, 11.5]])


def test_an_extent_is_a_square_that_holds_the_points() -> None:
    left, right, bottom, top = plot.extent_of([[[0.0, 0.0], [4.0, 1.0]]])
    assert right - left == pytest.approx(top - bottom)
    assert left < 0.05 and right > 3.95 and (bottom + top) / 2 == pytest.approx(0.5)


def test_an_animation_has_a_picture_for_every_time(tmp_path: Path) -> None:
    grids = np.stack([normal_grid(10)] * 3)
    for densities, panels in ((None, 1), (grids, 2)):
        frames = plot.flow_frames([0.0, 0.5, 1.0], walks(3, 20), EXTENT, densities, "moving")
        assert len(frames) == 3 and frames[0].dtype == np.uint8
        assert frames[0].shape[1] == pytest.approx(panels * 350, rel=0.1)
        assert (frames[0] != frames[2]).any()
        path = plot.save_animation(frames, tmp_path / "a.gif", seconds=1.0)
        with Image.open(path) as picture:
            assert picture.n_frames == 3 and picture.size == frames[0].shape[1::-1]
            assert picture.info["duration"] == 330  # a third of the time, to GIF's hundredths


def test_an_animation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        plot.save_animation([], tmp_path / "a.gif")


def test_figures_leave_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    density()
    assert dict(matplotlib.rcParams) == before


def test_confusion_shades_mistakes_and_writes_every_count() -> None:
    counts = np.array([[90, 10], [0, 50]])
    (axes,) = plot.confusion_figure(counts).axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[0, 0.1], [0, 0]])
    assert sorted(text.get_text() for text in axes.texts) == ["10", "50", "90"]
    with pytest.raises(ValueError, match=r"not \(classes, classes\)"):
        plot.confusion_figure(np.zeros((2, 3)))


def test_a_classifier_without_an_ode_has_no_panel_of_evaluations() -> None:
    titles = [axes.get_title("left") for axes in FIGURES["classifier without an ODE"]().axes]
    assert titles == ["training loss", "validation error (%)"]
    assert len(FIGURES["classifier"]().axes) == 3
