"""Encodings give images back exactly; sums are exact and add up over any split."""

import io
import struct
import zlib

import numpy as np
import pytest

from ddpm_pipeline.config.generation import GuardConfig
from ddpm_pipeline.config.model_card import TrainingData
from ddpm_pipeline.data.formats.contact_sheet import (
    MAX_CELL_PIXELS,
    MAX_SHEET_PIXELS,
    image_grid,
    in_rows,
    labelled_rows,
    scaled,
)
from ddpm_pipeline.data.formats.image_stats import ImageStats, image_stats
from ddpm_pipeline.data.formats.images import ImageFormat, decode_image, encode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.guards import check_guards


def noise(count: int, channels: int = 3, size: int = 6) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("image_format", ["png", "webp", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_exactly(image_format: ImageFormat, channels: int) -> None:
    image = noise(1, channels)[0]
    data = encode_image(image, image_format)
    assert data == encode_image(image, image_format)
    assert np.array_equal(decode_image(data, image.shape), image)


@pytest.mark.parametrize("image_format", ["png", "webp", "npy"])
def test_a_torn_image_is_damage(image_format: ImageFormat) -> None:
    data = encode_image(noise(1, 3, 16)[0], image_format)
    with pytest.raises(DamageError):
        decode_image(data[: len(data) // 2], (16, 16, 3))


def npy_of_shape(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


def png_of_size(edge: int) -> bytes:
    """A PNG whose header claims a square of this edge."""
    data = bytearray(encode_image(noise(1)[0], "png"))
    data[16:24] = struct.pack(">II", edge, edge)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"PK\x03\x04 an archive", "not a PNG"),
        (npy_of_shape((10**9, 10**6, 3)) + b"x", "damaged npy header"),
        (npy_of_shape((-1, -1, 3)) + b"xxx", "damaged npy header"),
        (png_of_size(40_000), "claims 40000x40000 pixels"),
        (encode_image(noise(1, 3, 5)[0], "png"), "5x5x3, 6x6x3 expected"),
        (encode_image(noise(1, 3, 5)[0], "npy"), "5x5x3, 6x6x3 expected"),
    ],
)
def test_an_image_that_claims_what_it_does_not_hold_is_damage(data: bytes, problem: str) -> None:
    with pytest.raises(DamageError, match=problem):
        decode_image(data, (6, 6, 3))


def test_npy_holds_any_number_of_channels() -> None:
    image = noise(1, 4)[0]
    assert np.array_equal(decode_image(encode_image(image, "npy"), (6, 6, 4)), image)
    with pytest.raises(DamageError, match="4 channels"):
        decode_image(encode_image(image, "npy"), (6, 6, 3))


def test_a_tally_is_what_numpy_computes() -> None:
    images = noise(50)
    found = image_stats(images)
    assert np.allclose(found.mean, images.mean(axis=(0, 1, 2)))
    assert np.allclose(found.std, images.std(axis=(0, 1, 2)))


def test_tallies_add_up_over_any_split() -> None:
    images = noise(50)
    images[3] = 7
    images[4] = np.where(images[4] > 100, 255, 0)
    whole = image_stats(images)
    assert (whole.constant, whole.saturated) == (1, 1)
    parts = [image_stats(part) for part in np.split(images, [1, 4, 30])]
    assert sum(parts, ImageStats()) == whole
    assert sum(reversed(parts), ImageStats()) == whole


def test_sums_do_not_overflow() -> None:
    white = np.full((3, 600, 600, 1), 255, dtype=np.uint8)
    assert image_stats(white).squares == (3 * 600 * 600 * 255 * 255,)


GUARDS = GuardConfig(min_images=10, max_constant_fraction=0.1, max_saturated_fraction=0.1, max_mean_drift=0.5)


def test_good_images_pass_the_guards() -> None:
    data = TrainingData(channel_mean=(127.0, 127.0, 127.0), channel_std=(70.0, 70.0, 70.0))
    assert check_guards(image_stats(noise(50)), GUARDS, data) is None


def test_constant_saturated_and_drifting_images_are_told_apart() -> None:
    flat = np.full((50, 4, 4, 1), 9, dtype=np.uint8)
    assert "50 of 50 images are constant" in (check_guards(image_stats(flat), GUARDS, None) or "")
    binary = np.where(noise(50, 1) > 100, 255, 0).astype(np.uint8)
    assert "50 of 50 images are saturated" in (check_guards(image_stats(binary), GUARDS, None) or "")
    dark = TrainingData(channel_mean=(20.0,), channel_std=(70.0,))
    assert "channel 0 has mean" in (check_guards(image_stats(noise(50, 1)), GUARDS, dark) or "")


def test_a_few_images_are_not_judged_and_neither_is_anything_when_guards_are_off() -> None:
    flat = np.full((9, 4, 4, 1), 9, dtype=np.uint8)
    assert check_guards(image_stats(flat), GUARDS, None) is None
    assert (
        check_guards(image_stats(np.repeat(flat, 9, 0)), GUARDS.model_copy(update={"enabled": False}), None)
        is None
    )


def test_a_contact_sheet_shows_each_image_enlarged_in_its_place() -> None:
    images = list(noise(3, 1, 8))
    sheet = image_grid([images[:2], images[2:]], cell=32)
    assert sheet.dtype == np.uint8
    for row, column, image in ((0, 0, images[0]), (0, 1, images[1]), (1, 0, images[2])):
        top, left = 8 + row * 34, 8 + column * 34
        shown = sheet[top : top + 32 : 4, left : left + 32 : 4, :1]
        assert np.array_equal(shown, image)


def test_labels_make_room_beside_the_rows() -> None:
    rows = [list(noise(2, 3, 8))] * 2
    assert image_grid(rows, ["a", "a long name"]).shape[1] > image_grid(rows).shape[1] + 40
    with pytest.raises(ValueError, match="rows holds no image"):
        image_grid([[]])


def test_images_of_several_sizes_share_a_grid() -> None:
    sheet = image_grid(
        in_rows([*noise(1, 3, 40), *noise(1, 1, 10), scaled(noise(1, 3, 100)[0], 64)]), margin=0
    )
    assert sheet.shape == (2 * 64 + 2, 2 * 64 + 2, 3)
    assert (sheet[66:, 66:] == 255).all()  # three images: the fourth cell is empty


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (28, 56), (64, 64), (100, 100), (200, 128), (512, 128)])
def test_small_images_grow_by_a_whole_factor_and_large_ones_shrink_to_the_stated_size(
    size: int, shown: int
) -> None:
    sheet = image_grid([[noise(1, 3, size)[0]]], margin=0)
    assert sheet.shape[:2] == (shown, shown)
    assert max(sheet.shape[:2]) <= MAX_CELL_PIXELS


