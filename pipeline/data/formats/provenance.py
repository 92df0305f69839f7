"""Marks that say of an image, in a form other software reads, that a model made it.

A mark is XMP, in the chunk that the PNG or WebP specification has for it. It holds IPTC's `DigitalSourceType`, which
photo tools, search engines and platforms read, and in a namespace of this project the generation's spec digest and the
sample's index. Its bytes follow from these two. A mark proves nothing: anyone can write one, or remove it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from ddpm_pipeline.data.formats.png_chunks import HEADER_BYTES, MAGIC, png_chunk, png_chunks
from ddpm_pipeline.errors import DamageError

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a model made which was trained on sampled content."""
MAX_XMP_BYTES = 1 << 20
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OURS = "urn:ddpm-pipeline:provenance#"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_KEYWORD = b"XML:com.adobe.xmp"
_ITXT_HEAD = _KEYWORD + b"\0" + b"\0\0" + b"\0" + b"\0"  # not compressed; no language, no translated keyword
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">'
    f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC}" xmlns:ddpm="{_OURS}" '
    f'Iptc4xmpExt:DigitalSourceType="{TRAINED}" ddpm:spec="%s"%s/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def synthetic_mark(spec_digest: str, index: int | None = None) -> bytes:
    """The XMP of sample `index` of the generation with this digest; without index, of an image of several samples."""
    return (_PACKET % (spec_digest, "" if index is None else f' ddpm:index="{index}"')).encode()


def with_png_mark(png: bytes, xmp: bytes) -> bytes:
    """The PNG with `xmp` right after its header, where `may_have_orientation` expects it."""
    return b"".join((png[:HEADER_BYTES], _png_chunk(xmp), png[HEADER_BYTES:]))


def has_mark(data: bytes, xmp: bytes) -> bool:
    """Whether a PNG or WebP holds exactly this mark where generations have it."""
    if data.startswith(MAGIC):
        return data.startswith(_png_chunk(xmp), HEADER_BYTES)
    return data.endswith(b"XMP " + struct.pack("<I", len(xmp)) + xmp + bytes(len(xmp) % 2))


@dataclass(frozen=True)
class Mark:
    """What the XMP of an image says about its origin."""

    digital_source_type: str | None
    """IPTC's term, an address; None if the XMP has none."""
    spec_digest: str | None
    """Digest of the spec of the generation; None in marks of other software."""
    index: int | None
    """Index of the sample; None for an image of several samples, and in marks of other software."""

    @property
    def is_synthetic(self) -> bool:
        """Whether it says that a trained model made the image."""
        return self.digital_source_type == TRAINED


def read_mark(data: bytes) -> Mark | None:
    """What the XMP of a PNG or WebP says; None if it has no XMP. DamageError for other files and for broken XMP."""
    xmp = _find_xmp(data)
    if xmp is None:
        return None
    if len(xmp) > MAX_XMP_BYTES or b"<!" in xmp:  # entities could expand to any size
        raise DamageError("its XMP is larger than 1 MiB, or declares entities; it is not read")
    try:
        root = ElementTree.fromstring(xmp.decode())
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DamageError(f"its XMP does not parse: {error}") from error
    digest, index = _property(root, _OURS, "spec"), _property(root, _OURS, "index")
    return Mark(
        digital_source_type=_property(root, _IPTC, "DigitalSourceType"),
        spec_digest=digest if re.fullmatch(r"[0-9a-f]{64}", digest or "") else None,
        index=int(index) if index is not None and re.fullmatch(r"[0-9]{1,18}", index, re.ASCII) else None,
    )


def _property(root: ElementTree.Element, namespace: str, name: str) -> str | None:
    """A property of any description, written as an attribute or as an element; None if there is none."""
    key = f"{{{namespace}}}{name}"
    for description in root.iter(f"{{{_RDF}}}Description"):
        if key in description.attrib:
            return description.attrib[key]
        element = description.find(key)
        if element is not None:
            return element.attrib.get(f"{{{_RDF}}}resource", (element.text or "").strip())
    return None


def _png_chunk(xmp: bytes) -> bytes:
    return png_chunk(b"iTXt", _ITXT_HEAD + xmp)


def _find_xmp(data: bytes) -> bytes | None:
    if data.startswith(MAGIC):
        return next((xmp for kind, body in png_chunks(data) if (xmp := _xmp_of_itxt(kind, body))), None)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return next((body for kind, body in _riff_chunks(data) if kind == b"XMP "), None)
    raise DamageError("not a PNG or WebP, so it has no mark of a generation")


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _xmp_of_itxt(kind: bytes, body: bytes) -> bytes | None:
    """The XMP in a PNG's text chunk; None for other chunks."""
    if kind != b"iTXt" or not body.startswith(_KEYWORD + b"\0"):
        return None
    is_compressed, rest = body[len(_KEYWORD) + 1 : len(_KEYWORD) + 2], body[len(_KEYWORD) + 3 :]
    text = rest.partition(b"\0")[2].partition(b"\0")[2]
    if is_compressed != b"\1":
        return text
    try:
        return zlib.decompressobj().decompress(text, MAX_XMP_BYTES + 1)
    except zlib.error as error:
        raise DamageError(f"its XMP does not decompress: {error}") from error
