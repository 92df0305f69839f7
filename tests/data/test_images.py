"""Pixels are what their makers meant: upright, in sRGB, of all bits, and never of damaged bytes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.images import PixelShape, decode_image, probe
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.build_index import build_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.packing.resize import ENLARGED, probe_image, to_pixels
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import open_store
from tests.data.making import batches, encoded, random_image

CONFIG = PackConfig(source="unused", dest="unused")
PIXELS = random_image(3, (12, 8))


def pixels(data: bytes, **settings: object) -> np.ndarray:
    return to_pixels(CONFIG.model_copy(update=settings), data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, kind: int, depth: int, clear: tuple[int, ...]) -> bytes:
    """A PNG of 2 to 16 bits with a transparent color."""
    height, width = values.shape[:2]
    rows = [
        row.astype(">u2").tobytes() if depth == 16 else np.packbits(_bits(row, depth)).tobytes()
        for row in values.reshape(height, -1)
    ]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def _bits(row: np.ndarray, depth: int) -> np.ndarray:
    return row[:, None] >> np.arange(depth)[::-1] & 1


@pytest.mark.parametrize(("kind", "depth"), [(0, 2), (0, 4), (0, 16), (2, 16)])
def test_a_transparent_color_is_clear_at_every_depth(kind: int, depth: int) -> None:
    top = (1 << depth) - 1
    shape = (4, 8, 3) if kind == 2 else (4, 8)
    values = np.random.default_rng(0).integers(0, top + 1, shape).astype(np.uint16)
    clear = tuple(int(v) for v in np.atleast_1d(values[1, 2]))
    if depth == 16:
        values[0, 0] = np.array(values[1, 2]) ^ 1  # another color with the same upper bits
    found = pixels(png(values, kind, depth, clear))
    wanted = np.atleast_3d(values.astype(float) * 255 / top) * np.ones(3)
    wanted[(np.atleast_3d(values) == clear).all(axis=2)] = 255
    assert np.abs(found - wanted).max() <= 1


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value) as written by hand."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


def turned(data: bytes, block: bytes) -> bytes:
    """A JPEG with this EXIF block."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


SIX = (0x0112, 3, 1, struct.pack("<H", 6))


def test_orientation_is_read_by_pack_and_by_the_loader_alike(tmp_path: Path) -> None:
    jpeg = encoded(PIXELS, "jpeg", quality=95)
    flat = np.asarray(Image.open(io.BytesIO(jpeg)))
    data = turned(jpeg, exif(SIX))
    wanted = np.rot90(flat, -1)
    assert probe(data) == PixelShape(3, 12, 8)
    assert np.array_equal(decode_image(data, probe(data).array_shape), wanted)
    assert np.array_equal(pixels(data), wanted)
    store = open_store(tmp_path.as_uri())
    store.write("0.tar", write_shard([("0", {"jpg": data})]))
    build_index(tmp_path.as_uri())
    (sample,) = read_sequential(load_index(tmp_path.as_uri()))
    assert np.array_equal(sample.pixels, wanted)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "avif"])
def test_every_format_that_tells_its_orientation_is_turned(kind: str) -> None:
    notes = Image.Exif()
    notes[0x0112] = 6
    options = {"quality": 100} if kind == "avif" else {"lossless": True} if kind == "webp" else {}
    data = encoded(PIXELS, kind, exif=notes.tobytes() if kind == "png" else notes, **options)
    plain = np.asarray(Image.open(io.BytesIO(encoded(PIXELS, kind, **options))).convert("RGB"))
    assert probe(data) == PixelShape(3, 12, 8)
    assert np.array_equal(decode_image(data, probe(data).array_shape), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "entry",
    [
        (0x0100, 2, 3, b"ab\0"),
        (0x0110, 99, 3, b"abc"),
        (0x8769, 2, 4, b"abc\0"),
        (0x8825, 4, 1, struct.pack("<I", 8)),
        (0x8769, 4, 1, b"\xf0\xff\xff\x7f"),
    ],
    ids=["text for a number", "unknown type", "pointer as text", "circle", "off the end"],
)
def test_broken_notes_about_an_image_do_not_lose_it(entry: tuple[int, int, int, bytes]) -> None:
    jpeg = encoded(PIXELS, "jpeg", quality=95)
    found = pixels(turned(jpeg, exif(entry, SIX)))
    assert np.array_equal(found, np.rot90(np.asarray(Image.open(io.BytesIO(jpeg))), -1))


def test_a_color_profile_is_converted_and_srgb_left_as_it_is() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert probe_image(CONFIG, encoded(PIXELS, icc_profile=srgb)).notes == ()
    for unusable in (lab, b"no profile"):
        (note,) = probe_image(CONFIG, encoded(PIXELS, icc_profile=unusable)).notes
        assert "cannot be used" in note
        assert np.array_equal(pixels(encoded(PIXELS, icc_profile=unusable)), PIXELS)
    wide = swapped(srgb)
    (note,) = probe_image(CONFIG, encoded(PIXELS, icc_profile=wide)).notes
    assert note == "were converted from their color profile to sRGB"
    found = pixels(encoded(PIXELS, icc_profile=wide)).astype(int)
    assert np.abs(found - PIXELS[..., [1, 0, 2]]).max() <= 2


