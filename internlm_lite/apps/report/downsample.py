"""Reduces points but keeps spikes: each bucket of lines gives its minimum and maximum, or its mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internlm_lite.apps.report.columns import Numbers


class Buckets:
    """Splits `n` lines into points/2 buckets whose line counts differ by at most one; up to `points` lines are kept.

    A bucket has two positions, its first and last line. A column has there its minimum and maximum, in the order of
    their occurrence. So outliers are kept, and all columns share their x values.
    """

    def __init__(self, n: int, points: int) -> None:
        self.n = n
        self._rows: NDArray[np.intp] | None = None
        """[buckets, lines] indices of lines; a bucket that is one line shorter repeats its last line."""
        if n > max(2, points):
            edges = np.linspace(0, n, max(1, points // 2) + 1).astype(np.intp)
            first, last = edges[:-1, None], edges[1:, None] - 1
            self._rows = np.minimum(first + np.arange(int((last - first).max()) + 1), last)
            self._sizes = np.diff(edges)

    def positions(self, x: Numbers) -> Numbers:
        """x at the first and the last line of each bucket. [n] -> [positions]."""
        return x if self._rows is None else x[self._rows[:, [0, -1]]].reshape(-1)

    def extremes(self, y: Numbers) -> Numbers:
        """Minimum and maximum of y per bucket, in order of occurrence; nan without numbers. [n] -> [positions]."""
        if self._rows is None:
            return y
        values = y[self._rows]
        missing = np.isnan(values)
        low = np.where(missing, np.inf, values).argmin(axis=1)
        high = np.where(missing, -np.inf, values).argmax(axis=1)
        order = np.sort(np.stack([low, high], axis=1), axis=1)
        return np.take_along_axis(values, order, axis=1).reshape(-1)

    def means(self, y: Numbers) -> Numbers:
        """Sum of y over a bucket / its lines, at both positions; nan without numbers. [n] -> [positions].

        Means of several columns may be added and divided; extremes may not, as they come from different lines.
        """
        if self._rows is None:
            return y
        there = ~np.isnan(y)
        starts = self._rows[:, 0]
        sums = np.add.reduceat(np.where(there, y, 0.0), starts)
        means = np.where(np.add.reduceat(there.astype(np.intp), starts) > 0, sums / self._sizes, np.nan)
        return np.repeat(means, 2)
