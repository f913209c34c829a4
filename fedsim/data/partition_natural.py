"""Partitioners that follow where data come from: real owners, and noisy sensors."""

from __future__ import annotations

import numpy as np

from fedsim.data.partition_by_size import iid
from fedsim.data.partition_scheme import Floats, Ints, Scheme, above_zero, grouped
from fedsim.errors import DataError


def natural() -> Scheme:
    """Every owner is a client: the speaking role, or the client column of a table.

    The number of clients is that of the owners with at least ``min_examples``; asking for fewer
    ``clients`` takes that many of them at random. Rows keep the order of the source.

    Raises (when it divides):
        DataError: FS-DAT-042, the data do not say who owns what.
    """

    def divide(
        labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        if owners is None:
            raise DataError(
                "these data have no natural clients",
                code="FS-DAT-042",
                where="data.partition",
                why="no owner is recorded for any example",
                hint="choose another partition, such as dirichlet, or name the client column",
            )
        return grouped(owners, int(owners.max(initial=-1)) + 1)

    return Scheme(divide, short="drop", needs_clients=False)


def feature_noise(*, sigma: float) -> Scheme:
    """An IID division in which client i of N sees its inputs through noise of deviation sigma·i/N.

    Li, Diao, Chen and He 2022, "Federated learning on non-IID data silos", section IV-B
    (noise-based feature imbalance), i counted from 1. sigma·i/N is the standard deviation here.

    Args:
        sigma: > 0, deviation of the last client: for images a fraction of full scale, for features
            in their own unit.
    """
    largest = above_zero("sigma", sigma)

    def deviations(clients: int) -> Floats:
        return largest * np.arange(1, clients + 1, dtype=np.float64) / clients

    return Scheme(iid(), deviations=deviations)