def of_all_kinds() -> dict[str, bytes]:
    """Image files of 12x8 whose pixels depend on how orientation and color profile are heeded."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide, six = swapped(srgb), exif(SIX)
    tall, gray, photo = np.rot90(PIXELS), PIXELS[..., :1], Image.fromarray(PIXELS)
    return {
        "plain": encoded(PIXELS),
        "srgb": encoded(PIXELS, icc_profile=srgb),
        "png": encoded(PIXELS, icc_profile=wide),
        "unusable": encoded(PIXELS, icc_profile=b"no profile"),
        "gray": encoded(gray, icc_profile=wide),
        "jpeg": encoded(PIXELS, "jpeg", quality=95, icc_profile=wide),
        "webp": encoded(PIXELS, "webp", lossless=True, icc_profile=wide),
        "turned": turned(encoded(tall, "jpeg", quality=95, icc_profile=wide), six),
        "palette": saved(photo.quantize(32), icc_profile=wide),
        "cmyk": saved(photo.convert("CMYK"), "jpeg"),
    }


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_pack_index_and_loader_take_the_same_pixels_from_the_same_file(uri: str, tmp_path: Path) -> None:
    files = of_all_kinds()
    meant = {name: pixels(data) for name, data in files.items()}
    assert not np.array_equal(meant["png"], PIXELS)
    assert not np.array_equal(meant["webp"], PIXELS)
    kinds = {"jpeg": "jpg", "turned": "jpg", "cmyk": "jpg", "webp": "webp"}
    samples = [(name, {kinds.get(name, "png"): data}) for name, data in sorted(files.items())]
    open_store(uri).write("000.tar", write_shard(samples))
    index = build_index(uri, pixels=True)
    assert {found.key: found.pixels.tobytes() for found in read_sequential(index)} == {
        name: values.tobytes() for name, values in meant.items()
    }
    (loaded,), total = (
        batches(index, 0, 1, batch=len(files)),
        np.concatenate([values.reshape(-1, 3) for values in meant.values()]),
    )
    assert {image.numpy().tobytes() for image in loaded[0].images} == {
        values.transpose(2, 0, 1).tobytes() for values in meant.values()
    }
    assert index.channel_mean == pytest.approx(total.mean(axis=0).tolist())
    for name, entry in samples:
        ((kind, data),) = entry.items()
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.{kind}").write_bytes(data)
    packed = PackConfig(source=str(tmp_path / "in"), dest=f"{uri}-packed")
    pack(packed)
    there = {found.pixels.tobytes() for found in read_sequential(load_index(packed.dest))}
    assert there == {values.tobytes() for values in meant.values()}


def swapped(profile: bytes) -> bytes:
    """The profile with the primaries of red and green exchanged: a color space of whose pixels all are known."""
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def test_damage_that_decoders_read_over_is_damage() -> None:
    data = bytearray(encoded(PIXELS))
    place = data.index(b"IDAT")
    size = int.from_bytes(data[place - 4 : place], "big")
    data[place + 4 + size] ^= 1  # the checksum alone
    cut = encoded(random_image(1, (64, 64)), "webp", lossless=True)
    for broken in (bytes(data), cut[: len(cut) // 2]):
        assert probe_image(CONFIG, broken).problem is not None
        with pytest.raises(DamageError):
            decode_image(broken, probe(broken).array_shape)


def test_a_jpeg_of_absurdly_many_scans_is_refused_by_its_header() -> None:
    whole = encoded(np.zeros((4096, 4096, 1), np.uint8), "jpeg", progressive=True)
    scans = whole.index(b"\xff\xda")
    many = whole[:scans] + whole[scans:-2] * 200 + b"\xff\xd9"
    with pytest.raises(DamageError, match=r"scans of 4096x4096 pixels: too much work"):
        probe(many)
    assert probe(whole) == PixelShape(1, 4096, 4096)


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "avif", "jpeg2000", "ppm"])
def test_formats_that_pillow_reads_are_packed_by_their_content(kind: str) -> None:
    flat = np.full((8, 8, 3), (10, 200, 90), np.uint8)
    data = encoded(flat, kind)
    assert np.abs(pixels(data).astype(int) - flat).max() <= 3
    assert probe(data) == PixelShape(3, 8, 8)


def test_32_bit_values_are_refused_instead_of_clipped() -> None:
    assert "32-bit values" in (
        probe_image(CONFIG, encoded(np.ones((4, 4, 1), np.float32), "tiff")).problem or ""
    )


def test_small_images_are_counted_left_out_or_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for size in (4, 16):
        (tmp_path / "in" / f"{size}.png").write_bytes(encoded(random_image(size, (size, size))))

    def packed(**settings: object) -> PackConfig:
        dest = (tmp_path / str(settings.get("on_small", "default"))).as_uri()
        return PackConfig.model_validate(
            {"source": str(tmp_path / "in"), "dest": dest, "image_size": 8, **settings}
        )

    assert pack(packed()).notes == (f"1 of 2 images {ENLARGED}",)
    skipped = pack(packed(on_small="skip"))
    assert (skipped.num_samples, [name for name, _ in skipped.unreadable]) == (1, ["4.png"])
    with pytest.raises(UserError, match=r"1 of 2 images are smaller than image_size: 4\.png: is 4x4"):
        pack(packed(on_small="fail", on_unreadable="skip"))
