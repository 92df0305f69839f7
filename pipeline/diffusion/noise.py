"""Random numbers that are a pure function of their names: (seed, purpose, index, step), never of history.

The integers are Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key
comes from (seed, stream), the counter is (block, step, index), so a number does not depend on the batch it is
drawn in, on the device, or on what was drawn before. Everything below uses integer operations and float64
additions, multiplications, divisions and square roots only, which IEEE 754 rounds in one way everywhere:
normals, too, are the same bits for any split and on any device.

On a GPU each function is one kernel (`ddpm_pipeline.kernels.philox`) with the bits of the functions below, which other
devices compute and which define them. `torch.compile` sees an operator in either case: Inductor would compute the
integers wrongly (tests/diffusion/test_compiled_noise.py).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ddpm_pipeline.kernels import define_operator, on_gpu

_MASK = 0xFFFFFFFF
_ROUNDS = 10
# Multipliers minus 2^32. A 32-bit word times one of these stays within int64, where the plain product would
# not: a*M = a*(M - 2^32) + a*2^32, whose low word is that of the first term and whose high word is off by a.
_M0 = 0xD2511F53 - 2**32
_M1 = 0xCD9E8D57 - 2**32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# Counter blocks at a time: a handful of int64 buffers of this length stay in a core's cache.
_CPU_BLOCKS = 1 << 15
_DEVICE_BLOCKS = 1 << 23


class Stream(IntEnum):
    """What a random number is for. The numbers are part of every result: never renumber, only append."""

    TRAIN_NOISE = 1
    TRAIN_TIMESTEP = 2
    TRAIN_LABEL_DROP = 3
    TRAIN_DROPOUT = 4
    FLIP = 5
    CROP = 6
    ORDER_SHARDS = 7
    ORDER_SAMPLES = 8
    SAMPLE_NOISE = 9
    SAMPLE_CLASS = 10
    GRID = 11
    EVALUATE_NOISE = 12
    TRAIN_PAIR = 13


def normal(
    seed: int, stream: Stream, index: Tensor, shape: tuple[int, ...], step: int | Tensor = 0
) -> Tensor:
    """Standard normals, float32 (B, *shape) on index's device, row b a function of (seed, stream, index[b],
    step).

    seed: 0..2^63-1. index: int64 (B,), not negative. step: 0..2^32-1, or int64 of one element on index's device.
    |z| is at most 6.77 (32-bit uniforms). Row b's first n values do not depend on `shape`. Raises: ValueError naming
    the argument.
    """
    count = math.prod(shape)
    if any(size < 1 for size in shape):
        raise ValueError(f"shape must hold positive sizes, not {shape}")
    draw = _normal_operator if _as_operator(index) else _normal
    return draw(index, *_names(seed, stream, index, step), count).reshape(len(index), *shape)


def randint(seed: int, stream: Stream, index: Tensor, high: int, step: int | Tensor = 0) -> Tensor:
    """Integers in 0..high-1, int64 (B,), high at most 2^31: the top of a 64-bit product, biased by less than
    2^-32."""
    if not 1 <= high <= 2**31:
        raise ValueError(f"high must lie in 1..2^31, not {high}")
    return _draw_one_block(seed, stream, index, step, high, "integer")


def uniform(seed: int, stream: Stream, index: Tensor, step: int | Tensor = 0) -> Tensor:
    """Multiples of 2^-24 in [0, 1), float32 (B,)."""
    return _draw_one_block(seed, stream, index, step, 1, "uniform")


def permutation(seed: int, stream: Stream, n: int, step: int = 0) -> Tensor:
    """A permutation of 0..n-1, int64 (n,): stable argsort of 63-bit keys. `step` carries, say, the epoch."""
    if n < 0:
        raise ValueError(f"n must not be negative, not {n}")
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    index = torch.zeros(1, dtype=torch.int64)
    (words,) = _words(index, *_names(seed, stream, index, step), num_blocks=-(-n // 2))
    pairs = [(words[0] >> 1 << 32) | words[1], (words[2] >> 1 << 32) | words[3]]
    return torch.argsort(torch.cat(pairs, dim=1)[0, :n], stable=True)


def words32(seed: int, stream: Stream, index: Tensor, step: int | Tensor = 0) -> Tensor:
    """Four raw 32-bit words for each index, int64 (B, 4): key material for cheaper generators."""
    return _draw_one_block(seed, stream, index, step, 1, "words")


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four int64 tensors of 32-bit words and two key words to four tensors of 32-bit
    words."""
    c0, c1, c2, c3 = (word.clone() for word in counter)
    spare0, spare1, high0, high1 = (torch.empty_like(word) for word in (c0, c0, c0, c0))
    k0, k1 = key
    for _ in range(_ROUNDS):
        _multiply(c0, _M0, low=spare0, high=high0)
        _multiply(c2, _M1, low=spare1, high=high1)
        c1.bitwise_xor_(high1).bitwise_xor_(k0)
        c3.bitwise_xor_(high0).bitwise_xor_(k1)
        # The round's result is (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0); buffers change roles, nothing is
        # copied.
        c0, c1, c2, c3, spare0, spare1 = c1, spare1, c3, spare0, c0, c2
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int, low: Tensor, high: Tensor) -> None:
    """The two words of word * (multiplier + 2^32), written to `low` and `high`."""
    torch.mul(word, multiplier, out=low)
    torch.bitwise_right_shift(low, 32, out=high)
    high.add_(word)
    low.bitwise_and_(_MASK)


