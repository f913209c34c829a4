"""Models as safetensors files under the model's own names.

``model.load_state_dict(safetensors.torch.load_file("final.safetensors"))`` works without fedsim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim import bundle
from fedsim.errors import EnvironmentProblem
from fedsim.runs.names import check_file_name
from fedsim.storage import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def save(folder: Path, tensors: Mapping[str, Tensor], name: str) -> Path:
    """Write ``<name>.safetensors`` in `folder`, whole or not at all.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    path = folder / f"{check_file_name(name)}.safetensors"
    metadata = {"format": "pt"}
    if all(tensor.dtype in bundle.DTYPES.values() for tensor in tensors.values()):
        bundle.encode_to(path, tensors, metadata)
        return path
    from safetensors.torch import save as to_bytes

    # By way of bytes: of a full disk safetensors says less than the operating system does.
    write_atomically(path, to_bytes(_apart(tensors), metadata=metadata))
    return path


def load(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of ``<name>.safetensors`` in `folder`.

    Raises:
        EnvironmentProblem: FS-ENV-026, it is not there or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{check_file_name(name)}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        known = sorted(p.stem for p in folder.glob("*.safetensors"))
        raise EnvironmentProblem(
            f"the checkpoint {name!r} cannot be read",
            code="FS-ENV-026",
            where=str(path),
            why=str(error),
            hint=f"this run has: {', '.join(known) or 'no checkpoint'}",
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        whole = storage.nbytes() == plain.numel() * plain.element_size()
        if not whole or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result
