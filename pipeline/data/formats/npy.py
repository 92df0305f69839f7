"""NumPy's npy files of uint8 pixels, with NumPy's own reader of the header under a lock.

NumPy parses the header, a Python dictionary, with `ast.literal_eval`. In some CPython versions (3.11.7 for one) that is
not thread-safe: a sound file can end in `SystemError: AST constructor recursion depth mismatch` (cpython issue
106905). Images are packed, loaded and verified by many threads.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
import threading
import tokenize
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.errors import DamageError

Pixels = npt.NDArray[np.uint8]

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
"""NumPy's own limit, which bounds the work of its parser."""
_MAX_DIMENSIONS = 32
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # major version to the size of the field that holds the header's length
_PARSER_LOCK = threading.Lock()
UNPARSABLE = (
    *(ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(MemoryError, RecursionError, tokenize.TokenError),
)
"""What NumPy raises for damaged headers."""


def encode_npy(pixels: Pixels) -> bytes:
    """The npy file of an array uint8."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def decode_npy(data: bytes) -> Pixels:
    """The array, uint8 of any shape, read-only. Raises DamageError."""
    shape, start = read_header(data)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_header(data: bytes) -> tuple[tuple[int, ...], int]:
    """Shape of the array, and the offset of its values.

    Raises DamageError for anything but uint8 in C order with as many bytes as its shape needs.
    """
    start = _header_bytes(data)
    shape = _parse(data[:start])
    # Edges are compared before they are multiplied or printed: a header can hold numbers of thousands of digits.
    count = len(data) - start
    if any(not 0 <= edge <= len(data) for edge in shape) or len(shape) > _MAX_DIMENSIONS:
        raise DamageError(f"damaged npy header: shape {_excerpt(shape)} for {count} bytes of pixels")
    if count != math.prod(shape):
        raise DamageError(f"npy holds {count} bytes of pixels, {math.prod(shape)} expected")
    return shape, start


def _header_bytes(data: bytes) -> int:
    """Size of everything before the values. Raises DamageError."""
    if not data.startswith(MAGIC):
        raise DamageError("not an npy file")
    version = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 1])
    width = _LENGTH_BYTES.get(version)
    if width is None:
        raise DamageError(f"npy of version {version}; 1 to 3 are known")
    begin = len(MAGIC) + 2 + width
    length = int.from_bytes(data[begin - width : begin], "little")
    if length > MAX_HEADER_BYTES or len(data) < begin + length:
        raise DamageError(f"damaged npy header: it claims {length} bytes")
    return begin + length


@lru_cache(maxsize=64)
def _parse(header: bytes) -> tuple[int, ...]:
    """The shape in an npy header. Cached: the images of a data set mostly share one header."""
    file = io.BytesIO(header)
    try:
        with _PARSER_LOCK:
            version = np.lib.format.read_magic(file)
            # Version 3 is version 2 with names of fields in UTF-8, and pixels have no fields.
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read(file, max_header_size=MAX_HEADER_BYTES)
    except UNPARSABLE as error:
        raise DamageError(f"damaged npy header: {_excerpt(error)}") from None
    if dtype != np.uint8 or fortran_order:
        order = "Fortran" if fortran_order else "C"
        raise DamageError(f"npy holds {_excerpt(dtype)} in {order} order; uint8 in C order expected")
    return tuple(map(int, shape))


def _excerpt(value: object) -> str:
    try:
        return " ".join(str(value).split())[:80]
    except ValueError:  # an integer of more digits than Python prints
        return "of very large numbers"
