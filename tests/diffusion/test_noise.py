"""Named randomness: the published integers, the right distributions, and no dependence on anything but the names."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipeline.diffusion.noise import Stream, normal, permutation, philox_4x32, randint, uniform
from tests.effort import examples

ONES = 0xFFFFFFFF
# Known answers of the Random123 distribution (kat_vectors: philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
N = Stream.TRAIN_NOISE
STREAMS = {
    "TRAIN_NOISE": 1, "TRAIN_TIMESTEP": 2, "TRAIN_LABEL_DROP": 3, "TRAIN_DROPOUT": 4, "FLIP": 5, "CROP": 6,
    "ORDER_SHARDS": 7, "ORDER_SAMPLES": 8, "SAMPLE_NOISE": 9, "SAMPLE_CLASS": 10, "GRID": 11, "EVALUATE_NOISE": 12,
    "TRAIN_PAIR": 13,
}  # fmt: skip
PINNED_NORMALS = [
    "-0x1.3777600000000p-4",
    "-0x1.42cec80000000p-1",
    "-0x1.fae3e80000000p-1",
    "0x1.82b7760000000p-1",
]
PINNED_INTEGERS = [95, 899, 256, 469, 568, 907]
PINNED_ORDER = [1, 0, 6, 3, 7, 5, 2, 4]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: str
) -> None:
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == answer


def test_philox_agrees_with_big_integers_everywhere() -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (4, 200))
    words = philox_4x32(tuple(torch.from_numpy(row) for row in counter), (12345, ONES - 1))
    for column in range(200):
        c, k = [int(x) for x in counter[:, column]], [12345, ONES - 1]
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
            k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
        assert [int(word[column]) for word in words] == c


def test_normals_are_box_mullers_to_float32_rounding() -> None:
    """The very first block recomputed by the book, in Python's own arithmetic."""
    name = (5).to_bytes(8, "little") + int(N).to_bytes(4, "little")
    digest = hashlib.blake2b(name, digest_size=8, person=b"ddpm-noise").digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    words = philox_4x32(tuple(torch.tensor([w]) for w in (0, 2, 77, 0)), key)
    expected: list[float] = []
    for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
        radius = math.sqrt(-2 * math.log((int(radius_word) + 0.5) / 2**32))
        angle = ((int(angle_word) & 0x3FFFFFFF) + 0.5 - 2**29) / 2**30 * math.pi / 2
        pair = [math.cos(angle), math.sin(angle)]
        pair = pair[::-1] if int(angle_word) >> 30 & 1 else pair
        sign = -1 if int(angle_word) >> 31 else 1
        expected += [sign * radius * value for value in pair]
    drawn = normal(5, N, torch.tensor([77]), (4,), step=2)[0]
    assert drawn.tolist() == [np.float32(value) for value in expected]


def test_normals_of_a_name_never_change() -> None:
    """Every published sample depends on these bits."""
    drawn = normal(0, Stream.SAMPLE_NOISE, torch.tensor([0, 2**62]), (2,), step=3)
    assert [value.hex() for value in drawn.flatten().tolist()] == PINNED_NORMALS
    assert randint(1, Stream.TRAIN_TIMESTEP, torch.arange(6), 1000).tolist() == PINNED_INTEGERS
    assert permutation(2, Stream.ORDER_SAMPLES, 8, step=1).tolist() == PINNED_ORDER
    assert {stream.name: stream.value for stream in Stream} == STREAMS


def test_without_a_step_the_first_is_meant() -> None:
    index = torch.arange(3)
    assert torch.equal(normal(0, N, index, (2,)), normal(0, N, index, (2,), step=0))
    assert torch.equal(randint(0, N, index, 99), randint(0, N, index, 99, step=0))
    assert torch.equal(uniform(0, N, index), uniform(0, N, index, step=0))
    assert torch.equal(permutation(0, N, 9), permutation(0, N, 9, step=0))


def test_a_step_in_memory_names_the_same_numbers() -> None:
    """As a captured graph has it."""
    index = torch.arange(3)
    assert torch.equal(normal(0, N, index, (2,), torch.tensor([4])), normal(0, N, index, (2,), step=4))
    assert torch.equal(randint(0, N, index, 99, torch.tensor([4])), randint(0, N, index, 99, step=4))


@given(
    index=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9),
    shape=st.sampled_from([(1,), (5,), (3, 2, 2), (3, 8, 8)]),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    data=st.data(),
)
@examples(40)
def test_a_sample_has_the_same_bits_in_any_batch(
    index: list[int], shape: tuple[int, ...], seed: int, step: int, data: st.DataObject
) -> None:
    whole = normal(seed, N, torch.tensor(index), shape, step)
    order = data.draw(st.permutations(range(len(index))))
    mixed = normal(seed, N, torch.tensor([index[i] for i in order]), shape, step)
    assert torch.equal(mixed, whole[order])
    for i, name in enumerate(index):
        assert torch.equal(normal(seed, N, torch.tensor([name]), shape, step)[0], whole[i])
    strided = torch.stack([torch.tensor(index), torch.zeros(len(index), dtype=torch.int64)], 1)[:, 0]
    assert torch.equal(normal(seed, N, strided, shape, step), whole)


