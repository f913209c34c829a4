"""What answers at once loads nothing heavy. No times: what is in ``sys.modules`` is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "asyncio",
    "datasets",
    "fastapi",
    "flwr",
    "flwr_datasets",
    "grpc",
    "matplotlib",
    "numpy",
    "onnx",
    "opacus",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "torch",
}

COMMAND = """
import json, sys
from fedsim.cli import main
sys.argv = ["fedsim", *{arguments!r}]
try:
    main()
except SystemExit as end:
    code = end.code or 0
else:
    code = 0
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import fedsim, json, sys; dir(fedsim); print(json.dumps(sorted(sys.modules)))"
    assert HEAVY & set(json.loads(run(code, tmp_path).stdout)) == set()


def test_the_check_notices_a_module_that_is_loaded(tmp_path: Path) -> None:
    code = "import fedsim, fedsim.types, json, sys; print(json.dumps(sorted(sys.modules)))"
    assert {"numpy", "torch"} <= set(json.loads(run(code, tmp_path).stdout))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["explain", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = run(COMMAND.format(arguments=arguments), tmp_path)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert "fedsim" in done.stdout
    assert HEAVY & set(loaded) == set()
    assert list(tmp_path.iterdir()) == [], "asking for help wrote something"


def test_every_public_name_can_be_had(tmp_path: Path) -> None:
    code = "import fedsim; [getattr(fedsim, name) for name in fedsim.__all__]; print(len(fedsim.__all__))"
    assert int(run(code, tmp_path).stdout) > 10


def test_calling_a_coordinator_loads_no_torch(tmp_path: Path) -> None:
    code = "import fedsim, json, sys; fedsim.connect; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(code, tmp_path).stdout))
    assert "grpc" in loaded
    assert {"torch", "sqlalchemy"} & loaded == set()
