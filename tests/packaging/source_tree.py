"""The source tree as the packaging tests see it: folders, modules and what they import."""

from __future__ import annotations

import ast
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def files_by_package(root: Path = ROOT) -> dict[str, list[Path]]:
    """Every file below the mapped folders, under the innermost package that holds it.

    A folder with Python files is a package; one without (templates, presets) is data of the package
    above it. The links inside ``fedsim/`` are not followed: what they point to is mapped itself.
    """
    found: dict[str, list[Path]] = {}
    for package, folder in MAPPED.items():
        top = root / folder
        mapped_inside = (
            {top / name.removeprefix("fedsim.") for name in MAPPED} if package == "fedsim" else set()
        )
        names = {top: package}
        for here, folders, files in os.walk(top):
            place = Path(here)
            folders[:] = sorted(
                f for f in folders if f != "__pycache__" and f[0] != "." and place / f not in mapped_inside
            )
            name = names[place]
            is_package = place == top or any(f.endswith(".py") for f in files)
            owner = name if is_package else name.rpartition(".")[0]
            if not is_package:
                names[place] = owner
            for folder_name in folders:
                names[place / folder_name] = f"{owner}.{folder_name}"
            found.setdefault(owner, []).extend(place / f for f in sorted(files) if f[0] != ".")
    return found


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the project."""
    found = {}
    for package, files in files_by_package().items():
        for file in files:
            if file.suffix == ".py":
                found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


@dataclass(frozen=True)
class Import:
    """One imported module; `name` is what is taken out of it, empty for the module itself."""

    module: str
    name: str
    line: int
    when_loaded: bool  # not inside a function, nor for type checkers alone


def imports(source: str, known: set[str] | dict[str, Path]) -> Iterator[Import]:
    """The imports of a module's text, those inside functions too.

    ``from a import b`` counts as the module ``a.b`` where `known` has one. A relative import gives a
    module that begins with a dot.
    """

    def walk(node: ast.AST, when_loaded: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, "", child.lineno, when_loaded)
            elif isinstance(child, ast.ImportFrom):
                start = "." * child.level + (child.module or "")
                for alias in child.names:
                    whole = f"{start}.{alias.name}"
                    if whole in known:
                        yield Import(whole, "", child.lineno, when_loaded)
                    else:
                        yield Import(start, alias.name, child.lineno, when_loaded)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), when_loaded)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, when_loaded and not function)

    yield from walk(ast.parse(source), True)
