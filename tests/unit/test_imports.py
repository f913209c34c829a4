"""What happens to the garbage collector while modules are imported, and what a run imports at all."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.imports import uncollected

BUILT = """
import json, sys
from pathlib import Path
from fedsim.config import load_config, to_toml
from fedsim.runs.folder import RunFolder
from fedsim.simulation.run import Simulation
from fedsim.simulation.session import execute

sets = ["model.name='mlp'", "engine.workers=2", "run.rounds=3"]
class Enough(Exception): pass
def stop(record):
    raise Enough
sim = Simulation(load_config(None, sets=[*sets, *{more!r}]).config)
folder = RunFolder.create(Path("runs"), "a", config_text=to_toml(sim.config), facts=sim.facts, command=[])
try:
    execute(sim, folder, on_record=stop)
except Enough:
    pass
print(json.dumps([sim.config.engine.name, sorted(sys.modules)]))
"""
LATE = {
    "PIL", "datasets", "flwr", "grpc", "matplotlib", "onnx", "opacus", "pandas", "pyarrow", "scipy",
    "sklearn", "sqlalchemy", "sympy", "torch._dynamo", "torch._inductor", "torch.onnx",
}  # fmt: skip


@pytest.fixture
def collected_again() -> Iterator[None]:
    """Whatever a test does to the collector is undone."""
    frozen = gc.get_freeze_count()
    yield
    gc.enable()
    if gc.get_freeze_count() > frozen:
        gc.unfreeze()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that nobody has imported."""
    (tmp_path / "never_imported_before.py").write_text("kept = [[] for _ in range(100)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "never_imported_before", raising=False)
    return "never_imported_before"


def test_nothing_is_collected_meanwhile_and_the_collector_is_on_again_afterwards() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(collected_again: None) -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), uncollected():
        __import__("there_is_no_such_module")
    assert gc.isenabled()


def test_what_was_imported_is_not_looked_at_again(module: str, collected_again: None) -> None:
    before = gc.get_freeze_count()
    with uncollected(keep=True):
        __import__(module)
    assert gc.get_freeze_count() > before + 100


def test_without_an_import_nothing_is_kept_for_good() -> None:
    before = gc.get_freeze_count()
    with uncollected(keep=True):
        garbage: list[object] = [[] for _ in range(100)]
    assert garbage
    assert gc.get_freeze_count() <= before


def test_a_library_keeps_nothing_of_its_users_for_good(module: str) -> None:
    before = gc.get_freeze_count()
    with uncollected():
        __import__(module)
    assert gc.get_freeze_count() <= before


def test_nothing_is_imported_before_the_first_round_that_it_does_not_need(tmp_path: Path) -> None:
    engine, loaded = begun(tmp_path, "engine.name='auto'")
    assert engine == "fused"
    assert set(loaded) & LATE == set()


def test_the_check_notices_what_an_engine_brings_along(tmp_path: Path) -> None:
    engine, loaded = begun(tmp_path, "engine.name='stacked'")
    assert engine == "stacked"
    assert "torch._dynamo" in loaded  # by vmap


def begun(folder: Path, *sets: str) -> tuple[str, list[str]]:
    """The engine of a run whose first record is written, and the modules that were imported for it."""
    code = BUILT.format(more=list(sets))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    engine, loaded = json.loads(done.stdout.splitlines()[-1])
    return engine, loaded
