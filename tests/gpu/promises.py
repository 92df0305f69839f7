"""What this program promises of a device, as functions that fail where it does not hold.

Each takes the device and an empty folder, and works on a CPU as well: the normal tests run them there, so that
`make gpu-test` does not meet untried code on a GPU.
"""

import contextlib
import json
import multiprocessing
import random
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.devices import is_out_of_memory, set_up_arithmetic
from ddpm_pipeline.diffusion.noise import Stream, normal, randint, uniform
from ddpm_pipeline.distill.plan_distillation import plan_distillation
from ddpm_pipeline.generate.engine import set_up_torch
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.regenerate import regenerate
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets import DropoutKeys, UNet
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.nets.dropout import keyed_dropout
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train import worker
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.finetune import stage_initial
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, WorkerContext, train_worker
from tests.generate.tiny import fill, settings, tiny_card, tiny_model, writer_of
from tests.train.group import run_group
from tests.train.tiny import tiny

Promise = Callable[[torch.device, Path], None]
STEPS = 12


def training_twice_ends_in_the_same_bits(device: torch.device, folder: Path) -> None:
    """Every kind of layer, forward and backward, with deterministic algorithms."""
    data = _packed(folder)
    one, two = (trained(_config(data, folder / name, device), device) for name in ("one", "two"))
    require_equal_tensors(one, two)


def training_by_a_cuda_graph_has_the_bits_of_one_without(device: torch.device, folder: Path) -> None:
    """A GPU launches the first steps kernel by kernel, and replays the others."""
    data = _packed(folder)
    for number, changes in enumerate(({}, {"precision": "bfloat16"}, {"workers": {"micro_batch": 5}})):
        workers = _workers(device) | changes.get("workers", {})
        runs = (
            _config(data, folder / f"{number}-{name}", device, **(changes | {"workers": workers}))
            for name in ("captured", "launched")
        )
        captured = trained(next(runs), device)
        with mock.patch.object(worker, "captured_gradients", return_value=None):
            launched = trained(next(runs), device)
        require_equal_tensors(captured, launched)


def distillation_by_a_cuda_graph_has_the_bits_of_one_without(device: torch.device, folder: Path) -> None:
    """The teacher's step and the student's image at the earlier level are replayed too."""
    data, card = _packed(folder), tiny_card(size=8)
    net = card.net.model_copy(update={"num_classes": 10})
    teacher = tiny_model(folder / "model", card.model_copy(update={"net": net, "class_names": None}))
    like = _config(data, folder / "like", device)

    def student(name: str) -> TrainConfig:
        (folder / name).mkdir()
        config = DistillConfig.model_validate(
            {
                "name": name,
                "runs": f"file://{folder}/{name}",
                "teacher": str(teacher),
                "data": {"uri": data},
                "sampler": {"kind": "ddim", "num_steps": 5, "guidance_scale": 1.5},
                "loss": {"divisors": [2, 4, 8]},
                "steps": STEPS,
                "grid": {"every_steps": 100, "count": 10, "sampler": {"kind": "consistency", "num_steps": 2}},
            }
            | {field: getattr(like, field) for field in ("optimizer", "ema", "global_batch", "workers")}
        )
        return plan_distillation(config, no_progress)

    captured = trained(student("captured"), device)
    with mock.patch.object(worker, "captured_gradients", return_value=None):
        require_equal_tensors(captured, trained(student("launched"), device))


def training_in_bfloat16_twice_ends_in_the_same_bits(device: torch.device, folder: Path) -> None:
    """The same with the kernels of the other precision."""
    data = _packed(folder)
    one, two = (
        trained(_config(data, folder / name, device, precision="bfloat16", steps=6), device)
        for name in ("one", "two")
    )
    require_equal_tensors(one, two)


def a_training_killed_at_a_random_step_ends_in_the_same_bits(device: torch.device, folder: Path) -> None:
    """SIGKILL, then another process from the last checkpoint; its micro-batches are uneven."""
    data, step = _packed(folder), random.randrange(1, STEPS)
    print(f"killed in step {step} of {STEPS}")
    workers = _workers(device) | {"micro_batch": 5}
    undisturbed = trained(_config(data, folder / "a", device, workers=workers), device)
    config = _config(data, folder / "b", device, workers=workers)
    _train_until_killed(config, device, step)
    require_equal_tensors(undisturbed, trained(config, device))


def shards_made_twice_are_the_same_bytes(device: torch.device, folder: Path) -> None:
    """Objects of two generations with one spec."""
    made: list[dict[str, bytes]] = []
    for name in ("one", "two"):
        with sampling(folder, name, device) as config:
            writer = writer_of(config)
            for unit in shards(writer.generation.spec):
                writer.write(unit)
        store = open_store(config.output)
        made.append({info.key: store.read(info.key) for info in store.list("shards/")})
    assert made[0]
    assert made[0] == made[1]


