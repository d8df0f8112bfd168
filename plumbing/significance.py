"""Is a difference between runs real? Intervals, a permutation test, and a correction for many comparisons.

scipy's bootstrap cannot resample seeds and posts together, so all three are written by hand. scipy is their oracle in
the tests.
"""

from collections.abc import Callable

import numpy as np


def interval(values: np.ndarray, statistic: Callable = np.mean, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of values [S seeds, P posts], both drawn again with replacement.

    Percentiles of `draws` resamples. With three seeds it is rather too narrow: three values cannot show more.
    """
    rng = np.random.default_rng(0)
    s, p = values.shape
    drawn = [statistic(values[rng.integers(s, size=s)][:, rng.integers(p, size=p)]) for _ in range(draws)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def sign_flip(difference: np.ndarray, draws: int = 9999) -> float:
    """Two-sided p-value of paired differences [P] under "each is as likely as its opposite": (Fisher 1935).

        p = (1 + number of drawn sign patterns whose |mean| reaches the observed one) / (1 + draws)
    """
    signs = np.random.default_rng(0).integers(0, 2, size=(draws, len(difference)), dtype=np.int8) * 2 - 1  # [draws, P]
    reach = np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    return (1 + int(reach.sum())) / (1 + draws)


def holm(p: list[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the smallest times n, the next times n - 1, ..., never falling, at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's (1904) rho: the correlation of the ranks of x [n] and y [n], in [-1, 1]; equal values share a rank.

    0 where one of the two is the same everywhere: then it orders nothing.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 100.0, 2.0]))  # ranks 1 2 3 and 1 3 2
    0.5
    """
    ranks = [(values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2 for values in (x, y)]  # [n]
    a, b = (rank - rank.mean() for rank in ranks)
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0
