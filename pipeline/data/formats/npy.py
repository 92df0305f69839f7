"""NumPy's npy files of uint8 pixels, read without Python's parser.

NumPy reads the header, a dictionary written as Python, with `ast.literal_eval`. In some CPythons (3.11.7 for one) that
is not for several threads at once: they share one count of the depth of the tree, and where the garbage collector lets
another thread in between, a sound file ends in `SystemError: AST constructor recursion depth mismatch` (cpython issue
106905). Pictures are packed, loaded and verified by many threads, so their headers are read here.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
import re

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamageError

UInt8 = npt.NDArray[np.uint8]

MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # major version to the size of the field that holds the header's length
_MAX_HEADER = 10_000  # NumPy's own limit
_VALUE = r"'[^']*'|True|False|\((?:\d{1,18}L?(?:, *\d{1,18}L?)*)?,? *\)"
_ENTRY = re.compile(rf"'(descr|fortran_order|shape)' *: *({_VALUE})")
_HEADER = re.compile(rf"\{{ *{_ENTRY.pattern}(?: *, *{_ENTRY.pattern}){{2}} *,? *\}}\s*")
_BYTES = ("'|u1'", "'u1'", "'<u1'", "'>u1'")


def encode_npy(pixels: UInt8) -> bytes:
    """The npy file of an array uint8."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def read_header(data: bytes) -> tuple[tuple[int, ...], int]:
    """Shape of the array, and where its values begin.

    Raises DamageError for all but uint8 in C order and as many bytes as the shape says.
    """
    text, start = _header(data)
    if not _HEADER.fullmatch(text):
        raise DamageError(f"damaged npy header: {text[:80]!r}")
    entries: dict[str, str] = dict(_ENTRY.findall(text))
    descr, order, edges = (entries.get(name, "?") for name in ("descr", "fortran_order", "shape"))
    if descr not in _BYTES or order != "False" or not edges.startswith("("):
        raise DamageError(f"npy holds {text.strip()}; uint8 in C order expected")
    shape = tuple(int(edge) for edge in re.findall(r"\d+", edges))
    if len(data) - start != math.prod(shape):
        raise DamageError(f"npy holds {len(data) - start} bytes of pixels, {math.prod(shape)} expected")
    return shape, start


def decode_npy(data: bytes) -> UInt8:
    """The array, uint8 of any shape, read-only. Raises DamageError."""
    shape, start = read_header(data)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _header(data: bytes) -> tuple[str, int]:
    """The header's text, and where it ends. Raises DamageError."""
    if not data.startswith(MAGIC):
        raise DamageError("not an npy file")
    version = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 1])
    width = _LENGTH_BYTES.get(version)
    if width is None:
        raise DamageError(f"npy of version {version}; 1 to 3 are known")
    begin = len(MAGIC) + 2 + width
    length = int.from_bytes(data[begin - width : begin], "little")
    if length > _MAX_HEADER or len(data) < begin + length:
        raise DamageError(f"damaged npy header: it claims {length} bytes")
    return data[begin : begin + length].decode(
        "utf-8" if version == 3 else "latin-1", "replace"
    ), begin + length
