"""Two convolutional networks for grey or colour images: McMahan's, and a small fast one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsim.models.shapes import Norm, bad_value, image_shape, normalisation, whole


def cnn(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The CNN of the FedAvg paper: two 5x5 convolutions with pooling, 512 hidden units.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
    data", section 3: 1,663,370 parameters on 28x28 grey images with 10 classes.
    """
    channels, height, width = image_shape("cnn", input_shape, smallest=4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )


class SmallCNN(nn.Module):
    """3x3 convolutions, each with normalisation, ReLU and pooling; then one linear layer."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ch, h, w] -> [B, K]."""
        logits: Tensor = self.head(self.blocks(inputs).flatten(1))
        return logits


def small_cnn(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    channels: Sequence[int] = (16, 32),
    norm: Norm = "none",
    groups: int = 4,
) -> nn.Module:
    """A convolutional network for small images, quick enough for a demonstration.

    6,090 parameters on the 8x8 digits.

    Args:
        channels: feature maps of each convolution; every one is followed by 2x2 pooling.
        norm: ``none``, ``group`` or ``batch`` normalisation after each convolution.
        groups: of group normalisation; must divide every entry of `channels`.
    """
    if not channels:
        raise bad_value("small_cnn", "channels", list(channels), "a list of at least one number")
    shrink = 2 ** len(channels)
    before, height, width = image_shape("small_cnn", input_shape, smallest=shrink)
    blocks: list[nn.Module] = []
    for maps in channels:
        whole("small_cnn", "channels", maps)
        blocks.append(
            nn.Sequential(
                nn.Conv2d(before, maps, 3, padding=1),
                normalisation("small_cnn", norm, maps, groups=groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
        )
        before = maps
    return SmallCNN(blocks, nn.Linear(before * (height // shrink) * (width // shrink), classes))
