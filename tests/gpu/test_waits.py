"""Training and sampling leave a real GPU work to do: the host waits for nothing within a step."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.devices import set_up_arithmetic
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.train.captured_gradients import WARM_STEPS, captured_gradients
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics
from tests.generate.tiny import writer_of
from tests.gpu.promises import sampling
from tests.train.tiny import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPU = torch.device("cuda")


@contextmanager
def _no_waits() -> Generator[None]:
    """Copies that wait, and numbers that the host reads, are errors."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", [{}, {"variance": "learned"}, {"weighting": "min-snr"}])
def test_no_training_step_waits(precision: str, objective: dict[str, str], replayed: bool) -> None:
    net = tiny("-", "-").net.model_dump() | {"out_channels": 2 if "variance" in objective else 1}
    config = tiny("-", "-", precision=precision, objective=objective, net=net)
    set_up_arithmetic(config.matmul, deterministic=True)
    state = initial_state(config, GPU)
    schedule = NoiseSchedule.from_config(config.schedule).to(GPU)
    captured = captured_gradients(config, state.net, GPU, world=1) if replayed else None
    trainer = Trainer(config, schedule, state.net, GPU, 1, captured=captured)
    steps = trainer.steps(state, _batches(config, 10), StepMetrics(schedule.T, GPU))
    for _ in range(WARM_STEPS + 2):
        next(steps)
    assert captured is None or captured.is_captured
    with _no_waits():
        assert [next(steps) for _ in range(4)] == [6, 7, 8, 9]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launching_a_batch_waits_for_nothing(dtype: str, tmp_path: Path) -> None:
    with sampling(tmp_path, "out", GPU) as config:
        engine = writer_of(config.model_copy(update={"dtype": dtype})).engine
        index = torch.arange(engine.micro_batch)
        for _ in range(2):
            engine.images(index)
        assert engine.is_captured
        with _no_waits():
            launched = engine.launch(index + 100)
        assert launched.wait().shape == (engine.micro_batch, 8, 8, 1)


def _batches(config: TrainConfig, count: int) -> Iterator[Batch]:
    size, net = config.global_batch, config.net
    for step in range(count):
        yield Batch(
            step,
            torch.arange(step * size, (step + 1) * size),
            torch.zeros(size, net.in_channels, net.image_size, net.image_size, dtype=torch.uint8),
            torch.zeros(size, dtype=torch.int64),
            wait_seconds=0.0,
        )
