"""Which combination of values comes next: grid, random, or bayes (expected improvement of a Gaussian process).

Random and bayes work on points of the unit cube, one coordinate per varied parameter; `Parameter.at` turns a
coordinate into a value of its distribution.

Own and short because W&B's `sweeps` package does not go with our versions (0.3.0 wants numpy < 2); the results are
alike: the order of its grid, its distributions, and for bayes the same kernel and acquisition.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from e2e_sae.seeds import seed_for
from e2e_sae.sweeps.parameters import Parameter

Point = list[float]
"""A coordinate in (0, 1) for each varied parameter."""

N_CANDIDATES = 1000
"""Points that bayes chooses from; W&B's number."""
MIN_KNOWN = 2
"""Results that bayes wants before it models them; W&B's number."""


def grid_values(parameters: Sequence[Parameter]) -> Iterator[list[Any]]:
    """Yields the grid in W&B's order: the last parameter changes fastest.

    Raises:
        UserError: a parameter has no finite list of values.
    """
    yield from (list(values) for values in itertools.product(*[p.grid() for p in parameters]))


def random_point(parameters: Sequence[Parameter], n: int) -> Point:
    """Returns the n-th random point. Each coordinate depends on n and its parameter's name alone: a changed sweep
    file keeps the draws of the parameters that it keeps."""
    return [random.Random(seed_for(0, "sweep", p.name, n)).uniform(1e-9, 1 - 1e-9) for p in parameters]


def bayes_point(
    parameters: Sequence[Parameter], points: Sequence[Point], costs: Sequence[float | None], n: int
) -> Point:
    """Returns the candidate with the greatest expected improvement, or a random point while little is known.

    A Gaussian process with a Matern-3/2 kernel models the costs; for runs that are still going on it is taken at its
    word (its mean counts as their cost), so that runs side by side do not all try the same.

    Args:
        parameters: what varies.
        points: the runs so far.
        costs: their results, less being better; None: not known yet. Finite.
        n: number of the new point, for its random numbers.
    """
    known = [(point, cost) for point, cost in zip(points, costs, strict=True) if cost is not None]
    if len(known) < MIN_KNOWN or not parameters:
        return random_point(parameters, n)
    from scipy.stats import norm

    x, y = np.array([point for point, _ in known]), np.array([cost for _, cost in known])
    running = [point for point, cost in zip(points, costs, strict=True) if cost is None]
    scale = float(y.std()) or 1.0
    y = (y - y.mean()) / scale
    model = _fitted(x, y)
    if running:
        x, y = np.vstack([x, running]), np.concatenate([y, model.predict(np.array(running))])
        model = _fitted(x, y)
    candidates = np.random.default_rng(seed_for(0, "sweep", "bayes", n)).uniform(
        1e-9, 1 - 1e-9, (N_CANDIDATES, len(parameters))
    )
    mean, std = model.predict(candidates, return_std=True)
    gain = float(y.min()) - mean
    z = gain / np.maximum(std, 1e-12)
    return candidates[int(np.argmax(gain * norm.cdf(z) + std * norm.pdf(z)))].tolist()


def _fitted(x: Any, y: Any) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    model = GaussianProcessRegressor(Matern(nu=1.5), alpha=1e-7, n_restarts_optimizer=2, random_state=2)
    with warnings.catch_warnings():
        # With few points the length scale often ends at its bound.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)
