"""npy files of pixels: NumPy's files are read, by many threads at once; damaged ones are refused."""

import contextlib
import gc
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.data.formats.npy import decode_npy, encode_npy, read_header
from ddpm_pipeline.errors import DamageError
from tests.effort import examples

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


@pytest.fixture
def collector_that_lets_others_in() -> Iterator[None]:
    """Garbage is collected every few objects, and other threads run each time."""
    before, interval = gc.get_threshold(), sys.getswitchinterval()

    def count(phase: str, info: dict[str, int]) -> None:
        sum(range(50))

    gc.callbacks.append(count)
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*before)
    gc.callbacks.remove(count)


@pytest.mark.usefixtures("collector_that_lets_others_in")
def test_many_threads_read_at_once() -> None:
    files = [encode_npy(np.zeros((height, 1, 1), np.uint8)) for height in range(1, 301)]

    def read(shift: int) -> list[int]:
        return [decode_npy(files[(height + shift) % 300]).shape[0] for height in range(300)]

    with ThreadPoolExecutor(4) as pool:
        # a shift for each thread: a header in the cache would not be parsed
        for shift, heights in enumerate(pool.map(read, [0, 1, 2, 3])):
            assert heights == [(height + shift) % 300 + 1 for height in range(300)]


@examples(100)
@given(shape=SHAPES, seed=st.integers(0, 9))
def test_what_is_written_is_read_by_us_and_by_numpy(shape: tuple[int, ...], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    data = encode_npy(pixels)
    assert np.array_equal(decode_npy(data), pixels)
    assert np.array_equal(np.load(io.BytesIO(data)), pixels)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_format_are_read(version: tuple[int, int]) -> None:
    out, pixels = io.BytesIO(), np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.lib.format.write_array(out, pixels, version=version)
    assert np.array_equal(decode_npy(out.getvalue()), pixels)


def file_of(header: str, values: int = 12) -> bytes:
    """An npy file with this header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(values)


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': (3, 4), 'descr': '|u1', 'fortran_order': False}",
        "{'descr':'<u1','fortran_order':False,'shape':(3L,4L),}\n",
        "{ 'descr': 'u1', 'fortran_order': False, 'shape': (3, 4, ), }   \n",
    ],
)
def test_headers_of_other_writers_are_read(header: str) -> None:
    assert read_header(file_of(header))[0] == (3, 4)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not an npy file"),
        (b"\x93NUMPY", "version 0"),
        (b"\x93NUMPY\x07\x00\x01\x00", "version 7"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "claims 65535 bytes"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4)}")[:30], "claims 57 bytes"),
        (
            file_of("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1)}"),
            "float32 in C order; uint8 in C order",
        ),
        (file_of("{'descr': '|u1', 'fortran_order': True, 'shape': (3, 4)}"), "uint8 in C order"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'shape': False}"), "damaged npy header"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'descr': '|u1'}"), "damaged npy header"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (3, -4)}"), "damaged npy header"),
        (file_of("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,)}"), "uint8 in C order"),
        (file_of("{'descr': (), 'fortran_order': False, 'shape': (3,)}"), "damaged npy header"),
        (file_of("{'descr': 'O', 'fortran_order': False, 'shape': (12,)}"), "holds object in C order"),
        (
            file_of(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(1,) * 99}}}", 1),
            "damaged npy header",
        ),
        (file_of("(" * 9000), "damaged npy header"),
        (file_of("-" * 9000 + "1"), "damaged npy header"),
        (
            file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",)}"),
            "damaged npy header",
        ),
        (file_of("{'descr': '|u1', 'fortran_order': False}"), "damaged npy header"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 5)}"), "12 bytes of pixels, 15"),
        (file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"), "damaged"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, complaint: str) -> None:
    with pytest.raises(DamageError, match=complaint):
        decode_npy(data)


@examples(100)
@given(data=st.binary(max_size=80).map(lambda rest: b"\x93NUMPY\x01\x00" + rest))
def test_any_bytes_are_an_array_or_damage(data: bytes) -> None:
    with contextlib.suppress(DamageError):
        assert decode_npy(data).dtype == np.uint8