def _key(seed: int, stream: Stream) -> tuple[int, int]:
    """Two 32-bit key words: a hash, so that neither neighbouring seeds nor streams share a counter
    sequence."""
    if isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2^63-1, not {seed}")
    name = seed.to_bytes(8, "little") + int(stream).to_bytes(4, "little")
    digest = hashlib.blake2b(name, digest_size=8, person=b"ddpm-noise").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _as_operator(index: Tensor) -> bool:
    return on_gpu(index) or torch.compiler.is_compiling()


def _names(
    seed: int, stream: Stream, index: Tensor, step: int | Tensor
) -> tuple[Tensor | None, int, int, int]:
    """Checked arguments as the operators take them: step in device memory, two key words, step as a number."""
    key0, key1 = _key(seed, stream)
    _check_index(index)
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1 or step.device != index.device:
            raise ValueError(
                f"step must be int64 of one element on {index.device}, not {step.dtype} {tuple(step.shape)} on "
                f"{step.device}"
            )
        return step, key0, key1, 0
    if not 0 <= step <= _MASK:
        raise ValueError(f"step must lie in 0..2^32-1, not {step}")
    return None, key0, key1, step


def _draw_one_block(
    seed: int, stream: Stream, index: Tensor, step: int | Tensor, high: int, kind: str
) -> Tensor:
    draw = _one_block_operator if _as_operator(index) else _one_block
    return draw(index, *_names(seed, stream, index, step), high, kind)


