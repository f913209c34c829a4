"""ResNet-18 for small images, with group normalisation."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models.shapes import Norm, bad_value, image_shape, normalisation, whole

_STAGES = (1, 2, 4, 8)  # multiples of the width
_BLOCKS = 2  # residual blocks of each stage


class Residual(nn.Module):
    """Two 3x3 convolutions with normalisation, added to a shortcut."""

    def __init__(self, before: int, after: int, *, stride: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = normalisation("resnet18", norm, after, groups=groups)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = normalisation("resnet18", norm, after, groups=groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False),
                normalisation("resnet18", norm, after, groups=groups),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h / stride, w / stride]."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


class ResNet18(nn.Module):
    """Stem, four stages of two residual blocks, global average, linear layer."""

    def __init__(self, channels: int, classes: int, *, width: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = normalisation("resnet18", norm, width, groups=groups)
        blocks: list[nn.Module] = []
        before = width
        for stage, multiple in enumerate(_STAGES):
            for block in range(_BLOCKS):
                stride = 2 if stage > 0 and block == 0 else 1
                after = multiple * width
                blocks.append(Residual(before, after, stride=stride, norm=norm, groups=groups))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ch, h, w] -> [B, K]."""
        hidden = self.blocks(F.relu(self.norm(self.conv(inputs))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


def resnet18(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    width: int = 64,
    norm: Literal["group", "batch"] = "group",
    groups: int = 32,
) -> nn.Module:
    """ResNet-18 with the stem for small images: one 3x3 convolution, no pooling.

    He et al. 2016, "Deep residual learning for image recognition", table 1, with the first layer of
    section 4.2. Group normalisation in place of batch normalisation after Hsieh et al. 2020, "The
    non-IID data quagmire of decentralized machine learning". 11,173,962 parameters on CIFAR-10.

    Args:
        width: feature maps of the first stage; 16 with ``groups = 4`` is a sixteenth of the size.
        norm: ``group`` or ``batch``.
        groups: of group normalisation; must divide `width`. 32 is Wu and He's default.
    """
    channels, _, _ = image_shape("resnet18", input_shape, smallest=8)
    whole("resnet18", "width", width)
    if norm not in ("group", "batch"):
        raise bad_value("resnet18", "norm", norm, "'group' or 'batch'")
    return ResNet18(channels, classes, width=width, norm=norm, groups=groups)
