"""Statements about sampling on a simulated CUDA device; every function without an argument is one."""

import io
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.config.diffusion import SamplerConfig
from tests.cuda.observing import cuda_graph_warnings, on_host
from tests.cuda.simulated_device import counts, simulated_device
from tests.cuda.simulated_graph import recording

import torch  # isort: skip

from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.likelihood import bits_per_dim
from ddpm_pipeline.diffusion.sampler_protocol import SamplerStep
from ddpm_pipeline.diffusion.timesteps import make_grid
from ddpm_pipeline.generate.captured_sampling import CapturedSampling, can_capture
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.guards import GuardTripped
from ddpm_pipeline.generate.launched_images import LaunchedImages
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train.state import initial_state
from tests.effort import is_long
from tests.generate.tiny import plan_of, settings, tiny_card, tiny_model
from tests.train.tiny import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def samplers_plan_alike_with_a_schedule_on_the_device() -> None:
    with simulated_device():
        for spacing in ("trailing", "leading", "karras"):
            sampler = SamplerConfig(kind="dpm++2m", num_steps=7, spacing=spacing)
            counts.reset()
            here, there = (make_grid(NoiseSchedule.linear(50).to(device), sampler) for device in (CPU, GPU))
            assert here == there
            assert not counts.waits


def a_shard_is_sampled_with_one_wait_at_its_end_and_in_the_pixels_of_the_cpu() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        expected = _shard_of(_shard_writer(Path(folder), "cpu"))
        writer, launches = _shard_writer(Path(folder), "cuda"), list[dict[str, int]]()
        launch = writer.engine.launch

        def noted(index: torch.Tensor) -> LaunchedImages:
            launches.append(dict(counts.waits))
            return launch(index)

        writer.engine.launch = noted  # type: ignore[method-assign]
        counts.reset()
        found = _shard_of(writer)
        captured, end = counts.waits  # the second batch is captured, once in an engine's life
        assert "cuda_graph.py" in captured
        assert "launched_images.py" in end
        assert launches == [{}, {}, {captured: 1}], launches
        assert counts.waits.total() == 2, counts.waits
        assert counts.copies == {"H2D async": 6, "D2H async": 6}, counts.copies
    assert len(found) == 10
    # Not their bytes: each image names its generation, whose spec names the device.
    assert [_pixels(files["png"]) for files in found.values()] == [
        _pixels(files["png"]) for files in expected.values()
    ]


def a_sample_that_is_not_finite_is_named_as_on_the_cpu_and_leaves_nothing() -> None:
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        for device in ("cpu", "cuda"):
            writer = _shard_writer(Path(folder), device)
            writer.engine._net.register_forward_hook(_spoil_second_row)
            writer.engine.micro_batch = 2
            with pytest.raises(GuardTripped) as caught:
                _shard_of(writer)
            told.append(str(caught.value))
            assert list(writer.generation.store.list()) == []
    assert told == ["sample 1 holds NaN or infinity (1 of its batch do)"] * 2


def a_shard_starts_over_when_memory_runs_out_while_a_batch_is_on_its_way() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        writer = _shard_writer(Path(folder), "cuda")
        sizes: list[int] = []

        def crowded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sizes.append(len(inputs[0]))
            if len(sizes) >= 5 and len(inputs[0]) > 2:  # from the second batch on, first in its capture
                raise torch.OutOfMemoryError("CUDA out of memory")

        writer.engine._net.register_forward_pre_hook(crowded)
        seen: list[int] = []
        unit = next(iter(shards(writer.generation.spec)))
        record = writer.write(unit, on_images=seen.append).record
        assert record.times.micro_batch == 2
        assert seen == [4, 8, 10], seen
        assert sizes[:6] == [4] * 6
        assert set(sizes[6:]) == {2}


def batches_of_a_cuda_graph_have_the_bits_of_those_without() -> None:
    full, half = ("float32", 2.5), ("bfloat16", 1.0)
    cases = [("ancestral", *full), ("dpm++2m", *half)]
    if is_long():
        kinds = ("ancestral", "ddim", "dpm++2m", "heun")
        cases = [(kind, *numbers) for kind in kinds for numbers in (full, half)]
    batches = [torch.arange(first, first + count) for first, count in _BATCHES]
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        model = _model(folder)
        for kind, dtype, scale in cases:
            sampler = SamplerConfig(kind=kind, num_steps=3, guidance_scale=scale, eta=0.5 * (kind == "ddim"))
            captured, plain = (_engine(model, sampler=sampler, dtype=dtype) for _ in range(2))
            for batch in batches:
                expected = plain.images(batch, on_step=_ignore)
                assert np.array_equal(captured.images(batch), expected), (kind, dtype, scale, batch)
            assert (captured.is_captured, plain.is_captured) == (True, False)


def a_captured_batch_is_launched_by_a_handful_of_operations() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        engine = _engine(_model(folder), sampler=SamplerConfig(kind="ddim", num_steps=8))
        launches: list[int] = []
        for batch in torch.arange(12).split(4):
            counts.reset()
            engine.launch(batch)
            launches.append(counts.kernels.total())
        assert launches[0] > 800, launches
        assert max(launches[1:]) <= 12, launches  # the graph, its inputs, and the levels of its images
        assert counts.kernels["graph"] == 1
        assert not counts.waits
        assert counts.copies == {"H2D async": 2, "D2H async": 2}, counts.copies


def a_long_sampling_and_a_compiled_network_are_not_captured() -> None:
    for steps, compiled, expected in ((64, False, True), (65, False, False), (64, True, False)):
        sampler = SamplerConfig(kind="ancestral", num_steps=steps)
        assert can_capture(sampler, GPU, compiled) == expected
    assert not can_capture(SamplerConfig(kind="heun", num_steps=33), GPU, compiled=False)
    assert not can_capture(SamplerConfig(kind="ddim", num_steps=3), CPU, compiled=False)


