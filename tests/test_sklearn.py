"""A flow as an estimator of scikit-learn."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from cnf.sklearn import FlowDensity


def quick(**settings: object) -> FlowDensity:
    return FlowDensity(**{"hidden": (8,), "steps": 5, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 2)) @ np.array([[2.0, 0.5], [0.0, 0.3]]) + [3.0, -1.0]


def outcomes(estimator: object) -> dict[str, str]:
    """(name of a check and which one of that name) → passed, skipped or failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that scikit-learn skips
        found = check_estimator(estimator, on_fail="raise", on_skip=None)
    return {f"{i} {one['check_name']}": one["status"] for i, one in enumerate(found)}


def test_every_check_that_kernel_density_passes_is_passed():
    ours, theirs = outcomes(quick()), outcomes(KernelDensity())
    assert ours == theirs
    assert len(ours) >= 45
    assert set(ours.values()) <= {"passed", "skipped"}
    assert sum(status == "passed" for status in ours.values()) >= 43


def test_scores_are_the_flows_log_densities_in_double_precision(rows):
    density = quick().fit(rows)
    scores = density.score_samples(rows)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, density.flow_.log_prob(rows).detach().numpy())
    assert density.score(rows) == pytest.approx(scores.mean())


def test_a_random_state_makes_fits_and_samples_the_same(rows):
    one, two = quick().fit(rows), quick().fit(rows)
    np.testing.assert_array_equal(one.score_samples(rows), two.score_samples(rows))
    np.testing.assert_array_equal(one.sample(7), two.sample(7))
    assert not np.array_equal(one.sample(7), one.sample(7, random_state=1))
    assert not np.array_equal(
        one.score_samples(rows), quick(random_state=1).fit(rows).score_samples(rows)
    )


def test_a_fit_learns_the_data(rows):
    density = FlowDensity(hidden=(16,), steps=150, random_state=0).fit(rows)
    covariance = np.cov(rows.T)
    gaussian = -1 - np.log(2 * np.pi) - np.linalg.slogdet(covariance)[1] / 2
    assert density.score(rows) > gaussian - 0.1
    drawn = density.sample(4000)
    np.testing.assert_allclose(drawn.mean(0), rows.mean(0), atol=0.25)


def test_clones_and_pickles_keep_their_settings_and_scores(rows):
    density = quick(support=None, lr=1e-3).fit(rows)
    copy = clone(density)
    assert copy.get_params() == density.get_params()
    with pytest.raises(NotFittedError):
        copy.score_samples(rows)
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(again.score_samples(rows), density.score_samples(rows))


def test_names_of_a_frames_columns_are_remembered(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows, columns=["height", "weight"])
    density = quick().fit(frame)
    assert density.feature_names_in_.tolist() == ["height", "weight"]
    assert density.n_features_in_ == 2
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame.rename(columns={"weight": "mass"}))


def test_grids_are_searched_and_pipelines_scored(rows):
    search = GridSearchCV(quick(), {"hidden": [(4,), (8,)]}, cv=2).fit(rows)
    assert search.best_params_["hidden"] in [(4,), (8,)]
    assert np.isfinite(search.best_score_)
    pipeline = make_pipeline(StandardScaler(), quick()).fit(rows)
    assert pipeline.score_samples(rows).shape == (200,)


def test_weights_of_nothing_leave_rows_out(rows):
    far = np.concatenate([rows, rows + 1000.0])
    weights = np.repeat([1.0, 0.0], 200)
    weighted = quick().fit(far, sample_weight=weights)
    np.testing.assert_array_equal(
        weighted.score_samples(rows), quick().fit(rows).score_samples(rows)
    )


def test_weights_move_the_density_as_repetition_does():
    rng = np.random.default_rng(0)
    left, right = rng.normal(-2, 0.3, (300, 1)), rng.normal(2, 0.3, (300, 1))
    x, weights = np.concatenate([left, right]), np.repeat([3.0, 1.0], 300)
    settings = {"hidden": (32,), "steps": 250, "method": "fm", "validation": 0.2}
    weighted = quick(**settings).fit(x, sample_weight=weights)
    repeated = quick(**settings).fit(np.repeat(x, weights.astype(int), axis=0))
    for density in (weighted, repeated):
        share = (density.sample(4000) < 0).mean()
        assert share == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (np.ones(3), "3 entries"),
        (np.full(200, -1.0), r"sample_weight\[0\] is -1"),
        (np.zeros(200), "is zero"),
        (np.full(200, np.nan), "sample_weight"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(rows, weights, said):
    with pytest.raises(ValueError, match=said):
        quick().fit(rows, sample_weight=weights)


def test_seconds_take_the_place_of_steps(rows):
    assert np.isfinite(quick(steps=None, seconds=0.2).fit(rows).score(rows))
    with pytest.raises(ValueError, match="both budgets"):
        quick(seconds=1.0).fit(rows)
