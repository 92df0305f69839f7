"""Kernels on a real GPU beside their references on the CPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_pipeline.devices.triton_version import triton_version
from ddpm_pipeline.diffusion.noise import Stream, normal, randint, uniform, words32
from ddpm_pipeline.nets.dropout import DropoutKeys, keyed_dropout
from ddpm_pipeline.nets.group_norm import GroupNorm32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INDEX = torch.tensor([0, 1, 7, 2**31, 2**32 - 1, 2**32, 10**12, 2**62, 2**63 - 1])
STEPS = [0, 1, 16, 999, 2**31, 2**32 - 1]
S = Stream.TRAIN_NOISE


def test_triton_runs_here() -> None:
    assert triton_version() is not None


@pytest.mark.parametrize("step", STEPS)
def test_random_numbers_have_the_bits_of_the_cpu(step: int) -> None:
    rng = np.random.default_rng(step)
    draws: list[Callable[[int, Tensor, int | Tensor], Tensor]] = [
        *(lambda seed, i, k, shape=shape: normal(seed, S, i, shape, k) for shape in ((1,), (5,), (3, 5, 5))),
        lambda seed, i, k: normal(seed, S, i, (3, 64, 64), k),
        *(lambda seed, i, k, high=high: randint(seed, S, i, high, k) for high in (1, 1000, 2**31)),
        lambda seed, i, k: uniform(seed, S, i, k),
        lambda seed, i, k: words32(seed, S, i, k),
    ]
    for draw in draws:
        seed = int(rng.integers(0, 2**63))
        wanted = draw(seed, INDEX, step)
        assert torch.equal(draw(seed, INDEX.cuda(), step).cpu(), wanted)
        assert torch.equal(draw(seed, INDEX.cuda(), torch.tensor([step], device="cuda")).cpu(), wanted)


def test_a_captured_draw_reads_its_step_anew_at_every_replay() -> None:
    index, step = INDEX.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    normal(0, S, index, (3, 8, 8), step)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = normal(0, S, index, (3, 8, 8), step)
    for k in (3, 4):
        step.fill_(k)
        graph.replay()
        assert torch.equal(drawn.cpu(), normal(0, S, INDEX, (3, 8, 8), k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 128, 32, 32), (3, 3, 5, 5)])
def test_dropout_has_the_bits_of_the_cpu_forward_and_backward(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, grad = torch.randn(2, *shape).to(dtype)
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = keyed_dropout(leaf, 0.1, DropoutKeys(5, torch.arange(len(x), device=device)), layer=7)
        results.append([y.detach().cpu(), torch.autograd.grad(y, leaf, grad.to(device))[0].cpu()])
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("shape", [(2, 128, 4, 4), (2, 128, 32, 32), (1, 320, 17, 16), (1, 384, 128, 128)])
def test_group_norm_is_near_float64_and_the_same_in_every_run(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, silu: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator).to(dtype)
    norm = GroupNorm32(32, shape[1])
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    exact = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    wanted = F.group_norm(exact[0], 32, exact[1], exact[2], norm.eps)
    wanted = F.silu(wanted) if silu else wanted
    reference = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    norm.cuda()

    def run(batch: Tensor, of: Tensor) -> list[Tensor]:
        leaf = batch.cuda().to(memory_format=torch.channels_last).requires_grad_()
        y = norm(leaf, silu=silu)
        return [y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], of.cuda())]

    first, second = run(x, grad), run(x, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for mine, exactly in zip(first, reference, strict=True):
        error = float((mine.cpu().double() - exactly).abs().max() / exactly.abs().max())
        assert error < tolerance
    alone = run(x[:1], grad[:1])
    assert torch.equal(alone[0], first[0][:1])
    assert torch.equal(alone[1], first[1][:1])
