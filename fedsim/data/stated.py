"""What a run states of its data by naming its data set, for clients that bring their own examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.data import images
from fedsim.data.decoded import channel_statistics
from fedsim.data.described import DescribedDataset, Description, described
from fedsim.data.digits import digits
from fedsim.schema import build


def stated_by(name: str, parameters: Mapping[str, Any]) -> Description | None:
    """What a run that names the data set `name` says of its data; None where it says nothing.

    Args:
        parameters: of ``[data]``, such as ``normalise``; those of ``described`` are all there is.

    Raises:
        ConfigError: a parameter that `described` refuses.
    """
    if name == "described":
        own = {key: value for key, value in parameters.items() if key != "test_path"}
        dataset = build(described, own, where="[data] name = 'described'")
        assert isinstance(dataset, DescribedDataset)
        return dataset.description
    if name == "digits":
        return _of_digits()
    known = _known_images().get(name)
    if known is None:
        return None
    shape, classes, (mean, std) = known
    if parameters.get("normalise", "channel") == "unit":
        mean, std = (), ()
    colour = name == "cifar10"
    return Description(
        "classification", "image", shape, classes, mean=mean, std=std,
        crop=int(parameters.get("crop", 4 if colour else 0)), flip=bool(parameters.get("flip", colour)),
    )  # fmt: skip


def _known_images() -> dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]]:
    figures = tuple(str(k) for k in range(10))
    clothes = (
        "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    )  # fmt: skip
    things = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    return {
        "mnist": ((1, 28, 28), figures, images._MNIST),
        "fashion_mnist": ((1, 28, 28), clothes, images._FASHION),
        "cifar10": ((3, 32, 32), things, images._CIFAR10),
    }


def _of_digits() -> Description:
    dataset = digits()
    mean, std = channel_statistics(dataset.train.inputs.numpy())
    return Description(dataset.task, "image", dataset.input_shape, dataset.label_names, mean=mean, std=std)
