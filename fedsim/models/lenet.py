"""LeNet-5: the wide variant of the federated literature, and the classic one."""

from __future__ import annotations

from torch import nn

from fedsim.models.shapes import image_shape


def lenet5(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The LeNet of the FedDyn and FedSpeed codes: 64-64 convolutions 5x5, then 384-192 units.

    Acar et al. 2021, "Federated learning based on dynamic regularization", appendix on models
    (after McMahan et al. 2017's CIFAR network): 797,962 parameters on CIFAR-10.
    """
    channels, height, width = image_shape("lenet5", input_shape, smallest=16)
    return nn.Sequential(
        nn.Conv2d(channels, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * _after(height) * _after(width), 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, classes),
    )


def lenet5_classic(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 after LeCun et al. 1998, with ReLU and max pooling: 6-16 maps, 120-84 units.

    LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document
    recognition", figure 2: 61,706 parameters on 28x28 grey images (padded to 32x32 as there).
    """
    channels, height, width = image_shape("lenet5_classic", input_shape, smallest=12)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def _after(pixels: int) -> int:
    """Height or width that two unpadded 5x5 convolutions with pooling leave."""
    return ((pixels - 4) // 2 - 4) // 2
