"""Who may import whom, read from the syntax trees; imports inside functions count too."""

from __future__ import annotations

import pytest

from tests.packaging.source_tree import Import, imports, modules

MODULES = modules()

# Packages that belong to the core beside the files of fedsim/ itself.
CORE = {"attacks", "availability", "data", "models", "privacy", "training"}
ROOMS = {"cli", "client", "interop", "pb", "runs", "server", "simulation", "strategies", "sweep"}

MAY_IMPORT = {
    "core": {"core"},
    "strategies": {"core", "strategies"},
    "client": {"core", "client"},
    "server": {"core", "runs", "server"},
    "runs": {"core", "runs"},
    "simulation": {"core", "client", "runs", "simulation"},
    "sweep": {"core", "runs", "simulation", "sweep"},
    "interop": {"core", "interop"},
    "pb": {"pb"},
    "cli": {"core", "facade", *ROOMS},
    "facade": {"core", "facade", *ROOMS},
}

WIRE = ("fedsim.client", "fedsim.server", "fedsim.transport", "fedsim.wire")
# Distributions that one place alone knows, and the places.
ONLY_IN = {
    "alembic": ("fedsim.server",),
    "dp_accounting": ("fedsim.privacy",),
    "fastapi": ("fedsim.server",),
    "fedsim.pb": (*WIRE, "fedsim.pb"),
    "flwr": ("fedsim.data.flower", "fedsim.interop"),
    "flwr_datasets": ("fedsim.data.flower", "fedsim.interop"),
    "grpc": (*WIRE, "fedsim.pb"),
    "grpc_health": WIRE,
    "prometheus_client": ("fedsim.server",),
    "psycopg": ("fedsim.server",),
    "opacus": ("fedsim.privacy",),
    "ray": ("fedsim.simulation.ray",),
    "sqlalchemy": ("fedsim.server",),
    "typer": ("fedsim.cli",),
    "uvicorn": ("fedsim.server",),
}
# Loading one of these costs a second or more: only the function that needs it does.
IN_FUNCTIONS_ONLY = {
    "datasets",
    "flwr_datasets",
    "matplotlib",
    "onnx",
    "onnxscript",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
}


def room(module: str) -> str:
    """The room a module belongs to."""
    parts = module.split(".")
    if parts == ["fedsim"]:
        return "facade"
    if parts == ["fedsim", "__main__"]:
        return "cli"
    if parts[1] in ROOMS:
        return parts[1]
    if parts[1] in CORE or f"fedsim.{parts[1]}" not in _packages():
        return "core"
    raise AssertionError(f"fedsim.{parts[1]} has no room: add it to this test's table")


def _packages() -> set[str]:
    return {name.rpartition(".")[0] for name in MODULES}


def below(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def complaints(module: str, found: Import) -> list[str]:
    """What is wrong with one import of a module."""
    what = f"{module}:{found.line} imports {found.module}"
    if found.module.startswith("."):
        return [f"{what}: relative"]
    wrong = []
    if found.module.split(".")[0] == "fedsim" and not below(found.module, "fedsim.pb"):
        # The version is the one thing that everybody may ask the facade for.
        version = found.module == "fedsim" and found.name == "__version__"
        if not version and room(found.module) not in MAY_IMPORT[room(module)]:
            wrong.append(f"{what}: {room(module)} may not import {room(found.module)}")
    for name, places in ONLY_IN.items():
        if below(found.module, name) and not any(below(module, place) for place in places):
            wrong.append(f"{what}: {name} belongs to {', '.join(places)}")
    if found.when_loaded and found.module.split(".")[0] in IN_FUNCTIONS_ONLY:
        wrong.append(f"{what}: to be imported inside the function that uses it")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert [c for found in imports(text, MODULES) for c in complaints(module, found)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fedsim.rounds", "from fedsim.simulation import run"),
        ("fedsim.rounds", "def f():\n    import fedsim.strategies.fedavg"),
        ("fedsim.data.cache", "from fedsim.runs.folder import RunFolder"),
        ("fedsim.rounds", "from fedsim import simulate"),
        ("fedsim.rounds", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedsim.cli"),
        ("fedsim.strategies.fedavg", "from fedsim.client import train"),
        ("fedsim.client.train", "import fedsim.server"),
        ("fedsim.runs.report", "from fedsim.simulation.run import Simulation"),
        ("fedsim.simulation.run", "from fedsim.strategies import fedavg"),
        ("fedsim.rounds", "from .types import Ids"),
        ("fedsim.rounds", "import opacus"),
        ("fedsim.data.images", "def f():\n    from flwr_datasets import partitioner"),
        ("fedsim.rounds", "import grpc"),
        ("fedsim.rounds", "from fedsim.pb import federation_pb2"),
        ("fedsim.config", "import typer"),
        ("fedsim.runs.plots", "import matplotlib.pyplot as plt"),
        ("fedsim.data.parquet", "class A:\n    import pyarrow.parquet"),
    ],
)
def test_a_forbidden_import_is_noticed(module: str, line: str) -> None:
    assert [c for found in imports(line, MODULES) for c in complaints(module, found)]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fedsim.rounds", "from fedsim import __version__"),
        ("fedsim.rounds", "import fedsim.types"),
        ("fedsim.simulation.session", "from fedsim.runs.folder import RunFolder"),
        ("fedsim.wire", "from fedsim.pb import federation_pb2\nimport grpc"),
        ("fedsim.cli.run", "import typer\nfrom fedsim.simulation.run import Simulation"),
        ("fedsim.runs.plots", "def f():\n    import matplotlib.pyplot as plt"),
        ("fedsim.data.flower", "def f():\n    from flwr_datasets import partitioner"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, line: str) -> None:
    assert [c for found in imports(line, MODULES) for c in complaints(module, found)] == []