def _normal(index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int, count: int) -> Tensor:
    rows: list[Tensor] = []
    for words in _words(index, device_step, key0, key1, step, num_blocks=-(-count // 4)):
        pairs = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
        rows.append(torch.stack([z.to(torch.float32) for z in pairs], dim=-1).flatten(1)[:, :count])
    return torch.cat(rows) if rows else torch.empty(0, count, device=index.device)


def _one_block(
    index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int, high: int, kind: str
) -> Tensor:
    chunks = list(_words(index, device_step, key0, key1, step, num_blocks=1))
    w0, w1, w2, w3 = (torch.cat([chunk[i] for chunk in chunks]).flatten() for i in range(4))
    if kind == "integer":
        return (w0 * high + ((w1 * high) >> 32)) >> 32
    if kind == "uniform":
        return (w0 >> 8).to(torch.float32) * 2.0**-24
    return torch.stack((w0, w1, w2, w3), dim=-1)


def _words(
    index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int, num_blocks: int
) -> Iterator[tuple[Tensor, ...]]:
    """Philox words of each index, four int64 tensors (rows, num_blocks) at a time, rows in order."""
    if num_blocks > _MASK:
        raise ValueError(f"shape needs {num_blocks} counter blocks, more than the 2^32 there are")
    limit = _CPU_BLOCKS if index.device.type == "cpu" else _DEVICE_BLOCKS
    block = torch.arange(num_blocks, dtype=torch.int64, device=index.device)
    for rows in index.split(max(1, limit // num_blocks)):
        shape = (len(rows), num_blocks)
        low, high = (rows & _MASK)[:, None].expand(shape), (rows >> 32)[:, None].expand(shape)
        steps = torch.full_like(low, step) if device_step is None else device_step.reshape(1, 1).expand(shape)
        yield philox_4x32((block.expand(shape), steps, low, high), (key0, key1))


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 of shape (B,), not {index.dtype} {tuple(index.shape)}")
    # On an accelerator the comparison would stall the queue, in compiled code break the graph.
    reads_at_once = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if reads_at_once and len(index) and int(index.min()) < 0:
        raise ValueError("index must not be negative")


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals, float64, from two 32-bit words (Box & Muller 1958).

    The radius is sqrt(-2 ln u), u = (word + 1/2) 2^-32. The angle is uniform: 30 bits place it in a quarter
    turn around 0, one bit mirrors that quarter onto the next, one turns both by half.
    """
    radius = _minus_two_log((radius_word.to(torch.float64) + 0.5).mul_(2.0**-32)).sqrt_()
    quarter = (angle_word & 0x3FFFFFFF).to(torch.float64).add_(0.5 - 2.0**29).mul_(math.pi * 2.0**-31)
    sine, cosine = _sine_cosine(quarter)
    radius.mul_(1 - 2 * (angle_word >> 31))
    mirrored = (angle_word & 0x40000000).bool()
    return (
        torch.where(mirrored, sine, cosine).mul_(radius),
        torch.where(mirrored, cosine, sine).mul_(radius),
    )


def _minus_two_log(u: Tensor) -> Tensor:
    """-2 ln u for normal float64 u in (0, 1), to about 1e-14, from operations that round alike everywhere.

    u = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m-1)/(m+1), |s| < 0.172, by its series.
    """
    bits = u.view(torch.int64)
    root_half_bits = 0x3FE6A09E667F3BCD
    exponent = (bits - root_half_bits) >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    s = (m - 1).div_(m + 1)
    series = _polynomial(s * s, (4.0 / (2 * k + 1) for k in range(8)))
    return exponent.to(torch.float64).mul_(-2 * math.log(2)).sub_(series.mul_(s))


def _sine_cosine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine on [-pi/4, pi/4] by Taylor's series, to about 1e-14."""
    square = x * x
    sine = _polynomial(square, ((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7))).mul_(x)
    return sine, _polynomial(square, ((-1.0) ** k / math.factorial(2 * k) for k in range(8)))


def _polynomial(x: Tensor, coefficients: Iterable[float]) -> Tensor:
    """Horner's rule, one rounding an operation (a fused multiply-add would round differently)."""
    last, *rest = reversed(list(coefficients))
    value = x.mul(last)
    for coefficient in rest[:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(rest[-1])


def _launch_normal(*arguments: Any) -> Tensor:
    from ddpm_pipeline.kernels.philox import launch_normal

    return launch_normal(*arguments)


def _launch_one_block(*arguments: Any) -> Tensor:
    from ddpm_pipeline.kernels.philox import launch_one_block

    return launch_one_block(*arguments)


def _shape_of_normal(index: Tensor, *arguments: Any) -> Tensor:
    return index.new_empty((len(index), arguments[-1]), dtype=torch.float32)


def _shape_of_one_block(index: Tensor, *arguments: Any) -> Tensor:
    shape = (len(index), 4) if arguments[-1] == "words" else (len(index),)
    return index.new_empty(shape, dtype=torch.float32 if arguments[-1] == "uniform" else torch.int64)


_normal_operator = define_operator(
    "normal(Tensor index, Tensor? device_step, int key0, int key1, int step, int count) -> Tensor",
    reference=_normal,
    launch=_launch_normal,
    shapes=_shape_of_normal,
)
_one_block_operator = define_operator(
    "one_block(Tensor index, Tensor? device_step, int key0, int key1, int step, int high, str kind) -> Tensor",
    reference=_one_block,
    launch=_launch_one_block,
    shapes=_shape_of_one_block,
)
