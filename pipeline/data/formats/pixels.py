"""Sample images as bytes and as numbers: lossless encodings, and exact sums that add up over any split."""

import io
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config.base import Settings
from pipeline.config.bounds import Count, Exact
from pipeline.data.formats.images import open_image
from pipeline.data.formats.npy import decode_npy, encode_npy
from pipeline.errors import DamageError

ImageFormat = Literal["png", "webp", "npy"]
Pixels = npt.NDArray[np.uint8]


class ImageStats(Settings):
    """What a set of images adds up to. All integers, so sums are exact and order never matters."""

    images: Count = 0
    """Number of images."""
    values: Exact = 0
    """Values in each channel over all images: images times height times width."""
    sums: tuple[Exact, ...] = Field(default=(), max_length=4096)
    """Sum of the uint8 values of each channel."""
    squares: tuple[Exact, ...] = Field(default=(), max_length=4096)
    """Sum of the squared uint8 values of each channel."""
    constant: Count = 0
    """Images in which every channel has one value throughout."""
    saturated: Count = 0
    """Images that hold nothing but 0 and 255."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.values < self.images or len(self.sums) != len(self.squares):
            raise ValueError("values, sums and squares do not belong to the same images")
        return self

    def __add__(self, other: "ImageStats") -> "ImageStats":
        if not self.images or not other.images:
            return self if self.images else other
        return ImageStats(
            images=self.images + other.images,
            values=self.values + other.values,
            sums=tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            squares=tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            constant=self.constant + other.constant,
            saturated=self.saturated + other.saturated,
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, in uint8 levels."""
        return tuple(total / self.values for total in self.sums)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all values, in uint8 levels."""
        n = self.values
        pairs = zip(self.sums, self.squares, strict=True)
        return tuple(max(0, n * square - total * total) ** 0.5 / n for total, square in pairs)


def image_stats(images: Pixels) -> ImageStats:
    """The tally of images uint8 (N, H, W, C)."""
    count, height, width, channels = images.shape
    levels = np.arange(256, dtype=np.int64)
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(channels)]
    extreme = (images == 0) | (images == 255)
    return ImageStats(
        images=count,
        values=count * height * width,
        sums=tuple(int((n * levels).sum()) for n in counts),
        squares=tuple(int((n * levels * levels).sum()) for n in counts),
        constant=int(constant(images).sum()),
        saturated=int(extreme.all(axis=(1, 2, 3)).sum()),
    )


def constant(images: Pixels) -> npt.NDArray[np.bool_]:
    """Which of the images uint8 (N, H, W, C) are of one flat colour: bool (N,)."""
    return (images == images[:, :1, :1, :]).all(axis=(1, 2, 3))


def encode(image: Pixels, image_format: ImageFormat) -> bytes:
    """One image uint8 (H, W, C), C being 1 or 3 (any for npy), as bytes that give it back exactly."""
    if image_format == "npy":
        return encode_npy(image)
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    options: dict[str, Any] = {"lossless": True, "method": 4} if image_format == "webp" else {}
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data: bytes, image_format: ImageFormat, channels: int) -> Pixels:
    """The image uint8 (H, W, C) in `data`. DamageError when it is not one."""
    try:
        if image_format == "npy":
            array = decode_npy(data)
        else:
            with open_image(data) as picture:
                array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, DamageError) as error:
        raise DamageError(f"not a {image_format} image ({' '.join(str(error).split())})") from None
    image = array[..., None] if array.ndim == 2 else array
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != channels:
        raise DamageError(f"an array {array.dtype} {array.shape}, not uint8 (height, width, {channels})")
    return image
