"""A mark says in IPTC's words that a model made an image, and which sample of which generation it is."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.data.formats.images import ImageFormat, decode_image, encode_image, probe
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.png import decode_png, may_have_orientation
from ddpm_pipeline.data.formats.png_chunks import HEADER_BYTES, png_chunk
from ddpm_pipeline.data.formats.provenance import TRAINED, Mark, has_mark, read_mark, synthetic_mark
from ddpm_pipeline.errors import DamageError

DIGEST = "ab" * 32
MARK = synthetic_mark(DIGEST, 7)
FORMATS = pytest.mark.parametrize("image_format", ["png", "webp"])


def image(height: int = 6, width: int = 9) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    data = encode_image(image(), "png")
    return data[:HEADER_BYTES] + png_chunk(kind, body) + data[HEADER_BYTES:]


@FORMATS
def test_other_software_finds_the_mark_as_xmp(image_format: ImageFormat) -> None:
    data = encode_image(image(), image_format, MARK)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        found = opened.info["xmp"]
    assert found == MARK
    assert b'Iptc4xmpExt:DigitalSourceType="%s"' % TRAINED.encode() in found


@FORMATS
def test_a_mark_says_which_sample_of_which_generation_an_image_is(image_format: ImageFormat) -> None:
    assert read_mark(encode_image(image(), image_format, MARK)) == Mark(TRAINED, DIGEST, 7)
    sheet = encode_image(image(), image_format, synthetic_mark(DIGEST))
    assert read_mark(sheet) == Mark(TRAINED, DIGEST, None)
    assert read_mark(encode_image(image(), image_format)) is None


@FORMATS
def test_a_mark_changes_no_pixel_and_is_the_same_each_time(image_format: ImageFormat) -> None:
    data = encode_image(image(), image_format, MARK)
    assert data == encode_image(image(), image_format, MARK)
    assert np.array_equal(decode_image(data, (6, 9, 3)), image())
    assert (has_mark(data, MARK), has_mark(data, synthetic_mark(DIGEST, 8))) == (True, False)
    assert not has_mark(encode_image(image(), image_format), MARK)


def test_a_png_without_its_mark_is_the_png_that_was_stored_before_there_were_marks() -> None:
    plain, marked = encode_image(image(), "png"), encode_image(image(), "png", MARK)
    size = len(marked) - len(plain)
    assert marked[:HEADER_BYTES] + marked[HEADER_BYTES + size :] == plain


def test_a_marked_png_is_read_by_the_fast_decoder() -> None:
    data = encode_image(image(), "png", MARK)
    fast = decode_png(data, 3, 6, 9)
    assert fast is not None
    assert np.array_equal(fast, image())
    assert (probe(data).width, probe(data).height) == (9, 6)


RDF = b"<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>%s</rdf:RDF>"
XMP = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + RDF + b"</x:xmpmeta>"
TURNED = XMP % b"<rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation=\"6\"/>"


def test_an_orientation_in_xmp_still_turns_an_image() -> None:
    for data in (
        with_chunk(b"iTXt", TURNED),
        encode_image(image(), "png")[:HEADER_BYTES]
        + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + MARK)
        + png_chunk(b"iTXt", TURNED)
        + encode_image(image(), "png")[HEADER_BYTES:],
    ):
        assert may_have_orientation(data)
        assert (probe(data).width, probe(data).height) == (6, 9)


def test_what_other_software_states_is_read_in_either_form_of_rdf() -> None:
    camera = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    iptc = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    element = f"<rdf:Description xmlns:e='{iptc}'><e:DigitalSourceType>{camera}</e:DigitalSourceType></rdf:Description>"
    data = with_chunk(b"iTXt", XMP % element.encode())
    assert read_mark(data) == Mark(camera, None, None)
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MARK)
    assert read_mark(with_chunk(b"iTXt", packed)) == Mark(TRAINED, DIGEST, 7)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GIF89a", "not a PNG or WebP"),
        (with_chunk(b"iTXt", XMP % b"<unclosed>"), "XMP does not parse"),
        (
            with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>"),
            "declares entities",
        ),
        (with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0 torn"), "XMP does not decompress"),
        (
            with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * (1 << 21))),
            "larger than 1 MiB",
        ),
        (b"RIFF" + struct.pack("<I", 20) + b"WEBPXMP \x02\0\0\0\xff\xff", "does not parse"),
    ],
)
def test_a_broken_mark_is_damage_in_one_line(data: bytes, problem: str) -> None:
    with pytest.raises(DamageError, match=problem) as caught:
        read_mark(data)
    assert "\n" not in str(caught.value)