def stored_samples_can_be_sampled_again(device: torch.device, folder: Path) -> None:
    """`ddpm verify --regenerate` finds no difference."""
    with sampling(folder, "out", device) as config:
        fill(config)
        report = verify(config.output)
        regenerate(report, 7, model=config.model)
    assert report.regenerated == 7
    assert report.ok, report.problems


def images_are_the_same_in_the_micro_batch_of_their_record(device: torch.device, folder: Path) -> None:
    """What a worker made after it had halved its micro-batch, another makes that begins with the half."""
    index = torch.arange(4)
    with sampling(folder, "out", device) as config:
        engines = [writer_of(config).engine for _ in range(2)]
        whole = engines[0].images(index)
        for engine in engines:
            engine.micro_batch = 2
        halved = [engine.images(index) for engine in engines]
    assert np.array_equal(*halved)
    assert np.abs(whole.astype(int) - halved[0]).max() <= 1


def captured_sampling_gives_the_same_bits_as_eager(device: torch.device, folder: Path) -> None:
    """A GPU launches the first batch kernel by kernel, captures the second as a CUDA graph, and replays the others."""
    with sampling(folder, "out", device) as config:
        for sampler in ({"kind": "dpm++2m", "num_steps": 5}, {"kind": "ancestral", "num_steps": 20}):
            for dtype in ("float32", "bfloat16"):
                chosen = GenerateConfig.model_validate(
                    config.model_dump() | {"sampler": sampler, "dtype": dtype}
                )
                captured, eager = (writer_of(chosen).engine for _ in range(2))
                for index in (
                    *torch.arange(16).split(4),
                    torch.arange(40, 43),
                    torch.arange(2**40, 2**40 + 4),
                ):
                    expected = eager.images(index, on_step=lambda step: None)
                    assert np.array_equal(captured.images(index), expected)
                assert (captured.is_captured, eager.is_captured) == (device.type == "cuda", False)


def named_random_numbers_have_the_bits_of_the_cpu(device: torch.device, folder: Path) -> None:
    """Whichever implementation the device uses, kernels or torch's operations."""
    index = torch.tensor([0, 1, 77, 2**40 + 3, 2**62])
    for seed in (0, 2**63 - 1):
        drawn = [
            [
                normal(seed, Stream.TRAIN_NOISE, where, (3, 7, 5), step=2**32 - 1),
                uniform(seed, Stream.TRAIN_LABEL_DROP, where),
                randint(seed, Stream.TRAIN_TIMESTEP, where, 1000),
                keyed_dropout(torch.ones(5, 6, 7, 5, device=where.device), 0.1, DropoutKeys(seed, where), 3),
            ]
            for where in (index, index.to(device))
        ]
        for expected, found in zip(*drawn, strict=True):
            assert torch.equal(expected, found.cpu())


def convolutions_and_products_are_full_float32(device: torch.device, folder: Path) -> None:
    """Nearer to float64 than a hundred-thousandth, forward and backward; TF32 is not, by twenty times."""
    set_up_arithmetic("ieee", deterministic=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 16, 16, generator=generator, dtype=torch.float64)
    kernel = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64)
    product = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    results = [
        _convolved(*(value.to(device, dtype) for value in (x, kernel, product)))
        for dtype in (torch.float64, torch.float32)
    ]
    for exact, found in zip(*results, strict=True):
        difference = (found.double() - exact).norm() / exact.norm()
        assert float(difference) < 1e-5


def a_network_computes_what_it_computes_in_float64(device: torch.device, folder: Path) -> None:
    """Every layer's kernel, those of our own included, against torch's operations in float64 on a CPU."""
    set_up_arithmetic("ieee", deterministic=True)
    config = _config("file:///unused", folder, device).net
    net = seeded_init(config, 0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 10, 49]), torch.tensor([0, 5, 9])
    exact = _twin(net).double()(x.double(), t, class_labels=labels)
    on_device = _twin(net).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = on_device(x.to(device), t.to(device), class_labels=labels.to(device))
    assert float(((found.double().cpu() - exact).norm() / exact.norm()).detach()) < 1e-5


