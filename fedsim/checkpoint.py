"""A run's state to disk and back: tensors in safetensors, everything else in JSON, no pickle.

The shape of the state is not stored: whoever loads has just built the same run from its
configuration, so the freshly initialised state is the template, and a file that does not fit it is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import FedsimError, RunFailed

Tree = Any  # a pytree of tensors, arrays, numbers, strings and None


def save_tree(tree: Tree, *, copy: bool = True) -> tuple[dict[str, Tensor], str]:
    """The tensors of a pytree by position, and a JSON text of its other leaves.

    Args:
        copy: False where they are written before anything could change them.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for position, leaf in enumerate(pytree.tree_leaves(tree)):
        name = f"{position:05d}"
        if isinstance(leaf, Tensor):
            tensors[name] = leaf.detach().cpu().contiguous()
        elif isinstance(leaf, np.ndarray):
            tensors[name] = torch.from_numpy(np.ascontiguousarray(leaf))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            plain[name] = leaf
        elif isinstance(leaf, np.integer | np.floating):
            plain[name] = leaf.item()
        else:
            raise TypeError(f"a state may hold tensors, arrays and numbers, not {type(leaf).__name__}")
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, json.dumps(plain)


def load_tree(template: Tree, tensors: Mapping[str, Tensor], text: str) -> Tree:
    """The saved pytree in the structure of `template`.

    Raises:
        RunFailed: the saved leaves do not fit the template.
    """
    plain = json.loads(text)
    leaves, structure = pytree.tree_flatten(template)
    if len(leaves) != len(tensors) + len(plain):
        raise _unfit(f"{len(tensors) + len(plain)} values were saved, {len(leaves)} are expected")
    loaded: list[Any] = []
    for position, leaf in enumerate(leaves):
        name = f"{position:05d}"
        if isinstance(leaf, Tensor | np.ndarray):
            saved = tensors.get(name)
            if saved is None or tuple(saved.shape) != tuple(leaf.shape):
                raise _unfit(f"value {position} has another shape")
            if isinstance(leaf, np.ndarray):
                loaded.append(saved.numpy().astype(leaf.dtype))
            else:
                loaded.append(saved.to(leaf.device, leaf.dtype))
        elif name in plain:
            loaded.append(plain[name])
        else:
            raise _unfit(f"value {position} is missing")
    return pytree.tree_unflatten(loaded, structure)


def _unfit(why: str) -> FedsimError:
    return RunFailed(
        "the checkpoint does not fit this run's configuration",
        code="FS-RUN-004",
        why=why,
        hint="resume with the configuration and the version of fedsim that wrote it",
    )


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it: never half a file.

    Raises:
        EnvironmentProblem: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    from fedsim.storage import write_atomically

    write_atomically(path, save(dict(tensors), dict(metadata)))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `write_file` wrote.

    Raises:
        RunFailed: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            "a checkpoint cannot be read",
            code="FS-RUN-005",
            where=str(path),
            why=str(error),
            hint="resume from an earlier run, or start the run again",
        ) from error
