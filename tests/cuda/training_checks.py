"""Statements about training on a simulated CUDA device; every function without an argument is one."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.cuda.observing import cuda_graph_warnings, on_host
from tests.cuda.simulated_device import SimulatedTensor, counts, simulated_device

import torch  # isort: skip

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train.captured_gradients import CapturedGradients
from ddpm_pipeline.train.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint
from ddpm_pipeline.train.device_batches import device_batches
from ddpm_pipeline.train.loop import NonFiniteError, Trainer, find_gradients
from ddpm_pipeline.train.state import TrainState, initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics
from ddpm_pipeline.train.teacher import make_teacher
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.effort import is_long
from tests.train.tiny import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH = 4


def a_training_on_a_gpu_takes_the_steps_of_the_cpu_and_skips_the_same_one() -> None:
    expected, window = _trained(CPU, infinite_at=3)
    with simulated_device():
        state, on_gpu = _trained(GPU, infinite_at=3)
        assert (
            (state.skipped_steps, on_gpu.skipped_steps)
            == (1, 1)
            == (expected.skipped_steps, window.skipped_steps)
        )
        found = {name: on_host(tensor) for name, tensor in state.tensors().items()}
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert float(found["optimizer/stem.weight/step"]) == 5


def a_training_by_a_cuda_graph_has_the_bits_of_one_without() -> None:
    cases: list[dict[str, object]] = [{"precision": "bfloat16", "workers": _IN_PARTS}, _STUDENT]
    whole: list[dict[str, object]] = [{}, {"precision": "bfloat16"}]  # of one micro-batch: half the launches
    if is_long():
        cases += [*whole, {"workers": _IN_PARTS}]
    for changes in cases:
        with simulated_device():
            expected = _end_of(_begun(GPU, **changes), steps=6)
            counts.reset()
            totals: list[int] = []
            captured, found = _captured_training(6, partial(_add_launches, totals), changes)
            assert captured.is_captured
            eager, replayed = totals[2] - totals[1], totals[5] - totals[4]
            assert replayed < 40 < eager / (5 if changes in whole else 10), (eager, replayed)
            _require_equal(expected, found)


def passes_of_batches_on_the_host_are_captured_too() -> None:
    """A dry run's are."""
    with simulated_device():
        trainer, state, _ = _begun(GPU)
        captured = CapturedGradients(state.net, GPU)
        trainer = replace(trainer, captured=captured)
        for batch in _batches(5):
            losses = find_gradients(trainer, batch)
            state.optimizer.zero_grad()
        assert captured.is_captured
        expected = find_gradients(replace(trainer, captured=None), batch)
        assert torch.equal(on_host(losses[0][0]), on_host(expected[0][0]))


def a_training_gives_up_its_graph_where_memory_is_short_and_captures_another() -> None:
    seen: list[bool] = []

    def draw_grid(captured: CapturedGradients) -> None:
        seen.append(captured.is_captured)
        captured.make_room(usable_bytes=10)

    # Before and after the fourth step's capture, which takes 4; then what other work takes beside the graph: 7 are too
    # much for a grid that may need 4. The sixth step captures again.
    reserved = mock.Mock(side_effect=[0, 4, 6, 7, 3, 7, 6, 6])
    with simulated_device(), mock.patch("torch.cuda.memory_reserved", reserved):
        expected = _end_of(_begun(GPU), steps=7)
        _, found = _captured_training(7, draw_grid)
        _require_equal(expected, found)
    assert seen == [False, False, False, True, True, True, True]
    assert reserved.call_count == 8


