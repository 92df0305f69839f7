"""Triton's kernels, run by its interpreter on the CPU, beside what defines them: `python -m tests.kernels.interpreted`

Each function is a check; it fails by an AssertionError. Import before Triton.
"""

import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ddpm_pipeline.diffusion import noise
from ddpm_pipeline.diffusion.noise import Stream
from ddpm_pipeline.kernels.dropout_kernel import launch_keyed_dropout
from ddpm_pipeline.kernels.group_norm_kernels import launch_group_norm, launch_group_norm_backward
from ddpm_pipeline.kernels.philox import launch_normal, launch_one_block
from ddpm_pipeline.kernels.tiling import Tiling
from ddpm_pipeline.nets import dropout
from tests.effort import is_long

EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**62, 2**63 - 1]
STEPS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
CAST = interpreter.InterpreterBuilder.cast_impl


def _cast(builder: interpreter.InterpreterBuilder, source: interpreter.TensorHandle, to: tl.dtype):
    """As a GPU rounds float32 to bfloat16 (cvt.rn.bf16.f32); Triton's interpreter cuts the bits off."""
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)
    return CAST(builder, source, to)


interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.create_fp_trunc = _cast


def names() -> Iterator[tuple[Tensor, int, int, int]]:
    """Indexes, two key words and a step, drawn at random and at the edges."""
    rng = np.random.default_rng(0)
    for step in (*STEPS, *rng.integers(0, 2**32, 5).tolist()):
        index = torch.tensor([*rng.choice(EDGES, 2).tolist(), *rng.integers(0, 2**63, 2).tolist()])
        yield index, *noise._key(int(rng.integers(0, 2**63)), Stream(int(rng.integers(1, 13)))), step


def check_normals() -> None:
    counts = (1, 2, 3, 4, 5, 75, 192, 1024, 1025, 3072 if is_long() else 512)
    cases = list(zip(names(), counts, strict=True))
    for (index, key0, key1, step), count in cases if is_long() else cases[1::2]:
        wanted = noise._normal(index, None, key0, key1, step, count)
        mine = launch_normal(index, None, key0, key1, step, count)
        assert torch.equal(mine.view(torch.int32), wanted.view(torch.int32)), (index, step, count)
        from_memory = launch_normal(index, torch.tensor([step]), key0, key1, 0, count)
        assert torch.equal(from_memory, mine), (index, step, count)


def check_words_integers_and_uniforms() -> None:
    rng = np.random.default_rng(1)
    for index, key0, key1, step in names():
        for kind, high in (("words", 1), ("uniform", 1), ("integer", int(rng.choice([1, 2, 1000, 2**31])))):
            many = torch.cat([index, torch.arange(300)])  # more than a program
            wanted = noise._one_block(many, None, key0, key1, step, high, kind)
            for device_step, number in ((None, step), (torch.tensor([step]), 0)):
                mine = launch_one_block(many, device_step, key0, key1, number, high, kind)
                assert mine.dtype == wanted.dtype, kind
                assert torch.equal(mine, wanted), (kind, index, step, high)


def check_dropout() -> None:
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((2, 8, 4, 4), (3, 3, 5, 5), (1, 17, 13, 11)):
            x = torch.randn(shape, generator=generator).mul(30).to(dtype)
            x.view(-1)[:2] = torch.tensor([-0.0, 65504.0])
            x = x.to(memory_format=torch.channels_last)
            probability, layer = float(rng.uniform(0.01, 0.99)), int(rng.integers(0, 60))
            keys = dropout.DropoutKeys(
                int(rng.integers(0, 2**63)), torch.from_numpy(rng.integers(0, 2**63, len(x)))
            )
            threshold, word = round(probability * 65536), dropout._signed(0x9E3779B9 * (layer + 1))
            x.requires_grad_()
            wanted = dropout.keyed_dropout(x, probability, keys, layer)
            mine = launch_keyed_dropout(x.detach(), keys.words, threshold, word)
            assert same_bits(mine, wanted), (dtype, shape, probability)
            (wanted_gradient,) = torch.autograd.grad(wanted, x, x.detach())
            assert same_bits(mine, wanted_gradient), "the backward pass is the same product"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one dtype are equal, signs of zeros too."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integer), b.detach().contiguous().view(integer)
    )


MAPS = [
    (2, 32, 8, 8, 8),
    (1, 12, 5, 5, 4),  # groups of three channels
    (3, 96, 2, 3, 32),
    (2, 8, 20, 16, 2),  # two parts of rows
    (1, 80, 17, 16, 8),  # the last part almost empty, groups of ten
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check_group_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (batch, channels, height, width, groups) in enumerate(MAPS):
        for dtype, silu in ((torch.float32, number % 2 == 0), (list(TOLERANCE)[number % 3], number % 2 == 1)):
            # A mean far from zero: sums of squares would cancel.
            x, grad = (torch.randn(batch, channels, height, width, generator=generator) + m for m in (20, 0))
            weight, bias = torch.randn(2, channels, generator=generator)
            x, grad = (t.to(dtype).to(memory_format=torch.channels_last) for t in (x, grad))
            exact = [t.double().requires_grad_() for t in (x, weight, bias)]
            wanted = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-5)
            wanted = F.silu(wanted) if silu else wanted
            of_x, of_weight, of_bias = torch.autograd.grad(wanted, exact, grad.double())
            mine, statistics = launch_group_norm(x, weight, bias, groups, 1e-5, silu)
            my_x, (my_weight, my_bias) = launch_group_norm_backward(grad, x, weight, bias, statistics, silu)
            assert mine.dtype == my_x.dtype == dtype
            assert mine.is_contiguous(memory_format=torch.channels_last)
            pairs = ((mine, wanted), (my_x, of_x), (my_weight, of_weight), (my_bias, of_bias))
            for name, (a, b) in zip(("result", "x", "weight", "bias"), pairs, strict=True):
                error = float((a.double() - b).detach().abs().max() / b.detach().abs().max())
                assert error < TOLERANCE[dtype], (
                    name,
                    dtype,
                    (batch, channels, height, width, groups),
                    error,
                )


def check_that_group_norm_of_a_sample_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 8, 20, 16, generator=generator)
    weight, bias = torch.randn(2, 8, generator=generator)
    assert Tiling.of(x, 2).parts == 2
    whole, statistics = launch_group_norm(x, weight, bias, 2, 1e-5, True)
    gradient, _ = launch_group_norm_backward(grad, x, weight, bias, statistics, True)
    for i in range(3):
        alone, own = launch_group_norm(x[i : i + 1], weight, bias, 2, 1e-5, True)
        assert same_bits(alone[0], whole[i])
        of_alone, _ = launch_group_norm_backward(grad[i : i + 1], x[i : i + 1], weight, bias, own, True)
        assert same_bits(of_alone[0], gradient[i])


def check_empty_batches() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert launch_normal(empty, None, 1, 2, 0, 12).shape == (0, 12)
    assert launch_one_block(empty, None, 1, 2, 0, 1, "words").shape == (0, 4)
    x, weight = torch.empty(0, 8, 4, 4), torch.ones(8)
    assert launch_keyed_dropout(x, torch.empty(0, 1, 2, dtype=torch.int32), 10, 1).shape == x.shape
    result, statistics = launch_group_norm(x, weight, weight, 2, 1e-5, True)
    of_x, parameters = launch_group_norm_backward(x, x, weight, weight, statistics, True)
    assert result.shape == of_x.shape == x.shape
    assert not parameters.any()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [name for name in list(globals()) if name.startswith("check_")]:
        globals()[name]()
        print(name)
