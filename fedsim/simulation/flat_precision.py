"""Layout and precision of the flat engine: what convolution models gain from on a CPU.

Convolutions run faster on inputs and weights in *channels_last* order, and faster again in bfloat16 where
the processor multiplies it. Master weights, updates and everything outside the forward and backward pass
stay float32. Linear layers stay float32 on a CPU too: their weights would be cast anew for every small batch,
which costs more than the product gains.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.models.layout import takes_channels_last
from fedsim.simulation.flat_module import Layout

LayoutChoice = Literal["auto", "contiguous", "channels_last"]
PrecisionName = Literal["float32", "bfloat16"]


class Precision(NamedTuple):
    """What the forward pass computes in.

    Args:
        device: type of the device, ``cpu`` or ``cuda``.
        reduced: bfloat16 where autocast takes it; the parameters' own type otherwise.
        dtype: of the parameters.
    """

    device: str
    reduced: bool
    dtype: torch.dtype

    def forward(self) -> AbstractContextManager[object]:
        """The context to run a module in."""
        if not self.reduced:
            return _NOTHING
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def result(self, outputs: Tensor) -> Tensor:
        """A module's outputs in the parameters' type."""
        return outputs.to(self.dtype) if self.reduced and outputs.is_floating_point() else outputs


_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def layout_of(asked: LayoutChoice, module: nn.Module, images: Tensor, *, reduced: bool) -> Layout:
    """The layout for a model: channels_last where it convolves images and runs so.

    Group normalisation in bfloat16 is the exception: its kernel for channels_last costs more than the
    convolutions gain.

    Args:
        images: a few inputs as the model sees them.
    """
    if asked != "auto":
        return asked
    if reduced and any(isinstance(layer, nn.GroupNorm) for layer in module.modules()):
        return "contiguous"
    return "channels_last" if takes_channels_last(module, images) else "contiguous"


def to_layout(inputs: Tensor) -> Tensor:
    """Images [n, ch, h, w] in channels_last order; anything else as it is."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def why_not_bfloat16(device: torch.device) -> str | None:
    """Why bfloat16 would not help on this device, None where it does."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if supported else "the GPU does not compute in bfloat16"
    if device.type != "cpu":
        return f"not known for devices of type {device.type}"
    if not torch._C._has_mkldnn:
        return "this build of torch has no oneDNN, whose kernels compute in bfloat16"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "the processor has neither AVX512-BF16 nor AMX, and would emulate bfloat16"
