"""A model whose parameters are views of one buffer: set by one copy, run without `functional_call`.

The flat engine owns such copies of the model. The buffer is in the order of `ParamSpec`; with the layout
``channels_last`` the weights of convolutions lie in it as O, kh, kw, I and are seen through a permutation,
which is how convolution kernels like them. Outside the trainer vectors are always in the order of
`ParamSpec`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.flat import ParamSpec
from fedsim.vector import Vector

Layout = Literal["contiguous", "channels_last"]


class FlatModule:
    """A copy of a model on one flat buffer.

    Args:
        module: copied with its mode; the original is left alone.
        spec: of its trainable parameters.
        floating, integers: layouts of its buffers.
        device: where the copy lives.
        layout: of the weights of convolutions.

    Attributes:
        flat: [D], the values, in the order of `ParamSpec` where `ordered`.
        ordered: whether the buffer equals a flat vector of `ParamSpec` entry by entry.
        views: the values by name, in their logical shapes, without gradients; writing to them moves the
            model. `vector` holds the same tensors.
        leaves: the module's own parameters in the same order: what to differentiate with respect to.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ParamSpec,
        floating: ParamSpec | None,
        integers: ParamSpec | None,
        *,
        device: torch.device,
        layout: Layout = "contiguous",
    ) -> None:
        self.module = copy.deepcopy(module).to(device)
        self.spec = spec
        self.flat = torch.zeros(spec.size, dtype=spec.dtype, device=device)
        parameters = dict(self.module.named_parameters())
        self.leaves = [parameters[name] for name in spec.names]
        self.views: list[Tensor] = []
        self.ordered = True
        for leaf, start, size, shape in zip(self.leaves, spec.offsets, spec.sizes, spec.shapes, strict=False):
            part = self.flat[start : start + size]
            permuted = layout == "channels_last" and len(shape) == 4
            view = _channels_last(part, shape) if permuted else part.view(shape)
            self.ordered = self.ordered and view.is_contiguous()
            leaf.data = view
            self.views.append(view)
        self.vector = Vector(dict(zip(spec.names, self.views, strict=True)))
        named = dict(self.module.named_buffers())
        self._buffers = {n: named[n] for part in (floating, integers) if part for n in part.names}
        self.has_buffers = bool(self._buffers)

    def holds(self, x: Vector) -> bool:
        """Whether `x` is the model's own values, not equal ones elsewhere."""
        if x is self.vector:
            return True
        theirs = x.tensors
        return all(theirs[name] is view for name, view in self.vector.tensors.items())

    def load(self, x: Vector, flat: Tensor | None = None) -> None:
        """Set the values to `x`.

        Args:
            flat: the same values as one [D] in the order of `ParamSpec`, where there is one.
        """
        if flat is not None and self.ordered:
            self.flat.copy_(flat)
        else:
            torch._foreach_copy_(self.views, [x.tensors[name] for name in self.spec.names])  # pyright: ignore[reportPrivateImportUsage]

    def minus(self, x: Vector, flat: Tensor) -> Tensor:
        """[D] values minus `x`, which is `flat` in the order of `ParamSpec`."""
        if self.ordered:
            return self.flat - flat
        out = torch.empty_like(flat)
        into = self.spec.unflatten(out).tensors
        for (name, value), own in zip(into.items(), self.views, strict=True):
            torch.sub(own, x.tensors[name], out=value)
        return out

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the buffer, and hence changes with the next client."""
        return tensor.untyped_storage().data_ptr() == self.flat.untyped_storage().data_ptr()

    def load_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Set the model's buffers."""
        if self._buffers:
            torch._foreach_copy_(list(self._buffers.values()), [values[name] for name in self._buffers])  # pyright: ignore[reportPrivateImportUsage]

    def saved_buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers."""
        return {name: b.clone() for name, b in self._buffers.items()}


def _channels_last(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A run of values as a weight [O, I, kh, kw] that lies as O, kh, kw, I."""
    out, into, high, wide = shape
    return part.view(out, high, wide, into).permute(0, 3, 1, 2)
