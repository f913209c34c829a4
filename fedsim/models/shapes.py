"""What the layers of the zoo need to know about shapes, and the refusals that follow."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import nn

from fedsim.errors import ModelError

Norm: TypeAlias = Literal["none", "group", "batch"]


def image_shape(model: str, input_shape: tuple[int, ...], *, smallest: int) -> tuple[int, int, int]:
    """(channels, height, width) of the images in the data.

    Args:
        smallest: the least height and width that the model's layers leave anything of.

    Raises:
        ModelError: FS-MOD-010, the examples are not images, or too small.
    """
    if len(input_shape) == 3:
        channels, height, width = input_shape
        if min(height, width) >= smallest:
            return channels, height, width
    raise ModelError(
        f"the model {model!r} does not fit these data",
        code="FS-MOD-010",
        where="model.name",
        why=f"it takes images [channels, height, width] of at least {smallest}x{smallest}; "
        f"the examples have the shape {list(input_shape)}",
        hint="use logistic or mlp for features, lstm for text, small_cnn for small images",
    )


def whole(model: str, name: str, value: int, *, least: int = 1) -> int:
    """`value` if it is a whole number of at least `least`.

    Raises:
        ModelError: FS-MOD-011.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_value(model, name, value, f"a whole number of at least {least}")
    return value


def bad_value(model: str, name: str, value: object, accepted: str) -> ModelError:
    """The error for one parameter of a model."""
    return ModelError(
        f"the model {model!r} cannot have {name} = {value!r}",
        code="FS-MOD-011",
        where=f"model.{name}",
        why=f"it must be {accepted}",
        hint=f"correct model.{name}",
    )


def normalisation(model: str, norm: Norm, channels: int, *, groups: int) -> nn.Module:
    """A normalisation layer over `channels` feature maps.

    Args:
        norm: ``none``; ``group`` (Wu and He 2018, "Group normalization"), which keeps no statistics
            of the data and so suits clients with skewed ones; ``batch``, whose running statistics
            are buffers.
        groups: of ``group``; must divide `channels`.

    Raises:
        ModelError: FS-MOD-011.
    """
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        whole(model, "groups", groups)
        if channels % groups:
            raise bad_value(model, "groups", groups, f"a divisor of {channels} channels")
        return nn.GroupNorm(groups, channels)
    raise bad_value(model, "norm", norm, "'none', 'group' or 'batch'")
