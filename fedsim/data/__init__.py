"""Data: load a set by name, divide it among clients, or bring your own.

data = fedsim.data.load("digits").split("dirichlet", clients=100, seed=1, alpha=0.3)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim.data.dataset import Dataset, Split
from fedsim.data.federated import FederatedData
from fedsim.data.own import from_arrays, from_datasets
from fedsim.data.transforms import Transforms

__all__ = [
    "Dataset",
    "FederatedData",
    "Split",
    "Transforms",
    "from_arrays",
    "from_datasets",
    "load",
]


def load(
    name: str,
    path: Path | str | None = None,
    **params: Any,  # Any: the data set's own parameters, checked by its factory
) -> Dataset:
    """The data set registered as `name` (``fedsim plugins`` lists them).

    Args:
        path: local folder or file to read; sets of the hub are fetched when None.
        params: keyword parameters of the data set's factory.

    Raises:
        RegistryError: no data set of that name.
        ConfigError: FS-DAT-011, a parameter the data set does not have, or a missing one.
        DataError: the data cannot be read.
    """
    import inspect

    from fedsim import registry
    from fedsim.errors import ConfigError

    factory = registry.load("datasets", name)
    if path is not None:
        params["path"] = path
    signature = inspect.signature(factory)
    try:
        signature.bind(**params)
    except TypeError as error:
        raise ConfigError(
            f"data set {name!r} cannot be loaded with these parameters",
            code="FS-DAT-011",
            where="data",
            why=f"{error}; it takes: {', '.join(signature.parameters) or 'none'}",
            hint=f"fedsim plugins show {name} describes them",
        ) from error
    dataset: Dataset = factory(**params)
    return dataset
