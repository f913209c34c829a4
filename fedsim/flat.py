"""Flat vectors: a module's trainable parameters as one ``[D]``, and back, by views.

Outside the client's own steps everything is flat: messages, aggregation, robust rules, transforms,
checkpoints. `ParamSpec` is the map between the two forms.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.vector import Vector


@dataclass(frozen=True)
class ParamSpec:
    """Names, shapes and offsets of the entries of a flat vector.

    Args:
        names, shapes: the tensors in order.
        dtype: of the whole vector; one vector has one dtype.
        personal: names whose values stay on the client and are never aggregated.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    personal: frozenset[str] = field(default=frozenset())

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins; one more entry than tensors, the last is D."""
        return tuple(int(o) for o in np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64))

    @property
    def size(self) -> int:
        """D, the number of values."""
        return self.offsets[-1]

    @property
    def personal_size(self) -> int:
        """Number of values that stay on the client."""
        return sum(n for name, n in zip(self.names, self.sizes, strict=True) if name in self.personal)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and dtype: equal digests can exchange vectors."""
        text = repr((self.names, self.shapes, str(self.dtype)))
        return hashlib.sha256(text.encode()).hexdigest()

    def slices(self) -> dict[str, slice]:
        """Where each named tensor lies in the flat vector."""
        ends = zip(self.names, self.offsets[:-1], self.offsets[1:], strict=True)
        return {name: slice(start, stop) for name, start, stop in ends}

    def shared_mask(self) -> Tensor:
        """[D] bool, False at personal entries."""
        mask = torch.ones(self.size, dtype=torch.bool)
        for name, part in self.slices().items():
            mask[part] = name not in self.personal
        return mask

    def unflatten(self, flat: Tensor) -> Vector:
        """Views of `flat` [..., D] as a Vector of tensors [..., *shape]."""
        lead = flat.shape[:-1]
        parts = torch.split(flat, list(self.sizes), dim=-1)
        return Vector(
            {
                name: part.reshape(lead + shape)
                for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
            }
        )

    def flatten(self, vector: Vector, *, stacked: bool = False) -> Tensor:
        """The flat [D] of a Vector, or [C, D] of a stack of C."""
        tensors = [vector.tensors[name] for name in self.names]
        return torch.cat([t.reshape(len(t), -1) if stacked else t.reshape(-1) for t in tensors], dim=-1)

    def stack(self, flat: Tensor, clients: int) -> Vector:
        """C copies of `flat` [D] as contiguous stacks [C, *shape], one per layer."""
        return self.unflatten(flat).map(
            lambda t: t.unsqueeze(0).expand(clients, *t.shape).clone(memory_format=torch.contiguous_format)
        )


def spec_of(module: nn.Module, *, personal: tuple[str, ...] = ()) -> ParamSpec:
    """The layout of a module's trainable parameters.

    Args:
        personal: prefixes of parameter names that stay on the client.

    Raises:
        ModelError: nothing to train, several dtypes, or a prefix that names nothing.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ModelError(
            "the model has no trainable parameter",
            code="FS-MOD-030",
            hint="return an nn.Module whose parameters have requires_grad=True",
        )
    dtypes = {p.dtype for _, p in named}
    if len(dtypes) > 1:
        raise ModelError(
            "the trainable parameters have several dtypes",
            code="FS-MOD-031",
            why=", ".join(sorted(str(d) for d in dtypes)),
            hint="one flat vector has one dtype: convert the module with .float() or .double()",
        )
    names = tuple(name for name, _ in named)
    for prefix in personal:
        if not any(name.startswith(prefix) for name in names):
            raise ModelError(
                f"no parameter name begins with {prefix!r}",
                code="FS-MOD-032",
                where="[model] personal",
                why=f"parameters: {', '.join(names)}",
                hint="name a layer of this model, or leave the key out",
            )
    kept = frozenset(n for n in names if personal and n.startswith(personal))
    return ParamSpec(names, tuple(tuple(p.shape) for _, p in named), dtypes.pop(), kept)


def flat_of(module: nn.Module, spec: ParamSpec) -> Tensor:
    """The module's current parameters as a new flat [D]."""
    parameters = dict(module.named_parameters())
    return torch.cat([parameters[name].detach().flatten() for name in spec.names]).clone()


def write_flat(module: nn.Module, spec: ParamSpec, flat: Tensor) -> None:
    """Copy a flat [D] into the module's parameters."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, values in spec.unflatten(flat).tensors.items():
            parameters[name].copy_(values)


def buffer_specs(module: nn.Module) -> tuple[ParamSpec | None, ParamSpec | None]:
    """Layouts of the module's floating and integer buffers, None where it has none.

    Floating buffers (normalisation statistics) are averaged with the updates' weights; integer ones
    come from the participant with the largest weight (``docs/architecture.md``, Buffers).
    """
    kept = [(n, b) for n, b in module.named_buffers() if n in module.state_dict()]

    def layout(of: list[tuple[str, Tensor]], dtype: torch.dtype) -> ParamSpec | None:
        if not of:
            return None
        return ParamSpec(tuple(n for n, _ in of), tuple(tuple(b.shape) for _, b in of), dtype)

    floating = [(n, b) for n, b in kept if b.is_floating_point()]
    integers = [(n, b) for n, b in kept if not b.is_floating_point()]
    dtype = floating[0][1].dtype if floating else torch.float32
    return layout(floating, dtype), layout(integers, torch.int64)


def flat_buffers(module: nn.Module, spec: ParamSpec | None) -> Tensor | None:
    """The current values of the buffers in `spec` as one flat vector, None where there are none."""
    if spec is None:
        return None
    buffers = dict(module.named_buffers())
    return torch.cat([buffers[name].detach().flatten().to(spec.dtype) for name in spec.names])
