"""The switches that decide how a GPU computes, and that none of them raises for what our networks do."""

import os
import re
from collections.abc import Generator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipeline.config.device_kind import Matmul
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.devices import set_up_arithmetic
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from ddpm_pipeline.train.checkpoint_eval import draw_grid
from ddpm_pipeline.train.loop import Trainer, train_step
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Switches and environment as before, whatever a test sets."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    filled, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
    )
    yield
    set_up_arithmetic("ieee", deterministic=False)
    torch.backends.cudnn.deterministic = deterministic
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def test_by_default_products_are_full_float32_and_algorithms_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    set_up_arithmetic("ieee", deterministic=True)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert {name: os.environ.get(name) for name in VARIABLES} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }


def test_both_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_up_arithmetic("tf32", deterministic=False)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, False)
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
def test_torchs_older_interface_can_still_be_read(matmul: Matmul) -> None:
    """Inductor and cudnn.flags() read it; it raises an error where it disagrees with the newer one."""
    set_up_arithmetic(matmul, deterministic=True)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (matmul == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if matmul == "tf32" else "highest")
    with torch.backends.cudnn.flags(enabled=True):
        pass


def test_a_cpu_keeps_its_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_up_arithmetic("ieee", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


class _Operations(TorchDispatchMode):
    """Collects the names of all operations, with those of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def _raising_in_deterministic_mode() -> set[str]:
    """From torch's own list: the plain names of what raises an error."""
    text = re.search(
        r"operations will throw a(.*?)In addition",
        torch.use_deterministic_algorithms.__doc__ or "",
        re.DOTALL,
    )
    assert text is not None
    return {_plain(name) for name in re.findall(r":(?:class|func):`torch\.(?:[\w.]+\.)?(\w+)`", text[1])}


def _plain(name: str) -> str:
    """NLLLoss and nll_loss_backward are one operation, as are AvgPool3d and avg_pool3d."""
    return re.sub(r"_(forward|backward)|_|\dd", "", name).lower()


@pytest.mark.parametrize("preset", ["digits", "ddpm-cifar10", "improved-64-cond"])
def test_no_operation_of_a_training_is_one_that_raises_in_deterministic_mode(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the list is read instead of run into; `make gpu-test` runs into it."""
    monkeypatch.setenv("DDPM_ROOT", "file:///root")
    config = _small(preset)
    state = initial_state(config, CPU)
    trainer = Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, CPU, 1)
    size = config.net.image_size
    batch = Batch(
        step=0,
        positions=torch.arange(2),
        images=torch.zeros(2, config.net.in_channels, size, size, dtype=torch.uint8),
        labels=torch.zeros(2, dtype=torch.int64),
        wait_seconds=0.0,
    )
    with _Operations() as seen:
        train_step(trainer, state, batch, StepMetrics(trainer.schedule.T, CPU))
        draw_grid(trainer, state)
    assert {"convolution", "convolution_backward"} <= seen.names
    raising = _raising_in_deterministic_mode()
    assert {"cumsum", "put", "interpolate", "nllloss", "histc", "bincount", "avgpool"} <= raising
    assert {name for name in seen.names if _plain(name) in raising} == set()
    # interpolation raises in all modes but "nearest", whose backward pass gathers
    upsampling = {name for name in seen.names if name.startswith("upsample")}
    assert upsampling <= {"upsample_nearest2d", "upsample_nearest2d_backward"}


def _small(preset: str) -> TrainConfig:
    """The preset with few channels and smaller images, and every kind of layer that it has."""
    words = [preset, "grid.count=1", "grid.sampler.num_steps=2", "precision=float32"]
    config = settings_of(TrainConfig, "train", JobArguments.of(words))
    shrink = max(1, config.net.image_size // 16)
    small = config.net.model_dump() | {
        "image_size": config.net.image_size // shrink,
        "base_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [max(1, r // shrink) for r in config.net.attention_resolutions],
    }
    return config.model_copy(update={"net": UNetConfig.model_validate(small)})
