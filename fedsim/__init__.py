"""fedsim: a federated learning simulator and server.

The names below are the public interface; each is imported when it is first used, so that
``import fedsim`` and ``fedsim --help`` load neither torch nor anything heavy.

    result = fedsim.simulate(strategy="fedavg", rounds=10)

    with fedsim.connect("lab") as lab:  # a coordinator, by its entry in connections.toml or HOST:PORT
        run = lab.submit(Path("fedsim.toml"), name="digits")
        for event in lab.watch(run.run_id):
            print(event.type, event.data)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim.imports import uncollected

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedsim import data as data
    from fedsim import models as models
    from fedsim.client.operator import connect as connect
    from fedsim.data import FederatedData as FederatedData
    from fedsim.data import from_arrays as from_arrays
    from fedsim.data import from_datasets as from_datasets
    from fedsim.errors import FedsimError as FedsimError
    from fedsim.local import LocalSpec as LocalSpec
    from fedsim.opaque_client import Result as Result
    from fedsim.opaque_client import opaque as opaque
    from fedsim.runs.result import RunResult as RunResult
    from fedsim.simulation.api import resume as resume
    from fedsim.simulation.api import simulate as simulate
    from fedsim.simulation.run import Simulation as Simulation
    from fedsim.strategy import Strategy as Strategy
    from fedsim.strategy import make_strategy as make_strategy

_WHERE = {
    "FederatedData": "fedsim.data",
    "FedsimError": "fedsim.errors",
    "LocalSpec": "fedsim.local",
    "Result": "fedsim.opaque_client",
    "RunResult": "fedsim.runs.result",
    "Simulation": "fedsim.simulation.run",
    "Strategy": "fedsim.strategy",
    "connect": "fedsim.client.operator",
    "from_arrays": "fedsim.data",
    "from_datasets": "fedsim.data",
    "make_strategy": "fedsim.strategy",
    "opaque": "fedsim.opaque_client",
    "resume": "fedsim.simulation.api",
    "simulate": "fedsim.simulation.api",
}
_MODULES = ("data", "models")

__all__ = ["__version__", *sorted([*_WHERE, *_MODULES])]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        with uncollected():
            return getattr(import_module(_WHERE[name]), name)
    if name in _MODULES:
        with uncollected():
            return import_module(f"fedsim.{name}")
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