def test_bits_do_not_depend_on_threads_or_on_the_cut_into_chunks() -> None:
    index, threads = torch.arange(100), torch.get_num_threads()
    whole = normal(3, N, index, (3, 32, 32))
    try:
        torch.set_num_threads(1)
        assert torch.equal(normal(3, N, index, (3, 32, 32)), whole)
    finally:
        torch.set_num_threads(threads)
    parts = [normal(3, N, part, (3, 32, 32)) for part in index.split(7)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU; there is none here")
def test_a_gpu_draws_the_same_bits_as_the_cpu() -> None:
    index = torch.tensor([0, 7, 2**40])
    ours, theirs = (normal(3, N, index.to(device), (3, 32, 32), step=5).cpu() for device in ("cpu", "cuda"))
    assert torch.equal(ours, theirs)
    for draw in (lambda i: randint(3, N, i, 1000), lambda i: uniform(3, N, i)):
        assert torch.equal(draw(index), draw(index.cuda()).cpu())


def test_normals_have_the_moments_and_the_distribution_of_normals() -> None:
    z = normal(0, N, torch.arange(500), (2000,)).double().numpy().ravel()
    count = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert stats.kstest(z, "norm").pvalue > 1e-3


@pytest.mark.parametrize("what", ["index", "step", "seed", "stream", "element"])
def test_neighbouring_names_are_independent(what: str) -> None:
    one = torch.arange(40)
    pairs = {
        "index": (normal(0, N, one, (5000,)), normal(0, N, one + 1, (5000,))),
        "step": (normal(0, N, one, (5000,), 0), normal(0, N, one, (5000,), 1)),
        "seed": (normal(0, N, one, (5000,)), normal(1, N, one, (5000,))),
        "stream": (normal(0, N, one, (5000,)), normal(0, Stream.SAMPLE_NOISE, one, (5000,))),
        "element": (normal(0, N, one, (5001,))[:, :-1], normal(0, N, one, (5001,))[:, 1:]),
    }
    first, second = (values.double().numpy().ravel() for values in pairs[what])
    assert not np.array_equal(first, second)
    for f in (lambda z: z, np.square, lambda z: z**3):
        assert abs(np.corrcoef(f(first), f(second))[0, 1]) < 4.5 / math.sqrt(len(first))


def test_a_longer_shape_begins_with_the_same_values() -> None:
    index = torch.arange(3)
    assert torch.equal(normal(0, N, index, (10,)), normal(0, N, index, (27,))[:, :10])


@given(high=st.integers(1, 2**31), seed=st.integers(0, 2**63 - 1))
@examples(40)
def test_integers_stay_in_range(high: int, seed: int) -> None:
    drawn = randint(seed, Stream.TRAIN_TIMESTEP, torch.arange(200), high)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < high
    if high == 2**31:
        assert int(drawn.max()) > 2**29


def test_integers_below_a_power_of_two_are_the_first_bits_of_the_largest() -> None:
    index = torch.arange(500)
    most = randint(4, N, index, 2**31)
    for bits in range(31):
        assert torch.equal(randint(4, N, index, 2**bits), most >> (31 - bits)), bits
    index = torch.arange(20_000)  # the same word makes both
    assert torch.equal(randint(4, N, index, 2**24), (uniform(4, N, index) * 2**24).long())


def test_integers_and_uniforms_are_uniform() -> None:
    index = torch.arange(100_000)
    counts = np.bincount(randint(0, Stream.TRAIN_TIMESTEP, index, 1000).numpy(), minlength=1000)
    assert stats.chisquare(counts).pvalue > 1e-3
    values = uniform(0, Stream.FLIP, index)
    assert values.dtype == torch.float32
    assert 0 <= float(values.min()) < 1e-3 < 1 - 1e-3 < float(values.max()) < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


@given(n=st.integers(0, 300), step=st.integers(0, 5))
@examples(30)
def test_a_permutation_holds_everything_once(n: int, step: int) -> None:
    assert sorted(permutation(9, Stream.ORDER_SHARDS, n, step).tolist()) == list(range(n))


def test_all_orders_of_three_are_equally_likely() -> None:
    seen = [tuple(permutation(0, Stream.ORDER_SHARDS, 3, epoch).tolist()) for epoch in range(1200)]
    counts = [seen.count(order) for order in sorted(set(seen))]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


I3 = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: normal(-1, N, I3, (2,)), "seed"),
        (lambda: normal(2**63, N, I3, (2,)), "seed"),
        (lambda: normal(True, N, I3, (2,)), "seed"),
        (lambda: normal(0, N, I3.int(), (2,)), "index"),
        (lambda: normal(0, N, -I3, (2,)), "index"),
        (lambda: normal(0, N, I3, (2, 0)), "shape"),
        (lambda: normal(0, N, I3, (2,), step=-1), "step"),
        (lambda: normal(0, N, I3, (2,), step=2**32), "step"),
        (lambda: normal(0, N, I3, (2,), step=torch.tensor([1.0])), "step must be int64"),
        (lambda: normal(0, N, I3, (2,), step=torch.tensor([1, 2])), "step must be int64"),
        (lambda: normal(0, N, I3, (2,), step=torch.tensor([1], device="meta")), "step must be int64"),
        (lambda: randint(0, N, I3, 0), "high"),
        (lambda: permutation(0, N, -1), "n must"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_an_empty_batch_is_empty() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert normal(0, N, empty, (3, 4)).shape == (0, 3, 4)
    assert randint(0, N, empty, 10).shape == (0,)


def test_a_normal_costs_a_hundred_operations() -> None:
    """A training step of DDPM on CIFAR-10 takes some 12 million operations for each number of a sample."""
    drawn = 16 * 3 * 32 * 32

    class Written(TorchDispatchMode):
        """Counts the numbers that operations write."""

        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.numbers += result.numel() if isinstance(result, torch.Tensor) else 0
            return result

    with Written() as written:
        normal(0, N, torch.arange(16), (3, 32, 32))
    assert 50 * drawn < written.numbers < 120 * drawn
