"""What is installed is what lies in the source tree: packages, data files, links, version."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.source_tree import MAPPED, PROJECT, ROOT, files_by_package

SETUP = PROJECT["tool"]["setuptools"]
LINKED = sorted(name.removeprefix("fedsim.") for name in MAPPED if name != "fedsim")


def data_files(root: Path = ROOT) -> list[tuple[str, str]]:
    """(package, path below its folder) of every file that is no Python module."""
    found = []
    for package, files in files_by_package(root).items():
        parent = next(name for name in (package, *_parents(package)) if name in MAPPED)
        folder = root / MAPPED[parent] / package.removeprefix(parent).removeprefix(".").replace(".", "/")
        found += [(package, f.relative_to(folder).as_posix()) for f in files if f.suffix != ".py"]
    return found


def _parents(package: str) -> list[str]:
    parts = package.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def test_the_package_list_names_every_folder_with_python_files() -> None:
    assert sorted(SETUP["packages"]) == sorted(files_by_package())


def test_a_planted_folder_is_noticed(tmp_path: Path) -> None:
    for folder in MAPPED.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    planted = tmp_path / "fedsim" / "planted"
    planted.mkdir()
    (planted / "module.py").touch()
    (planted / "templates").mkdir()
    (planted / "templates" / "page.html").touch()
    assert set(files_by_package(tmp_path)) - set(SETUP["packages"]) == {"fedsim.planted"}
    assert ("fedsim.planted", "templates/page.html") in data_files(tmp_path)


def test_every_data_file_is_listed_under_its_package() -> None:
    listed = SETUP["package-data"]
    missing = [
        f"{package}: {path}"
        for package, path in data_files()
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in listed.get(package, ()))
    ]
    assert not missing, f"not in [tool.setuptools.package-data]: {missing}"


def test_every_pattern_for_data_files_finds_one() -> None:
    found = data_files()
    idle = [
        f"{package}: {pattern}"
        for package, patterns in SETUP["package-data"].items()
        for pattern in patterns
        if not any(p == package and fnmatch.fnmatchcase(path, pattern) for p, path in found)
    ]
    assert not idle


def test_mapped_folders_beside_the_core_are_flat() -> None:
    beside = {name for name in MAPPED if name != "fedsim"}
    # Migrations are found by alembic as a folder of their own.
    inside = {p for p in files_by_package() if p.rpartition(".")[0] in beside}
    assert inside == {"fedsim.server.migrations"}


@pytest.mark.parametrize("package", sorted(files_by_package()))
def test_the_installed_package_holds_every_file_of_the_source(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None, "the package is not installed"
    assert spec.submodule_search_locations, "not a package"
    parent = next(name for name in (package, *_parents(package)) if name in MAPPED)
    source = ROOT / MAPPED[parent] / package.removeprefix(parent).removeprefix(".").replace(".", "/")
    installed = Path(next(iter(spec.submodule_search_locations)))
    for file in files_by_package()[package]:
        there = installed / file.relative_to(source)
        assert there.is_file(), f"{there} was not installed"
        assert there.read_bytes() == file.read_bytes(), f"{there} is not the source's"


def test_the_tests_run_against_the_installation_they_are_meant_for() -> None:
    import fedsim

    inside = Path(fedsim.__file__).resolve().is_relative_to(ROOT)
    if os.environ.get("FEDSIM_TEST_INSTALLED") == "wheel":
        assert not inside or ".venv" in Path(fedsim.__file__).parts, "the source tree hides the wheel"
    else:
        assert inside


def test_the_version_is_the_same_in_the_package_and_in_its_metadata() -> None:
    import fedsim

    assert importlib.metadata.version("fedsim") == fedsim.__version__


def test_the_package_says_that_it_is_typed_and_carries_its_licence() -> None:
    import fedsim

    assert (Path(fedsim.__file__).parent / "py.typed").is_file()
    files = importlib.metadata.files("fedsim") or []
    assert any(file.name == "LICENSE" for file in files)


@pytest.mark.parametrize("name", LINKED)
def test_a_mapped_folder_refuses_its_bare_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"import fedsim.{name}" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="links are not checked out everywhere on Windows")
@pytest.mark.parametrize("name", LINKED)
def test_static_tools_find_a_mapped_folder_through_a_relative_link(name: str) -> None:
    link = ROOT / "fedsim" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