def what_cannot_be_captured_is_trained_without_a_graph_and_says_why() -> None:
    def waiting(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        float(output.sum())

    with simulated_device(), cuda_graph_warnings() as told:
        expected = _end_of(_begun(GPU), steps=6)
        begun = _begun(GPU)
        begun[1].net.register_forward_hook(waiting)
        captured, found = _captured_training(6, begun=begun)
        assert not captured.is_captured
        _require_equal(expected, found)
    assert told == [
        "steps are launched kernel by kernel, not as a CUDA graph, which may take longer: RuntimeError: "
        "CUDA error: operation not permitted when stream is capturing: number read"
    ]


def too_many_skipped_steps_are_named_as_on_the_cpu() -> None:
    told: list[str] = []
    for device in (CPU, GPU):
        with simulated_device():
            with pytest.raises(NonFiniteError) as caught:
                _trained(device, infinite_at=3, max_skipped_steps=0)
            told.append(str(caught.value))
    assert told[0] == told[1]
    assert told[0].startswith("step 3: ")


def a_training_waits_at_points_only_and_goes_on_in_the_same_bits_after_a_stop() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        data = (Path(folder) / "data").as_uri()
        pack(PackConfig(source="digits", dest=data, channels=1, shard_size=300, held_out=0.7), None)
        counts.reset()
        whole = _run_alone(data, Path(folder) / "a")
        in_steps = [site for site in counts.waits if "loop.py" in site and "session.py" not in site]
        assert in_steps == []
        _run_alone(data, Path(folder) / "b", stop_at=2)
        resumed = _run_alone(data, Path(folder) / "b")
    assert whole.keys() == resumed.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])] == []


def averages_without_the_newest_step_are_not_used() -> None:
    with simulated_device():
        trainer, state, window = _begun(GPU)
        for _ in trainer.steps(state, _batches(1), window):
            for use in (state.tensors, state.averaged):
                with pytest.raises(RuntimeError, match="finish_step"):
                    use()
            trainer.finish_step(state, window)
            state.tensors()


def batches_come_to_the_device_in_order_and_without_waits() -> None:
    with simulated_device():
        counts.reset()
        arrived = list(device_batches(_batches(5), GPU))
        for batch, sent in zip(arrived, _batches(5), strict=True):
            assert all(
                isinstance(tensor, SimulatedTensor)
                for tensor in (batch.positions, batch.images, batch.labels)
            )
            assert torch.equal(on_host(batch.images), sent.images)
            assert torch.equal(on_host(batch.positions), sent.positions)
        assert not counts.background_waits
        assert counts.copies["H2D async"] == 15


def a_failure_to_read_reaches_the_training_after_the_batches_before_it() -> None:
    def failing() -> Iterator[Batch]:
        yield from _batches(3)
        raise OSError("torn")

    seen: list[Batch] = []
    with simulated_device(), pytest.raises(OSError, match="torn"):
        seen.extend(device_batches(failing(), GPU))
    assert len(seen) == 3


def a_training_that_stops_leaves_no_thread() -> None:
    before = threading.active_count()
    with simulated_device():
        arriving = device_batches(_batches(100), GPU)
        next(arriving)
        assert threading.active_count() == before + 1
        arriving.close()
    assert threading.active_count() == before


def a_checkpoint_has_the_bytes_of_the_cpu_and_the_training_does_not_wait_for_it() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        files: list[bytes] = []
        for device in (CPU, GPU):
            state = _state_of(device)
            store = open_store((Path(folder) / device.type).as_uri())
            writer = CheckpointWriter(store, "id", keep_last=2)
            for step in (1, 2):  # the second goes through the buffer of the first
                counts.reset()
                copied = writer.submit(step, state.tensors())
                waits, copies = dict(counts.waits), dict(counts.copies)
                writer.wait()
            assert (copied is None) == (device == CPU)
            if device == GPU:
                assert waits == {}, waits
                assert copies == {"D2H async": len(state.tensors())}, copies
            files.append(
                (Path(folder) / device.type / "checkpoints/000000000002/state.safetensors").read_bytes()
            )
            assert load_checkpoint(store, 2).record.step == 2
    assert files[0] == files[1]


