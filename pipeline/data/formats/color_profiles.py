"""Color profiles: conversion of images in Adobe RGB, Display P3 or CMYK to sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

CONVERTED = "were converted from their color profile to sRGB"
UNREADABLE = "have a color profile that cannot be used; their values are taken as sRGB"
_SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
_TOLERANCE = 2
"""Largest difference in levels at which a profile counts as sRGB and the image is left as it is."""


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """The loaded image in sRGB, and a note: CONVERTED, UNREADABLE, or None if nothing was done."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return image, None
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in _SPACES:
        return image, UNREADABLE
    try:
        convert = _conversion(profile, image.mode)
        return (image, None) if convert is None else (convert(image), CONVERTED)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, UNREADABLE


@lru_cache(maxsize=64)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Conversion for images with this profile; None when values hardly change. Raises PyCMSError."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    header: Any = source.profile
    if str(header.xcolor_space).strip() != _SPACES[mode]:
        raise ImageCms.PyCMSError("the profile is for another color space")
    srgb = ImageCms.createProfile("sRGB")
    if mode in ("L", "LA"):
        return _gray_conversion(ImageCms.buildTransform(source, srgb, "L", "RGB"))
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB" if mode == "CMYK" else mode)
    if mode != "CMYK" and _largest_change(_color_lattice(mode), transform) <= _TOLERANCE:
        return None
    return lambda image: _apply(image, transform)


def _gray_conversion(transform: Any) -> Callable[[Image.Image], Image.Image] | None:
    """Grayscale is converted through RGB, as there is no grayscale sRGB; the result is a table of 256 levels."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = np.asarray(_apply(levels, transform))[0, :, 1].tolist()
    if max(abs(after - before) for before, after in enumerate(table)) <= _TOLERANCE:
        return None

    def convert(image: Image.Image) -> Image.Image:
        gray, *rest = image.split()
        return Image.merge(image.mode, (gray.point(table), *rest))

    return convert


def _apply(image: Image.Image, transform: Any) -> Image.Image:
    out = ImageCms.applyTransform(image, transform)
    if out is None:
        raise ImageCms.PyCMSError("the profile cannot be applied")
    return out


def _largest_change(image: Image.Image, transform: Any) -> int:
    before, after = np.asarray(image).astype(int), np.asarray(_apply(image, transform)).astype(int)
    return int(np.abs(after - before).max())


def _color_lattice(mode: str) -> Image.Image:
    """An image of colors spread over the whole range."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    return Image.fromarray(grid).convert(mode)
