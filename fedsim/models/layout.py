"""The order of bytes of images and of convolutions' weights: channels_last is what CPUs convolve fastest."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedsim.keys import own_torch_generator


def lay_out(module: nn.Module, order: torch.memory_format) -> None:
    """Put the weights of convolutions into this order of bytes."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def takes_channels_last(module: nn.Module, images: Tensor) -> bool:
    """Whether a model convolves images and runs on them in channels_last order; it is left as it is.

    One that looks at its activations with `view` may not.

    Args:
        images: [n, ch, h, w], on the model's device and in its dtype.
    """
    if images.ndim != 4 or not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        return False
    trial = copy.deepcopy(module).eval()
    lay_out(trial, torch.channels_last)
    try:
        with torch.inference_mode(), own_torch_generator():
            trial(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True