def _run_alone(data: str, runs: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train on the device, six steps or until one after `stop_at`; the tensors of the last checkpoint."""
    runs.mkdir(exist_ok=True)
    config = tiny(
        data,
        runs.as_uri(),
        steps=6,
        log_every_steps=2,
        global_batch=BATCH,
        checkpoint={"every_steps": 2, "eval_samples": 0},
        grid={"every_steps": 100, "count": 2, "sampler": {"kind": "ddim", "num_steps": 2}},
        workers={"gpus_per_worker": 1, "micro_batch": BATCH},
    )
    plan, stop = plan_training(config), threading.Event()

    def on_progress(step: int, total: int, note: str) -> None:
        if stop_at is not None and step >= stop_at:
            stop.set()

    train_local(TrainTask(config, plan.identity, plan.store.uri, plan.index.digest), on_progress, stop)
    found = latest_checkpoint(plan.store)
    assert found is not None
    assert (found.record.step == 6) == (stop_at is None)
    return found.tensors


def _config(**changes: object) -> TrainConfig:
    return tiny("file:///absent", "file:///absent", **({"global_batch": BATCH} | changes))


def _begun(device: torch.device, **changes: object) -> tuple[Trainer, TrainState, StepMetrics]:
    config = _config(**changes)
    state = initial_state(config, device)
    schedule = NoiseSchedule.from_config(config.schedule).to(device)
    teacher = make_teacher(config, config.objective, seeded_init(config.net, 1), device, world=1)
    trainer = Trainer(config, schedule, state.net, device, 1, teacher=teacher)
    return trainer, state, StepMetrics(schedule.T, device)


_IN_PARTS: dict[str, object] = {"gpus_per_worker": 1, "micro_batch": 3}
"""Uneven micro-batches."""


_STUDENT: dict[str, object] = {
    "init_from": "absent",
    "objective": {"target": "v"},
    "steps": 6,
    "distillation": {
        "sampler": {"kind": "ddim", "num_steps": 5, "guidance_scale": 1.5},
        "loss": {"divisors": [2, 4, 8]},
    },
}
"""Learns from closer levels after each second step."""


_Begun = tuple[Trainer, TrainState, StepMetrics]


def _captured_training(
    steps: int,
    on_step: Callable[[CapturedGradients], object] = lambda captured: None,
    changes: Mapping[str, object] | None = None,
    begun: _Begun | None = None,
) -> tuple[CapturedGradients, dict[str, torch.Tensor]]:
    """Train with a CUDA graph; the tensors at the end, on the host."""
    trainer, state, window = begun or _begun(GPU, **(changes or {}))
    captured = CapturedGradients(state.net, GPU)
    begun = replace(trainer, captured=captured), state, window
    return captured, _end_of(begun, steps, lambda: on_step(captured))


def _add_launches(totals: list[int], captured: CapturedGradients) -> None:
    totals.append(counts.kernels.total())


def _end_of(
    begun: _Begun, steps: int, on_step: Callable[[], object] = lambda: None
) -> dict[str, torch.Tensor]:
    trainer, state, window = begun
    for _ in trainer.steps(state, _batches(steps), window):
        on_step()
    return {name: on_host(tensor) for name, tensor in state.tensors().items()}


def _require_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, two[name])] == []


def _trained(device: torch.device, infinite_at: int, **changes: object) -> tuple[TrainState, StepMetrics]:
    """Six steps, one of them with an infinite gradient."""
    trainer, state, window = _begun(device, **changes)

    def spoilt(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if state.step == infinite_at else 1.0)

    state.net.head.bias.register_hook(spoilt)
    list(trainer.steps(state, _batches(6), window))
    return state, window


def _state_of(device: torch.device) -> TrainState:
    """A state with moments, whose numbers do not depend on the device."""
    state = initial_state(_config(), device)
    for i, parameter in enumerate(state.net.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * i)
    state.optimizer.step()
    state.ema.update(state.net, 1)
    return state


def _batches(number: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for step in range(number):
        images = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=generator).to(torch.uint8)
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        yield Batch(step, positions, images, torch.arange(BATCH), wait_seconds=0.0)