def a_lack_of_memory_is_recognized(device: torch.device, folder: Path) -> None:
    """By what the device's own allocator raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)


PROMISES: tuple[Promise, ...] = (
    convolutions_and_products_are_full_float32,
    named_random_numbers_have_the_bits_of_the_cpu,
    a_network_computes_what_it_computes_in_float64,
    a_lack_of_memory_is_recognized,
    images_are_the_same_in_the_micro_batch_of_their_record,
    captured_sampling_gives_the_same_bits_as_eager,
    shards_made_twice_are_the_same_bytes,
    stored_samples_can_be_sampled_again,
    training_twice_ends_in_the_same_bits,
    training_in_bfloat16_twice_ends_in_the_same_bits,
    training_by_a_cuda_graph_has_the_bits_of_one_without,
    distillation_by_a_cuda_graph_has_the_bits_of_one_without,
    a_training_killed_at_a_random_step_ends_in_the_same_bits,
)


def two_workers_interrupted_end_in_the_same_bits(device_type: str, folder: Path) -> None:
    """By NCCL on two GPUs, by gloo on a CPU: a group that stops and resumes equals one that does not."""
    data, device = _packed(folder), torch.device(device_type)
    workers = _workers(device) | {"num_workers": 2}
    whole, parts = (_config(data, folder / name, device, workers=workers, steps=6) for name in "ab")
    undisturbed = run_group(whole, 2, folder, device_type=device_type)
    run_group(parts, 2, folder, stop_at=3, device_type=device_type)
    resumed = run_group(parts, 2, folder, device_type=device_type)
    assert undisturbed.exit_codes == resumed.exit_codes == [0, 0]
    assert undisturbed.checkpoint is not None
    assert resumed.checkpoint is not None
    assert undisturbed.checkpoint.record.step == resumed.checkpoint.record.step == 6
    require_equal_tensors(undisturbed.checkpoint.tensors, resumed.checkpoint.tensors)


def trained(config: TrainConfig, device: torch.device) -> dict[str, Tensor]:
    """Train in this process to the end; the tensors of the last checkpoint."""
    _train(config, device, lambda step: None)
    checkpoint = latest_checkpoint(plan_training(config).store)
    assert checkpoint is not None
    assert checkpoint.record.step == config.steps
    return checkpoint.tensors


def require_equal_tensors(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Fail with the names of those that differ."""
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


class _Driver:
    """Tells each step to `on_step`."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step, self._step = on_step, 0

    def report(self, step: int, note: str) -> None:
        """Nobody listens."""

    def should_stop(self) -> bool:
        self._step += 1
        self._on_step(self._step)
        return False


def _train(config: TrainConfig, device: torch.device, on_step: Callable[[int], None]) -> None:
    set_up_arithmetic(config.matmul, deterministic=config.deterministic)
    plan = plan_training(config)
    if plan.initial is not None:
        stage_initial(plan.store, plan.initial)
    initial = None if plan.initial is None else plan.initial.sha256
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest, initial_sha256=initial)
    train_worker(task, WorkerContext(rank=0, world=1, device=device), _Driver(on_step))


def _train_until_killed(config: TrainConfig, device: torch.device, step: int) -> None:
    """In a process of its own, which is killed once it has taken `step` steps."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_report_steps, args=(config.model_dump_json(), str(device), writer))
    process.start()
    writer.close()
    try:
        while reader.recv() < step:
            continue
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9


def _report_steps(config: str, device: str, writer: Connection) -> None:
    _train(TrainConfig.model_validate_json(config), torch.device(device), writer.send)


def _packed(folder: Path) -> str:
    uri = f"file://{folder}/data"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=600), None)
    return uri


def _workers(device: torch.device) -> dict[str, object]:
    return {"gpus_per_worker": 1} if device.type == "cuda" else {}


def _config(data: str, runs: Path, device: torch.device, **changes: object) -> TrainConfig:
    """A training with every kind of layer: attention, two levels, dropout, classes."""
    runs.mkdir(exist_ok=True)
    net = json.loads(tiny(data, "").model_dump_json())["net"] | {
        "base_channels": 16,
        "multipliers": [1, 2],
        "attention_resolutions": [4],
        "mid_attention": True,
    }
    given: dict[str, object] = {
        "net": net,
        "steps": STEPS,
        "log_every_steps": 2,
        "checkpoint": {"every_steps": 4},
        "workers": _workers(device),
    }
    return tiny(data, f"file://{runs}", **(given | changes))


@contextlib.contextmanager
def sampling(folder: Path, output: str, device: torch.device) -> Generator[GenerateConfig]:
    """Settings of a small generation on the device, with this process set up for it as a worker's is."""
    (folder / output).mkdir()
    model = folder / "model"
    if not model.exists():
        tiny_model(model, tiny_card(size=8))
    gpus = 1 if device.type == "cuda" else 0
    config = settings(
        model,
        f"file://{folder}/{output}",
        count=20,
        gpus_per_worker=gpus,
        sampler={"kind": "dpm++2m", "num_steps": 5},
    )
    threads = torch.get_num_threads()
    set_up_torch(writer_of(config).engine.spec)
    try:
        yield config
    finally:
        torch.set_num_threads(threads)


def _convolved(x: Tensor, kernel: Tensor, product: Tensor) -> list[Tensor]:
    """A convolution and a product, and their gradients."""
    x, kernel, product = given = [value.clone().requires_grad_() for value in (x, kernel, product)]
    convolved, multiplied = F.conv2d(x, kernel, padding=1), x.flatten(2).transpose(1, 2) @ product
    (convolved.square().mean() + multiplied.square().mean()).backward()
    gradients = [value.grad for value in given if value.grad is not None]
    return [value.detach() for value in (convolved, multiplied, *gradients)]


def _twin(net: UNet) -> UNet:
    twin = UNet(net.config)
    twin.load_state_dict(net.state_dict())
    return twin.eval()
