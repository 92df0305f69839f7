"""Kernels as operators of torch: what tracing may assume of them, and what happens without Triton."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_pipeline.devices.triton_version import triton_version
from ddpm_pipeline.diffusion import noise
from ddpm_pipeline.nets import UNetConfig, dropout, group_norm, seeded_init
from ddpm_pipeline.nets.low_precision import cast_products

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
WEIGHT, BIAS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
INDEX = torch.arange(3)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (noise._normal_operator, (INDEX, None, 1, 2, 0, 30)),
        (noise._normal_operator, (INDEX, torch.tensor([7]), 1, 2, 0, 30)),
        (noise._one_block_operator, (INDEX, None, 1, 2, 0, 1, "words")),
        (noise._one_block_operator, (INDEX, None, 1, 2, 0, 9, "integer")),
        (noise._one_block_operator, (INDEX, None, 1, 2, 0, 1, "uniform")),
        (dropout._operator, (X, dropout.DropoutKeys(0, INDEX[:2]).words, 655, 3)),
        (group_norm._operator, (X, WEIGHT, BIAS, 4, 1e-5, True)),
        (group_norm._operator_backward, (X, X, WEIGHT, BIAS, torch.ones(2, 4, 2), True)),
    ],
)
def test_operators_keep_what_their_schemas_and_shapes_say(
    operator: object, arguments: tuple[object, ...]
) -> None:
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_a_gpu_without_triton_is_differentiated_as_torch_does(silu: bool) -> None:
    leaves = [t.clone().requires_grad_() for t in (X * 3 + 5, WEIGHT, BIAS)]
    mine = group_norm._GroupNorm.apply(*leaves, 4, 1e-5, silu)
    wanted = F.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    assert torch.allclose(mine, wanted, atol=1e-6)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    gradients = (torch.autograd.grad(y, leaves, X) for y in (mine, wanted))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_dropout_as_an_operator_is_that_of_the_cpu_forward_and_backward() -> None:
    keys, x = dropout.DropoutKeys(3, INDEX[:2]), X.clone().requires_grad_()
    wanted = dropout.keyed_dropout(x, 0.3, keys, layer=2)
    word = dropout._signed(0x9E3779B9 * 3)
    mine = dropout._KeyedDropout.apply(x, keys.words, round(0.3 * 65536), word)
    assert torch.equal(mine, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, X)[0] for y in (mine, wanted)))


def test_a_step_in_memory_draws_the_numbers_of_that_step() -> None:
    for step in (0, 5, 2**32 - 1):
        held = torch.tensor([step])
        mine, wanted = (noise.normal(1, noise.Stream.GRID, INDEX, (3, 2), s) for s in (held, step))
        assert torch.equal(mine, wanted)
    with pytest.raises(ValueError, match="step must be int64 of one element on cpu, not torch"):
        noise.uniform(1, noise.Stream.GRID, INDEX, torch.tensor([1], dtype=torch.int32))


def test_without_a_gpu_triton_is_said_not_to_run(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, on which Triton runs")
    triton_version.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert triton_version() is None
        assert triton_version() is None
    assert len(caplog.records) == 1, "said once a process"
    assert "It needs a C compiler" in caplog.text


def test_no_module_imports_triton_before_the_first_launch() -> None:
    """A CPU build of torch comes without Triton; a None in sys.modules makes its import fail."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ddpm_pipeline.nets import DropoutKeys, UNetConfig, seeded_init\n"
        "from ddpm_pipeline.diffusion.noise import Stream, normal\n"
        "config = UNetConfig(image_size=8, base_channels=8, multipliers=(1,), dropout=0.1, norm_groups=4, "
        "attention_resolutions=(8,))\n"
        "index = torch.arange(2)\n"
        "x = normal(0, Stream.GRID, index, (3, 8, 8))\n"
        "seeded_init(config, 0).train()(x, 3, dropout=DropoutKeys(0, index)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_cast_once_give_the_bits_of_weights_cast_in_every_call(dtype: torch.dtype) -> None:
    config = UNetConfig(
        image_size=8,
        base_channels=8,
        multipliers=(1, 2),
        attention_resolutions=(4,),
        num_classes=3,
        null_class=True,
        norm_groups=4,
    )
    net = seeded_init(config, 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def output() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            return net(torch.ones(2, 3, 8, 8), torch.tensor([3.5, 7]), torch.tensor([0, 1]))

    before = output()
    cast_products(net, dtype)
    assert net.stem.weight.dtype == dtype
    assert net.norm.weight.dtype == torch.float32
    assert float(before.abs().max()) > 0.1
    assert torch.equal(output(), before)
