"""What a training is said to need, and the micro-batches that follow from it."""

import pytest
import torch
from torch import nn

from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import TrainConfig, WorkerConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.nets import DropoutKeys, UNet, parameter_count
from ddpm_pipeline.nets.flops import sample_flops
from ddpm_pipeline.train import loop, memory
from ddpm_pipeline.train.memory import (
    activation_bytes,
    fitting_samples,
    largest_micro_batch,
    state_memory,
    with_micro_batch,
    worker_memory_bytes,
)
from tests.train.test_loop import run_alone
from tests.train.tiny import tiny

CPU = torch.device("cpu")


def net_of(**changes: object) -> UNetConfig:
    return UNetConfig(**{"image_size": 16, "base_channels": 32, "multipliers": (1, 2), **changes})  # type: ignore[arg-type]


def kept_by_a_real_pass(config: UNetConfig, samples: int) -> int:
    """Bytes of the distinct tensors that a real forward pass keeps for its backward pass."""
    net = UNet(config).train()
    own = {parameter.data_ptr() for parameter in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, t = torch.randn(samples, 3, config.image_size, config.image_size), torch.zeros(samples)
    keys = DropoutKeys(0, torch.arange(samples)) if config.dropout else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x, t, dropout=keys).square().mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


PLAIN = {"attention_resolutions": (), "mid_attention": False}


@pytest.mark.parametrize(("changes", "most"), [(PLAIN, 1.01), (PLAIN | {"dropout": 0.1}, 1.01), ({}, 1.6)])
def test_activations_are_what_a_real_pass_keeps(changes: dict[str, object], most: float) -> None:
    config = net_of(**changes)
    real = kept_by_a_real_pass(config, 4) / 4
    # attention on the CPU keeps no matrix, which in so small a network weighs much
    assert 0.99 * real <= activation_bytes(config, "float32") <= most * real


def test_half_precision_keeps_about_half_but_norms() -> None:
    full, half = (activation_bytes(net_of(), precision) for precision in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert 0.5 * full < half < 0.9 * full


def test_operations_are_those_of_the_convolutions_and_products() -> None:
    config = net_of(multipliers=(1,), num_res_blocks=1, attention_resolutions=(), mid_attention=False)
    counted = 0
    net = UNet(config)

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(module, nn.Conv2d):
            counted += 2 * out[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counted += 2 * module.weight.numel()

    for module in net.modules():
        module.register_forward_hook(count)  # type: ignore[arg-type]
    net(torch.randn(1, 3, 16, 16), torch.zeros(1))
    # backward: the gradient of the weights and of the input, but for the image, which needs none
    stem = 2 * 32 * 16 * 16 * 3 * 9
    time = 2 * 32 * 128
    assert sample_flops(config) == 3 * counted - stem - time


def test_memory_counts_every_average_and_the_buckets_of_several_workers(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    one = 4 * parameter_count(UNet(config.net))
    assert state_memory(config).total == 5 * one
    more = tiny(digits, runs, ema={"kind": "power", "widths": (0.05, 0.1, 0.2)}, workers={"num_workers": 2})
    assert state_memory(more).total == (1 + 2 + 2 + 3) * one


def test_what_fits_grows_with_memory_and_is_never_less_than_one(digits: str, runs: str) -> None:
    config = tiny(digits, runs)
    sizes = [fitting_samples(config, 10**power) for power in range(4, 11)]
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    room = state_memory(config).total + 20 * 1.5 * activation_bytes(config.net, "float32")
    assert fitting_samples(config, int(room) + 1) == 20


def test_a_share_that_fits_is_not_cut_and_a_given_size_is_kept(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(digits, runs)
    assert with_micro_batch(config, 1, CPU).workers.micro_batch is None
    given = config.model_copy(update={"workers": WorkerConfig(micro_batch=9)})
    assert with_micro_batch(given, 1, CPU).workers.micro_batch == 9
    monkeypatch.setattr(memory, "worker_memory_bytes", lambda *_: 0)
    assert with_micro_batch(config, 1, CPU).workers.micro_batch == 1


def test_the_size_follows_from_settings_and_hardware_not_from_what_is_free(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = WorkerConfig(num_workers=2)
    before = worker_memory_bytes(workers, CPU)
    held = bytearray(50_000_000)
    assert worker_memory_bytes(workers, CPU) == before
    del held
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 64 * 2**30)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert worker_memory_bytes(WorkerConfig(cpus_per_worker=4), CPU) == 8 * 2**30
    assert worker_memory_bytes(WorkerConfig(cpus_per_worker=99), CPU) == 32 * 2**30


def test_a_training_in_derived_micro_batches_ends_near_the_whole_one(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_alone(tiny(digits, f"{runs}/a", steps=8))
    monkeypatch.setattr(memory, "fitting_samples", lambda *_: 5)
    cut, again = (run_alone(tiny(digits, f"{runs}/{name}", steps=8)) for name in "bc")
    assert any(not torch.equal(cut[name], value) for name, value in whole.items())
    for name, value in whole.items():
        assert torch.equal(cut[name], again[name])
        if name.startswith("net/"):
            torch.testing.assert_close(cut[name], value, rtol=1e-2, atol=1e-3)


def test_out_of_memory_names_the_setting_and_the_next_smaller_size(
    digits: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loop, "train_step", full)
    config: TrainConfig = tiny(digits, runs)
    with pytest.raises(UserError, match=r"micro_batch: 14 samples .* set train\.workers\.micro_batch=7"):
        run_alone(config)
    assert largest_micro_batch(config, 3) == 5
