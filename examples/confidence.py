"""How sure a mean of a few seeds is."""

import math

import numpy as np
import scipy.stats


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % confidence interval (Student's t), NaN for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return np.mean(values).item(), (scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)).item()
