"""The fast JPEG decoder gives Pillow's pixels, and leaves to Pillow what is not plain."""

import random

import numpy as np
import pytest

from ddpm_pipeline.data.formats import images
from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.jpeg import decode_jpeg
from ddpm_pipeline.errors import DamageError
from tests.data.making import encoded, random_image

SIZE = (19, 13)


def jpeg(channels: int = 3, **options: object) -> bytes:
    smooth = np.sort(random_image(1, SIZE, channels), axis=0)
    return encoded(smooth, "jpeg", **options)


def by_pillow(data: bytes, channels: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | None:
    """As without the fast decoder; None for what is refused."""
    with monkeypatch.context() as patched:
        patched.setattr(images, "decode_jpeg", lambda *_: None)
        try:
            return decode_image(data, (SIZE[1], SIZE[0], channels))
        except DamageError:
            return None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 40},
        {"quality": 95, "subsampling": "4:4:4"},
        {"quality": 75, "subsampling": "4:2:2"},
        {"quality": 90, "subsampling": "4:2:0"},
        {"optimize": True, "restart_marker_rows": 1},
    ],
)
def test_a_plain_file_has_pillows_pixels(
    channels: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(channels, **options)
    expected = by_pillow(data, channels, monkeypatch)
    found = decode_jpeg(data, channels, SIZE[1], SIZE[0])
    assert found is not None
    assert np.array_equal(found, expected)
    batch = np.zeros((3, SIZE[1], SIZE[0], channels), np.uint8)
    placed = decode_jpeg(data, channels, SIZE[1], SIZE[0], batch[1])
    assert placed is not None
    assert placed.base is batch
    assert np.array_equal(batch[1], expected)
    assert not batch[::2].any()


@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, {"icc_profile": b"profile"}],
)
def test_a_file_that_says_more_is_left_to_pillow(options: dict[str, object]) -> None:
    assert decode_jpeg(jpeg(**options), 3, SIZE[1], SIZE[0]) is None


def test_another_shape_than_expected_is_not_taken() -> None:
    for channels, height, width in ((1, 13, 19), (3, 19, 13), (3, 13, 18), (3, 70_000, 19), (4, 13, 19)):
        assert decode_jpeg(jpeg(), channels, height, width) is None
    assert decode_jpeg(jpeg(1), 3, SIZE[1], SIZE[0]) is None


def test_damage_is_decoded_as_pillow_does_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, source, taken = jpeg(quality=90), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole[: source.choice((len(whole), source.randrange(len(whole))))])
        for _ in range(source.randrange(3) if data else 0):
            data[source.randrange(len(data))] = source.randrange(256)
        found = decode_jpeg(bytes(data), 3, SIZE[1], SIZE[0])
        if found is not None:
            taken += 1
            assert np.array_equal(found, by_pillow(bytes(data), 3, monkeypatch))
    assert taken > 20