def a_replay_reads_the_tensors_of_its_capture() -> None:
    """Else the comparisons above would show nothing."""
    with simulated_device(), torch.inference_mode():
        factor = torch.ones(4, dtype=torch.int64, device=GPU)
        captured = CapturedSampling(lambda index, labels: index * factor, GPU)
        index = torch.arange(4)
        for _ in range(2):
            assert torch.equal(on_host(captured(index, None)), index)
        factor = torch.full_like(factor, 2)
        assert torch.equal(on_host(captured(index + 1, None)), index + 1)


def a_thread_captures_only_after_a_batch_of_its_own() -> None:
    with simulated_device(), torch.inference_mode():
        captured = CapturedSampling(lambda index, labels: index + 1, GPU)
        captured(torch.arange(4), None)
        with ThreadPoolExecutor(1) as other, torch.inference_mode():
            other.submit(torch.inference_mode()(captured), torch.arange(4), None).result()
            assert not captured.is_captured
        captured(torch.arange(4), None)
        assert captured.is_captured


def what_cannot_be_captured_is_sampled_without_a_graph_and_says_why() -> None:
    def waiting(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        float(output.sum())

    def crowded(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if recording() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    for hook, reason in (
        (waiting, "RuntimeError: CUDA error: operation not permitted when stream is capturing: number read"),
        (crowded, "OutOfMemoryError: CUDA out of memory. Tried"),
    ):
        with tempfile.TemporaryDirectory() as folder, simulated_device(), cuda_graph_warnings() as told:
            model = _model(folder)
            hindered, plain = (_engine(model) for _ in range(2))
            hindered._net.register_forward_hook(hook)
            for batch in torch.arange(12).split(4):
                assert np.array_equal(hindered.images(batch), plain.images(batch, on_step=_ignore))
            assert not hindered.is_captured
            assert hindered.micro_batch == 4
        assert told == [f"images are sampled without a CUDA graph, which may take longer: {reason}"]


def a_graph_is_given_up_before_the_micro_batch_is_halved() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        model = _model(folder)
        crowded, plain = (_engine(model) for _ in range(2))

        def full(module: torch.nn.Module, inputs: object) -> None:
            if crowded.is_captured:
                raise torch.OutOfMemoryError("CUDA out of memory")

        crowded._net.register_forward_pre_hook(full)
        for first, count in _BATCHES:  # the partial one takes memory beside the graph's
            batch = torch.arange(first, first + count)
            assert np.array_equal(crowded.images(batch), plain.images(batch, on_step=_ignore))
        assert not crowded.is_captured
        assert crowded.micro_batch == 4


def a_micro_batch_halved_at_the_first_batch_is_captured_in_its_new_size() -> None:
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        model = _model(folder)
        crowded, plain = (_engine(model) for _ in range(2))

        def small(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        crowded._net.register_forward_pre_hook(small)
        plain.micro_batch = 2
        for batch in torch.arange(8).split(4):
            assert np.array_equal(crowded.images(batch), plain.images(batch, on_step=_ignore))
        assert crowded.micro_batch == 2
        assert crowded.is_captured


def the_bound_needs_no_wait_for_its_timesteps() -> None:
    with simulated_device():
        waits: list[int] = []
        for T in (3, 6):
            config = tiny("file:///absent", "file:///absent")
            net = initial_state(config, GPU).net.eval()
            x0, index = torch.zeros(2, 1, 8, 8, device=GPU), torch.arange(2, device=GPU)
            labels = torch.zeros(2, dtype=torch.int64, device=GPU)
            counts.reset()
            bits_per_dim(NoiseSchedule.linear(T), config.objective, net, x0, index, 0, labels)
            waits.append(counts.waits.total())
        assert waits[0] == waits[1], dict(counts.waits)


def _shard_writer(folder: Path, device: str) -> ShardWriter:
    """Of one shard of ten samples in batches of four, of three network calls each."""
    model = tiny_model(folder / "model")
    config = settings(model, (folder / device).as_uri(), count=10)
    spec, found = plan_of(config)
    spec = spec.model_copy(update={"device": device})
    net = build_model(found.card, found.weights, device, where="tiny")
    return ShardWriter(Engine(spec, net, found.card), open_store(config.output), config.guards)


_BATCHES = ((0, 4), (4, 4), (41, 4), (100, 3), (8, 4))
"""First index and number of samples; the second full micro-batch is captured, the last but one is partial."""


def _model(folder: str) -> Path:
    """A model with every kind of layer."""
    card = tiny_card(size=8)
    layers = {"multipliers": (1, 2), "attention_resolutions": (4,), "mid_attention": True}
    return tiny_model(
        Path(folder) / "model", card.model_copy(update={"net": card.net.model_copy(update=layers)})
    )


def _engine(model: Path, **changes: object) -> Engine:
    spec, found = plan_of(settings(model, "file:///absent", **changes))
    net = build_model(found.card, found.weights, "cuda", where="tiny")
    return Engine(spec.model_copy(update={"device": "cuda"}), net, found.card)


def _ignore(step: SamplerStep) -> None:
    """For samplings that are not captured, as they have a callback."""


def _shard_of(writer: ShardWriter) -> dict[str, dict[str, bytes]]:
    (unit,) = shards(writer.generation.spec)
    writer.write(unit)
    return dict(read_shard(writer.generation.store.read(unit.key)))


def _pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def _spoil_second_row(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    nan = torch.zeros_like(output)
    nan[1] = torch.nan
    return output + nan
