"""A flow as an estimator of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from cnf.flow.flow import Flow

STEPS = 1000
_FLOATS = (np.float64, np.float32)


class FlowDensity(DensityMixin, BaseEstimator):
    """A continuous normalizing flow for scikit-learn: fit, score_samples, score, sample.

    hidden: widths of the field's hidden layers, None to choose them on rows held back; support:
    where the data can be, "positive" or (low, high); method: "auto", "fm" or "ml", as in
    `Flow.fit`; steps: of training, at most, the same on every machine; seconds: a budget of time in
    their place, where steps is None; lr, batch_size: None for the flow's own; validation: the share
    of the rows that choose the best weights; device: "cpu", "cuda"; verbose: whether a bar is
    drawn; random_state: an int makes fits and samples the same every time.
    flow_: the fitted `Flow`, for whatever else a flow can do; n_features_in_, feature_names_in_.

    >>> from sklearn.datasets import make_moons
    >>> x, _ = make_moons(300, noise=0.1, random_state=0)
    >>> density = FlowDensity(hidden=(16,), steps=30, random_state=0).fit(x)
    >>> density.score_samples(x).shape, density.score_samples(x).dtype
    ((300,), dtype('float64'))
    >>> density.sample(5).shape
    (5, 2)
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] | None = None,
        support: Any = None,
        method: str = "auto",
        steps: int | None = STEPS,
        seconds: float | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: float = 0.1,
        device: str | None = None,
        verbose: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.support = support
        self.method = method
        self.steps = steps
        self.seconds = seconds
        self.lr = lr
        self.batch_size = batch_size
        self.validation = validation
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """This estimator, fitted to rows X (n, d), each counting as much as its weight, (n,).

        y is not looked at.  Raises ValueError for data that cannot be fitted.
        """
        x = validate_data(self, X, dtype=_FLOATS, ensure_min_samples=2)
        seed = _seed(self.random_state)
        flow = Flow(x.shape[1], hidden=self.hidden, support=self.support, seed=seed)
        flow.fit(
            x,
            method=self.method,
            steps=self.steps,
            seconds=self.seconds,
            seed=seed,
            lr=self.lr,
            batch_size=self.batch_size,
            validation=self.validation,
            sample_weight=sample_weight,
            device=self.device,
            progress=self.verbose,
        )
        # what is fitted in single precision is evaluated in double: a row's score then depends on
        # no other row, to the last few digits
        self.flow_ = flow.double() if flow.device.type != "mps" else flow
        return self

    @torch.no_grad()
    def score_samples(self, X: Any) -> np.ndarray:
        """Log-densities in nats of rows X (n, d), float64, (n,); −∞ outside the support."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=_FLOATS, reset=False)
        return self.flow_.log_prob(x).double().cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-density of rows X (n, d), in nats; y is not looked at."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """n_samples draws, float64, (n_samples, d).

        random_state: by default the estimator's own: an int gives the same draws every time.
        """
        check_is_fitted(self)
        state = self.random_state if random_state is None else random_state
        return self.flow_.sample(n_samples, seed=_seed(state)).double().cpu().numpy()


def _seed(random_state: Any) -> int:
    """A seed for torch from what scikit-learn takes for one."""
    return int(check_random_state(random_state).randint(2**31 - 1))
