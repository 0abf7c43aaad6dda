"""How sure a mean is: seeded bootstrap over samples, or over dialogues where several answers come from one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import Random
from statistics import stdev

DRAWS = 1000


def bootstrap_means(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0, draws: int = DRAWS
) -> list[float]:
    """Means of ``draws`` resamples with replacement, the same ones for the same seed.

    clusters: one per value. Whole clusters are drawn, since answers of one dialogue are not independent; None draws single values.
    """
    if not values:
        return []
    groups: dict[Hashable, tuple[float, int]] = {}
    for value, cluster in zip(values, range(len(values)) if clusters is None else clusters, strict=True):
        total, count = groups.get(cluster, (0.0, 0))
        groups[cluster] = (total + value, count + 1)
    pool, rng, means = list(groups.values()), Random(seed), []
    for _ in range(draws):
        drawn = rng.choices(pool, k=len(pool))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    return means


def bootstrap_error(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0, draws: int = DRAWS
) -> float | None:
    """Standard error of the mean; None where nothing can be said (fewer than two samples or clusters)."""
    if len(set(range(len(values)) if clusters is None else clusters)) < 2:
        return None
    return stdev(bootstrap_means(values, clusters, seed=seed, draws=draws))


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float] | None:
    """Percentile interval of the mean that holds ``level`` of the resampled means; None as in ``bootstrap_error``."""
    if len(set(range(len(values)) if clusters is None else clusters)) < 2:
        return None
    means = sorted(bootstrap_means(values, clusters, seed=seed, draws=draws))
    cut = round((1 - level) / 2 * len(means))
    return means[cut], means[-1 - cut]
