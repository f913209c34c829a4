"""S8: nowhere in the program do bytes become code: no pickle, no torch.load, no eval, no yaml.load.

The syntax trees of all modules are walked, those of the packages that only the coordinator or a client use
among them. What is forbidden is proven to be found by planted examples.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("fedsim", "server", "client", "strategies")
MODULES = frozenset({
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "shelve",
    "code", "codeop", "runpy",
})  # fmt: skip
"""Whoever imports one of these can load or run what somebody else wrote."""
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
FUNCTIONS = frozenset({
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.serialization.load",
    "torch.package.PackageImporter",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "numpy.lib.format.read_array",
    "pandas.read_pickle", "os.system", "os.popen", "multiprocessing.reduction.ForkingPickler",
})  # fmt: skip
READERS = frozenset({"numpy.load", "numpy.lib.npyio.NpzFile", "numpy.lib.format.read_array"})
"""These unpickle where they are told so."""
PIPES = frozenset({"send", "recv", "get", "put"})
"""Methods of a multiprocessing connection or queue that pickle; `send_bytes` and `recv_bytes` do not."""
LOCAL = {
    "fedsim/sweep/workers.py": {"recv", "send"},
    "fedsim/sweep/cell_process.py": {"send"},
}
"""A sweep talks to processes that it started itself, over pipes without a name, of nothing from outside."""


def found_in(source: str, file: str) -> Iterator[str]:
    """What is forbidden in the text of a module, each with its line."""
    tree = ast.parse(source)
    names = imported(tree)
    pipes = any(full.split(".")[0] == "multiprocessing" for full in names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{node.lineno}: import of {name}" for name in forbidden_modules(node))
        if isinstance(node, ast.Name | ast.Attribute) and full_name(node, names) in FUNCTIONS:
            yield f"{node.lineno}: {full_name(node, names)}"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield f"{node.lineno}: {node.func.id}()"
        for keyword in node.keywords:
            constant = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not constant:
                yield f"{node.lineno}: allow_pickle"
            if keyword.arg == "shell" and not constant:
                yield f"{node.lineno}: shell"
        if full_name(node.func, names) in READERS and len(node.args) > 2:
            yield f"{node.lineno}: allow_pickle by position"
        if pipes and isinstance(node.func, ast.Attribute) and node.func.attr in PIPES:
            method = node.func.attr
            own = full_name(node.func, names).startswith("fedsim.client.frames.")
            reads = method == "recv" and not node.args
            writes = method in ("send", "put") and len(node.args) == 1
            if not own and (reads or writes) and method not in LOCAL.get(file, set()):
                yield f"{node.lineno}: .{method}() pickles"


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what it stands for, in full."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules of an import that are forbidden."""
    given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return [name for name in given if name.split(".")[0] in MODULES]


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; empty where it begins with something else than an imported name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return ""
    return ".".join([names[node.id], *reversed(parts)])


def sources(repository: Path) -> Iterator[Path]:
    """Every module; links inside ``fedsim/`` lead to folders that are walked by themselves."""
    for package in PACKAGES:
        for here, folders, files in os.walk(repository / package):
            folders[:] = [folder for folder in folders if folder != "__pycache__"]
            yield from (Path(here) / file for file in sorted(files) if file.endswith(".py"))


def test_no_module_can_turn_foreign_bytes_into_code(repository: Path) -> None:
    """S8."""
    found, count = [], 0
    for path in sources(repository):
        name = path.relative_to(repository).as_posix()
        found += [f"{name}:{text}" for text in found_in(path.read_text(encoding="utf-8"), name)]
        count += 1
    assert found == []
    assert count > 300


def test_the_exceptions_are_still_there(repository: Path) -> None:
    """S8: an exception that nobody needs is a hole."""
    for name in LOCAL:
        text = (repository / name).read_text(encoding="utf-8")
        assert list(found_in(text, "elsewhere.py")), name
        assert "grpc" not in text


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import dill as safe",
        "from cloudpickle import loads",
        "import marshal",
        "import shelve, json",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load\nload('x')",
        "from torch import load as read\nreader = read",
        "import torch.jit\ntorch.jit.load('x')",
        "eval('1')",
        "if True:\n    exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import numpy as np\nnp.load('x', None, True)",
        "import pandas as pd\npd.read_pickle('x')",
        "from multiprocessing.connection import Connection\ndef f(c: Connection):\n    return c.recv()",
        "import multiprocessing as mp\ndef f(c):\n    c.send([1])",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_what_is_forbidden_is_found(planted: str) -> None:
    """S8."""
    assert list(found_in(planted, "planted.py"))


@pytest.mark.parametrize(
    "planted",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import numpy as np\nnp.load('x')",
        "import torch\ntorch.save({}, 'x')",
        "import json\njson.loads(text)",
        "import yaml\nyaml.safe_load(text)",
        "from multiprocessing.connection import Connection\ndef f(c: Connection):\n    return c.recv_bytes()",
        "from multiprocessing import connection\nfrom fedsim.client import frames\nframes.send(pipe, {})",
        "import queue\nqueue.SimpleQueue().put(1)",
        "def f(generator):\n    generator.send(1)",
    ],
)
def test_what_is_allowed_is_not_found(planted: str) -> None:
    """S8."""
    assert list(found_in(planted, "planted.py")) == []
