"""No bytes crash a reader: it takes them or refuses them in one line, in bounded memory."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.effort import examples, is_long
from tests.fuzz.readers import NAMES
from tests.fuzz.targets import Target, all_targets

MOST_BYTES = 64 * 2**20
TEXT = ("metadata.csv", "CelebA table", "data set card", "settings")
BINARY = (
    "tar",
    "npy",
    "idx",
    "CIFAR batch",
    "npz",
    "image mark",
    "image parquet",
    "metadata.parquet",
    "checkpoint state",
    *TEXT,
)
CORPUS = Path(__file__).parent / "corpus"

patient = settings(
    examples(60),
    deadline=timedelta(seconds=20),
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    with all_targets() as found:
        yield found


def check(target: Target, data: bytes) -> None:
    """Fails on anything but a refusal or an acceptance, and on absurd memory."""
    tracemalloc.start()
    try:
        target.refuses_or_takes(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES + 8 * len(data)


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    -(2**64),
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "../../etc/passwd",
    "a\nb",
    "x" * 10_000,
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    {"": {}},
    [0] * 10_000,
]


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _places(value, (*path, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from _places(value, (*path, number))


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = _with(document[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("name", NAMES)
@patient
@given(data=st.data())
def test_a_reader_survives_bytes_flipped_cut_and_put_in(
    name: str, targets: dict[str, Target], data: st.DataObject
) -> None:
    target = targets[name]
    document = bytearray(target.sound)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(0, len(document) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "put", "drop", "repeat"]))
        if kind == "flip" and document:
            document[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del document[at:]
        elif kind == "put":
            document[at:at] = data.draw(st.binary(max_size=40))
        elif kind == "drop":
            del document[at : at + data.draw(st.integers(1, 600))]
        else:
            document[at:at] = document[at : at + 512] * data.draw(st.integers(1, 4))
    check(target, bytes(document))


@pytest.mark.parametrize("name", NAMES)
@patient
@given(data=st.binary(max_size=4096))
def test_a_reader_survives_any_bytes_at_all(name: str, targets: dict[str, Target], data: bytes) -> None:
    check(targets[name], data)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BINARY])
def test_a_reader_survives_hostile_values_in_every_place(name: str, targets: dict[str, Target]) -> None:
    """Each place and each value at least once, the rest drawn by the reader's name; `make fuzz` tries more."""
    target = targets[name]
    sound = json.loads(target.sound)
    chance = random.Random(name)
    places, at_each = list(_places(sound)), len(HOSTILE) // 3 if is_long() else 2
    tried = [(path, value) for path in places for value in chance.sample(HOSTILE, at_each)]
    tried += [(chance.choice(places), value) for value in HOSTILE]
    for path, value in tried:
        check(target, json.dumps(_with(sound, path, value)).encode())
    for depth in (100, 100_000):
        check(target, b"[" * depth)
        check(target, b'{"a":' * depth + b"1" + b"}" * depth)
    assert target.refuses_or_takes(target.sound) is None


def test_what_the_fuzzer_found_is_refused(targets: dict[str, Target]) -> None:
    files = sorted(CORPUS.glob("*/*"))
    assert files
    for file in files:
        check(targets[file.parent.name.replace("_", " ")], file.read_bytes())
