"""Encoded images (PNG, JPEG, …) to one array of pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedsim.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Buffer

    Encoded: TypeAlias = Buffer | Path

Pixels: TypeAlias = npt.NDArray[np.uint8]
Mode: TypeAlias = Literal["L", "RGB"]


def decode(
    encoded: Iterable[Encoded | None],
    count: int,
    *,
    where: Callable[[int], str],
    mode: Mode | None = None,
    size: int | None = None,
) -> Pixels:
    """[count, ch, h, w] the decoded images; ch is 1 (grey) or 3 (red, green, blue).

    Args:
        encoded: `count` images as bytes or files, None where the source has none.
        where: row number to the words that name it in an error.
        mode: convert every image to grey (``L``) or colour (``RGB``); None: all must be one of them
            already, and the same one.
        size: resize every image to this many pixels square (bilinear); None: all must have the size
            of the first one.

    One thread on purpose: for 28x28 PNG and 32x32 JPEG two threads were measured 1.2 to 1.7 times
    *slower* than one, as nearly all the time is spent holding the interpreter's lock.

    Raises:
        DataError: FS-DAT-005 for an image that cannot be decoded, FS-DAT-006 for mixed sizes or modes.
    """
    out: Pixels | None = None
    first = (0, 0, 0)
    for row, source in enumerate(encoded):
        plane = _planes(_open(source, row, where), row, where, mode=mode, size=size)
        if out is None:
            first = plane.shape
            out = np.empty((count, *first), dtype=np.uint8)
        elif plane.shape != first:
            raise DataError(
                "images have different sizes or colour modes",
                code="FS-DAT-006",
                where=where(row),
                why=f"{_words(plane.shape)}; the images before it have {_words(first)}",
                hint=f"set data.size = {min(first[1:])} to resize, data.mode = 'RGB' to convert all",
            )
        out[row] = plane
    if out is None:
        raise DataError("there are no images", code="FS-DAT-017", where=where(0))
    return out


def _open(source: Encoded | None, row: int, where: Callable[[int], str]) -> Image:
    from PIL import Image

    if source is None:
        raise DataError(
            "an image has no content",
            code="FS-DAT-005",
            where=where(row),
            why="the row is null, or names a file instead of holding its bytes",
            hint="embed the images in the file, or remove the row",
        )
    try:
        image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        image.load()
    except (
        OSError,
        EOFError,
        SyntaxError,  # what Pillow raises for a broken PNG
        ValueError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            "an image cannot be decoded",
            code="FS-DAT-005",
            where=where(row),
            why=f"{type(error).__name__}: {error}",
            hint="fetch the file again, or remove this image",
        ) from error
    return image


def _planes(
    image: Image, row: int, where: Callable[[int], str], *, mode: Mode | None, size: int | None
) -> Pixels:
    """[ch, h, w] the pixels of one image in the wanted mode and size."""
    from PIL.Image import Resampling

    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if image.mode not in ("L", "RGB"):
        raise DataError(
            f"an image has colour mode {image.mode!r}",
            code="FS-DAT-006",
            where=where(row),
            why="grey images ('L') and colour images ('RGB') with 8 bits are used as they are",
            hint="set data.mode = 'RGB' or 'L' to convert every image",
        )
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Resampling.BILINEAR)
    pixels: Pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} pixels, {'grey' if shape[0] == 1 else 'colour'}"
