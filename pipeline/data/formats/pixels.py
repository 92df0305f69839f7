"""Lossless encodings of sample images."""

import io
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.data.formats.images import open_image
from pipeline.data.formats.npy import UInt8, decode_npy, encode_npy
from pipeline.errors import DamageError

ImageFormat = Literal["png", "webp", "npy"]
Pixels = UInt8


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
