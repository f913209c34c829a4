"""A run's model for other programs: PyTorch, NumPy, ONNX."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError, EnvironmentProblem, ModelError
from fedsim.runs.folder import CHECKPOINTS, RunFolder
from fedsim.runs.names import check_file_name
from fedsim.storage import problem, write_atomically

FORMS = ("torch", "onnx", "numpy")


def export(
    folder: RunFolder,
    to: str,
    *,
    checkpoint: str = "final",
    out: Path | None = None,
    module: nn.Module | None = None,
    example: Tensor | None = None,
) -> list[Path]:
    """Write a checkpoint in another form and return the files.

    Args:
        to: ``torch`` (``.pt``, a state dictionary that loads with ``weights_only=True``, and the
            safetensors file), ``numpy`` (``.npz``, one array per tensor) or ``onnx``.
        checkpoint: ``final``, ``best`` or a round's, such as ``round-00010``.
        out: folder for the files, made if missing; ``exports`` in the run's folder when None.
        module: the model without these weights; ONNX needs it and `example`.
        example: [b, ...] a batch as the model gets it, after the transforms.

    Raises:
        ConfigError: FS-CFG-092, another form.
        EnvironmentProblem: FS-ENV-020 … 022 nothing half-written is left; FS-ENV-026 no such
            checkpoint; FS-ENV-027 the extra for ONNX is missing.
        ModelError: FS-MOD-038, the model cannot be written as ONNX.
    """
    if to not in FORMS:
        raise ConfigError(
            f"a model cannot be exported to {to!r}",
            code="FS-CFG-092",
            hint=f"choose one of {', '.join(FORMS)}",
        )
    if to == "onnx":
        _need_onnx()
    try:
        tensors = folder.load_model(check_file_name(checkpoint))
    except ValueError as error:
        raise ConfigError(
            f"{checkpoint!r} names no checkpoint",
            code="FS-CFG-095",
            where=f"--checkpoint {checkpoint}",
            why=str(error),
            hint="use final, best, or a round's such as round-00010",
        ) from error
    target = folder.path / "exports" if out is None else out
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise problem(error, target) from error
    stem = target / checkpoint
    if to == "torch":
        source = folder.path / CHECKPOINTS / f"{checkpoint}.safetensors"
        files = {".pt": _as_torch(tensors), ".safetensors": source.read_bytes()}
    elif to == "numpy":
        files = {".npz": _as_numpy(tensors)}
    else:
        if module is None or example is None:
            raise ValueError("exporting to ONNX needs the module and an example batch")
        files = {".onnx": as_onnx(module, tensors, example)}
    paths = []
    for ending, content in files.items():
        path = stem.with_name(f"{stem.name}{ending}")
        write_atomically(path, content)
        paths.append(path)
    return paths


def _as_torch(tensors: dict[str, Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _as_numpy(tensors: dict[str, Tensor]) -> bytes:
    """An ``.npz``: written by hand because `numpy.savez` cannot hold a tensor named ``file``.

    Types that NumPy does not have (bfloat16) become float32. Equal tensors give equal bytes.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            array = io.BytesIO()
            np.lib.format.write_array(array, known.numpy(), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, array.getvalue())
    return content.getvalue()


def as_onnx(module: nn.Module, tensors: dict[str, Tensor], example: Tensor) -> bytes:
    """The module with these weights as an ONNX model: ``input`` [batch, ...] to ``output``, any batch.

    Raises:
        EnvironmentProblem: FS-ENV-027, the extra is missing.
        ModelError: FS-MOD-038, the exporter cannot follow the module.
    """
    _need_onnx()
    filled = copy.deepcopy(module)
    filled.load_state_dict(tensors)
    # Two rows, because the exporter takes a dimension of one for a constant.
    batch = example if len(example) > 1 else torch.cat([example, example])
    if batch.is_floating_point():
        batch = batch.to(next(filled.parameters()).dtype)
    try:
        with _quietly():
            program = torch.onnx.export(
                filled.eval(),
                (batch,),
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise ModelError(
            "the model cannot be written as ONNX",
            code="FS-MOD-038",
            where=type(module).__name__,
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="export with --to torch, or replace the operation that ONNX does not have",
        ) from error
    assert program is not None  # dynamo=True returns the program
    content: bytes = program.model_proto.SerializeToString()
    return content


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and on its own internals."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            "the extra for ONNX is not installed",
            code="FS-ENV-027",
            why=f"missing: {', '.join(missing)}",
            hint="pip install 'fedsim[onnx]'",
        )
