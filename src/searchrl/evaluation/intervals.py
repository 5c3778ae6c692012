"""Estimates with 95 % confidence intervals: Wilson's, and the percentile bootstrap over questions."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.96
"""Two-sided 95 %."""

RESAMPLES = 2000


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """``0.412 [0.370, 0.455]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion (1927); sensible at 0 and n, unlike the normal one."""
    share = successes / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def bootstrap(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], *, seed: int, name: str
) -> NDArray[np.float64]:
    """Ratios of sums over resampled questions (Efron 1979), all metrics on the same resamples.

    A question is drawn with all its samples, so answers to one question are never taken for independent.

    Args:
        numerators: [questions, metrics] what each question adds, over all its samples.
        denominators: [questions, metrics] what it weighs; a mean has the number of samples.
        seed: of the resampling.
        name: what is resampled; other names resample independently.

    Returns:
        [RESAMPLES, metrics]; NaN where a resample holds nothing to divide by.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    questions, metrics = numerators.shape
    stacked = np.concatenate([numerators, denominators], axis=1)
    sums = np.empty((RESAMPLES, 2 * metrics))
    for row in range(RESAMPLES):  # one row at a time: all at once would be questions x RESAMPLES numbers
        counts = np.bincount(rng.integers(questions, size=questions), minlength=questions)
        sums[row] = counts @ stacked
    return ratios(sums[:, :metrics], sums[:, metrics:])


def ratios(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element by element; NaN where the denominator is 0."""
    undefined = np.full_like(numerators, np.nan)
    return np.divide(numerators, denominators, out=undefined, where=denominators > 0)


def percentile_interval(value: float, replicates: NDArray[np.float64]) -> Interval:
    """The middle 95 % of ``replicates`` [n]; those that are undefined (NaN) are left out."""
    low, high = np.quantile(replicates[~np.isnan(replicates)], [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))
