"""The fast PNGs are PNGs, and nothing else is taken for one."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.png import decode_png, encode_png
from ddpm_pipeline.errors import DamageError
from tests.data.making import encoded, random_image
from tests.effort import examples

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]))


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


@examples(200)
@given(shapes.flatmap(lambda shape: arrays(np.uint8, shape)))
def test_what_is_written_is_read_alike_by_pillow_and_by_us(pixels: np.ndarray) -> None:
    data = encode_png(pixels)
    height, width, channels = pixels.shape
    found = decode_png(data, channels, height, width)
    assert found is not None
    assert np.array_equal(found, pixels)
    assert np.array_equal(by_pillow(data), pixels)


@pytest.mark.parametrize("kind", ["constant", "left", "up"])
def test_each_line_filter_is_used_where_it_is_best(kind: str) -> None:
    ramp = np.arange(40, dtype=np.uint8) * 5
    pixels = {
        "constant": np.full((40, 40), 7, np.uint8),
        "left": np.tile(ramp, (40, 1)),
        "up": np.tile(ramp[:, None], 40),
    }
    data = encode_png(pixels[kind][:, :, None])
    assert np.array_equal(by_pillow(data)[:, :, 0], pixels[kind])
    assert len(data) < 200


def test_files_of_others_are_left_to_pillow() -> None:
    pixels = random_image(0, (20, 30))
    for options in ({}, {"optimize": True}, {"compress_level": 9}):
        data = encoded(pixels, "png", **options)
        quick = decode_png(data, 3, 30, 20)
        assert quick is None or np.array_equal(quick, pixels)
        assert np.array_equal(decode_image(data, (30, 20, 3)), pixels)


def test_another_size_or_kind_than_expected_is_not_taken() -> None:
    data = encode_png(random_image(0))
    assert decode_png(data, 3, 8, 9) is None
    assert decode_png(data, 1, 8, 8) is None
    with pytest.raises(DamageError, match="image is 8x8x3, 9x8x3 expected"):
        decode_image(data, (8, 9, 3))


def test_damage_is_never_decoded_quietly() -> None:
    pixels = random_image(0, (16, 16))
    data = encode_png(pixels)
    for place in range(33, len(data) - 16):
        damaged = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        try:
            found = decode_image(damaged, (16, 16, 3))
        except DamageError:
            continue
        # Pillow reads on over a wrong checksum of a chunk; then the pixels at least are right.
        assert np.array_equal(found, pixels), place