def test_a_whole_factor_down_gives_means_and_up_gives_squares() -> None:
    image = noise(1, 1, 4)[0]
    assert np.array_equal(scaled(image, 9)[::2, ::2], image)
    means = image.reshape(2, 2, 2, 2, 1).mean((1, 3))
    assert np.abs(scaled(image, 2) - means).max() <= 1  # rounded once for each axis
    flat = np.full((99, 33, 3), 77, np.uint8)
    assert (scaled(flat, 10) == 77).all()
    assert scaled(flat, 10).shape == (10, 3, 3)


def test_a_sheet_of_many_images_stays_within_the_stated_size() -> None:
    image = noise(1, 1, 8)[0]
    for count in (100, 2000, 10_000):
        sheet = image_grid(in_rows([image] * count), margin=0)
        assert max(sheet.shape) <= MAX_SHEET_PIXELS
    assert image_grid([[noise(1, 1, 64)[0]] * 1000], margin=0).shape[1] <= MAX_SHEET_PIXELS


def test_rows_of_one_name_have_its_label_once() -> None:
    images = list(noise(5))
    rows, labels = labelled_rows([("a", images[:3]), ("b", images[3:]), ("none", [])], 2)
    assert [len(row) for row in rows] == [2, 1, 2]
    assert labels == ["a", "", "b"]
    assert image_grid(rows, labels).shape[1] == image_grid([images[:2]], ["b"]).shape[1]
    assert image_grid(rows, ["x" * 500] * 3).shape[1] < 600
